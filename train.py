"""Train one model under a budget of steps, tokens or FLOPs.

    python train.py                                        the small default, minutes on a laptop
    python train.py --mean-recurrence 1 --out out/fixed    the same layers, run once
    python train.py --preset gpt-nano --max-flops 1e13 --out out/plain
    python train.py --resume                               go on with an interrupted run
    torchrun --standalone --nproc-per-node=8 train.py --preset parcae-140m --data data/fineweb-edu

Writes a run directory: config.json (all settings), log.jsonl (one line a step or evaluation),
ckpt.pt (all that resuming needs) and tokenizer.json. The recipe is the paper's (§4.2, appendix E):
Muon for the matrices of the layers, AdamW for the rest, no warm-up, the learning rate constant and
then falling linearly to 0. All randomness of a step is a function of (seed, step), so that a resumed
run repeats an uninterrupted one, and several ranks repeat a single one.
"""

import argparse
import contextlib
import ctypes
import inspect
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import Loader, decode_stream, load_tokenizer, prepare, save_tokenizer
from model import PRESETS, Parcae, ParcaeConfig, UserError, load_checkpoint, pick_device, pick_dtype

DEFAULT_DATA = "data/stdlib"
DEFAULT_STEPS = 1000
BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # FLOP/s, data sheets
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
    add("--data", default=DEFAULT_DATA, metavar="DIR", help="of data.py (default: %(default)s, made if missing)")
    add("--preset", default="parcae-nano", metavar="NAME",
        help=f"model size, one of {', '.join(PRESETS)} (default: %(default)s)")

    add = parser.add_argument_group(f"budget (the first one spent ends the run; default: {DEFAULT_STEPS} steps)").add_argument
    add("--max-steps", type=float, metavar="N", help="optimiser steps")
    add("--max-tokens", type=float, metavar="D", help="training tokens")
    add("--max-flops", type=float, metavar="C", help="training FLOPs, counted from the depths really drawn")
    add("--accounting", choices=("exact", "paper"), default="exact", help="how FLOPs are counted (default: exact)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, default=32, metavar="N", help="sequences a step, over all ranks (default: %(default)s)")
    add("--micro-batch", type=int, metavar="N", help="sequences of a forward pass on a device (default: all of its share)")
    add("--depth-sampling", choices=("per-sequence", "per-batch", "fixed"), default="per-sequence",
        help="loops: drawn for each sequence (default), once for the batch, or always --mean-recurrence")
    add("--lr", type=float, default=8e-3, help="peak learning rate of Muon and AdamW (default: %(default)s)")
    add("--cooldown", type=float, default=0.5, metavar="F", help="last part of the run, where it falls to 0 (default: %(default)s)")
    add("--weight-decay", type=float, default=0.2, help="of Muon, falls to 0 over the run (default: %(default)s)")
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, data order and depths (default: %(default)s)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=int, default=250, metavar="N", help="steps between evaluations and checkpoints (default: %(default)s)")
    add("--eval-sequences", type=int, default=64, metavar="N",
        help="val sequences read by an evaluation; by the last, 8 times as many (default: %(default)s)")
    add("--eval-recurrence", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="T", help="loops (default: 1 2 4 8 16)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of the activations (default: bfloat16 where the hardware multiplies it natively)")
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
    for flag in ("lr", "grad-clip"):
        need(getattr(args, flag.replace("-", "_")) > 0, flag, "above 0")
    need(args.weight_decay >= 0, "weight-decay", "at least 0")
    need(0 <= args.cooldown <= 1, "cooldown", "from 0 to 1")
    need(min(args.eval_recurrence) >= 1, "eval-recurrence", "at least 1")
    if args.max_steps is args.max_tokens is args.max_flops is None:
        args.max_steps = DEFAULT_STEPS

# ----------------------------------------------------------------------------- machine


def keep_freed_memory():
    """Have glibc keep freed memory: by default it maps and clears every large activation afresh,
    which on a CPU costs more than most element-wise operations."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD, bytes
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def matmul_peak(device, dtype):
    """FLOP/s of large matrix products: the data sheet's where known, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, peak in BF16_PEAK.items():
            if name in torch.cuda.get_device_name(device):
                return peak
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 ** 3 / best

# ----------------------------------------------------------------------------- training


def make_optimizers(model, lr, weight_decay):
    """Muon for the matrices of the layers, AdamW for embeddings, head, norms, gates and injection (appendix E)."""
    blocks = (model.prelude, model.recurrent, model.coda)
    matrices = [p for part in blocks for name, p in part.named_parameters() if p.ndim == 2 and "ve_gate" not in name]
    taken = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in taken]
    return [torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=lr, betas=(0.8, 0.95), eps=1e-10, weight_decay=0, fused=True)]


def schedule(progress, cooldown):
    """The learning rate's factor after a share `progress` of the budget: 1, then linearly to 0."""
    return min(1, (1 - progress) / cooldown) if cooldown else 1


def draw_depths(model, how, batch_size, generator):
    """Loops (batch_size,) of a training batch, see --depth-sampling."""
    if how == "fixed":
        return torch.full((batch_size,), model.config.mean_recurrence)
    return model.sample_depths(batch_size, generator) if how == "per-sequence" else \
        model.sample_depths(1, generator).repeat(batch_size)


@torch.no_grad()
def evaluate(model, loader, sequences, batch_size, recurrence, device, rank=0, world=1):
    """Mean val loss in nats per token at each recurrence: {T: loss}. Every rank reads its share."""
    model.eval()
    total = torch.zeros(len(recurrence) + 1, dtype=torch.float64, device=device)
    mine = range(rank, min(sequences, len(loader)), world)
    for start in range(0, len(mine), batch_size):
        idx, targets = (t.to(device) for t in loader.batch(mine[start:start + batch_size]))
        losses = [model(idx, targets, recurrence=T)[1] for T in recurrence]
        total += torch.stack([*losses, torch.ones_like(losses[0])]).double() * len(idx)
    if world > 1:
        dist.all_reduce(total)
    model.train()
    return dict(zip(recurrence, (total[:-1] / total[-1]).tolist()))


def save(obj, path):
    """torch.save by way of a temporary file, so that path is never half-written."""
    torch.save(obj, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def table(losses, unit):
    """Val loss by recurrence, as text."""
    return "\n".join([f"recurrence T   val loss ({unit})"] + [f"{T:12d}   {loss:.4f}" for T, loss in losses.items()])


def train(args):
    check(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    master = rank == 0
    device = pick_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    dtype = pick_dtype(device, args.dtype)
    keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    micro = args.micro_batch or args.batch_size // world or 1
    if args.batch_size % (world * micro):
        raise UserError(f"--batch-size is {args.batch_size}, must be a multiple of ranks * --micro-batch ({world} * {micro})")

    out, data = Path(args.out), Path(args.data)
    if (out / "ckpt.pt").exists() and not (args.resume or args.overwrite):
        raise UserError(f"--out {out} holds a run already: continue it with --resume, replace it with --overwrite, "
                        "or choose another --out")
    if args.data == DEFAULT_DATA and not data.exists() and master:
        prepare("stdlib", data)
    if world > 1:
        dist.barrier()
    tokenizer = load_tokenizer(data)
    settings = {f.name: getattr(args, f.name) for f in fields(ParcaeConfig)[1:] if getattr(args, f.name) is not None}
    config = ParcaeConfig(**{**PRESETS[args.preset], **settings, "vocab_size": -(-tokenizer.n_vocab // 64) * 64})
    loader = Loader(data, "train", config.block_size, tokenizer.n_vocab, args.seed)
    val_loader = Loader(data, "val", config.block_size, tokenizer.n_vocab, EVAL_SEED)

    torch.manual_seed(args.seed)
    model = Parcae(config).to(device)
    model.compute_dtype = dtype
    optimizers = make_optimizers(model, args.lr, args.weight_decay)
    state = {"step": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "skipped": 0}
    log_path, ckpt_path = out / "log.jsonl", out / "ckpt.pt"
    if args.resume:
        checkpoint = load_checkpoint(ckpt_path)
        state = checkpoint["state"]
        try:
            model.load_state_dict(checkpoint["model"])
            for optimizer, saved in zip(optimizers, checkpoint["optimizers"]):
                optimizer.load_state_dict(saved)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{ckpt_path} does not fit these settings: {str(error).splitlines()[0]}") from None

    lines = [line for line in log_path.read_text().splitlines() if json.loads(line)["step"] <= state["step"]] \
        if args.resume and log_path.exists() else []
    peak = matmul_peak(device, dtype) * world
    parameters = sum(p.numel() for p in model.parameters())
    if master:
        out.mkdir(parents=True, exist_ok=True)
        ckpt_path.unlink(missing_ok=True) if not args.resume else None
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        record = {"settings": {k: v for k, v in vars(args).items() if k not in ("resume", "overwrite")},
                  "model": asdict(config), "data": str(data), "parameters": parameters,
                  "flops_per_token": model.flops_per_token(accounting=args.accounting),
                  "device": platform.processor() or platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(),
                  "dtype": str(dtype), "ranks": world, "peak_flops": peak, "git": git.stdout.strip() or None,
                  "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
        (out / "config.json").write_text(json.dumps(record, indent=1))
        save_tokenizer(tokenizer, out / "tokenizer.json")
        log_path.write_text("".join(line + "\n" for line in lines))
        print(f"{out}: {parameters:,} parameters, {config.n_prelude}/{config.n_recurrent}/{config.n_coda} layers of "
              f"{config.n_embd} channels, mean recurrence {config.mean_recurrence}, injection {config.injection}\n"
              f"{data}: {len(loader) * config.block_size:,} train tokens; {world} x {device.type}, {dtype}, "
              f"matmul peak {peak / 1e9:,.0f} GFLOP/s")

    def log(kind, **values):
        if master:
            with open(log_path, "a") as file:
                file.write(json.dumps({"kind": kind, **state, **values}) + "\n")

    def checkpoint():
        if master:
            save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "state": state}, ckpt_path)

    if args.compile:
        for block in [*model.prelude, *model.recurrent, *model.coda]:
            block.compile(dynamic=True)
    parallel = DistributedDataParallel(model) if world > 1 else model
    stop = []
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    budget = {"step": args.max_steps, "tokens": args.max_tokens, "flops": args.max_flops}

    def progress():
        return max(state[kind] / limit for kind, limit in budget.items() if limit)

    bar = tqdm(total=100, initial=round(100 * min(1, progress()), 1), disable=None if master else True, unit="%",
               bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    skipped_in_a_row, now = 0, time.perf_counter()
    while progress() < 1 and not stop:
        step, before = state["step"], progress()
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        depths = draw_depths(model, args.depth_sampling, args.batch_size, generator)
        mine = depths.argsort(descending=True, stable=True)[rank::world]  # dealt like cards: equal work for each rank
        parts = [mine[i::len(mine) // micro] for i in range(len(mine) // micro)]

        total = torch.zeros(2, device=device)
        for i, rows in enumerate(parts):
            torch.manual_seed(args.seed * 1_000_003 + step)  # the start state's noise
            idx, targets = (t.to(device, non_blocking=True) for t in loader.batch(step * args.batch_size + rows))
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last or world == 1 else parallel.no_sync():
                loss = parallel(idx, targets, depths=depths[rows])[1] / len(parts)
                loss.backward()
            total[0] += loss.detach() / world
        total[1] = len(stop)
        if world > 1:
            dist.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        loss, interrupted, norm = torch.stack([*total, norm]).tolist()
        if interrupted and not stop:
            stop.append(signal.SIGTERM)

        factor = schedule(before, args.cooldown)
        if np.isfinite(loss + norm):
            skipped_in_a_row = 0
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * factor
                    if group["weight_decay"]:
                        group["weight_decay"] = args.weight_decay * (1 - before)
                optimizer.step()
        else:
            skipped_in_a_row += 1
            state["skipped"] += 1
        for optimizer in optimizers:
            optimizer.zero_grad()

        deep = depths.clamp(max=config.backprop_depth).double().mean().item()
        tokens = args.batch_size * config.block_size
        flops = tokens * model.flops_per_token(depths.double().mean().item(), deep, accounting=args.accounting)
        before_time, now = now, time.perf_counter()
        seconds = now - before_time
        state.update(step=step + 1, tokens=state["tokens"] + tokens, flops=state["flops"] + flops,
                     seconds=state["seconds"] + seconds)
        speed = {"tok_per_s": tokens / seconds, "mfu": flops / seconds / peak}
        log("train", loss=loss, grad_norm=norm, lr=args.lr * factor, mean_depth=depths.double().mean().item(), **speed)
        bar.update(100 * (min(1, progress()) - min(1, before)))
        bar.set_postfix_str(f"loss {loss:.3f}, {speed['tok_per_s']:,.0f} tok/s, {state['flops']:.2e} FLOPs, MFU {speed['mfu']:.0%}")
        if skipped_in_a_row == MAX_SKIPPED:
            bar.close()
            raise UserError(f"loss or gradient was not finite {MAX_SKIPPED} steps in a row, at step {step + 1}: "
                            f"try a lower --lr (it is {args.lr})")
        if (step + 1) % args.eval_every == 0 and progress() < 1:
            losses = evaluate(model, val_loader, args.eval_sequences, micro, [config.mean_recurrence], device, rank, world)
            log("eval", val_loss=losses)
            checkpoint()
            if master:
                tqdm.write(f"step {step + 1}, {100 * progress():.0f} %: train loss {loss:.4f}, "
                           f"val loss {losses[config.mean_recurrence]:.4f} at T = {config.mean_recurrence}, "
                           f"{state['tokens'] / state['seconds']:,.0f} tok/s", file=sys.stdout)
            now = time.perf_counter()
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    checkpoint()
    if stop:
        if master:
            print(f"stopped at step {state['step']} and saved; go on with: python train.py --resume --out {out}")
    else:
        recurrence = args.eval_recurrence if config.n_recurrent else [1]
        losses = evaluate(model, val_loader, 8 * args.eval_sequences, micro, recurrence, device, rank, world)
        log("done", val_loss=losses)
        if master:
            print(f"{state['step']} steps, {state['tokens']:,} tokens, {state['flops']:.3e} FLOPs ({args.accounting}), "
                  f"{state['seconds']:.0f} s, {state['skipped']} steps skipped\n\n{table(losses, 'nats per token')}\n")
            prompt = torch.tensor([[tokenizer.eot_token]], device=device)
            generator = torch.Generator(device).manual_seed(args.seed)
            print("a sample (more with: python sample.py --run " + str(out) + "):")
            for piece in decode_stream(tokenizer, model.stream(prompt, 300, temperature=0.7, top_p=0.95, generator=generator)):
                print(piece, end="", flush=True)
            print()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser, args = parse_args()
    try:
        train(args)
    except UserError as error:
        parser.error(str(error))
