"""Do the intervals of scaling.py hold what they promise? Fits of made-up sweeps of known laws.

    python -m runs.coverage           the power laws, two minutes
    python -m runs.coverage --laws    the training law and phi as well
"""

import math

import numpy as np
import torch
from tqdm import tqdm

import scaling
from common import COUNT, Parser, number, run_script

BUDGETS = (1e12, 2e12, 4e12, 8e12, 16e12)
RECURRENCES = (1, 2, 4, 6, 8, 12, 16)


def made_up(loss, noise, rng, sizes=(1.0,)):
    """A sweep of models of 1e5 parameters times each size.

    Log losses are those of loss(row), with noise of that standard deviation."""
    rows = []
    for size in sizes:
        for flops in BUDGETS:
            for mu in RECURRENCES:
                row = {
                    "model": f"made up {size:g}",
                    "params_core": 5e4 * size, "params_noncore": 5e4 * size,
                    "flops": flops, "accounting": "exact",
                    "mu_rec": float(mu), "mu_bwd": math.ceil(mu / 2),
                    "tokens": flops / (1e5 * size * (2 + mu)),
                    "recurrence": float(mu), "seed": 0,
                }
                row["val_loss"] = loss(row) * math.exp(noise * rng.standard_normal())
                rows.append(row)
    return rows


def parabolic(row, exponent=0.4, curvature=0.02):
    """A loss whose optimum is mu* = 4 (C / 4e12)^exponent."""
    best = 4 * (row["flops"] / 4e12) ** exponent
    lowest = 1 + 2 * (row["flops"] / 1e12) ** -0.1
    return lowest * math.exp(curvature * math.log(row["mu_rec"] / best) ** 2)


def parametric(row, phi=1.0):
    """L = 0.8 + 40 (N_noncore + mu^phi N_core)^-0.4 + 3e3 D^-0.6."""
    N = row["params_noncore"] + row["mu_rec"] ** phi * row["params_core"]
    return 0.8 + 40 * N ** -0.4 + 3e3 * row["tokens"] ** -0.6


def true_exponents():
    """What the fits should find. D* follows from mu*: tokens are C / (1e5 (2 + mu))."""
    log_c = np.log(BUDGETS)
    best = 4 * (np.exp(log_c) / 4e12) ** 0.4
    slope, _ = np.polyfit(log_c, log_c - np.log(2 + best), 1)
    return {"mu_rec": 0.4, "tokens": slope, "x": 0.4, "y": 0.6, "phi": 0.5}


def fit_laws(noise, rng, seed):
    """{exponent: (value, interval)} of the training law and of the worth of a recurrence."""
    rows = made_up(parametric, noise, rng)
    training = scaling.natural(scaling.fit_law("training", rows, seed=seed))
    rows = made_up(lambda row: parametric(row, 0.5), noise, rng, sizes=(0.5, 1, 2))
    worth = scaling.natural(scaling.fit_law("worth", rows, seed=seed))
    fits = {"x": training, "y": training, "phi": worth}
    return {name: (law[name], law["ci"][name]) for name, law in fits.items()}


def coverage(repeats, noise, laws=False, seed=0):
    """{exponent: (mean error, share of the 95 % intervals that hold the truth)} of made-up sweeps.

    laws: the exponents of the training law and phi, too; of those the median error, since now and
    then two terms change places."""
    truth = true_exponents()
    found = {name: [] for name in truth}
    for i in tqdm(range(repeats), desc=f"noise {noise:.1%}", leave=False, disable=None):
        rng = np.random.default_rng([seed, i])
        _, powers, _ = scaling.isoflop(made_up(parabolic, noise, rng), seed=i)
        for name, law in powers.items():
            found[name].append((law["exponent"], law["ci"]))
        if laws:
            for name, fit in fit_laws(noise, rng, i).items():
                found[name].append(fit)

    result = {}
    for name, fits in found.items():
        if fits:
            errors = [value - truth[name] for value, _ in fits]
            holds = [low <= truth[name] <= high for _, (low, high) in fits]
            middle = np.mean if name in ("mu_rec", "tokens") else np.median
            result[name] = middle(errors), np.mean(holds)
    return result


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--repeats", type=COUNT, default=200, metavar="N",
        help="sweeps for each noise level (default: %(default)s)")
    add("--noise", type=number(float, 0), nargs="+", default=[0.002, 0.005, 0.01], metavar="SD",
        help="of the loss, relative (default: 0.002 0.005 0.01)")
    add("--laws", action="store_true", help="the training law and phi as well: much longer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for noise in args.noise:
        parts = []
        for name, (error, share) in coverage(args.repeats, noise, args.laws).items():
            parts.append(f"{name} off by {error:+.4f}, interval holds the truth {share:.1%}")
        print(f"noise {noise:.1%}, {args.repeats} sweeps: " + "; ".join(parts))


if __name__ == "__main__":
    run_script(main)
