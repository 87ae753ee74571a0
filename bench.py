"""What looping costs and saves, in memory and in speed.

    python bench.py                        all tables, minutes on a laptop
    python bench.py --only decode --preset parcae-140m --context 512 --recurrence 8

It compares the looped model, at several numbers of loops T, with three plain transformers of the
same width: with equally many parameters, with about twice as many (looping is said to match its
quality), and with the same unrolled depth. Counting the memory of a GPU needs no GPU.
"""

import statistics
import time
from collections import namedtuple
from dataclasses import replace
from functools import partial

import torch

from model import PRESETS, Parcae, ParcaeConfig, UserError, count_parameters
from parts import machine
from parts.cli import COUNT, LOOPS, Parser, check_idle, progress_bar, run_script
from parts.footprint import counting
from parts.muon import Muon
from parts.quantize import activations, prepare_weights
from parts.recording import speed_up

LOOPED = [name for name in PRESETS if name.startswith("parcae")]
STEPS = 16  # tokens generated in each measurement of decoding

# ------------------------------------------------------------------------------- the models

Case = namedtuple("Case", "name config loops")  # one row of a table
TWICE = "plain, twice the parameters"


def parameters(config):
    """Return the number of parameters of a model without allocating it."""
    return count_parameters(build(config, torch.device("meta")))


def layers_run(config, loops):
    """Return the number of layers that a token passes through, loops unrolled."""
    return config.n_prelude + loops * config.n_recurrent + config.n_coda


def cases_of(config, recurrence):
    """Return the Cases: the looped model for each number of loops, and three plain ones."""
    cases = [Case("looped", replace(config, mean_recurrence=loops, backprop_depth=None), loops)
             for loops in recurrence]
    n, size = config.n_layer, parameters(config)

    def plain(depth):
        return replace(config, n_prelude=depth, n_recurrent=0, n_coda=0)
    twice = min(range(n, 4 * n + 1), key=lambda depth: abs(parameters(plain(depth)) - 2 * size))
    T = config.mean_recurrence
    depths = {"plain, same parameters": n, TWICE: twice,
              f"plain, depth of T = {T}": layers_run(config, T)}
    return cases + [Case(name, plain(depth), 1) for name, depth in depths.items()]


def build(config, device, dtype=None):
    """Return a model with random weights. dtype: of the activations, see Parcae."""
    torch.manual_seed(0)
    with torch.device("cpu" if device.type == "mps" else device):  # mps has no orthogonal_
        model = Parcae(config)
    model.compute_dtype = dtype
    return model.to(device)

# ------------------------------------------------------------------------------- memory


def kv_bytes(config, context, loops, itemsize=2):
    """Return the bytes of one sequence's KV cache: a key and value per token, layer and loop."""
    return 2 * layers_run(config, loops) * config.n_embd * context * itemsize


def two_steps(case, args, device, now):
    """Train a model for two steps. Return the bytes that the second keeps for its backward pass.
    now() returns the bytes in use."""
    model = build(case.config, device, args.dtype)
    idx = torch.zeros(args.batch, args.context, dtype=torch.int64, device=device)
    muon = set(model.matrices())
    others = set(model.parameters()) - muon
    optimizers = [Muon(muon, products=torch.bfloat16),  # as on a GPU, also if it is only counted
                  torch.optim.AdamW(others, fused=device.type != "meta")]
    for _ in range(2):  # in the second, gradients and the optimisers' state are there
        before = now()
        loss = model(idx, idx, recurrence=case.loops)[1]
        kept = now() - before
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return kept


def memory_of(case, args):
    """Return a row of the memory table, in MB. Training is counted and, if on a GPU, measured."""
    config = case.config
    with counting() as held:
        kept = two_steps(case, args, torch.device("meta"), lambda: held.now)
    row = {"model": case.name, "T": case.loops, "parameters": parameters(config),
           "activations": kept / 1e6, "most held": held.most / 1e6}
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        two_steps(case, args, args.device, torch.cuda.memory_allocated)
        row["measured"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return row | {"weights": 2 * row["parameters"] / 1e6,
                  "cache": kv_bytes(config, args.context, case.loops) / 1e6,
                  "shared cache": kv_bytes(config, args.context, 1) / 1e6}

# ------------------------------------------------------------------------------- speed


def alternate(runs, rounds, device, what):
    """Return a list of seconds per run, one for each round. Runs take turns, after a warm-up."""
    seconds = [[] for _ in runs]
    for i in progress_bar(range(rounds + 1), desc=what, unit="round"):
        for run, times in zip(runs, seconds):
            start = time.perf_counter()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if i > 0:
                times.append(time.perf_counter() - start)
    return seconds


def bandwidth(device):
    """Return the bytes/s read from memory: the best of five sums over 256 MiB (1 GiB with CUDA)."""
    x = torch.ones(1 << (28 if device.type == "cuda" else 26), device=device)
    [seconds] = alternate([lambda: x.sum().item()], 5, device, "memory bandwidth")
    return x.nbytes / min(seconds)


def speeds(cases, steps, tokens, args, what):
    """Return rows of tokens/s: median, min, max. steps: one per case, of `tokens` tokens each."""
    rows = []
    for case, seconds in zip(cases, alternate(steps, args.rounds, args.device, what)):
        rates = sorted(tokens / s for s in seconds)
        rows.append({"model": case.name, "T": case.loops, "tokens/s": statistics.median(rates),
                     "min": rates[0], "max": rates[-1]})
    return rows


def training_of(case, args):
    """Return (a function that runs a training step, the FLOPs per token that it needs)."""
    model = build(case.config, args.device, args.dtype)
    if args.compile:
        model.compile_layers()
    idx = torch.randint(case.config.vocab_size, (args.batch, args.context), device=args.device)
    depths = model.sample_depths(args.batch, torch.Generator().manual_seed(0))
    with_gradient = depths.clamp(max=case.config.backprop_depth)
    flops = model.flops_per_token(depths.double().mean().item(),
                                  with_gradient.double().mean().item(), args.context)

    def step():
        model(idx, idx, depths=depths)[1].backward()
        model.zero_grad()
    return step, flops


def train_speed(cases, args):
    """Measure tokens/s of forward and backward passes, print the table and return its rows."""
    peak = machine.matmul_peak(args.device, args.dtype)
    steps, flops = zip(*(training_of(case, args) for case in cases))
    rows = speeds(cases, steps, args.batch * args.context, args, "training")
    for row, needed in zip(rows, flops):
        row["share of peak"] = row["tokens/s"] * needed / peak
    show(f"Training, {args.dtype}; share of peak: FLOPs per second that the model needs, relative "
         f"to a matmul peak of {peak / 1e9:,.0f} GFLOP/s", rows)
    return rows


def generation_of(case, args):
    """Return (a function that generates STEPS tokens after a full context, FLOPs per token, bytes
    read per token if the weights that loop are read once per loop)."""
    config, loops = replace(case.config, block_size=args.context + STEPS), case.loops
    model = prepare_weights(build(config, args.device).eval(), args.device, args.dtype)
    speed_up(model, args.compile, not args.eager)
    cache = model.new_cache(1, config.block_size, loops)
    token = torch.zeros(1, 1, dtype=torch.int64, device=args.device)

    def decode():
        cache.pos = args.context
        for _ in range(STEPS):
            model.advance(token, cache, 0, loops)
    flops = model.flops_per_token(loops, backprop_depth=0, context=args.context)
    once, core = model.matmul_params()
    weights = (once + loops * core) * args.dtype.itemsize
    return decode, flops, weights + kv_bytes(config, args.context, loops, model.dtype.itemsize)


@torch.no_grad()
def decode_speed(cases, args):
    """Measure tokens/s of decoding one sequence, print them with limits and return the rows."""
    peak = max(machine.matmul_peak(args.device, dtype)
               for dtype in {torch.float32, activations(args.dtype)})
    bytes_per_s = bandwidth(args.device)
    steps, flops, read = zip(*(generation_of(case, args) for case in cases))
    rows = speeds(cases, steps, STEPS, args, "decode")
    for row, needed, n_bytes in zip(rows, flops, read):
        row["compute limit"], row["memory limit"] = peak / needed, bytes_per_s / n_bytes
        row["share of limit"] = row["tokens/s"] / min(row["compute limit"], row["memory limit"])
    show(f"Generation, one sequence at context {args.context}, {args.dtype}; limits by matmuls "
         f"({peak / 1e9:,.0f} GFLOP/s) and by reading memory ({bytes_per_s / 1e9:,.1f} GB/s)", rows)
    return rows

# ------------------------------------------------------------------------------- tables


def show(title, rows):
    """Print rows (dicts with the same keys) as a table."""
    table = [list(rows[0]), *([cell(*item) for item in row.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for name, *others in table:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join([name.ljust(widths[0]), *cells]))


def cell(name, value):
    """Return a value of a table as text."""
    if isinstance(value, float):
        return f"{value:.0%}" if name.startswith("share of") else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else value


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--preset", choices=LOOPED, default="parcae-micro", metavar="NAME",
        help=f"looped model, one of {', '.join(LOOPED)} (default: %(default)s)")
    add("--context", type=COUNT, metavar="N",
        help="tokens per sequence (default: the preset's block_size)")
    add("--batch", type=COUNT, default=32, metavar="N",
        help="sequences per training step (default: %(default)s)")
    add("--recurrence", type=LOOPS, nargs="+", default=[1, 2, 4, 8, 16], metavar="T",
        help="numbers of loops to measure (default: 1 2 4 8 16)")
    add("--only", choices=("memory", "train", "decode"),
        help="measure only this table (default: all)")
    add("--rounds", type=COUNT, default=5, metavar="N",
        help="how often to measure each speed, in turns (default: %(default)s)")
    add("--compile", action="store_true",
        help="torch.compile the layers; for decoding on a CPU, or with --eager, the whole step "
        "(takes minutes)")
    add("--eager", action="store_true",
        help="decode on a GPU by launching each operation, instead of replaying a CUDA graph")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32", "int8"), default="auto",
        help="type of the activations, or int8 for the weights in decoding (default: auto)")
    args = parser.parse_args()
    if args.dtype == "int8" and args.only != "decode":
        parser.error("--dtype int8 is for generation: give --only decode")
    idle = {"memory": ("rounds", "compile", "eager"), "train": ("eager",), "decode": ("batch",)}
    check_idle(parser, args, idle.get(args.only, ()),
               f"--only {args.only} measures nothing that they change")
    return args


def bench_memory(config, cases, args):
    """Print the memory of the cases, and of 64 loops with as few gradients as in the preset."""
    many = Case(f"looped, mu_bwd {config.backprop_depth}", replace(config, mean_recurrence=64), 64)
    rows = [memory_of(case, args) for case in progress_bar([*cases, many], desc="memory")]
    show(f"Memory in MB. Training, {args.batch} x {args.context} tokens, {args.dtype}: activations "
         "and the most\nthat a GPU holds. One sequence, bfloat16: weights and caches", rows)


def main():
    args = parse_args()
    config = ParcaeConfig(**PRESETS[args.preset])
    context = args.context = args.context or config.block_size
    config = replace(config, block_size=max(context, config.block_size))
    device = args.device = machine.pick_device(args.device, args.compile)
    machine.use_threads(config.n_embd)
    if args.eager and device.type != "cuda":
        raise UserError(f"--eager is for a GPU: there are no CUDA graphs on {device}")
    print(f"{args.preset} at context {context}, batch {args.batch}, {args.rounds} rounds, on "
          f"{machine.machine_name(device)}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}")

    cases, asked = cases_of(config, args.recurrence), args.dtype
    # each table's function and automatic dtype; CPUs multiply bfloat16 vectors slowly
    tables = {"memory": (partial(bench_memory, config), "bfloat16"), "train": (train_speed, "auto"),
              "decode": (decode_speed, "float32" if device.type == "cpu" else "auto")}
    machine.keep_freed_memory()
    for name in [args.only] if args.only else tables:
        measure, automatic = tables[name]
        args.dtype = machine.pick_dtype(device, automatic if asked == "auto" else asked)
        measure(cases, args)


if __name__ == "__main__":
    run_script(main)
