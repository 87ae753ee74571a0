"""The scaling laws of looping: fits, predictions and figures from a table of training runs.

    python scaling.py                             fit the tables in results/, compare with the paper
    python scaling.py fit out/sweep --json f.json a directory of runs, or CSV files from anywhere
    python scaling.py predict --flops 1e14        the best recurrence and tokens for a budget

The tables come from sweep.py. A row is one run, evaluated after one number of loops ("recurrence").

With parameters and training FLOPs C fixed, loops compete with tokens. The best mean recurrence mu*
and token count D* grow as powers of C (§5.2 of "Parcae", arXiv 2604.12946). The laws (its §5, and
phi from "How Much Is One Recurrence Worth?", arXiv 2604.21106), in the papers' letters, where
T is the number of loops at test time and N(mu) = N_noncore + mu N_core:

    isoFLOP     log L = parabola in log mu at each C; its minimum is mu*(C), D*(C)
    training    L(mu, D)     = E + X N(mu)^-x + Y D^-y
    test time   L(T)         = L_inf + Z exp(-z T)                              one model
    unified     L(T, mu, D)  = E + X N(mu)^-x + Y D^-y + Z exp(-z T / mu)
    worth       L(mu, D)     = E + A (N_noncore + mu^phi N_core)^-alpha + B D^-beta
"""

import csv
import json
import math
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import figures
from common import (
    Parser,
    UserError,
    lock,
    number,
    read_json,
    run_script,
    whole_file,
    write_text,
)
from model import PRESETS, Parcae, ParcaeConfig

# The columns of a table. mu_rec: mean recurrence in training; mu_bwd: loops with gradient;
# recurrence: loops at evaluation; val_loss: nats per token.
COLUMNS = {
    "model": str,
    "params_core": float,
    "params_noncore": float,
    "flops": float,
    "accounting": str,
    "mu_rec": float,
    "mu_bwd": float,
    "tokens": float,
    "recurrence": float,
    "val_loss": float,
    "seed": int,
}

# What the papers found, printed beside our numbers; SLOPES are the exponents of mu* and D*.
PUBLISHED = {
    "mu_rec": "C^0.40",
    "tokens": "C^0.78",
    "phi": "0.46 [0.41, 0.53]",
    "training_law": "1.3 % (140M), 0.8 % (370M)",
    "unified": "0.85 to 1.31 %",
    "excess": "0.10 to 0.17 %",
}
SLOPES = {"mu_rec": 0.40, "tokens": 0.78}

RESAMPLES = 200  # of the bootstrap
HERE = Path(__file__).parent

# ----------------------------------------------------------------------------- tables


def read_csv(path):
    """The rows of a table, a list of dicts. Raises UserError that names the file and the row."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        needed = ", ".join(COLUMNS)
        raise UserError(f"{path} has no column {', '.join(missing)}; needed: {needed}")

    rows = []
    for position, line in enumerate(lines, start=2):  # the header is row 1
        try:
            rows.append({name: table_value(name, line[name]) for name in COLUMNS})
        except UserError as error:
            raise UserError(f"{path}, row {position}: {error}") from None
    return rows


def table_value(name, said):
    """An entry of a table from its text; None where the line is too short. Raises UserError."""
    kind = COLUMNS[name]
    if kind is str:
        return str(said)
    try:
        value = float(said)
    except (TypeError, ValueError):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} is {said!r}, must be {what}") from None
    if kind is int:
        if not value.is_integer():
            raise UserError(f"{name} is {said!r}, must be a whole number")
        return int(value)
    least = 0 if name == "params_core" else sys.float_info.min  # a plain transformer has no core
    if not least <= value < math.inf:
        raise UserError(f"{name} is {said}, must be finite and above 0")
    return value


def last_line(path):
    """The last line of a log as a dict; {"kind": None, "flops": 0} where there is none.

    It reads the end of the file alone: a sweep asks often."""
    nothing = {"kind": None, "flops": 0.0}
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            line = json.loads(file.read().split(b"\n")[-2])  # what no newline ends is not whole
    except (OSError, ValueError, IndexError):
        return nothing
    if isinstance(line, dict) and {"kind", "flops"} <= line.keys():
        return line
    return nothing


def model_columns(config):
    """What the columns of a row say of a model and its depths; config: "model" in config.json."""
    mu = config["mean_recurrence"]
    return {
        "model": "{n_prelude}/{n_recurrent}/{n_coda} x {n_embd}".format(**config),
        "mu_rec": mu,
        "mu_bwd": min(mu, config["backprop_depth"]),
    }


def run_rows(config, last):
    """The rows of a run, one for each accounting and number of loops; last: its last log line."""
    settings, cost = config["settings"], config["cost"]
    own = cost[settings["accounting"]]  # the budget was counted so
    rows = []
    for accounting, its in cost.items():
        for loops, loss in last["val_loss"].items():
            rows.append(model_columns(config["model"]) | {
                "params_core": its["params_core"],
                "params_noncore": its["params_noncore"],
                "flops": last["flops"] * its["flops_per_token"] / own["flops_per_token"],
                "accounting": accounting,
                "tokens": last["tokens"],
                "recurrence": int(loops),
                "val_loss": loss,
                "seed": settings["seed"],
            })
    return rows


def read_run(path):
    """The rows of a run of train.py; [] if it is not finished. Raises UserError."""
    last = last_line(path / "log.jsonl")
    if last["kind"] != "done":
        return []
    config = read_json(path / "config.json")
    try:
        rows = run_rows(config, last)
        finite = [row for row in rows if math.isfinite(row["val_loss"])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__} {error}"
        raise UserError(f"{path} is not the directory of a run: {what}") from None
    if len(finite) < len(rows):
        loops = sorted({row["recurrence"] for row in rows if not math.isfinite(row["val_loss"])})
        named = ", ".join(map(str, loops))
        print(f"{path}: the val loss at T = {named} is not finite and left out")
    return finite


def as_written(row):
    """A row as write_csv writes it: losses to 6 digits, other fractions to 10."""
    result = dict(row)
    for name, value in row.items():
        if name == "val_loss":
            result[name] = f"{value:.6g}"
        elif isinstance(value, float):
            result[name] = f"{value:.10g}"
    return result


def identity(row):
    """A tuple that is the same for a row before it was written to a table and after."""
    return tuple(as_written({name: kind(row[name]) for name, kind in COLUMNS.items()}).values())


def once(rows):
    """The rows without repetitions: a table may be given twice, or beside its own directory."""
    kept = {identity(row): row for row in rows}
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} rows are there twice and count once")
    return list(kept.values())


def read_tables(paths, accounting=None):
    """(rows of CSV files and directories of runs, the accounting to use). Raises UserError.

    The accounting is the one named, else exact, else what is there; rows are of all."""
    rows = []
    for path in map(Path, paths):
        if path.is_dir():
            runs = [read_run(log.parent) for log in sorted(path.rglob("log.jsonl"))]
            if [] in runs:
                unfinished = f"{runs.count([])} of {len(runs)} runs"
                print(f"{path}: {unfinished} are not finished and left out")
            for run in runs:
                rows += run
        else:
            rows += read_csv(path)
    if not rows:
        raise UserError(f"no finished run in {', '.join(map(str, paths))}")
    rows = once(rows)

    there = sorted({row["accounting"] for row in rows})
    if accounting and accounting not in there:
        raise UserError(f"--accounting is {accounting}, these tables have {', '.join(there)}")
    if accounting:
        return rows, accounting
    return rows, "exact" if "exact" in there else there[0]


def write_csv(path, rows, columns=COLUMNS):
    """Write a table, of a sweep or of other columns; it appears whole or not at all."""
    with whole_file(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(as_written, rows))


def add_rows(table, rows):
    """Add the rows that a table lacks; what it holds stays, and what others add meanwhile."""
    table = Path(table).resolve()  # a link to a table stays a link
    table.parent.mkdir(parents=True, exist_ok=True)
    with lock(table.parent, patience=60):  # a table is written in milliseconds
        text, there = ",".join(COLUMNS) + "\n", set()
        if table.exists():
            there = {identity(row) for row in read_csv(table)}
            text = table.read_text(encoding="utf-8-sig").rstrip("\n") + "\n"
        missing = [row for row in rows if identity(row) not in there]
        if not missing:
            return
        header = next(csv.reader(text.splitlines()))  # perhaps with columns that are not ours
        with whole_file(table) as file:
            file.write(text)
            writer = csv.DictWriter(file, header, lineterminator="\n")
            writer.writerows(map(as_written, missing))


def column(rows, name):
    """An array (rows,) of one column."""
    return np.array([row[name] for row in rows])


def trained_depth(rows):
    """The rows evaluated at T = mu_rec."""
    return [row for row in rows if row["recurrence"] == row["mu_rec"]]


Run = namedtuple("Run", ["model", "mu_rec", "mu_bwd", "flops", "tokens", "seed"])


def run_key(row):
    """The Run that a row belongs to: rows of one run differ in the loops at evaluation alone."""
    return Run(*(row[name] for name in Run._fields))


def distinct(rows, name):
    """How many different values a column has."""
    return len({row[name] for row in rows})

# ----------------------------------------------------------------------------- isoFLOP


def budgets_of(rows):
    """[(C, W, mu)]: the budgets of a sweep, and how to read the log loss of each recurrence there.

    W (cells, rows) takes the log losses of all rows to those of the cells at that budget, mu
    (cells,) is their mu_rec. Runs within 3 % of a budget are its cells as they are. Where runs
    share no budgets (they were planned by another accounting), see read_between."""
    flops, mu = column(rows, "flops"), column(rows, "mu_rec")
    levels = []
    for c in np.sort(flops):
        if not levels or c > 1.03 * levels[-1]:
            levels.append(c)
    cells = [np.flatnonzero((flops >= c) & (flops <= 1.03 * c)) for c in levels]
    if not any(len(set(mu[cell])) >= 3 for cell in cells):
        return read_between(flops, mu)
    as_it_is = np.eye(len(rows))
    return [(np.exp(np.log(flops[cell]).mean()), as_it_is[cell], mu[cell]) for cell in cells]


def read_between(flops, mu):
    """As budgets_of, from a parabola in log C through each recurrence's runs, at common budgets."""
    groups = {}  # mu_rec: the positions of its rows, three budgets at least
    for m in sorted(set(mu)):
        group = np.flatnonzero(mu == m)
        if len(set(flops[group])) >= 3:
            groups[m] = group
    if len(groups) < 3:
        return []

    # Budgets that all groups cover, as many as the smallest group has.
    low = max(flops[group].min() for group in groups.values())
    high = min(flops[group].max() for group in groups.values())
    number_of_budgets = min(len(set(flops[group])) for group in groups.values())
    result = []
    for c in np.geomspace(low, high, number_of_budgets):
        W = np.zeros((len(groups), len(flops)))
        for k, group in enumerate(groups.values()):
            # The constant of a parabola in log(flops / c) is its value at c.
            W[k, group] = np.linalg.pinv(np.vander(np.log(flops[group] / c), 3))[-1]
        result.append((c, W, np.array(list(groups))))
    return result


def mean_where(values, ok):
    """Means (R,) over the entries (n, R) that are ok."""
    return np.where(ok, values, 0).sum(0) / ok.sum(0)


def fit_lines(x, y, ok):
    """Slopes and intercepts (R,) of least squares lines over the entries that are ok.

    x (n,); y and ok (n, R)."""
    with np.errstate(all="ignore"):  # no entries at all: NaN
        x = x[:, None] + 0 * y
        dx = x - mean_where(x, ok)
        slope = mean_where(dx * y, ok) / mean_where(dx * dx, ok)
        slope = np.where(ok.sum(0) >= 2, slope, np.nan)
        return slope, mean_where(y, ok) - slope * mean_where(x, ok)


def interval(samples):
    """The central 95 % of what is finite, [None, None] where that is too little."""
    samples = np.asarray(samples, dtype=float)
    samples = samples[np.isfinite(samples)]
    if len(samples) < 20:
        return [None, None]
    return np.percentile(samples, [2.5, 97.5]).tolist()


def isoflop(rows, resamples=RESAMPLES, seed=0):
    """Parabolas in log mu of the log loss at each budget, and power laws of their minima (§5.2).

    Returns (optima, power laws, notes). Intervals are of a parametric bootstrap: the noise of a
    run's log loss is estimated from what the parabolas leave over, all budgets together, and added
    to the data `resamples` times, each time with a level drawn from its own uncertainty."""
    rows, notes, cells = trained_depth(rows), [], []
    for c, W, mu in budgets_of(rows):
        if len(set(mu)) >= 3:
            cells.append((c, W, mu))
        else:
            notes.append(f"{c:.3g} FLOPs: {len(set(mu))} recurrences, a parabola needs 3")
    if not cells:
        nothing = "no budget has 3 recurrences evaluated at T = mu_rec: no optimum can be fitted"
        return [], {}, [*notes, nothing]

    log_loss, noisy = resampled(rows, cells, resamples, seed)
    if not noisy:
        notes.append("3 recurrences a budget and one seed leave nothing over to estimate the noise "
                     "from: no intervals")
    token_cost = log_cost_of_token(rows)
    optima, log_mu, log_tokens = [], [], []  # for each budget; the latter two (1 + resamples,)
    for c, W, mu in cells:
        optimum, best = minimum(c, W, mu, log_loss, token_cost)
        optima.append(optimum)
        log_mu.append(best)
        log_tokens.append(np.log(c) - token_cost(best))
        if optimum["inside"] and noisy:
            optimum["ci"] = interval(np.exp(best[1:]))
        if not optimum["inside"]:
            lowest = mu[np.argmin(W @ log_loss[:, 0])]
            notes.append(f"{c:.3g} FLOPs: no optimum inside recurrences {mu.min():g} to "
                         f"{mu.max():g} (lowest loss at {lowest:g}); left out of the power laws")

    laws = {}
    inside = sum(optimum["inside"] for optimum in optima)
    if inside < 2:
        notes.append(f"{inside} budgets with an optimum inside the recurrences, "
                     "a power law needs 2")
    else:
        laws["mu_rec"] = power_law(optima, log_mu, noisy)
        laws["tokens"] = power_law(optima, log_tokens, noisy)
    return optima, laws, notes


def resampled(rows, cells, resamples, seed):
    """Log losses (rows, 1 + resamples), the data first, and whether there is noise to add."""
    # For each cell the matrix from all log losses to what the parabola leaves over of its own.
    left_over = []
    for _, W, mu in cells:
        V = np.vander(np.log(mu), 3)
        left_over.append(W - V @ np.linalg.pinv(V) @ W)
    left_over = np.concatenate(left_over)  # (residuals, rows)
    gram = left_over.T @ left_over
    noisy = np.trace(gram) > 1e-9

    y = np.log(column(rows, "val_loss"))
    log_loss = np.repeat(y[:, None], resamples + 1, 1)
    if noisy:
        rng = np.random.default_rng(seed)
        noise = np.linalg.norm(left_over @ y) / math.sqrt(np.trace(gram))
        # The estimate of a variance from f degrees of freedom is chi-squared(f) / f of the truth.
        freedom = np.trace(gram) ** 2 / (gram ** 2).sum()
        level = noise * np.sqrt(freedom / rng.chisquare(freedom, resamples))
        log_loss[:, 1:] += level * rng.standard_normal((len(y), resamples))
    return log_loss, noisy


def log_cost_of_token(rows):
    """log FLOPs of a token as a polynomial in log mu_rec."""
    log_mu = np.log(column(rows, "mu_rec"))
    log_cost = np.log(column(rows, "flops") / column(rows, "tokens"))
    degree = min(3, distinct(rows, "mu_rec") - 1)
    return np.polynomial.Polynomial.fit(log_mu, log_cost, degree)


def minimum(c, W, mu, log_loss, token_cost):
    """(what is known of the optimum at a budget, log mu* (1 + resamples,), NaN where outside)."""
    # Least squares: the coefficients of the parabola, highest first, each (1 + resamples,).
    parabola = np.linalg.pinv(np.vander(np.log(mu), 3)) @ W
    a, b, const = parabola @ log_loss
    with np.errstate(all="ignore"):
        best = np.where(a > 1e-12, -b / (2 * a), np.nan)
    best[~((best > np.log(mu.min())) & (best < np.log(mu.max())))] = np.nan

    optimum = {
        "flops": c,
        "recurrences": sorted(set(mu.tolist())),
        "parabola": [a[0], b[0], const[0]],
        "inside": bool(np.isfinite(best[0])),
        "mu_rec": None,
        "ci": [None, None],
        "tokens": None,
        "val_loss": None,
    }
    if optimum["inside"]:
        optimum["mu_rec"] = math.exp(best[0])
        optimum["tokens"] = c / math.exp(token_cost(best[0]))
        optimum["val_loss"] = math.exp(const[0] - b[0] ** 2 / (4 * a[0]))
    return optimum, best


def power_law(optima, log_values, noisy):
    """A line through log values (budgets, 1 + resamples) against log C: exponent, coefficient.

    "band" holds the slopes and intercepts of the resamples."""
    inside = np.array([optimum["inside"] for optimum in optima])
    log_flops = np.log([optimum["flops"] for optimum in optima])[inside]
    log_values = np.array(log_values)[inside]
    slope, const = fit_lines(log_flops, np.nan_to_num(log_values), np.isfinite(log_values))
    return {
        "exponent": slope[0],
        "coefficient": math.exp(const[0]),
        "ci": interval(slope[1:]) if noisy else [None, None],
        "band": [slope[1:], const[1:]],
    }

# ----------------------------------------------------------------------------- parametric laws

# A law predicts losses (fits, rows) from its parameters p, each (fits, 1), and the columns c of
# the rows, each (rows,). All parameters but phi are positive.


def training_law(p, c):
    return p.E + p.X * (c.once + c.mu * c.core) ** -p.x + p.Y * c.D ** -p.y


def unified_law(p, c):
    return training_law(p, c) + p.Z * torch.exp(-p.z * c.loops / c.mu)


def excess_law(p, c):
    """The last term of the unified law alone, the loss at T = mu_rec given."""
    return c.L_mu + p.Z * torch.exp(-p.z * c.loops / c.mu)


def test_time_law(p, c):
    return p.L_inf + p.Z * torch.exp(-p.z * c.loops)


def worth_law(p, c):
    return p.E + p.A * (c.once + c.mu ** p.phi * c.core) ** -p.alpha + p.B * c.D ** -p.beta


# name: (parameters, prediction)
LAWS = {
    "training": ("E X x Y y", training_law),
    "unified": ("E X x Y y Z z", unified_law),
    "excess": ("Z z", excess_law),
    "test time": ("L_inf Z z", test_time_law),
    "worth": ("E A alpha B beta phi", worth_law),
}


def parameter_names(law):
    return LAWS[law][0].split()


def law_inputs(rows, units):
    """The columns that laws use, float64 tensors (rows,).

    Parameters (once, core) and tokens D are in units of their geometric means over the data
    fitted, else the fit is ill-conditioned."""
    def tensor(name):
        return torch.tensor([float(row.get(name, math.nan)) for row in rows], dtype=torch.float64)
    return SimpleNamespace(
        once=tensor("params_noncore") / units["N"],
        core=tensor("params_core") / units["N"],
        D=tensor("tokens") / units["D"],
        mu=tensor("mu_rec"),
        loops=tensor("recurrence"),
        L=tensor("val_loss"),
        L_mu=tensor("L_mu"),
    )


def named_parameters(law, theta):
    """The parameters of many fits, tensors (fits, 1), from theta (fits, parameters).

    theta holds logarithms, so that what must be positive is; phi is as it is."""
    result = SimpleNamespace()
    for i, name in enumerate(parameter_names(law)):
        value = theta[:, i] if name == "phi" else theta[:, i].clamp(-40, 40).exp()
        setattr(result, name, value.unsqueeze(1))
    return result


def objective_of(law, theta, data, weights=None):
    """Huber loss (fits,) of the error of the log prediction, delta 1e-3, times 1e6."""
    error = LAWS[law][1](named_parameters(law, theta), data).log() - data.L.log()
    huber = torch.nn.functional.huber_loss(
        error, torch.zeros_like(error), reduction="none", delta=1e-3) * 1e6
    if weights is not None:
        huber = huber * weights
    return huber.sum(1)


def minimise(law, data, starts, weights=None, fixed=None):
    """The objective minimised by L-BFGS, as Hoffmann et al. 2022 (approach 3).

    starts: (fits, parameters), all at once: the fits are independent, so their sum has its minimum
    where each has. weights: (fits, rows), how often each row counts. fixed: {index of a parameter:
    its value}. Returns (theta, objective (fits,))."""
    theta = starts.clone().requires_grad_()
    free = torch.ones_like(theta)
    for i, value in (fixed or {}).items():
        theta.data[:, i] = value
        free[:, i] = 0
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=300, history_size=30, line_search_fn="strong_wolfe",
        tolerance_grad=1e-7, tolerance_change=1e-11)

    def closure():
        optimizer.zero_grad()
        total = objective_of(law, theta, data, weights).sum()
        total.backward()
        theta.grad.mul_(free)
        return total
    optimizer.step(closure)
    with torch.no_grad():
        return theta.detach(), objective_of(law, theta, data, weights)


def starts_for(law, rows, n, seed):
    """n random starts (n, parameters), logarithms but for phi.

    The asymptote is somewhat below the lowest loss, the terms share what is above it."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    def log_uniform(low, high):
        return uniform(math.log(low), math.log(high))

    lowest, highest = column(rows, "val_loss").min(), column(rows, "val_loss").max()
    value = {}
    value["E"] = log_uniform(0.3 * lowest, 0.98 * lowest)
    value["L_inf"] = log_uniform(0.9 * lowest, lowest)
    value["phi"] = uniform(0, 1)
    value["z"] = log_uniform(0.2, 3)
    for name in ("x", "y", "alpha", "beta"):
        value[name] = log_uniform(0.1, 1.5)
    for name in "XYABZ":
        value[name] = log_uniform(0.05, 1) + math.log(max(highest - lowest, 1e-3))
    return torch.stack([value[name] for name in parameter_names(law)], 1)


def fit_law(law, rows, starts=64, resamples=RESAMPLES, fixed=None, seed=0):
    """The best of many fits, and bootstrap fits over the runs.

    Returns {"law", "units", "theta" (parameters,), "samples" (resamples, parameters),
    "objective"}."""
    N = column(rows, "params_noncore") + column(rows, "mu_rec") * column(rows, "params_core")
    D = column(rows, "tokens")
    units = {"N": math.exp(np.log(N).mean()), "D": math.exp(np.log(D).mean())}
    data = law_inputs(rows, units)

    # The best starts once more without the others: bad ones hold up the line search of all.
    theta = starts_for(law, rows, starts, seed)
    for keep in (starts // 8, 1, 1):
        theta, objective = minimise(law, data, theta, fixed=fixed)
        theta = theta[objective.argsort()[:keep]]

    # A resample draws runs with replacement; all rows of a run count as often as it was drawn.
    samples = torch.empty(0, theta.shape[1])
    if resamples:
        runs = [run_key(row) for row in rows]
        index = {run: i for i, run in enumerate(dict.fromkeys(runs))}
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), resamples)
        weights = torch.tensor(counts[:, [index[run] for run in runs]], dtype=torch.float64)
        samples, _ = minimise(law, data, theta.repeat(resamples, 1), weights, fixed)
    return {"law": law, "units": units, "theta": theta[0], "samples": samples,
            "objective": objective.min().item()}


def predict_law(fit, rows, samples=False):
    """Losses (rows,), or those of every resample (resamples, rows)."""
    theta = fit["samples"] if samples else fit["theta"][None]
    predict_losses = LAWS[fit["law"]][1]
    losses = predict_losses(named_parameters(fit["law"], theta), law_inputs(rows, fit["units"]))
    return losses.numpy() if samples else losses.numpy()[0]


def error_of(fit, rows):
    """Mean relative error."""
    return float(np.abs(predict_law(fit, rows) / column(rows, "val_loss") - 1).mean())


def natural_units(fit, theta):
    """{parameter: values (fits,)}, where X and A are per parameter, Y and B per token."""
    named = named_parameters(fit["law"], theta)
    values = {name: value[:, 0].numpy() for name, value in vars(named).items()}
    for name, power, unit in (("X", "x", "N"), ("A", "alpha", "N"), ("Y", "y", "D"),
                              ("B", "beta", "D")):
        if name in values:
            values[name] = values[name] * fit["units"][unit] ** values[power]
    return values


def natural(fit):
    """{parameter: value, "ci": {parameter: [low, high]}} in natural units."""
    result = {}
    for name, value in natural_units(fit, fit["theta"][None]).items():
        result[name] = value.item()
    result["ci"] = {}
    for name, values in natural_units(fit, fit["samples"]).items():
        result["ci"][name] = interval(values)
    return result


def held_out(law, rows):
    """Mean relative error of a law on the largest budget, fitted to the smaller ones.

    None where there are too few."""
    top = max(row["flops"] for row in rows) / 1.1
    seen = [row for row in rows if row["flops"] < top]
    unseen = [row for row in rows if row["flops"] >= top]
    different = {(row["mu_rec"], row["flops"]) for row in seen}
    if len(different) <= len(parameter_names(law)):
        return None
    return error_of(fit_law(law, seen, resamples=0), unseen)

# ----------------------------------------------------------------------------- all fits of a table


def main_model(rows):
    """The rows of the model with most runs."""
    runs = {}
    for row in rows:
        runs.setdefault(row["model"], set()).add(run_key(row))
    name = max(runs, key=lambda model: len(runs[model]))
    return [row for row in rows if row["model"] == name]


def without_bands(laws):
    """Power laws as --json writes them, without the samples that figures and predictions need."""
    result = {}
    for name, law in laws.items():
        result[name] = {key: value for key, value in law.items() if key != "band"}
    return result


def fit_table(rows, resamples=RESAMPLES):
    """Everything that can be fitted to a table of one accounting.

    Returns the dict that --json writes, and the fits themselves for figures and predictions. The
    laws are those of the main model, that with most runs; the worth of a recurrence is of all."""
    main = main_model(rows)
    own = trained_depth(main)
    optima, laws, notes = isoflop(main, resamples)
    out = {
        "model": main[0]["model"],
        "accounting": main[0]["accounting"],
        "runs": len({run_key(row) for row in main}),
        "power_laws": without_bands(laws),
        "isoflop": optima,
    }
    fits = {"rows": main, "laws": laws}

    # Three recurrences and three token counts at least tell the terms of a law apart.
    enough = {"mu_rec": 3, "tokens": 3}
    everywhere = trained_depth(rows)
    for key, law, data, least in (
        ("training_law", "training", own, enough),
        ("unified", "unified", main, enough | {"recurrence": 3}),
        ("recurrence_worth", "worth", everywhere, enough),
    ):
        reasons = reasons_against(law, data, least)
        if reasons:
            notes.append(f"{law} law: not fitted ({'; '.join(reasons)})")
        else:
            fits[key] = fit_law(law, data, resamples=resamples)
            out[key] = natural(fits[key]) | {"held_out_error": held_out(law, data)}

    # How much of the unified law's error is its last term's, the loss at T = mu_rec given?
    at_mu = {run_key(row): row["val_loss"] for row in own}
    excess = [row | {"L_mu": at_mu[run_key(row)]} for row in main if run_key(row) in at_mu]
    if "unified" in out and excess:
        error = error_of(fit_law("excess", excess, resamples=0), excess)
        out["unified"]["error_given_loss_at_mu"] = error

    out["test_time"], fits["test_time"] = fit_test_time(main)
    if "recurrence_worth" in out:
        objective = fits["recurrence_worth"]["objective"]
        out["recurrence_worth"] = worth_of(everywhere, out["recurrence_worth"], objective)
        if distinct(rows, "model") < 2:
            notes.append("recurrence worth: one model size only, so phi, alpha, A and E can stand "
                         "in for each other")
    return out | {"gain": gains(own), "notes": notes}, fits


def reasons_against(law, rows, least):
    """Why the rows cannot tell the parameters of a law; least: {column: values it must have}."""
    reasons = []
    for name, n in least.items():
        if distinct(rows, name) < n:
            reasons.append(f"{distinct(rows, name)} values of {name}, it needs {n}")
    if len(rows) <= len(parameter_names(law)):
        reasons.append(f"{len(rows)} rows for {len(parameter_names(law))} parameters")
    if distinct(rows, "val_loss") < 2:
        reasons.append("all losses are equal")
    return reasons


def fit_test_time(rows):
    """The test-time law of each looped run: what --json writes of them, and {Run: fit}."""
    numbers, fits = [], {}
    for run in dict.fromkeys(map(run_key, rows)):
        data = [row for row in rows if run_key(row) == run]
        if run.mu_rec > 1 and len(data) >= 4:
            fit = fit_law("test time", data, starts=16, resamples=0)
            values = natural(fit)
            del values["ci"]  # of no resamples
            numbers.append(run._asdict() | values | {"error": error_of(fit, data)})
            fits[run] = fit
    return numbers, fits


def worth_of(rows, law, objective):
    """phi, and how much worse the law fits where a loop is worth nothing (0) or a layer (1)."""
    position = parameter_names("worth").index("phi")
    objectives = {"free": objective}
    for phi in (0, 1):
        fit = fit_law("worth", rows, resamples=0, fixed={position: float(phi)})
        objectives[f"phi = {phi}"] = fit["objective"]
    return {"phi": law["phi"], "ci": law["ci"]["phi"], "law": law, "objective": objectives}


def gains(rows):
    """What looping gains over mu_rec = 1 at each budget at which runs were made.

    Differences of val loss between runs of the same seed, by the recurrence that gains most on
    average. rows: at T = mu_rec."""
    result = []
    for c, W, _ in budgets_of(rows):
        if not np.isin(W, (0, 1)).all():  # read off between budgets, not made there
            continue
        losses = {}  # mu_rec: {seed: loss}
        for position in W.argmax(1):
            row = rows[position]
            losses.setdefault(row["mu_rec"], {})[row["seed"]] = row["val_loss"]
        fixed = losses.pop(1, {})

        paired = {}  # mu_rec: gains of the seeds that both have
        for mu, seeds in losses.items():
            differences = [fixed[seed] - loss for seed, loss in seeds.items() if seed in fixed]
            if differences:
                paired[mu] = differences
        if paired:
            best = max(paired, key=lambda mu: np.mean(paired[mu]))  # noqa: B023
            result.append({"flops": c, "mu_rec": best, "gain": np.mean(paired[best]),
                           "by_seed": paired[best]})
    return result

# ----------------------------------------------------------------------------- the report


def rounded(value, digits=3):
    return "-" if value is None else f"{value:.{digits}g}"


def span(ci):
    return f"[{rounded(ci[0])}, {rounded(ci[1])}]"


def report(out):
    """Print the fits beside the published figures."""
    print(f"\n{out['model']}, {out['runs']} runs, {out['accounting']} FLOPs")
    if out["isoflop"]:
        report_isoflop(out)
    for name, label in (("mu_rec", "mu*"), ("tokens", "D*")):
        if name in out["power_laws"]:
            law = out["power_laws"][name]
            print(f"{label:3s} = {law['coefficient']:.3g} C^{law['exponent']:.3f}   "
                  f"95 % interval {span(law['ci'])}   published: {PUBLISHED[name]}")
    for key, label in (("training_law", "training law"), ("unified", "unified law")):
        if key in out:
            report_law(key, label, out[key])
    if out["test_time"]:
        errors = [run["error"] for run in out["test_time"]]
        print(f"test-time law, {len(errors)} runs: mean error {np.mean(errors):.2%}, "
              f"largest {max(errors):.2%}")
    if "recurrence_worth" in out:
        worth = out["recurrence_worth"]
        objectives = ", ".join(f"{name} {value:.4g}" for name, value in worth["objective"].items())
        print(f"worth of a recurrence: phi = {worth['phi']:.2f} {span(worth['ci'])}   "
              f"published: {PUBLISHED['phi']}; objective: {objectives}")
    for note in out["notes"]:
        print("note:", note)


def report_isoflop(out):
    """Print the optimum at each budget and what looping gains there."""
    print("\n     FLOPs   mu* [95 %]                 D*         loss at mu*   "
          "gain over mu_rec = 1 (of each seed)")
    gain_at = {gain["flops"]: gain for gain in out["gain"]}
    for optimum in out["isoflop"]:
        best = "outside the recurrences"
        if optimum["inside"]:
            best = f"{rounded(optimum['mu_rec'])} {span(optimum['ci'])}"
        gained = ""
        if optimum["flops"] in gain_at:
            gain = gain_at[optimum["flops"]]
            by_seed = ", ".join(f"{difference:+.4f}" for difference in gain["by_seed"])
            gained = f"{gain['gain']:+.4f} by mu_rec {gain['mu_rec']:g} ({by_seed})"
        print(f"{optimum['flops']:10.3g}   {best:24s}   {rounded(optimum['tokens']):9s}  "
              f"{rounded(optimum['val_loss'], 5):11s}   {gained}")


def report_law(key, label, law):
    """Print the parameters of a law and its errors."""
    values = ", ".join(f"{name} {rounded(law[name])} {span(ci)}" for name, ci in law["ci"].items())
    print(f"{label}: {values}")
    if law["held_out_error"] is not None:
        print(f"  error on the largest budget, fitted without it: {law['held_out_error']:.2%}   "
              f"published: {PUBLISHED[key]}")
    if "error_given_loss_at_mu" in law:
        print("  error of the test-time term alone, loss at T = mu_rec given: "
              f"{law['error_given_loss_at_mu']:.2%}   published: {PUBLISHED['excess']}")

# ----------------------------------------------------------------------------- pictures


def draw(out, fits, folder):
    """Up to four figures, of what was fitted."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = trained_depth(fits["rows"])
    if budgets_of(rows):
        draw_isoflop(out, rows, folder / "isoflop.png")
    if fits["laws"]:
        draw_power_laws(out, fits["laws"], folder / "power-laws.png")
    if "training_law" in fits:
        draw_contours(out, fits["training_law"], rows, folder / "contours.png")
    if fits["test_time"]:
        draw_test_time(fits, folder / "test-time.png")


def draw_isoflop(out, rows, path):
    """Log losses at each budget, with the parabola through them and its minimum."""
    optima = {optimum["flops"]: optimum for optimum in out["isoflop"]}
    log_loss = np.log(column(rows, "val_loss"))
    curves = []
    for c, W, mu in budgets_of(rows):
        curve = {"flops": c, "mu": mu, "log_loss": W @ log_loss, "parabola": None, "optimum": None}
        if c in optima:
            curve["parabola"] = optima[c]["parabola"]
            if optima[c]["inside"]:
                curve["optimum"] = (optima[c]["mu_rec"], math.log(optima[c]["val_loss"]))
        curves.append(curve)
    figures.isoflop(path, curves, f"Equal FLOPs and parameters ({out['model']})")
    print("wrote", path)


def draw_power_laws(out, laws, path):
    """mu* and D* against the budget, with the fitted and the published slope."""
    inside = [optimum for optimum in out["isoflop"] if optimum["inside"]]
    flops = column(inside, "flops")
    x = np.geomspace(flops.min() / 1.5, flops.max() * 1.5, 50)
    panels = []
    for name, label in (("mu_rec", "best mean recurrence mu* (loops)"),
                        ("tokens", "best token count D*")):
        slope, const = laws[name]["band"]
        lines = np.exp(const[None] + np.log(x)[:, None] * slope[None])  # (x, resamples)
        low, high = np.nanpercentile(lines, [2.5, 97.5], axis=1)
        panels.append({
            "label": label,
            "values": column(inside, name),
            "exponent": laws[name]["exponent"],
            "coefficient": laws[name]["coefficient"],
            "x": x,
            "low": low,
            "high": high,
            "published": SLOPES[name],
        })
    figures.power_laws(path, flops, panels)
    print("wrote", path)


def draw_contours(out, law, rows, path):
    """The loss that the training law predicts, the runs, and the best choice at each budget."""
    mu, tokens, flops = (column(rows, name) for name in ("mu_rec", "tokens", "flops"))
    x = np.geomspace(mu.min(), mu.max(), 60)
    y = np.geomspace(tokens.min(), tokens.max(), 60)
    cells = [rows[0] | {"mu_rec": a, "tokens": b} for b in y for a in x]
    loss = predict_law(law, cells).reshape(60, 60)  # (y, x)

    costs = costs_of(rows)
    best = [efficient(law, rows[0], costs, c) for c in np.geomspace(flops.min(), flops.max(), 40)]
    best_mu, best_tokens, _ = np.array(best).T
    title = f"Val loss by the training law ({out['model']}, nats per token)"
    figures.contours(path, (mu, tokens), (x, y, loss), (best_mu, best_tokens), title)
    print("wrote", path)


def draw_test_time(fits, path):
    """Loss against loops at test time: one run of each recurrence, at the largest budget."""
    top = max(run.flops for run in fits["test_time"]) / 1.1
    shown = {}  # mu_rec: the first of its runs
    for run in fits["test_time"]:
        if run.flops >= top:
            shown.setdefault(run.mu_rec, run)
    curves = []
    for mu, run in sorted(shown.items()):
        data = [row for row in fits["rows"] if run_key(row) == run]
        data.sort(key=lambda row: row["recurrence"])
        loops = column(data, "recurrence")
        fit_loops = np.geomspace(loops[0], loops[-1], 80)
        at = [data[0] | {"recurrence": n} for n in fit_loops]
        curves.append({
            "mu_rec": mu,
            "T": loops,
            "loss": column(data, "val_loss"),
            "fit_T": fit_loops,
            "fit_loss": predict_law(fits["test_time"][run], at),
        })
    figures.test_time(path, curves)
    print("wrote", path)

# ----------------------------------------------------------------------------- predictions


def costs_of(rows):
    """{mu_rec: FLOPs of a token} of a table, by rising mu_rec."""
    costs = {}
    for row in sorted(rows, key=lambda row: row["mu_rec"]):
        costs[row["mu_rec"]] = row["flops"] / row["tokens"]
    return costs


def efficient(fit, size, costs, flops):
    """(mu, D, loss) of lowest predicted loss at a budget.

    size: a row with the parameters of the model. costs: {mu: FLOPs of a token}; in between by
    interpolation of logarithms."""
    known = np.log(list(costs))
    mu = np.exp(np.linspace(known[0], known[-1], 400))
    tokens = flops / np.exp(np.interp(np.log(mu), known, np.log(list(costs.values()))))
    cells = [size | {"mu_rec": m, "tokens": d} for m, d in zip(mu, tokens)]
    loss = predict_law(fit, cells)
    best = loss.argmin()
    return mu[best], tokens[best], loss[best]


def preset_size(preset, size, costs, accounting):
    """(size, costs) of a preset of train.py, at the recurrences of costs. Raises UserError."""
    if preset not in PRESETS:
        raise UserError(f"--preset is {preset}, must be one of {', '.join(PRESETS)}")
    models = {}
    with torch.device("meta"):  # shapes alone, no memory
        for mu in costs:
            config = ParcaeConfig(**PRESETS[preset] | {"mean_recurrence": int(mu)})
            models[mu] = Parcae(config)
    costs = {mu: model.flops_per_token(accounting=accounting) for mu, model in models.items()}
    noncore, core = models[min(models)].matmul_params(accounting)

    ratio = (noncore + core) / (size["params_core"] + size["params_noncore"])
    warning = ""
    if not 1 / 1.5 < ratio < 1.5:
        warning = ": the laws were not measured at this size, take this as a direction"
    print(f"{preset}: {ratio:.3g} times the parameters of the model fitted{warning}")
    return size | {"params_noncore": noncore, "params_core": core}, costs


def predict(args):
    """Print the best recurrence, tokens and loss for a budget."""
    rows, accounting = read_tables(args.tables or default_tables(), args.accounting)
    out, fits = fit_table([row for row in rows if row["accounting"] == accounting])
    if "training_law" not in fits:
        reasons = "; ".join(out["notes"])
        raise UserError(f"these tables do not determine a training law: {reasons}")
    rows = trained_depth(fits["rows"])
    flops, law, laws = args.flops, fits["training_law"], fits["laws"]
    low, top = column(rows, "flops").min(), column(rows, "flops").max()
    print(f"from {out['runs']} runs of {out['model']} at {low:.2g} to {top:.2g} FLOPs "
          f"({accounting})")

    size, costs = rows[0], costs_of(rows)
    if args.preset:
        size, costs = preset_size(args.preset, size, costs, accounting)
    said = {"mu_rec": "", "tokens": ""}
    if laws and not args.preset:
        # The power laws: what the optima at the budgets measured say.
        mu, tokens = (laws[name]["coefficient"] * flops ** laws[name]["exponent"] for name in said)
        for name in said:
            slope, const = laws[name]["band"]
            ci = interval(np.exp(const + slope * math.log(flops)))
            said[name] = f"   95 % interval {span(ci)}"
    else:
        mu, tokens, _ = efficient(law, size, costs, flops)
        print(f"by the minimum of the training law among mu_rec {min(costs):g} to "
              f"{max(costs):g}:")

    cell = [size | {"mu_rec": max(1, mu), "tokens": tokens}]
    loss = predict_law(law, cell)[0]
    ci = interval(predict_law(law, cell, samples=True)[:, 0])
    print(f"mu*  = {mu:.3g}{said['mu_rec']}")
    print(f"D*   = {tokens:.3g} tokens{said['tokens']}")
    print(f"loss = {loss:.4g} nats per token   95 % interval {span(ci)}")
    if not low / 2 < flops < 2 * top:
        beyond = max(flops / top, low / flops)
        print(f"warning: {beyond:.3g} times beyond the budgets measured ({low:.2g} to {top:.2g}); "
              "the intervals know nothing of that")

# ----------------------------------------------------------------------------- command line


def default_tables():
    tables = sorted((HERE / "results").glob("sweep*.csv"))
    if not tables:
        raise UserError(f"{HERE / 'results'} holds no sweep*.csv: run a sweep, or name a table")
    return tables


def can_draw():
    """Whether there is matplotlib; a line says so if not."""
    try:
        figures.pyplot()
    except UserError:
        print("no figures: pip install matplotlib")
        return False
    return True


def fit(args):
    """Fit everything, print it beside the published figures, write --json, draw."""
    rows, accounting = read_tables(args.tables or default_tables(), args.accounting)
    drawing = can_draw()  # asked before the fit, which takes a while
    out, fits = fit_table([row for row in rows if row["accounting"] == accounting], args.resamples)
    report(out)
    if not args.accounting:
        for other in sorted({row["accounting"] for row in rows} - {accounting}):
            own = [row for row in rows
                   if row["accounting"] == other and row["model"] == out["model"]]
            optima, laws, _ = isoflop(own, args.resamples)
            out.setdefault("other_accounting", {})[other] = {
                "isoflop": optima, "power_laws": without_bands(laws)}
            report_other(other, laws)
    if args.json:
        write_text(args.json, json.dumps(out, indent=1))
        print("wrote", args.json)
    if drawing:
        draw(out, fits, Path(args.figures))


def report_other(accounting, laws):
    """Print the exponents by another accounting."""
    said = []
    for name, label in (("mu_rec", "mu*"), ("tokens", "D*")):
        if name in laws:
            said.append(f"{label} ~ C^{laws[name]['exponent']:.3f} {span(laws[name]['ci'])}")
    print(f"\nby {accounting} FLOPs: {', '.join(said) or 'no power law'}")


def parse_args(words):
    """The command's settings; `fit` where no command is given."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(prog="python scaling.py", dest="command", metavar="command")
    fits = commands.add_parser("fit", help="fit the laws and draw")
    predicts = commands.add_parser("predict", help="the best recurrence and tokens for a budget")
    for command in (fits, predicts):
        command.add_argument("tables", nargs="*", metavar="DIR|CSV",
                             help="runs or tables (default: results/sweep*.csv)")
        command.add_argument("--accounting", metavar="NAME",
                             help="rows to use (default: exact, then the others' power laws)")

    add = fits.add_argument
    add("--json", metavar="FILE", help="write every fitted number")
    add("--figures", default="results", metavar="DIR",
        help="where figures go (default: %(default)s)")
    add("--resamples", type=number(int, 0), default=RESAMPLES, metavar="N",
        help="of the bootstrap (default: %(default)s)")

    add = predicts.add_argument
    add("--flops", type=number(float, 1), required=True, metavar="C", help="training FLOPs")
    add("--preset", metavar="NAME", help="a model of train.py (default: the model fitted)")

    if words[:1] == ["sweep"]:
        raise UserError("sweeps have a script of their own: python sweep.py")
    return parser.parse_args(words or ["fit"])


def main():
    args = parse_args(sys.argv[1:])
    torch.set_num_threads(1)  # the fits are small: threads cost more than they bring
    if args.command == "fit":
        fit(args)
    else:
        predict(args)


if __name__ == "__main__":
    run_script(main)
