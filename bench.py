"""What looping costs and saves, in memory and in speed.

    python bench.py                        all tables, minutes on a laptop
    python bench.py --only decode --preset parcae-140m --context 512 --recurrence 8

Compares, at one width, the looped model at several numbers of loops T with three plain
transformers: one of the same parameters, one of about twice the parameters (whose quality the
looped one is said to match), and one of the same unrolled depth. Memory in inference is counted for
bfloat16 weights and caches. Writes bench-<device>-<preset>.json (-<preset>-decode.json with --only
decode) and, with matplotlib, memory-<preset>.png; what was measured with other settings is not
replaced.
"""

import statistics
import time
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from model import PRESETS, KVCache, Parcae, ParcaeConfig, count_parameters
from parts import figures, machine
from parts.cli import (
    COUNT,
    LOOPS,
    Parser,
    UserError,
    check_idle,
    new_directory,
    progress_bar,
    run_script,
)
from parts.files import write_json
from parts.muon import Muon
from parts.quantize import activations, prepare_weights
from parts.reading import read_json
from parts.recording import speed_up

LOOPED = [name for name in PRESETS if name.startswith("parcae")]
STEPS = 16  # tokens that a measurement of decoding makes

# ------------------------------------------------------------------------------- the models

Case = namedtuple("Case", "name config loops")  # what a row of a table is about
TWICE = "plain, twice the parameters"


def parameters(config):
    """Return the number of parameters of a model that is never built."""
    with torch.device("meta"):
        return count_parameters(Parcae(config))


def plain(config, n_layer):
    """Return the configuration of the plain transformer of the same width with n_layer layers."""
    return replace(config, n_prelude=n_layer, n_recurrent=0, n_coda=0)


def layers_run(config, loops):
    """Return the layers that a token goes through."""
    return config.n_prelude + loops * config.n_recurrent + config.n_coda


def cases_of(config, recurrence):
    """Return the cases to compare: the looped model, trained for each number of loops, and the
    three plain ones."""
    n, target = config.n_layer, 2 * parameters(config)
    longer = [plain(config, layers) for layers in range(n, 4 * n + 1)]
    double = min(longer, key=lambda candidate: abs(parameters(candidate) - target))
    unrolled = plain(config, layers_run(config, config.mean_recurrence))
    looped = [Case("looped", replace(config, mean_recurrence=loops, backprop_depth=None), loops)
              for loops in recurrence]
    return [*looped, Case("plain, same parameters", plain(config, n), 1), Case(TWICE, double, 1),
            Case("plain, same depth", unrolled, 1)]


def build(config, device, dtype=None):
    """Return a model with random weights; dtype: of the activations, see Parcae."""
    torch.manual_seed(0)
    with torch.device("cuda" if device.type == "cuda" else "cpu"):  # mps makes no orthogonal matrix
        model = Parcae(config)
    model.compute_dtype = dtype
    return model.to(device)

# ------------------------------------------------------------------------------- memory


def kv_bytes(config, context, loops, itemsize=2):
    """Return the bytes of one sequence's cache: a key and a value per token, layer and loop."""
    return 2 * layers_run(config, loops) * config.n_embd * context * itemsize


def optimizer_bytes(model):
    """Return the bytes of the float32 state: Muon keeps one number for each weight of a layer's
    matrices and one for each row (or column, if there are more); AdamW keeps two for any other."""
    muon = sum(p.numel() for p in model.matrices())
    longer = sum(max(p.shape) for p in model.matrices())
    return 4 * (muon + longer) + 8 * (count_parameters(model) - muon)


def optimizer_state_bytes(model):
    """Return the bytes that Muon and AdamW hold after a step, measured."""
    muon = set(model.matrices())
    others = set(model.parameters()) - muon
    held = 0
    for optimizer in (Muon(muon), torch.optim.AdamW(others, fused=True)):
        optimizer.step()
        for state in optimizer.state.values():
            held += sum(t.nbytes for t in state.values() if torch.is_tensor(t) and t.ndim)
    return held


def saved_for_backward(model, forward):
    """Return the bytes that forward() keeps for the backward pass, without the model's own.

    Several saved tensors may be views of one storage, which counts once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that keeps its own graph is never freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()  # what it returns lives until here, so that no storage is used twice
    return sum(sizes.values())


def peak_bytes(step):
    """Return the most GPU memory that step() held beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_of(case, args):
    """Return a row of predicted and measured bytes."""
    config, loops = case.config, case.loops
    model = build(config, args.device, args.dtype).train()
    idx = torch.randint(config.vocab_size, (args.batch, args.context), device=args.device)

    def loss():
        return model(idx, idx, recurrence=loops)[1]

    loss().backward()  # gradients are there
    row = {"model": case.name, "T": loops, "layers run": layers_run(config, loops),
           "parameters": count_parameters(model),
           "activations": {"saved": saved_for_backward(model, loss)}}
    if args.device.type == "cuda":
        row["activations"]["peak"] = peak_bytes(lambda: loss().backward())
    row["optimizer"] = {"predicted": optimizer_bytes(model),
                        "measured": optimizer_state_bytes(model)}

    model = model.to(torch.bfloat16)  # from here on inference
    row["weights"] = {"predicted": 2 * parameters(config),
                      "measured": sum(p.nbytes for p in model.parameters())}
    for name, kind, pairs in (("kv_cache", "per-loop", loops), ("kv_cache_shared", "shared", 1)):
        cache = KVCache(config, 1, args.context, loops, args.device, torch.bfloat16, kind)
        row[name] = {"predicted": kv_bytes(config, args.context, pairs), "measured": cache.nbytes}
    return row


def break_even(config, double):
    """Return the tokens in all caches (batch x context) at which the looped model in inference
    holds as much memory as `double`, of twice the parameters; None where its cache is smaller."""
    saved = 2 * (parameters(double) - parameters(config))
    cost = kv_bytes(config, 1, config.mean_recurrence) - kv_bytes(double, 1, 1)
    return saved / cost if cost > 0 else None


def draw(path, config, double, even):
    """Draw inference memory against the tokens in the cache; even: see break_even."""
    loops, middle = config.mean_recurrence, even or 1e5
    tokens = np.geomspace(middle / 100, 100 * middle, 81)
    curves = []
    for label, c, cached, style in (
            (f"looped, T = {loops}", config, loops, "k-"),
            (f"looped, T = {loops}, shared cache", config, 1, "k:"),
            (f"plain, twice the parameters ({double.n_layer} layers)", double, 1, "k--")):
        gigabytes = (2 * parameters(c) + tokens * kv_bytes(c, 1, cached)) / 1e9
        curves.append((label, tokens, gigabytes, style))
    figures.memory(path, curves, even)

# ------------------------------------------------------------------------------- speed


def alternate(runs, rounds, device, what):
    """Return the seconds of each run, {name: [one a round]}: everything runs once to warm up, then
    all in turns."""
    seconds = {name: [] for name in runs}
    for i in progress_bar(range(rounds + 1), desc=what, unit="round"):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bandwidth(device, size=1 << 28):
    """Return the bytes read from memory per second: the best of a few sums over an array that does
    not fit a cache."""
    x = torch.ones(size // 4, device=device)
    seconds = alternate({"sum": lambda: x.sum().item()}, 5, device, "memory bandwidth")
    return size / min(seconds["sum"])


def speed(case, seconds, tokens):
    """Return a row: the median, least and most tokens/s."""
    rates = sorted(tokens / s for s in seconds)
    return {"model": case.name, "T": case.loops, "tokens/s": statistics.median(rates),
            "min": rates[0], "max": rates[-1]}


def training_of(case, args):
    """Return a training step, a function, and the FLOPs per token that it needs."""
    model = build(case.config, args.device, args.dtype).train()
    if args.compile:
        model.compile_layers()
    shape = args.batch, args.context
    idx = torch.randint(case.config.vocab_size, shape, device=args.device)
    depths = model.sample_depths(args.batch, torch.Generator().manual_seed(0))
    with_gradient = depths.clamp(max=case.config.backprop_depth)
    flops = model.flops_per_token(depths.double().mean().item(),
                                  with_gradient.double().mean().item(), args.context)

    def step():
        model(idx, idx, depths=depths)[1].backward()
        model.zero_grad()
    return step, flops


def train_speed(cases, args):
    """Measure tokens/s of forward and backward, and their share of the matmul peak by the FLOPs
    that are needed."""
    peak = machine.matmul_peak(args.device, args.dtype)
    steps, flops = zip(*(training_of(case, args) for case in cases))
    seconds = alternate(dict(enumerate(steps)), args.rounds, args.device, "training")
    peak = max(peak, machine.matmul_peak(args.device, args.dtype))
    rows = [speed(case, seconds[i], args.batch * args.context) for i, case in enumerate(cases)]
    for row, needed in zip(rows, flops):
        row["share of peak"] = row["tokens/s"] * needed / peak
    return {"dtype": str(args.dtype), "matmul_peak": peak, "rows": rows}


def generation_of(case, args):
    """Return two functions, one that reads a whole context and one that makes STEPS tokens more,
    and what a token needs: FLOPs, and bytes read if every weight is read once a loop."""
    config, loops = replace(case.config, block_size=args.context + STEPS), case.loops
    model = prepare_weights(build(config, args.device).eval(), args.device, args.dtype)
    speed_up(model, args.compile, not args.eager)
    cache = model.new_cache(1, config.block_size, loops)
    idx = torch.randint(config.vocab_size, (1, args.context), device=args.device)

    def prefill():
        cache.pos = 0
        model.hidden(idx, loops, cache)

    def decode():
        cache.pos = args.context
        for _ in range(STEPS):
            model.advance(idx[:, :1], cache, 0, loops)
    flops = model.flops_per_token(loops, backprop_depth=0, context=args.context)
    once, core = model.matmul_params()
    weights = (once + loops * core) * args.dtype.itemsize
    read = weights + kv_bytes(config, args.context, loops, model.dtype.itemsize)
    return prefill, decode, flops, read


@torch.no_grad()
def decode_speed(cases, args):
    """Measure tokens/s of prefill and of decoding one sequence, beside the limits that the matmul
    peak and the bandwidth set."""
    peak = machine.matmul_peak(args.device, activations(args.dtype))
    bytes_per_s = bandwidth(args.device)
    fills, steps, flops, read = zip(*(generation_of(case, args) for case in cases))
    filled = alternate(dict(enumerate(fills)), args.rounds, args.device, "prefill")
    decoded = alternate(dict(enumerate(steps)), args.rounds, args.device, "decode")
    rows = []
    for i, case in enumerate(cases):
        row = speed(case, decoded[i], STEPS)
        row["compute limit"] = peak / flops[i]
        row["memory limit"] = bytes_per_s / read[i]
        row["prefill tokens/s"] = args.context / statistics.median(filled[i])
        limit = min(row["compute limit"], row["memory limit"])
        row["share of limit"] = row["tokens/s"] / limit
        rows.append(row)
    return {"dtype": str(args.dtype), "matmul_peak": peak, "bandwidth": bytes_per_s, "rows": rows}

# ------------------------------------------------------------------------------- what is shown

# The columns of each table: {heading: what str.format makes of a row}
LABEL = {"model": "{model}", "T": "{T}"}
RANGE = {"(range)": "({min:,.1f} to {max:,.1f})"}
MEMORY = LABEL | {"parameters": "{parameters:,}", "weights": "{weights}",
                  "optimiser": "{optimizer}", "KV cache, a sequence": "{kv_cache}",
                  "shared": "{kv_cache_shared}", "activations": "{saved}"}
ON_GPU = {"peak of a step": "{peak}"}
TRAIN = LABEL | {"tokens/s": "{tokens/s:,.1f}"} | RANGE | {"share": "{share of peak:.0%}"}
DECODE = LABEL | {"prefill tokens/s": "{prefill tokens/s:,.1f}",
                  "decode tokens/s": "{tokens/s:,.1f}"} | RANGE
DECODE |= {"compute limit": "{compute limit:,.1f}", "memory limit": "{memory limit:,.1f}",
           "share": "{share of limit:.0%}"}


def show(title, rows, columns):
    """Print a table; columns: as above."""
    table = [list(columns), *([cell.format_map(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for name, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join([name.ljust(widths[0]), *cells]))


def in_megabytes(row):
    """Return a row of memory with its bytes as text: "predicted / measured (error)"."""
    shown = dict(row)
    for name in ("weights", "optimizer", "kv_cache", "kv_cache_shared"):
        predicted, measured = row[name]["predicted"] / 1e6, row[name]["measured"] / 1e6
        shown[name] = f"{predicted:,.1f} / {measured:,.1f} ({predicted / measured - 1:+.0%})"
    for name, n_bytes in row["activations"].items():
        shown[name] = f"{n_bytes / 1e6:,.1f}"
    return shown

# ------------------------------------------------------------------------------- command line


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--preset", choices=LOOPED, default="parcae-micro", metavar="NAME",
        help=f"looped model, one of {', '.join(LOOPED)} (default: %(default)s)")
    add("--context", type=COUNT, metavar="N",
        help="tokens of a sequence (default: the preset's block_size)")
    add("--batch", type=COUNT, default=32, metavar="N",
        help="sequences of a training step (default: %(default)s)")
    add("--recurrence", type=LOOPS, nargs="+", default=[1, 2, 4, 8, 16], metavar="T",
        help="loops (default: 1 2 4 8 16)")
    add("--only", choices=("memory", "train", "decode"),
        help="one part of the tables (default: all)")
    add("--rounds", type=COUNT, default=5, metavar="N",
        help="times that everything is measured, in turns (default: %(default)s)")
    add("--compile", action="store_true",
        help="torch.compile the layers; for decoding on a CPU the whole step (minutes)")
    add("--eager", action="store_true",
        help="for decoding on a GPU: launch each operation, instead of replaying a CUDA graph")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32", "int8"), default="auto",
        help="of the activations; int8, with --only decode: of the weights (default: auto)")
    add("--out", type=new_directory, default="out/bench", metavar="DIR",
        help="where the JSON and the figure go (default: %(default)s)")
    args = parser.parse_args()
    if args.dtype == "int8" and args.only != "decode":
        parser.error("--dtype int8 is for generation: give --only decode")
    idle = {"memory": ("rounds", "compile", "eager"), "train": ("eager",), "decode": ("batch",)}
    check_idle(parser, args, idle.get(args.only, ()),
               f"--only {args.only} measures nothing that they change")
    return args


def check_replaceable(path, setting):
    """Raise UserError where a file holds what another setting measured. setting: a dict."""
    before = read_json(path) if path.exists() else setting
    other = [name for name, value in setting.items() if before.get(name) != value]
    if other:
        raise UserError(f"{path} was measured with another {', '.join(other)}: "
                        "choose another --out")


def bench_memory(cases, config, args):
    """Measure, print and draw memory; return what the JSON holds."""
    # one case more: the most loops, with the gradient through as many as the preset has
    many = Case(f"looped, mu_bwd {config.backprop_depth}", replace(config, mean_recurrence=64), 64)
    n = len(args.recurrence)
    cases = [*cases[:n], many, *cases[n:]]
    rows = [memory_of(case, args) for case in progress_bar(cases, desc="memory")]
    on_gpu = ON_GPU if args.device.type == "cuda" else {}
    show("Memory in MB, predicted / measured (error); activations: what a step of "
         f"{args.batch} x {args.context} tokens keeps for its backward pass, {args.dtype}",
         [in_megabytes(row) for row in rows], MEMORY | on_gpu)

    double = next(case.config for case in cases if case.name == TWICE)
    even = break_even(config, double)
    tokens = "none, the looped model's cache is the smaller one"
    if even:
        tokens = f"{even:,.0f} tokens of batch x context"
    print("break-even with the plain transformer of twice the parameters at "
          f"T = {config.mean_recurrence}: {tokens}")
    try:
        draw(Path(args.out) / f"memory-{args.preset}.png", config, double, even)
    except UserError as error:  # without matplotlib the tables are still worth printing
        print(f"no figure: {error}")
    return {"memory": rows, "break_even_tokens": even}


def main():
    args = parse_args()
    config = ParcaeConfig(**PRESETS[args.preset])
    context = args.context = args.context or config.block_size
    config = replace(config, block_size=max(context, config.block_size))
    device = args.device = machine.pick_device(args.device, args.compile)
    machine.use_threads(config.n_embd)
    if args.eager and device.type != "cuda":
        raise UserError(f"--eager is for a GPU: nothing is recorded on {device}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose memory and time are measured
    settings = {name: getattr(args, name) for name in
                ("context", "batch", "rounds", "compile", "eager", "dtype", "recurrence")}
    results = {"preset": args.preset, "model": asdict(config),
               "machine": machine.machine_name(device), "threads": torch.get_num_threads(),
               "torch": torch.__version__, **settings}
    part = f"-{args.only}" if args.only else ""
    path = Path(args.out) / f"bench-{device.type}-{args.preset}{part}.json"
    check_replaceable(path, results)
    print(f"{args.preset} at context {context}, batch {args.batch}, on {results['machine']}, "
          f"{results['threads']} threads")

    # CPUs multiply bfloat16 vectors slowly
    slow = device.type == "cpu" and args.dtype == "auto"
    args.dtype = machine.pick_dtype(device, args.dtype)
    machine.keep_freed_memory()
    cases = cases_of(config, args.recurrence)
    if args.only in (None, "memory"):
        results |= bench_memory(cases, config, args)
    if args.only in (None, "train"):
        found = results["train"] = train_speed(cases, args)
        show(f"Training, {args.dtype}, matmul peak {found['matmul_peak'] / 1e9:,.0f} GFLOP/s; "
             "share of it by needed FLOPs", found["rows"], TRAIN)
    if args.only in (None, "decode"):
        args.dtype = torch.float32 if slow else args.dtype
        found = results["decode"] = decode_speed(cases, args)
        show(f"Generation, one sequence at context {context}, {args.dtype}, peak "
             f"{found['matmul_peak'] / 1e9:,.0f} GFLOP/s, memory "
             f"{found['bandwidth'] / 1e9:,.1f} GB/s", found["rows"], DECODE)
    write_json(path, results)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    run_script(main)
