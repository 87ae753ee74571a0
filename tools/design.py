"""Is my evening enough? Simulate what a sweep would find, before you train it.

    python -m tools.design --budgets 4e12 8e12 1.6e13 --recurrences 1 2 4 8 16 --seeds 0 1 2

The training law fitted to a table serves as the truth. Losses of simulated sweeps are its
predictions plus the noise of real runs. The law and parabolas are then fitted to each sweep. A real
sweep has intervals at least as wide as the spread of these fits, since runs need not obey the law.
"""

import itertools
import math

import numpy as np
import torch

import scaling
from parts.cli import LOOPS, POSITIVE, SEED, Parser, UserError, number, run_script
from parts.laws import frontier, frontier_exponents, refits
from parts.tables import budgets_of, column, distinct_budgets, runs_in


def grid(size, cost, budgets, recurrences, seeds):
    """Return the rows of a sweep, without new losses. size: a row with the model's columns."""
    # `cost` leaves out odd mu: there mu_bwd = ceil(mu / 2) rounds up, for half the cost of a loop
    of_token = {}
    for mu in recurrences:
        rounding = (cost(mu + 1) - cost(mu)) / 2 if mu > 1 and mu % 2 else 0
        of_token[mu] = float(cost(mu) + rounding)
    return [size | {"flops": flops, "mu_rec": float(mu), "mu_bwd": math.ceil(mu / 2),
                    "tokens": flops / of_token[mu], "recurrence": float(mu), "seed": seed}
            for flops, mu, seed in itertools.product(budgets, recurrences, seeds)]


def simulate(fit, rows, cost, noise, repeats):
    """Return {"truth", "law", "parabola"}: the true optima and what both methods find in simulated
    sweeps with relative noise in the losses. Each is {"mu": log mu* (repeats, budgets),
    "exponent": (repeats,)}; the truth has one repeat."""
    rng = np.random.default_rng(0)
    log_loss = np.log(fit.predict(rows)) + noise * rng.standard_normal((repeats, len(rows)))
    budgets = budgets_of(rows)  # for recurrences and seeds; losses are those of each sweep
    flops = [budget.flops for budget in budgets]
    both = refits(fit, rows, torch.tensor(log_loss))  # the truth comes first
    mu = np.log([frontier(both, rows[0], cost, c)[0] for c in flops]).T
    exponent, _ = frontier_exponents(both, rows[0], cost, flops[0], flops[-1])
    found = {"truth": {"mu": mu[:1], "exponent": exponent[:1]},
             "law": {"mu": mu[1:], "exponent": exponent[1:]}}

    means = log_loss.reshape(repeats, len(budgets), len(budgets[0].mu), -1).mean(-1)  # over seeds
    mu = np.array([[scaling.bottom(*pair)[0] for pair in zip(budgets, one)] for one in means])
    low, high = budgets[0].log_mu[[0, -1]]
    exponents = [scaling.line_through(np.log(flops), one, low, high)[0] for one in mu]
    return found | {"parabola": {"mu": mu, "exponent": np.array(exponents)}}


def central(samples):
    """Return the 2.5%, 50% and 97.5% quantiles of the samples that are not NaN (they may be
    infinite), or three NaN if these are fewer than 20."""
    samples = samples[~np.isnan(samples)]
    if len(samples) < 20:
        return [math.nan] * 3
    return np.quantile(samples, [0.025, 0.5, 0.975], method="nearest")


def span(low, middle, high):
    """Return a median and its interval as text."""
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def design(args):
    """Print what a sweep would cost and find. Raise UserError if the flags do not allow that."""
    budgets, recurrences = distinct_budgets(args.budgets), sorted({*args.recurrences})
    if len(recurrences) < 3 or len(budgets) < 2:
        raise UserError("a design needs two budgets and three recurrences or more")
    out, table = scaling.fitted(args, resamples=0)
    noise = args.noise or (out["noise"] or {}).get("sd")
    if not noise:
        raise UserError("the noise of a run is unknown from these tables: give --noise, e.g. 0.003")
    rows = grid(table.rows[0], table.cost, budgets, recurrences, sorted({*args.seeds}))
    flops = column(rows, "flops").sum()
    print(f"{len(rows)} runs of {out['model']}, {flops:.3g} FLOPs: "
          f"{flops / args.speed / 3600:.1f} hours of one core or GPU at {args.speed:.2g} FLOP/s\n"
          f"{args.repeats} simulated sweeps; truth: the training law fitted to "
          f"{runs_in(table.rows)} runs; noise of a run: {noise:.2%} of the loss\n\n"
          "mu*: median [95% of sweeps]; 0 or inf: at the edge of the recurrences tried, or beyond\n"
          "     FLOPs       true   by training law      by parabolas         bottom inside")

    truth, law, parabola = simulate(table.fit, rows, table.cost, noise, args.repeats).values()
    for j, c in enumerate(budgets):
        by_law, by_parabola = (span(*np.exp(central(of["mu"][:, j]))) for of in (law, parabola))
        print(f"{c:10.3g}   {math.exp(truth['mu'][0, j]):8.2f}   {by_law:18s}   "
              f"{by_parabola:18s}   {np.isfinite(parabola['mu'][:, j]).mean():6.0%}")
    print(f"\nexponent of mu*: true {truth['exponent'][0]:.2f} (nan: mu* > 1 at too few budgets)")
    for label, of in (("by the law", law), ("by parabolas", parabola)):
        low, middle, high = central(of["exponent"])
        print(f"  {label:12s}  {span(low, middle, high)}, half width {(high - low) / 2:.2f}; "
              f"no exponent in {np.isnan(of['exponent']).mean():.0%} of sweeps")


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    scaling.add_table_flags(add, "--tables")
    add("--budgets", type=number(float, 1), nargs="+", required=True, metavar="C", help="FLOPs")
    add("--recurrences", type=LOOPS, nargs="+", required=True, metavar="MU",
        help="mean recurrences to try at each budget")
    add("--seeds", type=SEED, nargs="+", default=[0], metavar="N",
        help="seeds to train for each budget and recurrence, e.g. 0 1 2 (default: 0)")
    add("--noise", type=POSITIVE, metavar="SD",
        help="relative noise of a run's loss (default: estimated from the tables)")
    add("--speed", type=POSITIVE, default=2.8e10, metavar="F",
        help="FLOP/s of a core or GPU (default: %(default)g: AMD EPYC core, 16-channel model)")
    add("--repeats", type=number(int, 20), default=100, metavar="N",
        help="simulated sweeps, at least 20 (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the fits are so small that threads slow them down
    design(args)


if __name__ == "__main__":
    run_script(main)
