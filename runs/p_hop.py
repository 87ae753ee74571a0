"""How many lookups do how many loops do? The table and the picture of runs/p_hop.sh.

    python -m runs.p_hop --quick                      a small one, three minutes with the training
    python -m runs.p_hop text data/p-hop              the text
    python -m runs.p_hop out/p-hop results            the runs, OUT/p-hop.csv and OUT/p-hop.png
    python -m runs.p_hop results/p-hop.csv results    the table and picture again, from the table

Accuracy of the answers to questions of p hops, by p and by loops T, on the 1000 strings that are
kept for validation. Runs are named MODEL-SEED; the picture is of looped, once and layers.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import prepare
from model import Parcae
from parts import figures
from parts.cli import Parser, UserError, progress_bar, run_script
from parts.comparable import changed_text, say_differences
from parts.generation import check_predicts
from parts.loader import open_shard
from parts.sources import SOURCES
from parts.tables import write_csv
from runs.half import finished, read_table

DATA = Path("data/p-hop/val_000000.bin")
LOOPS = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 32]
HOPS = range(9)
TRAINED = 8  # mean loops in runs/p_hop.sh; the table does not say
# of --quick: fewer lookups, and a layer that sees less text
QUICK_TEXT = {"n_train": 40_000, "n_val": 500, "questions": 32, "hops": 3}
QUICK = """--preset parcae-nano --n-embd 64 --n-head 4 --no-value-embeds
    --n-prelude 0 --n-recurrent 1 --n-coda 0 --block-size 96 --batch-size 16 --max-steps 800
    --muon-lr 4e-2 --adamw-lr 1e-2 --eval-sequences 16 --eval-every 1000 --overwrite""".split()
COLUMNS = {"model": str, "seed": int, "T": int, "p": int, "accuracy": float}


def p_hop_docs(n_train=100_000, n_val=1000, questions=64, hops=8, symbols=4, seed=0):
    """Return (train, val), lists of random strings with questions about them (p-hop induction,
    Sanford et al. 2024, arXiv 2402.09268).

    "3cA" reads: the string goes on with c; hop 3 times from here and you get to an a. A hop leads
    to what came after the last occurrence of the symbol one is at: p lookups in a row."""
    rng = np.random.default_rng(seed)
    # steps of 1 to symbols - 1: never the same symbol twice in a row
    steps = rng.integers(1, symbols, size=(n_train + n_val, questions))
    strings = steps.cumsum(axis=1) % symbols
    rows = zip(strings, rng.random(strings.shape))
    docs = [p_hop_doc(string.tolist(), chances.tolist(), hops) for string, chances in
            progress_bar(rows, total=len(strings), desc="p-hop", unit="doc")]
    return docs[:n_train], docs[n_train:]


def p_hop_doc(string, chances, hops):
    """Return a text with a question for each symbol of a string, a list of ints; chances in [0, 1)
    choose how many hops, at most `hops` and at most what the string so far allows.

    >>> p_hop_doc([0, 1, 0, 2], [0.9, 0.9, 0.9, 0.9], 8)  # from the second a one gets to the b
    '0aA0bB1aB0cC'
    """
    last = {}  # symbol: where it came last
    hop = []  # of each place, where a hop from it leads; None: its symbol is new
    longest = []  # of each place, how many hops can be made from it
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
    """{T: [share of right answers to questions of p hops, for p = 0, 1, ...]}. Raises UserError
    where a prediction is not finite.

    docs (N, 1 + 3 * questions): begin, then hops, symbol, answer, hops, symbol, answer, ..."""
    looped = model.config.n_recurrent > 0 and model.config.mean_recurrence > 1
    loops = LOOPS if looped else [1]
    hops = docs[:, 1::3] - ord("0")  # (N, questions)
    right = {T: [] for T in loops}
    for batch in docs.split(100):
        # One pass reads all T: what the head makes of the state after each loop.
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
    """The validation strings, (N, 1 + 3 * questions) int64. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path} does not exist: make it with python -m runs.p_hop text data/p-hop")
    tokens = open_shard(path).astype(np.int64)
    return torch.from_numpy(tokens.reshape((tokens == tokens[0]).sum(), -1))


def measure(folder):
    """Rows of all runs in a folder, and the mean loops in the training of the looped ones."""
    docs, rows, trained = read_docs(), [], TRAINED
    paths = sorted(folder.iterdir())
    say_differences(paths)
    for path in progress_bar(paths, unit="run"):
        name, _, seed = path.name.rpartition("-")
        if not name or not seed.isdigit():
            raise UserError(f"{path} is not named MODEL-SEED, as looped-0")
        if not finished(path):
            continue
        difference = changed_text(path, DATA.parent)
        if difference:
            print(difference)
        model = Parcae.from_pretrained(path)
        if name == "looped":
            trained = model.config.mean_recurrence
        rows += rows_of(name, int(seed), accuracies(model, docs))
    return rows, trained


def rows_of(name, seed, found):
    """The rows of a run, from its accuracies."""
    return [{"model": name, "seed": seed, "T": T, "p": p, "accuracy": round(share, 4)}
            for T, shares in found.items() for p, share in enumerate(shares)]


def quick():
    """Make a text of fewer lookups, train the layer run once and looped, and print what they
    answer."""
    data, root, rows = Path("data/p-hop-quick"), Path(__file__).parent.parent, []
    if not data.exists():
        SOURCES["p-hop"] = partial(p_hop_docs, **QUICK_TEXT)
        prepare("p-hop", data)
    for name, loops in (("once", 1), ("looped", 4)):
        out = Path("out/p-hop-quick", name)
        done = subprocess.run([sys.executable, root / "train.py", *QUICK, "--data", data,
                               "--mean-recurrence", str(loops), "--out", out])
        if done.returncode:
            sys.exit(done.returncode)
        docs = read_docs(data / DATA.name)
        rows += rows_of(name, 0, accuracies(Parcae.from_pretrained(out), docs))
    print()
    print_table(rows)


def by_seed(rows, name, T, p):
    """The accuracies of a model's seeds."""
    return [row["accuracy"] for row in rows if (row["model"], row["T"], row["p"]) == (name, T, p)]


def print_table(rows):
    """Accuracy by p, models and loops below each other: mean of the seeds, and their range."""
    hops = sorted({row["p"] for row in rows})
    print("right answers to p lookups in a row, mean of the seeds (range); guessing gives 0.25")
    print(" " * 14 + "".join(f"p = {p:<15}" for p in hops))
    for name, T in sorted({(row["model"], row["T"]) for row in rows}):
        line = f"{name:8} T = {T:<2}"
        for p in hops:
            shares = by_seed(rows, name, T, p)
            span = f" ({min(shares):.2f}-{max(shares):.2f})" if len(shares) > 1 else " " * 12
            line += f"{np.mean(shares):7.3f}{span}"
        print(line)


def means(rows, name, T):
    """A model's accuracy at each p, the mean of the seeds; None where it was not trained."""
    if not by_seed(rows, name, T, 0):
        return None
    return [np.mean(by_seed(rows, name, T, p)) for p in HOPS]


LOOKUP = """Find the last time that this symbol
was there (red); go to what came next.

From the a at the end, no lookup gives a,
1 lookup c, 2 lookups b: each says only
where to look next, so p take p steps."""


def lookup(axes):
    """Draw two lookups in a string: what each finds is red, where it gets to is black."""
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
    """Draw a table (rows, columns) of shares, from guessing (white) to 1 (blue), in %."""
    axes.imshow(shares, cmap="Blues", vmin=0.25, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5,
                  color="w" if share > 0.7 else "k")


def picture(path, hops, loops, looped, once, layers, trained):
    """Draw how many lookups in a row take how many loops.

    hops: numbers of lookups, p. loops: T at test time. looped: accuracy (p, T). once and layers:
    accuracy (p,) of the layer trained to run once and of eight layers, or None. trained: mean loops
    of training."""
    models = {"trained to\nrun once": once, "looped": looped, "eight\nlayers": layers}
    tables = {name: np.reshape(a, (len(hops), -1)) for name, a in models.items() if a is not None}
    figure = figures.pyplot().figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2.2])
    lookup(left.subplots())
    widths = [table.shape[1] for table in tables.values()]
    every = right.subplots(1, len(tables), squeeze=False, width_ratios=widths)[0]
    for axes, (name, table) in zip(every, tables.items()):
        cells(axes, table)
        axes.invert_yaxis()
        axes.set_xticks([0], [name])
        axes.set_yticks([])
        if name == "looped":
            axes.set_xticks(range(len(loops)), loops)
            axes.set_xlabel("one layer, looped T times at test time")
            end, top = sum(T <= trained for T in loops) - 0.5, len(hops) - 0.45
            axes.axvline(end, color=figures.RED, lw=2)
            axes.text(end, top, f"mean of training: {trained:g} loops", color=figures.RED,
                      ha="center")
    every[0].set_yticks(range(len(hops)), hops)
    every[0].set_ylabel(f"p lookups in a row (trained: {min(hops)} to {max(hops)})")
    right.suptitle("Each further loop brings one more lookup within reach\n"
                   "(right answers in %; guessing gives 25)", fontsize=11)
    figures.save(figure, path)


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("source", type=Path, nargs="?", metavar="text|DIR|CSV",
        help="the word text, a directory of runs, or the table of before")
    add("out", type=Path, nargs="?", metavar="OUT", help="directory for what is made of it")
    add("--quick", action="store_true", help="train a small layer, run once and looped")
    args = parser.parse_args()
    if args.quick == (args.out is not None):
        parser.error("give a source and OUT, or --quick alone")
    if not args.quick:
        figures.pyplot()  # where matplotlib is missing, say so now
    return args


def main():
    args = parse_args()
    if args.quick:
        quick()
        return
    if str(args.source) == "text":
        SOURCES["p-hop"] = p_hop_docs
        prepare("p-hop", args.out)
        return
    if args.source.is_dir():
        rows, trained = measure(args.source)
    else:
        rows, trained = read_table(args.source, COLUMNS), TRAINED
    if not rows:
        raise UserError(f"{args.source} holds no run")
    if args.source.is_dir():
        write_csv(args.out / "p-hop.csv", rows, COLUMNS)
    print_table(rows)
    loops = sorted({row["T"] for row in rows if row["model"] == "looped"})
    if not loops:
        raise UserError(f"{args.source} holds no looped model: no picture")
    looped = np.transpose([means(rows, "looped", T) for T in loops])  # (p, T)
    picture(args.out / "p-hop.png", list(HOPS), loops, looped, means(rows, "once", 1),
                  means(rows, "layers", 1), trained)


if __name__ == "__main__":
    run_script(main)
