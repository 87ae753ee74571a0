"""How fast are training and decoding on a GPU, and how much memory do they need? (some ten minutes)

    python -m runs.gpu results                    run the GPU tests, then measure three tables
    python -m runs.gpu out --code . ../before     compare the training speed of two versions, too
    python -m runs.gpu out --presets parcae-nano --context 64 --batch 4 --micro 2    small, on a CPU

Writes OUT/gpu-memory.csv, gpu-decoding.csv and gpu-training.csv, a row after each measurement. One
that fails is named and left out, and the others go on. Training runs the steps of train.py on
random tokens: on one GPU, and where there are two, also on both.
"""

import contextlib
import gc
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from itertools import product
from pathlib import Path

import numpy as np
import tiktoken
import torch

import bench
from data import write_shards
from model import PRESETS, ParcaeConfig
from parts.cli import COUNT, Parser, UserError, new_directory, run_script
from parts.machine import machine_name, pick_device, pick_dtype
from parts.reading import read_json_lines
from parts.tables import write_csv
from parts.tokenizer import EOT, save_tokenizer

STEPS = 14  # training steps; the first half warms up and compiles, and is not measured
VOCABULARY = ParcaeConfig().vocab_size
# trains without the final evaluation and prints the peak memory; in a separate process, for any
# version of this code
TRAIN = """
import torch, train
train.report = lambda *_: None
train.main()
print("peak", torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
"""


def make_data(folder, tokens):
    """Write a data directory of random tokens, with a vocabulary as large as the published one."""
    names = [bytes([a]) for a in range(256)]
    names += [bytes(pair) for pair in product(range(256), repeat=2)]
    ranks = {name: i for i, name in enumerate(names[:VOCABULARY - 1])}
    save_tokenizer(tiktoken.Encoding("made-up", pat_str="(?s:.{1,256})", mergeable_ranks=ranks,
                                     special_tokens={EOT: VOCABULARY - 1}),
                   folder / "tokenizer.json")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        write_shards(folder, split, [random.integers(0, VOCABULARY, tokens)], VOCABULARY)


def train(code, preset, compiled, ranks, args, data, out):
    """Train for STEPS steps with the code in a folder. Return a row of the table."""
    flags = ["--preset", preset, "--block-size", args.context, "--batch-size", args.batch,
             "--micro-batch", args.micro // ranks, "--max-steps", STEPS, "--eval-sequences", 1,
             "--eval-recurrence", 1, "--data", data, "--out", out, "--overwrite"]
    flags += ["--compile"] * compiled
    start = [sys.executable, "-c", TRAIN]
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start = [*torchrun, f"--nproc-per-node={ranks}", "train.py"]
    path = filter(None, (str(code), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([*start, *map(str, flags)], cwd=code, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise UserError(f"train.py of {code} failed with {preset}: {done.stdout[-500:]}")
    lines, _ = read_json_lines(out / "log.jsonl")
    steps = [line for line in lines if line["kind"] == "train"][STEPS // 2:]
    speeds = sorted(step["tok_per_s"] for step in steps)
    held = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    return {"code": code.name, "device": machine_name(args.device), "preset": preset,
            "compiled": "yes" if compiled else "", "ranks": ranks,
            "tokens_per_second": round(statistics.median(speeds)), "slowest": round(speeds[0]),
            "fastest": round(speeds[-1]),
            "mfu": round(statistics.median(step["mfu"] for step in steps), 3),
            "peak_gigabytes": round(held[0] / 1e9, 2) if held else ""}


def measure_training(args):
    """Train each preset, eager and compiled, with each folder of code in turns."""
    ranks = [1, 2] if torch.cuda.device_count() > 1 else [1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        data.mkdir()
        make_data(data, 64 * args.batch * args.context)
        for preset, compiled, n, code in product(args.presets, (False, True), ranks, args.code):
            with named(f"training {preset}"):
                row = train(code.resolve(), preset, compiled, n, args, data, Path(folder, "run"))
                rows.append(row)
                print(*row.values(), flush=True)
                write_csv(args.out / "gpu-training.csv", rows, row)


@contextlib.contextmanager
def named(what):
    """Print an error of the block with a name for what failed, and go on. Free its memory."""
    try:
        yield
    except (UserError, RuntimeError) as error:  # such as running out of memory
        print(f"{what} failed and is left out: {error}", flush=True)
    gc.collect()  # a recorded model refers to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def short(row):
    """Return a row with each float rounded to five digits."""
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value
            for name, value in row.items()}


def measure_decoding(args, looped):
    """Measure the decoding of each looped model: eager, recorded and compiled."""
    rows = []
    ways = {"eager": (False, True), "recorded": (False, False), "compiled": (True, False)}
    if args.device.type != "cuda":
        del ways["recorded"]
    for (preset, config), (way, (compiled, eager)) in product(looped.items(), ways.items()):
        how = Namespace(context=args.context // 4, rounds=5, device=args.device, compile=compiled,
                        eager=eager, dtype=pick_dtype(args.device))
        with named(f"decoding {preset}, {way}"):
            rows += [{"preset": preset, "way": way} | short(row)
                     for row in bench.decode_speed(bench.cases_of(config, [1, 4, 8]), how)]
            write_csv(args.out / "gpu-decoding.csv", rows, rows[0])


def measure_memory(args, looped):
    """Measure the memory that each looped model needs for training and inference."""
    how = Namespace(context=args.context, batch=args.micro, device=args.device,
                    dtype=pick_dtype(args.device))
    rows = []
    for preset, config in looped.items():
        for case in bench.cases_of(config, [1, 4, 8, 16]):
            with named(f"memory of {preset}, {case.name}, T = {case.loops}"):
                rows.append({"preset": preset} | short(bench.memory_of(case, how)))
                write_csv(args.out / "gpu-memory.csv", rows, rows[0])


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("out", type=new_directory, metavar="OUT", help="directory for the tables")
    add("--code", type=Path, nargs="+", default=[Path(".")], metavar="DIR",
        help="folders with versions of this repository to compare (default: this one)")
    add("--presets", nargs="+", choices=PRESETS, metavar="NAME",
        default=["parcae-140m", "parcae-370m", "gpt-140m"], help="(default: parcae-140m "
        "parcae-370m gpt-140m)")
    add("--context", type=COUNT, default=2048, metavar="N", help="tokens in a training sequence")
    add("--batch", type=COUNT, default=64, metavar="N", help="sequences in a step (default: 64)")
    add("--micro", type=COUNT, default=16, metavar="N",
        help="sequences in a forward pass, over all ranks (default: 16)")
    args = parser.parse_args()
    args.out, args.device = Path(args.out), pick_device()
    print(f"{machine_name(args.device)}, torch {torch.__version__}", flush=True)
    if args.device.type == "cuda":
        tests = [sys.executable, "-m", "pytest", "-q", "tests/test_recording.py"]
        if subprocess.run(tests).returncode:
            raise UserError("pytest is missing or the tests that need a GPU fail: nothing measured")
    looped = {name: ParcaeConfig(**PRESETS[name] | {"block_size": args.context})
              for name in args.presets if PRESETS[name]["n_recurrent"]}
    measure_memory(args, looped)
    measure_decoding(args, looped)
    measure_training(args)


if __name__ == "__main__":
    run_script(main)
