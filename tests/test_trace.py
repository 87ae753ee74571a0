import sys

import pytest
import torch
from conftest import save_run, script

from model import Parcae
from parts.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from tools import trace as trace_tool
from tools.trace import trace


@pytest.fixture
def run_directory(build, tmp_path):
    save_run(build(vocab_size=320), tmp_path)
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "tokenizer.json")
    return tmp_path


def draw(directory, *words):
    return script("tools/trace.py", "--run", directory, *words)


def test_a_trace_shows_the_prediction_after_each_loop(run_directory, tmp_path):
    model = Parcae.from_pretrained(run_directory)
    idx = torch.arange(12)[None]
    probs, ids, moved = trace(model, idx, 5, 12, 320)
    assert probs.shape == ids.shape == (5, 12, 320)
    probs = torch.zeros_like(probs).scatter(-1, ids, probs)
    assert torch.allclose(probs[3], model(idx, recurrence=4)[0][0].softmax(-1))
    assert torch.allclose(moved[0], torch.ones(12)) and (moved[4] < moved[1]).all()
    last, ids, last_moved = trace(model, idx, 5, 3, 320)
    last = torch.zeros_like(last).scatter(-1, ids, last)
    for of_all, of_last in ((probs, last), (moved, last_moved)):  # which see all the same
        assert torch.allclose(of_all[:, -3:], of_last, atol=1e-6)
    prompt = "x = [1, 2]\n" * 5  # longer than a picture, and than the context
    done = draw(run_directory, tmp_path / "t.png", "--prompt", prompt, "--recurrence", "4")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))
    assert (
        "needs a model that loops and a prompt"
        in draw(run_directory, tmp_path / "t.png").stderr
    )


def test_a_picture_is_of_the_end_of_a_long_prompt(run_directory, monkeypatch):
    shown = []
    monkeypatch.setattr(trace_tool, "picture", lambda path, labels, *rest: shown.extend(labels))
    model, tokenizer = Parcae.from_pretrained(run_directory), load_tokenizer(run_directory)
    idx = torch.arange(65, 65 + 20).repeat(3)[None, -32:]  # block_size
    monkeypatch.setattr(trace_tool, "TRACED", 5)
    trace_tool.draw_trace(model, tokenizer, idx, 2, "t.png")
    assert "".join(shown) == "PQRST"


def test_what_predicts_nothing_is_not_traced(run_directory, build, tmp_path):
    model = build(vocab_size=320, injection="concat")
    with torch.no_grad():
        model.injection.W.mul_(100)
    save_run(model, run_directory)
    flags = [tmp_path / "t.png", "--prompt", "x = 1"]
    assert draw(run_directory, *flags, "--recurrence", "2").returncode == 0
    (tmp_path / "t.png").unlink()
    done = draw(run_directory, *flags, "--recurrence", "64")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is not finite" in done.stderr and not (tmp_path / "t.png").exists()


def test_a_trace_needs_a_loop(run_directory, build, tmp_path):
    save_run(build(vocab_size=320, n_recurrent=0), run_directory)
    done = draw(run_directory, tmp_path / "t.png", "--prompt", "x = 1")
    assert done.returncode == 2 and "needs a model that loops" in done.stderr
    assert not (tmp_path / "t.png").exists()


def test_matplotlib_is_asked_for_first(run_directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = draw("nowhere", run_directory / "t.png", "--prompt", "x")
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr
