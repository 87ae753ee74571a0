"""How much faster is drafting? Plain and drafted decoding of a trained run, in turns.

    python -m runs.draft --run out/default --recurrence 8     some minutes; writes results/draft.csv

Nothing else should run meanwhile. Every way of decoding continues the same prompts with the same
seeds; a round times each once, after one to warm up. The table has medians over rounds.
"""

import statistics
from functools import partial

import torch

from bench import alternate
from common import COUNT, LOOPS, Parser, UserError, keep_freed_memory, run_script, some_path
from data import EVAL_SEED, Loader
from draft import draft_stream
from model import Parcae
from sample import stream
from tables import write_csv
from tokenizer import load_tokenizer

COLUMNS = ["recurrence", "draft", "ahead", "temperature", "tokens_per_second", "slowest",
           "fastest", "speedup", "kept", "loops_per_token"]


def ways(recurrence, temperature, drafts, aheads):
    """{(draft, ahead): a function of model, prompt, n and generator that yields tokens}."""
    common = {"recurrence": recurrence, "temperature": temperature}
    result = {(0, 0): partial(stream, **common)}
    for draft in drafts:
        for ahead in aheads:
            result[draft, ahead] = partial(draft_stream, draft=draft, ahead=ahead, **common)
    return result


def measure(model, prompts, n, ways, rounds):
    """{(draft, ahead): (seconds of each round, counts of one round)}."""
    counts = {way: {} for way in ways}

    def decode_all(way):
        counts[way].update(drafted=0, kept=0, loops=0)
        for seed, prompt in enumerate(prompts):
            mine = {"counts": {}} if way[0] else {}
            generator = torch.Generator().manual_seed(seed)
            for _ in ways[way](model, prompt, n, generator=generator, **mine):
                pass
            for name, value in mine.get("counts", {}).items():
                counts[way][name] += value
    runs = {way: partial(decode_all, way) for way in ways}
    seconds = alternate(runs, rounds, model.wte.weight.device, "decoding")
    return {way: (seconds[way], counts[way]) for way in ways}


def rows_of(found, recurrence, temperature, tokens):
    """The table's rows. tokens: how many each way makes in a round."""
    plain = tokens / statistics.median(found[0, 0][0])
    rows = []
    for (draft, ahead), (seconds, counts) in found.items():
        rates = [tokens / s for s in seconds]
        rate = statistics.median(rates)
        rows.append({
            "recurrence": recurrence, "draft": draft or "", "ahead": ahead or "",
            "temperature": f"{temperature:g}",
            "tokens_per_second": f"{rate:.1f}",
            "slowest": f"{min(rates):.1f}", "fastest": f"{max(rates):.1f}",
            "speedup": f"{rate / plain:.2f}",
            "kept": f"{counts['kept'] / counts['drafted']:.3f}" if draft else "",
            "loops_per_token": f"{counts['loops'] / tokens:.2f}" if draft else str(recurrence),
        })
    return rows


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=some_path, default="out/default", metavar="DIR",
        help="run directory of train.py (default: %(default)s)")
    add("--data", type=some_path, default="data/stdlib", metavar="DIR",
        help="data directory whose val text prompts are taken from (default: %(default)s)")
    add("--recurrence", type=LOOPS, default=8, metavar="T", help="(default: %(default)s)")
    add("--draft", type=LOOPS, nargs="+", default=[1, 2, 4], metavar="T",
        help="loops of a draft (default: 1 2 4)")
    add("--ahead", type=COUNT, nargs="+", default=[4, 8], metavar="N",
        help="tokens drafted at a time (default: 4 8)")
    add("--tokens", type=COUNT, default=100, metavar="N",
        help="new tokens for each of four prompts (default: %(default)s)")
    add("--rounds", type=COUNT, default=5, metavar="N", help="(default: %(default)s)")
    add("--out", type=some_path, default="results/draft.csv", metavar="FILE",
        help="the table (default: %(default)s)")
    args = parser.parse_args()
    keep_freed_memory()
    model = Parcae.from_pretrained(args.run)
    block_size = model.config.block_size
    if args.tokens >= block_size:
        raise UserError(f"--tokens is {args.tokens}, must be below the block size {block_size}")
    loader = Loader(args.data, "val", block_size, load_tokenizer(args.run).n_vocab, EVAL_SEED)
    prompts = loader.batch(range(4))[0][:, :block_size - args.tokens].split(1)

    rows = []
    for temperature in (0.0, 0.7):
        every = ways(args.recurrence, temperature, args.draft, args.ahead)
        found = measure(model, prompts, args.tokens, every, args.rounds)
        rows += rows_of(found, args.recurrence, temperature, args.tokens * len(prompts))
    print("  ".join(COLUMNS))
    for row in rows:
        print("  ".join(f"{value:>{len(name)}}" for name, value in row.items()))
    write_csv(args.out, rows, COLUMNS)
    print("wrote", args.out)


if __name__ == "__main__":
    run_script(main)
