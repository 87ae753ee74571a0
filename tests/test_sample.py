import pytest
import torch
from conftest import save_run, script

from data import make_tokenizer, save_tokenizer
from model import Parcae
from sample import trace


@pytest.fixture
def run_directory(build, tmp_path):
    save_run(build(vocab_size=320), tmp_path)
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "tokenizer.json")
    return tmp_path


def sample(directory, *flags, stdin=b""):
    return script("sample.py", "--run", directory, *flags, stdin=stdin)


def test_a_block_of_text_for_each_recurrence(run_directory):
    first, again = (sample(run_directory, "--prompt", "déf ", "--recurrence", "1", "3", "--tokens", "40") for _ in range(2))
    assert first.returncode == 0, first.stderr
    strip = lambda out: [line for line in out.split("\n") if "tokens/s" not in line]
    assert strip(first.stdout) == strip(again.stdout)  # seeded
    assert first.stdout.startswith("--- recurrence 1\ndéf ")
    assert "--- recurrence 3\ndéf " in first.stdout and first.stdout.count("--- 40 tokens, ") == 2
    other = sample(run_directory, "--prompt", "déf ", "--recurrence", "1", "3", "--tokens", "40", "--seed", "1")
    assert strip(other.stdout) != strip(first.stdout)


def test_prompt_from_file_and_standard_input(run_directory):
    (run_directory / "p.txt").write_text("import os\n")
    for flags, stdin in ((["--prompt-file", run_directory / "p.txt"], b""), (["--prompt-file", "-"], b"import os\n")):
        run = sample(run_directory, *flags, "--tokens", "5", "--temperature", "0", stdin=stdin)
        assert "--- recurrence 4\nimport os\n" in run.stdout, run.stderr


@pytest.mark.parametrize("flags, message", [
    (["--run", "nowhere"], "nowhere holds no model"), (["--recurrence", "0"], "recurrence is 0, must be at least 1"),
    (["--recurrence", "4", "-1"], "recurrence is -1"), (["--prompt", ""], "--prompt is empty"), (["--prompt-file", "-"], "is empty"),
    (["--prompt-file", "none.txt"], "none.txt: No such file"), (["--tokens", "0"], "--tokens is 0"), (["--top-p", "2"], "top_p is 2.0")])
def test_mistakes_get_one_line(run_directory, flags, message):
    run = sample(run_directory, *flags)
    assert run.returncode == 2 and message in run.stderr and run.stderr.count("\n") == 1


def test_a_model_in_the_published_format(run_directory, tmp_path):
    Parcae.from_pretrained(run_directory).export(tmp_path / "published")
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "published" / "tokenizer.json")
    text = lambda out: [line for line in out.stdout.split("\n") if "tokens/s" not in line]
    ours, theirs = sample(run_directory, "--tokens", "20"), sample("nowhere", "--init-from", tmp_path / "published", "--tokens", "20")
    assert theirs.returncode == 0 and text(ours) == text(theirs)


def test_a_trace_shows_the_prediction_after_each_loop(run_directory, tmp_path):
    model = Parcae.from_pretrained(run_directory)
    idx = torch.arange(12)[None]
    probs, moved = trace(model, idx, 5)
    assert torch.allclose(probs[3], model(idx, recurrence=4)[0][0].softmax(-1)) and probs.shape == (5, 12, 320)
    assert torch.allclose(moved[0], torch.ones(12)) and (moved[4] < moved[1]).all()
    done = sample(run_directory, "--prompt", "x = [1, 2]\n", "--trace", tmp_path / "t.png", "--recurrence", "4")
    assert done.returncode == 0 and (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG"), done.stderr
    assert not list(tmp_path.glob("*.tmp"))
    assert "needs a model that loops and a prompt" in sample(run_directory, "--trace", tmp_path / "t.png").stderr


def test_an_exit_threshold_saves_loops(run_directory):
    done = sample(run_directory, "--tokens", "12", "--recurrence", "6", "--exit-threshold", "1e9")
    assert done.returncode == 0 and ", 2.00 loops a token" in done.stdout, done.stderr
