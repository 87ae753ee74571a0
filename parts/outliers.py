"""Diverged runs of a table: named and left out before anything is fitted.

One run that diverged makes the noise 20 % of the loss and turns every gain around. A run is
compared with the other seeds of its cell. Where it is alone, with what a law fitted to all other
runs says; no law is quite right, so a run that misses it like the others of its recurrence, or of
its budget, is none that diverged.
"""

import math

import numpy as np

from parts.tables import cells_of, column, comparable, rows_by_budget, run_key, trained_depth

TIMES = 8  # so often the noise of the others must a run be away
ENOUGH = 8  # degrees of freedom that a noise is known from
SHARE, NORMAL = 0.7, 1.036  # noise is read off this quantile of sizes, where a normal one has that
ALONE = 2  # a run alone in its cell: so often as far, as no law is quite right ...
SOUND = 0.05  # ... and further than that in log loss
UNKNOWN = 0.04  # the noise, where too few say how large it is: a diverged run shows all the same


def without_diverged(rows, notes):
    """The rows, at every T, without runs that diverged: a note names each of those."""
    gone = set()
    for group in comparable(rows):
        for row, times in diverged(trained_depth(group))[1]:
            gone.add(run_key(row))
            notes.append(f"diverged and left out of everything: {row['model']}, {row['flops']:.3g} "
                         f"FLOPs, mu_rec {row['mu_rec']:g}, seed {row['seed']}, val loss "
                         f"{row['val_loss']:.4g}, {times:.0f} times the noise of the others away")
    return [row for row in rows if run_key(row) not in gone]


def diverged(rows):
    """(rows, [(a row that diverged, how many times the noise of the others it is away)]).

    rows: at T = mu_rec, of one model; three at most in ten diverged. The furthest goes first, since
    it is in what the others are compared with."""
    kept, gone = list(rows), []
    while len(gone) < 0.3 * len(rows) and len(kept) > 3:
        away = distances(kept)
        worst = int(np.argmax(away))
        if away[worst] <= TIMES:
            break
        gone.append((kept.pop(worst), float(away[worst])))
    return kept, gone


def distances(rows):
    """By how many times the noise of the others each run is away from what is next to it, (rows,);
    0 where nothing can be said."""
    log_loss = np.log(column(rows, "val_loss"))
    cells = positions(rows, cells_of(rows))
    from_fit, noise_of_fit = away_from_fit(rows, log_loss, cells)
    left = [log_loss[cell] - log_loss[cell].mean() for cell in cells]
    left = np.concatenate([one * math.sqrt(len(one) / (len(one) - 1)) for one in left
                           if len(one) > 1] or [[]])
    noise = min(noise_of_fit, UNKNOWN)
    if len(left) - sum(len(cell) > 1 for cell in cells) >= ENOUGH:
        noise = typical(left)

    away = np.zeros(len(rows))
    for cell in cells:
        i = cell[np.argmax(from_fit[cell])]  # of two that differ the one further from the fit
        others = [j for j in cell if j != i]
        if others:
            differ = abs(log_loss[i] - np.median(log_loss[others]))
            away[i] = differ / math.sqrt(1 + 1 / len(others)) / noise
        elif from_fit[i] > SOUND:
            away[i] = from_fit[i] / noise_of_fit / ALONE
    return away


def away_from_fit(rows, log_loss, cells):
    """(how far each run is away from a fit to the other cells (rows,), the noise of that)."""
    cell = np.empty(len(rows), int)
    for number, members in enumerate(cells):
        cell[members] = number
    terms = surface(rows)
    left = log_loss - predicted_by_others(terms, log_loss, cell)
    away = np.abs(left)
    mu = column(rows, "mu_rec")
    recurrences = [np.flatnonzero(mu == one) for one in np.unique(mu)]
    for group in [*positions(rows, rows_by_budget(rows)), *recurrences]:
        for i in group:
            others = left[group[group != i]]
            if len(others) > 1:
                away[i] = min(away[i], abs(left[i] - np.median(others)))
    few = terms.shape[1] == 1
    return away, max(typical(left), UNKNOWN) if few else typical(left)


def surface(rows):
    """(rows, terms): what the log loss is a sum of, smooth in the logarithms of the unrolled
    model's size and of the tokens; fewer terms where there are few runs, or where two say the
    same."""
    size = column(rows, "params_noncore") + column(rows, "mu_rec") * column(rows, "params_core")
    n, d = (np.log(x) - np.log(x).mean() for x in (size, column(rows, "tokens")))
    most = 5 if len(rows) >= 6 + ENOUGH else 2 if len(rows) >= 3 + ENOUGH else 0
    terms = np.stack([n, d, n * n, n * d, d * d], 1)[:, :most]
    terms = (terms - terms.mean(0)) / (terms.std(0) + 1e-9)
    independent, size_of, _ = np.linalg.svd(terms, full_matrices=False)
    independent = independent[:, size_of > 0.03 * size_of.max(initial=0)]
    return np.column_stack([np.ones(len(rows)), independent * len(rows) ** 0.5])


def predicted_by_others(terms, log_loss, cell):
    """Log losses (rows,), each from the least absolute errors of the runs of other cells, of which
    a bad one bends nothing; cell: (rows,) numbers."""
    counts = (cell[:, None] != cell).astype(float)  # (fits, rows)
    ridge = 1e-9 * np.eye(terms.shape[1])
    weights = counts
    for _ in range(50):  # least squares, weighted until they are least absolute errors
        weighted = terms.T * weights[:, None]  # (fits, terms, rows)
        fitted = np.linalg.solve(weighted @ terms + ridge, weighted @ log_loss[:, None])[..., 0]
        weights = counts / np.maximum(np.abs(fitted @ terms.T - log_loss), 1e-4)
    return (fitted * terms).sum(1)


def typical(left):
    """The standard deviation of what is left over, read off its smaller sizes."""
    return max(np.quantile(np.abs(left), SHARE) / NORMAL, 1e-4)


def positions(rows, groups):
    """The positions (n,) of each group's rows."""
    at = {id(row): i for i, row in enumerate(rows)}
    return [np.array([at[id(row)] for row in group]) for group in groups]

