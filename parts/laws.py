"""Parametric laws of the loss: fit hundreds at once, and find the best recurrence under a law.

To add a law, write its prediction and add an entry to LAWS: scaling.py fits it to the runs at
T = mu_rec. The laws and their letters are those of §5 of "Parcae" (arXiv 2604.12946) and of "How
Much Is One Recurrence Worth?" (arXiv 2604.21106). As in approach 3 of Hoffmann et al. 2022, a fit
minimises the Huber loss of the residuals of the log loss, from random starting points.
"""

import math
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import torch

from parts.cli import progress_bar
from parts.tables import alike, column, distinct, rows_by_budget, run_key, unrolled

DELTA = 1e-3  # of the Huber loss: larger residuals of the log loss count linearly
RESAMPLES = 200  # bootstrap resamples

# A parameter starts between low and high times `scale`: the "lowest" loss, the "span" of the losses
# or "one". domain: "log" (above 0, fitted as its logarithm), "from 0" (0 or more) or "any". per:
# ("N", "x") for the X of X N^-x. The fit measures N in units of N0; summary() returns X N0^x.
Parameter = namedtuple("Parameter", "low high scale domain per", defaults=("log", None))

ASYMPTOTE = Parameter(0, 0.98, "lowest", "from 0")
POWER = Parameter(0.1, 1.5, "one")
TERM = Parameter(0.05, 1, "span")


# The predictions, from parameters p and runs r (see runs_of). N is the unrolled model's size.

def training(p, r, phi=1):
    """Return E + X N^-x + Y D^-y, N = N_noncore + mu^phi N_core. phi = 1: a loop is a layer."""
    N = r.noncore + r.mu ** phi * r.core
    return p.E + p.X * N ** -p.x + p.Y * r.D ** -p.y


def unified(p, r):
    """Return the training law's loss + Z exp(-z T / mu), for T loops at evaluation."""
    return training(p, r) + p.Z * torch.exp(-p.z * r.loops / r.mu)


def worth(p, r):
    """Return the training law's loss with a fitted phi (A, alpha, B, beta in arXiv 2604.21106)."""
    return training(p, r, p.phi)


# rows: the field of scaling.Table with the rows to fit
Law = namedtuple("Law", "name predict parameters rows", defaults=("rows",))
POWERS = {"E": ASYMPTOTE, "X": TERM._replace(per=("N", "x")), "x": POWER,
          "Y": TERM._replace(per=("D", "y")), "y": POWER}

LAWS = {law.name: law for law in (
    Law("training", training, POWERS),
    Law("unified", unified, POWERS | {"Z": TERM, "z": Parameter(0.2, 3, "one")}, "at_every_T"),
    Law("worth", worth, POWERS | {"phi": Parameter(0, 1, "one", "any")}, "every_model"),
)}

# ----------------------------------------------------------------------------- fitting


def reasons_against(law, rows):
    """Return why the rows do not determine a law's parameters, a list of texts. law: a name."""
    values = {"sizes of the unrolled model": unrolled(rows), "token counts": column(rows, "tokens")}
    if LAWS[law].rows == "at_every_T":
        loops = column(rows, "recurrence") / column(rows, "mu_rec")
        values["values of T / mu_rec at evaluation"] = loops
    reasons = [f"{len({*some})} {name}, but the law needs 3"
               for name, some in values.items() if len({*some}) < 3]
    if LAWS[law].rows == "every_model" and distinct(rows, "params_core", "params_noncore") < 2:
        reasons.append("1 size of model, but the law needs 2")
    if len(rows) <= len(LAWS[law].parameters):
        reasons.append(f"{len(rows)} rows for {len(LAWS[law].parameters)} parameters")
    if distinct(rows, "val_loss") == 1:
        reasons.append("all losses are equal")
    return reasons


def runs_of(rows, units):
    """Return the columns that laws read, float64 tensors (rows,), with N and D in `units`."""
    noncore, core, tokens, mu, loops = (
        torch.tensor(column(rows, name), dtype=torch.float64)
        for name in ("params_noncore", "params_core", "tokens", "mu_rec", "recurrence"))
    return SimpleNamespace(noncore=noncore / units["N"], core=core / units["N"],
                           D=tokens / units["D"], mu=mu, loops=loops)


def named(law, theta):
    """Return theta (..., parameters) as named parameters, each (...,), logarithms undone."""
    values = zip(law.parameters.items(), theta.unbind(-1))
    return SimpleNamespace(**{name: value.exp() if parameter.domain == "log" else value
                              for (name, parameter), value in values})


def start_ranges(law, losses):
    """Return the lowest and highest starting theta for fits to these losses, (2, parameters)."""
    scales = {"lowest": losses.min(), "span": max(np.ptp(losses), 1e-3), "one": 1.0}
    ends = []
    for low, high, scale, domain, _ in law.parameters.values():
        pair = np.array([low, high]) * scales[scale]
        ends.append(np.log(pair) if domain == "log" else pair)
    return torch.tensor(np.array(ends)).T


def minimise(law, runs, log_loss, theta, weights=None, steps=2000):
    """Return (theta, objective (fits,)) after hundreds of independent fits at once, by
    Levenberg-Marquardt on the Huber loss (scipy makes one fit at a time).

    theta: (fits, parameters), the starting points. log_loss: (rows,) or (fits, rows). weights:
    (fits, rows), how often each row counts."""
    def predict(one):
        return law.predict(named(law, one), runs).log()
    predict_all = torch.func.vmap(predict)
    jacobian_of = torch.func.vmap(torch.func.jacfwd(predict))

    fits, rows = len(theta), log_loss.shape[-1]
    log_loss = log_loss.expand(fits, rows)
    weights = torch.ones(fits, rows).double() if weights is None else weights
    bounds = {"log": -40.0, "from 0": 0.0, "any": -math.inf}
    lowest = torch.tensor([bounds[p.domain] for p in law.parameters.values()]).double()

    def objective(some, i):
        error = (predict_all(some) - log_loss[i]).abs()
        huber = torch.where(error < DELTA, error ** 2 / 2, DELTA * (error - DELTA / 2))
        return (huber * weights[i]).sum(1)

    theta = theta.clone()
    todo = torch.arange(fits)  # the fits that have not converged
    best = objective(theta, todo)
    damping = torch.full((fits,), 1e-3, dtype=torch.float64)
    bar = progress_bar(total=fits, desc=f"{law.name} law: fits that have converged", delay=1)
    for _ in range(steps):
        old = theta[todo]
        error = predict_all(old) - log_loss[todo]  # (fits, rows)
        step = damped_step(error, jacobian_of(old), weights[todo], damping[todo], old <= lowest)
        new = torch.maximum(old - step, lowest)
        value = objective(new, todo)
        gained = best[todo] - value
        accepted = gained > 0
        moved = todo[accepted]
        theta[moved], best[moved] = new[accepted], value[accepted]
        # A fit is done if a step with little damping gains nothing, or if even tiny steps fail.
        flat = accepted & (gained <= 1e-8 * value + 1e-12) & (damping[todo] < 0.1)
        stuck = ~accepted & (damping[todo] > 1e9)
        damping[todo] = torch.where(accepted, damping[todo] / 5, damping[todo] * 4).clamp(1e-12)
        todo = todo[~(flat | stuck)]
        bar.update(fits - len(todo) - bar.n)
        if not len(todo):
            break
    bar.close()
    return theta, best


def damped_step(error, jacobian, weights, damping, at_bound):
    """Return the step to subtract from theta, (fits, parameters). Without damping it is the
    Gauss-Newton step for reweighted squares, with much damping a short step downhill.

    error, weights: (fits, rows); jacobian: (fits, rows, parameters); damping: (fits,); at_bound:
    (fits, parameters), which parameters are at their lower bound and can only rise."""
    # With these weights, least squares have the gradient of the Huber loss.
    huber = weights * (DELTA / error.abs()).clamp(max=1)
    gradient = ((huber * error)[:, None] @ jacobian)[:, 0]
    moves = ~(at_bound & (gradient > 0))
    jacobian, gradient = jacobian * moves[:, None], gradient * moves
    curvature = (huber[..., None] * jacobian).mT @ jacobian
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    ridge = damping[:, None] * diagonal + 1e-12 * diagonal.amax(1, keepdim=True) + 1e-30
    step = torch.linalg.solve(curvature + torch.diag_embed(ridge), gradient)
    return step.clamp(-2, 2)  # most are logarithms: a factor of e^2 at most


class Fit(namedtuple("Fit", "law units starts every objective")):
    """A fitted law. units: of N and D. starts: see start_ranges. every: theta of the best fit, then
    of the fits to bootstrap resamples, (1 + resamples, parameters)."""

    def predict(self, rows):
        """Return the predicted losses (rows,)."""
        return self.law.predict(named(self.law, self.every[0]), runs_of(rows, self.units)).numpy()

    def error(self, rows):
        """Return the mean absolute relative error of the predicted losses."""
        return float(np.abs(self.predict(rows) / column(rows, "val_loss") - 1).mean())

    def summary(self):
        """Return a dict for --json: each parameter, the "ci" of each, and the "undetermined" ones,
        whose interval is more than half as wide as the range of starting points."""
        values = {name: some.numpy() for name, some in vars(named(self.law, self.every)).items()}
        for name, parameter in self.law.parameters.items():
            if parameter.per:  # in natural units X is per parameter, Y per token
                unit, power = parameter.per
                with np.errstate(over="ignore"):  # infinite if not determined
                    values[name] = values[name] * self.units[unit] ** values[power]
        result = {name: float(some[0]) for name, some in values.items()}
        result["ci"] = {name: interval(some) for name, some in values.items()}
        result["undetermined"] = []
        for name, theta, start in zip(values, self.every.T, self.starts.T):
            low, high = interval(theta)
            if low is not None and high - low > (start[1] - start[0]) / 2:
                result["undetermined"].append(name)
        return result


def interval(every):
    """Return the central 95% of resamples, widened to contain the estimate, which is every[0]; or
    [None, None] if it or more than 5% of them are not finite, or fewer than 20 of them are."""
    point, samples = float(every[0]), np.asarray(every[1:], dtype=float)
    finite = samples[np.isfinite(samples)]
    if len(finite) < max(20, 0.95 * len(samples)) or not math.isfinite(point):
        return [None, None]
    low, high = np.percentile(finite, [2.5, 97.5])
    return [float(min(low, point)), float(max(high, point))]


def fit_law(law, rows, starts=64, resamples=RESAMPLES, seed=0):
    """Return the Fit of a law: the best from many starting points, and fits to bootstrap resamples
    of the runs. law: a name."""
    law, losses = LAWS[law], column(rows, "val_loss")
    # Measure N and D in units of their geometric means. Unless N is near 1, X and x in X N^-x can
    # replace each other: a change of x moves X by powers of ten.
    units = {name: math.exp(np.log(some).mean())
             for name, some in (("N", unrolled(rows)), ("D", column(rows, "tokens")))}
    runs, log_loss = runs_of(rows, units), torch.tensor(np.log(losses))

    # Fit briefly from every starting point, then let the best eight converge.
    low, high = ranges = start_ranges(law, losses)
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(starts, len(low), generator=generator, dtype=torch.float64)
    theta, objective = minimise(law, runs, log_loss, low + (high - low) * share, steps=50)
    theta, objective = minimise(law, runs, log_loss, theta[objective.argsort()[:8]])
    best = theta[objective.argmin()]

    # Fits to resamples start at the best fit: other starts moved no interval of our table.
    fit = Fit(law, units, ranges, best[None], objective.min().item())
    return refits(fit, rows, log_loss, resample(rows, resamples, seed)) if resamples else fit


def refits(fit, rows, log_loss, weights=None):
    """Return the Fit with new resamples: fits to other log losses or with other weights, both
    (resamples, rows)."""
    theta = fit.every[0].repeat(len(log_loss if weights is None else weights), 1)
    for _ in range(2):  # restart with large steps: some fits leave a local minimum
        theta, _ = minimise(fit.law, runs_of(rows, fit.units), log_loss, theta, weights)
    return fit._replace(every=torch.cat([fit.every[:1], theta]))


def resample(rows, resamples, seed):
    """Return how often each row counts (resamples, rows). Draw whole runs with replacement."""
    runs = list(dict.fromkeys(map(run_key, rows)))
    equal = np.full(len(runs), 1 / len(runs))
    counts = np.random.default_rng(seed).multinomial(len(runs), equal, resamples)
    return torch.tensor(counts[:, [runs.index(run_key(row)) for row in rows]]).double()


def fit_without_largest(law, rows, notes):
    """Return (the fit to all but the largest budget, the rows of the largest, held out). If the
    rows do not allow that, return None and add a note that says why."""
    *smaller, largest = rows_by_budget(rows)
    seen = [row for budget in smaller for row in budget]
    reasons = reasons_against(law, seen) if seen else ["there is only one budget"]
    if distinct(rows, "mu_rec") > 1 and distinct(largest, "mu_rec") < 3:
        # e.g. runs that were planned with another accounting, and share no budgets in this one
        reasons.append("it has fewer than three recurrences")
    if reasons:
        notes.append(f"{law} law: no held-out error on the largest budget ({'; '.join(reasons)})")
        return None
    return fit_law(law, seen, resamples=0), largest


def fit_with_error(law, rows, resamples, notes):
    """Return (Fit, a dict of it for --json). If the rows do not determine the parameters, return
    (None, None) and add a note that says why."""
    reasons = reasons_against(law, rows)
    if reasons:
        notes.append(f"{law} law: not fitted ({'; '.join(reasons)})")
        return None, None
    held_out = fit_without_largest(law, rows, notes)
    fit = fit_law(law, rows, resamples=resamples)
    error = held_out[0].error(held_out[1]) if held_out else None
    return fit, fit.summary() | {"held_out_error": error}

# ----------------------------------------------------------------------------- the frontier

MU = 2 ** np.linspace(0, 8, 601)  # the mean recurrences that a frontier chooses from


def token_cost(rows):
    """Return a function from mean recurrences (n,) to FLOPs per token, interpolated between runs.

    Of runs that differ in mu_bwd the cheapest count. If mu_bwd is ceil(mu / 2) everywhere, rounding
    alone makes odd recurrences expensive; those not cheaper than a mix of others are left out."""
    costs, rounded = {}, True
    for runs in alike(rows, "mu_rec"):
        mu = runs[0]["mu_rec"]
        costs[mu], mu_bwd = min((sum(column(some, "flops")) / sum(column(some, "tokens")),
                                 some[0]["mu_bwd"]) for some in alike(runs, "mu_bwd"))
        rounded &= mu_bwd == math.ceil(mu / 2)
    return cost_between(lower_hull(costs) if rounded else costs)


def lower_hull(costs):
    """Return the entries of {mean recurrence: FLOPs per token} that are cheaper than every mix of a
    smaller and a larger mean recurrence."""
    def mixes(mu):
        return [np.interp(mu, [a, b], [costs[a], costs[b]])
                for a in costs for b in costs if a < mu < b]
    return {mu: cost for mu, cost in costs.items() if cost < min(mixes(mu), default=math.inf)}


def cost_between(costs):
    """Return a function from mean recurrences (n,) to FLOPs per token that interpolates {mean
    recurrence: FLOPs per token} linearly. Beyond the ends it extends the first and the last line;
    below the first recurrence, the cost falls at most in proportion to the recurrence."""
    known, cost = np.array(sorted(costs.items())).T
    slopes = np.diff(cost) / np.diff(known) if len(known) > 1 else np.zeros(1)

    def cost_of(mu):
        line = (np.interp(mu, known, cost) + slopes[0] * np.minimum(0, mu - known[0])
                + slopes[-1] * np.maximum(0, mu - known[-1]))
        return np.maximum(line, cost[0] * np.minimum(1, mu / known[0]))
    return cost_of


def frontier(fit, size, cost, flops):
    """Return mu*, D* and the loss at a budget where the predicted loss is lowest, each (fits,), for
    all of fit.every. mu* = 1 or 256 means there or beyond. size: a row with the parameters of the
    model. cost: see cost_between."""
    tokens = flops / cost(MU)
    runs = runs_of([size | {"mu_rec": mu, "recurrence": mu, "tokens": D}
                    for mu, D in zip(MU, tokens)], fit.units)
    loss = fit.law.predict(named(fit.law, fit.every[:, None, :]), runs).numpy()  # (fits, MU)
    best = loss.argmin(1)
    return MU[best], tokens[best], loss[np.arange(len(best)), best]


def optimum(fit, size, cost, flops):
    """Return a point of the frontier with its intervals, a dict for --json. Where the cost per
    token has a kink, mu* stays the same over a range of budgets, and an interval has no width."""
    points = frontier(fit, size, cost, flops)
    mu, tokens, loss = (float(every[0]) for every in points)
    ci, ci_tokens, ci_loss = map(interval, points)
    fewest, most = MU[[0, -1]].tolist()
    slopes = np.diff(cost(mu * np.array([0.999, 1, 1.001])))  # below and above mu*
    return {"flops": flops, "mu_rec": mu, "ci": ci,
            "ci_at_edge": [{fewest: "<= ", most: ">= "}.get(end, "") for end in ci],
            "at_most": mu if mu == fewest else None, "at_least": mu if mu == most else None,
            "kink": ci == [mu, mu] and not math.isclose(*slopes, rel_tol=1e-6), "tokens": tokens,
            "ci_tokens": ci_tokens, "val_loss": loss, "ci_val_loss": ci_loss}


def frontier_exponents(fit, size, cost, low, high):
    """Return mean exponents of mu* and D* along the frontier from `low` to `high` FLOPs, (2, fits).

    The frontier is not a power law: it begins at one loop and stays at kinks of the cost. So the
    exponent is the slope of a line through logarithms, over the budgets where 1 < mu* < 256; NaN if
    those budgets span less than a factor of two."""
    log_flops = np.linspace(math.log(low), math.log(high), 25)
    every = [frontier(fit, size, cost, c)[:2] for c in np.exp(log_flops)]
    log_mu, log_tokens = np.log(np.array(every)).transpose(1, 2, 0)  # each (fits, budgets)
    exponents = np.full((2, len(log_mu)), np.nan)
    for i, inside in enumerate((log_mu > 0) & (log_mu < math.log(MU[-1]))):
        if inside.any() and np.ptp(log_flops[inside]) > math.log(2):
            both = np.stack([log_mu[i, inside], log_tokens[i, inside]], 1)
            exponents[:, i] = np.polyfit(log_flops[inside], both, 1)[0]
    return exponents


def exponents_of(fit, size, cost, flops):
    """Return {"mu_rec", "tokens"}: exponents along the frontier, over the range of these FLOPs."""
    mu, tokens = frontier_exponents(fit, size, cost, flops.min(), flops.max())
    return {"mu_rec": exponent(mu), "tokens": exponent(tokens)}


def far_exponents(fit):
    """Return {"params", "tokens"}: the exponents y / (x + y) and x / (x + y) with which the best
    size N* and token count D* grow with C.

    This is Chinchilla's result for a cost proportional to N D. N* is the size of the unrolled
    model, so mu* grows like N* once loops are most of the model."""
    p = named(fit.law, fit.every)
    return {"params": exponent(p.y / (p.x + p.y)), "tokens": exponent(p.x / (p.x + p.y))}


def exponent(every):
    """Return an exponent and its "ci" for --json. every: those of all fits; NaN becomes None."""
    best = float(every[0])
    return {"exponent": best if math.isfinite(best) else None, "ci": interval(every)}
