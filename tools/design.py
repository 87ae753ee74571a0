"""Is my evening enough? What a sweep would find of a known law, before anybody trains it.

    python -m tools.design --budgets 4e12 8e12 1.6e13 --recurrences 1 2 4 8 16 --seeds 0 1 2

The training law fitted to a table is taken for the truth. Made-up sweeps of the grid asked for get
the noise of real runs, and both methods, laws and parabolas, are let loose on them. The spread of
what they find is the interval to expect at best: real runs need not obey the law.
"""

import itertools
import math

import numpy as np
import torch

import scaling
from parts.cli import COUNT, LOOPS, POSITIVE, SEED, Parser, UserError, number, run_script
from parts.laws import frontier, frontier_exponents, refits
from parts.tables import budgets_of, column, distinct_budgets


def grid(size, cost, budgets, recurrences, seeds):
    """Return the rows of a sweep, val_loss still unknown; size: a row of the model."""
    return [size | {"flops": flops, "mu_rec": float(mu), "mu_bwd": math.ceil(mu / 2),
                    "tokens": flops / float(cost(mu)), "recurrence": float(mu), "seed": seed}
            for flops, mu, seed in itertools.product(budgets, recurrences, seeds)]


def simulate(fit, rows, cost, noise, repeats):
    """Return {"truth", "law", "parabola"}, what both methods find in made-up sweeps of a law with
    noise (relative) in the losses: each {"mu": log mu* (repeats, budgets), "exponent": (repeats,)},
    of the truth one repeat."""
    rng = np.random.default_rng(0)
    log_loss = np.log(fit.predict(rows)) + noise * rng.standard_normal((repeats, len(rows)))
    # of these only the recurrences and seeds are used: the losses are those of each sweep
    budgets = budgets_of([row | {"val_loss": 1.0} for row in rows])
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
    """Return the 2.5 %, 50 % and 97.5 % quantiles of samples without NaN; NaN of fewer than 20.
    Some may be infinite."""
    samples = samples[~np.isnan(samples)]
    if len(samples) < 20:
        return [math.nan] * 3
    return np.quantile(samples, [0.025, 0.5, 0.975], method="nearest")


def span(low, middle, high):
    """Return a number and its interval as text."""
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def design(args):
    """Print what a sweep would cost and find. Raises UserError."""
    budgets, recurrences = distinct_budgets(args.budgets), sorted({*args.recurrences})
    if len(recurrences) < 3 or len(budgets) < 2:
        raise UserError("a design needs two budgets and three recurrences at least")
    out, table = scaling.fitted(args, resamples=0)
    noise = args.noise or (out["noise"] or {}).get("sd")
    if not noise:
        raise UserError("these tables say nothing of the noise of a run: give --noise, as 0.003")
    rows = grid(table.rows[0], table.cost, budgets, recurrences, sorted({*args.seeds}))
    flops = column(rows, "flops").sum()
    print(f"{len(rows)} runs of {out['model']}, {flops:.3g} FLOPs: "
          f"{flops / args.speed / 3600:.1f} hours of one core or GPU at {args.speed:.2g} FLOP/s\n"
          f"taken for the truth: the training law of {out['runs']} runs; noise {noise:.2%} a run; "
          f"{args.repeats} made-up sweeps\n\n"
          "mu* [95 %]; 0 and inf: at the edge of the recurrences tried, or beyond\n"
          "     FLOPs       true   found by the law     by parabolas         inside")

    truth, law, parabola = simulate(table.fit, rows, table.cost, noise, args.repeats).values()
    for j, c in enumerate(budgets):
        by_law, by_parabola = (span(*np.exp(central(of["mu"][:, j]))) for of in (law, parabola))
        print(f"{c:10.3g}   {math.exp(truth['mu'][0, j]):8.2f}   {by_law:18s}   "
              f"{by_parabola:18s}   {np.isfinite(parabola['mu'][:, j]).mean():6.0%}")
    print(f"\nexponent of mu*: true {truth['exponent'][0]:.2f} (nan: these budgets are too small)")
    for label, of in (("by the law", law), ("by parabolas", parabola)):
        low, middle, high = central(of["exponent"])
        print(f"  {label:12s}  {span(low, middle, high)}, half width {(high - low) / 2:.2f}; none "
              f"in {np.isnan(of['exponent']).mean():.0%} of sweeps")


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    scaling.add_table_flags(add, "--tables")
    add("--budgets", type=number(float, 1), nargs="+", required=True, metavar="C", help="FLOPs")
    add("--recurrences", type=LOOPS, nargs="+", required=True, metavar="MU",
        help="mean recurrences to try at each budget")
    add("--seeds", type=SEED, nargs="+", default=[0], metavar="N",
        help="seeds of each cell, such as 0 1 2 for three (default: 0)")
    add("--noise", type=POSITIVE, metavar="SD",
        help="of a run's loss, relative (default: the tables')")
    add("--speed", type=POSITIVE, default=2.8e10, metavar="F",
        help="FLOP/s of a core or GPU (default: %(default)g, a core of an AMD EPYC, 16 channels)")
    add("--repeats", type=COUNT, default=100, metavar="N",
        help="made-up sweeps (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the fits are small: threads cost more than they bring
    design(args)


if __name__ == "__main__":
    run_script(main)
