"""Do scaling.py's 95% intervals contain the truth in 95% of sweeps? Fit simulated sweeps.

    python -m runs.coverage                    the law fitted to results/ is the truth: minutes
    python -m runs.coverage --truth parabola   the true optimum grows as C^0.4, from 4 to 9 loops

A simulated sweep has the losses of a known law, with noise. Prints how often the intervals contain
the true mu*. If the best recurrence is one loop, the lowest possible, they must reach one.
"""

import math

import numpy as np
import torch

from parts.chance import without_seed_effects
from parts.cli import COUNT, Parser, number, progress_bar, run_script
from parts.laws import MU, exponents_of, fit_law, frontier, frontier_exponents, interval
from parts.tables import budgets_of, read_tables
from scaling import TABLES, fit_optima, fit_parabolas
from tools.design import grid

BUDGETS = (4e12, 8e12, 1.6e13, 3.2e13)
RECURRENCES = (1, 2, 4, 8, 16, 32)
SIZE = {"model": "made up", "params_core": 5e4, "params_noncore": 5e4, "accounting": "exact"}


def parabola_truth():
    """Return (rows, losses, cost, true mu*, true exponent), with the optimum 4 (C / 4e12)^0.4."""
    def cost(mu):
        return 1e5 * (2 + np.asarray(mu))
    rows = grid(SIZE, cost, BUDGETS, RECURRENCES, [0])
    best = {c: 4 * (c / 4e12) ** 0.4 for c in BUDGETS}
    losses = []
    for row in rows:
        lowest = 1 + 2 * (row["flops"] / 1e12) ** -0.1
        away = math.log(row["mu_rec"] / best[row["flops"]])
        losses.append(lowest * math.exp(0.02 * away ** 2))
    return rows, np.array(losses), cost, best, 0.4


def law_truth():
    """Return what parabola_truth does, from the training law fitted to the tables in results/."""
    _, table = fit_optima(*read_tables(TABLES), resamples=0)
    fit, cost, rows = table.fit, table.cost, table.rows
    size = rows[0]
    best = {c: frontier(fit, size, cost, c)[0][0] for c in BUDGETS}
    exponent = frontier_exponents(fit, size, cost, BUDGETS[0], BUDGETS[-1])[0, 0]
    return rows, fit.predict(rows), cost, best, exponent


def by_parabola(rows, cost, seed):
    """Return ({flops: interval of mu*}, interval of the exponent) from fitted parabolas."""
    found = fit_parabolas(budgets_of(rows), cost, resamples=300, seed=seed)
    intervals = dict(zip(BUDGETS, (optimum["ci"] for optimum in found["isoflop"])))
    laws = found["power_laws"]
    return intervals, laws["mu_rec"]["ci"] if laws else [None, None]


def by_law(rows, cost, seed):
    """Return what by_parabola does, from a fitted training law, with 100 bootstrap resamples."""
    fit = fit_law("training", rows, starts=16, resamples=100, seed=seed)
    intervals = {c: interval(frontier(fit, rows[0], cost, c)[0]) for c in BUDGETS}
    return intervals, exponents_of(fit, rows[0], cost, np.array(BUDGETS))["mu_rec"]["ci"]


def holds(ci, truth):
    """Return whether an interval contains the truth, up to a step of MU; None if an end is None."""
    if None in ci:
        return None
    near = MU[1] / MU[0]
    return ci[0] / near <= truth <= ci[1] * near


def coverage(truth, repeats, noise, methods, seed=0):
    """Return {method: {budget or "exponent": counts [hit, miss, no interval]}}."""
    rows, losses, cost, best, exponent = truth
    counts = {name: {key: [0, 0, 0] for key in (*BUDGETS, "exponent")} for name in methods}
    for i in progress_bar(range(repeats), desc=f"noise {noise:.1%}"):
        rng = np.random.default_rng([seed, i])
        drawn = losses * np.exp(noise * rng.standard_normal(len(rows)))
        noisy = without_seed_effects(
            [row | {"val_loss": float(loss)} for row, loss in zip(rows, drawn)])
        for name, method in methods.items():
            intervals, ci = method(noisy, cost, i)
            held = {c: holds(of, best[c]) for c, of in intervals.items()}
            held["exponent"] = None if None in ci else ci[0] <= exponent <= ci[1]
            for key, one in held.items():
                counts[name][key][[True, False, None].index(one)] += 1
    return counts


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--truth", choices=("law", "parabola"), default="law", help="(default: law)")
    add("--repeats", type=COUNT, default=100, metavar="N",
        help="sweeps for each noise level (default: %(default)s)")
    add("--noise", type=number(float, 0, above=True), nargs="+", default=[0.002, 0.0034, 0.01],
        metavar="SD", help="relative noise of the loss (default: 0.002 0.0034 0.01)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    truth = law_truth() if args.truth == "law" else parabola_truth()
    methods = {"parabolas": by_parabola, "training law": by_law}
    if args.truth == "parabola":
        del methods["training law"]  # its optima do not have this form
    *_, best, exponent = truth
    print("true mu*: " + ", ".join(f"{mu:.2f}" for mu in best.values())
          + f"; exponent {exponent:.2f}")
    for noise in args.noise:
        for name, counts in coverage(truth, args.repeats, noise, methods).items():
            said = []
            for key, (held, missed, absent) in counts.items():
                label = key if key == "exponent" else f"{key:.2g}"
                without = f" (none in {absent})" if absent else ""
                said.append(f"{label} {held / max(1, held + missed):.0%}{without}")
            print(f"noise {noise:.2%}, {name}: intervals hold mu* at " + ", ".join(said))


if __name__ == "__main__":
    run_script(main)
