"""Do the intervals of scaling.py hold what they promise? Fits of made-up sweeps whose laws are known.

    python runs/coverage.py           the power laws, two minutes
    python runs/coverage.py --laws    the training law and phi as well
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent))
import scaling

BUDGETS, RECURRENCES = (1e12, 2e12, 4e12, 8e12, 16e12), (1, 2, 4, 6, 8, 12, 16)


def made_up(loss, noise, rng, sizes=(1.0,)):
    """A sweep, models of 1e5 parameters times each size, with log loss from loss(row) and noise of that standard deviation."""
    rows = [{"model": f"made up {s:g}", "params_core": 5e4 * s, "params_noncore": 5e4 * s, "flops": c, "accounting": "exact",
             "mu_rec": float(mu), "mu_bwd": math.ceil(mu / 2), "tokens": c / (1e5 * s * (2 + mu)), "recurrence": float(mu), "seed": 0}
            for s in sizes for c in BUDGETS for mu in RECURRENCES]
    return [row | {"val_loss": loss(row) * math.exp(noise * rng.standard_normal())} for row in rows]


def parabolic(row, exponent=0.4, curvature=0.02):
    """A loss whose optimum is mu* = 4 (C / 4e12)^exponent."""
    c, mu = row["flops"], row["mu_rec"]
    return (1 + 2 * (c / 1e12) ** -0.1) * math.exp(curvature * math.log(mu / (4 * (c / 4e12) ** exponent)) ** 2)


def parametric(row, phi=1.0):
    """L = 0.8 + 40 (N_noncore + mu^phi N_core)^-0.4 + 3e3 D^-0.6."""
    return 0.8 + 40 * (row["params_noncore"] + row["mu_rec"] ** phi * row["params_core"]) ** -0.4 + 3e3 * row["tokens"] ** -0.6


def coverage(repeats, noise, laws=False, seed=0):
    """{exponent: (mean error, share of the 95 % intervals that hold the truth)} over made-up sweeps of known laws; laws: those
    of the training law and phi too, and the median error for the mean, since now and then two terms change places."""
    x = np.log(BUDGETS)
    truth = {"mu_rec": 0.4, "tokens": np.polyfit(x, x - np.log(2 + 4 * (np.exp(x) / 4e12) ** 0.4), 1)[0], "x": 0.4, "y": 0.6, "phi": 0.5}
    found = {name: [] for name in truth}
    for i in tqdm(range(repeats), desc=f"noise {noise:.1%}", leave=False, disable=None):
        rng = np.random.default_rng([seed, i])
        for name, law in scaling.isoflop(made_up(parabolic, noise, rng), seed=i)[1].items():
            found[name].append((law["exponent"], law["ci"]))
        if laws:
            fit = scaling.natural(scaling.fit_law("training", made_up(parametric, noise, rng), seed=i))
            rows = made_up(lambda row: parametric(row, 0.5), noise, rng, sizes=(0.5, 1, 2))
            worth = scaling.natural(scaling.fit_law("worth", rows, seed=i))
            for name, law in (("x", fit), ("y", fit), ("phi", worth)):
                found[name].append((law[name], law["ci"][name]))
    middle = lambda name: np.mean if name in ("mu_rec", "tokens") else np.median
    return {name: (middle(name)([e - truth[name] for e, _ in f]), np.mean([ci[0] <= truth[name] <= ci[1] for _, ci in f]))
            for name, f in found.items() if f}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200, metavar="N", help="sweeps for each noise level (default: %(default)s)")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.002, 0.005, 0.01], metavar="SD",
                        help="of the loss, relative (default: 0.002 0.005 0.01)")
    parser.add_argument("--laws", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for noise in args.noise:
        print(f"noise {noise:.1%}, {args.repeats} sweeps: " + "; ".join(
            f"{name} off by {error:+.4f}, interval holds the truth {share:.1%}"
            for name, (error, share) in coverage(args.repeats, noise, args.laws).items()))
