"""Does looping help if text, not compute, is scarce? Make the table and picture of runs/short.sh.

    python -m runs.short text data/short             make the text: 0.25 MB to train on, all of val
    python -m runs.short out/short results           read the runs, write short.csv and short.png
    python -m runs.short results/short.csv results   print and draw again, from the table

Runs are named MODEL-PASSES-RATE-SEED. Each model is shown, for each number of passes, at the rate
that has most seeds; of several such, at the best for seed 0. With three other seeds, seed 0, which
chose the rate, does not count.
"""

import shutil
from pathlib import Path

import numpy as np

import data
from parts import figures
from parts.cli import run_script
from parts.files import whole_directory
from parts.loader import open_shard
from parts.tokenizer import load_tokenizer, save_tokenizer
from runs.common import (
    at_one_rate,
    collect,
    differences,
    finished,
    gain_text,
    loss_at,
    losses_of,
    parse_args,
    split_name,
)

SOURCE = Path("data/stdlib")
PIECES, PIECE_TOKENS = 64, 4096  # the short text: pieces of the long one, at equal distances
NAMES = {
    "once": "run once",
    "late": "run once, looped in the last third",
    "looped": "looped, T = 4",
}
COLORS = {"once": "0.4", "late": "C0", "looped": figures.RED}
COLUMNS = {"model": str, "passes": int, "rate": float, "seed": int, "tokens": int, "flops": str,
           "seconds": int, "val_loss": float}


def make_text(out):
    """Write a data directory: its train text is made of pieces of SOURCE's train text, and its val
    text is that of SOURCE."""
    if not SOURCE.exists():
        data.prepare("stdlib", SOURCE)
    tokenizer = load_tokenizer(SOURCE)
    train = open_shard(SOURCE / "train_000000.bin")
    with whole_directory(out, data.check_replaceable) as directory:
        starts = np.linspace(0, len(train) - PIECE_TOKENS, PIECES).astype(int)
        n_train = data.write_shards(directory, "train",
                                    (train[i:i + PIECE_TOKENS] for i in starts),
                                    tokenizer.n_vocab)
        shutil.copyfile(SOURCE / "val_000000.bin", directory / "val_000000.bin")
        print(f"{out}: {n_train:,} train tokens")
        save_tokenizer(tokenizer, directory / "tokenizer.json",
                       data.fingerprint(directory, "pieces of stdlib", PIECES))


def read_row(path):
    """Return the row of a run, None if it is not finished. Raises UserError."""
    model, passes, rate, seed = split_name(path, "MODEL-PASSES-RATE-SEED", NAMES)
    done = finished(path)
    if not done:
        return None
    return {"model": model, "passes": passes, "rate": rate, "seed": seed,
            "tokens": done["tokens"], "flops": f"{done['flops']:.4g}",
            "seconds": round(done["seconds"]),
            "val_loss": loss_at(path, done, 1 if model == "once" else 4)}


def by_passes(rows):
    """Return {model: {passes: rows by seed}}, each at one rate; print all rates tried."""
    chosen = {}
    for name, label in NAMES.items():
        for passes in sorted({row["passes"] for row in rows if row["model"] == name}):
            mine = [row for row in rows if (row["model"], row["passes"]) == (name, passes)]
            chosen.setdefault(name, {})[passes] = at_one_rate(f"{label}, {passes} passes", mine)
    return chosen


def print_table(chosen):
    """Print the table of results/README.md, and how much lower each model's best loss is than the
    best loss without a loop."""
    passes = sorted({n for runs in chosen.values() for n in runs})
    print("\n| passes | " + " | ".join(map(str, passes)) + " |\n|" + "---|" * (len(passes) + 1))
    lowest = {}
    for name, runs in chosen.items():
        cells = []
        for n in passes:
            losses = [row["val_loss"] for row in runs.get(n, [])]
            seeds = ", ".join(f"{loss:.4f}" for loss in losses)
            cells.append(f"{np.mean(losses):.4f} ({seeds})" if losses else "")
        print(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
        lowest[name] = min(runs, key=lambda n: np.mean([row["val_loss"] for row in runs[n]]))
    others = [name for name in chosen if name != "once"]
    for name in others if "once" in chosen else ():
        gained = differences(losses_of(chosen["once"][lowest["once"]]),
                             losses_of(chosen[name][lowest[name]]))
        if len(gained):
            print(f"{NAMES[name]}, {lowest[name]} passes, below run once, {lowest['once']} passes: "
                  f"{gain_text(gained)}")


def picture(path, chosen):
    """Draw loss against passes over a short text, and against training FLOPs. chosen: see
    by_passes."""
    figure, both = figures.panels(2, 9, 3.8)
    for axes, key, unit in zip(both, ("passes", "flops"), (1, 1e12)):
        for name, runs in chosen.items():
            x = [np.mean([float(row[key]) for row in rows]) / unit for rows in runs.values()]
            losses = [[row["val_loss"] for row in rows] for rows in runs.values()]
            axes.plot(x, [*map(np.mean, losses)], color=COLORS[name], label=NAMES[name])
            for at, of_seeds in zip(x, losses):
                axes.plot([at] * len(of_seeds), of_seeds, ".", color=COLORS[name], alpha=0.7)
    both[0].set(xlabel="passes over the text", ylabel="val loss (nats per byte)",
                title="At equal passes")
    both[1].set(xlabel="training FLOPs (1e12)", title="At equal FLOPs")
    both[0].legend(fontsize=8)
    figures.save(figure, path)


def main():
    args = parse_args(__doc__)
    if str(args.source) == "text":
        make_text(args.out)
        return
    chosen = by_passes(collect(args.source, args.out / "short.csv", read_row, COLUMNS))
    print_table(chosen)
    picture(args.out / "short.png", chosen)


if __name__ == "__main__":
    run_script(main)
