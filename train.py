"""Train one model under a budget of steps, tokens or FLOPs.

    python train.py                                        the small default, minutes on a laptop
    python train.py --mean-recurrence 1 --out out/once     the same layer, run once
    python train.py --preset gpt-nano --max-flops 1e13 --out out/plain
    python train.py --resume                               continue an interrupted run
    python train.py --init-from out/default --data data/mine --out out/mine --muon-lr 1e-2
    torchrun --standalone --nproc-per-node=8 train.py --preset parcae-140m --data data/fineweb-edu

It writes a run directory, whose files parts/run_directory.py lists. The recipe is from the paper
(§4.2, appendix E): Muon trains the matrices of the layers, AdamW everything else; the learning rate
has no warm-up, stays constant and then falls linearly to 0. All randomness of a step depends on
(seed, step) alone, so neither resuming a run nor adding ranks changes what a step draws.
"""

import argparse
import contextlib
import math
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import Parcae
from parts.cli import UserError, progress_bar, run_script
from parts.comparable import changed_text
from parts.files import json_text
from parts.loader import EVAL_SEED, EVAL_TOKENS, Loader
from parts.machine import use_threads
from parts.muon import Muon, momentum_at
from parts.ranks import all_sum, asked_to_stop, common_dtype, rank, say, setup_device, world
from parts.reading import fit_weights, read_json
from parts.run_directory import Run, check_free, describe
from parts.settings import DEFAULT_DATA, model_of, parse_args
from parts.tokenizer import begin_token, decode_stream, load_tokenizer

MAX_SKIPPED = 10  # the run ends after this many skipped steps in a row
SCRIPT = "train.py"  # what follows "python" to start this training; scripts in runs/ change it

# ------------------------------------------------------------------------------- setup


@dataclass
class Setup:
    """Hold what training needs."""

    args: argparse.Namespace
    model: Parcae
    loader: Loader  # reads the train split
    val_loader: Loader
    tokenizer: object
    run: Run
    record: dict  # the content of config.json
    micro: int  # sequences in one forward pass of a rank


def setup(args):
    """Check the settings, make missing default data and return a Setup. Raises UserError."""
    micro = args.micro_batch or max(1, args.batch_size // world())
    if args.batch_size % (world() * micro):
        raise UserError(f"--batch-size is {args.batch_size}, must be a multiple of ranks * "
                        f"--micro-batch ({world()} * {micro})")
    check_free(args.out, args.resume or args.overwrite or args.dry_run)
    before = read_json(Path(args.out) / "config.json") if args.resume else {}
    if before.get("script", SCRIPT) != SCRIPT:
        raise UserError(f"{args.out} was trained by python {before['script']}: resume it with that")
    device = setup_device(args)

    # the data and its tokenizer
    if args.data == DEFAULT_DATA and not Path(args.data).exists() and rank() == 0:
        # on stderr, since the output of tools.sweep --print is commands
        made = subprocess.run([sys.executable, Path(__file__).with_name("data.py")], stdout=2)
        if made.returncode:
            sys.exit(2)  # data.py has printed why
    if world() > 1:
        dist.barrier()
    tokenizer = load_tokenizer(args.data)
    begin_token(tokenizer)  # raises if there is none: the sample after training begins with it
    config = model_of(args, tokenizer)
    loader, val_loader = (Loader(args.data, split, config.block_size, tokenizer.n_vocab, seed)
                          for split, seed in (("train", args.seed), ("val", EVAL_SEED)))

    # the model, with new weights or with those of another run
    use_threads(config.n_embd, args.threads)
    torch.manual_seed(args.seed)
    model = Parcae(config).to(device)
    if args.init_from and not args.resume:
        fit_weights(model, Parcae.from_pretrained(args.init_from).state_dict(),
                    f"--init-from {args.init_from} does not fit these flags of the model")
    model.compute_dtype = common_dtype(device, args.dtype)

    # the run directory
    run = Run(args.out, model, make_optimizers(model, args))
    record = {"script": SCRIPT} | describe(args, model, before)
    return Setup(args, model, loader, val_loader, tokenizer, run, record, micro)


def make_optimizers(model, args):
    """Return Muon for the matrices of the layers and AdamW for everything else (appendix E)."""
    matrices = model.matrices()
    taken = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in taken]
    return {"muon": Muon(matrices, weight_decay=args.weight_decay),  # `update` sets the rates
            "adamw": torch.optim.AdamW(others, betas=(0.8, 0.95), eps=1e-10, weight_decay=0,
                                       fused=True)}

# ------------------------------------------------------------------------------- steps


def schedule(progress, cooldown):
    """Return the learning rate's factor: 1, falling to 0 over the last `cooldown` of the budget."""
    return min(1, (1 - progress) / cooldown) if cooldown else 1


def shares_spent(args, state):
    """Return {flag: the share of its budget that is spent} for each budget that is given."""
    budgets = {"--max-steps": (state["step"], args.max_steps),
               "--max-tokens": (state["tokens"], args.max_tokens),
               "--max-flops": (state["flops"], args.max_flops)}
    return {flag: used / limit for flag, (used, limit) in budgets.items() if limit}


def spent(args, state):
    """Return the share of the budget that is spent, 0 to 1; of several budgets, the largest."""
    return min(1, max(shares_spent(args, state).values()))


def draw_depths(model, args, progress, step_seed):
    """Return the loops of each row of a batch, (batch_size,); see --depth-sampling, --loop-from."""
    size, generator = args.batch_size, torch.Generator().manual_seed(step_seed)
    if progress < args.loop_from or not model.config.n_recurrent:
        return torch.ones(size, dtype=torch.int64)
    if args.depth_sampling == "fixed":
        return torch.full((size,), model.config.mean_recurrence)
    if args.depth_sampling == "per-batch":
        return model.sample_depths(1, generator).repeat(size)
    return model.sample_depths(size, generator)


def deal(rows, hands):
    """Deal rows, deepest first, back and forth: 6 rows to 2 hands are (0, 3, 4) and (1, 2, 5)."""
    rounds = rows.view(-1, hands).clone()
    rounds[1::2] = rounds[1::2].flip(1)  # so that each hand gets about equal work
    return rounds.T


def backward(model, loader, depths, first_sample, micro, step_seed):
    """Accumulate the gradient of this rank's rows of a batch. Return the mean loss of the whole
    batch in nats per token, a tensor ()."""
    # deal the rows to the ranks; in each step a different rank gets the deepest row
    rows = depths.argsort(descending=True, stable=True)
    mine = deal(rows, world())[(rank() + step_seed) % world()]
    # a forward pass takes as many steps as its deepest row has loops: `mine` is sorted, so that
    # the rows of a part have similar depths
    parts = mine.split(micro)
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for n, part in enumerate(parts, start=1):
        # on mps, wait for the copy: its source may be freed before the copy is done
        idx, targets = (t.to(device, non_blocking=device.type == "cuda")
                        for t in loader.batch(first_sample + part))           # (micro, S) each
        # every row, on every rank, starts its loop from the same noise; if you add dropout, its
        # draws repeat from part to part
        torch.manual_seed(step_seed)
        # ranks average their gradients once, after the last part
        wait = world() > 1 and n < len(parts)
        with model.no_sync() if wait else contextlib.nullcontext():
            loss = model(idx, targets, depths=depths[part])[1] / len(parts)
            loss.backward()
        total += loss.detach() / world()
    return all_sum(total)


def update(model, optimizers, args, loss, progress, step):
    """Clip the gradient and update the weights, at the learning rates for `progress`, the share of
    the budget that is spent; skip the update if loss or gradient is not finite. Return (loss,
    gradient norm before clipping, whether both are finite)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    loss, norm = torch.stack([loss, norm]).tolist()
    finite = math.isfinite(loss + norm)
    factor = schedule(progress, args.cooldown)
    for group in optimizers["muon"].param_groups:
        group["lr"] = args.muon_lr * factor
        group["weight_decay"] = args.weight_decay * (1 - progress)
        group["momentum"] = momentum_at(step)
    for group in optimizers["adamw"].param_groups:
        group["lr"] = (args.adamw_lr or args.muon_lr) * factor
    if finite:
        for optimizer in optimizers.values():
            optimizer.step()
    model.zero_grad()
    return loss, norm, finite


def add_step(state, args, model, depths, seconds):
    """Add a step to the counts in `state`. Return its tokens and, for MFU, its exact FLOPs."""
    tokens = args.batch_size * model.config.block_size
    # FLOPs are linear in the number of loops, so the mean depth gives the mean FLOPs of a row
    loops = depths.double().mean().item()
    with_gradient = depths.clamp(max=model.config.backprop_depth).double().mean().item()
    counted, exact = (tokens * model.flops_per_token(loops, with_gradient, accounting=accounting)
                      for accounting in (args.accounting, "exact"))
    state["step"] += 1
    state["samples"] += args.batch_size
    state["tokens"] += tokens
    state["flops"] += counted
    state["seconds"] += seconds
    return tokens, exact


# ------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, loader, sequences, batch_size, recurrence):
    """Return what the log stores: {"val_loss": {loops: nats per token}} and, for a looped model,
    "state_rms": {loops: root mean square of the state} and "spectral_radius": a number.

    Each rank reads a share of the sequences. A plain transformer is evaluated at 1 loop only."""
    device = model.wte.weight.device
    looped = model.config.n_recurrent > 0
    recurrence = recurrence if looped else [1]
    batch_size = max(1, min(batch_size, EVAL_TOKENS // model.config.block_size))
    sequences = max(world(), min(sequences, len(loader)))  # at least one for each rank
    mine = range(rank(), sequences, world())
    sums = defaultdict(float)  # {(metric, loops): a tensor (), summed over sequences}
    model.eval()
    for start in progress_bar(range(0, len(mine), batch_size), desc="evaluating", delay=1,
                              disable=rank() > 0):
        idx, targets = (t.to(device) for t in loader.batch(mine[start:start + batch_size]))
        for loops, (h, inputs) in enumerate(model.states(idx, max(recurrence)), start=1):
            if loops in recurrence:
                # to add a metric, add a line that sums it over sequences
                logits = model.head(model.readout(h, inputs))       # (B, S, vocab_size)
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
                sums["val_loss", loops] += loss * len(idx)  # nats per token
                # the mean square: its root is taken after averaging over sequences
                sums["state_ms", loops] += h.float().square().mean() * len(idx)
    model.train()

    means = all_sum(torch.stack([*sums.values()]) / sequences)
    values = defaultdict(dict)
    for (metric, loops), mean in zip(sums, means.tolist()):
        values[metric][loops] = mean
    squares = values.pop("state_ms")
    if looped:
        values["state_rms"] = {loops: math.sqrt(square) for loops, square in squares.items()}
        values["spectral_radius"] = model.injection.spectral_radius().item()
    return dict(values)


def still_predicts(s):
    """Return whether the updated weights have a finite val loss, on one sequence for each rank: the
    train loss is from before the update, and broken weights must not replace a good checkpoint."""
    values = evaluate(s.model, s.val_loader, 1, 1, [s.model.config.mean_recurrence])
    return all(map(math.isfinite, values["val_loss"].values()))


def save_and_evaluate(s, train_loss):
    """Write a checkpoint during training, and log and print the val loss at mean_recurrence."""
    state, mean = s.run.state, s.model.config.mean_recurrence
    s.run.save()  # first, as the evaluation may need more memory than there is
    values = evaluate(s.model, s.val_loader, s.args.eval_sequences, s.micro, [mean])
    s.run.log("eval", **values)
    if rank() == 0:
        [(loops, val_loss)] = values["val_loss"].items()  # evaluated at one T
        rate = state["tokens"] / state["seconds"]
        tqdm.write(f"step {state['step']}, {spent(s.args, state):.0%}: train loss "
                   f"{train_loss:.4f}, val loss {val_loss:.4f} at T = {loops}, {rate:,.0f} tok/s",
                   file=sys.stdout)

# ------------------------------------------------------------------------------- the run


def start_or_resume(s):
    """Start the run, or resume it. Return False, with a message, if it is finished already."""
    args, run = s.args, s.run
    if not args.resume:
        run.start(s.record, s.tokenizer, args.overwrite)
        if args.init_from and (difference := changed_text(args.init_from, args.data)):
            say(difference)
        return True
    run.load()
    if spent(args, run.state) == 1 and run.lines and run.lines[-1]["kind"] == "done":
        limits = [flag for flag, share in shares_spent(args, run.state).items() if share >= 1]
        say(f"{args.out} is finished: to continue it, give a larger {' and '.join(limits)}")
        return False
    run.resume(s.record)
    return True


@contextlib.contextmanager
def caught_signals():
    """Yield a list. While the block runs, SIGINT and SIGTERM are added to it and end nothing."""
    received = []
    before = {number: signal.signal(number, lambda came, frame: received.append(came))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(s):
    """Train until the budget is spent. Return False if a signal stops it. Raises UserError."""
    args, model, run = s.args, s.model, s.run
    state, device = run.state, model.wte.weight.device
    if args.compile:
        model.compile_layers()
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world() > 1 else model
    bar = progress_bar(total=100, initial=100 * spent(args, state), disable=rank() > 0,
                       bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", leave=True)
    skipped = 0  # steps in a row
    stop = False  # the same on all ranks: if one stopped alone, the others would wait for it

    with caught_signals() as received:
        while spent(args, state) < 1 and not stop and skipped < MAX_SKIPPED:
            start, progress = time.perf_counter(), spent(args, state)
            step_seed = args.seed * 1_000_003 + state["step"]  # unique up to a million steps

            # 1. how often each sequence loops
            depths = draw_depths(model, args, progress, step_seed)            # (batch_size,)
            # 2. forward and backward
            loss = backward(parallel, s.loader, depths, state["samples"], s.micro, step_seed)
            # 3. update the weights, if loss and gradient are finite
            loss, norm, finite = update(model, run.optimizers, args, loss, progress,
                                        state["step"])
            skipped = 0 if finite else skipped + 1
            state["skipped"] += not finite
            # 4. count tokens and FLOPs, log
            seconds = time.perf_counter() - start
            tokens, flops = add_step(state, args, model, depths, seconds)
            mfu = flops / seconds / s.record["peak_flops"]
            run.log("train", loss=loss, grad_norm=norm,
                    lr=args.muon_lr * schedule(progress, args.cooldown),
                    mean_depth=depths.double().mean().item(), tok_per_s=tokens / seconds, mfu=mfu)
            bar.update(100 * (spent(args, state) - progress))
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tok/s, "
                                f"{state['flops']:.2e} FLOPs, MFU {mfu:.0%}")
            # 5. every --eval-every steps, save and evaluate if the val loss is finite
            stop = asked_to_stop(received, device)
            due = state["step"] % args.eval_every == 0 and spent(args, state) < 1
            if due and still_predicts(s):
                save_and_evaluate(s, loss)
        bar.close()
        works = skipped < MAX_SKIPPED and still_predicts(s)
        if works:
            run.save()  # in this block, where a second signal does not interrupt it

    if not works and not stop:
        what = (f"loss or gradient was not finite {skipped} steps in a row" if skipped
                else "the val loss is not finite")
        raise UserError(f"{what}, at step {state['step']}: try a lower --muon-lr (it is "
                        f"{args.muon_lr}), or undo your other changes; {run.last_checkpoint()}")
    return not stop

# ------------------------------------------------------------------------------- what is printed


def introduce(s):
    """Print the model, the data, the machine, and a loss to compare the losses with."""
    config, record = s.model.config, s.record
    loop = f"a loop of {config.n_recurrent}" if config.n_recurrent else "no loop"
    if config.n_recurrent and config.mean_recurrence > 1:
        loop += (f" (runs {config.mean_recurrence} times on average, {s.args.depth_sampling}; "
                 f"the last {config.backprop_depth} with gradient)")
    tokens = np.asarray(s.loader.shards[0][::1 + len(s.loader.shards[0]) // 2_000_000])
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    print(f"{s.args.out}: {record['parameters']:,} parameters, {config.n_embd} channels\n"
          f"  layers   {config.n_prelude}, then {loop}, then {config.n_coda}\n"
          f"  data     {s.args.data}: {len(s.loader) * config.block_size:,} train tokens, read in "
          f"windows of {config.block_size} tokens\n"
          f"  machine  {record['ranks']} x {record['device']}, {record['threads']} thread(s), "
          f"{record['dtype'].removeprefix('torch.')}; the peak for MFU is "
          f"{record['peak_flops'] / 1e9:,.0f} GFLOP/s\n"
          f"  loss     in nats per token; it is {-(shares * np.log(shares)).sum():.2f} for a model "
          "that knows only how frequent each token is")


def report(s):
    """Evaluate on more sequences; print the losses, a sample and commands to try next."""
    args, state, config = s.args, s.run.state, s.model.config
    recurrence = sorted({*args.eval_recurrence, config.mean_recurrence})
    values = evaluate(s.model, s.val_loader, 8 * args.eval_sequences, s.micro, recurrence)
    s.run.log("done", **values)
    if rank() > 0:
        return
    print(f"{state['step']} steps, {state['tokens']:,} tokens, {state['flops']:.3e} FLOPs "
          f"({args.accounting}), {state['seconds']:.0f} s, {state['skipped']} steps skipped\n\n"
          "recurrence T   val loss (nats per token)")
    for loops, loss in values["val_loss"].items():
        print(f"{loops:12d}   {loss:.4f}")
    out, mean = shlex.quote(args.out), config.mean_recurrence
    print("\na sample:")
    for text in decode_stream(s.tokenizer, sample(s)):
        print(text, end="", flush=True)

    looped = config.n_recurrent > 0 and mean > 1
    loops = f" --recurrence 1 {mean} {2 * mean}" if looped else ""
    print(f"\n{what_it_says(config, values['val_loss'])}\nnext:")
    if s.record["class"] == "Parcae":  # sample.py refuses any other
        print(f'  python sample.py --run {out} --prompt "def "{loops}')
    print(f"  python -m tools.curves {out}     draw the loss curve (needs matplotlib)")
    if looped and not args.resume:
        print("  " + run_once(sys.argv[1:], args.out) + "\n"
              "                train the same layers to run once: is the loop worth its FLOPs?")


def run_once(words, out):
    """Return a command that trains the same layers to run once: that of this run, whose flags are
    `words`, with flags added. They come last, since the last value of a flag counts."""
    return f"python {SCRIPT} " + shlex.join([*words, "--mean-recurrence", "1", "--out",
                                             f"{out}-once"])


def what_it_says(config, losses):
    """Return a sentence that compares the losses {loops: nats} at 1 and mean_recurrence, or ""."""
    mean = config.mean_recurrence
    if mean == 1 or not {1, mean} <= losses.keys():
        return ""
    gain = losses[1] - losses[mean]
    return (f"\nThe same weights, run {mean} times, predict {abs(gain):.3f} nats a token "
            f"{'better' if gain > 0 else 'worse'} than run once.\n")


@torch.no_grad()
def sample(s):
    """Yield tokens (1, 1) of a new text, at the mean recurrence and temperature 0.7."""
    model, device, loops = s.model.eval(), s.model.wte.weight.device, s.model.config.mean_recurrence
    generator = torch.Generator(device).manual_seed(s.args.seed)
    length = min(300, model.config.block_size - 1)
    cache = model.new_cache(1, length, loops)
    token = torch.tensor([[begin_token(s.tokenizer)]], device=device)
    for _ in range(length):
        logits, _, _ = model.advance(token, cache, 0, loops)                  # (1, 1, vocab_size)
        token = torch.multinomial((logits[:, -1] / 0.7).softmax(-1), 1, generator=generator)
        yield token


def train_and_report(s):
    """Train, unless the run is finished already, and print what came out."""
    if not start_or_resume(s):
        return
    if rank() == 0:
        introduce(s)
    if train(s):
        report(s)
    elif s.run.saved is None:
        say("stopped, and nothing was saved")
    else:
        say(f"stopped at step {s.run.state['step']}, saved at {s.run.saved}; continue with: "
            f"python {SCRIPT} --resume --out {shlex.quote(s.args.out)}")


def main():
    args = parse_args(__doc__)
    s = setup(args)
    if args.dry_run:
        say(json_text(s.record, indent=1))
    else:
        with s.run.held():
            train_and_report(s)
    if world() > 1:
        dist.barrier()  # ranks leave together: gloo may abort a rank whose partner has left,
        time.sleep(0.5)  # even while that rank is still leaving the barrier
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
