import hashlib
import json
import math

import pytest
import torch
from conftest import ROOT, save_run, script

from data import prepare
from parts import figures, loader
from parts.cli import UserError
from parts.tokenizer import load_tokenizer
from runs import exits
from tools import evaluate


def call(*flags):
    return script("tools/evaluate.py", *flags)


def test_bits_per_byte_and_perplexity(run):
    done = call("--run", run, "--recurrence", 1, 3, "--sequences", 8, "--dtype", "float32")
    assert done.returncode == 0 and "bits per byte" in done.stdout, done.stderr
    saved = json.loads((run / "eval.json").read_text())
    assert [r["recurrence"] for r in saved["results"]] == [1, 3] and saved["tokens"] == 8 * 32
    for r in saved["results"]:
        assert r["perplexity"] == pytest.approx(math.exp(r["val_loss"]))
        assert r["bits_per_byte"] == pytest.approx(
            r["val_loss"] / math.log(2) * saved["tokens"] / saved["bytes"]
        )
    first, last = saved["results"]
    assert 0 < last["gain_standard_error"] < last["standard_error"]
    assert last["gain"] == pytest.approx(first["val_loss"] - last["val_loss"])
    assert load_tokenizer(run).name == "bytes" and 0 <= saved["tokens"] - saved["bytes"] <= 8


@pytest.mark.parametrize("kv_cache, same", [("per-loop", True), ("shared", False)])
def test_losses_through_the_cache(build, tokens, kv_cache, same):
    model = build().eval()
    model.compute_dtype = torch.float32
    plain, cached = (
        evaluate.token_losses(model, tokens, tokens, [4], kind)[4] for kind in ("none", kv_cache)
    )
    assert torch.allclose(plain, cached, atol=1e-4) == same
    assert torch.allclose(
        plain[:, 0], cached[:, 0], atol=1e-4
    )  # the first token has nothing to share
    once, shared = (
        evaluate.token_losses(model, tokens, tokens, [1], kind)[1] for kind in ("none", "shared")
    )
    assert torch.allclose(once, shared, atol=1e-4)  # one loop: nothing to share either


def test_exit_thresholds(run, tokens):
    model = evaluate.Parcae.from_pretrained(run)
    windows = [(one[None], one[None]) for one in tokens]
    rows = [exits.early_exit(model, windows, load_tokenizer(run), 4, threshold, "kl")
            for threshold in (0, 1e9)]
    assert [row["recurrence"] for row in rows] == [4, 2]
    assert rows[0]["val_loss"] != rows[1]["val_loss"]


def test_a_loss_that_is_off_the_scale_has_a_perplexity_all_the_same():
    row = evaluate.row_of(1, [9000.0, 9100.0], [10, 10], 20)
    assert row["val_loss"] == 905 and math.isfinite(row["perplexity"])


def test_the_standard_error_is_the_spread_of_repeated_samples():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, 150, (2000, 20), generator=generator).double()
    level = 1 + 0.2 * torch.randn(2000, 20, generator=generator).double()
    nats = tokens * level
    means = nats.sum(1) / tokens.sum(1)
    errors = [evaluate.standard_error(n, t) for n, t in zip(nats, tokens)]
    assert sum(errors) / len(errors) == pytest.approx(means.std().item(), rel=0.05)
    assert evaluate.standard_error(nats[0, :1], tokens[0, :1]) is None


def test_a_model_that_predicts_nothing_gets_one_line_and_no_number(run, build):
    """At T = 1 it is finite, at T = 16 it is not."""
    model = build(vocab_size=320, injection="concat")
    with torch.no_grad():
        model.injection.W.mul_(1e4)
    data = json.loads((run / "config.json").read_text())["data"]
    save_run(model, run, data=data)
    flags = ["--run", run, "--sequences", 1, "--dtype", "float32"]
    assert call(*flags, "--recurrence", 1).returncode == 0
    before = (run / "eval.json").read_text()
    for more in ([], ["--kv-cache", "per-loop"], ["--kv-cache", "shared"]):
        done = call(*flags, "--recurrence", 1, 16, *more)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "after 16 loops is not finite" in done.stderr
    idx = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(UserError, match="after 16 loops is not finite"):
        exits.early_exit_losses(model.eval(), idx, idx, 16, 0, "state")
    assert (run / "eval.json").read_text() == before


def measured(run, *flags):
    """What tools/evaluate.py prints first, and writes."""
    done = call("--run", run, "--recurrence", 1, "--sequences", 3, "--dtype", "float32", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[0], json.loads((run / "eval.json").read_text())


def test_an_evaluation_names_the_weights_and_the_text(run, tmp_path):
    data = tmp_path / "data"
    said, saved = measured(run)
    assert saved["step"] is None and saved["sequences"] == 3 and said.startswith(f"{run} on 96")
    assert saved["text"] == json.loads((data / "tokenizer.json").read_text())["text"]
    checkpoint = torch.load(run / "ckpt.pt", weights_only=True)
    for state, step in (({"step": 120}, 120), ({"step": "x"}, None), (3, None)):
        torch.save(checkpoint | {"state": state}, run / "ckpt.pt")
        assert measured(run)[1]["step"] == step
    (tmp_path / "t.txt").write_bytes(b"Gr\xc3\xbc\xc3\x9fe")
    _, saved = measured(run, "--text", tmp_path / "t.txt")
    whole = hashlib.sha256(b"Gr\xc3\xbc\xc3\x9fe").hexdigest()
    assert saved["text"] == {"source": str(tmp_path / "t.txt"), "sha256": whole}
    assert saved["sequences"] == 1
    # of a long text the part that was read: here three times 32 tokens, in two batches of data
    (tmp_path / "t.txt").write_text("a" * 200)
    _, saved = measured(run, "--text", tmp_path / "t.txt")
    assert saved["text"]["sha256"] == hashlib.sha256(b"a" * 96).hexdigest()
    assert saved["sequences"] == 3
    _, saved = measured(run, "--sequences", 10 ** 6)
    assert saved["sequences"] == saved["tokens"] // 32 < 100


def test_another_text_than_the_runs_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, path: figures.pyplot().close(figure))
    data = tmp_path / "data"
    config = json.loads((run / "config.json").read_text())
    text = json.loads((data / "tokenizer.json").read_text())["text"]
    other = "holds another text than"
    assert other not in measured(run)[0]  # a run of before, which does not say
    (run / "config.json").write_text(json.dumps(config | {"text": text}))
    assert other not in measured(run)[0]
    prepare("text", data, "bytes", [ROOT / "model.py"])  # again
    assert other not in measured(run)[0]
    prepare("text", data, "bytes", [ROOT / "data.py", ROOT / "model.py"])
    assert measured(run)[0].startswith(f"{data} {other} {run} was trained on: ")
    assert other not in measured(run, "--text", ROOT / "data.py")[0]
    for name, flags in (("runs/exits.py", ["--sequences", 2, "--most", 2]),
                        ("runs/guide.py", ["--sequences", 1, "--loops", 2])):
        done = script(name, "--run", run, "--out", tmp_path / "out", *flags)
        assert done.returncode == 0 and done.stdout.count(other) == 1, done.stderr
    done = script("runs/draft.py", "--run", run, "--recurrence", 2, "--draft", 1, "--ahead", 2,
                  "--tokens", 2, "--rounds", 1, "--out", tmp_path / "d.csv", "--temperature", 0)
    assert done.returncode == 0 and done.stdout.count(other) == 1, done.stderr
    saved = json.loads((data / "tokenizer.json").read_text())
    (data / "tokenizer.json").write_text(json.dumps(saved | {"text": None}))
    assert other not in measured(run)[0]  # data of before, too


def test_mistakes_get_one_line(run, tmp_path):
    for flags, message in (
        (["--run", "nowhere"], "nowhere holds no model"),
        (["--run", run, "--recurrence", 0], "--recurrence is 0"),
        (["--run", run, "--data", tmp_path / "none"], "has no val_"),
    ):
        done = call(*flags)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_text_file_is_read_whole(run, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("Grüße, " * 30)
    done = call("--run", run, "--text", tmp_path / "t.txt", "--recurrence", 2)
    saved = json.loads((run / "eval.json").read_text())
    assert done.returncode == 0 and saved["bytes"] == saved["tokens"] == len(
        ("Grüße, " * 30).encode()
    )
    (tmp_path / "t.txt").write_text("Grüße, " * 30, encoding="utf-8-sig")  # a mark is no text
    monkeypatch.setattr(loader, "EVAL_TOKENS", 1)  # sequences one by one
    one = call("--run", run, "--text", tmp_path / "t.txt", "--recurrence", 2)
    first = saved["results"][0]["val_loss"]
    saved = json.loads((run / "eval.json").read_text())
    assert saved["tokens"] == len(("Grüße, " * 30).encode())
    assert one.returncode == 0 and saved["results"][0]["val_loss"] == pytest.approx(first, rel=1e-5)
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe")
    done = call("--run", run, "--text", tmp_path / "t.txt")
    assert done.returncode == 2 and "is not UTF-8" in done.stderr
