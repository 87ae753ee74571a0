"""Laws of the loss, and their fits: what a run will reach, by its size, loops and tokens.

A law is an object: a name, its prediction, its parameters. To add one, write the prediction and an
entry of LAWS: scaling.py fits it to the runs at T = mu_rec and prints it.

The laws here are those of §5 of "Parcae" (arXiv 2604.12946) and of "How Much Is One Recurrence
Worth?" (arXiv 2604.21106), in the papers' letters. N(mu) = N_noncore + mu N_core counts the
unrolled model; T is loops at test time.

Fits are those of Hoffmann et al. 2022 (approach 3): the Huber loss of the error of the log of the
prediction, delta 1e-3, from many random starts.
"""

import math
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from common import nothing_to_run
from tables import column, run_key

DELTA = 1e-3  # an error of the log loss beyond this counts in proportion, not squared
RESAMPLES = 200  # of the bootstrap

# A parameter of a law. Fits start between low and high, in units of `scale`: the lowest loss, the
# span of the losses, or 1. `domain`: "log" is above 0 and fitted as its logarithm, "from 0" may
# reach 0, "any" may be anything. `per`: the unit and power it belongs to; X in X N^-x is per N^x.
Parameter = namedtuple("Parameter", "low high scale domain per", defaults=("log", None))

ASYMPTOTE = Parameter(0, 0.98, "lowest", "from 0")
POWER = Parameter(0.1, 1.5, "one")
RATE = Parameter(0.2, 3, "one")
WORTH = Parameter(0, 1, "one", "any")


def term(per=None):
    return Parameter(0.05, 1, "span", "log", per)


# What a law predicts, from its parameters p and the runs r: see runs_of.

def training(p, r):
    """L(mu, D) = E + X N(mu)^-x + Y D^-y."""
    return p.E + p.X * (r.once + r.mu * r.core) ** -p.x + p.Y * r.D ** -p.y


def unified(p, r):
    """L(T, mu, D) = training law + Z exp(-z T / mu)."""
    return training(p, r) + p.Z * torch.exp(-p.z * r.loops / r.mu)


def test_time(p, r):
    """L(T) = L_inf + Z exp(-z T), of one model."""
    return p.L_inf + p.Z * torch.exp(-p.z * r.loops)


def worth(p, r):
    """L(mu, D) = E + A (N_noncore + mu^phi N_core)^-alpha + B D^-beta."""
    return p.E + p.A * (r.once + r.mu ** p.phi * r.core) ** -p.alpha + p.B * r.D ** -p.beta


Law = namedtuple("Law", "name predict parameters")
POWERS = {"E": ASYMPTOTE, "X": term("N x"), "x": POWER, "Y": term("D y"), "y": POWER}

LAWS = {law.name: law for law in (
    Law("training", training, POWERS),
    Law("unified", unified, POWERS | {"Z": term(), "z": RATE}),
    Law("test time", test_time, {"L_inf": ASYMPTOTE, "Z": term(), "z": RATE}),
    Law("worth", worth, {"E": ASYMPTOTE, "A": term("N alpha"), "alpha": POWER,
                         "B": term("D beta"), "beta": POWER, "phi": WORTH}),
)}

# ----------------------------------------------------------------------------- fitting


def units_of(rows):
    """N and D of a middling run: in these units a law's parameters do not stand in for each other.

    (In X N^-x a change of x moves X by powers of ten, unless N is near 1.)"""
    N = column(rows, "params_noncore") + column(rows, "mu_rec") * column(rows, "params_core")
    D = column(rows, "tokens")
    return {"N": math.exp(np.log(N).mean()), "D": math.exp(np.log(D).mean())}


def runs_of(rows, units):
    """What laws see of a table: float64 tensors (rows,), parameters and tokens in `units`."""
    def tensor(name):
        return torch.tensor(column(rows, name), dtype=torch.float64)
    return SimpleNamespace(
        once=tensor("params_noncore") / units["N"],
        core=tensor("params_core") / units["N"],
        D=tensor("tokens") / units["D"],
        mu=tensor("mu_rec"),
        loops=tensor("recurrence"),
    )


def named(law, theta):
    """The parameters by name, each (...,), from theta (..., parameters): see Parameter."""
    result = SimpleNamespace()
    for i, (name, parameter) in enumerate(law.parameters.items()):
        value = theta[..., i]
        setattr(result, name, value.exp() if parameter.domain == "log" else value)
    return result


def start_ranges(law, losses):
    """Where fits to these losses start, as theta has it: (parameters,) low, and high."""
    scales = {"lowest": losses.min(), "span": max(np.ptp(losses), 1e-3), "one": 1.0}
    ends = []
    for parameter in law.parameters.values():
        low, high = (end * scales[parameter.scale] for end in parameter[:2])
        ends.append((math.log(low), math.log(high)) if parameter.domain == "log" else (low, high))
    return torch.tensor(ends, dtype=torch.float64).T


def minimise(law, runs, log_loss, theta, weights=None, held=(), steps=2000):
    """Levenberg-Marquardt on the Huber loss, many independent fits at once.

    theta: (fits, parameters), where to start. log_loss and weights (how often a row counts): each
    (rows,) or (fits, rows). held: names of parameters that stay. Returns (theta, objective
    (fits,)); the objective is in units of 1e-6."""
    def predict(one):
        return law.predict(named(law, one), runs).log()
    predict_all = torch.func.vmap(predict)
    jacobian_of = torch.func.vmap(torch.func.jacfwd(predict))

    fits, rows = len(theta), log_loss.shape[-1]
    log_loss = log_loss.expand(fits, rows)
    weights = torch.ones(1).double().expand(fits, rows) if weights is None else weights
    bounds = {"log": -40.0, "from 0": 0.0, "any": -math.inf}
    lowest = torch.tensor([bounds[p.domain] for p in law.parameters.values()]).double()
    free = torch.tensor([name not in held for name in law.parameters]).double()

    def objective(some, i):
        error = (predict_all(some) - log_loss[i]).abs()
        huber = torch.where(error < DELTA, error ** 2 / 2, DELTA * (error - DELTA / 2))
        return (huber * weights[i]).sum(1) * 1e6

    theta = theta.clone()
    todo = torch.arange(fits)  # the fits that have not converged
    best = objective(theta, todo)
    damping = torch.full((fits,), 1e-3, dtype=torch.float64)
    bar = tqdm(total=fits, desc=f"{law.name} law: fits that have converged", delay=1, leave=False,
               disable=None)
    for _ in range(steps):
        old = theta[todo]
        error = predict_all(old) - log_loss[todo]  # (fits, rows)
        jacobian = jacobian_of(old) * free  # (fits, rows, parameters)
        step = damped_step(error, jacobian, weights[todo], damping[todo], old <= lowest)
        new = torch.maximum(old - step, lowest)

        value = objective(new, todo)
        gained = best[todo] - value
        better = gained > 0
        theta[todo[better]], best[todo[better]] = new[better], value[better]
        # Done: a step with little damping gains nothing, or no step however short gains anything.
        small = (gained <= 1e-8 * value + 1e-6) & (damping[todo] < 0.1)
        converged = (better & small) | (~better & (damping[todo] > 1e9))
        damping[todo] = torch.where(better, damping[todo] / 5, damping[todo] * 4).clamp(min=1e-12)
        todo = todo[~converged]
        bar.update(fits - len(todo) - bar.n)
        if not len(todo):
            break
    bar.close()
    return theta, best


def damped_step(error, jacobian, weights, damping, at_bound):
    """What to subtract from theta, (fits, parameters): between Newton's step for the Huber loss (no
    damping) and a short one downhill (much).

    error, weights: (fits, rows); jacobian: (fits, rows, parameters); damping: (fits,); at_bound:
    (fits, parameters), what can only rise."""
    # Squares weighted so have the Huber loss's gradient: a large error counts for less.
    weight = weights * (DELTA / error.abs()).clamp(max=1)
    gradient = ((weight * error)[:, None] @ jacobian)[:, 0]
    moves = ~(at_bound & (gradient > 0))
    jacobian, gradient = jacobian * moves[:, None], gradient * moves
    curvature = (weight[..., None] * jacobian).mT @ jacobian
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    ridge = damping[:, None] * diagonal + 1e-12 * diagonal.amax(1, keepdim=True) + 1e-30
    return torch.linalg.solve(curvature + torch.diag_embed(ridge), gradient).clamp(-2, 2)


class Fit:
    """A law fitted: theta (parameters,), samples (resamples, parameters), objective."""

    def __init__(self, law, units, starts, theta, samples, objective):
        self.law, self.units, self.starts, self.objective = law, units, starts, objective
        self.theta, self.samples = theta, samples

    def predict(self, rows):
        """Losses (rows,)."""
        return self.law.predict(named(self.law, self.theta), runs_of(rows, self.units)).numpy()

    def error(self, rows):
        """Mean relative error of the prediction."""
        return float(np.abs(self.predict(rows) / column(rows, "val_loss") - 1).mean())

    def values(self, theta):
        """{parameter: value} in natural units: X is per parameter, Y per token."""
        values = {name: value.numpy() for name, value in vars(named(self.law, theta)).items()}
        for name, parameter in self.law.parameters.items():
            if parameter.per:
                unit, power = parameter.per.split()
                with np.errstate(over="ignore"):  # infinite where the data say nothing of it
                    values[name] = values[name] * self.units[unit] ** values[power]
        return values

    def summary(self):
        """What --json writes: each parameter, "ci" of each, and which are "undetermined".

        A parameter is not determined where its interval is more than half as wide as the range
        that fits started from: the data say little that the range had not said."""
        result = {name: float(value) for name, value in self.values(self.theta).items()}
        samples = self.values(self.samples)
        result["ci"] = {name: interval(samples[name], result[name]) for name in samples}
        result["undetermined"] = []
        low, high = self.starts
        for i, name in enumerate(self.law.parameters):
            ci = interval(self.samples[:, i], self.theta[i])
            if None not in ci and ci[1] - ci[0] > (high[i] - low[i]) / 2:
                result["undetermined"].append(name)
        return result


def interval(samples, point):
    """The central 95 % of what is finite, and the point itself; [None, None] of too few samples."""
    samples = np.asarray(samples, dtype=float)
    samples = samples[np.isfinite(samples)]
    if len(samples) < 20:
        return [None, None]
    low, high = np.percentile(samples, [2.5, 97.5])
    return [float(min(low, point)), float(max(high, point))]


def fit_law(law, rows, starts=64, resamples=RESAMPLES, held=None, seed=0):
    """The best of many fits, and fits to resamples of the runs, each until it has converged.

    law: a name. held: {parameter that stays: its value}; for phi."""
    law, held = LAWS[law], held or {}
    units = units_of(rows)
    runs = runs_of(rows, units)
    losses = column(rows, "val_loss")
    log_loss = torch.tensor(np.log(losses))

    low, high = start_ranges(law, losses)
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(starts, len(low), generator=generator, dtype=torch.float64)
    theta = low + (high - low) * share
    for name, value in held.items():
        theta[:, list(law.parameters).index(name)] = value
    # A short fit of every start, then the best of them to the end.
    theta, objective = minimise(law, runs, log_loss, theta, held=held, steps=50)
    theta = theta[objective.argsort()[:8]]
    theta, objective = minimise(law, runs, log_loss, theta, held=held)
    best = theta[objective.argmin()]

    samples = torch.empty(0, len(best), dtype=torch.float64)
    if resamples:
        weights = resample(rows, resamples, seed)
        samples = refit(law, runs, log_loss, best.repeat(resamples, 1), weights, held)
    return Fit(law, units, (low, high), best, samples, objective.min().item())


def fits_of_noisy(fit, rows, log_loss):
    """theta (sweeps, parameters) of fits of the same law to other log losses (sweeps, rows)."""
    theta = fit.theta.repeat(len(log_loss), 1)
    return refit(fit.law, runs_of(rows, fit.units), log_loss, theta)


def refit(law, runs, log_loss, theta, weights=None, held=()):
    """theta as of minimise, twice: from the end with large steps again, some leave a small dip."""
    for _ in range(2):
        theta, _ = minimise(law, runs, log_loss, theta, weights, held)
    return theta


def resample(rows, resamples, seed):
    """How often each row counts (resamples, rows): runs are drawn with replacement, whole."""
    runs = [run_key(row) for row in rows]
    index = {run: i for i, run in enumerate(dict.fromkeys(runs))}
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), resamples)
    return torch.tensor(counts[:, [index[run] for run in runs]], dtype=torch.float64)

# ----------------------------------------------------------------------------- the frontier

MU = np.geomspace(1, 256, 600)  # the recurrences that a frontier is looked for among


def token_cost(rows):
    """A function: mean recurrences (n,) -> FLOPs of a token, from what the runs of a table cost."""
    return cost_between({row["mu_rec"]: row["flops"] / row["tokens"] for row in rows})


def cost_between(costs):
    """A function: mean recurrences (n,) -> FLOPs of a token, from {mean recurrence: FLOPs}.

    Straight lines between the recurrences that are no dearer than a mix of others: mu_bwd =
    ceil(mu / 2) makes odd ones dear. Beyond the last, the last line goes on."""
    hull = []
    for x, y in sorted(costs.items()):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    known, cost = np.array(hull).T
    last = slope(*hull[-2:]) if len(hull) > 1 else 0.0
    return lambda mu: np.interp(mu, known, cost) + last * np.maximum(0, mu - known[-1])


def slope(a, b):
    return (b[1] - a[1]) / (b[0] - a[0])


def frontier(fit, size, cost, flops, theta=None):
    """mu*, D* and the loss of lowest predicted loss at a budget, each (fits,).

    size: a row with the parameters of the model. cost: see cost_between. theta: other fits than the
    best, (fits, parameters), such as fit.samples. mu* is 1 or 256 where it is there or beyond."""
    theta = fit.theta[None] if theta is None else theta
    tokens = flops / cost(MU)
    runs = SimpleNamespace(
        once=torch.tensor(size["params_noncore"] / fit.units["N"], dtype=torch.float64),
        core=torch.tensor(size["params_core"] / fit.units["N"], dtype=torch.float64),
        D=torch.tensor(tokens / fit.units["D"]), mu=torch.tensor(MU), loops=torch.tensor(MU))
    loss = fit.law.predict(named(fit.law, theta[:, None, :]), runs).numpy()  # (fits, MU)
    best = loss.argmin(1)
    return MU[best], tokens[best], loss[np.arange(len(best)), best]


def frontier_exponents(fit, size, cost, low, high, theta=None):
    """Exponents of mu* and D* along the frontier from `low` to `high` FLOPs, each (fits,).

    Of the budgets where mu* is above 1, on a line through logarithms; NaN where those span less
    than a factor of two. D* = C / cost(mu*): the second follows from the first."""
    flops = np.geomspace(low, high, 25)
    every = [frontier(fit, size, cost, c, theta)[:2] for c in flops]
    log_mu, log_tokens = np.log(np.array(every)).transpose(1, 2, 0)  # each (fits, budgets)
    exponents = np.full((2, len(log_mu)), np.nan)
    for i, inside in enumerate((log_mu > 0) & (log_mu < math.log(MU[-1]))):
        if inside.any() and np.ptp(np.log(flops[inside])) > math.log(2):
            for j, values in enumerate((log_mu[i], log_tokens[i])):
                exponents[j, i] = np.polyfit(np.log(flops[inside]), values[inside], 1)[0]
    return exponents


if __name__ == "__main__":
    nothing_to_run(__doc__)
