"""A run directory: what train.py writes and every other script reads.

    out/<name>/config.json      every setting, the model's config, the data, versions, git revision
    out/<name>/log.jsonl        a JSON object a line; "kind" is "train", "eval" or "done";
                                null is a number that is not finite
    out/<name>/ckpt.pt          weights, optimisers and state: all that resuming needs
    out/<name>/tokenizer.json
    out/<name>/eval.json        of tools/evaluate.py, and core.json of tools/core.py: they name
                                their step, and a later checkpoint removes them

One process at a time writes there. Files appear whole, and a run that replaces another one lies in
the folder .new until its first checkpoint: then it is moved in. If that is interrupted, the next
train.py there finishes it.
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
from parts.ranks import rank, say, world
from parts.reading import fit_weights, load_checkpoint, read_json, read_json_lines
from parts.tokenizer import save_tokenizer

FILES = ("config.json", "tokenizer.json", "log.jsonl", "ckpt.pt")
MEASURED = ("eval.json", "core.json")  # what tools/evaluate.py and tools/core.py measure of ckpt.pt


def check_is_run(path):
    """Raise UserError where a directory has files of a run's names that are not a run's."""
    there = [name for name in FILES if (path / name).exists()]
    if not there:
        return
    config = read_json(path / "config.json") if "config.json" in there else {}
    if not isinstance(config.get("settings"), dict) or not isinstance(config.get("model"), dict):
        raise UserError(f"--out {path} holds {there[0]} of something else than a run: "
                        "choose another --out")


def check_free(args):
    """Raise UserError where --out holds what this run must not replace."""
    out = Path(args.out)
    check_is_run(out)
    if (out / "ckpt.pt").exists() and not (args.resume or args.overwrite or args.dry_run):
        raise UserError(f"--out {out} holds a run already: continue it with --resume, replace it "
                        "with --overwrite, or choose another --out")


@contextlib.contextmanager
def held(path):
    """Make a run directory where it is missing and hold its lock, on rank 0. What was made and is
    empty in the end goes again."""
    path = Path(path)
    if rank() > 0:
        yield
        return
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with lock(path):
            yield
    finally:
        remove_empty(made)


def remove_empty(folders):
    for folder in folders:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


def clear_up(path):
    """Mend what a process left that was killed while it wrote; for the holder of the lock."""
    new = Path(path) / ".new"
    if (new / "ckpt.pt").exists():  # killed while it moved a run in: the checkpoint goes last
        move_in(new)
    for name in FILES:  # of a run that came to no checkpoint
        (new / name).unlink(missing_ok=True)
    for folder in (Path(path), new):
        for file in folder.glob(".*.tmp"):
            if file.name.startswith(tuple(f".{name}." for name in FILES)):
                file.unlink()
    remove_empty([new])


def finish_replacing(path):
    """Move in what a killed process had begun to, before anything there is read."""
    last = Path(path) / ".new" / "ckpt.pt"
    if last.exists() and rank() == 0:
        with lock(path):
            clear_up(path)
    while last.exists():  # other ranks wait for the first
        time.sleep(0.1)


def remove_measured(path):
    """Remove what was measured of the weights in a run directory, as these are replaced."""
    for name in MEASURED:
        (path / name).unlink(missing_ok=True)


def move_in(new):
    """Move the files of a run to where the one lies that it replaces."""
    remove_measured(new.parent)
    for name in FILES:
        with contextlib.suppress(FileNotFoundError):  # moved already
            os.replace(new / name, new.parent / name)
    remove_empty([new])


def describe(args, model, before):
    """What config.json holds: every setting, and what else the numbers of a run depend on. before:
    what it says of a run that goes on, else {}."""
    device, dtype = model.wte.weight.device, model.compute_dtype
    cost = {}
    for accounting in ("exact", "paper"):
        once, core = model.matmul_params(accounting)
        cost[accounting] = {"params_noncore": once, "params_core": core,
                            "flops_per_token": model.flops_per_token(accounting=accounting)}
    not_stored = ("out", "resume", "overwrite", "dry_run")
    machine = {"device": str(device), "dtype": str(dtype), "machine": machine_name(device),
               "ranks": world(), "threads": torch.get_num_threads()}
    # MFU is a share of one peak for all of a run, as long as it stays on a machine
    peak = before.get("peak_flops")
    if not isinstance(peak, float) or not machine.items() <= before.items():
        peak = matmul_peak(device, dtype) * world()
    return {"settings": {k: v for k, v in vars(args).items() if k not in not_stored},
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
    """Lines that say why a run goes on otherwise than without the interruption. before, record:
    what config.json said and says."""
    def facts(config):  # {name: value} of what a rounding may depend on, whatever level it is at
        flags = {flag_of(name): value for name, value in config["settings"].items()}
        return (config.get("versions") or {}) | config | flags
    was, now = facts(before), facts(record)
    lines = [f"goes on up to rounding: {name} was {was[name]}, is {now[name]}"
             for name in ("device", "dtype", "threads", "ranks", "torch", "--micro-batch",
                          "--compile")
             if name in was and was[name] != now[name]]
    lines += [f"goes on with {flag_of(name)} {value}, which the run had not recorded"
              for name, value in record["settings"].items()
              if name not in before["settings"] and value is not None]
    if before.get("peak_flops", record["peak_flops"]) != record["peak_flops"]:
        lines.append(f"MFU is a share of {record['peak_flops'] / 1e9:,.0f} GFLOP/s from here on, "
                     "since the machine, dtype or threads are different")
    if texts_differ(before.get("text"), record["text"]):
        lines.append(f"goes on with another text, of {record['data']}")
    return lines


def git_revision():
    """The commit of this code; None where there is none, or no git."""
    with contextlib.suppress(OSError):
        said = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                              cwd=Path(__file__).parent)
        return said.stdout.strip() or None


class Run:
    """A run in its directory; writes on rank 0 alone. `state` counts what has been done."""

    def __init__(self, path, model, optimizers):
        self.path = Path(path)
        self.folder = self.path  # where it writes
        self.model = model
        self.optimizers = optimizers
        self.state = {"step": 0, "samples": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0,
                      "skipped": 0}
        self.saved = None  # step of the last checkpoint
        self.started = False  # whether its files are new

    # ------------------------------------------------------------------------- writing

    def start(self, record, tokenizer):
        """Begin a new run; record: what config.json holds."""
        if rank() > 0:
            return
        self.started = True
        if (self.path / "ckpt.pt").exists():  # it replaces another one
            self.folder = self.path / ".new"
            self.folder.mkdir(exist_ok=True)
        # config.json first: without it the others are not known for a run's
        write_json(self.folder / "config.json", record)
        save_tokenizer(tokenizer, self.folder / "tokenizer.json")
        write_text(self.folder / "log.jsonl", "")

    @contextlib.contextmanager
    def withdrawn_without_a_step(self):
        """Remove what `start` wrote where the run fails before its first step: then some value was
        wrong that no check has found, a batch too large for the memory, say."""
        try:
            yield
        except BaseException:
            if self.started and self.state["step"] == 0:
                for name in FILES:
                    (self.folder / name).unlink(missing_ok=True)
                if self.folder != self.path:
                    remove_empty([self.folder])
            raise

    def go_on(self, record, lines):
        """Write what is in force now and the log so far, in which an earlier "done" was only an
        evaluation on the way."""
        if rank() > 0:
            return
        lines = [line | {"kind": "eval"} if line["kind"] == "done" else line for line in lines]
        write_json(self.path / "config.json", record)
        write_text(self.path / "log.jsonl", "".join(json_text(line) + "\n" for line in lines))

    def log(self, kind, **values):
        """Add a line to the log, with the state."""
        if rank() == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json_text({"kind": kind, **self.state, **values}) + "\n")

    def save(self):
        """Write the checkpoint; the first one of a run that replaces another moves it in."""
        self.saved = self.state["step"]
        if rank() > 0:
            return
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        with whole_file(self.folder / "ckpt.pt", "wb") as file:
            torch.save({"model": self.model.state_dict(), "state": self.state,
                        "optimizers": optimizers}, file)
        remove_measured(self.folder)
        if self.folder != self.path:
            move_in(self.folder)
            self.folder = self.path

    # ------------------------------------------------------------------------- resuming

    def resume(self):
        """Load the checkpoint. Raises UserError that names what is damaged."""
        file = self.path / "ckpt.pt"
        if not file.exists():
            raise UserError(f"{file} does not exist, the run ended before its first checkpoint: "
                            "start it again, without --resume")
        checkpoint = load_checkpoint(file)
        for name in ("model", "optimizers", "state"):
            if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), dict):
                raise UserError(f"{file} is damaged: it has no {name}")
        state = checkpoint["state"]
        for name, value in self.state.items():
            found = state.get(name)
            if type(found) not in {int, type(value)} or not 0 <= found < math.inf:
                raise UserError(f"{file} is damaged: state {name} is {found!r}, "
                                "must be a number from 0")
        fit_weights(self.model, checkpoint["model"], f"{file} does not fit these settings")
        updated = state["step"] > state["skipped"]
        optimizers = self.optimizers
        if began_with_torch_muon(checkpoint["optimizers"]):
            say("goes on, but not exactly: the run began with PyTorch's Muon, so its optimisers "
                "start anew")
            optimizers = {}
        for name, optimizer in optimizers.items():
            saved = checkpoint["optimizers"].get(name)
            load_optimizer(optimizer, saved, updated, f"{file} is damaged: the state of the "
                           f"optimiser {name} is missing or does not fit the model")
        self.state = {name: state[name] for name in self.state}
        self.saved = self.state["step"]

    def read_log(self):
        """The lines of the log up to the checkpoint, dicts. What cannot be read is left out, and
        said."""
        file = self.path / "log.jsonl"
        if not file.exists():
            say(f"{file} is missing, a new one begins")
            return []
        lines, bad = read_json_lines(file)
        whole = [line for line in lines
                 if line.get("kind") and isinstance(line.get("step"), int)]
        bad += len(lines) - len(whole)
        if bad:
            say(f"{file}: {bad} unreadable line(s) left out")
        return [line for line in whole if line["step"] <= self.state["step"]]


def began_with_torch_muon(optimizers):
    """Whether the optimisers of a checkpoint are those of runs before ours had its own Muon."""
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        return "momentum_buffer" in optimizers["muon"]["state"][0]
    return False


def fits_shape(value, p):
    """Whether a tensor is a number, as large as a parameter, or one number for each of its rows or
    columns."""
    return value.ndim == 0 or (value.ndim == p.ndim
                               and torch.broadcast_shapes(value.shape, p.shape) == p.shape)


def load_optimizer(optimizer, saved, updated, complaint):
    """Give an optimiser its state again. Raises UserError with the complaint where it does not fit.

    updated: whether it has updated the weights: then every parameter must have all of its state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        states = []
        if saved["state"] or updated:
            states = [dict(saved["state"][i]) for i in range(len(parameters))]
        fits = all(state and state.keys() == states[0].keys()
                   and all(fits_shape(value, p) and value.dtype == p.dtype
                           for value in state.values())
                   for state, p in zip(states, parameters))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        fits = False
    if not fits:
        raise UserError(complaint)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})

