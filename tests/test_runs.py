"""The experiments' tables and pictures, from tiny runs; what a retrofitted model computes."""

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, save_run, script

from data import make_tokenizer, prepare
from model import PRESETS, Parcae, ParcaeConfig
from parts.cli import UserError
from parts.loader import open_shard
from parts.tokenizer import load_tokenizer, save_tokenizer
from runs import first, gpu, guide, half, p_hop, short, worth
from runs.common import at_one_rate, losses_of


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add_log(path, *lines):
    """The end of a log as train.py writes it."""
    state = {"step": 20, "skipped": 0, "tokens": 1000, "flops": 1.23e9, "seconds": 3.2}
    text = "".join(json.dumps(state | line) + "\n" for line in lines)
    (path / "log.jsonl").write_text(text)


def make_run(path, model, *lines):
    """A run directory with a log."""
    path.mkdir(parents=True)
    save_run(model, path, parameters=sum(p.numel() for p in model.parameters()))
    add_log(path, *lines)


def png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["half", "p_hop", "short", "stability"])
def test_no_run_gets_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr(p_hop, "read_docs", lambda: None)
    (tmp_path / "runs").mkdir()
    for source, said in (("runs", "holds no"), ("none.csv", "none.csv")):
        monkeypatch.setattr(sys, "argv", [name, str(tmp_path / source), str(tmp_path)])
        with pytest.raises((UserError, OSError), match=said):
            importlib.import_module(f"runs.{name}").main()


def test_half_takes_each_model_at_its_best_rate_and_redraws_from_its_table(build, tmp_path):
    looped = build(vocab_size=320)
    plain = build(vocab_size=320, n_recurrent=0, n_prelude=4, n_coda=0)
    for name, model, loss in (("looped-3e-2-0", looped, {"1": 3.0, "4": 2.4}),
                              ("looped-1e-2-0", looped, {"1": 3.0, "4": 2.5}),
                              ("plain-3e-2-0", plain, {"1": 2.6}),
                              ("deep-3e-2-0", plain, {"1": 2.2})):
        make_run(tmp_path / "half-8" / name, model, {"kind": "done", "val_loss": loss})
    make_run(tmp_path / "half-8" / "plain-3e-2-1", plain, {"kind": "eval", "val_loss": {"1": 2.6}})
    make_run(tmp_path / "half-8" / "plain-3e-2-2", plain, {"kind": "done", "val_loss": {"1": None}})
    first = script("runs/half.py", tmp_path / "half-8", tmp_path)
    assert first.returncode == 0 and png(tmp_path / "half-8.png"), first.stderr
    assert "plain-3e-2-1 is not finished and is left out" in first.stdout
    assert "plain-3e-2-2 has a loss that is not finite and is left out" in first.stdout
    assert "seed 0 by rate 0.01: 2.5000, 0.03: 2.4000" in first.stdout
    assert "twelve layers that looping closes: 50% (50% by seed; 95%: unbounded)" in first.stdout
    rows = read_csv(tmp_path / "half-8.csv")
    assert len(rows) == 4 and rows[0]["training_flops"] == "1.23e+09"
    assert float(rows[1]["inference_flops_per_token"]) > float(rows[-1]["cache_bytes_per_token"])

    (tmp_path / "half-8.png").unlink()
    again = script("runs/half.py", tmp_path / "half-8.csv", tmp_path)
    assert again.stdout == first.stdout.rpartition("left out\n")[2] and png(tmp_path / "half-8.png")


def test_first_pairs_runs_of_equal_tokens_and_variants_with_the_default():
    rows = [{"channels": 64, "layers": "0/1/0", "variant": variant, "mean_recurrence": loops,
             "rate": 0.02, "seed": seed, "tokens": 1000, "flops": "1e9" if loops == 1 else "2e9",
             "val_loss_1": at_1, "val_loss_4": at_4, "val_loss_16": at_4}
            for variant, loops, seed, at_1, at_4 in (
                ("", 1, 0, 2.0, 2.1), ("", 4, 0, 2.2, 1.5), ("", 1, 1, 2.0, 2.1),
                ("", 4, 1, 2.2, 1.75), ("fixed depth", 4, 1, 3.0, 1.25))]
    assert list(first.gains(rows)) == [((64, "0/1/0", 0.02), 4, "tokens", {0: 0.5, 1: 0.25})]
    assert [(T, mean, minus) for _, T, mean, minus in first.variants(rows)] == [
        ("1", 3.0, {1: pytest.approx(0.8)}), ("4", 1.25, {1: -0.5}), ("16", 1.25, {1: -0.5})]


def test_a_model_is_shown_at_the_rate_of_most_seeds_without_the_one_that_chose_it(capsys):
    rows = [{"rate": rate, "seed": seed, "val_loss": loss} for rate, seed, loss in
            ((2e-2, 0, 2.1), (1e-2, 0, 2.0))]
    assert at_one_rate("plain", rows) == rows[1:]  # the best for seed 0
    assert capsys.readouterr().out == "plain: seed 0 by rate 0.01: 2.0000, 0.02: 2.1000\n"
    rows += [{"rate": 2e-2, "seed": seed, "val_loss": 2.2} for seed in (2, 1)]
    assert [row["seed"] for row in at_one_rate("plain", rows)] == [0, 1, 2]
    rows.append({"rate": 2e-2, "seed": 3, "val_loss": 2.3})
    assert losses_of(at_one_rate("plain", rows)) == {1: 2.2, 2: 2.2, 3: 2.3}


def test_shares_of_a_gap_are_of_the_seeds_that_all_have():
    loss = {"plain": {0: 2.0, 1: 3.0, 2: 2.0}, "looped": {0: 1.5, 1: 2.9, 2: 1.5},
            "deep": {0: 1.0, 2: 1.0}}
    gain, gap = half.gain_and_gap(loss, "deep")
    assert gain.tolist() == [0.5, 0.5] and gap.tolist() == [1.0, 1.0]
    assert not half.gain_and_gap(loss | {"deep": {7: 1.0}}, "deep")[0].size


def test_models_with_other_seeds_are_compared_by_those_that_all_have(capsys):
    losses = {"looped": [1.5, 1.4, 1.6], "plain": [2.0, 1.9, 2.2, 2.1], "deep": [1.0, 0.9]}
    half.print_comparison({name: dict(enumerate(some)) for name, some in losses.items()})
    assert "closes: 50% (50%, 50% by seed; 95%: 50% to 50%)" in capsys.readouterr().out


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        wholes = random.normal(1, 0.05, 3)
        low, high = half.fieller(0.4 * wholes + random.normal(0, 0.05, 3), wholes)
        held += low <= 0.4 <= high
    assert 0.93 < held / 2000 < 0.97
    assert half.fieller([1, 1, 1], [0.1, -0.1, 0.2]) is None  # the whole may be 0
    # the shares of results/half.csv, computed by hand
    assert half.fieller([0.04082, 0.03175, 0.04231], [0.06137, 0.04127, 0.07059]) == pytest.approx(
        (0.5449, 1.1922), abs=1e-3)


def test_the_worth_of_a_loop_is_what_explains_the_gap_closed(tmp_path):
    once, core = worth.products(ParcaeConfig(**PRESETS["parcae-140m"]))
    plain = ParcaeConfig(**PRESETS["gpt-140m"])
    p = worth.point("a", ParcaeConfig(**PRESETS["parcae-140m"]), plain,
                    ParcaeConfig(**PRESETS["gpt-370m"]), 0.4)
    f = core / (once + core)
    assert p["f"] == f and p["worth"] == pytest.approx(p["times"] ** 0.4)
    assert 1 - f + f * 8 ** p["phi"] == pytest.approx(p["worth"])
    for name in worth.TABLES.values():
        shutil.copy(ROOT / "results" / "half.csv", tmp_path / name)
    done = script("runs/worth.py", tmp_path)
    assert done.returncode == 0 and png(tmp_path / "worth.png"), done.stderr
    assert "| 64 channels | 0.61 | 1.94 times | 66% (67%, 77%, 60%) |" in done.stdout
    assert "| paper, 370M | 0.27 | 2.14 times | 46% |" in done.stdout


def test_short_compares_the_lowest_losses_of_each_model(build, tmp_path):
    for name, loss in (("once-8-3e-2-0", {"1": 2.0}), ("once-8-3e-2-1", {"1": 2.1}),
                       ("once-8-1e-2-0", {"1": 2.2}), ("once-4-3e-2-0", {"1": 2.5}),
                       ("looped-4-1e-2-0", {"1": 2.5, "4": 1.9}),
                       ("looped-4-1e-2-1", {"1": 2.5, "4": 1.8})):
        make_run(tmp_path / "runs" / name, build(), {"kind": "done", "val_loss": loss})
    done = script("runs/short.py", tmp_path / "runs", tmp_path)
    assert done.returncode == 0 and png(tmp_path / "short.png"), done.stderr
    assert "run once, 8 passes: seed 0 by rate 0.01: 2.2000, 0.03: 2.0000" in done.stdout
    assert ("4 passes, below run once, 8 passes: +0.2000 nats (standard error 0.1000; "
            "+0.1000, +0.3000)") in done.stdout
    again = script("runs/short.py", tmp_path / "short.csv", tmp_path)
    assert again.stdout == done.stdout


def test_the_short_text_is_spread_over_the_long_one(tmp_path, monkeypatch):
    source = tmp_path / "long"
    prepare("text", source, "bytes", [ROOT / "train.py", ROOT / "model.py"])
    monkeypatch.setattr(short, "SOURCE", source)
    monkeypatch.setattr(short, "PIECES", 3)
    monkeypatch.setattr(short, "PIECE_TOKENS", 50)
    short.make_text(tmp_path / "short")
    long, few = (open_shard(path / "train_000000.bin") for path in (source, tmp_path / "short"))
    assert len(few) == 150
    assert np.array_equal(few[:50], long[:50]) and np.array_equal(few[100:], long[-50:])
    assert load_tokenizer(tmp_path / "short").n_vocab == 257
    val = [(path / "val_000000.bin").read_bytes() for path in (source, tmp_path / "short")]
    assert val[0] == val[1]


@pytest.mark.parametrize("name, table", [("half", "half.csv"), ("p_hop", "p-hop.csv")])
def test_the_published_pictures_are_redrawn_from_the_published_tables(name, table, tmp_path):
    done = script(f"runs/{name}.py", ROOT / "results" / table, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


def test_a_foreign_table_gets_one_line(tmp_path):
    done = script("runs/half.py", ROOT / "results" / "p-hop.csv", tmp_path)
    assert done.returncode == 2 and "is not this experiment's table" in done.stderr


def test_p_hop_reads_each_number_of_loops_as_a_run_of_that_many(build):
    _, docs = p_hop.p_hop_docs(n_train=1, n_val=3)
    rows = [[0, *text.encode()] for text in docs]
    docs = torch.tensor(rows)
    model = build(vocab_size=128, block_size=192, n_recurrent=1, mean_recurrence=8).eval()
    found = p_hop.accuracies(model, docs)
    assert list(found) == p_hop.LOOPS
    hops, truth = docs[:, 1::3] - ord("0"), docs[:, 3::3]
    for T in (1, 3, 12):
        with torch.no_grad():
            right = model(docs[:, :-1], recurrence=T)[0][:, 2::3].argmax(-1) == truth
        expected = [right[hops == p].float().mean().item() for p in p_hop.HOPS]
        assert found[T] == pytest.approx(expected, nan_ok=True)


def test_guesses_of_p_hop_are_the_best_by_p_and_symbol():
    docs, _ = p_hop.p_hop_docs(n_train=1500, n_val=1)
    found = {}
    for p, symbol, answer in re.findall(r"(\d)([a-z])([A-Z])", "".join(docs)):
        found.setdefault(int(p), Counter())[(ord(answer.lower()) - ord(symbol)) % 4] += 1
    best = {p: max(counts.values()) / counts.total() for p, counts in found.items()}
    assert best == pytest.approx(p_hop.GUESSES, abs=0.02)


def test_p_hop_gives_no_accuracy_to_what_predicts_nothing(build, monkeypatch):
    monkeypatch.setattr(p_hop, "LOOPS", [1, 64])
    model = build(vocab_size=128, n_recurrent=1, injection="concat").eval()
    with torch.no_grad():
        model.injection.W.mul_(100)
    with pytest.raises(UserError, match="after 64 loops is not finite"):
        p_hop.accuracies(model, torch.full((2, 7), ord("0")))


def test_p_hop_from_runs(build, tmp_path, monkeypatch, capsys):
    _, docs = p_hop.p_hop_docs(n_train=1, n_val=1000)
    docs = torch.tensor([[0, *text.encode()] for text in docs])[:50]
    shard = torch.cat([docs] * 20).numpy()
    (tmp_path / "data" / "p-hop").mkdir(parents=True)
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, shard.size
    with open(tmp_path / "data" / "p-hop" / "val_000000.bin", "wb") as file:
        file.write(header.tobytes() + shard.astype(np.uint16).tobytes())
    flat = {"vocab_size": 128, "block_size": 192, "n_prelude": 0, "n_coda": 0, "n_embd": 16}
    looped = build(n_recurrent=1, mean_recurrence=2, **flat)
    once = build(n_recurrent=1, mean_recurrence=1, **flat)
    for name, model, loss in (("looped-1e-2-0", looped, {"2": 1.3}),
                              ("looped-3e-2-0", looped, {"2": 1.2}),
                              ("once-3e-2-0", once, {"1": 1.3})):
        make_run(tmp_path / "runs" / name, model, {"kind": "done", "val_loss": loss})
    make_run(tmp_path / "runs" / "looped-3e-2-1", looped)  # not finished
    texts = {"runs/once-3e-2-0/config.json": "other", "data/p-hop/tokenizer.json": "p-hop"}
    for file, source in texts.items():
        before = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
        (tmp_path / file).write_text(json.dumps(before | {"text": {"source": source}}))
    monkeypatch.setattr(p_hop, "LOOPS", [1, 3])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["p_hop.py", "runs", "."])
    p_hop.main()
    said = capsys.readouterr().out
    assert said.count("holds another text than") == 1 and "than runs/once-3e-2-0 was" in said
    assert "looped: seed 0 by rate 0.01: 1.3000, 0.03: 1.2000" in said
    rows = read_csv(tmp_path / "p-hop.csv")
    assert {(row["model"], row["rate"], row["T"]) for row in rows} == {
        ("looped", "0.01", "1"), ("looped", "0.01", "3"),
        ("looped", "0.03", "1"), ("looped", "0.03", "3"), ("once", "0.03", "1")}
    assert len(rows) == 45 and png(tmp_path / "p-hop.png")
    assert len(p_hop.by_rate(p_hop.read_table(tmp_path / "p-hop.csv", p_hop.COLUMNS))) == 27


def test_a_quick_p_hop_trains_three_models_and_prints_their_answers(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(p_hop, "QUICK_TEXT", p_hop.QUICK_TEXT | {"n_train": 40, "n_val": 20})
    monkeypatch.setattr(p_hop, "QUICK", p_hop.QUICK.replace("--max-flops 1.42e12", "--max-steps 1"))
    monkeypatch.setattr(p_hop, "QUICK_MODELS", {
        name: f"{flags} --n-embd 16 --n-head 1" for name, flags in p_hop.QUICK_MODELS.items()})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["p_hop.py", "--quick"])
    p_hop.main()
    *_, head, once, two = [line for line in capfd.readouterr().out.splitlines() if "T = " in line]
    assert head.startswith("looped   T = 32") and once.startswith("once     T = 1 ")
    assert two.startswith("two      T = 1 ")
    assert len(once.split()) == 4 + 4  # of 0 to 3 lookups


def test_a_seed_is_for_a_quick_p_hop(tmp_path):
    run = script("runs/p_hop.py", ROOT / "results/p-hop.csv", tmp_path, "--seed", 1)
    assert run.returncode == 2 and "only --quick trains: leave out --seed" in run.stderr


def test_a_gpus_training_is_measured_by_the_code_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "STEPS", 4)
    args = SimpleNamespace(context=32, batch=4, micro=2, device=torch.device("cpu"))
    (tmp_path / "data").mkdir()
    gpu.make_data(tmp_path / "data", 4096)
    row = gpu.train(ROOT, "gpt-nano", False, 1, args, tmp_path / "data", tmp_path / "run")
    assert row["slowest"] <= row["tokens_per_second"] <= row["fastest"] and row["code"] == ROOT.name
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["vocab_size"] == gpu.VOCABULARY and row["mfu"] > 0
    with pytest.raises(UserError, match="(?s)train.py of .* failed with gpt-nano: .*--batch-size"):
        args.micro = 3  # of 4 sequences
        gpu.train(ROOT, "gpt-nano", False, 1, args, tmp_path / "data", tmp_path / "run")


def test_stability_counts_the_runs_that_broke_off(build, tmp_path):
    done = {"val_loss": {"8": 2.0, "64": 2.5}, "state_rms": {"1": 1.0, "8": 4.0, "64": 32.0}}
    for name, last in (("add-1e-1", {"kind": "done", "spectral_radius": 1.0} | done),
                       ("concat-1e-1", {"kind": "train", "loss": None, "step": 33})):
        evaluation = {"kind": "eval", "val_loss": {"8": 3.0}, "state_rms": {"8": 5.0},
                      "spectral_radius": 4.5}
        make_run(tmp_path / "runs" / name, build(), evaluation, last)
    table = script("runs/stability.py", tmp_path / "runs", tmp_path)
    assert table.returncode == 0 and png(tmp_path / "stability.png"), table.stderr
    add, concat = read_csv(tmp_path / "stability.csv")
    assert (add["finished"], add["val_loss_64"], add["state_rms_64"]) == ("True", "2.5", "32")
    assert (concat["finished"], concat["steps"], concat["val_loss_8"]) == ("False", "33", "nan")
    assert (concat["state_rms_8"], concat["spectral_radius"]) == ("5", "4.5")
    assert "33 (0)  broke off" in table.stdout
    # A run that was to replace another and broke off before its first checkpoint counts, too.
    make_run(tmp_path / "new", build(), {"kind": "train", "loss": float("nan"), "step": 12})
    (tmp_path / "new").rename(tmp_path / "runs" / "add-1e-1" / ".new")
    assert "12 (0)  broke off" in script("runs/stability.py", tmp_path / "runs", tmp_path).stdout


@pytest.fixture
def gpt(build, tmp_path):
    """A plain transformer and its run directory."""
    model = build(n_prelude=6, n_recurrent=0, n_coda=0, value_embeds=True, vocab_size=320).eval()
    save_run(model, tmp_path / "gpt", text={"source": "mine"})
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "gpt" / "tokenizer.json")
    return model, tmp_path / "gpt"


def test_a_retrofitted_transformer_computes_the_same_until_it_loops(gpt, tmp_path):
    gpt, path = gpt
    done = script("runs/retrofit.py", path, tmp_path / "looped")
    assert done.returncode == 0, done.stderr
    looped, idx = Parcae.from_pretrained(tmp_path / "looped"), torch.randint(320, (2, 20))
    config = looped.config
    assert (config.n_prelude, config.n_recurrent, config.n_coda) == (1, 4, 1)
    assert torch.allclose(looped(idx, recurrence=1)[0], gpt(idx)[0], atol=1e-4)
    assert not torch.allclose(looped(idx, recurrence=2)[0], gpt(idx)[0], atol=1e-2)


def test_a_retrofitted_transformer_is_a_run_directory(gpt, tmp_path):
    _, path = gpt
    assert script("runs/retrofit.py", path, tmp_path / "looped").returncode == 0
    names = {file.name for file in (tmp_path / "looped").iterdir()}
    assert names == {"config.json", "ckpt.pt", "tokenizer.json"}
    assert load_tokenizer(tmp_path / "looped").n_vocab == load_tokenizer(path).n_vocab
    config = json.loads((tmp_path / "looped" / "config.json").read_text())
    assert config["settings"] == {} and config["text"] == {"source": "mine"}
    assert config["model"] == asdict(Parcae.from_pretrained(tmp_path / "looped").config)
    again = script("runs/retrofit.py", path, tmp_path / "looped")  # nothing is replaced
    assert again.returncode == 2 and "exists already" in again.stderr


def test_without_a_tokenizer_nothing_is_left_behind(gpt, tmp_path):
    _, path = gpt
    (path / "tokenizer.json").unlink()
    done = script("runs/retrofit.py", path, tmp_path / "looped")
    assert done.returncode == 2 and "tokenizer.json" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["gpt"]


def test_what_loops_already_is_refused(build, tmp_path):
    save_run(build(vocab_size=320), tmp_path)
    done = script("runs/retrofit.py", tmp_path, tmp_path / "looped")
    assert done.returncode == 2 and "must be a plain transformer" in done.stderr
    assert not (tmp_path / "looped").exists()


@pytest.mark.parametrize("name", ["arena", "half", "p_hop", "short", "stability"])
def test_an_experiment_asks_for_matplotlib_before_it_trains(name, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    paths = {"PYTHONPATH": str(tmp_path),
             "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "runs" / f"{name}.sh"], env=os.environ | paths,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode and "pip install matplotlib" in done.stderr


def test_guide_measures_what_the_diagonal_rule_alone_says(build):
    model = build(n_recurrent=1).double().eval()
    for name, p in model.recurrent.named_parameters():
        if name.endswith("proj.weight"):
            p.data.zero_()  # the block adds nothing: the loop is A_bar h + b
    apart = guide.distances(model, torch.randint(50, (2, 16)), 8)
    factor = model.injection.A_bar().mean().item()
    assert apart.shape == (32, 8)
    assert apart == pytest.approx(np.tile(factor ** np.arange(1.0, 9), (32, 1)), rel=1e-5)


def test_guide_draws_every_picture_and_refuses_what_has_no_a_bar(run, build, tmp_path):
    done = script("runs/guide.py", "--run", run, "--sequences", 2, "--loops", 5, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = list(tmp_path.glob("guide-*.png"))
    assert len(drawn) == 6 and all(map(png, drawn))
    assert "on 64 tokens" in done.stdout and done.stdout.count("\n") == 8
    for other, said in (({"injection": "concat"}, "injection is concat"),
                        ({"n_recurrent": 0}, "it does not loop")):
        save_run(build(vocab_size=320, **other), run)
        done = script("runs/guide.py", "--run", run, "--out", tmp_path)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_exits_are_measured_beside_fixed_depths(build, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    make_run(run, build(vocab_size=320))
    save_tokenizer(make_tokenizer("bytes"), run / "tokenizer.json")
    (tmp_path / "text.txt").write_text("a looped model leaves its loop early " * 3)
    flags = ["--run", run, "--text", tmp_path / "text.txt", "--most", 3, "--out", out]
    done = script("runs/exits.py", *flags, "--sequences", 2)
    assert done.returncode == 0 and png(out / "exits.png"), done.stderr
    rows = {(row["rule"], float(row["threshold"])): row for row in read_csv(out / "exits.csv")}
    assert float(rows["fixed", 2]["loops"]) == 2 and float(rows["fixed", 3]["above"]) == 0
    for rule in "kl", "state", "entropy":
        loops = [float(row["loops"]) for (name, _), row in rows.items() if name == rule]
        assert loops == sorted(loops, reverse=True) and 2 <= loops[-1] <= loops[0] <= 3
    one = script("runs/exits.py", *flags, "--sequences", 1)
    assert one.returncode == 2 and "gives 1 sequence, must be at least 2" in one.stderr
    make_run(tmp_path / "plain", build(vocab_size=320, n_recurrent=0, n_prelude=2))
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "plain" / "tokenizer.json")
    plain = script("runs/exits.py", *flags, "--run", tmp_path / "plain")
    assert plain.returncode == 2 and "it has no loop to leave" in plain.stderr
