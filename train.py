"""Train one model under a budget of steps, tokens or FLOPs.

    python train.py                                        the small default, minutes on a laptop
    python train.py --mean-recurrence 1 --out out/fixed    the same layers, run once
    python train.py --preset gpt-nano --max-flops 1e13 --out out/plain
    python train.py --resume                               go on with an interrupted run
    python train.py --init-from out/default --data data/mine --out out/mine --muon-lr 1e-2 --adamw-lr 1e-2    fine-tune
    torchrun --standalone --nproc-per-node=8 train.py --preset parcae-140m --data data/fineweb-edu

Writes a run directory: config.json (all settings), log.jsonl (one line a step or evaluation),
ckpt.pt (all that resuming needs) and tokenizer.json. The recipe is the paper's (§4.2, appendix E):
Muon for the matrices of the layers, AdamW for the rest, no warm-up, the learning rate constant and
then falling linearly to 0. All randomness of a step is a function of (seed, step), so that a resumed
run repeats an uninterrupted one, and several ranks repeat a single one.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (
    COUNT,
    LOOPS,
    POSITIVE,
    SEED,
    Parser,
    UserError,
    keep_freed_memory,
    load_checkpoint,
    lock,
    matmul_peak,
    number,
    pick_device,
    pick_dtype,
    read_json,
    run_script,
    some_path,
    whole_file,
    write_text,
)
from data import Loader, begin_token, decode_stream, load_tokenizer, other_text, prepare, same_tokens, save_tokenizer
from model import PRESETS, Parcae, ParcaeConfig, fit_weights, local_files, read_config

DEFAULT_DATA = "data/stdlib"
DEFAULT_STEPS = 1200
MAX_SKIPPED = 10
EVAL_SEED = 1234

# ----------------------------------------------------------------------------- settings


def preset(name):
    """An argparse type."""
    if name not in PRESETS:
        raise argparse.ArgumentTypeError(f"is {name}, must be one of {', '.join(PRESETS)}")
    return name


def make_parser():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", type=some_path, default="out/default", metavar="DIR", help="run directory to write (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out with its settings; flags given here change them")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--dry-run", action="store_true", help="print what config.json would say, the cost of a token among it, and stop")
    add("--data", type=some_path, default=DEFAULT_DATA, metavar="DIR", help="of data.py (default: %(default)s, made if missing)")
    add("--preset", type=preset, default="parcae-nano", metavar="NAME",
        help=f"model size, one of {', '.join(PRESETS)} (default: %(default)s)")

    add("--init-from", type=some_path, metavar="DIR",
        help="start from the weights of another run, or of a model in the published format (a directory, "
        "or owner/name on the Hugging Face hub), in place of --preset; flags of the model that keep its weights may change")

    add = parser.add_argument_group(f"budget (the first one spent ends the run; default: {DEFAULT_STEPS} steps)").add_argument
    add("--max-steps", type=number(float, 1), metavar="N", help="optimiser steps")
    add("--max-tokens", type=number(float, 1), metavar="D", help="training tokens")
    add("--max-flops", type=number(float, 1), metavar="C", help="training FLOPs, counted from the depths really drawn")
    add("--accounting", choices=("exact", "paper"), default="exact", help="how FLOPs are counted (default: exact)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=COUNT, default=16, metavar="N", help="sequences a step, over all ranks (default: %(default)s)")
    add("--micro-batch", type=COUNT, metavar="N", help="sequences of a forward pass on a device (default: all of its share)")
    add("--depth-sampling", choices=("per-sequence", "per-batch", "fixed"), default="per-sequence",
        help="loops: drawn for each sequence (default), once for the batch, or always --mean-recurrence")
    add("--muon-lr", type=POSITIVE, default=3e-2, metavar="LR", help="peak learning rate of Muon (default: %(default)s)")
    add("--adamw-lr", type=POSITIVE, default=3e-2, metavar="LR", help="peak learning rate of AdamW (default: %(default)s)")
    add("--cooldown", type=number(float, 0, 1), default=0.5, metavar="F",
        help="last part of the run, where it falls to 0 (default: %(default)s)")
    add("--weight-decay", type=number(float, 0), default=0.2, help="of Muon, falls to 0 over the run (default: %(default)s)")
    add("--grad-clip", type=POSITIVE, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="of weights, data order and depths (default: %(default)s)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=COUNT, default=400, metavar="N", help="steps between evaluations and checkpoints (default: %(default)s)")
    add("--eval-sequences", type=COUNT, default=64, metavar="N",
        help="val sequences read by an evaluation; by the last, 8 times as many (default: %(default)s)")
    add("--eval-recurrence", type=LOOPS, nargs="+", default=[1, 2, 4, 8, 16], metavar="T", help="loops (default: 1 2 4 8 16)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of the activations (default: bfloat16 where the machine multiplies it faster)")
    add("--compile", action="store_true", help="torch.compile the layers")

    add = parser.add_argument_group("model (defaults: those of --preset, then those given here)").add_argument
    comments = dict(re.findall(r"^    (\w+):.*# (.*)$", inspect.getsource(ParcaeConfig), re.MULTILINE))
    for field in fields(ParcaeConfig)[1:]:  # vocab_size comes with the data
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(
            type=field.type if field.type in (str, float) else int, metavar="N" if field.type is not str else "NAME")
        add("--" + field.name.replace("_", "-"), help=f"{comments[field.name]} (default: {field.default})", **kind)

    return parser


def parse_args(words=None):
    """The settings of a run: those of the command line; with --resume those that the run has, then the command line's."""
    parser = make_parser()
    args = parser.parse_args(words)
    if args.resume:
        saved = stored_settings(parser, Path(args.out) / "config.json")
        changed = parser.parse_args(words, namespace=argparse.Namespace(**vars(saved) | {"out": args.out}))
        for name in ("preset", "init_from", "seed", *(field.name for field in fields(ParcaeConfig)[1:])):
            before, now = getattr(saved, name), getattr(changed, name)
            if before != now and name not in ("mean_recurrence", "backprop_depth"):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {now}, in the run that goes on it is {before if before is not None else 'not given'}: "
                                "its checkpoint does not fit these settings")
        args = changed
    if args.max_steps is args.max_tokens is args.max_flops is None:
        args.max_steps = DEFAULT_STEPS
    return args


def stored_settings(parser, file):
    """The settings in a run's config.json, read as a command line: they are checked as one. Raises UserError."""
    if not file.exists():
        raise UserError(f"--out {file.parent} holds no run to resume: {file} does not exist")
    config = read_json(file)
    if not isinstance(config.get("settings"), dict):
        raise UserError(f"{file} is not that of a run: it has no settings")
    words = []
    for name, value in config["settings"].items():
        flag = "--" + name.replace("_", "-")
        if name == "out" or value is None or value is False and parser.get_default(name) is False:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list) and isinstance(parser.get_default(name), list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")
    try:
        return parser.parse_args(words)
    except UserError as error:
        raise UserError(f"{file}, settings: {error}") from None

# ----------------------------------------------------------------------------- training


def make_optimizers(model, args):
    """Muon for the matrices of the layers, AdamW for embeddings, head, norms, gates and injection (appendix E)."""
    matrices = model.matrices()
    taken = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in taken]
    return {"muon": torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=args.weight_decay),
            "adamw": torch.optim.AdamW(others, lr=args.adamw_lr, betas=(0.8, 0.95), eps=1e-10, weight_decay=0, fused=True)}


def schedule(progress, cooldown):
    """The learning rate's factor after a share `progress` of the budget: 1, then linearly to 0."""
    return min(1, (1 - progress) / cooldown) if cooldown else 1


def draw_depths(model, how, batch_size, step_seed):
    """Loops (batch_size,) of a training batch, see --depth-sampling."""
    generator = torch.Generator().manual_seed(step_seed)
    if how == "fixed":
        return torch.full((batch_size,), model.config.mean_recurrence)
    return model.sample_depths(batch_size, generator) if how == "per-sequence" else \
        model.sample_depths(1, generator).repeat(batch_size)


def backward(model, loader, depths, first_sample, micro, step_seed):
    """Accumulate the gradient of this rank's rows of a batch; the mean loss over all ranks' rows, a tensor.

    Rows are dealt to ranks and micro-batches like cards, deepest first: each gets equal work."""
    rank, world = process()
    mine = depths.argsort(descending=True, stable=True)[rank::world]
    parts = [mine[i::len(mine) // micro] for i in range(len(mine) // micro)]
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for part in parts:
        idx, targets = (t.to(device, non_blocking=True) for t in loader.batch(first_sample + part))
        torch.manual_seed(step_seed)  # the noise in which the loop starts is the same on every rank
        with model.no_sync() if world > 1 and part is not parts[-1] else contextlib.nullcontext():
            loss = model(idx, targets, depths=depths[part])[1] / len(parts)
            loss.backward()
        total += loss.detach() / world
    if world > 1:
        dist.all_reduce(total)
    return total


def update(optimizers, args, progress):
    """One step of the optimisers, at the rates for a share `progress` of the budget."""
    for name, peak in (("muon", args.muon_lr), ("adamw", args.adamw_lr)):
        for group in optimizers[name].param_groups:
            group["lr"] = peak * schedule(progress, args.cooldown)
            if name == "muon":
                group["weight_decay"] = args.weight_decay * (1 - progress)
        optimizers[name].step()


@torch.no_grad()
def evaluate(model, loader, sequences, batch_size, recurrence):
    """What the log has of an evaluation: mean val loss in nats per token and root mean square of the last state at each number
    of loops, {T: value}, and the injection's spectral radius. Every rank reads its share of the sequences."""
    rank, world = process()
    device = model.wte.weight.device
    model.eval()
    norms, looped = [], model.config.n_recurrent > 0
    if looped:
        hook = model.C_proj.register_forward_pre_hook(lambda module, inputs: norms.append(inputs[0].float().square().mean()))
    total = torch.zeros(2 * len(recurrence) + 1, device=device)
    mine = range(rank, min(sequences, len(loader)), world)
    for start in range(0, len(mine), batch_size):
        idx, targets = (t.to(device) for t in loader.batch(mine[start:start + batch_size]))
        losses = [model(idx, targets, recurrence=T)[1] for T in recurrence]
        total += torch.stack([*losses, *(norms or losses), torch.ones_like(losses[0])]) * len(idx)
        norms.clear()
    if world > 1:
        dist.all_reduce(total)
    model.train()
    losses, squares = (total[:-1] / total[-1]).view(2, -1).tolist()
    values = {"val_loss": dict(zip(recurrence, losses))}
    if looped:
        hook.remove()
        values |= {"state_rms": {T: math.sqrt(square) for T, square in zip(recurrence, squares)},
                   "spectral_radius": model.injection.spectral_radius().item()}
    return values


def process():
    """(rank, number of ranks), as torchrun tells."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

# ----------------------------------------------------------------------------- the run


FILES = ("tokenizer.json", "config.json", "log.jsonl", "ckpt.pt")


def check_place(path):
    """Raise UserError where a directory has files under the names of a run's that are not a run's."""
    there = [name for name in FILES if (path / name).exists()]
    if there:
        config = read_json(path / "config.json") if "config.json" in there else {}
        if not isinstance(config.get("settings"), dict) or not isinstance(config.get("model"), dict):
            raise UserError(f"--out {path} holds {there[0]} of something else than a run: choose another --out")


class Run:
    """A run directory: writes config.json, log.jsonl and ckpt.pt, on rank 0 alone; reads the checkpoint to resume.

    A run that replaces another one writes to the folder .new in it, and takes its place with its first checkpoint."""

    def __init__(self, path, model, optimizers):
        self.path, self.model, self.optimizers = Path(path), model, optimizers
        self.folder = self.path
        self.state = {"step": 0, "samples": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "skipped": 0}
        self.saved = None  # step of the last checkpoint

    def start(self, record, tokenizer):
        """Begin a new run."""
        if (self.path / "ckpt.pt").exists():
            self.folder = self.path / ".new"
            self.folder.mkdir(exist_ok=True)
        save_tokenizer(tokenizer, self.folder / "tokenizer.json")
        write_text(self.folder / "config.json", json.dumps(record, indent=1))
        write_text(self.folder / "log.jsonl", "")

    def resume(self, batch_size):
        """Load the checkpoint, whose steps so far read batch_size sequences each if it does not say how many it read."""
        file = self.path / "ckpt.pt"
        checkpoint = load_checkpoint(file)
        for name in ("model", "optimizers", "state"):
            if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), dict):
                raise UserError(f"{file} is damaged: it has no {name}")
        state = checkpoint["state"]
        state.setdefault("samples", state.get("step", 0) * batch_size if isinstance(state.get("step"), int) else None)
        for name, value in self.state.items():
            if type(state.get(name)) not in {int, type(value)} or not 0 <= state[name] < math.inf:
                raise UserError(f"{file} is damaged: state {name} is {state.get(name)!r}, must be a number from 0")
        fit_weights(self.model, checkpoint["model"], f"{file} does not fit these settings")
        for name in self.optimizers:
            self.load_optimizer(f"{file} is damaged", name, checkpoint["optimizers"].get(name), state["step"] > state["skipped"])
        self.state = {name: state[name] for name in self.state}
        self.saved = self.state["step"]

    def load_optimizer(self, complaint, name, saved, updated):
        """Give an optimiser its state again. Once it has updated the weights, every parameter must have all of its state."""
        optimizer = self.optimizers[name]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        try:
            states = [dict(saved["state"][i]) for i in range(len(parameters))] if saved["state"] or updated else []
            fits = all(state and state.keys() == states[0].keys() and
                       all(value.shape in ((), p.shape) for value in state.values()) for state, p in zip(states, parameters))
        except (KeyError, TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise UserError(f"{complaint}: the state of the optimiser {name} is missing or does not fit the model")
        optimizer.load_state_dict({"state": dict(enumerate(states)), "param_groups": optimizer.state_dict()["param_groups"]})

    def read_log(self):
        """The lines of the log up to the checkpoint, dicts; what cannot be read is left out, and said."""
        file, lines, bad = self.path / "log.jsonl", [], 0
        text = file.read_bytes() if file.exists() else b"missing"
        for line in filter(None, text.split(b"\n")):
            try:
                value = json.loads(line)
                if value["kind"] and value["step"] <= self.state["step"]:
                    lines.append(value)
            except (ValueError, TypeError, KeyError):
                bad += 1
        if bad and process()[0] == 0:
            print(f"{file} is missing, a new one begins" if text == b"missing" else f"{file}: {bad} unreadable line(s) left out")
        return lines

    def go_on(self, record, lines):
        """Write what is in force now and the log so far, in which an earlier "done" was an evaluation on the way."""
        lines = [line | {"kind": "eval"} if line["kind"] == "done" else line for line in lines]
        write_text(self.path / "config.json", json.dumps(record, indent=1))
        write_text(self.path / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def log(self, kind, **values):
        if process()[0] == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps({"kind": kind, **self.state, **values}) + "\n")

    def save(self):
        self.saved = self.state["step"]
        if process()[0] == 0:
            with whole_file(self.folder / "ckpt.pt", "wb") as file:
                torch.save({"model": self.model.state_dict(), "state": self.state,
                            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()}}, file)
            if self.folder != self.path:
                for name in FILES:
                    os.replace(self.folder / name, self.path / name)
                with contextlib.suppress(OSError):
                    self.folder.rmdir()  # unless a run that was killed left something there
                self.folder = self.path


def describe(args, config, model, device, dtype, peak):
    """What config.json holds: every setting, and what else the numbers of a run depend on."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    cost = {name: dict(zip(("params_noncore", "params_core"), model.matmul_params(name)),
                       flops_per_token=model.flops_per_token(accounting=name)) for name in ("exact", "paper")}
    return {"settings": {k: v for k, v in vars(args).items() if k not in ("out", "resume", "overwrite", "dry_run")},
            "model": asdict(config), "data": args.data, "text": read_json(Path(args.data) / "tokenizer.json").get("text"),
            "parameters": sum(p.numel() for p in model.parameters()),
            "cost": cost, "device": str(device), "dtype": str(dtype),
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "ranks": process()[1], "threads": torch.get_num_threads(), "peak_flops": peak, "git": git.stdout.strip() or None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


def read_start(source, tokenizer, data):
    """The model of --init-from. Raises UserError where it was trained on other tokens than `data` holds."""
    source = local_files(source)
    model = Parcae.from_pretrained(source)
    if (source / "tokenizer.json").exists() and not same_tokens(load_tokenizer(source), tokenizer):
        raise UserError(f"--data {data} has other tokens than --init-from {source}; make it with: "
                        f"python data.py ... --tokenizer {source}")
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f"--data {data} has {tokenizer.n_vocab} tokens, the model of --init-from {source} {model.config.vocab_size}")
    return model


def check_free(args):
    """Raise UserError where --out holds what this run must not replace."""
    check_place(Path(args.out))
    if (Path(args.out) / "ckpt.pt").exists() and not (args.resume or args.overwrite or args.dry_run):
        raise UserError(f"--out {args.out} holds a run already: continue it with --resume, replace it with --overwrite, "
                        "or choose another --out")


def resumed_config(args):
    """The ParcaeConfig of the run that goes on: its own, but for the depths that are asked for now. Raises UserError where
    --data has other tokens."""
    config = read_config(args.out)
    if not same_tokens(load_tokenizer(args.out), load_tokenizer(args.data)):
        raise UserError(f"--data {args.data} has other tokens than the run in {args.out} was trained on")
    mean = args.mean_recurrence or config.mean_recurrence
    same = mean == config.mean_recurrence
    return replace(config, mean_recurrence=mean, backprop_depth=args.backprop_depth or (config.backprop_depth if same else None))


def train(args):
    rank, world = process()
    micro = args.micro_batch or max(1, args.batch_size // world)
    if args.batch_size % (world * micro):
        raise UserError(f"--batch-size is {args.batch_size}, must be a multiple of ranks * --micro-batch ({world} * {micro})")
    check_free(args)
    device = pick_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    if args.data == DEFAULT_DATA and not Path(args.data).exists() and rank == 0:
        prepare("stdlib", args.data)
    if world > 1:
        dist.barrier()
    tokenizer = load_tokenizer(args.data)
    given = {f.name: getattr(args, f.name) for f in fields(ParcaeConfig)[1:] if getattr(args, f.name) is not None}
    if args.resume:
        config = resumed_config(args)
    elif args.init_from:
        start = read_start(args.init_from, tokenizer, args.data)
        config = replace(start.config, **({"backprop_depth": None} if "mean_recurrence" in given else {}) | given)
    else:
        vocab_size = -(-tokenizer.n_vocab // 64) * 64  # matrix units like round numbers
        config = ParcaeConfig(**PRESETS[args.preset] | given | {"vocab_size": vocab_size})
    loader = Loader(args.data, "train", config.block_size, tokenizer.n_vocab, args.seed)
    val_loader = Loader(args.data, "val", config.block_size, tokenizer.n_vocab, EVAL_SEED)

    torch.manual_seed(args.seed)
    model = Parcae(config).to(device)
    if args.init_from and not args.resume:
        fit_weights(model, start.state_dict(), f"--init-from {args.init_from} does not fit these flags of the model")
    model.compute_dtype = dtype = pick_dtype(device, args.dtype)
    run = Run(args.out, model, make_optimizers(model, args))
    record = describe(args, config, model, device, dtype, matmul_peak(device, dtype) * world)
    if args.dry_run:
        print(json.dumps(record, indent=1))
        return
    with hold(args.out) if rank == 0 else contextlib.nullcontext():
        check_free(args)  # once more, now that nobody else can write there
        for leftover in Path(args.out).glob(".*.tmp") if rank == 0 else ():  # of a process that was killed while it wrote
            if leftover.name.startswith((".ckpt.pt.", ".config.json.", ".log.jsonl.")):
                leftover.unlink()
        train_steps(args, run, loader, val_loader, tokenizer, record, micro)
    if world > 1:
        dist.barrier()  # ranks leave together: gloo may abort one that leaves while another is still at work
        dist.destroy_process_group()


def hold(out):
    """The lock of a run directory, which is made where it is missing."""
    Path(out).mkdir(parents=True, exist_ok=True)
    return lock(out)


def train_steps(args, run, loader, val_loader, tokenizer, record, micro):
    """Train until the budget is spent or a signal comes, from the start or from the checkpoint."""
    (rank, world), model, peak = process(), run.model, record["peak_flops"]
    config, device = model.config, model.wte.weight.device
    budget = {"step": args.max_steps, "tokens": args.max_tokens, "flops": args.max_flops}
    progress = lambda: min(1, max(state[kind] / limit for kind, limit in budget.items() if limit))
    if args.resume:
        before = read_json(run.path / "config.json")
        run.resume(before["settings"].get("batch_size", args.batch_size))
        state, lines = run.state, run.read_log()
        if progress() == 1 and lines and lines[-1]["kind"] == "done":
            if rank == 0:
                print(f"{args.out} is finished: to go on, give a larger --max-steps, --max-tokens or --max-flops")
            return
        if rank == 0:
            run.go_on(record, lines)
            for name, meaning in (("dtype", "not bit for bit"), ("threads", "not bit for bit"), ("ranks", "up to rounding")):
                if before.get(name, record[name]) != record[name]:
                    print(f"goes on {meaning}: {name} was {before[name]}, is {record[name]}")
            if before["settings"].get("micro_batch") != args.micro_batch:
                print("goes on up to rounding: another --micro-batch")
    elif rank == 0:
        run.start(record, tokenizer)
    state = run.state
    if rank == 0 and (difference := other_text(args.data)):
        print(difference)
    if rank == 0:
        print(f"{args.out}: {record['parameters']:,} parameters, {config.n_prelude}/{config.n_recurrent}/{config.n_coda} layers of "
              f"{config.n_embd} channels, mean recurrence {config.mean_recurrence}\n"
              f"{args.data}: {len(loader) * config.block_size:,} train tokens\n"
              f"{world} x {device}, {model.compute_dtype}, matmul peak {peak / 1e9:,.0f} GFLOP/s")
    if args.compile:
        model.compile_layers()
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model

    stop = []  # signals received
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=100, initial=100 * progress(), disable=None if rank == 0 else True,
               bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    skipped_in_a_row = 0
    while progress() < 1 and not stop:
        start, before, step = time.perf_counter(), progress(), state["step"]
        step_seed = args.seed * 1_000_003 + step
        depths = draw_depths(model, args.depth_sampling, args.batch_size, step_seed)
        loss = backward(parallel, loader, depths, state["samples"], micro, step_seed)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        loss, norm = torch.stack([loss, norm]).tolist()
        if math.isfinite(loss + norm):
            update(run.optimizers, args, before)
            skipped_in_a_row = 0
        else:
            skipped_in_a_row += 1
            state["skipped"] += 1
        model.zero_grad()

        T, T_grad = depths.double().mean().item(), depths.clamp(max=config.backprop_depth).double().mean().item()
        tokens = args.batch_size * config.block_size
        flops = tokens * model.flops_per_token(T, T_grad, accounting=args.accounting)
        seconds = time.perf_counter() - start
        for kind, spent in (("step", 1), ("samples", args.batch_size), ("tokens", tokens), ("flops", flops), ("seconds", seconds)):
            state[kind] += spent
        mfu = flops / seconds / peak
        run.log("train", loss=loss, grad_norm=norm, lr=args.muon_lr * schedule(before, args.cooldown), mean_depth=T,
                tok_per_s=tokens / seconds, mfu=mfu)
        bar.update(100 * (progress() - before))
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tok/s, {state['flops']:.2e} FLOPs, MFU {mfu:.0%}")
        if skipped_in_a_row == MAX_SKIPPED:
            break
        if world > 1:  # a signal to one rank stops all
            signals = torch.tensor(len(stop), device=device)
            dist.all_reduce(signals)
            stop += [signal.SIGTERM] * int(signals > 0)
        if (step + 1) % args.eval_every == 0 and progress() < 1 and not skipped_in_a_row:  # never over a good checkpoint
            T = config.mean_recurrence
            values = evaluate(model, val_loader, args.eval_sequences, micro, [T])
            run.log("eval", **values)
            run.save()
            if rank == 0:
                tqdm.write(f"step {step + 1}, {progress():.0%}: train loss {loss:.4f}, val loss {values['val_loss'][T]:.4f} "
                           f"at T = {T}, {state['tokens'] / state['seconds']:,.0f} tok/s", file=sys.stdout)
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if skipped_in_a_row and not stop:
        good = "no checkpoint was saved" if run.saved is None else f"{run.path / 'ckpt.pt'} is good, of step {run.saved}"
        raise UserError(f"loss or gradient was not finite {skipped_in_a_row} steps in a row, at step {state['step']}: try a lower "
                        f"--muon-lr (it is {args.muon_lr}) or --adamw-lr (it is {args.adamw_lr}); {good}")
    if not skipped_in_a_row:
        run.save()
    if not stop:
        values = evaluate(model, val_loader, 8 * args.eval_sequences, micro, args.eval_recurrence if config.n_recurrent else [1])
        run.log("done", **values)
    if rank == 0:
        report(args, model, tokenizer, state | {"saved": run.saved}, None if stop else values["val_loss"])


def report(args, model, tokenizer, state, losses):
    """Print what the run came to: val loss by recurrence and a sample; where it was stopped, how to go on."""
    if losses is None:
        go_on = "nothing was saved yet" if state["saved"] is None else f"saved at step {state['saved']}; go on with: " \
            f"python train.py --resume --out {args.out}"
        print(f"stopped at step {state['step']}, {go_on}")
        return
    print(f"{state['step']} steps, {state['tokens']:,} tokens, {state['flops']:.3e} FLOPs ({args.accounting}), "
          f"{state['seconds']:.0f} s, {state['skipped']} steps skipped\n\nrecurrence T   val loss (nats per token)")
    for T, loss in losses.items():
        print(f"{T:12d}   {loss:.4f}")
    print(f"\na sample (more with: python sample.py --run {args.out}):")
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(args.seed)
    tokens = model.stream(torch.tensor([[begin_token(tokenizer)]], device=device), 300, temperature=0.7, generator=generator)
    for text in decode_stream(tokenizer, tokens):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    run_script(lambda: train(parse_args()))
