"""Chance in a table of runs: seed effects, the noise of a run, runs that diverged.

Runs that differ only in their seed are a cell, {seed: log loss}. A seed's effect is what it does to
all runs alike; it is removed from the losses. The residuals within cells are the noise of a run.
"""

import itertools
import math
from collections import Counter

import numpy as np

from parts.tables import alike, column, comparable, rows_by_budget, run_key, trained_depth, unrolled

# ----------------------------------------------------------------------------- seeds


def cells_of(rows):
    """Return the rows in groups (lists) that differ only in their seed."""
    names = "model", "params_core", "params_noncore", "mu_rec", "mu_bwd", "recurrence"
    return [cell for budget in rows_by_budget(rows) for cell in alike(budget, *names)]


def seed_effects(cells):
    """Return ({seed: effect}, the sum of squares that effects explain, their degrees of freedom).

    A seed is a block, since it gives all runs the same order of the text. Effects come from a least
    squares fit of log loss = cell + seed and sum to 0. Seeds must share two cells with another."""
    shared = Counter(pair for cell in cells for pair in itertools.combinations(sorted(cell), 2))
    known = sorted({seed for pair, times in shared.items() if times > 1 for seed in pair})
    if not known:
        return {}, 0.0, 0
    which, losses = [], []  # each run's seed and log loss, minus the means of its cell
    for cell in cells:
        mine = [seed for seed in cell if seed in known]
        if mine:
            is_seed = np.equal.outer(mine, known).astype(float)  # (runs, seeds)
            which.append(is_seed - is_seed.mean(0))
            losses.append(np.array([cell[seed] for seed in mine]))
            losses[-1] -= losses[-1].mean()
    which, losses = np.concatenate(which), np.concatenate(losses)
    effects = np.linalg.pinv(which) @ losses  # pinv: of equally good fits, the one that sums to 0
    squares = ((which @ effects) ** 2).sum()
    return dict(zip(known, effects.tolist())), squares, int(np.linalg.matrix_rank(which))


def without_seed_effects(rows):
    """Return the rows, at every T, with seed effects removed from their losses. The effects are
    estimated for each model at T = mu_rec, and their errors are neglected afterwards."""
    result = []
    for group in comparable(rows):
        cells = [{row["seed"]: math.log(row["val_loss"]) for row in cell}
                 for cell in cells_of(trained_depth(group))]
        effects = seed_effects(cells)[0]
        result += [row | {"val_loss": row["val_loss"] * math.exp(-effects.get(row["seed"], 0))}
                   for row in group]
    return result


def left_by_seeds(budgets):
    """Return (residual sum of squares of log loss = cell + seed, its degrees of freedom)."""
    cells = [cell for budget in budgets for cell in budget.cells.values()]
    squares = sum(len(cell) * np.var(list(cell.values())) for cell in cells)
    _, explained, used = seed_effects(cells)
    return max(squares - explained, 0), sum(map(len, cells)) - len(cells) - used


def seed_differences(budgets, noise):
    """Return {"effects": {seed: effect on log loss}, "chance": p-value of an F-test that seeds have
    no effect}, or None if no effect is known. budgets: with losses as measured."""
    effects, squares, freedom = seed_effects(
        [cell for budget in budgets for cell in budget.cells.values()])
    if not effects:
        return None
    return {"effects": {str(seed): effect for seed, effect in effects.items()},
            "chance": lack_of_fit(squares, freedom, noise)}


def lack_of_fit(squares, freedom, noise):
    """Return the p-value of an F-test, by draws: how often the noise of seeds alone gives so large
    a sum of squares. If it is small, the fitted form is wrong. None if there is nothing to test."""
    if freedom < 1 or noise is None or noise["source"] != "seeds":
        return None
    draws = np.random.default_rng(0).f(freedom, noise["freedom"], 20_000)
    as_large = draws >= squares / freedom / noise["sd"] ** 2
    return float((as_large.sum() + 1) / (len(draws) + 1))  # never 0, which draws cannot show


def most_by_chance(noise, runs):
    """Return the relative difference that means of `runs` runs each do not exceed by chance in 95%
    of cases. It uses Student's t, since the noise is an estimate."""
    draws = np.random.default_rng(0).standard_t(noise["freedom"], 100_000)
    return float(np.quantile(np.abs(draws), 0.95) * noise["sd"] * math.sqrt(2 / runs))


def gains(budgets, noise):
    """Return (the gain in val loss of looping over mu_rec = 1 at each budget, the number of runs
    without a partner). A pair is a looped run and a run with mu_rec = 1 of the same seed.

    The best of several recurrences looks better than it is, by chance. So each seed takes the
    recurrence with which the other seeds gain most. If no recurrence has two pairs, the best pair
    is taken: it is "single", and biased upwards. "ci" comes from the noise of a run."""
    result, alone = [], 0
    for budget in budgets:
        unlooped = {seed: math.exp(loss) for seed, loss in budget.cells.get(1, {}).items()}
        gained = {(seed, mu): unlooped[seed] - math.exp(loss)
                  for mu, cell in budget.cells.items() if mu != 1
                  for seed, loss in cell.items() if seed in unlooped}
        paired = len(gained) + len({seed for seed, _ in gained})  # looped runs and their partners
        alone += budget.seeds.sum() - paired
        if not gained:
            continue
        by_others = {seed: {} for seed in unlooped}  # {seed: {mu_rec: mean gain of other seeds}}
        for seed, mu in gained:
            others = [gain for (other, its), gain in gained.items() if its == mu and other != seed]
            if others:
                by_others[seed][mu] = np.mean(others)
        pairs = [(seed, max(means, key=means.get)) for seed, means in by_others.items() if means]
        chosen = pairs or [max(gained, key=gained.get)]
        by_seed = [gained[pair] for pair in chosen]
        gain, ci = float(np.mean(by_seed)), [None, None]
        if noise:
            most = most_by_chance(noise, len(by_seed)) * np.mean(list(unlooped.values()))
            ci = [float(gain - most), float(gain + most)]
        result.append({"flops": budget.flops, "mu_rec": sorted({mu for _, mu in chosen}),
                       "gain": gain, "ci": ci, "by_seed": by_seed, "single": not pairs})
    return result, int(alone)

# ----------------------------------------------------------------------------- runs that diverged

# A single diverged run would raise the noise to 20% of the loss. So each run is compared with a fit
# to all other cells. No such fit is exact: a run that deviates from it like the other seeds of its
# cell, or like the other runs of its recurrence or its budget, has not diverged.

TIMES = 8  # a run has diverged if it is further away than this many times the noise of the others
ENOUGH = 8  # degrees of freedom that suffice to estimate the noise
ALONE, SOUND = 2, 0.05  # a run alone in its cell: this many times as far, and further than 5%
UNKNOWN = 0.04  # the noise assumed where too few runs determine it; diverged runs are far beyond


def without_diverged(rows, notes):
    """Return the rows, at every T, without runs that diverged. Add a note that names each."""
    gone = set()
    for group in comparable(rows):
        for row, times in diverged(trained_depth(group))[1]:
            gone.add(run_key(row))
            notes.append("diverged and left out of everything: {model}, {flops:.3g} FLOPs, mu_rec "
                         "{mu_rec:g}, seed {seed}, val loss {val_loss:.4g}, ".format(**row)
                         + f"away from the other runs by {times:.0f} times the noise")
    return [row for row in rows if run_key(row) not in gone]


def diverged(rows):
    """Return (the rows that did not diverge, [(a row that did, its distance)]): see distances.

    rows: at T = mu_rec, of one model; at most 30% may have diverged. The furthest run is removed
    first, because the others are compared with it."""
    kept, gone = list(rows), []
    while len(gone) < 0.3 * len(rows) and len(kept) > 3:
        away = distances(kept)
        if away.max() <= TIMES:
            break
        gone.append((kept.pop(int(away.argmax())), float(away.max())))
    return kept, gone


def distances(rows):
    """Return how far each run is away from the other runs, in units of their noise, (rows,)."""
    rows = [row | {"at": i} for i, row in enumerate(rows)]
    cells = [column(cell, "at") for cell in cells_of(rows)]
    terms = surface(rows)
    residuals = np.log(column(rows, "val_loss"))
    residuals -= predicted_by_others(terms, residuals, cells)
    away = np.abs(residuals)
    wider = [column(some, "at") for some in rows_by_budget(rows) + alike(rows, "mu_rec")]
    for at in cells + wider:
        for i in at if len(at) > 1 else ():
            away[i] = min(away[i], abs(residuals[i] - np.median(residuals[at[at != i]])))

    size, apart = np.empty((2, len(rows)))  # runs in each run's cell; distance from its mean
    for cell in cells:
        size[cell], apart[cell] = len(cell), residuals[cell] - residuals[cell].mean()
    several, part = size > 1, np.sqrt(1 - 1 / size)  # a run shifts its cell's mean
    # the noise around the fit; few runs allow only a constant, whose residuals may be too small
    noise_of_fit = typical(residuals)
    if terms.shape[1] == 1:
        noise_of_fit = max(noise_of_fit, UNKNOWN)
    # the noise between seeds, from the cells if they have enough runs
    noise = min(noise_of_fit, UNKNOWN)
    if len(rows) - len(cells) >= ENOUGH:
        noise = typical(apart[several] / part[several])
    # a run alone in its cell can only be compared with the fit, so it must be further away
    alone = np.where(away > SOUND, away / (ALONE * noise_of_fit), 0)
    return np.where(several, away * part / noise, alone)


def surface(rows):
    """Return (rows, terms), regressors for the log loss: a quadratic in the logarithms of unrolled
    size and tokens, with fewer terms if there are few runs or if terms are collinear."""
    n, d = (np.log(x) - np.log(x).mean() for x in (unrolled(rows), column(rows, "tokens")))
    most = 5 if len(rows) >= 6 + ENOUGH else 2 if len(rows) >= 3 + ENOUGH else 0
    terms = np.stack([n, d, n * n, n * d, d * d], 1)[:, :most]
    terms = (terms - terms.mean(0)) / (terms.std(0) + 1e-9)
    independent, size_of, _ = np.linalg.svd(terms, full_matrices=False)
    independent = independent[:, size_of > 0.03 * size_of.max(initial=0)]
    return np.column_stack([np.ones(len(rows)), independent * len(rows) ** 0.5])


def predicted_by_others(terms, log_loss, cells):
    """Return log losses (rows,), each predicted by a fit to the runs of all other cells. The fit
    minimises absolute errors, so that outliers hardly move it. cells: positions of their rows."""
    counts = np.ones((len(log_loss), len(log_loss)))  # (fits, rows)
    for cell in cells:
        counts[np.ix_(cell, cell)] = 0
    ridge = 1e-9 * np.eye(terms.shape[1])
    weights = counts
    for _ in range(50):  # least squares, reweighted until they are least absolute errors
        weighted = terms.T * weights[:, None]  # (fits, terms, rows)
        fitted = np.linalg.solve(weighted @ terms + ridge, weighted @ log_loss[:, None])[..., 0]
        weights = counts / np.maximum(np.abs(fitted @ terms.T - log_loss), 1e-4)
    return (fitted * terms).sum(1)


def typical(residuals):
    """Return the standard deviation of residuals, estimated robustly from their 70% quantile: 70%
    of a normal distribution lie within 1.036 standard deviations."""
    return max(np.quantile(np.abs(residuals), 0.7) / 1.036, 1e-4)
