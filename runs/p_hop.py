"""How many lookups do how many loops do? The table and the picture of runs/p_hop.sh.

    python -m runs.p_hop out/p-hop results            the runs, OUT/p-hop.csv and OUT/p-hop.png
    python -m runs.p_hop results/p-hop.csv results    the table and picture again, from the table

Accuracy of the answers to questions of p hops, by p and by loops T, on the 1000 strings that
data.py keeps for validation. Runs are named MODEL-SEED; the picture is of looped, once and layers.
"""

from pathlib import Path

import numpy as np
import torch

from data import open_shard
from model import Parcae
from parts import figures
from parts.cli import UserError, progress_bar, run_script
from parts.comparable import changed_text, say_differences
from parts.generation import check_predicts
from parts.tables import write_csv
from runs.half import finished, parse_args, read_table

DATA = Path("data/p-hop/val_000000.bin")
LOOPS = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 32]
HOPS = range(9)
TRAINED = 8  # mean loops in runs/p_hop.sh; the table does not say
COLUMNS = {"model": str, "seed": int, "T": int, "p": int, "accuracy": float}


@torch.no_grad()
def accuracies(model, docs):
    """{T: [share of right answers to questions of p hops, for p in HOPS]}. Raises
    UserError where a prediction is not finite.

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
        result[T] = [all_right[hops == p].mean().item() for p in HOPS]
    return result


def read_docs():
    """The validation strings, (1000, 1 + 3 * questions) int64. Raises UserError."""
    if not DATA.exists():
        raise UserError(f"{DATA} does not exist: make it with python data.py p-hop")
    return torch.from_numpy(open_shard(DATA).astype(np.int64).reshape(1000, -1))


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
        for T, shares in accuracies(model, docs).items():
            for p, share in zip(HOPS, shares):
                rows.append({"model": name, "seed": int(seed), "T": T, "p": p,
                             "accuracy": round(share, 4)})
    return rows, trained


def by_seed(rows, name, T, p):
    """The accuracies of a model's seeds."""
    return [row["accuracy"] for row in rows if (row["model"], row["T"], row["p"]) == (name, T, p)]


def print_table(rows):
    """Accuracy by p, models and loops below each other: mean of the seeds (range)."""
    print("accuracy, mean of the seeds (range)")
    print(" " * 16 + "".join(f"p = {p}{'':13}" for p in HOPS))
    for name, T in sorted({(row["model"], row["T"]) for row in rows}):
        line = f"{name:8} T = {T:<3}"
        for p in HOPS:
            shares = by_seed(rows, name, T, p)
            line += f"{np.mean(shares):6.3f} ({min(shares):.2f}-{max(shares):.2f})"
        print(line)


def means(rows, name, T):
    """A model's accuracy at each p, the mean of the seeds; None where it was not trained."""
    if not by_seed(rows, name, T, 0):
        return None
    return [np.mean(by_seed(rows, name, T, p)) for p in HOPS]


def main():
    args = parse_args(__doc__)
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
    figures.p_hop(args.out / "p-hop.png", list(HOPS), loops, looped, means(rows, "once", 1),
                  means(rows, "layers", 1), trained)


if __name__ == "__main__":
    run_script(main)
