"""Malformed files and flags: exit code 2, one line that names what is wrong, nothing written."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, save_run, script

from data import prepare
from model import Parcae, ParcaeConfig


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """r: a run, d: its data, s.csv: a table, core: a task, t.txt: a text. Cases damage a copy."""
    folder = tmp_path_factory.mktemp("good")
    prepare("text", folder / "d", "bytes", [ROOT / "model.py"])
    config = ParcaeConfig(
        vocab_size=320,
        block_size=32,
        n_embd=16,
        n_head=1,
        n_prelude=1,
        n_recurrent=1,
        n_coda=1,
        mean_recurrence=2,
    )
    save_run(Parcae(config), folder / "r", data="d")
    shutil.copy(folder / "d" / "tokenizer.json", folder / "r")
    (folder / "t.txt").write_text("some text " * 50)
    shutil.copy(ROOT / "results" / "sweep-stdlib-16.csv", folder / "s.csv")
    (folder / "core" / "commonsense_reasoning").mkdir(parents=True)
    (folder / "core" / "commonsense_reasoning" / "copa.jsonl").write_text(
        '{"query": "a", "choices": ["b", "c"], "gold": 0}\n' * 3
    )
    return folder


SAMPLE = ["sample.py", "--run", "r", "--tokens", "2", "--device", "cpu"]
EVALUATE = [
    "tools/evaluate.py",
    "--run",
    "r",
    "--recurrence",
    "1",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--sequences",
    "2",
]
CORE = [
    "tools/core.py",
    "core",
    "--run",
    "r",
    "--recurrence",
    "1",
    "--device",
    "cpu",
    "--dtype",
    "float32",
]
TRAIN = [
    "train.py",
    "--data",
    "d",
    "--out",
    "new",
    "--n-embd",
    "16",
    "--n-head",
    "1",
    "--block-size",
    "32",
    "--max-steps",
    "1",
    "--device",
    "cpu",
]
FIT = ["scaling.py", "fit", "s.csv", "--resamples", "2", "--figures", "figures"]
BENCH = ["bench.py", "--preset", "parcae-nano", "--only", "memory"]


def replaced(path, content):
    def damage():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if content == "a directory":
            path.mkdir()
        elif content == "a loop":
            path.symlink_to(path.name)
        elif content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def config(folder, **model):
    saved = json.loads((folder / "r" / "config.json").read_text())
    return replaced(
        folder / "r" / "config.json", json.dumps(saved | {"model": saved["model"] | model})
    )


def checkpoint(folder, change):
    def damage():
        path = folder / "r" / "ckpt.pt"
        torch.save(change(torch.load(path, weights_only=True)), path)

    return damage


def tokenizer(folder, **values):
    path = folder / "d" / "tokenizer.json"
    return replaced(path, json.dumps(json.loads(path.read_text()) | values))


def copa(folder, content):
    return replaced(folder / "core" / "commonsense_reasoning" / "copa.jsonl", content)


WEIGHTS = {
    "list": lambda c: [],
    "none": lambda c: None,
    "no model": lambda c: {},
    "model list": lambda c: {"model": []},
    "model text": lambda c: {"model": "x"},
    "model none": lambda c: {"model": None},
    "weights text": lambda c: {"model": c["model"] | {"norm_f.weight": "x"}},
    "nan": lambda c: {"model": c["model"] | {"norm_f.weight": torch.full((16,), torch.nan)}},
    "shape": lambda c: {"model": c["model"] | {"norm_f.weight": torch.ones(3)}},
    "integer": lambda c: {"model": c["model"] | {"norm_f.weight": torch.ones(16).int()}},
    "half": lambda c: {"model": c["model"] | {"norm_f.weight": torch.ones(16).half()}},
    "complex": lambda c: {"model": c["model"] | {"norm_f.weight": torch.ones(16) * 1j}},
    "sparse": lambda c: {"model": c["model"] | {"norm_f.weight": torch.ones(16).to_sparse()}},
}
CONFIGS = [
    {"n_embd": 10**12},
    {"n_head": True},
    {"block_size": 1.5},
    {"block_size": float("inf")},
    {"vocab_size": 320.0},
    {"n_recurrent": 1.5},
    {"norm_eps": float("nan")},
    {"norm_eps": -1},
    {"mlp_width": 10**13},
    {"n_embd": "16"},
    {"injection": 3},
    {"qk_norm": "yes"},
    {"mean_recurrence": None},
    {"n_coda": -1},
    {"rope_base": 0},
    {"new_field": 1},
]
FILES = ["a directory", "a loop", b"", b"\xff\xfe", "{", "[1]", "null", "3"]
TOKENIZERS = [
    {"name": "../../x", "tokens": None},
    {"ids": [-1] * 256},
    {"ids": [5] * 256},
    {"special": {"<|endoftext|>": -1}},
    {"special": {"<|endoftext|>": 2**40}},
    {"pattern": "("},
    {"pattern": ""},
    {"pattern": "[a-z]+"},
    {"pattern": r"(\w+\s?)+(?=$x)|."},
    {"tokens": 3},
    {"tokens": ["!!!"] * 256},
    {"tokens": ["YQ=="] * 256},
    {"tokens": ["YQ=="]},
    {"special": None},
]
TASKS = [
    "",
    "\n \n",
    "{",
    "[]",
    '{"query": null, "choices": ["a"], "gold": 0}',
    '{"query": "a", "choices": [], "gold": 0}',
    '{"query": "a", "choices": ["b"], "gold": "b"}',
    '{"query": "a", "choices": ["b"], "gold": 1}',
    '{"query": "a"}',
]
FLAGS = [
    (SAMPLE, "--temperature", "-1"),
    (SAMPLE, "--temperature", "nan"),
    (SAMPLE, "--device", "cpu:x"),
    (SAMPLE, "--seed", "-1"),
    (SAMPLE, "--seed", "1" + "0" * 20),
    (SAMPLE, "--recurrence", "99999999999"),
    (SAMPLE, "--run", "t.txt"),
    (SAMPLE, "--run", "some/model"),
    (SAMPLE, "--tokens", "1e400"),
    (SAMPLE, "--tokens", 400 * "1"),
    (SAMPLE, "--top-k", "0"),
    (SAMPLE, "--run", ""),
    (EVALUATE, "--recurrence", "99999999999"),
    (EVALUATE, "--recurrence", "0"),
    (EVALUATE, "--sequences", "1.5"),
    (EVALUATE, "--data", "t.txt"),
    (EVALUATE, "--text", "none.txt"),
    (EVALUATE, "--text", "d"),
    (TRAIN, "--seed", "-1"),
    (TRAIN, "--muon-lr", "1e400"),
    (TRAIN, "--adamw-lr", "inf"),
    (TRAIN, "--weight-decay", "inf"),
    (TRAIN, "--norm-eps", "-1"),
    (TRAIN, "--device", "cpu:x"),
    (TRAIN, "--out", "t.txt/x"),
    (TRAIN, "--out", "x" * 300),
    (TRAIN, "--data", "t.txt"),
    (TRAIN, "--data", "no\npe"),
    (TRAIN, "--data", "x" * 300),
    (TRAIN, "--eval-recurrence", "99999999999"),
    (FIT, "--resamples", "-1"),
    (FIT, "--resamples", "nan"),
    (FIT, "--resamples", "1e400"),
    (FIT, "--resamples", "abc"),
    (["scaling.py", "predict", "s.csv"], "--flops", "nan"),
    (["scaling.py", "predict", "s.csv"], "--flops", "1e400"),
    (["tools/sweep.py", "--recurrences", "1"], "--budgets", "x"),
    (["tools/sweep.py", "--budgets", "1e7"], "--recurrences", "1.5"),
    (BENCH, "--rounds", "0"),
    (["data.py", "text", "t.txt"], "--out", "t.txt"),
]
CASES = {
    **{
        f"config {change}": (SAMPLE, lambda f, change=change: config(f, **change))
        for change in CONFIGS
    },
    **{
        f"config.json {str(c)[:12]}": (SAMPLE, lambda f, c=c: replaced(f / "r" / "config.json", c))
        for c in FILES
    },
    **{
        f"ckpt.pt {str(c)[:12]}": (SAMPLE, lambda f, c=c: replaced(f / "r" / "ckpt.pt", c))
        for c in [*FILES, None]
    },
    **{
        f"weights {name}": (SAMPLE, lambda f, change=change: checkpoint(f, change))
        for name, change in WEIGHTS.items()
    },
    **{
        f"tokenizer.json {str(c)[:12]}": (
            TRAIN,
            lambda f, c=c: replaced(f / "d" / "tokenizer.json", c),
        )
        for c in FILES
    },
    **{
        f"tokenizer {i}": (TRAIN, lambda f, values=values: tokenizer(f, **values))
        for i, values in enumerate(TOKENIZERS)
    },
    **{
        f"shard {str(c)[:12]}": (TRAIN, lambda f, c=c: replaced(f / "d" / "train_000000.bin", c))
        for c in FILES
    },
    **{f"task {i}": (CORE, lambda f, c=c: copa(f, c)) for i, c in enumerate(TASKS)},
    **{
        f"{words[0]} {flag} {value[:12]!r}": ([*words, flag, value], None)
        for words, flag, value in FLAGS
    },
}


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("words", [SAMPLE, EVALUATE, CORE, TRAIN], ids=lambda words: words[0])
def test_the_same_commands_work_on_good_input(words, good, tmp_path):
    shutil.copytree(good, tmp_path / "copy")
    done = script(*words, cwd=tmp_path / "copy")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line(case, good, tmp_path):
    folder, (words, damage) = tmp_path / "copy", CASES[case]
    shutil.copytree(good, folder)
    if damage:
        damage(folder)()
    before = tree(folder)
    done = script(*words, cwd=folder)
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    ), done.stderr
    assert tree(folder) == before
