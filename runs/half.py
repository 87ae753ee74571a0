"""Does a looped model need only half the parameters? Make the table and picture of runs/half.sh.

    python -m runs.half out/half results            write half.csv and half.png in results
    python -m runs.half results/half.csv results    print and draw again, from the table

Runs are named MODEL-RATE-SEED. If there are several learning rates, each model is shown at the rate
at which its seed 0 has the lowest loss. With three other seeds, seed 0 itself does not count.
"""

import csv
import math
from pathlib import Path

import numpy as np
import torch

from bench import kv_bytes
from model import Parcae, ParcaeConfig
from parts import figures
from parts.cli import Parser, UserError, run_script
from parts.comparable import say_differences
from parts.reading import read_json
from parts.tables import last_line, write_csv

NAMES = {
    "looped": "looped, T = 8",
    "fixed": "always 8 loops in training",
    "full": "gradient through all loops",
    "mean4": "mean of 4 loops, T = 4",
    "mean16": "mean of 16 loops, T = 16",
    "plain": "six layers, no loop",
    "longer": "six layers, equal FLOPs",
    "deep": "twelve layers",
    "wide": "six layers, 1.4 times as wide",
}
VARIANTS = ("fixed", "full", "mean4", "mean16")  # of the looped model
LOOPS = ("1", "2", "4", "8", "16")  # at test time
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 95%, 1 to 9 degrees
COLUMNS = {
    "model": str, "rate": float, "seed": int, "parameters": int, "tokens": int,
    "training_flops": str, "seconds": float, "inference_flops_per_token": float,
    "cache_bytes_per_token": int, "shared_cache_bytes_per_token": int, "val_loss": float,
    "bits_per_byte": float,
} | {f"val_loss_{T}": str for T in LOOPS}  # "" where nothing loops


def read_table(path, columns):
    """Return the rows of a CSV file, dicts. columns: {name: type}. Raises UserError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
        return [{name: kind(line[name]) for name, kind in columns.items()} for line in lines]
    except (KeyError, TypeError, ValueError):
        needed = ", ".join(columns)
        raise UserError(f"{path} is not this experiment's table, with columns {needed}") from None


def finished(path):
    """Return the last line of a run's log. If the run is not finished, or a loss is not finite,
    print this and return None."""
    done = last_line(path)
    if done["kind"] != "done":
        print(f"{path} is not finished and is left out")
    elif not all(map(math.isfinite, done["val_loss"].values())):
        print(f"{path} has a loss that is not finite and is left out")
    else:
        return done
    return None


def finished_rows(folder, row_of):
    """Return the rows that row_of makes of the finished runs in a directory; print a warning if
    runs are hard to compare. Raises UserError if no run is finished."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    rows = [row for row in map(row_of, paths) if row]
    if not rows:
        raise UserError(f"{folder} holds no finished run")
    say_differences(paths)
    return rows


def read_row(path):
    """Return the row of a run, None if it is not finished. Raises UserError."""
    try:
        name, rate, seed = split_name(path.name)
    except ValueError:
        raise UserError(f"{path} is not named MODEL-RATE-SEED, like plain-3e-2-0") from None
    done = finished(path)
    if not done:
        return None
    config = read_json(path / "config.json")
    with torch.device("meta"):  # needs no weights to count its cost
        model = Parcae(ParcaeConfig(**config["model"]))
    T = model.config.mean_recurrence if model.config.n_recurrent else 1
    loss = done["val_loss"].get(str(T))
    if loss is None:
        raise UserError(f"{path} was not evaluated at its own mean of {T} loops")
    return {
        "model": name, "rate": rate, "seed": seed,
        "parameters": config["parameters"],
        "tokens": done["tokens"],
        "training_flops": f"{done['flops']:.4g}",
        "seconds": round(done["seconds"]),
        "inference_flops_per_token": model.flops_per_token(T, 0),
        "cache_bytes_per_token": kv_bytes(model.config, 1, T),
        "shared_cache_bytes_per_token": kv_bytes(model.config, 1, 1),
        "val_loss": round(loss, 5),
        "bits_per_byte": round(loss / math.log(2), 5),
    } | {f"val_loss_{n}": f"{done['val_loss'][n]:.5f}" if n in done["val_loss"] else ""
         for n in LOOPS}


def split_name(text):
    """Return (model, rate, seed) from the name of a run. Raises ValueError.

    >>> split_name("plain-3e-2-0")
    ('plain', 0.03, 0)
    """
    name, _, rest = text.partition("-")
    rate, _, seed = rest.rpartition("-")
    if name not in NAMES:
        raise ValueError
    return name, float(rate), int(seed)


def at_best_rate(rows):
    """Return {model: rows by seed} at the rate that is best for seed 0; print all rates tried."""
    runs = {}
    for name in NAMES:
        mine = [row for row in rows if row["model"] == name]
        if not mine:
            continue
        first = sorted((row for row in mine if row["seed"] == 0), key=lambda row: row["rate"])
        if not first:
            print(f"{NAMES[name]}: left out, as there is no run with seed 0")
            continue
        tried = ", ".join(f"{row['rate']:g}: {row['val_loss']:.4f}" for row in first)
        print(f"{NAMES[name]}: seed 0 by rate", tried)
        best = min(first, key=lambda row: row["val_loss"])["rate"]
        chosen = [row for row in mine if row["rate"] == best]
        others = [row for row in chosen if row["seed"]]
        if len(first) > 1 and len(others) >= 3:
            chosen = others
        runs[name] = sorted(chosen, key=lambda row: row["seed"])
    return runs


def print_table(runs):
    """Print the table of results/README.md."""
    print("| model | parameters | training FLOPs | inference FLOPs a token | cache of a token | "
          "val loss | bits per byte |\n|" + "---|" * 7)
    for name, rows in runs.items():
        row, losses = rows[0], [row["val_loss"] for row in rows]
        mean = np.mean(losses)
        seeds = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {NAMES[name]} | {row['parameters']:,} | {row['training_flops']} | "
              f"{row['inference_flops_per_token']:,.0f} | {row['cache_bytes_per_token']:,} B | "
              f"{mean:.4f} ({seeds}) | {mean / math.log(2):.3f} |")


def losses_of(rows):
    """Return {seed: val loss}."""
    return {row["seed"]: row["val_loss"] for row in rows}


def pairs(better, worse):
    """Return worse - better, (seeds,), for the seeds that both have.

    better, worse: {seed: loss} of two models."""
    seeds = sorted(better.keys() & worse.keys())
    return np.array([worse[seed] - better[seed] for seed in seeds])


def error_text(values):
    """Return, as text, the standard error of the mean of values; "-" for a single value."""
    return f"{np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else "-"


def gain_text(gained):
    """Return, as text, the mean of differences (seeds,), its standard error, and each of them."""
    return (f"{gained.mean():+.4f} nats (standard error {error_text(gained)}; "
            f"{', '.join(f'{one:+.4f}' for one in gained)})")


def print_comparison(runs):
    """Print the gains of looping, and its share of the gap to each larger transformer."""
    loss = {name: losses_of(rows) for name, rows in runs.items()}
    for name in ("plain", "longer", *VARIANTS):
        if {"looped", name} <= loss.keys():
            gained = pairs(loss["looped"], loss[name])
            print(f"looped, less than {NAMES[name]}: {gain_text(gained)}")
    for name in ("deep", "wide"):
        if {"plain", "looped", name} <= loss.keys():
            share, shares = closed(loss, name)
            by_seed = ", ".join(f"{one:.0%}" for one in shares)
            bounds = fieller(*gain_and_gap(loss, name))
            interval = "{:.0%} to {:.0%}".format(*bounds) if bounds else "unbounded"
            print(f"share of the gap to {NAMES[name]} that looping closes: {share:.0%} "
                  f"({by_seed} by seed; 95%: {interval})")


def fieller(parts, wholes):
    """Return the 95% interval (low, high) of mean(parts) / mean(wholes), two lists with a value for
    each of 2 to 10 seeds (Fieller 1954). None if it is unbounded."""
    if len(parts) < 2:
        return None
    t = STUDENT_T[len(parts) - 2]
    (v_part, covariance), (_, v_whole) = np.cov(parts, wholes) * t ** 2 / len(parts)
    # the ratios r for which mean(parts) - r mean(wholes) is within t standard errors of 0
    a = np.mean(wholes) ** 2 - v_whole
    b = np.mean(parts) * np.mean(wholes) - covariance
    root = b ** 2 - a * (np.mean(parts) ** 2 - v_part)
    if a <= 0 or root < 0:
        return None
    return (b - root ** 0.5) / a, (b + root ** 0.5) / a


def gain_and_gap(loss, name):
    """Return how much better "looped" and a larger model are than "plain", (seeds,) each, for the
    seeds that all three have. Raises UserError if there is none. loss: {model: {seed: loss}}."""
    seeds = sorted(loss["plain"].keys() & loss["looped"].keys() & loss[name].keys())
    if not seeds:
        raise UserError(f"plain, looped and {name} have no seed in common")
    plain, looped, larger = (np.array([loss[model][seed] for seed in seeds])
                             for model in ("plain", "looped", name))
    return plain - looped, plain - larger


def closed(loss, name):
    """Return the share of the gap between "plain" and a larger model that looping closes: a ratio
    of mean differences, and the share of each seed, (seeds,). Arguments are as in gain_and_gap."""
    gain, gap = gain_and_gap(loss, name)
    return gain.mean() / gap.mean(), gain / gap


def picture(path, models):
    """Draw loss against size and against cost.

    models: dicts with "label", "parameters", training "flops", "losses" of the seeds, "looped"."""
    figure, both = figures.panels(2, 9, 3.8)
    for axes, key, unit in zip(both, ("parameters", "flops"), (1e3, 1e12)):
        for model in models:
            color, shape = (figures.RED, "o") if model["looped"] else ("0.4", "s")
            x, losses = model[key] / unit, model["losses"]
            axes.plot([x] * len(losses), losses, shape, color=color, alpha=0.7)
            axes.annotate(model["label"], (x, min(losses)), xytext=(0, -8), ha="center", va="top",
                          textcoords="offset points", fontsize=8, color=color)
        axes.margins(0.4, 0.12)  # room for the names
    both[0].set(xlabel="parameters (thousands)", ylabel="val loss (nats per byte)",
                title="What it is worth: parameters")
    both[1].set(xlabel="training FLOPs (1e12)", title="What it costs: FLOPs")
    figures.save(figure, path)


def parse_args(about):
    """Return the arguments (source, out) of an experiment that makes a table and a picture. Raises
    UserError if matplotlib is missing, before any work is done."""
    parser = Parser(description=about)
    add = parser.add_argument
    add("source", type=Path, metavar="DIR|CSV", help="a directory of runs, or a table made before")
    add("out", type=Path, metavar="OUT", help="directory for the table and the picture")
    args = parser.parse_args()
    figures.pyplot()
    return args


def collect(args, name, read_row, columns):
    """Return the rows of an experiment: from its runs, by read_row(path), and write them to a table
    of this name; or from its table. Raises UserError."""
    if args.source.is_dir():
        rows = finished_rows(args.source, read_row)
        write_csv(args.out / name, rows, columns)
        return rows
    rows = read_table(args.source, columns)
    if not rows:
        raise UserError(f"{args.source} holds no finished run")
    return rows


def main():
    args = parse_args(__doc__)
    name = args.source.name.removesuffix(".csv")
    rows = collect(args, f"{name}.csv", read_row, COLUMNS)
    runs = at_best_rate(rows)
    print_table(runs)
    print_comparison(runs)
    models = []
    for model, mine in runs.items():
        models.append({
            "label": NAMES[model],
            "looped": model in ("looped", *VARIANTS),
            "parameters": mine[0]["parameters"],
            "flops": float(mine[0]["training_flops"]),
            "losses": [row["val_loss"] for row in mine],
        })
    if models:
        picture(args.out / f"{name}.png", models)


if __name__ == "__main__":
    run_script(main)
