"""How much faster do drafts, compiling, 8-bit weights and stopping early make decoding?

    python -m runs.draft --run out/default --recurrence 1 4 8     minutes; writes out/draft.csv
    python -m runs.draft --compile --draft 1 --ahead 8            compiled, too: some minutes more
    python -m runs.draft --dtype float32 int8 --exit 0.03         also the ways that are not exact

Run nothing else meanwhile. Every way of decoding continues the same four prompts with the same
seeds. After a warm-up, each round times each way once, with the time to read the prompts. The table
has medians over rounds. "speedup" is relative to plain decoding with the first --dtype. On a GPU,
all but stopping early is recorded and replayed, see parts/recording.py.
"""

import statistics
from collections import Counter, namedtuple
from functools import cache, partial

import torch

from bench import alternate
from model import Parcae
from parts.cli import COUNT, LOOPS, Parser, UserError, new_file, number, run_script, some_path
from parts.draft import draft_stream
from parts.generation import stream
from parts.machine import keep_freed_memory, pick_device, use_threads
from parts.quantize import prepare_weights
from parts.recording import speed_up
from parts.tables import write_csv
from parts.tokenizer import load_tokenizer
from tools.evaluate import open_data

# draft and ahead are 0 without drafts; exit: a threshold for EXIT_RULE, or None
Way = namedtuple("Way", "recurrence dtype compiled draft ahead exit", defaults=(False, 0, 0, None))
EXIT_RULE = "state"


def ways_of(args):
    """Return a list of the ways of decoding that the flags ask for."""
    ways = []
    for recurrence in args.recurrence:
        for dtype in args.dtype:
            for compiled in [False, True] if args.compile else [False]:
                ways.append(Way(recurrence, dtype, compiled))
                ways += [Way(recurrence, dtype, compiled, draft, ahead) for draft in args.draft
                         for ahead in args.ahead if draft < recurrence]
            # stopping early runs loop by loop, which is not compiled
            ways += [Way(recurrence, dtype, exit=threshold) for threshold in args.exit]
    return ways


@cache
def load(run, device, dtype, compiled):
    """Return the model of a run, prepared for one way of decoding."""
    model = Parcae.from_pretrained(run)
    if not model.config.n_recurrent:
        raise UserError(f"{run} is a plain transformer: it cannot draft with fewer loops")
    use_threads(model.config.n_embd)
    prepare_weights(model, device, getattr(torch, dtype))
    speed_up(model, compiled)
    return model


def measure(run, prompts, n, ways, temperature, rounds):
    """Return {way: (seconds of each round, counts of one round)}."""
    device, counts = prompts[0].device, {}

    def decode_all(way):
        counts[way] = Counter()
        model = load(run, device, way.dtype, way.compiled)
        for seed, prompt in enumerate(prompts):
            options = {"recurrence": way.recurrence, "temperature": temperature,
                       "generator": torch.Generator(device).manual_seed(seed),
                       "counts": counts[way]}
            if way.draft:
                tokens = draft_stream(model, prompt, n, draft=way.draft, ahead=way.ahead, **options)
            else:
                tokens = stream(model, prompt, n, exit_threshold=way.exit, exit_rule=EXIT_RULE,
                                **options)
            for _ in tokens:
                pass
    runs = [partial(decode_all, way) for way in ways]
    seconds = alternate(runs, rounds, device, "decoding")
    return {way: (times, counts[way]) for way, times in zip(ways, seconds)}


def rows_of(found, temperature, tokens):
    """Return the table's rows. found: what measure returns; tokens: made by a way in a round."""
    rows, first = [], next(iter(found)).dtype
    for way, (seconds, counts) in found.items():
        plain = tokens / statistics.median(found[Way(way.recurrence, first)][0])
        rates = [tokens / s for s in seconds]
        rate = statistics.median(rates)
        rows.append({
            "recurrence": way.recurrence, "dtype": way.dtype,
            "compiled": "yes" if way.compiled else "",
            "draft": way.draft or "", "ahead": way.ahead or "",
            "exit": "" if way.exit is None else f"{way.exit:g}",
            "temperature": f"{temperature:g}",
            "tokens_per_second": f"{rate:.1f}",
            "slowest": f"{min(rates):.1f}", "fastest": f"{max(rates):.1f}",
            "speedup": f"{rate / plain:.2f}",
            "kept": f"{counts['kept'] / counts['drafted']:.3f}" if way.draft else "",
            "loops_per_token": f"{counts['loops'] / tokens:.2f}",
        })
    return rows


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=some_path, default="out/default", metavar="DIR",
        help="run directory of train.py (default: %(default)s)")
    add("--data", type=some_path, metavar="DIR",
        help="data directory whose val text prompts are taken from (default: the run's)")
    add("--recurrence", type=LOOPS, nargs="+", default=[8], metavar="T",
        help="loops (default: 8)")
    add("--draft", type=LOOPS, nargs="+", default=[1, 2, 4], metavar="T",
        help="loops of a draft; used if fewer than --recurrence (default: 1 2 4)")
    add("--ahead", type=COUNT, nargs="+", default=[4, 8], metavar="N",
        help="tokens drafted at a time (default: 4 8)")
    add("--compile", action="store_true", help="measure each way compiled, too")
    add("--tokens", type=COUNT, default=100, metavar="N",
        help="new tokens for each of four prompts (default: %(default)s)")
    add("--rounds", type=COUNT, default=5, metavar="N", help="(default: %(default)s)")
    add("--out", type=new_file, default="out/draft.csv", metavar="FILE",
        help="the table (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "int8"), nargs="+", default=["float32"],
        help="dtype of the weights, see sample.py (default: float32)")
    add("--temperature", type=number(float, 0), nargs="+", default=[0.0, 0.7],
        help="(default: 0 0.7)")
    add("--exit", type=number(float, 0), nargs="*", default=[], metavar="EPS",
        help=f"thresholds for the exit rule {EXIT_RULE}, see parts/generation.py (default: none)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args()
    keep_freed_memory()
    device, ways = pick_device(args.device, args.compile), ways_of(args)
    block_size = load(args.run, device, args.dtype[0], False).config.block_size
    if args.tokens >= block_size:
        raise UserError(f"--tokens is {args.tokens}, must be below the block size {block_size}")
    _, loader = open_data(args, load_tokenizer(args.run), block_size)
    prompts = loader.batch(range(4))[0][:, :block_size - args.tokens].to(device).split(1)

    rows = []
    for temperature in args.temperature:
        found = measure(args.run, prompts, args.tokens, ways, temperature, args.rounds)
        rows += rows_of(found, temperature, args.tokens * len(prompts))
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{value:>{len(name)}}" for name, value in row.items()))
    write_csv(args.out, rows, rows[0])
    print("wrote", args.out)


if __name__ == "__main__":
    run_script(main)
