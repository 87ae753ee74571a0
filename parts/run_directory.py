"""A run directory, which train.py writes and every other script reads.

    out/<name>/config.json      every setting, the model's config, the data, versions, git revision
    out/<name>/log.jsonl        one JSON object per line; "kind" is "train", "eval" or "done";
                                null stands for a number that is not finite
    out/<name>/ckpt.pt          weights, optimisers and state: all that resuming needs
    out/<name>/tokenizer.json
    out/<name>/eval.json        from tools/evaluate.py; core.json is from tools/core.py. Both name
                                the step they measured, and a later checkpoint removes them

One process at a time writes there. Files appear whole, but for the log, which grows line by line. A
run that replaces another one is in the folder .new until its first checkpoint; then `mend` moves it
into place. If the process is killed in between, the next train.py moves it.
"""

import contextlib
import math
import os
import platform
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from parts.cli import UserError, flag_of
from parts.comparable import text_of, texts_differ
from parts.files import json_text, lock, whole_file, write_json, write_text
from parts.machine import machine_name, matmul_peak
from parts.muon import Muon
from parts.ranks import rank, say, world
from parts.reading import fit_weights, load_checkpoint, read_json, read_json_lines
from parts.tokenizer import save_tokenizer

FILES = ("config.json", "tokenizer.json", "log.jsonl", "ckpt.pt")
STATES = {Muon: {"momentum", "squares"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}
MEASURED = ("eval.json", "core.json")  # what tools/evaluate.py and tools/core.py write


def check_free(path, may_replace):
    """Raise UserError if a directory holds a run that must not be replaced, or other files with the
    names of a run's files."""
    there = [name for name in FILES if (Path(path) / name).exists()]
    config = read_json(Path(path) / "config.json") if "config.json" in there else {}
    is_run = all(isinstance(config.get(part), dict) for part in ("settings", "model"))
    if there and not is_run:
        raise UserError(f"--out {path} holds a {there[0]} that does not belong to a run: "
                        "choose another --out")
    if "ckpt.pt" in there and not may_replace:
        raise UserError(f"--out {path} holds a run already: continue it with --resume, replace it "
                        "with --overwrite, or choose another --out")


def mend(path):
    """Move the run in .new into place if it has a checkpoint, and remove the other files that a
    killed process left. The caller must hold the lock."""
    new = Path(path) / ".new"
    if (new / "ckpt.pt").exists():
        remove_measured(path)
        for name in FILES:  # the checkpoint last: it shows that files remain to be moved
            with contextlib.suppress(FileNotFoundError):  # it has been moved already
                os.replace(new / name, Path(path) / name)
    for name in FILES:
        torn = f".{name}.*.tmp"
        for file in (new / name, *new.glob(torn), *Path(path).glob(torn)):
            file.unlink(missing_ok=True)
    remove_empty([new])


def mend_before_reading(path):
    """Mend a directory in which a killed process left parts of two runs."""
    last = Path(path) / ".new" / "ckpt.pt"
    if last.exists() and rank() == 0:
        with lock(path):
            mend(path)
    while last.exists():  # the other ranks wait for rank 0
        time.sleep(0.1)


def remove_measured(path):
    """Remove measurements of weights that are no longer there."""
    for name in MEASURED:
        (Path(path) / name).unlink(missing_ok=True)


def remove_empty(folders):
    for folder in folders:
        with contextlib.suppress(OSError):  # it is not empty, or does not exist
            folder.rmdir()


def describe(args, model, before):
    """Return the content of config.json: every setting, and what else the results of a run depend
    on. before: the old content if the run is resumed, otherwise {}."""
    device, dtype = model.wte.weight.device, model.compute_dtype
    not_stored = ("out", "resume", "overwrite", "dry_run")
    cost = {}
    for accounting in ("exact", "paper"):
        once, core = model.matmul_params(accounting)
        cost[accounting] = {"params_noncore": once, "params_core": core,
                            "flops_per_token": model.flops_per_token(accounting=accounting)}
    machine = {"device": str(device), "dtype": str(dtype), "machine": machine_name(device),
               "ranks": world(), "threads": torch.get_num_threads()}
    # MFU is a share of the same peak during a whole run, as long as it stays on one machine
    peak = before.get("peak_flops")
    if not isinstance(peak, float) or not machine.items() <= before.items():
        peak = matmul_peak(device, dtype) * world()
    return {"settings": {k: v for k, v in vars(args).items() if k not in not_stored},
            "class": type(model).__name__,
            "model": asdict(model.config),
            "data": args.data,
            "text": text_of(args.data),
            "parameters": sum(p.numel() for p in model.parameters()),
            "cost": cost,
            **machine,
            "peak_flops": peak,
            "git": git_revision(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__}}


def inexact(before, record):
    """Return lines that explain why a resumed run may differ from an uninterrupted one. before,
    record: the old and the new content of config.json."""
    def facts(config):  # {name: value}, flat: also the values in "versions" and "settings"
        flags = {flag_of(name): value for name, value in config["settings"].items()}
        return (config.get("versions") or {}) | config | flags
    was, now = facts(before), facts(record)
    rounding = ("device", "dtype", "threads", "ranks", "torch", "--micro-batch", "--compile")
    lines = [f"resumes up to rounding: {name} was {was[name]}, is {now[name]}"
             for name in rounding if name in was and was[name] != now[name]]
    lines += [f"resumes with {flag_of(name)} {value}, which the run had not recorded"
              for name, value in record["settings"].items()
              if name not in before["settings"] and value is not None]
    if before.get("peak_flops", record["peak_flops"]) != record["peak_flops"]:
        lines.append(f"MFU is a share of {record['peak_flops'] / 1e9:,.0f} GFLOP/s from here on, "
                     "since the machine, dtype or threads have changed")
    if texts_differ(before.get("text"), record["text"]):
        lines.append(f"resumes with another text, from {record['data']}")
    return lines


def git_revision():
    """Return the commit of this code; None if there is no commit or no git."""
    with contextlib.suppress(OSError):
        said = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=Path(__file__).parent,
                              capture_output=True, text=True)
        return said.stdout.strip() or None


class Run:
    """A run in its directory. Only rank 0 writes. `state` counts what has been done."""

    def __init__(self, path, model, optimizers):
        self.path = Path(path)
        self.folder = None  # where the run is written, once it has started
        self.model = model
        self.optimizers = optimizers
        self.state = {"step": 0, "samples": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0,
                      "skipped": 0}
        self.saved = None  # step of the last checkpoint
        self.lines = []  # of the log, up to the checkpoint from which the run resumes

    @contextlib.contextmanager
    def held(self):
        """Lock the directory for this process (rank 0) while the block runs; make it if missing.

        A run that fails before its first step leaves nothing behind: it failed because of a setting
        that no check can reject, for example a batch too large for the memory."""
        if rank() > 0:
            yield
            return
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with lock(self.path):
                mend(self.path)
                try:
                    yield
                finally:
                    if self.folder and self.saved is None and self.state["step"] == 0:
                        for name in FILES:
                            (self.folder / name).unlink(missing_ok=True)
                        mend(self.path)
        finally:
            remove_empty(made)

    # ------------------------------------------------------------------------- writing

    def start(self, record, tokenizer, overwrite):
        """Begin a new run. record: the content of config.json."""
        if rank() > 0:
            return
        check_free(self.path, overwrite)  # again, now that no other process can write there
        replaces = (self.path / "ckpt.pt").exists()
        self.folder = self.path / ".new" if replaces else self.path
        # config.json first: only a directory with it is known to hold a run
        write_json(self.folder / "config.json", record)
        save_tokenizer(tokenizer, self.folder / "tokenizer.json")
        write_text(self.folder / "log.jsonl", "")

    def resume(self, record):
        """Write the new config.json, and the log so far, with an earlier "done" changed to "eval".
        Print why the resumed run may differ from an uninterrupted one."""
        if rank() > 0:
            return
        self.folder = self.path
        for line in inexact(read_json(self.path / "config.json"), record):
            print(line)
        lines = [line | {"kind": "eval"} if line["kind"] == "done" else line for line in self.lines]
        write_json(self.path / "config.json", record)
        write_text(self.path / "log.jsonl", "".join(json_text(line) + "\n" for line in lines))

    def log(self, kind, **values):
        """Add a line to the log, with the state."""
        if rank() == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json_text({"kind": kind, **self.state, **values}) + "\n")

    def save(self):
        """Write the checkpoint. If the run replaces another one, the first checkpoint does so."""
        self.saved = self.state["step"]
        if rank() > 0:
            return
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        with whole_file(self.folder / "ckpt.pt", "wb") as file:
            torch.save({"model": self.model.state_dict(), "state": self.state,
                        "optimizers": optimizers}, file)
        if self.folder != self.path:
            mend(self.path)
            self.folder = self.path
        remove_measured(self.path)

    def last_checkpoint(self):
        """Return a clause that says which checkpoint was the last."""
        if self.saved is None:
            return "no checkpoint was saved"
        return f"{self.path / 'ckpt.pt'} is from step {self.saved}"

    # ------------------------------------------------------------------------- resuming

    def load(self):
        """Load the checkpoint and read the log up to it. Raises UserError naming the damage."""
        file = self.path / "ckpt.pt"
        if not file.exists():
            raise UserError(f"{file} does not exist, since the run ended before its first "
                            "checkpoint: start it again, without --resume")
        checkpoint = load_checkpoint(file)
        for name in ("model", "optimizers", "state"):
            if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), dict):
                raise UserError(f"{file} is damaged: it has no {name}")
        state, optimizers = checkpoint["state"], checkpoint["optimizers"]
        for name, value in self.state.items():
            found = state.get(name)
            if type(found) not in {int, type(value)} or not 0 <= found < math.inf:
                raise UserError(f"{file} is damaged: state {name} is {found!r}, "
                                "must be a number, at least 0")
        fit_weights(self.model, checkpoint["model"], f"{file} does not fit these settings")
        if state["step"] > state["skipped"]:  # before the first update there is nothing to load
            for name, optimizer in self.optimizers.items():
                complaint = (f"{file}: the state of optimiser {name} is damaged or from another "
                             f"version of this code: start a new run with --init-from {self.path}")
                load_optimizer(optimizer, optimizers.get(name), complaint)
        self.state = {name: state[name] for name in self.state}
        self.saved = self.state["step"]
        self.read_log()

    def read_log(self):
        """Read the lines of the log up to the checkpoint; skip and report what cannot be read."""
        file = self.path / "log.jsonl"
        if not file.exists():
            say(f"{file} is missing: a new log begins")
            return
        found, bad = read_json_lines(file)
        lines = [line for line in found if line.get("kind") and isinstance(line.get("step"), int)]
        bad += len(found) - len(lines)
        if bad:
            say(f"{file}: {bad} unreadable line(s) are left out")
        self.lines = [line for line in lines if line["step"] <= self.saved]


def load_optimizer(optimizer, saved, complaint):
    """Load the saved state of an optimiser. Raises UserError with the text `complaint` unless each
    parameter has tensors of the right names and dtype, with shapes that broadcast to its own."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        states = [dict(saved["state"][i]) for i in range(len(parameters))]
        names = STATES.get(type(optimizer), states[0].keys())
        fits = all(state.keys() == names for state in states)
        for state, p in zip(states, parameters):
            for value in state.values():
                alike = value.dtype == p.dtype and value.ndim in (0, p.ndim)
                shape = torch.broadcast_shapes(value.shape, p.shape)
                fits = fits and alike and shape == p.shape
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        fits = False
    if not fits:
        raise UserError(complaint)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})
