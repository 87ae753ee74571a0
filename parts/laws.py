"""Laws of the loss, hundreds of fits of one at once, and the best recurrence under a law.

To add a law, write its prediction and an entry of LAWS: scaling.py fits it to the runs at
T = mu_rec. The laws are those of §5 of "Parcae" (arXiv 2604.12946) and of "How Much Is One
Recurrence Worth?" (arXiv 2604.21106), in the papers' letters. Fits are those of Hoffmann et al.
2022 (approach 3): the Huber loss of the error of the log of the prediction, from random starts.
"""

import math
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import torch

from parts.cli import progress_bar
from parts.tables import alike, column, distinct, rows_by_budget, run_key, unrolled

DELTA = 1e-3  # an error of the log loss beyond this counts in proportion, not squared
RESAMPLES = 200  # of the bootstrap

# Fits of a parameter start from low to high, times `scale`: the "lowest" loss, the "span" of them,
# "one". domain: "log" (above 0, fitted as its logarithm), "from 0" (0 or more), "any". per: ("N",
# "x") for X in X N^-x: N is fitted in units of N0, printed is X N0^x.
Parameter = namedtuple("Parameter", "low high scale domain per", defaults=("log", None))

ASYMPTOTE = Parameter(0, 0.98, "lowest", "from 0")
POWER = Parameter(0.1, 1.5, "one")
TERM = Parameter(0.05, 1, "span")


# What a law predicts, from its parameters p and the runs r (runs_of). N counts the unrolled model.

def training(p, r, phi=1):
    """L(mu, D) = E + X N^-x + Y D^-y, N = N_noncore + mu^phi N_core; phi 1: a loop is a layer."""
    N = r.noncore + r.mu ** phi * r.core
    return p.E + p.X * N ** -p.x + p.Y * r.D ** -p.y


def unified(p, r):
    """L(T, mu, D) = training law + Z exp(-z T / mu)."""
    return training(p, r) + p.Z * torch.exp(-p.z * r.loops / r.mu)


def worth(p, r):
    """The training law with a phi to be found (arXiv 2604.21106, with A, alpha, B, beta there)."""
    return training(p, r, p.phi)


Law = namedtuple("Law", "name predict parameters")
POWERS = {"E": ASYMPTOTE, "X": TERM._replace(per=("N", "x")), "x": POWER,
          "Y": TERM._replace(per=("D", "y")), "y": POWER}

LAWS = {law.name: law for law in (
    Law("training", training, POWERS),
    Law("unified", unified, POWERS | {"Z": TERM, "z": Parameter(0.2, 3, "one")}),
    Law("worth", worth, POWERS | {"phi": Parameter(0, 1, "one", "any")}),
)}

# ----------------------------------------------------------------------------- fitting


def reasons_against(law, rows):
    """Return why the rows cannot tell the parameters of a law, a list of texts; law: a name."""
    values = {"sizes of the unrolled model": unrolled(rows), "token counts": column(rows, "tokens")}
    if law == "unified":
        loops = column(rows, "recurrence") / column(rows, "mu_rec")
        values["values of T / mu_rec at evaluation"] = loops
    reasons = [f"{len({*some})} {name}, it needs 3"
               for name, some in values.items() if len({*some}) < 3]
    if law == "worth" and distinct(rows, "params_core", "params_noncore") < 2:
        reasons.append("1 size of model, it needs 2")
    if len(rows) <= len(LAWS[law].parameters):
        reasons.append(f"{len(rows)} rows for {len(LAWS[law].parameters)} parameters")
    if distinct(rows, "val_loss") == 1:
        reasons.append("all losses are equal")
    return reasons


def runs_of(rows, units):
    """Return what laws see of a table, float64 tensors (rows,): N and D in `units`."""
    noncore, core, tokens, mu, loops = (
        torch.tensor(column(rows, name), dtype=torch.float64)
        for name in ("params_noncore", "params_core", "tokens", "mu_rec", "recurrence"))
    return SimpleNamespace(noncore=noncore / units["N"], core=core / units["N"],
                           D=tokens / units["D"], mu=mu, loops=loops)


def named(law, theta):
    """Return the parameters by name, each (...,), from theta (..., parameters): see Parameter."""
    values = zip(law.parameters.items(), theta.unbind(-1))
    return SimpleNamespace(**{name: value.exp() if parameter.domain == "log" else value
                              for (name, parameter), value in values})


def start_ranges(law, losses):
    """Return between which theta fits to these losses start: (2, parameters), low and high."""
    scales = {"lowest": losses.min(), "span": max(np.ptp(losses), 1e-3), "one": 1.0}
    ends = []
    for low, high, scale, domain, _ in law.parameters.values():
        pair = np.array([low, high]) * scales[scale]
        ends.append(np.log(pair) if domain == "log" else pair)
    return torch.tensor(np.array(ends)).T


def minimise(law, runs, log_loss, theta, weights=None, steps=2000):
    """Return (theta, objective (fits,)) of hundreds of independent fits at once, by
    Levenberg-Marquardt on the Huber loss (scipy makes one at a time).

    theta: (fits, parameters), where to start. log_loss: (rows,) or (fits, rows). weights: (fits,
    rows), how often a row counts."""
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
        # Done: a step with little damping gains nothing, or no step however short gains anything.
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
    """Return what to subtract from theta, (fits, parameters): between the Gauss-Newton step for
    reweighted squares (no damping) and a short one downhill (much).

    error, weights: (fits, rows); jacobian: (fits, rows, parameters); damping: (fits,); at_bound:
    (fits, parameters), what can only rise."""
    # Squares weighted so have the Huber loss's gradient: a large error counts for less.
    huber = weights * (DELTA / error.abs()).clamp(max=1)
    gradient = ((huber * error)[:, None] @ jacobian)[:, 0]
    moves = ~(at_bound & (gradient > 0))
    jacobian, gradient = jacobian * moves[:, None], gradient * moves
    curvature = (huber[..., None] * jacobian).mT @ jacobian
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    ridge = damping[:, None] * diagonal + 1e-12 * diagonal.amax(1, keepdim=True) + 1e-30
    step = torch.linalg.solve(curvature + torch.diag_embed(ridge), gradient)
    return step.clamp(-2, 2)  # of logarithms mostly: a factor of seven at most


class Fit(namedtuple("Fit", "law units starts every objective")):
    """A law fitted. starts: of start_ranges. every: theta of the best fit, then of those to
    resamples, (1 + resamples, parameters)."""

    def predict(self, rows):
        """Return losses (rows,)."""
        return self.law.predict(named(self.law, self.every[0]), runs_of(rows, self.units)).numpy()

    def error(self, rows):
        """Return the mean relative error of the prediction."""
        return float(np.abs(self.predict(rows) / column(rows, "val_loss") - 1).mean())

    def summary(self):
        """Return what --json writes: each parameter, "ci" of each, and which are "undetermined":
        their interval is more than half as wide as the range that fits started from."""
        values = {name: some.numpy() for name, some in vars(named(self.law, self.every)).items()}
        for name, parameter in self.law.parameters.items():
            if parameter.per:  # in natural units X is per parameter, Y per token
                unit, power = parameter.per
                with np.errstate(over="ignore"):  # infinite where the data say nothing of it
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
    """Return the central 95 % of samples, stretched to hold the point, which comes before them;
    [None, None] of fewer than 20 finite samples, or 95 % of them, or where it is not finite."""
    point, samples = float(every[0]), np.asarray(every[1:], dtype=float)
    finite = samples[np.isfinite(samples)]
    if len(finite) < max(20, 0.95 * len(samples)) or not math.isfinite(point):
        return [None, None]
    low, high = np.percentile(finite, [2.5, 97.5])
    return [float(min(low, point)), float(max(high, point))]


def fit_law(law, rows, starts=64, resamples=RESAMPLES, seed=0):
    """Return the Fit of a law: the best of many, and fits to resamples of the runs, each until it
    has converged. law: a name."""
    law, losses = LAWS[law], column(rows, "val_loss")
    # N and D of a middling run: in these units X and x do not stand in for each other. In X N^-x a
    # change of x moves X by powers of ten, unless N is near 1.
    units = {name: math.exp(np.log(some).mean())
             for name, some in (("N", unrolled(rows)), ("D", column(rows, "tokens")))}
    runs, log_loss = runs_of(rows, units), torch.tensor(np.log(losses))

    # A short fit of every start, then the best of them to the end.
    low, high = ranges = start_ranges(law, losses)
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(starts, len(low), generator=generator, dtype=torch.float64)
    theta, objective = minimise(law, runs, log_loss, low + (high - low) * share, steps=50)
    theta, objective = minimise(law, runs, log_loss, theta[objective.argsort()[:8]])
    best = theta[objective.argmin()]

    # Fits to resamples start from the best: other starts move no interval of our table.
    fit = Fit(law, units, ranges, best[None], objective.min().item())
    return refits(fit, rows, log_loss, resample(rows, resamples, seed)) if resamples else fit


def refits(fit, rows, log_loss, weights=None):
    """Return the Fit with resamples: fits to other log losses, or with other weights, either of
    them (resamples, rows)."""
    theta = fit.every[0].repeat(len(log_loss if weights is None else weights), 1)
    for _ in range(2):  # from the end with large steps again: some leave a small dip
        theta, _ = minimise(fit.law, runs_of(rows, fit.units), log_loss, theta, weights)
    return fit._replace(every=torch.cat([fit.every[:1], theta]))


def resample(rows, resamples, seed):
    """Return how often each row counts (resamples, rows): whole runs are drawn with replacement."""
    runs = list(dict.fromkeys(map(run_key, rows)))
    equal = np.full(len(runs), 1 / len(runs))
    counts = np.random.default_rng(seed).multinomial(len(runs), equal, resamples)
    return torch.tensor(counts[:, [runs.index(run_key(row)) for row in rows]]).double()


def fit_without_largest(law, rows, notes):
    """Return (a fit to all but the largest budget, the rows of that); or None, and a note says
    why."""
    *smaller, largest = rows_by_budget(rows)
    seen = [row for budget in smaller for row in budget]
    reasons = reasons_against(law, seen) if seen else ["there is one budget"]
    if distinct(rows, "mu_rec") > 1 and distinct(largest, "mu_rec") < 3:
        # also where the runs were planned by another accounting and share no budgets in this one
        reasons.append("it has fewer than three recurrences")
    if reasons:
        notes.append(f"{law} law: no error on the largest budget, fitted without it "
                     f"({'; '.join(reasons)})")
        return None
    return fit_law(law, seen, resamples=0), largest


def fit_with_error(law, rows, resamples, notes):
    """Return (Fit, what --json writes of it); (None, None) where the rows cannot tell the
    parameters, and a note says why."""
    reasons = reasons_against(law, rows)
    if reasons:
        notes.append(f"{law} law: not fitted ({'; '.join(reasons)})")
        return None, None
    held_out = fit_without_largest(law, rows, notes)
    fit = fit_law(law, rows, resamples=resamples)
    error = held_out[0].error(held_out[1]) if held_out else None
    return fit, fit.summary() | {"held_out_error": error}

# ----------------------------------------------------------------------------- the frontier

MU = 2 ** np.linspace(0, 8, 601)  # the recurrences that a frontier is looked for among


def token_cost(rows):
    """Return a function, mean recurrences (n,) -> FLOPs of a token, by what a table's runs cost.

    Of runs that differ in mu_bwd the cheapest count. Where mu_bwd is ceil(mu / 2) everywhere, odd
    recurrences are dear by that rounding alone: those dearer than a mix of others are left out."""
    costs, rounded = {}, True
    for runs in alike(rows, "mu_rec"):
        mu = runs[0]["mu_rec"]
        costs[mu], mu_bwd = min((sum(column(some, "flops")) / sum(column(some, "tokens")),
                                 some[0]["mu_bwd"]) for some in alike(runs, "mu_bwd"))
        rounded &= mu_bwd == math.ceil(mu / 2)
    return cost_between(lower_hull(costs) if rounded else costs)


def lower_hull(costs):
    """Return those of {mean recurrence: FLOPs of a token} that are cheaper than every mix of two
    others."""
    def mixes(mu):
        return [np.interp(mu, [a, b], [costs[a], costs[b]])
                for a in costs for b in costs if a < mu < b]
    return {mu: cost for mu, cost in costs.items() if cost < min(mixes(mu), default=math.inf)}


def cost_between(costs):
    """Return a function, mean recurrences (n,) -> FLOPs of a token, from {mean recurrence: FLOPs}:
    straight lines between them. Beyond the ends the first and the last line go on; below the first,
    a token costs no less than in proportion."""
    known, cost = np.array(sorted(costs.items())).T
    slopes = np.diff(cost) / np.diff(known) if len(known) > 1 else np.zeros(1)

    def cost_of(mu):
        line = (np.interp(mu, known, cost) + slopes[0] * np.minimum(0, mu - known[0])
                + slopes[-1] * np.maximum(0, mu - known[-1]))
        return np.maximum(line, cost[0] * np.minimum(1, mu / known[0]))
    return cost_of


def frontier(fit, size, cost, flops):
    """Return mu*, D* and the loss, where that is predicted to be lowest at a budget, each (fits,):
    of fit.every. mu* is 1 or 256 where it is there or beyond. size: a row with the parameters of
    the model. cost: see cost_between."""
    tokens = flops / cost(MU)
    runs = runs_of([size | {"mu_rec": mu, "recurrence": mu, "tokens": D}
                    for mu, D in zip(MU, tokens)], fit.units)
    loss = fit.law.predict(named(fit.law, fit.every[:, None, :]), runs).numpy()  # (fits, MU)
    best = loss.argmin(1)
    return MU[best], tokens[best], loss[np.arange(len(best)), best]


def optimum(fit, size, cost, flops):
    """Return a point of the frontier with its intervals, as --json writes it. An interval without
    width is a kink of the cost: there mu* stays for a while."""
    points = frontier(fit, size, cost, flops)
    mu, tokens, loss = (float(every[0]) for every in points)
    ci, ci_tokens, ci_loss = map(interval, points)
    fewest, most = MU[[0, -1]].tolist()
    return {"flops": flops, "mu_rec": mu, "ci": ci, "ci_at_edge": [ci[0] == fewest, ci[1] == most],
            "at_most": mu if mu == fewest else None, "at_least": mu if mu == most else None,
            "kink": fewest < mu < most and ci == [mu, mu], "tokens": tokens,
            "ci_tokens": ci_tokens, "val_loss": loss, "ci_val_loss": ci_loss}


def frontier_exponents(fit, size, cost, low, high):
    """Return mean exponents of mu* and D* along the frontier from `low` to `high` FLOPs, (2, fits).

    The frontier is not a power law: it begins at one loop and stays at kinks of the cost. So this
    is the slope of a line through logarithms, over the budgets where mu* is above 1; NaN where
    those span less than a factor of two."""
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
    """Return {"params", "tokens"}: exponents of N* and D*, the best size and token count,
    C^(y / (x + y)) and C^(x / (x + y)).

    Chinchilla's arithmetic, where cost is N times D. N* is that of the unrolled model, so mu*
    grows like it once the loops are most of the model."""
    p = named(fit.law, fit.every)
    return {"params": exponent(p.y / (p.x + p.y)), "tokens": exponent(p.x / (p.x + p.y))}


def exponent(every):
    """Return what --json writes of an exponent, from those of Fit.every; NaN becomes None."""
    best = float(every[0])
    return {"exponent": best if math.isfinite(best) else None, "ci": interval(every)}
