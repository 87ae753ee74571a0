"""How many lookups can a model do with T loops? Make the table and the picture of runs/p_hop.sh.

    python -m runs.p_hop --quick                      train and measure small models: five minutes
    python -m runs.p_hop text data/p-hop              make the text
    python -m runs.p_hop out/p-hop results            measure runs; write p-hop.csv and p-hop.png
    python -m runs.p_hop results/p-hop.csv results    print and draw again, from the table

A question needs p lookups in a row. The table has the accuracy of the answers for each p and T, on
the 1000 validation strings. Runs are named MODEL-RATE-SEED. If there are several learning rates,
each model is shown at the rate that has most seeds; of several such, at the best for seed 0. With
three other seeds, seed 0, which chose the rate, does not count.
"""

import subprocess
import sys
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

from data import prepare
from model import Parcae
from parts import figures
from parts.cli import SEED, Parser, UserError, check_idle, progress_bar, run_script
from parts.comparable import changed_text
from parts.generation import check_predicts
from parts.loader import open_shard
from parts.sources import SOURCES
from parts.tables import write_csv
from runs.common import (
    each_at_one_rate,
    finished,
    finished_rows,
    loss_at,
    read_table,
    split_name,
)

NAMES = {"once": "one layer\nrun once", "looped": "looped", "two": "two\nnarrow\nlayers",
         "four": "four\nlayers", "eight": "eight\nlayers"}
DATA = Path("data/p-hop/val_000000.bin")
LOOPS = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 32]
HOPS = range(9)
# for --quick: fewer lookups, less text; three models of about equal size, for equal FLOPs. Seed 0
# chose the rates of the looped layer from three pairs, of two layers from four; once had this pair
QUICK_TEXT = {"n_train": 40_000, "n_val": 500, "questions": 32, "hops": 3}
QUICK = """--preset parcae-nano --no-value-embeds --n-prelude 0 --n-coda 0 --block-size 96
    --batch-size 16 --max-flops 1.42e12 --eval-sequences 16 --eval-every 10000 --overwrite"""
QUICK_MODELS = {
    "once": "--n-recurrent 1 --mean-recurrence 1 --n-embd 64 --n-head 4 --muon-lr 2e-2",
    "looped": "--n-recurrent 1 --mean-recurrence 4 --n-embd 64 --n-head 4 "
              "--muon-lr 4e-2 --adamw-lr 1e-2",
    "two": "--n-recurrent 0 --n-prelude 2 --n-embd 52 --n-head 2 --muon-lr 2e-2"}
# Shares of right answers of a guess that knows only p and the symbol. No symbol follows itself, so
# two lookups often lead back to the same one.
GUESSES = {0: 1, 1: 0.33, 2: 0.51, 3: 0.29, 4: 0.35, 5: 0.27, 6: 0.29, 7: 0.26, 8: 0.27}
COLUMNS = {"model": str, "rate": float, "seed": int, "mean_recurrence": int, "val_loss": float,
           "T": int, "p": int, "accuracy": float}


def p_hop_docs(n_train=100_000, n_val=1000, questions=64, hops=8, symbols=4, seed=0):
    """Return (train, val), lists of random strings with questions about them (p-hop induction,
    Sanford et al. 2024, arXiv 2402.09268).

    "3cA" reads: the next symbol is c, and 3 hops from it lead to an a. A hop goes back to where its
    symbol occurred last, then on to the symbol after that. p hops are p lookups in a row."""
    rng = np.random.default_rng(seed)
    # steps are 1 to symbols - 1, so that no symbol comes twice in a row
    steps = rng.integers(1, symbols, size=(n_train + n_val, questions))
    strings = steps.cumsum(axis=1) % symbols
    rows = zip(strings, rng.random(strings.shape))
    docs = [p_hop_doc(string.tolist(), chances.tolist(), hops) for string, chances in
            progress_bar(rows, total=len(strings), desc="p-hop", unit="doc")]
    return docs[:n_train], docs[n_train:]


def p_hop_doc(string, chances, hops):
    """Return a text with a question for each symbol of a string, a list of ints. The chances, in
    [0, 1), choose the number of hops: at most `hops`, and only as many as the string so far allows.

    >>> p_hop_doc([0, 1, 0, 2], [0.9, 0.9, 0.9, 0.9], 8)  # one hop leads from the second a to b
    '0aA0bB1aB0cC'
    """
    last = {}  # symbol: its last place so far
    hop = []  # for each place, where a hop from it leads; None: its symbol is new
    longest = []  # for each place, how many hops are possible from it
    text = ""
    for i, symbol in enumerate(string):
        hop.append(last[symbol] + 1 if symbol in last else None)
        longest.append(0 if hop[i] is None else longest[hop[i]] + 1)
        last[symbol] = i

        p = int(chances[i] * (min(longest[i], hops) + 1))
        at = i
        for _ in range(p):
            at = hop[at]
        text += f"{p}{chr(ord('a') + symbol)}{chr(ord('A') + string[at])}"
    return text


@torch.no_grad()
def accuracies(model, docs):
    """Return {T: [share of right answers to questions with p hops, for p = 0, 1, ...]}. Raises
    UserError if a prediction is not finite.

    docs (N, 1 + 3 * questions): begin, then hops, symbol, answer, hops, symbol, answer, ..."""
    looped = model.config.n_recurrent > 0 and model.config.mean_recurrence > 1
    loops = LOOPS if looped else [1]
    hops = docs[:, 1::3] - ord("0")  # (N, questions)
    right = {T: [] for T in loops}
    for batch in docs.split(100):
        # One pass serves all T, since the head can read the state after each loop.
        for t, (h, inputs) in enumerate(model.states(batch[:, :-1], max(loops)), start=1):
            if t in loops:
                x = model.readout(h, inputs)
                logits = model.lm_head(x[:, 2::3])  # at each symbol
                check_predicts(logits, t)
                answers = logits.argmax(-1)
                right[t].append(answers == batch[:, 3::3])
    result = {}
    for T in loops:
        all_right = torch.cat(right[T]).float()
        result[T] = [all_right[hops == p].mean().item() for p in range(hops.max() + 1)]
    return result


def read_docs(path=DATA):
    """Return the validation strings, (N, 1 + 3 * questions) int64. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path} does not exist: make it with python -m runs.p_hop text data/p-hop")
    tokens = open_shard(path).astype(np.int64)
    return torch.from_numpy(tokens.reshape((tokens == tokens[0]).sum(), -1))


def read_run(path, docs):
    """Return the rows of a run, None if it is not finished. Raises UserError."""
    name, rate, seed = split_name(path, "MODEL-RATE-SEED", NAMES)
    done = finished(path)
    if not done:
        return None
    difference = changed_text(path, DATA.parent)
    if difference:
        print(difference)
    model = Parcae.from_pretrained(path)
    trained = model.config.mean_recurrence if model.config.n_recurrent else 1
    run = {"model": name, "rate": rate, "seed": seed, "mean_recurrence": trained,
           "val_loss": loss_at(path, done, trained)}
    return rows_of(run, accuracies(model, docs))


def rows_of(run, found):
    """Return the table's rows of a run. run: its columns; found: what accuracies returns for it."""
    return [run | {"T": T, "p": p, "accuracy": round(share, 4)}
            for T, shares in found.items() for p, share in enumerate(shares)]


def by_rate(rows):
    """Return the rows of each model's runs at one rate; print all rates tried."""
    run_of = itemgetter("model", "rate", "seed")
    one_of_each = [row for row in rows if (row["T"], row["p"]) == (1, 0)]
    chosen = each_at_one_rate({name: name for name in NAMES}, one_of_each)
    shown = {run_of(row) for mine in chosen.values() for row in mine}
    return [row for row in rows if run_of(row) in shown]


def quick(seed):
    """Make a text with fewer lookups, train a layer run once, a looped one and two narrower layers,
    and print their accuracies."""
    data, root, rows = Path("data/p-hop-quick"), Path(__file__).parent.parent, []
    if not data.exists():
        SOURCES["p-hop"] = partial(p_hop_docs, **QUICK_TEXT)
        prepare("p-hop", data)
    for name, flags in QUICK_MODELS.items():
        out = Path("out/p-hop-quick", f"{name}-{seed}")
        done = subprocess.run([sys.executable, root / "train.py", *QUICK.split(), *flags.split(),
                               "--seed", str(seed), "--data", data, "--out", out])
        if done.returncode:
            sys.exit(done.returncode)
        docs = read_docs(data / DATA.name)
        rows += rows_of({"model": name}, accuracies(Parcae.from_pretrained(out), docs))
    print()
    print_table(rows)


def by_seed(rows, name, T, p):
    """Return the accuracies of a model's seeds, a list."""
    return [row["accuracy"] for row in rows if (row["model"], row["T"], row["p"]) == (name, T, p)]


def print_table(rows):
    """Print the accuracy, mean and range of the seeds: a column for each p, a line for model, T."""
    hops = sorted({row["p"] for row in rows})
    print("right answers to p lookups in a row, mean of the seeds (range)")
    print(" " * 14 + "".join(f"p = {p:<15}" for p in hops))
    print("guess         " + "".join(f"{GUESSES[p]:7.2f}" + " " * 12 for p in hops))
    for name, T in sorted({(row["model"], row["T"]) for row in rows}):
        line = f"{name:8} T = {T:<2}"
        for p in hops:
            shares = by_seed(rows, name, T, p)
            span = f" ({min(shares):.2f}-{max(shares):.2f})" if len(shares) > 1 else " " * 12
            line += f"{np.mean(shares):7.3f}{span}"
        print(line)


LOOKUP = """Find the last time that this symbol
was there (red); go to what came next.

From the a at the end, no lookup gives a,
1 lookup c, 2 lookups b: each says only
where to look next, so p take p steps."""


def lookup(axes):
    """Draw two lookups in a string: each finds the red symbol and leads to the black one."""
    for i, symbol in enumerate("cbdacda"):
        color = {6: "k", 3: figures.RED, 4: "k", 0: figures.RED, 1: "k"}.get(i, "0.6")
        axes.text(i, 0, symbol, ha="center", va="center", fontsize=16, color=color)
    arrow = {"arrowstyle": "->", "connectionstyle": "arc3,rad=0.6", "color": figures.RED, "lw": 1.5}
    for number, start, end in (("1", 6, 4), ("2", 4, 1)):
        axes.annotate("", (end, 0.35), (start, 0.35), arrowprops=arrow)
        axes.text((start + end) / 2, 1.4, number, color=figures.RED, ha="center")
    axes.text(3, -0.8, LOOKUP, ha="center", va="top", fontsize=10)
    axes.set(xlim=(-1, 7), ylim=(-4, 3), title="A lookup")
    axes.axis("off")


def cells(axes, shares):
    """Draw shares (rows, columns) as cells in %, from white for 0.25 to blue for 1."""
    axes.imshow(shares, cmap="Blues", vmin=0.25, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5,
                  color="w" if share > 0.7 else "k")


def picture(path, rows):
    """Draw each model's accuracy, the mean of its seeds, for each number of lookups in a row and of
    loops at test time. rows: of the table."""
    tables = {}  # of each model: its numbers of loops T, its accuracies (p, T)
    for name in NAMES:
        loops = sorted({row["T"] for row in rows if row["model"] == name})
        if loops:
            tables[name] = loops, np.array([[np.mean(by_seed(rows, name, T, p)) for T in loops]
                                            for p in HOPS])
    figure = figures.pyplot().figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2.6])
    lookup(left.subplots())
    widths = [max(len(loops), 1.5) for loops, _ in tables.values()]
    every = right.subplots(1, len(tables), squeeze=False, width_ratios=widths)[0]
    for axes, (name, (loops, shares)) in zip(every, tables.items()):
        cells(axes, shares)
        axes.invert_yaxis()
        axes.set_yticks([])
        if len(loops) == 1:
            axes.set_xticks([0], [NAMES[name]])
            continue
        axes.set_xticks(range(len(loops)), loops)
        axes.set_xlabel("one layer, looped T times at test time")
        trained = next(row["mean_recurrence"] for row in rows if row["model"] == name)
        end, top = sum(T <= trained for T in loops) - 0.5, len(HOPS) - 0.45
        axes.axvline(end, color=figures.RED, lw=2)
        axes.text(end, top, f"mean of training: {trained} loops", color=figures.RED, ha="center")
    every[0].set_yticks(range(len(HOPS)), HOPS)
    every[0].set_ylabel(f"p lookups in a row (trained: {min(HOPS)} to {max(HOPS)})")
    right.suptitle("Each further loop brings one more lookup within reach\n"
                   "(right answers in % at equal training FLOPs; guesses get 26 to 51)",
                   fontsize=11)
    figures.save(figure, path)


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("source", type=Path, nargs="?", metavar="text|DIR|CSV",
        help="the word text, a directory of runs, or a table made before")
    add("out", type=Path, nargs="?", metavar="OUT", help="directory for the result")
    add("--quick", action="store_true", help="train and measure three small models")
    add("--seed", type=SEED, default=0, metavar="N", help="of --quick (default: 0)")
    args = parser.parse_args()
    if args.quick == (args.out is not None):
        parser.error("give a source and OUT, or --quick alone")
    if not args.quick:
        check_idle(parser, args, ["seed"], "only --quick trains")
        figures.pyplot()  # fail now if matplotlib is missing
    return args


def main():
    args = parse_args()
    if args.quick:
        quick(args.seed)
        return
    if str(args.source) == "text":
        SOURCES["p-hop"] = p_hop_docs
        prepare("p-hop", args.out)
        return
    if args.source.is_dir():
        runs = finished_rows(args.source, partial(read_run, docs=read_docs()))
        rows = [*chain.from_iterable(runs)]
        write_csv(args.out / "p-hop.csv", rows, COLUMNS)
    else:
        rows = read_table(args.source, COLUMNS)
    rows = by_rate(rows)
    print_table(rows)
    picture(args.out / "p-hop.png", rows)


if __name__ == "__main__":
    run_script(main)
