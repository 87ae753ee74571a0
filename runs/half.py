"""Does a looped model need only half the parameters? Make the table and picture of runs/half.sh.

    python -m runs.half out/half results            write half.csv and half.png in results
    python -m runs.half results/half.csv results    print and draw again, from the table

Runs are named MODEL-RATE-SEED. If there are several learning rates, each model is shown at the rate
that has most seeds; of several such, at the best for seed 0. With three other seeds, seed 0, which
chose the rate, does not count.
"""

import math

import numpy as np
import torch

from bench import kv_bytes
from model import Parcae, ParcaeConfig
from parts import figures
from parts.cli import UserError, run_script
from parts.reading import read_json
from runs.common import (
    at_one_rate,
    collect,
    finished,
    gain_text,
    loss_at,
    losses_of,
    pairs,
    parse_args,
    split_name,
)

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


def read_row(path):
    """Return the row of a run, None if it is not finished. Raises UserError."""
    name, rate, seed = split_name(path, "MODEL-RATE-SEED", NAMES)
    done = finished(path)
    if not done:
        return None
    config = read_json(path / "config.json")
    with torch.device("meta"):  # needs no weights to count its cost
        model = Parcae(ParcaeConfig(**config["model"]))
    T = model.config.mean_recurrence if model.config.n_recurrent else 1
    loss = loss_at(path, done, T)
    return {
        "model": name, "rate": rate, "seed": seed,
        "parameters": config["parameters"],
        "tokens": done["tokens"],
        "training_flops": f"{done['flops']:.4g}",
        "seconds": round(done["seconds"]),
        "inference_flops_per_token": model.flops_per_token(T, 0),
        "cache_bytes_per_token": kv_bytes(model.config, 1, T),
        "shared_cache_bytes_per_token": kv_bytes(model.config, 1, 1),
        "val_loss": loss,
        "bits_per_byte": round(loss / math.log(2), 5),
    } | {f"val_loss_{n}": f"{done['val_loss'][n]:.5f}" if n in done["val_loss"] else ""
         for n in LOOPS}


def by_model(rows):
    """Return {model: its rows by seed}, each model at one rate; print all rates tried."""
    found = {name: [row for row in rows if row["model"] == name] for name in NAMES}
    return {name: at_one_rate(NAMES[name], mine) for name, mine in found.items() if mine}


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


def print_comparison(loss):
    """Print the gains of looping, and its share of the gap to each larger transformer.

    loss: {model: {seed: val loss}}."""
    for name in ("plain", "longer", *VARIANTS):
        gained = pairs(loss.get("looped", {}), loss.get(name, {}))
        if len(gained):
            print(f"looped, less than {NAMES[name]}: {gain_text(gained)}")
    for name in ("deep", "wide"):
        if set.intersection(*(set(loss.get(one, ())) for one in ("plain", "looped", name))):
            share, shares = closed(loss, name)
            by_seed = ", ".join(f"{one:.0%}" for one in shares)
            bounds = fieller(*gain_and_gap(loss, name))
            interval = "{:.0%} to {:.0%}".format(*bounds) if bounds else "unbounded"
            print(f"share of the gap to {NAMES[name]} that looping closes: {share:.0%} "
                  f"({by_seed} by seed; 95%: {interval})")


def fieller(parts, wholes):
    """Return the 95% interval (low, high) of mean(parts) / mean(wholes), two lists with a value for
    each seed (Fieller 1954). None if it is unbounded, or if there is one seed."""
    if len(parts) < 2:
        return None
    t = STUDENT_T[min(len(parts), 10) - 2]
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


def main():
    args = parse_args(__doc__)
    name = args.source.name.removesuffix(".csv")
    runs = by_model(collect(args.source, args.out / f"{name}.csv", read_row, COLUMNS))
    print_table(runs)
    print_comparison({model: losses_of(rows) for model, rows in runs.items()})
    models = []
    for model, rows in runs.items():
        models.append({
            "label": NAMES[model],
            "looped": model in ("looped", *VARIANTS),
            "parameters": rows[0]["parameters"],
            "flops": float(rows[0]["training_flops"]),
            "losses": [row["val_loss"] for row in rows],
        })
    picture(args.out / f"{name}.png", models)


if __name__ == "__main__":
    run_script(main)
