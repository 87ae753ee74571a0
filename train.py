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

from data import Loader, begin_token, decode_stream, load_tokenizer, prepare, save_tokenizer
from model import (
    PRESETS,
    Parcae,
    ParcaeConfig,
    UserError,
    keep_freed_memory,
    load_checkpoint,
    local_files,
    matmul_peak,
    pick_device,
    pick_dtype,
)

DEFAULT_DATA = "data/stdlib"
DEFAULT_STEPS = 1200
MAX_SKIPPED = 10
EVAL_SEED = 1234

# ----------------------------------------------------------------------------- settings


def parse_args():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", default="out/default", metavar="DIR", help="run directory to write (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out with its settings; flags given here change them")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--dry-run", action="store_true", help="print what config.json would say, the cost of a token among it, and stop")
    add("--data", default=DEFAULT_DATA, metavar="DIR", help="of data.py (default: %(default)s, made if missing)")
    add("--preset", default="parcae-nano", metavar="NAME",
        help=f"model size, one of {', '.join(PRESETS)} (default: %(default)s)")

    add("--init-from", metavar="DIR", help="start from the weights of another run, or of a model in the published format (a directory, "
        "or owner/name on the Hugging Face hub), in place of --preset; flags of the model that keep its weights may change")

    add = parser.add_argument_group(f"budget (the first one spent ends the run; default: {DEFAULT_STEPS} steps)").add_argument
    add("--max-steps", type=float, metavar="N", help="optimiser steps")
    add("--max-tokens", type=float, metavar="D", help="training tokens")
    add("--max-flops", type=float, metavar="C", help="training FLOPs, counted from the depths really drawn")
    add("--accounting", choices=("exact", "paper"), default="exact", help="how FLOPs are counted (default: exact)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, default=16, metavar="N", help="sequences a step, over all ranks (default: %(default)s)")
    add("--micro-batch", type=int, metavar="N", help="sequences of a forward pass on a device (default: all of its share)")
    add("--depth-sampling", choices=("per-sequence", "per-batch", "fixed"), default="per-sequence",
        help="loops: drawn for each sequence (default), once for the batch, or always --mean-recurrence")
    add("--muon-lr", type=float, default=3e-2, metavar="LR", help="peak learning rate of Muon (default: %(default)s)")
    add("--adamw-lr", type=float, default=3e-2, metavar="LR", help="peak learning rate of AdamW (default: %(default)s)")
    add("--cooldown", type=float, default=0.5, metavar="F", help="last part of the run, where it falls to 0 (default: %(default)s)")
    add("--weight-decay", type=float, default=0.2, help="of Muon, falls to 0 over the run (default: %(default)s)")
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, data order and depths (default: %(default)s)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=int, default=400, metavar="N", help="steps between evaluations and checkpoints (default: %(default)s)")
    add("--eval-sequences", type=int, default=64, metavar="N",
        help="val sequences read by an evaluation; by the last, 8 times as many (default: %(default)s)")
    add("--eval-recurrence", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="T", help="loops (default: 1 2 4 8 16)")

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

    args = parser.parse_args()
    if args.resume:
        try:
            parser.set_defaults(**json.loads((Path(args.out) / "config.json").read_text())["settings"])
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--out {args.out} holds no run to resume: {error}")
        args = parser.parse_args()
    return parser, args


def check(args):
    """Raise UserError where a setting is out of range."""
    def need(ok, flag, allowed):
        if not ok:
            raise UserError(f"--{flag} is {getattr(args, flag.replace('-', '_'))}, must be {allowed}")
    need(args.preset in PRESETS, "preset", f"one of {', '.join(PRESETS)}")
    for flag in ("max-steps", "max-tokens", "max-flops", "micro-batch"):
        value = getattr(args, flag.replace("-", "_"))
        need(value is None or value >= 1, flag, "at least 1")
    for flag in ("batch-size", "eval-every", "eval-sequences"):
        need(getattr(args, flag.replace("-", "_")) >= 1, flag, "at least 1")
    for flag in ("muon-lr", "adamw-lr", "grad-clip"):
        need(getattr(args, flag.replace("-", "_")) > 0, flag, "above 0")
    need(args.weight_decay >= 0, "weight-decay", "at least 0")
    need(0 <= args.cooldown <= 1, "cooldown", "from 0 to 1")
    need(min(args.eval_recurrence) >= 1, "eval-recurrence", "at least 1")
    if args.max_steps is args.max_tokens is args.max_flops is None:
        args.max_steps = DEFAULT_STEPS

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


class Run:
    """A run directory: writes config.json, log.jsonl and ckpt.pt, on rank 0 alone; reads the checkpoint to resume."""

    def __init__(self, path, model, optimizers):
        self.path, self.model, self.optimizers = Path(path), model, optimizers
        self.state = {"step": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "skipped": 0}

    def start(self, record, tokenizer):
        """Make the directory, or clear the one that is there."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "ckpt.pt").unlink(missing_ok=True)
        (self.path / "log.jsonl").write_text("")
        save_tokenizer(tokenizer, self.path / "tokenizer.json")
        (self.path / "config.json").write_text(json.dumps(record, indent=1))

    def resume(self):
        """Load the checkpoint and drop what was logged after it."""
        checkpoint = load_checkpoint(self.path / "ckpt.pt")
        try:
            self.model.load_state_dict(checkpoint["model"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(checkpoint["optimizers"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{self.path / 'ckpt.pt'} does not fit these settings: {str(error).splitlines()[0]}") from None
        self.state = checkpoint["state"]
        log = self.path / "log.jsonl"
        lines = [line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= self.state["step"]]
        if process()[0] == 0:
            log.write_text("".join(lines))

    def log(self, kind, **values):
        if process()[0] == 0:
            with open(self.path / "log.jsonl", "a") as file:
                file.write(json.dumps({"kind": kind, **self.state, **values}) + "\n")

    def save(self):
        if process()[0] == 0:
            path = self.path / "ckpt.pt"
            torch.save({"model": self.model.state_dict(), "state": self.state,
                        "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()}}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)


def describe(args, config, model, device, dtype, peak):
    """What config.json holds: every setting, and what else the numbers of a run depend on."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    cost = {name: dict(zip(("params_noncore", "params_core"), model.matmul_params(name)),
                       flops_per_token=model.flops_per_token(accounting=name)) for name in ("exact", "paper")}
    return {"settings": {k: v for k, v in vars(args).items() if k not in ("resume", "overwrite", "dry_run")},
            "model": asdict(config), "data": args.data, "parameters": sum(p.numel() for p in model.parameters()),
            "cost": cost, "device": str(device), "dtype": str(dtype),
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "ranks": process()[1], "threads": torch.get_num_threads(), "peak_flops": peak, "git": git.stdout.strip() or None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


def read_start(source, tokenizer, data):
    """The model of --init-from. Raises UserError where it was trained on other tokens than `data` holds."""
    source = local_files(source)
    model = Parcae.from_pretrained(source)
    if (source / "tokenizer.json").exists():
        other = load_tokenizer(source)
        if (other._mergeable_ranks, other._special_tokens) != (tokenizer._mergeable_ranks, tokenizer._special_tokens):
            raise UserError(f"--data {data} has other tokens than --init-from {source}; make it with: "
                            f"python data.py ... --tokenizer {source}")
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f"--data {data} has {tokenizer.n_vocab} tokens, the model of --init-from {source} {model.config.vocab_size}")
    return model


def train(args):
    check(args)
    rank, world = process()
    micro = args.micro_batch or max(1, args.batch_size // world)
    if args.batch_size % (world * micro):
        raise UserError(f"--batch-size is {args.batch_size}, must be a multiple of ranks * --micro-batch ({world} * {micro})")
    if (Path(args.out) / "ckpt.pt").exists() and not (args.resume or args.overwrite or args.dry_run):
        raise UserError(f"--out {args.out} holds a run already: continue it with --resume, replace it with --overwrite, "
                        "or choose another --out")
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
    if args.init_from:
        start = read_start(args.init_from, tokenizer, args.data)
        config = replace(start.config, **({"backprop_depth": None} if "mean_recurrence" in given else {}) | given)
    else:
        vocab_size = -(-tokenizer.n_vocab // 64) * 64  # matrix units like round numbers
        config = ParcaeConfig(**PRESETS[args.preset] | given | {"vocab_size": vocab_size})
    loader = Loader(args.data, "train", config.block_size, tokenizer.n_vocab, args.seed)
    val_loader = Loader(args.data, "val", config.block_size, tokenizer.n_vocab, EVAL_SEED)

    torch.manual_seed(args.seed)
    model = Parcae(config).to(device)
    if args.init_from:
        try:
            model.load_state_dict(start.state_dict())
        except RuntimeError as error:
            detail = str(error).splitlines()[1].strip()
            raise UserError(f"--init-from {args.init_from} does not fit these flags of the model: {detail}") from None
    model.compute_dtype = dtype = pick_dtype(device, args.dtype)
    run = Run(args.out, model, make_optimizers(model, args))
    state, peak = run.state, matmul_peak(device, dtype) * world
    if args.dry_run:
        print(json.dumps(describe(args, config, model, device, dtype, peak), indent=1))
        return
    if args.resume:
        run.resume()
        state = run.state
    elif rank == 0:
        run.start(describe(args, config, model, device, dtype, peak), tokenizer)
    if rank == 0:
        print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.n_prelude}/{config.n_recurrent}/"
              f"{config.n_coda} layers of {config.n_embd} channels, mean recurrence {config.mean_recurrence}\n"
              f"{args.data}: {len(loader) * config.block_size:,} train tokens\n"
              f"{world} x {device}, {dtype}, matmul peak {peak / 1e9:,.0f} GFLOP/s")
    if args.compile:
        model.compile_layers()
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model

    stop = []  # signals received
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    budget = {"step": args.max_steps, "tokens": args.max_tokens, "flops": args.max_flops}
    progress = lambda: min(1, max(state[kind] / limit for kind, limit in budget.items() if limit))
    bar = tqdm(total=100, initial=100 * progress(), disable=None if rank == 0 else True,
               bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    skipped_in_a_row = 0
    while progress() < 1 and not stop:
        start, before, step = time.perf_counter(), progress(), state["step"]
        step_seed = args.seed * 1_000_003 + step
        depths = draw_depths(model, args.depth_sampling, args.batch_size, step_seed)
        loss = backward(parallel, loader, depths, step * args.batch_size, micro, step_seed)
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
        for kind, spent in (("step", 1), ("tokens", tokens), ("flops", flops), ("seconds", seconds)):
            state[kind] += spent
        mfu = flops / seconds / peak
        run.log("train", loss=loss, grad_norm=norm, lr=args.muon_lr * schedule(before, args.cooldown), mean_depth=T,
                tok_per_s=tokens / seconds, mfu=mfu)
        bar.update(100 * (progress() - before))
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tok/s, {state['flops']:.2e} FLOPs, MFU {mfu:.0%}")
        if skipped_in_a_row == MAX_SKIPPED:
            bar.close()
            raise UserError(f"loss or gradient was not finite {MAX_SKIPPED} steps in a row, at step {step + 1}: "
                            f"try a lower --muon-lr (it is {args.muon_lr})")
        if world > 1:  # a signal to one rank stops all
            signals = torch.tensor(len(stop), device=device)
            dist.all_reduce(signals)
            stop += [signal.SIGTERM] * int(signals > 0)
        if (step + 1) % args.eval_every == 0 and progress() < 1:
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
    run.save()
    if not stop:
        values = evaluate(model, val_loader, 8 * args.eval_sequences, micro, args.eval_recurrence if config.n_recurrent else [1])
        run.log("done", **values)
    if rank == 0:
        report(args, model, tokenizer, state, None if stop else values["val_loss"])
    if world > 1:
        dist.barrier()  # ranks leave together: gloo may abort one that leaves while another is still at work
        dist.destroy_process_group()


def report(args, model, tokenizer, state, losses):
    """Print what the run came to: val loss by recurrence and a sample; where it was stopped, how to go on."""
    if losses is None:
        print(f"stopped at step {state['step']} and saved; go on with: python train.py --resume --out {args.out}")
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
    parser, args = parse_args()
    try:
        train(args)
    except UserError as error:
        parser.error(str(error))
