"""Do scaling.py's 95% intervals contain the truth in 95% of sweeps? Fit simulated sweeps.

    python -m runs.coverage       minutes

A simulated sweep has the losses of the law that was fitted to results/, with noise. It prints how
often the intervals contain the true mu*. If the best recurrence is one loop, the lowest possible,
they must reach one.
"""

import numpy as np
import torch

from parts.chance import without_seed_effects
from parts.cli import COUNT, POSITIVE, Parser, progress_bar, run_script
from parts.laws import MU, exponents_of, fit_law, frontier, frontier_exponents, interval
from parts.tables import budgets_of, read_tables
from scaling import TABLES, fit_optima, fit_parabolas

BUDGETS = (4e12, 8e12, 1.6e13, 3.2e13)


def law_truth():
    """Return (rows, losses, cost, {budget: true mu*}, true exponent) of the training law fitted to
    the tables in results/."""
    _, table = fit_optima(*read_tables(TABLES), resamples=0)
    fit, cost, rows = table.fit, table.cost, table.rows
    best = {c: frontier(fit, rows[0], cost, c)[0][0] for c in BUDGETS}
    exponent = frontier_exponents(fit, rows[0], cost, BUDGETS[0], BUDGETS[-1])[0, 0]
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


METHODS = {"parabolas": by_parabola, "training law": by_law}


def holds(ci, truth, slack=1.0):
    """Return whether an interval contains the truth, up to a factor; None if an end is None."""
    return None if None in ci else ci[0] / slack <= truth <= ci[1] * slack


def coverage(truth, repeats, noise):
    """Return {method: {budget or "exponent": counts [hit, miss, no interval]}}."""
    rows, losses, cost, best, exponent = truth
    counts = {name: {key: [0, 0, 0] for key in (*BUDGETS, "exponent")} for name in METHODS}
    for i in progress_bar(range(repeats), desc=f"noise {noise:.1%}"):
        rng = np.random.default_rng([0, i])
        drawn = losses * np.exp(noise * rng.standard_normal(len(rows)))
        noisy = without_seed_effects(
            [row | {"val_loss": float(loss)} for row, loss in zip(rows, drawn)])
        for name, method in METHODS.items():
            intervals, ci = method(noisy, cost, i)
            held = {c: holds(of, best[c], MU[1] / MU[0]) for c, of in intervals.items()}
            held["exponent"] = holds(ci, exponent)
            for key, one in held.items():
                counts[name][key][[True, False, None].index(one)] += 1
    return counts


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--repeats", type=COUNT, default=100, metavar="N",
        help="sweeps for each noise level (default: %(default)s)")
    add("--noise", type=POSITIVE, nargs="+", default=[0.002, 0.0034, 0.01],
        metavar="SD", help="relative noise of the loss (default: 0.002 0.0034 0.01)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    truth = law_truth()
    *_, best, exponent = truth
    print("true mu*: " + ", ".join(f"{mu:.2f}" for mu in best.values())
          + f"; exponent {exponent:.2f}")
    for noise in args.noise:
        for name, counts in coverage(truth, args.repeats, noise).items():
            said = []
            for key, (held, missed, absent) in counts.items():
                label = key if key == "exponent" else f"{key:.2g}"
                without = f" (none in {absent})" if absent else ""
                said.append(f"{label} {held / max(1, held + missed):.0%}{without}")
            print(f"noise {noise:.2%}, {name}: intervals hold mu* at " + ", ".join(said))


if __name__ == "__main__":
    run_script(main)
