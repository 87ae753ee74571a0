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
from parts.cli import run_script
from parts.reading import read_json
from runs.common import (
    collect,
    differences,
    each_at_one_rate,
    finished,
    gain_text,
    loss_at,
    losses_of,
    parse_args,
    split_name,
)

NAMES = {
    "looped": "looped, T = 8",
    "plain": "six layers, no loop",
    "longer": "six layers, equal FLOPs",
    "deep": "twelve layers",
    "wide": "six layers, 1.4 times as wide",
}
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
    for name in ("plain", "longer"):
        gained = differences(loss.get(name, {}), loss.get("looped", {}))
        if len(gained):
            print(f"looped, less than {NAMES[name]}: {gain_text(gained)}")
    for name in ("deep", "wide"):
        gain, gap = gain_and_gap(loss, name)
        if len(gain):
            by_seed = ", ".join(f"{one:.0%}" for one in gain / gap)
            bounds = fieller(gain, gap)
            interval = "{:.0%} to {:.0%}".format(*bounds) if bounds else "unbounded"
            print(f"share of the gap to {NAMES[name]} that looping closes: "
                  f"{gain.mean() / gap.mean():.0%} ({by_seed} by seed; 95%: {interval})")


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
    seeds that all three have. loss: {model: {seed: loss}}."""
    plain, looped, larger = (loss.get(model, {}) for model in ("plain", "looped", name))
    seeds = sorted(plain.keys() & looped.keys() & larger.keys())
    return (np.array([plain[seed] - looped[seed] for seed in seeds]),
            np.array([plain[seed] - larger[seed] for seed in seeds]))


def picture(path, runs):
    """Draw loss against size and against cost. runs: see each_at_one_rate."""
    figure, both = figures.panels(2, 9, 3.8)
    for axes, key, unit in zip(both, ("parameters", "training_flops"), (1e3, 1e12)):
        for name, rows in runs.items():
            color, shape = (figures.RED, "o") if name == "looped" else ("0.4", "s")
            x, losses = float(rows[0][key]) / unit, [row["val_loss"] for row in rows]
            axes.plot([x] * len(losses), losses, shape, color=color, alpha=0.7)
            # a name stands below its points; that of "plain" above, since "looped" is below
            end, away, va = (max, 8, "bottom") if name == "plain" else (min, -8, "top")
            axes.annotate(NAMES[name], (x, end(losses)), xytext=(0, away), ha="center", va=va,
                          textcoords="offset points", fontsize=8, color=color)
        axes.margins(0.4, 0.12)  # room for the names
    both[0].set(xlabel="parameters (thousands)", ylabel="val loss (nats per byte)",
                title="What it is worth: parameters")
    both[1].set(xlabel="training FLOPs (1e12)", title="What it costs: FLOPs")
    figures.save(figure, path)


def main():
    args = parse_args(__doc__)
    name = args.source.name.removesuffix(".csv")
    rows = collect(args.source, args.out / f"{name}.csv", read_row, COLUMNS)
    runs = each_at_one_rate(NAMES, rows)
    print_table(runs)
    print_comparison({model: losses_of(rows) for model, rows in runs.items()})
    picture(args.out / f"{name}.png", runs)


if __name__ == "__main__":
    run_script(main)
