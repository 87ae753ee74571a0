"""Which recurrences would the paper have found best if it had counted FLOPs exactly?

    python -m runs.paper --out out      seconds; writes OUT/paper.csv and OUT/paper.png

For each budget, table 6 of "Parcae" (arXiv 2604.12946) gives the best mean recurrence of a grid.
Its FLOPs count value embeddings as matmuls and leave out the tied head (appendix D), so a loop
seems cheaper than it is. The losses are not published. This script tries many laws L = E + X
(N_noncore + mu^phi N_core)^-x + Y D^-y, keeps each x, y and X/Y that predicts the recurrences of
table 6 (or comes nearest), and computes the optimum of these laws under exact FLOPs.
"""

import math
from pathlib import Path

import numpy as np
import torch

from model import PRESETS, Parcae, ParcaeConfig
from parts import figures
from parts.cli import Parser, run_script
from parts.laws import cost_between, lower_hull
from parts.tables import write_csv

GRID = np.array([1, 2, 4, 6, 8, 10, 12])  # the recurrences that the paper trained
TABLE_6 = {  # training FLOPs as the paper counts them: the best recurrence
    "140m": {1e18: 2, 2e18: 2, 4e18: 4, 8e18: 6, 16e18: 8, 64e18: 10},
    "370m": {32e18: 4, 64e18: 6, 128e18: 6},
}
MU = np.geomspace(1, 32, 200)
COLUMNS = ["model", "phi", "laws", "flops", "table_6", "published", "published_low",
           "published_high", "exact", "exact_low", "exact_high"]


def costs_and_size(name):
    """Return ({accounting: cost of a token at any mu}, N_noncore, N_core) of a published model."""
    costs = {"paper": {}, "exact": {}}
    with torch.device("meta"):  # shapes alone, no memory
        for mu in GRID.tolist():
            model = Parcae(ParcaeConfig(**PRESETS[f"parcae-{name}"] | {"mean_recurrence": mu}))
            for accounting, of_mu in costs.items():
                of_mu[mu] = model.flops_per_token(accounting=accounting)
    between = {accounting: cost_between(lower_hull(of_mu)) for accounting, of_mu in costs.items()}
    return between, *model.matmul_params()


def slope_of(flops, mu):
    return np.polyfit(np.log(flops), np.log(mu), 1)[0]


def rounding(mu):
    """Return (low, high), halfway to the grid's neighbours of each best recurrence in mu."""
    place, below, above = np.searchsorted(GRID, mu), [1, *GRID[:-1]], [*GRID[1:], 14]
    return np.sqrt(mu * np.take(below, place)), np.sqrt(mu * np.take(above, place))


def slopes_within(flops, low, high):
    """Return the 95% interval of slopes through points drawn log-uniformly from low to high."""
    share = np.random.default_rng(0).random((4000, len(flops)))
    drawn = low * (high / low) ** share
    return np.quantile([slope_of(flops, mu) for mu in drawn], [0.025, 0.975])


def optimum(x, y, ratio, phi, size, cost, flops, mu):
    """Return the recurrence in `mu` with the lowest loss, by law and budget: (laws, budgets).

    x, y and ratio (log of Y/X in units of the model and of a billion tokens): each (laws,)."""
    once, core = size
    N = (once + mu ** phi * core) / (once + core)
    best = []
    for c in flops:
        D = c / cost(mu) / 1e9
        loss = N ** -x[:, None] + np.exp(ratio[:, None]) * D ** -y[:, None]
        best.append(mu[loss.argmin(1)])
    return np.stack(best, 1)


def laws_of(table, phi, size, cost):
    """Return ((x, y, ratio) of the laws nearest to the table's recurrences, grid steps missed)."""
    x, y, ratio = (axis.ravel() for axis in np.meshgrid(
        np.geomspace(0.05, 1, 40), np.geomspace(0.05, 1, 40), np.linspace(-6, 8, 100)))
    flops, wanted = list(table), np.array(list(table.values()))
    picked = optimum(x, y, ratio, phi, size, cost, flops, GRID.astype(float))
    off = np.abs(np.searchsorted(GRID, picked) - np.searchsorted(GRID, wanted)).sum(1)
    keep = off == off.min()
    return (x[keep], y[keep], ratio[keep]), int(off.min())


def study(name):
    """Print what table 6 says about one model. Return the rows for the CSV file."""
    table = TABLE_6[name]
    flops, mu = np.array(list(table)), np.array(list(table.values()))
    costs, *size = costs_and_size(name)
    low, high = slopes_within(flops, *rounding(mu))
    tokens = flops / costs["paper"](mu)
    exact = tokens * costs["exact"](mu)
    print(f"\n{name}: {len(table)} budgets, mu* ~ C^{slope_of(flops, mu):.3f} as published "
          f"({low:.2f} to {high:.2f} by the grid's rounding alone), "
          f"C^{slope_of(exact, mu):.3f} with the same runs' exact FLOPs; "
          f"tokens ~ C^{slope_of(flops, tokens):.3f} and C^{slope_of(exact, tokens):.3f}")

    rows = []
    for phi in (0.38, 0.46, 1.0):
        laws, off = laws_of(table, phi, size, costs["paper"])
        found = {accounting: optimum(*laws, phi, size, cost, flops, MU)
                 for accounting, cost in costs.items()}
        slopes = {}
        for accounting, best in found.items():
            inside = [slope_of(flops[row > 1], row[row > 1]) for row in best if sum(row > 1) > 2]
            slopes[accounting] = np.quantile(inside, [0, 0.5, 1]) if inside else [math.nan] * 3
        missed = f", {off} grid steps off" if off else ""
        said = {name: "{1:.2f} ({0:.2f} to {2:.2f})".format(*of) for name, of in slopes.items()}
        print(f"  phi {phi:g}: {len(laws[0])} laws{missed}; exponent published {said['paper']}, "
              f"at equal exact FLOPs {said['exact']}")
        for j, c in enumerate(flops):
            row = {"model": name, "phi": phi, "laws": len(laws[0]), "flops": float(c),
                   "table_6": int(mu[j])}
            for accounting, key in (("paper", "published"), ("exact", "exact")):
                ends = np.quantile(found[accounting][:, j], [0, 0.5, 1])
                row |= {f"{key}_low": ends[0], key: ends[1], f"{key}_high": ends[2]}
            rows.append(row)
            print(f"    {c:7.3g} FLOPs: table {mu[j]:2d}; published count "
                  f"{row['published']:.1f} ({row['published_low']:.1f} to "
                  f"{row['published_high']:.1f}), exact {row['exact']:.1f} "
                  f"({row['exact_low']:.1f} to {row['exact_high']:.1f})")
    return rows


def panel_of(name, rows):
    """Return what picture draws for a model: the range over all phi, and the line for phi = 1."""
    mine = [row for row in rows if row["model"] == name]
    flops = list(TABLE_6[name])
    mu = np.array(list(TABLE_6[name].values()))
    panel = {"model": name, "flops": flops, "mu": mu, "rounding": list(rounding(mu))}
    for key in ("published", "exact"):
        low = [min(row[f"{key}_low"] for row in mine if row["flops"] == c) for c in flops]
        high = [max(row[f"{key}_high"] for row in mine if row["flops"] == c) for c in flops]
        line = [row[key] for row in mine if row["phi"] == 1]
        panel[key] = line, low, high
    return panel


def picture(path, models):
    """Draw the recurrences that the paper found best, and those of the laws at equal FLOPs.

    models: dicts with "model", "flops" and "mu" of table 6, "rounding" (low, high) of mu, and, from
    laws that pick the table's recurrences, "published" and "exact", each (line, low, high)."""
    figure, every = figures.panels(len(models), 4.5 * len(models), 4)
    counts = {"published": ("0.5", "the paper's FLOPs"), "exact": (figures.RED, "exact FLOPs")}
    for axes, model in zip(every, models):
        for key, (color, label) in counts.items():
            line, low, high = model[key]
            axes.fill_between(model["flops"], low, high, color=color, alpha=0.2, lw=0)
            axes.plot(model["flops"], line, color=color, label=f"laws at equal FLOPs: {label}")
        low, high = model["rounding"]
        axes.errorbar(model["flops"], model["mu"], [model["mu"] - low, high - model["mu"]],
                      fmt="ko", capsize=3, label="table 6, and its grid's rounding")
        axes.set(xscale="log", xlabel="training FLOPs", title=model["model"].upper())
        figures.loops_axis(axes, "best mean recurrence mu*", "y")
    every[0].legend(fontsize=8)
    figures.save(figure, path)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default="out", metavar="DIR",
                        help="directory for the table and the picture (default: %(default)s)")
    args = parser.parse_args()
    figures.pyplot()  # fail now if matplotlib is missing
    rows = [row for name in TABLE_6 for row in study(name)]
    write_csv(args.out / "paper.csv", rows, COLUMNS)
    picture(args.out / "paper.png", [panel_of(name, rows) for name in TABLE_6])
    print("wrote", args.out / "paper.csv", "and", args.out / "paper.png")


if __name__ == "__main__":
    run_script(main)
