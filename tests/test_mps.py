"""Every script that touches a device runs on one that refuses what Apple's mps refuses."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from mps import MPS, FakeMps, Refused

import bench
import sample
import train
from model import ParcaeConfig
from parts import run_directory as run_module
from parts.generation import EXIT_RULES
from runs import draft as drafts
from runs import exits
from tools import core, evaluate, trace


@pytest.fixture
def on_mps(monkeypatch, tmp_path):
    """on_mps(main, *words) runs a script's main there."""
    generator = torch.Generator
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(run_module, "matmul_peak", lambda *_: 1e9, raising=False)
    monkeypatch.chdir(tmp_path)

    def call(main, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with FakeMps():
            main()
    return call


def test_the_device_refuses_what_mps_refuses():
    with FakeMps():
        host = torch.ones(3)
        here = host.to("mps")
        assert here.device == MPS and host.device == (here + here).cpu().device != MPS
        assert torch.nn.Linear(2, 2).to(MPS).weight.device == MPS
        half, wide = here.bfloat16(), torch.zeros(3, device="mps")
        for refused in (lambda: here.double(), lambda: here.to(torch.float64), lambda: here + host,
                        lambda: torch.zeros(1, device=MPS, dtype=torch.float64),
                        lambda: torch.linalg.eigvals(torch.eye(2, device=MPS)),
                        lambda: half * wide, lambda: here.numpy(), lambda: host[here.long()],
                        lambda: host.to(MPS, non_blocking=True)):
            with pytest.raises(Refused):
                refused()
        assert here.sum().item() == 3 and here.cpu().double().tolist() == [1, 1, 1]


MACHINE = "--device", "mps", "--dtype"


@pytest.mark.parametrize("dtype, injection", [("bfloat16", "diagonal"), ("float32", "concat")])
def test_training(on_mps, run, dtype, injection):
    flags = ["--data", run.parent / "data", "--n-embd", 32, "--n-head", 1, "--block-size", 8,
             "--batch-size", 130, "--micro-batch", 130, "--eval-sequences", 1, "--max-steps", 1,
             "--mean-recurrence", 2, "--eval-recurrence", 1, 2, "--injection", injection, *MACHINE,
             dtype]
    on_mps(train.main, *flags, "--out", "r")
    on_mps(train.main, "--resume", "--out", "r", "--max-steps", 2)
    log = [json.loads(line) for line in open("r/log.jsonl")]
    assert log[-1]["kind"] == "done" and log[-1]["step"] == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_evaluating(on_mps, run, dtype):
    flags = ["--run", run, "--recurrence", 1, 3, "--sequences", 2, *MACHINE, dtype]
    on_mps(evaluate.main, *flags)
    rows = json.loads((run / "eval.json").read_text())["results"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tools/evaluate.py", *map(str, flags), "--device", "cpu"])
        evaluate.main()
    host = json.loads((run / "eval.json").read_text())["results"]
    assert [row["val_loss"] for row in rows] == pytest.approx([row["val_loss"] for row in host],
                                                              rel=1e-3)


def test_evaluating_token_by_token(on_mps, run):
    on_mps(evaluate.main, "--run", run, "--recurrence", 2, "--sequences", 1, *MACHINE, "bfloat16",
           "--kv-cache", "shared")


def test_core(on_mps, run, tmp_path):
    folder = tmp_path / "core" / "commonsense_reasoning"
    folder.mkdir(parents=True)
    items = [{"query": "a b", "choices": [" c", " de"], "gold": i % 2} for i in range(4)]
    (folder / "copa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    on_mps(core.main, folder.parent, "--run", run, "--recurrence", 2, *MACHINE, "bfloat16")


@pytest.mark.parametrize("dtype, flags", [
    ("bfloat16", ["--samples", 2, "--top-k", 5, "--top-p", 0.9]),
    ("float32", ["--temperature", 0, "--tokens", 33, "--recurrence", 1]),  # the window slides
    ("bfloat16", ["--draft", 1, "--ahead", 2]), ("int8", ["--draft", 1, "--temperature", 0]),
    ("bfloat16", ["--exit-threshold", 0.1])])
def test_sampling(on_mps, run, dtype, flags):
    flags = ["--run", run, "--prompt", "a", "--tokens", 3, "--recurrence", 3, *flags]
    on_mps(sample.main, *flags, *MACHINE, dtype)


def test_a_trace(on_mps, run):
    on_mps(trace.main, "--run", run, "--prompt", "a b", "--recurrence", 3, "t.html", *MACHINE[:2])


@pytest.mark.parametrize("rule", EXIT_RULES)
def test_measuring_exits(monkeypatch, run, rule):
    monkeypatch.setattr(exits, "THRESHOLDS", {rule: [0.1]})
    idx = torch.randint(256, (2, 1, 3))
    with FakeMps():
        model = evaluate.Parcae.from_pretrained(run).to(MPS)
        rows = exits.measure(model, [(one, one) for one in idx], evaluate.load_tokenizer(run), 2)
    assert [row["rule"] for row in rows] == ["fixed", "fixed", rule]


def test_timing_drafts(on_mps, run):
    ways = [drafts.Way(2, "int8"), drafts.Way(2, "int8", False, 1, 2),
            drafts.Way(2, "int8", exit=0.1)]

    def measure():
        prompt = torch.ones(1, 2, dtype=torch.int64, device=MPS)
        assert drafts.measure(run, [prompt], 3, ways, 0.7, 1).keys() == {*ways}
    on_mps(measure)


def test_timing(monkeypatch):
    tiny = ParcaeConfig(vocab_size=64, block_size=16, n_embd=32, n_head=1, n_prelude=1,
                        n_recurrent=1, n_coda=1, mean_recurrence=2)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    for module, function in ((bench.machine, "matmul_peak"), (bench, "bandwidth")):
        monkeypatch.setattr(module, function, lambda *_: 1e9)
    monkeypatch.setattr(bench, "STEPS", 2)
    cases = [bench.Case("looped", tiny, 2)]
    flags = SimpleNamespace(context=8, batch=2, rounds=1, device=MPS, compile=False, eager=False)
    with FakeMps():
        flags.dtype = torch.bfloat16
        assert bench.train_speed(cases, flags)
        flags.dtype = torch.int8
        assert bench.decode_speed(cases, flags)
