"""What is chance in a table: the effects of seeds, the noise of a run, runs that diverged.

Runs that differ in their seed alone are a cell, {seed: log loss}. What a seed does to all runs
alike is taken out of the losses; what is left over within cells is the noise of a run.
"""

import itertools
import math
from collections import Counter

import numpy as np

from parts.tables import alike, column, comparable, rows_by_budget, run_key, trained_depth, unrolled

# ----------------------------------------------------------------------------- seeds


def cells_of(rows):
    """Return lists of rows that differ in their seed alone."""
    names = "model", "params_core", "params_noncore", "mu_rec", "mu_bwd", "recurrence"
    return [cell for budget in rows_by_budget(rows) for cell in alike(budget, *names)]


def seed_effects(cells):
    """Return ({seed: effect}, the squares that effects explain, their degrees of freedom).

    A seed is a block: it gives all runs the same order of the text. Its effect is the least squares
    of log loss = cell + seed, with mean 0, known where it shares two cells with another seed."""
    shared = Counter(pair for cell in cells for pair in itertools.combinations(sorted(cell), 2))
    known = sorted({seed for pair, times in shared.items() if times > 1 for seed in pair})
    if not known:
        return {}, 0.0, 0
    which, losses = [], []  # each run's seed and log loss, less the means of its cell
    for cell in cells:
        mine = [seed for seed in cell if seed in known]
        if mine:
            is_seed = np.equal.outer(mine, known).astype(float)  # (runs, seeds)
            which.append(is_seed - is_seed.mean(0))
            losses.append(np.array([cell[seed] for seed in mine]))
            losses[-1] -= losses[-1].mean()
    which, losses = np.concatenate(which), np.concatenate(losses)
    effects = np.linalg.pinv(which) @ losses  # of all that fit alike, those whose sum is 0
    squares = ((which @ effects) ** 2).sum()
    return dict(zip(known, effects.tolist())), squares, int(np.linalg.matrix_rank(which))


def without_seed_effects(rows):
    """Return the rows, at every T, without the effects that seeds have on each model's losses at
    T = mu_rec. These count as known then."""
    result = []
    for group in comparable(rows):
        cells = [{row["seed"]: math.log(row["val_loss"]) for row in cell}
                 for cell in cells_of(trained_depth(group))]
        effects = seed_effects(cells)[0]
        result += [row | {"val_loss": row["val_loss"] * math.exp(-effects.get(row["seed"], 0))}
                   for row in group]
    return result


def left_by_seeds(budgets):
    """Return (squares that means of cells and effects of seeds leave over, their freedom)."""
    cells = [cell for budget in budgets for cell in budget.cells.values()]
    squares = sum(len(cell) * np.var(list(cell.values())) for cell in cells)
    _, explained, used = seed_effects(cells)
    return max(squares - explained, 0), sum(map(len, cells)) - len(cells) - used


def seed_differences(budgets, noise):
    """Return {"effects": {seed: of its log losses}, "chance": how often chance alone makes seeds
    differ so much}; None where they are not known. budgets: their losses as measured."""
    effects, squares, freedom = seed_effects(
        [cell for budget in budgets for cell in budget.cells.values()])
    if not effects:
        return None
    return {"effects": {str(seed): effect for seed, effect in effects.items()},
            "chance": lack_of_fit(squares, freedom, noise)}


def lack_of_fit(squares, freedom, noise):
    """Return how often the noise of seeds alone leaves so many squares over: the tail of an F-test,
    by draws. Small: what was fitted is of the wrong form. None where there is nothing to test."""
    if freedom < 1 or noise is None or noise["source"] != "seeds":
        return None
    draws = np.random.default_rng(0).f(freedom, noise["freedom"], 20_000)
    return float(np.mean(draws >= squares / freedom / noise["sd"] ** 2))


def most_by_chance(noise, runs):
    """Return by how much of the loss the means of so many runs each differ by chance, 95 % of the
    time: Student's t, since the noise itself is not well known."""
    draws = np.random.default_rng(0).standard_t(noise["freedom"], 100_000)
    return float(np.quantile(np.abs(draws), 0.95) * noise["sd"] * math.sqrt(2 / runs))


def gains(budgets, noise):
    """Return (what looping gains over mu_rec = 1 at each budget, in val loss; how many runs have no
    pair). Seeds are pairs: one run with mu_rec = 1, one of the same seed without.

    Of several recurrences the best by chance looks better than it is. So each seed's pair is that
    of the recurrence that the other seeds gain most by. Where none has two pairs it is the best of
    all: "single", and biased upwards. "ci" is by the noise of a run."""
    result, alone = [], 0
    for budget in budgets:
        unlooped = {seed: math.exp(loss) for seed, loss in budget.cells.get(1, {}).items()}
        gained = {(seed, mu): unlooped[seed] - math.exp(loss)
                  for mu, cell in budget.cells.items() if mu != 1
                  for seed, loss in cell.items() if seed in unlooped}
        paired = {seed for seed, _ in gained}
        alone += budget.seeds.sum() - len(paired) - len(gained)
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

# One run that diverged makes the noise 20 % of the loss. A run is compared with what a fit to all
# other cells says. No such fit is quite right, so a run that misses it like the other seeds of its
# cell, its recurrence or its budget has not diverged.

TIMES = 8  # so often the noise of the others must a run be away
ENOUGH = 8  # degrees of freedom that a noise is known from
ALONE, SOUND = 2, 0.05  # a run alone in its cell: so often as far, and further than that
UNKNOWN = 0.04  # the noise, where too few say how large it is: a diverged run shows all the same


def without_diverged(rows, notes):
    """Return the rows, at every T, without runs that diverged: a note names each of those."""
    gone = set()
    for group in comparable(rows):
        for row, times in diverged(trained_depth(group))[1]:
            gone.add(run_key(row))
            notes.append("diverged and left out of everything: {model}, {flops:.3g} FLOPs, mu_rec "
                         "{mu_rec:g}, seed {seed}, val loss {val_loss:.4g}, ".format(**row)
                         + f"{times:.0f} times the noise of the others away")
    return [row for row in rows if run_key(row) not in gone]


def diverged(rows):
    """Return (rows, [(a row that diverged, how many times the noise of the others it is away)]).

    rows: at T = mu_rec, of one model; three at most in ten diverged. The furthest goes first, since
    it is in what the others are compared with."""
    kept, gone = list(rows), []
    while len(gone) < 0.3 * len(rows) and len(kept) > 3:
        away = distances(kept)
        if away.max() <= TIMES:
            break
        gone.append((kept.pop(int(away.argmax())), float(away.max())))
    return kept, gone


def distances(rows):
    """Return by how many times the noise of the others each run is away from them, (rows,)."""
    rows = [row | {"at": i} for i, row in enumerate(rows)]
    cells = [column(cell, "at") for cell in cells_of(rows)]
    terms = surface(rows)
    left = np.log(column(rows, "val_loss"))
    left -= predicted_by_others(terms, left, cells)
    away = np.abs(left)
    wider = [column(some, "at") for some in rows_by_budget(rows) + alike(rows, "mu_rec")]
    for at in cells + wider:
        for i in at if len(at) > 1 else ():
            away[i] = min(away[i], abs(left[i] - np.median(left[at[at != i]])))

    size, apart = np.empty((2, len(rows)))  # of each run's cell; from its mean
    for cell in cells:
        size[cell], apart[cell] = len(cell), left[cell] - left[cell].mean()
    several, part = size > 1, np.sqrt(1 - 1 / size)  # the mean follows each run of its cell
    noise_of_fit = max(typical(left), UNKNOWN if terms.shape[1] == 1 else 0)
    noise = min(noise_of_fit, UNKNOWN)
    if len(rows) - len(cells) >= ENOUGH:
        noise = typical(apart[several] / part[several])
    alone = away * (away > SOUND) / (ALONE * noise_of_fit)
    return np.where(several, away * part / noise, alone)


def surface(rows):
    """Return (rows, terms): what the log loss is a sum of, smooth in the logarithms of the unrolled
    model's size and the tokens; fewer where there are few runs, or two terms say the same."""
    n, d = (np.log(x) - np.log(x).mean() for x in (unrolled(rows), column(rows, "tokens")))
    most = 5 if len(rows) >= 6 + ENOUGH else 2 if len(rows) >= 3 + ENOUGH else 0
    terms = np.stack([n, d, n * n, n * d, d * d], 1)[:, :most]
    terms = (terms - terms.mean(0)) / (terms.std(0) + 1e-9)
    independent, size_of, _ = np.linalg.svd(terms, full_matrices=False)
    independent = independent[:, size_of > 0.03 * size_of.max(initial=0)]
    return np.column_stack([np.ones(len(rows)), independent * len(rows) ** 0.5])


def predicted_by_others(terms, log_loss, cells):
    """Return log losses (rows,), each from the least absolute errors of the runs of other cells, of
    which a bad one bends nothing; cells: positions."""
    counts = np.ones((len(log_loss), len(log_loss)))  # (fits, rows)
    for cell in cells:
        counts[np.ix_(cell, cell)] = 0
    ridge = 1e-9 * np.eye(terms.shape[1])
    weights = counts
    for _ in range(50):  # least squares, weighted until they are least absolute errors
        weighted = terms.T * weights[:, None]  # (fits, terms, rows)
        fitted = np.linalg.solve(weighted @ terms + ridge, weighted @ log_loss[:, None])[..., 0]
        weights = counts / np.maximum(np.abs(fitted @ terms.T - log_loss), 1e-4)
    return (fitted * terms).sum(1)


def typical(left):
    """Return the standard deviation of what is left over, read off its smaller sizes: 70 % of a
    normal distribution is within 1.036 of it."""
    return max(np.quantile(np.abs(left), 0.7) / 1.036, 1e-4)
