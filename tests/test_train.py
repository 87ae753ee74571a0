import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, script

from data import open_shard, prepare
from model import Parcae
from train import schedule

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = ["--n-embd", "32", "--n-head", "2", "--block-size", "64", "--batch-size", "8", "--eval-sequences", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Real text: some of the standard library."""
    files = [json.__file__, subprocess.__file__, re.__file__, signal.__file__, ROOT / "model.py"]
    return prepare("text", tmp_path_factory.mktemp("data") / "text", "bytes", files)


@pytest.fixture
def train(corpus, tmp_path):
    def train(name, *flags, ranks=1, code=0, tiny=TINY):
        flags = ["--data", corpus, "--out", tmp_path / name, *tiny, *map(str, flags)]
        run = script("train.py", *flags, cwd=tmp_path) if ranks == 1 else subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", ROOT / "train.py", *flags],
            capture_output=True, text=True, cwd=tmp_path, env=ONE_THREAD)
        assert run.returncode == code, run.stderr[-2000:]
        return run
    train.out = tmp_path
    return train


def log(path, kind="train"):
    return [line for line in map(json.loads, (path / "log.jsonl").read_text().splitlines()) if line["kind"] == kind]


def losses(path):
    return [line["loss"] for line in log(path)]


def weights(path):
    return torch.load(path / "ckpt.pt", weights_only=True)["model"]


def test_a_run_learns_and_writes_its_directory(train):
    run, out = train("a", "--max-steps", 150, "--eval-every", 100), train.out / "a"
    assert losses(out)[0] > 5 and sum(losses(out)[-10:]) / 10 < 2.7  # bytes of Python; their unigram entropy is above 3
    done, = log(out, "done")
    assert [*done["val_loss"]] == ["1", "2", "4", "8", "16"] and done["val_loss"]["4"] < 2.8
    assert [*done["state_rms"]] == ["1", "2", "4", "8", "16"] and all(0 < rms < 100 for rms in done["state_rms"].values())
    assert 0 < done["spectral_radius"] < 1
    assert "recurrence T" in run.stdout and "a sample" in run.stdout
    assert len(log(out, "eval")) == 1 and log(out)[0].keys() >= {"step", "tokens", "flops", "loss", "lr", "tok_per_s", "mfu"}
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["max_steps"] == 150 and config["model"]["n_embd"] == 32 and config["git"]
    model = Parcae.from_pretrained(out)
    flops = sum(8 * 64 * model.flops_per_token(line["mean_depth"], 0) for line in log(out))
    assert flops < done["flops"] < 3 * flops  # forward and backward, of the depths drawn
    assert {p.name for p in out.iterdir()} == {"config.json", "log.jsonl", "ckpt.pt", "tokenizer.json"}


def test_resumed_equals_uninterrupted_bit_for_bit(train):
    whole, parts = train.out / "whole", train.out / "parts"
    train("whole", "--max-steps", 12, "--eval-every", 4)
    flags = ["--max-steps", "12", "--eval-every", "4"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--data", json.loads((whole / "config.json").read_text())["data"],
                                "--out", parts, *TINY, *flags], stdout=subprocess.PIPE, text=True, env=ONE_THREAD)
    while not (parts / "log.jsonl").exists() or len((parts / "log.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 0 and "--resume" in output
    stopped = log(parts)[-1]["step"]
    assert 0 < stopped < 12
    with open(parts / "log.jsonl", "a") as file:  # a line after the checkpoint, as of a run that was killed
        file.write(json.dumps({"kind": "train", "step": stopped + 1, "loss": 0}) + "\n")
    run = script("train.py", "--resume", "--out", parts)
    assert run.returncode == 0, run.stderr
    assert losses(parts) == losses(whole)
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(parts).items())
    assert log(parts, "done")[0]["val_loss"] == log(whole, "done")[0]["val_loss"]


def test_two_ranks_and_accumulation_repeat_one_process(train):
    flags = ["--max-steps", 6, "--dtype", "float32", "--eval-every", 3]
    train("one", *flags)
    train("accumulated", *flags, "--micro-batch", 2)
    train("two", *flags, ranks=2)
    for name in ("accumulated", "two"):
        assert losses(train.out / name) == pytest.approx(losses(train.out / "one"), rel=1e-4)
        assert log(train.out / name)[-1]["flops"] == log(train.out / "one")[-1]["flops"]
        val = [log(train.out / n, "done")[0]["val_loss"]["4"] for n in (name, "one")]
        assert val[0] == pytest.approx(val[1], rel=1e-4)


def test_budgets_overshoot_by_less_than_a_step(train):
    for flag, kind, limit in (("--max-tokens", "tokens", 5000), ("--max-flops", "flops", 3e9)):
        train("b", flag, limit, "--overwrite")
        spent = [line[kind] for line in log(train.out / "b")]
        assert spent[-1] >= limit > spent[-2]
    exact = log(train.out / "b")[-1]
    train("b", "--max-steps", exact["step"], "--accounting", "paper", "--overwrite")
    model = Parcae.from_pretrained(train.out / "b")
    ratio = model.flops_per_token(accounting="paper") / model.flops_per_token()  # tables counted, the head not
    assert log(train.out / "b")[-1]["flops"] / exact["flops"] == pytest.approx(ratio, rel=0.05)


def test_schedule_is_constant_then_linear_to_zero():
    assert [schedule(p, 0.5) for p in (0, 0.3, 0.5, 0.75, 1)] == [1, 1, 1, 0.5, 0]
    assert schedule(0.9, 0) == 1


def test_non_finite_steps_are_skipped_then_stop_the_run(train, corpus, tmp_path):
    train("n", "--max-steps", 2)
    checkpoint = torch.load(tmp_path / "n" / "ckpt.pt", weights_only=True)
    checkpoint["model"]["wte.weight"][:] = torch.nan
    torch.save(checkpoint, tmp_path / "n" / "ckpt.pt")
    run = train("n", "--resume", "--max-steps", 30, code=2, tiny=[])
    assert "not finite 10 steps in a row, at step 12" in run.stderr
    assert log(train.out / "n")[-1]["skipped"] == 10


def test_training_starts_from_another_model(train, tmp_path):
    train("first", "--max-steps", 60)
    Parcae.from_pretrained(tmp_path / "first").export(tmp_path / "published")
    (tmp_path / "published" / "tokenizer.json").write_text((tmp_path / "first" / "tokenizer.json").read_text())
    small = TINY[4:]  # the sizes come with the model
    for source in ("first", "published"):
        train("more", "--init-from", tmp_path / source, "--mean-recurrence", 6, "--max-steps", 3, "--overwrite", tiny=small)
        config = json.loads((tmp_path / "more" / "config.json").read_text())["model"]
        assert (config["n_embd"], config["mean_recurrence"], config["backprop_depth"]) == (32, 6, 3)
        assert losses(tmp_path / "more")[0] < losses(tmp_path / "first")[0] - 1
    train("more", "--resume", "--max-steps", 5, tiny=[])
    assert len(losses(tmp_path / "more")) == 5
    assert "does not fit these flags" in train("x", "--init-from", tmp_path / "first", "--n-embd", 64, code=2, tiny=small).stderr
    prepare("text", tmp_path / "other", "bpe:300", [ROOT / "model.py"])
    assert "has other tokens than --init-from" in train("x", "--init-from", tmp_path / "first", "--data", tmp_path / "other", code=2,
                                                        tiny=small).stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("flags, message", [
    (["--preset", "huge"], "--preset is huge, must be one of parcae-140m"),
    (["--max-flops", "0"], "--max-flops is 0.0, must be at least 1"),
    (["--mean-recurrence", "0"], "mean_recurrence is 0, must be at least 1"), (["--eval-recurrence", "-1"], "--eval-recurrence is"),
    (["--batch-size", "7", "--micro-batch", "2"], "must be a multiple of ranks * --micro-batch"), (["--muon-lr", "x"], "invalid float"),
    (["--resume"], "holds no run to resume"), (["--data", "nowhere"], "nowhere/tokenizer.json does not exist"),
    (["--block-size", "100000"], "of more than 100000 tokens"), (["--device", "tpu"], "--device is tpu, must be auto or one of")])
def test_mistakes_get_one_line(train, flags, message):
    run = train("bad", *flags, code=2)
    assert message in run.stderr and run.stderr.count("\n") == 1
    assert not (train.out / "bad").exists()


def test_a_run_is_not_replaced_unasked_and_damage_is_named(train, corpus):
    train("r", "--max-steps", 1)
    assert "holds a run already" in train("r", "--max-steps", 1, code=2).stderr
    assert "does not fit these settings" in train("r", "--resume", "--n-embd", 64, code=2, tiny=[]).stderr
    (train.out / "r" / "ckpt.pt").write_bytes(b"PK damaged")
    assert "is not a checkpoint that can be read" in train("r", "--resume", code=2, tiny=[]).stderr
    assert open_shard(corpus / "train_000000.bin")[0] == 256
