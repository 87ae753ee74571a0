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

import platform
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from model import PRESETS, KVCache, Parcae, ParcaeConfig, count_parameters
from parts import figures
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
from parts.files import read_json, write_json
from parts.machine import keep_freed_memory, matmul_peak, pick_device, pick_dtype, use_threads
from parts.muon import Muon
from parts.quantize import activations, cast
from parts.recording import speed_up

MB = 1e6
LOOPED = [name for name in PRESETS if name.startswith("parcae")]

# ------------------------------------------------------------------------------- the models


def plain(config, n_layer):
    """The plain transformer of the same width with n_layer layers."""
    return replace(config, n_prelude=n_layer, n_recurrent=0, n_coda=0)


def parameters(config):
    with torch.device("meta"):
        return count_parameters(Parcae(config))


def contenders(config):
    """{name: config}: the looped model and the plain ones to compare it with."""
    n, target = config.n_layer, 2 * parameters(config)
    distance = {layers: abs(parameters(plain(config, layers)) - target)
                for layers in range(n, 4 * n + 1)}
    double = min(distance, key=distance.get)
    unrolled = n + (config.mean_recurrence - 1) * config.n_recurrent
    return {"looped": config,
            "plain, same parameters": plain(config, n),
            "plain, twice the parameters": plain(config, double),
            "plain, same depth": plain(config, unrolled)}


def variants(config, recurrence):
    """[(name, config, loops)]: the looped model trained for each number of loops, and the plain
    ones."""
    looped = [("looped", replace(config, mean_recurrence=loops, backprop_depth=None), loops)
              for loops in recurrence]
    return looped + [(name, c, 1) for name, c in contenders(config).items() if name != "looped"]


def build(config, device, dtype=None):
    """A model with random weights; dtype: of the activations, see Parcae."""
    torch.manual_seed(0)
    with torch.device("cuda" if device.type == "cuda" else "cpu"):  # mps makes no orthogonal matrix
        model = Parcae(config)
    model.compute_dtype = dtype
    return model.to(device)

# ------------------------------------------------------------------------------- memory


def layers_run(config, recurrence):
    return config.n_prelude + recurrence * config.n_recurrent + config.n_coda


def kv_bytes(config, context, recurrence, itemsize=2):
    """Keys and values of one sequence: a pair of vectors for each token, layer and loop."""
    return 2 * layers_run(config, recurrence) * config.n_embd * context * itemsize


def optimizer_bytes(model):
    """float32 state: Muon keeps one number for a weight of a layer's matrices, and one for each row
    (or column, where they are more); AdamW two for any other."""
    muon = sum(p.numel() for p in model.matrices())
    longer = sum(max(p.shape) for p in model.matrices())
    return 4 * (muon + longer) + 8 * (count_parameters(model) - muon)


def saved_bytes(model, forward):
    """Bytes that forward() keeps for the backward pass: storages of saved tensors, each once,
    without the model's own."""
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
    """Most GPU memory that step() held beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def optimizer_state_bytes(model):
    """What Muon and AdamW hold after a step, measured."""
    muon = set(model.matrices())
    others = set(model.parameters()) - muon
    optimizers = [Muon(muon), torch.optim.AdamW(others, fused=True)]
    held = 0
    for optimizer in optimizers:
        optimizer.step()
        for state in optimizer.state.values():
            held += sum(t.nbytes for t in state.values() if torch.is_tensor(t) and t.ndim)
    return held


def memory(config, context, batch, recurrence, device, dtype):
    """Rows of predicted and measured bytes for every model; the looped one at every number of
    loops, and at 64 with the gradient through as many as the preset has."""
    rows = []
    cases = variants(config, recurrence)
    cases.insert(len(recurrence), (f"looped, mu_bwd {config.backprop_depth}",
                                   replace(config, mean_recurrence=64), 64))
    for name, c, loops in progress_bar(cases, desc="memory"):
        model = build(c, device, dtype).train()
        idx = torch.randint(c.vocab_size, (batch, context), device=device)
        forward = lambda: model(idx, idx, recurrence=loops)[1]  # noqa: B023
        forward().backward()  # gradients are there
        row = {"model": name, "T": loops, "layers run": layers_run(c, loops),
               "parameters": count_parameters(model),
               "activations": {"saved": saved_bytes(model, forward)}}
        if device.type == "cuda":
            row["activations"]["peak"] = peak_bytes(lambda: forward().backward())  # noqa: B023
        row["optimizer"] = {"predicted": optimizer_bytes(model),
                            "measured": optimizer_state_bytes(model)}
        model = model.to(torch.bfloat16)
        row["weights"] = {"predicted": 2 * parameters(c),
                          "measured": sum(p.nbytes for p in model.parameters())}
        cache = KVCache(c, 1, context, loops, device, torch.bfloat16)
        row["kv_cache"] = {"predicted": kv_bytes(c, context, loops), "measured": cache.nbytes}
        cache = KVCache(c, 1, context, loops, device, torch.bfloat16, "shared")
        row["kv_cache_shared"] = {"predicted": kv_bytes(c, context, 1), "measured": cache.nbytes}
        rows.append(row)
    return rows


def break_even(config):
    """Tokens in all caches (batch x context) at which the looped model in inference holds as much
    memory as the plain transformer of twice the parameters; None where its cache is smaller."""
    double = contenders(config)["plain, twice the parameters"]
    saved = 2 * (parameters(double) - parameters(config))
    cost = kv_bytes(config, 1, config.mean_recurrence) - kv_bytes(double, 1, 1)
    return saved / cost if cost > 0 else None

# ------------------------------------------------------------------------------- speed


def alternate(runs, rounds, device, what):
    """Seconds of each run, {name: [one a round]}: everything once to warm up, then all in turns."""
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
    """Bytes read a second from memory, the best of a few sums over an array that fits no cache."""
    x = torch.ones(size // 4, device=device)
    seconds = alternate({"sum": lambda: x.sum().item()}, 5, device, "memory bandwidth")
    return size / min(seconds["sum"])


def speed(name, loops, seconds, tokens):
    """A row: median, least and most tokens/s."""
    rates = sorted(tokens / s for s in seconds)
    return {"model": name, "T": loops, "tokens/s": statistics.median(rates), "min": rates[0],
            "max": rates[-1]}


def train_speed(config, context, batch, recurrence, rounds, device, dtype, compiled):
    """(matmul peak, rows): tokens/s of forward and backward, and the share of the matmul peak by
    the FLOPs that are needed."""
    peak, flops, runs = matmul_peak(device, dtype), {}, {}
    for name, c, loops in variants(config, recurrence):
        model = build(c, device, dtype).train()
        if compiled:
            model.compile_layers()
        idx = torch.randint(c.vocab_size, (batch, context), device=device)
        depths = model.sample_depths(batch, torch.Generator().manual_seed(0))
        with_gradient = depths.clamp(max=c.backprop_depth)
        flops[name, loops] = model.flops_per_token(
            depths.double().mean().item(), with_gradient.double().mean().item(), context=context)

        def run(model=model, idx=idx, depths=depths):
            model(idx, idx, depths=depths)[1].backward()
            model.zero_grad()
        runs[name, loops] = run
    seconds = alternate(runs, rounds, device, "training")
    peak = max(peak, matmul_peak(device, dtype))
    rows = [speed(*case, seconds[case], batch * context) for case in runs]
    for row in rows:
        row["share of peak"] = row["tokens/s"] * flops[row["model"], row["T"]] / peak
    return peak, rows


@torch.no_grad()
def decode_speed(config, context, recurrence, rounds, device, dtype, compiled, recorded,
                 steps=16):
    """(matmul peak, bandwidth, rows): tokens/s of prefill and of decoding one sequence, beside two
    limits: the matmul peak, and the bandwidth if every weight were read once a loop. dtype: of the
    weights, see quantize.cast."""
    peak, bytes_per_s = matmul_peak(device, activations(dtype)), bandwidth(device)
    prefill, decode, limits = {}, {}, {}
    for name, c, loops in variants(replace(config, block_size=context + steps), recurrence):
        model = cast(build(c, device).eval(), device, dtype)
        speed_up(model, compiled, recorded)
        cache = model.new_cache(1, context + steps, loops)
        idx = torch.randint(c.vocab_size, (1, context), device=device)

        def fill(model=model, cache=cache, idx=idx, loops=loops):
            cache.pos = 0
            model.hidden(idx, loops, cache)

        def step(model=model, cache=cache, idx=idx, loops=loops):
            cache.pos = context
            for _ in range(steps):
                model.advance(idx[:, :1], cache, 0, loops)
        prefill[name, loops] = fill
        decode[name, loops] = step
        flops = model.flops_per_token(loops, backprop_depth=0, context=context)
        once, core = model.matmul_params()
        weights = (once + loops * core) * dtype.itemsize
        read = weights + kv_bytes(c, context, loops, model.dtype.itemsize)
        limits[name, loops] = {"compute limit": peak / flops, "memory limit": bytes_per_s / read}
    filled = alternate(prefill, rounds, device, "prefill")
    decoded = alternate(decode, rounds, device, "decode")
    rows = []
    for case, limit in limits.items():
        row = speed(*case, decoded[case], steps) | limit
        row["prefill tokens/s"] = context / statistics.median(filled[case])
        row["share of limit"] = row["tokens/s"] / min(limit.values())
        rows.append(row)
    return peak, bytes_per_s, rows

# ------------------------------------------------------------------------------- what is shown


def show(title, rows, columns):
    """Print a table; columns: {heading: function of a row}."""
    table = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for line in table:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths))
        print("  ".join([first.strip().ljust(widths[0]), *others]))


def both(key):
    """A cell of a table: "predicted / measured (error)" of a row's entry, in MB."""
    def cell(row):
        predicted, measured = row[key]["predicted"], row[key]["measured"]
        return f"{predicted / MB:,.1f} / {measured / MB:,.1f} ({predicted / measured - 1:+.0%})"
    return cell


def rate(key):
    return lambda row: f"{row[key]:,.1f}"


LABEL = {"model": lambda row: row["model"], "T": lambda row: str(row["T"])}
RANGE = {"(range)": lambda row: f"({row['min']:,.1f} to {row['max']:,.1f})"}


def show_memory(rows, title, on_gpu):
    columns = LABEL | {"parameters": lambda row: f"{row['parameters']:,}",
                       "weights": both("weights"), "optimiser": both("optimizer"),
                       "KV cache, a sequence": both("kv_cache"),
                       "shared": both("kv_cache_shared"),
                       "activations": lambda row: f"{row['activations']['saved'] / MB:,.1f}"}
    if on_gpu:
        columns["peak of a step"] = lambda row: f"{row['activations']['peak'] / MB:,.1f}"
    show(title, rows, columns)


def draw(config, path):
    """The picture of inference memory against tokens in the cache."""
    double, loops = contenders(config)["plain, twice the parameters"], config.mean_recurrence
    even = break_even(config)
    middle = even or 1e5
    tokens = np.geomspace(middle / 100, 100 * middle, 81).tolist()
    cases = [(f"looped, T = {loops}", config, loops, "k-"),
             (f"looped, T = {loops}, shared cache", config, 1, "k:"),
             (f"plain, twice the parameters ({double.n_layer} layers)", double, 1, "k--")]
    curves = []
    for label, c, cached, style in cases:
        weights = 2 * parameters(c)
        gigabytes = [(weights + n * kv_bytes(c, 1, cached)) / 1e9 for n in tokens]
        curves.append((label, tokens, gigabytes, style))
    figures.memory(path, curves, even)


def machine_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if "model name" in line:
            return line.split(":")[1].strip()
    return platform.machine()

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


def bench_memory(args, config, context, device, dtype, picture):
    rows = memory(config, context, args.batch, args.recurrence, device, dtype)
    show_memory(rows, "Memory in MB, predicted / measured (error); activations: what a step of "
                f"{args.batch} x {context} tokens keeps for its backward pass, {dtype}",
                device.type == "cuda")
    even = break_even(config)
    tokens = "none, the looped model's cache is the smaller one"
    if even:
        tokens = f"{even:,.0f} tokens of batch x context"
    print("break-even with the plain transformer of twice the parameters at "
          f"T = {config.mean_recurrence}: {tokens}")
    try:
        draw(config, picture)
    except UserError as error:  # without matplotlib the tables are still worth printing
        print(f"no figure: {error}")
    return {"memory": rows, "break_even_tokens": even}


def bench_train(args, config, context, device, dtype):
    peak, rows = train_speed(config, context, args.batch, args.recurrence, args.rounds, device,
                             dtype, args.compile)
    show(f"Training, {dtype}, matmul peak {peak / 1e9:,.0f} GFLOP/s; share of it by needed FLOPs",
         rows, LABEL | {"tokens/s": rate("tokens/s")} | RANGE
         | {"share": lambda row: f"{row['share of peak']:.0%}"})
    return {"train": {"dtype": str(dtype), "matmul_peak": peak, "rows": rows}}


def bench_decode(args, config, context, device, dtype):
    if device.type == "cpu" and args.dtype == "auto":
        dtype = torch.float32  # CPUs multiply bfloat16 vectors slowly
    peak, bytes_per_s, rows = decode_speed(config, context, args.recurrence, args.rounds, device,
                                           dtype, args.compile, not args.eager)
    show(f"Generation, one sequence at context {context}, {dtype}, peak {peak / 1e9:,.0f} GFLOP/s, "
         f"memory {bytes_per_s / 1e9:,.1f} GB/s", rows,
         LABEL | {"prefill tokens/s": rate("prefill tokens/s"),
                  "decode tokens/s": rate("tokens/s")} | RANGE
         | {"compute limit": rate("compute limit"), "memory limit": rate("memory limit"),
            "share": lambda row: f"{row['share of limit']:.0%}"})
    return {"decode": {"dtype": str(dtype), "matmul_peak": peak, "bandwidth": bytes_per_s,
                       "rows": rows}}


def main():
    args = parse_args()
    config = ParcaeConfig(**PRESETS[args.preset])
    context = args.context or config.block_size
    config = replace(config, block_size=max(context, config.block_size))
    device = pick_device(args.device, args.compile)
    use_threads(config.n_embd)
    if args.eager and device.type != "cuda":
        raise UserError(f"--eager is for a GPU: nothing is recorded on {device}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose memory and time are measured
    dtype = pick_dtype(device, args.dtype)
    keep_freed_memory()
    results = {"preset": args.preset, "model": asdict(config), "machine": machine_name(device),
               "threads": torch.get_num_threads(), "torch": torch.__version__, "context": context,
               "batch": args.batch, "rounds": args.rounds, "compile": args.compile,
               "eager": args.eager, "dtype": args.dtype, "recurrence": args.recurrence}
    part = f"-{args.only}" if args.only else ""
    path = Path(args.out) / f"bench-{device.type}-{args.preset}{part}.json"
    check_replaceable(path, results)
    picture = Path(args.out) / f"memory-{args.preset}.png"
    print(f"{args.preset} at context {context}, batch {args.batch}, on {results['machine']}, "
          f"{results['threads']} threads")
    if args.only in (None, "memory"):
        results |= bench_memory(args, config, context, device, dtype, picture)
    if args.only in (None, "train"):
        results |= bench_train(args, config, context, device, dtype)
    if args.only in (None, "decode"):
        results |= bench_decode(args, config, context, device, dtype)
    write_json(path, results)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    run_script(main)
