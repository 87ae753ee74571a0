"""What looping costs and saves, in memory and in speed.

    python bench.py                        all tables, minutes on a laptop
    python bench.py --only decode --preset parcae-140m --context 512 --recurrence 8

Compares, at one width, the looped model at several numbers of loops T with three plain transformers: one of
the same parameters, one of about twice the parameters (whose quality the looped one is said to match), and one
of the same unrolled depth. Every prediction stands beside its measurement. Memory in inference is counted for
bfloat16 weights and caches. Writes results/bench-<device>-<preset>.json and, with matplotlib, results/memory-<preset>.png.
"""

import json
import platform
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import figures
from common import COUNT, LOOPS, Parser, UserError, keep_freed_memory, matmul_peak, pick_device, pick_dtype, run_script, write_text
from model import CHUNK, PRESETS, KVCache, Parcae, ParcaeConfig

MB = 1e6


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--preset", default="parcae-micro", metavar="NAME", help="looped model, one of "
        f"{', '.join(name for name in PRESETS if name.startswith('parcae'))} (default: %(default)s)")
    add("--context", type=COUNT, metavar="N", help="tokens of a sequence (default: the preset's block_size)")
    add("--batch", type=COUNT, default=32, metavar="N", help="sequences of a training step (default: %(default)s)")
    add("--recurrence", type=LOOPS, nargs="+", default=[1, 2, 4, 8, 16], metavar="T", help="loops (default: 1 2 4 8 16)")
    add("--only", choices=("memory", "train", "decode"), help="one part of the tables (default: all)")
    add("--rounds", type=COUNT, default=5, metavar="N", help="times that everything is measured, in turns (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the layers for training, the whole step for decoding (minutes)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the activations (default: auto)")
    add("--out", default="results", metavar="DIR", help="where the JSON and the figure go (default: %(default)s)")
    return parser.parse_args()

# ----------------------------------------------------------------------------- the models


def plain(config, n_layer):
    """The plain transformer of the same width with n_layer layers."""
    return replace(config, n_prelude=n_layer, n_recurrent=0, n_coda=0)


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Parcae(config).parameters())


def contenders(config):
    """{name: config}: the looped model and the plain ones to compare it with."""
    n, target = config.n_layer, 2 * parameters(config)
    double = min(range(n, 4 * n + 1), key=lambda layers: abs(parameters(plain(config, layers)) - target))
    unrolled = n + (config.mean_recurrence - 1) * config.n_recurrent
    return {"looped": config, "plain, same parameters": plain(config, n),
            "plain, twice the parameters": plain(config, double), "plain, same depth": plain(config, unrolled)}


def build(config, device, dtype):
    torch.manual_seed(0)
    with torch.device(device):
        model = Parcae(config)
    model.compute_dtype = dtype
    return model

# ----------------------------------------------------------------------------- memory


def layers_run(config, recurrence):
    return config.n_prelude + recurrence * config.n_recurrent + config.n_coda


def kv_bytes(config, context, recurrence, itemsize=2):
    """Keys and values of one sequence: a pair of vectors for each token, layer and loop."""
    return 2 * layers_run(config, recurrence) * config.n_embd * context * itemsize


def optimizer_bytes(model):
    """float32 state: Muon keeps one number for a weight of a layer's matrices, AdamW two for any other."""
    muon = sum(p.numel() for p in model.matrices())
    return 4 * muon + 8 * (sum(p.numel() for p in model.parameters()) - muon)


def activation_bytes(config, tokens, context, device, dtype):
    """What an eager training step at T = mean_recurrence keeps for its backward pass, counted by hand.

    A layer keeps, for each token, copies of the d channels (its norms' inputs and outputs, q and k before and after
    their norm, v, the attention's output), the MLP's hidden layer twice, and on a CPU in bfloat16 float32 copies inside
    the norms and the attention weights; in bfloat16 also the cast weights. Loops without gradient keep nothing."""
    d, size = config.n_embd, dtype.itemsize
    copies = {("cpu", 2): 18, ("cpu", 4): 12}.get((device.type, size), 10)
    layer = copies * d + 2 * config.mlp_width + (config.n_head * context if copies == 18 else 0)
    cast = 4 * d * d + 2 * d * config.mlp_width if size == 2 else 0
    grad_loops = min(config.mean_recurrence, config.backprop_depth) if config.n_recurrent else 0
    states = grad_loops + 12 if config.n_recurrent else 5  # the loop's states, its input, and the norms outside layers
    head = 8 * tokens * config.vocab_size  # log-softmax and its gradient, float32
    if tokens > CHUNK:
        head = 10 * CHUNK * config.vocab_size + 4 * config.vocab_size * d + tokens * d * size
    return (layers_run(config, grad_loops) * (tokens * layer + cast) + tokens * states * d) * size + head


def peak_bytes(run, device):
    """Most memory that run() held beyond what was there before, by the allocator's own books."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory(config, context, batch, recurrence, device, dtype):
    """Rows of predicted and measured bytes for every model; the looped one at every number of loops."""
    rows = []
    cases = [("looped", replace(config, mean_recurrence=T, backprop_depth=None), T) for T in recurrence]
    cases += [(f"looped, mu_bwd {config.backprop_depth}", replace(config, mean_recurrence=64), 64)]
    cases += [(name, c, 1) for name, c in contenders(config).items() if name != "looped"]
    for name, c, T in tqdm(cases, desc="memory", leave=False, disable=None):
        model = build(c, device, dtype)
        idx = torch.randint(c.vocab_size, (batch, context), device=device)
        muon = set(model.matrices())
        optimizers = [torch.optim.Muon(muon), torch.optim.AdamW(set(model.parameters()) - muon, fused=True)]
        model(idx[:1], idx[:1], recurrence=1)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
        state = sum(t.nbytes for o in optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim)
        activations = peak_bytes(lambda: model(idx, idx, recurrence=T)[1].backward(), device)  # noqa: B023
        cache = KVCache(c, 1, context, T, device, torch.bfloat16)
        shared = KVCache(c, 1, context, T, device, torch.bfloat16, "shared")
        rows.append({
            "model": name, "T": T, "layers run": layers_run(c, T) if c.n_recurrent else c.n_layer,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights": {"predicted": 2 * parameters(c), "measured": sum(p.nbytes for p in model.to(torch.bfloat16).parameters())},
            "optimizer": {"predicted": optimizer_bytes(model), "measured": state},
            "kv_cache": {"predicted": kv_bytes(c, context, T), "measured": cache.nbytes},
            "kv_cache_shared": {"predicted": kv_bytes(c, context, 1), "measured": shared.nbytes},
            "activations": {"predicted": activation_bytes(c, batch * context, context, device, dtype), "measured": activations}})
    return rows


def break_even(config):
    """Tokens in all caches (batch x context) at which the looped model in inference, T = mean_recurrence, holds as much
    memory as the plain transformer of twice the parameters; None where its cache is the smaller one."""
    double = contenders(config)["plain, twice the parameters"]
    saved = 2 * (parameters(double) - parameters(config))
    cost = kv_bytes(config, 1, config.mean_recurrence) - kv_bytes(double, 1, 1)
    return saved / cost if cost > 0 else None

# ----------------------------------------------------------------------------- speed


def alternate(runs, rounds, device, what):
    """Seconds of each run, {name: [one a round]}: everything once to warm up, then all in turns."""
    seconds = {name: [] for name in runs}
    for i in tqdm(range(rounds + 1), desc=what, unit="round", leave=False, disable=None):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bandwidth(device, size=1 << 28):
    """Bytes read a second from memory, the best of a few sums over an array that fits no cache."""
    x = torch.ones(size // 4, device=device)
    return size / min(alternate({"sum": lambda: x.sum().item()}, 5, device, "memory bandwidth")["sum"])


def speed(name, T, seconds, tokens, **limits):
    rates = sorted(tokens / s for s in seconds)
    return {"model": name, "T": T, "tokens/s": statistics.median(rates), "min": rates[0], "max": rates[-1], **limits}


def variants(config, recurrence):
    """(name, config, T): the looped model trained for each T, and the plain ones."""
    return [("looped", replace(config, mean_recurrence=T, backprop_depth=None), T) for T in recurrence] + \
        [(name, c, 1) for name, c in contenders(config).items() if name != "looped"]


def train_speed(config, context, batch, recurrence, rounds, device, dtype, compile):
    """Tokens/s of forward and backward, and the share of the matmul peak by the FLOPs that are needed."""
    peak, cases, runs = matmul_peak(device, dtype), {}, {}
    for name, c, T in variants(config, recurrence):
        model = build(c, device, dtype).train()
        if compile:
            model.compile_layers()
        idx = torch.randint(c.vocab_size, (batch, context), device=device)
        depths = model.sample_depths(batch, torch.Generator().manual_seed(0))
        flops = model.flops_per_token(depths.double().mean().item(), depths.clamp(max=c.backprop_depth).double().mean().item(),
                                      context=context)
        cases[name, T] = flops

        def run(model=model, idx=idx, depths=depths):
            model(idx, idx, depths=depths)[1].backward()
            model.zero_grad()
        runs[name, T] = run
    seconds = alternate(runs, rounds, device, "training")
    peak = max(peak, matmul_peak(device, dtype))
    rows = [speed(*case, seconds[case], batch * context) for case in cases]
    for row in rows:
        row["share of peak"] = row["tokens/s"] * cases[row["model"], row["T"]] / peak
    return peak, rows


@torch.no_grad()
def decode_speed(config, context, recurrence, rounds, device, dtype, compile, steps=16):
    """Tokens/s of prefill and of decoding one sequence, beside two limits: the matmul peak, and the memory bandwidth if
    every weight were read from memory once a loop."""
    peak, width = matmul_peak(device, dtype), bandwidth(device)
    prefill, decode, limits = {}, {}, {}
    for name, c, T in variants(replace(config, block_size=context + steps), recurrence):
        model = build(c, device, dtype).eval().to(dtype)
        if compile:
            model.step = torch.compile(model.step, dynamic=True)
        cache = KVCache(c, 1, context + steps, T, device, dtype)
        idx = torch.randint(c.vocab_size, (1, context), device=device)

        def fill(model=model, cache=cache, idx=idx, T=T):
            cache.pos = 0
            model.step(idx, T, cache)

        def step(model=model, cache=cache, idx=idx, T=T):
            cache.pos = context
            for i in range(steps):
                model.step(idx[:, i:i + 1], T, cache)
        prefill[name, T], decode[name, T] = fill, step
        flops = model.flops_per_token(T, backprop_depth=0, context=context)
        weights = (model.flops_per_token(T, backprop_depth=0, context=1) / 2) * dtype.itemsize  # a multiply-add for a weight
        limits[name, T] = {"compute limit": peak / flops, "memory limit": width / (weights + kv_bytes(c, context, T, dtype.itemsize))}
    filled, decoded = (alternate(runs, rounds, device, what) for runs, what in ((prefill, "prefill"), (decode, "decode")))
    rows = [speed(*case, decoded[case], steps, **{"prefill tokens/s": context / statistics.median(filled[case])}, **limits[case])
            for case in limits]
    for row in rows:
        row["share of limit"] = row["tokens/s"] / min(row["compute limit"], row["memory limit"])
    return peak, width, rows

# ----------------------------------------------------------------------------- what is shown


def show(title, rows, columns):
    """Print a table; columns: {heading: function of a row}."""
    cells = [list(columns), *([f(row) for f in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))))


def both(key, unit=MB):
    """"predicted / measured (error)" of a row's entry."""
    def cell(row):
        predicted, measured = row[key]["predicted"], row[key]["measured"]
        return f"{predicted / unit:,.1f} / {measured / unit:,.1f} ({predicted / measured - 1:+.0%})"
    return cell


def draw(config, path):
    """Inference memory against tokens in the cache, for the looped model and the double-size transformer."""
    double, T = contenders(config)["plain, twice the parameters"], config.mean_recurrence
    even = break_even(config)
    tokens = [10 ** (i / 20) * (even or 1e5) / 100 for i in range(81)]
    curves = []
    for label, c, loops, style in ((f"looped, T = {T}", config, T, "k-"), (f"looped, T = {T}, shared cache", config, 1, "k:"),
                                   (f"plain, twice the parameters ({double.n_layer} layers)", double, 1, "k--")):
        curves.append((label, tokens, [(2 * parameters(c) + n * kv_bytes(c, 1, loops)) / 1e9 for n in tokens], style))
    figures.memory(path, curves, even)


def main(args):
    if not args.preset.startswith("parcae") or args.preset not in PRESETS:
        raise UserError(f"--preset is {args.preset}, must be one of {', '.join(n for n in PRESETS if n.startswith('parcae'))}")
    config = ParcaeConfig(**PRESETS[args.preset])
    context = args.context or config.block_size
    config = replace(config, block_size=max(context, config.block_size))
    device = pick_device(args.device)
    dtype = pick_dtype(device, args.dtype)
    keep_freed_memory()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), platform.machine()) \
        if Path("/proc/cpuinfo").exists() else platform.machine()
    results = {"preset": args.preset, "model": asdict(config), "machine": machine, "threads": torch.get_num_threads(),
               "torch": torch.__version__, "context": context, "batch": args.batch, "rounds": args.rounds, "compile": args.compile}
    print(f"{args.preset} at context {context}, batch {args.batch}, on {machine}, {torch.get_num_threads()} threads")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    label = {"model": lambda r: r["model"], "T": lambda r: str(r["T"])}
    if args.only in (None, "memory"):
        results["memory"] = rows = memory(config, context, args.batch, args.recurrence, device, dtype)
        results["break_even_tokens"] = even = break_even(config)
        show(f"Memory in MB, predicted / measured (error); activations: a step of {args.batch} x {context} tokens, {dtype}", rows,
             label | {"parameters": lambda r: f"{r['parameters']:,}", "weights": both("weights"), "optimiser": both("optimizer"),
                      "KV cache, a sequence": both("kv_cache"), "shared": both("kv_cache_shared"), "activations": both("activations")})
        print(f"break-even with the plain transformer of twice the parameters at T = {config.mean_recurrence}: " +
              (f"{even:,.0f} tokens of batch x context" if even else "none, the looped model's cache is the smaller one"))
        try:
            draw(config, out / f"memory-{args.preset}.png")
        except UserError as error:  # without matplotlib the tables are still worth printing
            print(f"no figure: {error}")
    rate = lambda key: lambda r: f"{r[key]:,.1f}"
    spread = {"tokens/s": rate("tokens/s"), "(range)": lambda r: f"({r['min']:,.1f} to {r['max']:,.1f})"}
    if args.only in (None, "train"):
        peak, rows = train_speed(config, context, args.batch, args.recurrence, args.rounds, device, dtype, args.compile)
        results["train"] = {"dtype": str(dtype), "matmul_peak": peak, "rows": rows}
        show(f"Training, {dtype}, matmul peak {peak / 1e9:,.0f} GFLOP/s; share of it by needed FLOPs", rows,
             label | spread | {"share": lambda r: f"{r['share of peak']:.0%}"})
    if args.only in (None, "decode"):
        dtype = dtype if device.type == "cuda" or args.dtype != "auto" else torch.float32  # CPUs multiply bf16 vectors slowly
        peak, width, rows = decode_speed(config, context, args.recurrence, args.rounds, device, dtype, args.compile)
        results["decode"] = {"dtype": str(dtype), "matmul_peak": peak, "bandwidth": width, "rows": rows}
        show(f"Generation, one sequence at context {context}, {dtype}, peak {peak / 1e9:,.0f} GFLOP/s, memory {width / 1e9:,.1f} GB/s",
             rows, label | {"prefill tokens/s": rate("prefill tokens/s"), "decode tokens/s": rate("tokens/s"), "(range)": spread["(range)"],
                            "compute limit": rate("compute limit"), "memory limit": rate("memory limit"),
                            "share": lambda r: f"{r['share of limit']:.0%}"})
    path = out / f"bench-{device.type}-{args.preset}{'-' + args.only if args.only else ''}.json"
    write_text(path, json.dumps(results, indent=1))
    print(f"\nwrote {path}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
