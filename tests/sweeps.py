"""Made-up sweeps of known laws, for tests."""

import math

import numpy as np

BUDGETS = (1e12, 2e12, 4e12, 8e12, 16e12)
RECURRENCES = (1, 2, 4, 6, 8, 12, 16)


def cost(mu):
    """FLOPs of a token of the model of size 1."""
    return 1e5 * (2 + mu)


def sweep(loss, noise=0.0, seeds=1, sizes=(1.0,), recurrences=RECURRENCES, seed=0):
    """A sweep of models of 1e5 parameters times each size.

    Log losses are those of loss(row), with noise of that standard deviation."""
    rng, rows = np.random.default_rng(seed), []
    for size in sizes:
        for flops in BUDGETS:
            for mu in recurrences:
                for number in range(seeds):
                    row = {
                        "model": f"made up {size:g}",
                        "params_core": 5e4 * size, "params_noncore": 5e4 * size,
                        "flops": flops, "accounting": "exact",
                        "mu_rec": float(mu), "mu_bwd": math.ceil(mu / 2),
                        "tokens": flops / (size * cost(mu)),
                        "recurrence": float(mu), "seed": number,
                    }
                    row["val_loss"] = loss(row) * math.exp(noise * rng.standard_normal())
                    rows.append(row)
    return rows


def parabolic(row, best=4.0):
    """A loss whose optimum is mu* = best (C / 4e12)^0.4."""
    best = best * (row["flops"] / 4e12) ** 0.4
    lowest = 1 + 2 * (row["flops"] / 1e12) ** -0.1
    return lowest * math.exp(0.02 * math.log(row["mu_rec"] / best) ** 2)


def parametric(row, phi=1.0):
    """L = 0.8 + 40 (N_noncore + mu^phi N_core)^-0.4 + 3e3 D^-0.6."""
    N = row["params_noncore"] + row["mu_rec"] ** phi * row["params_core"]
    return 0.8 + 40 * N ** -0.4 + 3e3 * row["tokens"] ** -0.6


def evaluated(rows, loops=(1, 2, 4, 8, 16)):
    """The rows, each evaluated at several T, as the unified law says."""
    result = []
    for row in rows:
        for n in sorted({row["mu_rec"], *loops}):
            loss = row["val_loss"] + 0.1 * math.exp(-2 * n / row["mu_rec"])
            result.append(row | {"recurrence": float(n), "val_loss": loss})
    return result


def chinchilla():
    """40 runs without loops: 8 sizes, 5 token counts, L = 1.7 + 400 N^-0.34 + 410 D^-0.28."""
    rows = []
    for params in np.geomspace(1e7, 1e10, 8):
        for tokens in np.geomspace(1e9, 1e11, 5):
            rows.append({
                "model": "plain", "params_core": 0.0, "params_noncore": params,
                "flops": 6 * params * tokens, "accounting": "6ND", "mu_rec": 1.0, "mu_bwd": 1.0,
                "tokens": tokens, "recurrence": 1.0, "seed": 0,
                "val_loss": 1.7 + 400 * params ** -0.34 + 410 * tokens ** -0.28,
            })
    return rows
