import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from forks import Forked

import train as train_module
from data import prepare
from model import Parcae, ParcaeConfig
from parts import ranks, settings
from parts import run_directory as run_module
from parts.run_directory import FILES
from train import schedule

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = (
    "--preset parcae-nano --muon-lr 3e-2 --n-embd 32 --n-head 2 "
    "--block-size 32 --batch-size 8 --eval-sequences 2 --device cpu "
    "--dtype float32"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Real text: some of the standard library."""
    files = [
        module.__file__ for module in (argparse, json, re, signal, subprocess)
    ]  # not ours: rounding hangs on every letter
    return prepare("text", tmp_path_factory.mktemp("data") / "text", "bytes", files)


@pytest.fixture
def train(corpus, tmp_path):
    def train(name, *flags, ranks=1, code=0, tiny=TINY):
        flags = ["--data", corpus, "--out", tmp_path / name, *tiny, *map(str, flags)]
        run = (
            script("train.py", *flags, cwd=tmp_path)
            if ranks == 1
            else subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc-per-node={ranks}",
                    ROOT / "train.py",
                    *flags,
                ],
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env=ONE_THREAD,
            )
        )
        assert run.returncode == code, run.stderr[-2000:]
        return run

    train.out = tmp_path
    return train


def no_number(name):
    raise AssertionError(f"{name} is not JSON")


def log(path, kind="train"):
    return [
        line
        for text in (path / "log.jsonl").read_text().splitlines()
        if (line := json.loads(text, parse_constant=no_number))["kind"] == kind
    ]


def losses(path):
    return [line["loss"] for line in log(path)]


def weights(path):
    return torch.load(path / "ckpt.pt", weights_only=True)["model"]


def test_a_run_learns_and_writes_its_directory(train):
    sizes = "--block-size", 64, "--eval-sequences", 8
    run, out = train("a", *sizes, "--max-steps", 150, "--eval-every", 100), train.out / "a"
    assert (
        losses(out)[0] > 5 and sum(losses(out)[-10:]) / 10 < 2.7
    )  # bytes of Python; their unigram entropy is above 3
    (done,) = log(out, "done")
    assert [*done["val_loss"]] == ["1", "2", "4", "8", "16"] and done["val_loss"]["4"] < 2.8
    assert [*done["state_rms"]] == ["1", "2", "4", "8", "16"] and all(
        0 < rms < 100 for rms in done["state_rms"].values()
    )
    assert 0 < done["spectral_radius"] < 1
    assert "recurrence T" in run.stdout and "a sample" in run.stdout
    assert len(log(out, "eval")) == 1 and log(out)[0].keys() >= {
        "step",
        "tokens",
        "flops",
        "loss",
        "lr",
        "tok_per_s",
        "mfu",
    }
    config = json.loads((out / "config.json").read_text())
    assert (
        config["settings"]["max_steps"] == 150 and config["model"]["n_embd"] == 32 and config["git"]
    )
    model = Parcae.from_pretrained(out)
    flops = sum(8 * 64 * model.flops_per_token(line["mean_depth"], 0) for line in log(out))
    assert flops < done["flops"] < 3 * flops  # forward and backward, of the depths drawn
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "log.jsonl",
        "ckpt.pt",
        "tokenizer.json",
    }


def test_missing_data_is_made_or_data_py_says_why_not(tmp_path, capfd):
    assert script("train.py", "--dry-run", cwd=tmp_path).returncode == 0
    assert (tmp_path / "data" / "stdlib" / "val_000000.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").write_text("in the way")
    capfd.readouterr()
    assert script("train.py", "--dry-run", cwd=tmp_path).returncode == 2
    assert capfd.readouterr().err == f"data.py: error: {tmp_path / 'data'}: File exists\n"


def test_loops_may_begin_late(train):
    train("late", "--max-steps", 8, "--loop-from", 0.5)
    depths = [line["mean_depth"] for line in log(train.out / "late")]
    assert depths[:4] == [1] * 4 and min(depths[4:]) > 1


def test_resumed_equals_uninterrupted_bit_for_bit(train):
    whole, parts = train.out / "whole", train.out / "parts"
    train("whole", "--max-steps", 12, "--eval-every", 4)
    flags = ["--max-steps", "12", "--eval-every", "4"]
    data = json.loads((whole / "config.json").read_text())["data"]
    words = [ROOT / "train.py", "--data", data, "--out", parts, *TINY, *flags]
    process = Forked(words, train.out / "said.txt", env=ONE_THREAD)
    while process.poll() is None and (
        not (parts / "log.jsonl").exists()
        or len((parts / "log.jsonl").read_text().splitlines()) < 3
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0 and "--resume" in (train.out / "said.txt").read_text()
    stopped = log(parts)[-1]["step"]
    assert 0 < stopped < 12
    with open(
        parts / "log.jsonl", "a"
    ) as file:  # a line after the checkpoint, as of a run that was killed
        file.write(json.dumps({"kind": "train", "step": stopped + 1, "loss": 0}) + "\n")
    run = script("train.py", "--resume", "--out", parts)
    assert run.returncode == 0, run.stderr
    assert losses(parts) == losses(whole)
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(parts).items())
    assert log(parts, "done")[0]["val_loss"] == log(whole, "done")[0]["val_loss"]
    assert [line["step"] for line in log(parts, "eval")] == [4, 8]


def test_a_second_signal_does_not_interrupt_the_save(train, monkeypatch):
    """tools/sweep.py sends one besides the terminal's."""
    save, write = run_module.Run.save, run_module.Run.log

    def log_and_signal(self, kind, **values):
        write(self, kind, **values)
        if self.state["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def signal_and_save(self):
        os.kill(os.getpid(), signal.SIGTERM)
        save(self)
    monkeypatch.setattr(run_module.Run, "log", log_and_signal)
    monkeypatch.setattr(run_module.Run, "save", signal_and_save)
    done = train("s", "--max-steps", 9)
    assert "stopped at step 3, saved at 3" in done.stdout and weights_step(train.out / "s") == 3


SIGNALLED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch, train
from parts import cli, ranks, run_directory as run
save, loop = run.Run.save, train.train
pids = {pids!r}
ranks.pick_dtype = lambda *_: (torch.float32, torch.bfloat16)[ranks.rank()]  # as each measures

def slow(self):  # rank 1 is in the next step already, when both get the signal
    save(self)
    if ranks.rank() == 0 and self.state["step"] == 5:
        time.sleep(1)
        for name in os.listdir(pids):
            os.kill(int(name), signal.SIGTERM)
        time.sleep(0.1)

def begin(s):
    with open(os.path.join(pids, str(os.getpid())), "w") as file:
        file.write(str(s.model.compute_dtype))
    return loop(s)

run.Run.save, train.train = slow, begin
sys.argv[0] = "train.py"
cli.run_script(train.main)
"""


def test_ranks_stop_together_whenever_the_signal_comes_and_share_a_dtype(corpus, tmp_path):
    (tmp_path / "pids").mkdir()
    (tmp_path / "signalled.py").write_text(
        SIGNALLED.format(root=str(ROOT), pids=str(tmp_path / "pids")))
    words = [tmp_path / "signalled.py", "--data", corpus, "--out", tmp_path / "r", *TINY,
             "--max-steps", "40", "--eval-every", "5"]
    with socket.create_server(("localhost", 0)) as free:
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    started = [Forked(words, tmp_path / f"{rank}.txt", tmp_path,
                      ONE_THREAD | address | {"RANK": str(rank), "WORLD_SIZE": "2"})
               for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in started] == [0, 0]
    assert "stopped at step " in (tmp_path / "0.txt").read_text()
    assert 5 < weights_step(tmp_path / "r") < 40
    assert [file.read_text() for file in (tmp_path / "pids").iterdir()] == 2 * ["torch.float32"]


@pytest.mark.parametrize("variables, said", [
    ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment, and MASTER_ADDR and "
                                       "MASTER_PORT not set there: start several ranks with torch"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "and RANK not set there"),
    ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is 1 in the environment, must be whole numbers"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK below"),
    ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK is first"),
    ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE is -1"),
])
def test_ranks_that_cannot_find_each_other_get_one_line(variables, said, train, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = train("r", "--max-steps", 1, code=2).stderr
    assert said in error and error.count("\n") == 1 and not (train.out / "r").exists()


def test_one_of_one_is_no_rank(monkeypatch):
    for variables in ({}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": ""}):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert ranks.ranks() == (0, 1)


def test_each_rank_has_a_gpu_of_its_own_and_says_which(monkeypatch):
    told = {}
    monkeypatch.setattr(ranks, "pick_device", lambda device, *_: torch.device(device))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(ranks.dist, "init_process_group",
                        lambda backend, **options: told.update(backend=backend, **options))
    monkeypatch.setenv("LOCAL_RANK", "3")
    args = SimpleNamespace(device="cuda", compile=False)
    assert ranks.setup_device(args) == torch.device("cuda:0") and not told
    monkeypatch.setattr(ranks, "world", lambda: 4)
    device = ranks.setup_device(args)
    assert told == {"backend": "nccl", "device_id": device} and device == torch.device("cuda:3")
    assert ranks.setup_device(SimpleNamespace(device="cpu", compile=False)).type == "cpu"
    assert told == {"backend": "gloo", "device_id": None}


def test_no_rank_has_more_work_and_micro_batches_are_of_like_depth(build, monkeypatch):
    model, world, micro = build(), 4, 4
    handed = []  # (rank, depths of a micro-batch)

    class Recorder:
        weight = torch.zeros((), requires_grad=True)
        no_sync = contextlib.nullcontext

        def parameters(self):
            return iter([self.weight])

        def __call__(self, idx, targets, depths):
            handed.append((train_module.rank(), idx.tolist(), depths))
            return None, self.weight * 1
    loader = SimpleNamespace(batch=lambda samples: (samples, samples))
    monkeypatch.setattr(train_module, "world", lambda: world)
    monkeypatch.setattr(train_module.dist, "all_reduce", lambda total: None)
    recorder = Recorder()
    steps = 40
    work = torch.zeros(steps, world)
    for step in range(steps):
        depths = model.sample_depths(64, torch.Generator().manual_seed(step))
        handed.clear()
        for r in range(world):
            monkeypatch.setattr(train_module, "rank", lambda r=r: r)
            train_module.backward(recorder, loader, depths, 1000, micro, step)
        rows = sorted(row for _, rows, _ in handed for row in rows)
        assert rows == [*range(1000, 1064)]  # the same batch, whoever reads it
        for r, rows, part in handed:
            assert torch.equal(part, depths[torch.tensor(rows) - 1000]) and len(part) == micro
            work[step, r] += part.sum()
        for (r, _, part), (next_r, _, later) in itertools.pairwise(handed):
            assert r != next_r or part.min() >= later.max()  # micro-batches are of like depth
    share = work / work.mean(1, keepdim=True)
    assert share.max(1).values.mean() < 1.025  # like cards: 1.05
    assert (share.mean(0) - 1).abs().max() < 0.005

def test_twenty_kills_at_random_moments_change_nothing(train, corpus):
    """Each child is forked from a process that has torch imported, killed outright, and followed
    by a resume."""
    flags = ["--max-steps", 120, "--eval-every", 4, "--eval-sequences", 1, "--eval-recurrence", 1]
    train("whole", *flags)
    moment, out = random.Random(0), train.out / "killed"
    first = ["--data", corpus, *TINY, *flags]

    def start():
        rest = ["--resume"] if (out / "ckpt.pt").exists() else first
        return Forked([ROOT / "train.py", "--out", out, *rest])

    def size():
        return (out / "log.jsonl").stat().st_size if (out / "log.jsonl").exists() else 0

    for _ in range(20):
        child, more, before = start(), moment.randrange(0, 2000), size()
        while child.is_alive() and size() < before + more:
            time.sleep(0.002)
        time.sleep(moment.random() * 0.05)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    (out / ".ckpt.pt.x.tmp").touch()  # as a kill leaves it in the middle of a save
    assert start().wait() == 0
    assert losses(out) == losses(train.out / "whole") and log(out, "done")[0]["step"] == 120
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(out).values(), weights(train.out / "whole").values())
    )
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (train.out / "whole").iterdir()
    )


def test_two_ranks_and_accumulation_repeat_one_process(train):
    flags = [
        "--max-steps",
        6,
        "--dtype",
        "float32",
        "--eval-every",
        3,
        "--muon-lr",
        3e-3,
    ]
    train("one", *flags)
    train("accumulated", *flags, "--micro-batch", 2)
    train("two", *flags, ranks=2)
    for name in ("accumulated", "two"):
        assert losses(train.out / name) == pytest.approx(losses(train.out / "one"), rel=1e-4)
        assert log(train.out / name)[-1]["flops"] == log(train.out / "one")[-1]["flops"]
        norms = [[line["grad_norm"] for line in log(train.out / n)] for n in (name, "one")]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
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
    ratio = (
        model.flops_per_token(accounting="paper") / model.flops_per_token()
    )  # tables counted, the head not
    assert log(train.out / "b")[-1]["flops"] / exact["flops"] == pytest.approx(ratio, rel=0.05)


def test_the_last_evaluation_is_at_the_mean_recurrence_too(train):
    train("m", "--max-steps", 1, "--mean-recurrence", 3, "--eval-recurrence", 1, 8)
    assert [*log(train.out / "m", "done")[0]["val_loss"]] == ["1", "3", "8"]


def test_the_loss_to_compare_with_is_of_all_tokens(train, tmp_path):
    """Of a text that begins with only one letter, too."""
    (tmp_path / "t.txt").write_text("a" * 2_000_000 + "bcdefghi" * 500_000)
    data = prepare("text", tmp_path / "letters", "bytes", [tmp_path / "t.txt"])
    said = train("l", "--data", data, "--max-steps", 1).stdout
    shares = np.array([2.0, *[(0.9 * 6 - 2) / 8] * 8]) / (0.9 * 6)  # of the letters in train
    entropy = -(shares * np.log(shares)).sum()
    assert f"it is {entropy:.2f} for a model that knows only how frequent" in said


def test_schedule_is_constant_then_linear_to_zero():
    assert [schedule(p, 0.5) for p in (0, 0.3, 0.5, 0.75, 1)] == [1, 1, 1, 0.5, 0]
    assert schedule(0.9, 0) == 1


def test_each_optimiser_has_its_own_rate_on_one_schedule(build, tokens):
    model, args = build(), settings.parse_args("", ["--muon-lr", "4e-2", "--adamw-lr", "1e-2"])
    optimizers = train_module.make_optimizers(model, args)
    model(tokens, tokens)[1].backward()
    train_module.update(model, optimizers, args, torch.tensor(1.0), 0.75, 0)
    rates = {name: one.param_groups[0]["lr"] for name, one in optimizers.items()}
    assert rates == {"muon": 2e-2, "adamw": 5e-3}


def test_depths_are_drawn_as_depth_sampling_says(build):
    model = build(mean_recurrence=4)

    def draws(how):
        args = SimpleNamespace(batch_size=8, loop_from=0, depth_sampling=how)
        return torch.stack([train_module.draw_depths(model, args, 0.5, s) for s in range(50)])
    assert (draws("fixed") == 4).all()
    for how, alike in (("per-batch", True), ("per-sequence", False)):
        found = draws(how)
        assert bool((found == found[:, :1]).all()) == alike and len(found.unique()) > 3


def test_each_seed_has_weights_text_and_depths_of_its_own(train, monkeypatch):
    seen, forward = [], Parcae.forward

    def note(self, idx, targets, *, depths):
        seen.append([self.wte.weight.detach().clone(), idx, depths])
        return forward(self, idx, targets, depths=depths)
    monkeypatch.setattr(Parcae, "forward", note)
    for seed in (0, 0, 1):
        train("s", "--max-steps", 1, "--block-size", 8, "--seed", seed, "--overwrite")
    for zero, again, one in zip(*seen):
        assert torch.equal(zero, again) and not torch.equal(zero, one)


def test_the_flops_of_a_step_are_the_sum_over_its_rows(build):
    model, depths = build(backprop_depth=2), torch.tensor([1, 2, 9, 4])
    state = dict.fromkeys(("step", "samples", "tokens", "flops", "seconds"), 0)
    args = SimpleNamespace(batch_size=4, accounting="exact")
    S = model.config.block_size
    assert train_module.add_step(state, args, model, depths, 1.0)[0] == state["tokens"] == 4 * S
    rows = [model.flops_per_token(T, min(T, 2)) for T in depths.tolist()]
    assert state["flops"] == pytest.approx(S * sum(rows))


def test_an_evaluation_is_a_mean_over_sequences_that_start_from_zero(build):
    idx = torch.randint(50, (6, 16), generator=torch.Generator().manual_seed(0))

    class Texts(list):
        def batch(self, rows):
            return idx[list(rows)], idx[list(rows)].roll(1, 1)
    model = build()
    found = train_module.evaluate(model, Texts(range(6)), 9, 4, [1, 3])  # batches of 4 and 2
    *_, (h, _) = model.eval().states(idx, 3)
    _, loss = model(idx, idx.roll(1, 1), recurrence=3)
    assert found["val_loss"][3] == pytest.approx(loss.item(), rel=1e-5)
    assert found["state_rms"][3] == pytest.approx(h.square().mean().sqrt().item(), rel=1e-5)


def test_non_finite_steps_are_skipped_then_stop_the_run(train, corpus, tmp_path):
    train("n", "--max-steps", 2)
    checkpoint = torch.load(tmp_path / "n" / "ckpt.pt", weights_only=True)
    checkpoint["model"]["wte.weight"][:] = torch.nan
    torch.save(checkpoint, tmp_path / "n" / "ckpt.pt")
    run = train("n", "--resume", "--max-steps", 30, code=2, tiny=[])
    assert "not finite 10 steps in a row, at step 12" in run.stderr
    assert "ckpt.pt is from step 2" in run.stderr
    assert log(train.out / "n")[-1]["skipped"] == 10 and losses(train.out / "n")[2:] == [None] * 10
    run = train("n", "--max-steps", 3, "--muon-lr", 1e30, "--overwrite", code=2)
    assert "not finite 2 steps in a row" in run.stderr and "no checkpoint was saved" in run.stderr


def test_weights_that_predict_nothing_replace_no_checkpoint(train):
    """The loss of a step is of the weights before its update."""
    train("b", "--max-steps", 2)
    good = weights(train.out / "b")
    flags = ["--muon-lr", 1e30, "--cooldown", 0]
    for steps, every in ((3, 400), (9, 1)):  # the last step breaks them; one on the way
        run = train("b", "--resume", "--max-steps", steps, "--eval-every", every, *flags, code=2,
                    tiny=[])
        assert "ckpt.pt is from step 2" in run.stderr
        assert ("the val loss is not finite" in run.stderr) == (steps == 3)
    again = weights(train.out / "b")
    assert all(torch.equal(again[name], w) for name, w in good.items())


def test_a_run_that_ended_before_its_first_checkpoint_says_so(train):
    train("b", "--max-steps", 2)
    (train.out / "b" / "ckpt.pt").unlink()
    run = train("b", "--resume", code=2, tiny=[])
    assert "ended before its first checkpoint: start it again, without --resume" in run.stderr


def test_a_plain_transformer_loops_once_in_the_log(train):
    for depths in ("fixed", "per-batch", "per-sequence"):
        said = train("p", "--preset", "gpt-nano", "--max-steps", 1, "--depth-sampling", depths,
                     "--overwrite").stdout
        assert log(train.out / "p")[0]["mean_depth"] == 1
    assert "no loop, then" in said and "recurrence 1 " not in said and "run once" not in said


def test_a_last_step_that_is_not_finite_costs_no_other(train, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_grad_norm_(*args):
        norms.append(clip(*args) * (torch.nan if len(norms) == 2 else 1))
        return norms[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)
    train("s", "--max-steps", 3)
    last = log(train.out / "s")[-1]
    assert (last["step"], last["skipped"]) == (3, 1)
    checkpoint = torch.load(train.out / "s" / "ckpt.pt", weights_only=True)
    assert checkpoint["state"]["step"] == 3


def test_training_starts_from_another_model(train, tmp_path):
    train("first", "--max-steps", 60)
    for action, source, out in (("export", "first", "published"), ("import", "published", "again")):
        done = script("tools/published.py", action, tmp_path / source, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
    small = TINY[4:]  # the sizes come with the model
    for source in ("first", "again"):
        train(
            "more",
            "--init-from",
            tmp_path / source,
            "--mean-recurrence",
            6,
            "--max-steps",
            3,
            "--overwrite",
            tiny=small,
        )
        config = json.loads((tmp_path / "more" / "config.json").read_text())["model"]
        assert (config["n_embd"], config["mean_recurrence"], config["backprop_depth"]) == (32, 6, 3)
        assert losses(tmp_path / "more")[0] < losses(tmp_path / "first")[0] - 1
    train("more", "--resume", "--max-steps", 5, tiny=[])
    assert len(losses(tmp_path / "more")) == 5
    assert (
        "does not fit these flags"
        in train("x", "--init-from", tmp_path / "first", "--n-embd", 64, code=2, tiny=small).stderr
    )
    prepare("text", tmp_path / "other", "bpe:300", [ROOT / "model.py"])
    assert (
        "has other tokens than --init-from"
        in train(
            "x", "--init-from", tmp_path / "first", "--data", tmp_path / "other", code=2, tiny=small
        ).stderr
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "huge"], "--preset is 'huge', must be one of 'parcae-140m'"),
        (["--max-flops", "0"], "--max-flops is 0.0, must be at least 1"),
        (["--mean-recurrence", "0"], "mean_recurrence is 0, must be at least 1"),
        (["--eval-recurrence", "-1"], "--eval-recurrence is"),
        (
            ["--batch-size", "7", "--micro-batch", "2"],
            "must be a multiple of ranks * --micro-batch",
        ),
        (["--muon-lr", "x"], "invalid float"),
        (["--resume"], "holds no run to resume"),
        (["--resume", "--overwrite"], "leave out --overwrite"),
        (["--init-from", "x", "--preset", "gpt-nano"], "leave out --preset"),
        (["--n-recurrent", "0", "--mean-recurrence", "2"], "this model has no loop"),
        (["--data", "nowhere"], "nowhere/tokenizer.json does not exist"),
        (["--block-size", "100000"], "of more than 100000 tokens"),
        (["--device", "tpu"], "--device is tpu, must be auto or one of"),
        *((words.split(" "), words.split(" ")[0].strip("-")) for words in (
            "--seed -1", "--seed 99999999999999", "--muon-lr 1e400", "--adamw-lr inf",
            "--weight-decay nan", "--norm-eps -1", "--norm-eps nan", "--rope-base 1e-400", "--out ",
            "--device cpu:x", "--n-embd 1000000000000", "--eval-recurrence 99999999999",
            "--max-steps 2.5x", "--batch-size 1.5", "--batch-size 1e19")),
    ],
)
def test_mistakes_get_one_line(train, flags, message):
    error = train("bad", *flags, code=2).stderr
    assert message.replace("-", "_") in error.replace("-", "_") and error.count("\n") == 1
    assert not (train.out / "bad").exists()


@pytest.mark.parametrize("words", [
    [], ["--max-tokens", "1e4", "--max-steps", "1200", "--out", "out/my run"],
    ["--data", "it's here", "--no-qk-norm", "--compile", "--eval-recurrence", "2", "3",
     "--injection", "add", "--max-flops", "1e13", "--mean-recurrence", "3", "--out=out/x"]])
def test_the_command_said_at_the_end_trains_the_same_run_once(words):
    args = settings.parse_args("", words)
    command = train_module.run_once(words, args.out)
    assert command.startswith("python train.py ")
    again = settings.parse_args("", shlex.split(command)[2:])
    assert vars(again) == vars(args) | {"mean_recurrence": 1, "out": f"{args.out}-once"}


def test_a_sentence_says_what_looping_the_same_weights_gains():
    said = train_module.what_it_says(ParcaeConfig(), {1: 2.0, 8: 1.5})
    assert "run 8 times, predict 0.500 nats a token better than run once" in said
    for config in (ParcaeConfig(mean_recurrence=1), ParcaeConfig(n_recurrent=0)):
        assert train_module.what_it_says(config, {1: 2.0}) == ""


def set_tokens(folder, value, split="val"):
    """The last token of a shard becomes another."""
    file = folder / f"{split}_000000.bin"
    file.write_bytes(file.read_bytes()[:-2] + value.to_bytes(2, "little"))


@pytest.mark.parametrize("damage, flags, said", [
    (lambda d: set_tokens(d, 65535, "train"), [], "train_000000.bin has token 65535, must be"),
    (lambda d: set_tokens(d, 65535), [], "val_000000.bin has token 65535, must be below"),
    (lambda d: None, ["--batch-size", "1000000000"], "--batch-size is 1000000000, must be at"),
    (lambda d: None, ["--micro-batch", "1000000000000"], "--micro-batch is 1000000000000, must"),
    (lambda d: (d / "tokenizer.json").write_text((d / "tokenizer.json").read_text().replace(
        "endoftext", "pad")), [], "the tokenizer has none of the special tokens")])
def test_what_cannot_be_trained_leaves_no_directory(corpus, train, damage, flags, said):
    shutil.copytree(corpus, train.out / "damaged")
    damage(train.out / "damaged")
    run = train("a/b", "--data", train.out / "damaged", *flags, code=2)
    assert said in run.stderr and run.stderr.count("\n") == 1
    assert [path.name for path in train.out.iterdir()] == ["damaged"]


def test_a_failure_before_the_first_step_leaves_what_was_there(train, monkeypatch):
    """No memory for the batch, say. A run that it was to replace is left, too."""
    monkeypatch.setattr(run_module, "matmul_peak", lambda *args: 1e9)  # takes a while to measure
    train("old", "--max-steps", 1, "--dtype", "float32", "--eval-recurrence", 1)
    before = tree(train.out)

    def no_room(*args, **options):
        raise MemoryError("allocation failed")
    monkeypatch.setattr(Parcae, "recurrent_pass", no_room)
    for name in ("a/b", "old"):
        run = train(name, "--max-steps", 1, "--dtype", "float32", "--overwrite", code=2)
        assert "not enough memory" in run.stderr and tree(train.out) == before
    assert [path.name for path in train.out.iterdir()] == ["old"]
    assert [path.name for path in (train.out / "old").iterdir() if path.is_dir()] == []


def test_a_run_is_not_replaced_unasked_and_damage_is_named(train):
    train("r", "--max-steps", 1)
    assert "holds a run already" in train("r", "--max-steps", 1, code=2).stderr
    assert (
        "does not fit these settings"
        in train("r", "--resume", "--n-embd", 64, code=2, tiny=[]).stderr
    )
    (train.out / "r" / "ckpt.pt").write_bytes(b"PK damaged")
    assert "is not a checkpoint that can be read" in train("r", "--resume", code=2, tiny=[]).stderr


# ------------------------------------------------------------------ what must not be lost


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", '{"n_layer": 3}'),
        ("tokenizer.json", "{}"),
        ("log.jsonl", "mine\n"),
        ("ckpt.pt", "my weights"),
    ],
)
def test_what_is_not_a_run_is_not_replaced(train, name, content):
    (train.out / "mine").mkdir()
    (train.out / "mine" / name).write_text(content)
    for flags in ([], ["--overwrite"]):
        done = train("mine", "--max-steps", 1, *flags, code=2)
        assert "that does not belong to a run: " in done.stderr and done.stderr.count("\n") == 1
    assert tree(train.out / "mine") == {name: content.encode()}


def test_a_run_is_whole_until_another_that_replaces_it_has_saved(train, monkeypatch):
    train("o", "--max-steps", 2)
    before = tree(train.out / "o")
    train(
        "o", "--max-steps", 30, "--muon-lr", "1e30", "--overwrite", code=2
    )  # never saves: nothing is finite
    after = tree(train.out / "o")
    assert {name: after[name] for name in before} == before
    train("o", "--max-steps", 3, "--overwrite")
    assert len(losses(train.out / "o")) == 3
    assert {p.name for p in (train.out / "o").iterdir()} == {
        "config.json",
        "log.jsonl",
        "ckpt.pt",
        "tokenizer.json",
    }


def test_the_second_of_two_writers_is_refused_and_a_killed_one_holds_nothing(train, corpus):
    flags = [
        "--data",
        corpus,
        "--out",
        train.out / "l",
        *TINY,
        "--max-steps",
        "100000",
        "--eval-every",
        "2",
    ]
    first = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, flags)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ONE_THREAD,
    )
    while first.poll() is None and not (train.out / "l" / "ckpt.pt").exists():
        time.sleep(0.05)
    try:
        for flag in ("--resume", "--overwrite"):
            assert f"is in use by process {first.pid}" in train("l", flag, code=2, tiny=[]).stderr
    finally:
        first.kill()
        first.wait()
    step = weights_step(train.out / "l")
    train("l", "--resume", "--max-steps", step + 1, tiny=[])
    assert weights_step(train.out / "l") == step + 1 and not (train.out / "l" / ".lock").exists()


def weights_step(path):
    return torch.load(path / "ckpt.pt", weights_only=True)["state"]["step"]


def test_config_says_what_is_in_force_and_the_model_cannot_change(train):
    train("c", "--max-steps", 2)
    train("c", "--resume", "--max-steps", 3, "--mean-recurrence", 8, "--batch-size", 4, tiny=[])
    config = json.loads((train.out / "c" / "config.json").read_text())
    assert (
        config["settings"]["max_steps"] == 3
        and config["settings"]["batch_size"] == 4
        and "out" not in config["settings"]
    )
    assert (config["model"]["mean_recurrence"], config["model"]["backprop_depth"]) == (8, 4)
    assert (
        torch.load(train.out / "c" / "ckpt.pt", weights_only=True)["state"]["samples"] == 2 * 8 + 4
    )
    before = tree(train.out / "c")
    for flag in (
        ["--no-prelude-norm"],
        ["--injection", "add"],
        ["--no-value-embeds"],
        ["--mlp-width", 64],
        ["--seed", 1],
        ["--preset", "gpt-nano"],
        ["--accounting", "paper"],
    ):
        done = train("c", "--resume", "--max-steps", 4, *flag, code=2, tiny=[])
        assert (
            "does not fit these settings" in done.stderr
            and flag[0].replace("--no-", "--") in done.stderr
        )
    assert tree(train.out / "c") == before
    train("c", "--resume", "--max-steps", 4, "--mlp-width", 128, tiny=[])  # what it has


def test_a_kill_while_a_run_is_moved_in_leaves_the_rest_to_the_next(train):
    train("o", "--max-steps", 1)
    train("p", "--max-steps", 2, "--muon-lr", 1e-3, "--seed", 3)
    for moved in range(4):
        shutil.copytree(train.out / "o", train.out / f"{moved}")
        (train.out / f"{moved}" / ".new").mkdir()
        for i, name in enumerate(FILES):
            place = train.out / f"{moved}" / ("" if i < moved else ".new")
            shutil.copy(train.out / "p" / name, place / name)
    train("p", "--resume", "--max-steps", 3, tiny=[])
    for moved in range(4):
        train(f"{moved}", "--resume", "--max-steps", 3, tiny=[])
        assert losses(train.out / f"{moved}") == losses(train.out / "p")
        config = json.loads((train.out / f"{moved}" / "config.json").read_text())
        assert config["settings"]["seed"] == 3
        assert not (train.out / f"{moved}" / ".new").exists()


def test_an_evaluation_does_not_outlive_its_weights(train):
    train("o", "--max-steps", 1)
    there = [train.out / "o" / name for name in ("eval.json", "core.json")]
    for flags, removed in ((["--resume", "--max-steps", 1], False),  # it is finished
                           (["--resume", "--max-steps", 2], True),
                           (["--max-steps", 1, "--overwrite"], True)):
        for file in there:
            file.write_text("{}")
        train("o", *flags, tiny=[] if "--resume" in flags else TINY)
        assert [file.exists() for file in there] == [not removed] * 2


def test_an_evaluation_of_a_run_that_still_trains_goes_with_its_weights(train, monkeypatch):
    seen, save = [], run_module.Run.save

    def save_and_measure(self):
        save(self)
        seen.append((self.path / "eval.json").exists())
        (self.path / "eval.json").write_text("{}")
    monkeypatch.setattr(run_module.Run, "save", save_and_measure)
    train("e", "--max-steps", 3, "--eval-every", 1)
    assert seen == [False] * 3


def test_an_untied_head_is_not_tied_unnoticed(train):
    train("u", "--no-tie-embeddings", "--max-steps", 1)
    tied = "--init-from", train.out / "u", "--tie-embeddings", "--max-steps", 1
    assert "one would be lost" in train("v", *tied, code=2, tiny=TINY[4:]).stderr
    train("w", "--init-from", train.out / "u", "--max-steps", 1, tiny=TINY[4:])


def test_a_run_needs_no_git(train, monkeypatch):
    monkeypatch.setenv("PATH", "")
    train("g", "--max-steps", 1)
    assert json.loads((train.out / "g" / "config.json").read_text())["git"] is None


def test_compile_is_kept_on_resume_unless_switched_off(train):
    train("c", "--max-steps", 1)
    file = train.out / "c" / "config.json"
    config = json.loads(file.read_text())
    config["settings"]["compile"] = True
    file.write_text(json.dumps(config))
    words = ["--resume", "--out", str(train.out / "c")]
    assert settings.parse_args("", words).compile
    assert not settings.parse_args("", [*words, "--no-compile"]).compile


def test_a_checkpoint_is_written_before_it_is_evaluated(train, monkeypatch):
    states = Parcae.states

    def no_room(self, idx, *args):
        if len(idx) > 1:  # a single sequence takes less than training does
            raise MemoryError("allocation failed")
        return states(self, idx, *args)

    monkeypatch.setattr(Parcae, "states", no_room)
    run = train("m", "--max-steps", 9, "--eval-every", 4, code=2)
    assert "not enough memory" in run.stderr
    checkpoint = torch.load(train.out / "m" / "ckpt.pt", weights_only=True)
    assert checkpoint["state"]["step"] == 4


def test_a_kill_before_the_first_checkpoint_is_in_nobodys_way(train):
    train("k", "--max-steps", 1)
    for names in (["config.json"], ["config.json", "tokenizer.json"]):
        (train.out / "new" / ".new").mkdir(parents=True)
        for name in names:
            shutil.copy(train.out / "k" / name, train.out / "new" / name)
            shutil.copy(train.out / "k" / name, train.out / "new" / ".new" / name)
        train("new", "--max-steps", 1)
        assert {p.name for p in (train.out / "new").iterdir()} == {*FILES}
        shutil.rmtree(train.out / "new")


def test_another_text_or_arithmetic_is_said(train, tmp_path, corpus):
    """The train fixture's --data is the corpus."""
    text = ["--data", prepare("text", tmp_path / "text", "bytes", [ROOT / "model.py"])]
    train("t", "--max-steps", 1, *text)
    same = train("t", "--resume", "--max-steps", 2, *text, tiny=[])
    assert "up to rounding" not in same.stdout and "another text" not in same.stdout
    other = train("t", "--resume", "--max-steps", 3, "--micro-batch", 4, tiny=[])
    assert f"resumes with another text, from {corpus}" in other.stdout
    assert "resumes up to rounding: --micro-batch was None, is 4" in other.stdout
    start = "--init-from", train.out / "t", "--max-steps", 1
    said = f"holds another text than {train.out / 't'} was trained on"
    assert said not in train("i", *start, tiny=TINY[4:]).stdout  # t went on with the corpus
    assert said in train("j", *start, *text, tiny=TINY[4:]).stdout
    assert said not in train("j", "--resume", "--max-steps", 2, *text, tiny=[]).stdout


def test_mfu_is_a_share_of_one_peak_as_long_as_a_run_stays_on_its_machine(train, monkeypatch):
    monkeypatch.setattr(run_module, "matmul_peak", lambda device, dtype: next(peaks))
    peaks = iter([1e12, 2e12])
    train("m", "--max-steps", 1)
    same = train("m", "--resume", "--max-steps", 2, tiny=[])
    assert peak_flops(train.out / "m") == 1e12 and "MFU is a share" not in same.stdout
    monkeypatch.setattr(run_module, "machine_name", lambda device: "another")
    other = train("m", "--resume", "--max-steps", 3, tiny=[])
    assert peak_flops(train.out / "m") == 2e12
    assert "MFU is a share of 2,000 GFLOP/s from here on" in other.stdout


def peak_flops(path):
    return json.loads((path / "config.json").read_text())["peak_flops"]


def test_a_run_goes_on_with_its_own_settings_or_says_which_are_missing(train, corpus):
    train("s", "--max-steps", 1)
    file = train.out / "s" / "config.json"
    config = json.loads(file.read_text())
    del config["settings"]["data"], config["settings"]["grad_clip"]
    file.write_text(json.dumps(config))
    before = tree(train.out / "s")
    lost = script("train.py", "--resume", "--max-steps", 2, "--out", train.out / "s")
    assert lost.returncode == 2 and "names no data that the run read: give --data" in lost.stderr
    assert tree(train.out / "s") == before
    said = train("s", "--resume", "--max-steps", 2, tiny=[]).stdout  # with --data
    assert "resumes with --grad-clip 1.0, which the run had not recorded" in said


def test_a_small_model_takes_one_thread_unless_asked(train, monkeypatch):
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    train("small", "--max-steps", 1)
    train("asked", "--max-steps", 1, "--threads", 3)
    train("wide", "--max-steps", 1, "--n-embd", 128)
    assert counts == [1, 3]  # the wide one keeps what PyTorch takes


def test_a_copied_run_goes_on_where_it_lies(train, corpus):
    train("first", "--max-steps", 2)
    before = tree(train.out / "first")
    shutil.copytree(train.out / "first", train.out / "copy")
    train("copy", "--resume", "--max-steps", 3, tiny=[])
    assert tree(train.out / "first") == before and weights_step(train.out / "copy") == 3


def test_another_batch_size_goes_on_in_the_data(train, monkeypatch):
    read = []
    batch = train_module.Loader.batch
    monkeypatch.setattr(
        train_module.Loader,
        "batch",
        lambda self, samples: read.extend(map(int, samples)) or batch(self, samples),
    )
    train("parts", "--max-steps", 2, "--batch-size", 8)
    train("parts", "--resume", "--max-steps", 4, "--batch-size", 4, tiny=[])
    assert torch.load(train.out / "parts" / "ckpt.pt", weights_only=True)["state"]["samples"] == 24
    assert set(range(24)) <= set(read)


def test_a_full_disk_gets_one_line_and_the_run_stays_whole(train, request):
    train("a", "--max-steps", 1)
    before = tree(train.out / "a")
    request.getfixturevalue("full_disk")
    for flags in (["--overwrite"], ["--out", train.out / "new"]):
        error = train("a", "--max-steps", 2, *flags, code=2).stderr
        assert error.count("\n") == 1 and ("disk" in error or "too large" in error), error
    after = tree(train.out / "a")
    assert {name: after[name] for name in before} == before
    assert not [*train.out.rglob("*.tmp"), *(train.out / "new").rglob("ckpt.pt")]


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda text: text[:-20], "unreadable"),
        (lambda text: text.replace("\n", "\n\n", 1), ""),
        (lambda text: "\0" * 30 + "\n" + text, "unreadable"),
        (lambda text: "[1]\nnull\n" + text, "unreadable"),
        (lambda text: None, "is missing"),
    ],
)
def test_a_damaged_log_does_not_block_a_resume(train, damage, said):
    train("d", "--max-steps", 3)
    path = train.out / "d" / "log.jsonl"
    text = damage(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    done = train("d", "--resume", "--max-steps", 4, tiny=[])
    assert said in done.stdout and ("unreadable" in done.stdout) == (said == "unreadable")
    assert [line["step"] for line in log(train.out / "d")][-1] == 4 and len(
        log(train.out / "d", "done")
    ) == 1


def test_a_finished_run_is_not_finished_twice(train):
    train("f", "--max-steps", 2)
    before = tree(train.out / "f")
    done = train("f", "--resume", "--max-tokens", 1e9, tiny=[])
    assert "is finished: to continue it, give a larger --max-steps\n" in done.stdout
    assert tree(train.out / "f") == before


def test_data_of_another_tokenizer_is_refused(train, tmp_path):
    train("t", "--max-steps", 1)
    prepare("text", tmp_path / "bpe", "bpe:300", [ROOT / "model.py"])
    assert (
        "has other tokens"
        in train(
            "t", "--resume", "--max-steps", 2, "--data", tmp_path / "bpe", code=2, tiny=[]
        ).stderr
    )
    done = script("tools/evaluate.py", "--run", train.out / "t", "--data", tmp_path / "bpe")
    assert done.returncode == 2 and "has another tokenizer than" in done.stderr


def test_a_run_goes_on_without_what_it_started_from(train):
    train("start", "--max-steps", 1)
    train("tuned", "--init-from", train.out / "start", "--max-steps", 1, tiny=TINY[4:])
    shutil.rmtree(train.out / "start")
    train("tuned", "--resume", "--max-steps", 2, tiny=[])
    assert weights_step(train.out / "tuned") == 2


CHECKPOINTS = {
    "empty": lambda c: None,
    "a list": lambda c: [],
    "no model": lambda c: c.pop("model") and c,
    "model none": lambda c: c | {"model": None},
    "weights text": lambda c: c | {"model": dict.fromkeys(c["model"], "x")},
    "a tensor": lambda c: torch.ones(3),
    "no state": lambda c: c | {"state": {}},
    "step -1": lambda c: c | {"state": c["state"] | {"step": -1}},
    "step 1.5": lambda c: c | {"state": c["state"] | {"step": 1.5}},
    "no optimisers": lambda c: c | {"optimizers": None},
    "muon none": lambda c: c | {"optimizers": c["optimizers"] | {"muon": None}},
    "muon empty": lambda c: (
        c | {"optimizers": c["optimizers"] | {"muon": {"state": {}, "param_groups": []}}}
    ),
    "adamw shape": lambda c: (
        c["optimizers"]["adamw"]["state"][0].update(exp_avg=torch.ones(2)) or c
    ),
    "adamw complex": lambda c: (
        c["optimizers"]["adamw"]["state"][0].update(
            exp_avg=c["optimizers"]["adamw"]["state"][0]["exp_avg"] * 1j
        )
        or c
    ),
    "adamw lacks": lambda c: c["optimizers"]["adamw"]["state"][1].pop("exp_avg") is None or c,
    "muon of PyTorch": lambda c: [
        (state.update(momentum_buffer=state.pop("momentum")), state.pop("squares"))
        for state in c["optimizers"]["muon"]["state"].values()
    ] and c,
    "muon text": lambda c: c["optimizers"]["muon"]["state"].update({0: "x"}) or c,
}


def test_damaged_checkpoints_get_one_line_and_change_nothing(train):
    train("k", "--max-steps", 2)
    path = train.out / "k" / "ckpt.pt"
    good = path.read_bytes()
    for name, damage in CHECKPOINTS.items():
        path.write_bytes(good)
        damaged = damage(torch.load(path, weights_only=True))
        path.write_bytes(b"") if damaged is None else torch.save(damaged, path)
        before = tree(train.out / "k")
        done = train("k", "--resume", "--max-steps", 4, code=2, tiny=[])
        assert "ckpt.pt" in done.stderr and done.stderr.count("\n") == 1, (name, done.stderr)
        assert tree(train.out / "k") == before, name


def test_damaged_settings_get_one_line(train):
    train("s", "--max-steps", 1)
    file = train.out / "s" / "config.json"
    config = json.loads(file.read_text())
    for part, values in (
            ("settings", None), ("settings", []), ("settings", {"max_steps": [3]}),
            ("settings", {"batch_size": "x"}), ("settings", {"eval_recurrence": 0}),
            ("settings", {"dtype": "foo"}), ("settings", {"device": "cpu:x"}),
            ("settings", {"micro_batch": 1.5}), ("settings", {"muon_lr": "high"}), ("model", None),
            ("model", {"n_embd": 1.5}), ("model", {"n_head": True}),
            ("model", {"block_size": "inf"})):
        values = config[part] | values if isinstance(values, dict) else values
        file.write_text(json.dumps(config | {part: values}))
        before = tree(train.out / "s")
        done = train("s", "--resume", "--max-steps", 2, code=2, tiny=[])
        assert done.stderr.count("\n") == 1 and tree(train.out / "s") == before, done.stderr
