"""The scaling laws of looping: sweeps of runs at equal FLOPs, fits of the laws, predictions, figures.

    python scaling.py                                     fit the tables in results/, compare with the paper, draw
    python scaling.py sweep --budgets 1e12 2e12 4e12 8e12 --recurrences 1 2 4 8 --jobs 2 --out out/sweep --n-embd 32
    python scaling.py fit out/sweep --json out/fit.json   a directory of runs, or CSV files from anywhere
    python scaling.py predict --flops 1e14                the best recurrence and tokens for a budget

With parameters and FLOPs C fixed, loops compete with tokens: the best mean recurrence mu* and token
count D* grow as powers of C (§5.2 of "Parcae", arXiv 2604.12946). The laws (§5.2, §5.3, and phi from
"How Much Is One Recurrence Worth?", arXiv 2604.21106), N(mu) = N_noncore + mu N_core:

    isoFLOP     log L = parabola in log mu at each C; its minimum is mu*(C), D*(C)
    training    L(mu, D)     = E + X N(mu)^-x + Y D^-y
    test time   L(T)         = L_inf + Z exp(-z T)                     one model, T loops
    unified     L(T, mu, D)  = E + X N(mu)^-x + Y D^-y + Z exp(-z T / mu)
    worth       L(r, D)      = E + A (N_noncore + r^phi N_core)^-alpha + B D^-beta

A table has one row for a run and a number of loops T ("recurrence") at which it was evaluated.
"""

import concurrent.futures
import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from common import COUNT, LOOPS, SEED, Parser, UserError, lock, number, read_json, run_script, some_path, whole_file, write_text
from model import PRESETS, Parcae, ParcaeConfig

COLUMNS = {"model": str, "params_core": float, "params_noncore": float, "flops": float, "accounting": str, "mu_rec": float,
           "mu_bwd": float, "tokens": float, "recurrence": float, "val_loss": float, "seed": int}
PUBLISHED = {"mu_rec": "C^0.40", "tokens": "C^0.78", "phi": "0.46 [0.41, 0.53]", "training_law": "1.3 % (140M), 0.8 % (370M)",
             "unified": "0.85 to 1.31 %", "excess": "0.10 to 0.17 %"}
SLOPES = {"mu_rec": 0.40, "tokens": 0.78}
RESAMPLES = 200
HERE = Path(__file__).parent

# ----------------------------------------------------------------------------- tables


def read_csv(path):
    """Rows of a table, checked. Raises UserError that names the file and the row."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise UserError(f"{path} has no column {', '.join(missing)}; needed: {', '.join(COLUMNS)}")
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    rows = []
    for position, line in enumerate(lines, start=2):
        row = {}
        for name, kind in COLUMNS.items():
            try:
                row[name] = int(float(line[name])) if kind is int else kind(line[name])
                if kind is int and row[name] != float(line[name]):
                    raise ValueError
            except (TypeError, ValueError, OverflowError):
                what = "a whole number" if kind is int else "a number"
                raise UserError(f"{path}, row {position}: {name} is {line[name]!r}, must be {what}") from None
            least = 0 if name == "params_core" else sys.float_info.min
            if kind is float and not least <= row[name] < math.inf:
                raise UserError(f"{path}, row {position}: {name} is {line[name]}, must be finite and above 0")
        rows.append(row)
    return rows


def last_line(path):
    """The last line of a log as a dict; {"kind": None, "flops": 0} where there is none. Reads its end alone: a sweep asks often."""
    nothing = {"kind": None, "flops": 0.0}
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            line = json.loads(file.read().split(b"\n")[-2])  # what no newline ends is not whole
            return line if isinstance(line, dict) and {"kind", "flops"} <= line.keys() else nothing
    except (OSError, ValueError, IndexError):
        return nothing


def read_run(path):
    """Rows of a finished run of train.py, for each T by exact and by published accounting; [] if not finished."""
    last = last_line(path / "log.jsonl")
    if last["kind"] != "done":
        return []
    config = read_json(path / "config.json")
    try:
        settings, model, cost = config["settings"], config["model"], config["cost"]
        own = cost[settings["accounting"]]["flops_per_token"]
        rows = [{"model": "{n_prelude}/{n_recurrent}/{n_coda} x {n_embd}".format(**model), "params_core": c["params_core"],
                 "params_noncore": c["params_noncore"], "flops": last["flops"] * c["flops_per_token"] / own, "accounting": accounting,
                 "mu_rec": model["mean_recurrence"], "mu_bwd": min(model["mean_recurrence"], model["backprop_depth"]),
                 "tokens": last["tokens"], "recurrence": int(T), "val_loss": loss, "seed": settings["seed"]}
                for accounting, c in cost.items() for T, loss in last["val_loss"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not the directory of a run: {type(error).__name__} {error}") from None
    finite = [row for row in rows if math.isfinite(row["val_loss"])]
    if len(finite) < len(rows):
        loops = sorted({row["recurrence"] for row in rows if row not in finite})
        print(f"{path}: the val loss at T = {', '.join(map(str, loops))} is not finite and left out")
    return finite


def as_written(row):
    """A row as write_csv writes it."""
    return {k: f"{v:.6g}" if k == "val_loss" else f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()}


def once(rows):
    """The rows without repetitions: a table may be given twice, or beside the directory that it comes from."""
    kept = {tuple(as_written({name: COLUMNS[name](row[name]) for name in COLUMNS}).values()): row for row in rows}
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} rows are there twice and count once")
    return list(kept.values())


def read_tables(paths, accounting=None):
    """The rows of CSV files and of directories of runs in one accounting: the one named, else exact, else what is there."""
    rows = []
    for path in map(Path, paths):
        if path.is_dir():
            runs = [read_run(log.parent) for log in sorted(path.rglob("log.jsonl"))]
            if [] in runs:
                print(f"{path}: {runs.count([])} of {len(runs)} runs are not finished and left out")
            rows += sum(runs, [])
        else:
            rows += read_csv(path)
    if not rows:
        raise UserError(f"no finished run in {', '.join(map(str, paths))}")
    rows = once(rows)
    there = sorted({row["accounting"] for row in rows})
    if accounting and accounting not in there:
        raise UserError(f"--accounting is {accounting}, these tables have {', '.join(there)}")
    return rows, accounting or ("exact" if "exact" in there else there[0])


def write_csv(path, rows, columns=COLUMNS):
    """A table, of a sweep or of other columns; it appears whole or not at all."""
    with whole_file(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(as_written, rows))


def column(rows, name):
    return np.array([row[name] for row in rows])


def trained_depth(rows):
    """The rows evaluated at T = mu_rec."""
    return [row for row in rows if row["recurrence"] == row["mu_rec"]]


def run_key(row):
    return tuple(row[k] for k in ("model", "mu_rec", "mu_bwd", "flops", "tokens", "seed"))


def count(rows, name):
    return len({row[name] for row in rows})

# ----------------------------------------------------------------------------- isoFLOP


def budgets_of(rows):
    """[(C, W, mu)]: budgets, and for each the matrix W that takes the runs' log losses to those at that budget, with
    their mu_rec. Runs within 3 % of a budget are its cells as they are. Where runs share no budgets (they were
    planned by another accounting), a parabola in log C through each recurrence's runs is read at common ones."""
    flops, mu = column(rows, "flops"), column(rows, "mu_rec")
    levels = []
    for c in np.sort(flops):
        if not levels or c > 1.03 * levels[-1]:
            levels.append(c)
    cells = [np.flatnonzero((flops >= c) & (flops <= 1.03 * c)) for c in levels]
    if any(len(set(mu[i])) >= 3 for i in cells):
        return [(np.exp(np.log(flops[i]).mean()), np.eye(len(rows))[i], mu[i]) for i in cells]
    groups = {m: np.flatnonzero(mu == m) for m in sorted(set(mu))}
    groups = {m: i for m, i in groups.items() if len(set(flops[i])) >= 3}
    if len(groups) < 3:
        return []
    low, high = max(flops[i].min() for i in groups.values()), min(flops[i].max() for i in groups.values())
    result = []
    for c in np.geomspace(low, high, min(len(set(flops[i])) for i in groups.values())):
        W = np.zeros((len(groups), len(rows)))
        for k, i in enumerate(groups.values()):
            W[k, i] = np.linalg.pinv(np.vander(np.log(flops[i] / c), 3))[-1]
        result.append((c, W, np.array(list(groups))))
    return result


def lines(x, y, ok):
    """Slopes and intercepts (R,) of least squares lines over the entries that are ok; x (n,), y and ok (n, R)."""
    with np.errstate(all="ignore"):
        mean = lambda z: np.where(ok, z, 0).sum(0) / ok.sum(0)
        x = x[:, None] + 0 * y
        dx = x - mean(x)
        b = np.where(ok.sum(0) >= 2, mean(dx * y) / mean(dx * dx), np.nan)
        return b, mean(y) - b * mean(x)


def interval(samples):
    """The central 95 % of what is finite, [None, None] where that is too little."""
    samples = np.asarray(samples, dtype=float)
    samples = samples[np.isfinite(samples)]
    return np.percentile(samples, [2.5, 97.5]).tolist() if len(samples) >= 20 else [None, None]


def isoflop(rows, resamples=RESAMPLES, seed=0):
    """Parabolas in log mu of the log loss at each budget, their minima, and the power laws through those (§5.2).

    Returns (optima, power laws, notes). Intervals, by a parametric bootstrap: the noise of a run's log loss is estimated
    from what the parabolas leave over, all budgets together, and added to the data anew `resamples` times, each time
    with a noise level drawn from its own uncertainty."""
    rows, notes, fits = trained_depth(rows), [], []
    for c, W, mu in budgets_of(rows):
        if len(set(mu)) < 3:
            notes.append(f"{c:.3g} FLOPs: {len(set(mu))} recurrences, a parabola needs 3")
        else:
            V = np.vander(np.log(mu), 3)
            fits.append((c, mu, W, np.linalg.pinv(V) @ W, W - V @ np.linalg.pinv(V) @ W))
    if not fits:
        return [], {}, [*notes, "no budget has 3 recurrences evaluated at T = mu_rec: no optimum can be fitted"]
    y = np.log(column(rows, "val_loss"))
    left = np.concatenate([residual for *_, residual in fits])  # runs -> residuals
    gram = left.T @ left
    freedom = np.trace(gram) ** 2 / (gram ** 2).sum() if np.trace(gram) > 1e-9 else 0
    Y = np.repeat(y[:, None], resamples + 1, 1)  # the first column is the data itself
    if freedom:
        rng, noise = np.random.default_rng(seed), np.linalg.norm(left @ y) / math.sqrt(np.trace(gram))
        Y[:, 1:] += noise * np.sqrt(freedom / rng.chisquare(freedom, resamples)) * rng.standard_normal((len(y), resamples))
    else:
        notes.append("3 recurrences a budget and one seed leave nothing over to estimate the noise from: no intervals")
    log_mu = np.log(column(rows, "mu_rec"))
    cost = np.polynomial.Polynomial.fit(log_mu, np.log(column(rows, "flops") / column(rows, "tokens")),  # of a token
                                        min(3, count(rows, "mu_rec") - 1))
    optima, found = [], {"mu_rec": [], "tokens": []}
    for c, mu, W, parabola, _ in fits:
        a, b, const = parabola @ Y
        with np.errstate(all="ignore"):
            best = np.where(a > 1e-12, -b / (2 * a), np.nan)
        best[~((best > np.log(mu.min())) & (best < np.log(mu.max())))] = np.nan
        found["mu_rec"].append(best), found["tokens"].append(np.log(c) - cost(best))
        optimum = {"flops": c, "recurrences": sorted(set(mu.tolist())), "parabola": [a[0], b[0], const[0]],
                   "inside": bool(np.isfinite(best[0])), "mu_rec": None, "ci": [None, None], "tokens": None, "val_loss": None}
        optima.append(optimum)
        if optimum["inside"]:
            optimum |= {"mu_rec": math.exp(best[0]), "tokens": c / math.exp(cost(best[0])),
                        "val_loss": math.exp(const[0] - b[0] ** 2 / (4 * a[0]))}
            if freedom:
                optimum["ci"] = interval(np.exp(best[1:]))
        else:
            notes.append(f"{c:.3g} FLOPs: no optimum inside recurrences {mu.min():g} to {mu.max():g} (lowest loss at "
                         f"{mu[np.argmin(W @ y)]:g}); left out of the power laws")
    inside, laws = np.array([o["inside"] for o in optima]), {}
    if inside.sum() < 2:
        notes.append(f"{inside.sum()} budgets with an optimum inside the recurrences, a power law needs 2")
    else:
        x = np.log([o["flops"] for o in optima])[inside]
        for name, values in found.items():
            values = np.array(values)[inside]
            b, const = lines(x, np.nan_to_num(values), np.isfinite(values))
            laws[name] = {"exponent": b[0], "coefficient": math.exp(const[0]), "ci": interval(b[1:]) if freedom else [None, None],
                          "band": [b[1:], const[1:]]}
    return optima, laws, notes

# ----------------------------------------------------------------------------- parametric laws

# name: (parameters, prediction from them and columns); all parameters but phi are positive. Sizes enter in units of
# their geometric mean over the data (columns once, core, D are given so), else the fit is ill-conditioned.
LAWS = {
    "training": ("E X x Y y", lambda p, c: p.E + p.X * (c.once + c.mu * c.core) ** -p.x + p.Y * c.D ** -p.y),
    "unified": ("E X x Y y Z z", lambda p, c: LAWS["training"][1](p, c) + p.Z * torch.exp(-p.z * c.T / c.mu)),
    "excess": ("Z z", lambda p, c: c.L_mu + p.Z * torch.exp(-p.z * c.T / c.mu)),
    "test time": ("L_inf Z z", lambda p, c: p.L_inf + p.Z * torch.exp(-p.z * c.T)),
    "worth": ("E A alpha B beta phi", lambda p, c: p.E + p.A * (c.once + c.mu ** p.phi * c.core) ** -p.alpha + p.B * c.D ** -p.beta),
}


def columns(rows, units):
    """The columns that laws use, tensors (rows,)."""
    tensor = lambda name: torch.tensor([float(row.get(name, math.nan)) for row in rows], dtype=torch.float64)
    return SimpleNamespace(once=tensor("params_noncore") / units["N"], core=tensor("params_core") / units["N"], L_mu=tensor("L_mu"),
                           D=tensor("tokens") / units["D"], mu=tensor("mu_rec"), T=tensor("recurrence"), L=tensor("val_loss"))


def parameters(law, theta):
    """The parameters of many fits, tensors (fits, 1), from theta (fits, parameters): logarithms, but for phi."""
    return SimpleNamespace(**{name: (theta[:, i] if name == "phi" else theta[:, i].clamp(-40, 40).exp()).unsqueeze(1)
                              for i, name in enumerate(LAWS[law][0].split())})


def minimise(law, data, starts, weights=None, fixed=None):
    """Huber loss (delta 1e-3) of the log prediction minimised by L-BFGS, as Hoffmann et al. 2022 (approach 3).

    starts: (fits, parameters), all at once: the fits are independent, so their sum has its minimum where each has.
    weights: (fits, rows), how often each row counts. fixed: {index: value}. Returns (theta, objective (fits,))."""
    theta, target = starts.clone().requires_grad_(), data.L.log()
    free = torch.ones_like(theta)
    for i, value in (fixed or {}).items():
        theta.data[:, i], free[:, i] = value, 0

    def objective():
        error = LAWS[law][1](parameters(law, theta), data).log() - target
        huber = torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=1e-3) * 1e6
        return (huber if weights is None else huber * weights).sum(1)
    optimizer = torch.optim.LBFGS([theta], max_iter=300, history_size=30, line_search_fn="strong_wolfe", tolerance_grad=1e-7,
                                  tolerance_change=1e-11)

    def closure():
        optimizer.zero_grad()
        total = objective().sum()
        total.backward()
        theta.grad.mul_(free)
        return total
    optimizer.step(closure)
    with torch.no_grad():
        return theta.detach(), objective()


def starts_for(law, rows, n, seed):
    """n random starts: the asymptote somewhat below the lowest loss, the terms sharing what is above it."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
    low, high = column(rows, "val_loss").min(), column(rows, "val_loss").max()
    log_draw = lambda low, high: draw(math.log(low), math.log(high))
    value = {"E": log_draw(0.3 * low, 0.98 * low), "L_inf": log_draw(0.9 * low, low), "phi": draw(0, 1), "z": log_draw(0.2, 3)}
    value |= {name: log_draw(0.1, 1.5) for name in ("x", "y", "alpha", "beta")}
    value |= {name: log_draw(0.05, 1) + math.log(max(high - low, 1e-3)) for name in "XYABZ"}
    return torch.stack([value[name] for name in LAWS[law][0].split()], 1)


def fit_law(law, rows, starts=64, resamples=RESAMPLES, fixed=None, seed=0):
    """The best of many fits, and bootstrap fits over the runs.

    Returns {"law", "units", "theta" (parameters,), "samples" (resamples, parameters), "objective"}."""
    N = column(rows, "params_noncore") + column(rows, "mu_rec") * column(rows, "params_core")
    units = {"N": math.exp(np.log(N).mean()), "D": math.exp(np.log(column(rows, "tokens")).mean())}
    data, theta = columns(rows, units), starts_for(law, rows, starts, seed)
    for keep in (starts // 8, 1, 1):  # bad starts hold up the line search of the others
        theta, objective = minimise(law, data, theta, fixed=fixed)
        theta = theta[objective.argsort()[:keep]]
    samples = torch.empty(0, theta.shape[1])
    if resamples:
        runs = list(map(run_key, rows))
        index = {run: i for i, run in enumerate(dict.fromkeys(runs))}
        counts = np.random.default_rng(seed).multinomial(len(index), np.full(len(index), 1 / len(index)), resamples)
        weights = torch.tensor(counts[:, [index[run] for run in runs]], dtype=torch.float64)
        samples, _ = minimise(law, data, theta.repeat(resamples, 1), weights, fixed)
    return {"law": law, "units": units, "theta": theta[0], "samples": samples, "objective": objective.min().item()}


def predict_law(fit, rows, samples=False):
    """Losses (rows,), or (resamples, rows)."""
    theta = fit["samples"] if samples else fit["theta"][None]
    values = LAWS[fit["law"]][1](parameters(fit["law"], theta), columns(rows, fit["units"])).numpy()
    return values if samples else values[0]


def error_of(fit, rows):
    """Mean relative error."""
    return float(np.abs(predict_law(fit, rows) / column(rows, "val_loss") - 1).mean())


def natural(fit):
    """{parameter: value, "ci": {parameter: [lo, hi]}} in natural units: X, A per parameter, Y, B per token."""
    def convert(theta):
        p = {name: value[:, 0].numpy() for name, value in vars(parameters(fit["law"], theta)).items()}
        for name, power, unit in (("X", "x", "N"), ("A", "alpha", "N"), ("Y", "y", "D"), ("B", "beta", "D")):
            if name in p:
                p[name] = p[name] * fit["units"][unit] ** p[power]
        return p
    return {name: value.item() for name, value in convert(fit["theta"][None]).items()} | \
        {"ci": {name: interval(value) for name, value in convert(fit["samples"]).items()}}


def held_out(law, rows):
    """Mean relative error of a law on the largest budget, fitted to the smaller ones; None where there are too few."""
    top = max(row["flops"] for row in rows) / 1.1
    seen, unseen = [r for r in rows if r["flops"] < top], [r for r in rows if r["flops"] >= top]
    if len({(r["mu_rec"], r["flops"]) for r in seen}) <= len(LAWS[law][0].split()):
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
    return {name: {k: v for k, v in law.items() if k != "band"} for name, law in laws.items()}


def fit_table(rows, resamples=RESAMPLES):
    """Everything that can be fitted to a table of one accounting: the dict that --json writes, and the fits themselves
    (for figures and predictions). The laws of the main model, that with most runs; the worth of a recurrence from all."""
    main, everywhere = main_model(rows), trained_depth(rows)
    own = trained_depth(main)
    optima, laws, notes = isoflop(main, resamples)
    out = {"model": main[0]["model"], "accounting": main[0]["accounting"], "runs": len(set(map(run_key, main))),
           "power_laws": without_bands(laws), "isoflop": optima}
    fits = {"rows": main, "laws": laws, "test_time": {}}

    def attempt(key, law, data, **least):
        """Fit a law if the data can tell its parameters; least: how many values a column must have."""
        few = [f"{count(data, name)} values of {name}, it needs {n}" for name, n in least.items() if count(data, name) < n]
        if len(data) <= len(LAWS[law][0].split()):
            few.append(f"{len(data)} rows for {len(LAWS[law][0].split())} parameters")
        if count(data, "val_loss") < 2:
            few.append("all losses are equal")
        if few:
            notes.append(f"{law} law: not fitted ({'; '.join(few)})")
            return
        fits[key] = fit_law(law, data, resamples=resamples)
        out[key] = natural(fits[key]) | {"held_out_error": held_out(law, data)}

    attempt("training_law", "training", own, mu_rec=3, tokens=3)
    attempt("unified", "unified", main, mu_rec=3, tokens=3, recurrence=3)
    at_mu = {run_key(row): row["val_loss"] for row in own}
    excess = [row | {"L_mu": at_mu[run_key(row)]} for row in main if run_key(row) in at_mu]
    if "unified" in out and excess:
        out["unified"]["error_given_loss_at_mu"] = error_of(fit_law("excess", excess, resamples=0), excess)
    out["test_time"] = []
    for key in dict.fromkeys(map(run_key, main)):
        data = [row for row in main if run_key(row) == key]
        if key[1] > 1 and len(data) >= 4:
            fits["test_time"][key] = fit = fit_law("test time", data, starts=16, resamples=0)
            p = {name: value for name, value in natural(fit).items() if name != "ci"}
            out["test_time"].append(dict(zip(("model", "mu_rec", "mu_bwd", "flops", "tokens", "seed"), key)) | p |
                                    {"error": error_of(fit, data)})
    attempt("recurrence_worth", "worth", everywhere, mu_rec=3, tokens=3)
    if "recurrence_worth" in out:
        law = out["recurrence_worth"]
        out["recurrence_worth"] = {"phi": law["phi"], "ci": law["ci"]["phi"], "law": law, "objective": {
            "free": fits["recurrence_worth"]["objective"]} | {
            f"phi = {phi}": fit_law("worth", everywhere, resamples=0, fixed={5: float(phi)})["objective"] for phi in (0, 1)}}
        if count(rows, "model") < 2:
            notes.append("recurrence worth: one model size only, so phi, alpha, A and E can stand in for each other")
    return out | {"gain": gains(own), "notes": notes}, fits


def gains(rows):
    """What looping gains over mu_rec = 1 at each budget at which runs were made, by the recurrence that gains most on average:
    differences of val loss between runs of the same seed. rows: at T = mu_rec."""
    result = []
    for c, W, _ in budgets_of(rows):
        if not np.isin(W, (0, 1)).all():  # read off between budgets, not made there
            continue
        losses = {}
        for row in (rows[i] for i in W.argmax(1)):
            losses.setdefault(row["mu_rec"], {})[row["seed"]] = row["val_loss"]
        fixed = losses.pop(1, {})
        paired = {mu: [fixed[seed] - loss for seed, loss in seeds.items() if seed in fixed] for mu, seeds in losses.items()}
        paired = {mu: differences for mu, differences in paired.items() if differences}
        if paired:
            best = max(paired, key=lambda mu: np.mean(paired[mu]))
            result.append({"flops": c, "mu_rec": best, "gain": np.mean(paired[best]), "by_seed": paired[best]})
    return result


def text(value, digits=3):
    return "-" if value is None else f"{value:.{digits}g}"


def span(ci):
    return f"[{text(ci[0])}, {text(ci[1])}]"


def report(out):
    """Print the fits beside the published figures."""
    print(f"\n{out['model']}, {out['runs']} runs, {out['accounting']} FLOPs")
    if out["isoflop"]:
        print("\n     FLOPs   mu* [95 %]                 D*         loss at mu*   gain over mu_rec = 1 (of each seed)")
        gain = {g["flops"]: g for g in out["gain"]}
        for o in out["isoflop"]:
            g = gain.get(o["flops"])
            at = f"{text(o['mu_rec'])} {span(o['ci'])}" if o["inside"] else "outside the recurrences"
            print(f"{o['flops']:10.3g}   {at:24s}   {text(o['tokens']):9s}  {text(o['val_loss'], 5):11s}   " +
                  (f"{g['gain']:+.4f} by mu_rec {g['mu_rec']:g} ({', '.join(f'{d:+.4f}' for d in g['by_seed'])})" if g else ""))
    for name, label in (("mu_rec", "mu*"), ("tokens", "D*")):
        if name in out["power_laws"]:
            law = out["power_laws"][name]
            print(f"{label:3s} = {law['coefficient']:.3g} C^{law['exponent']:.3f}   95 % interval {span(law['ci'])}   "
                  f"published: {PUBLISHED[name]}")
    for key, label in (("training_law", "training law"), ("unified", "unified law")):
        if key in out:
            law = out[key]
            print(f"{label}: " + ", ".join(f"{k} {text(law[k])} {span(ci)}" for k, ci in law["ci"].items()))
            if law["held_out_error"] is not None:
                print(f"  error on the largest budget, fitted without it: {law['held_out_error']:.2%}   published: {PUBLISHED[key]}")
    if "error_given_loss_at_mu" in out.get("unified", {}):
        print(f"  error of the test-time term alone, loss at T = mu_rec given: {out['unified']['error_given_loss_at_mu']:.2%}   "
              f"published: {PUBLISHED['excess']}")
    if out["test_time"]:
        errors = [run["error"] for run in out["test_time"]]
        print(f"test-time law, {len(errors)} runs: mean error {np.mean(errors):.2%}, largest {max(errors):.2%}")
    if "recurrence_worth" in out:
        worth = out["recurrence_worth"]
        print(f"worth of a recurrence: phi = {worth['phi']:.2f} {span(worth['ci'])}   published: {PUBLISHED['phi']}; objective: " +
              ", ".join(f"{k} {v:.4g}" for k, v in worth["objective"].items()))
    for note in out["notes"]:
        print("note:", note)

# ----------------------------------------------------------------------------- figures


def draw(out, fits, folder):
    """Four figures (PNG): isoFLOP curves, power laws, contours of the training law, test-time curves."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figures: matplotlib is not installed")
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = trained_depth(fits["rows"])
    shade = lambda i, n: plt.cm.viridis(0.9 * i / max(n - 1, 1))
    markers = "osD^vP*X<>"

    def save(figure, name):
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)
        print("wrote", folder / f"{name}.png")

    def recurrence_axis(axes):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")

    def panel(**labels):
        figure, axes = plt.subplots(figsize=(6, 4.2), constrained_layout=True)
        recurrence_axis(axes)
        axes.set(**labels)
        return figure, axes

    cells, optima = budgets_of(rows), {o["flops"]: o for o in out["isoflop"]}
    figure, both = plt.subplots(1, 2, figsize=(10.5, 4.2), constrained_layout=True)
    for i, (c, W, mu) in enumerate(cells):
        style, o, log_loss = dict(color=shade(i, len(cells))), optima.get(c), W @ np.log(column(rows, "val_loss"))
        x = np.geomspace(mu.min(), mu.max(), 100)
        curve = np.polyval(o["parabola"], np.log(x)) if o else x * np.nan
        lowest = np.nanmin([*curve, *([] if o else log_loss)])
        for axes, scale in zip(both, (np.exp, lambda y: 100 * (np.exp(y - lowest) - 1))):  # noqa: B023
            axes.plot(mu, scale(log_loss), markers[i % 10], label=f"{c:.2g} FLOPs", **style)
            axes.plot(x, scale(curve), "-", lw=1, **style)
            if o and o["inside"]:
                axes.plot(o["mu_rec"], scale(math.log(o["val_loss"])), "*", ms=13, mec="k", zorder=3, **style)
    for axes in both:
        recurrence_axis(axes)
        axes.set(xlabel="mean recurrence mu_rec in training (loops)")
    both[0].set(ylabel="val loss at T = mu_rec (nats per token)", title=f"Equal FLOPs and parameters ({out['model']})")
    both[1].set(ylabel="above the parabola's lowest (%)", ylim=(-1, 4), title="The same, from each budget's optimum (star)")
    if cells:
        both[0].legend(fontsize=8)
        save(figure, "isoflop")
    else:
        plt.close(figure)

    if fits["laws"]:
        figure, both = plt.subplots(1, 2, figsize=(8.5, 3.8), constrained_layout=True)
        inside = [o for o in out["isoflop"] if o["inside"]]
        c = column(inside, "flops")
        x, middle = np.geomspace(c.min() / 1.5, c.max() * 1.5, 50), np.exp(np.log(c).mean())
        for axes, name, label in zip(both, ("mu_rec", "tokens"), ("best mean recurrence mu* (loops)", "best token count D*")):
            law, (b, const) = fits["laws"][name], fits["laws"][name]["band"]
            fitted = law["coefficient"] * x ** law["exponent"]
            band = np.nanpercentile(np.exp(const[None] + np.log(x)[:, None] * b[None]), [2.5, 97.5], axis=1)
            axes.fill_between(x, *band, color="0.85", label="95 % interval")
            axes.loglog(x, fitted, "k-", label=f"fit: C^{law['exponent']:.2f}")
            axes.loglog(x, fitted * (x / middle) ** (SLOPES[name] - law["exponent"]), "k:", label=f"published slope: C^{SLOPES[name]:.2f}")
            axes.loglog(c, column(inside, name), "ko", mfc="w")
            axes.set_xticks(c, [f"{v:.2g}" for v in c])
            axes.set_xticks([], minor=True)
            axes.set(xlabel="training FLOPs C", ylabel=label)
            axes.legend(fontsize=8)
        save(figure, "power-laws")

    if "training_law" in fits:
        figure, axes = panel(xlabel="mean recurrence mu_rec (loops)", ylabel="training tokens D", yscale="log",
                             title=f"Val loss by the training law ({out['model']}, nats per token)")
        mu, tokens = column(rows, "mu_rec"), column(rows, "tokens")
        x, y = np.geomspace(mu.min(), mu.max(), 60), np.geomspace(tokens.min(), tokens.max(), 60)
        loss = predict_law(fits["training_law"], [rows[0] | {"mu_rec": a, "tokens": b} for b in y for a in x]).reshape(60, 60)
        levels = np.unique(np.quantile(loss, np.linspace(0.03, 0.97, 12)).round(3))
        axes.clabel(axes.contour(x, y, loss, levels=levels, cmap="viridis_r", linewidths=1), fontsize=7)
        axes.plot(mu, tokens, "o", color="0.6", ms=3, label="runs")
        budgets = np.geomspace(column(rows, "flops").min(), column(rows, "flops").max(), 40)
        frontier = [efficient(fits["training_law"], rows[0], costs_of(rows), c) for c in budgets]
        axes.plot([f[0] for f in frontier], [f[1] for f in frontier], "k-", lw=2, label="efficient frontier\n(mu_bwd rounds up: steps)")
        axes.legend(fontsize=8)
        save(figure, "contours")

    if fits["test_time"]:
        figure, axes = panel(xlabel="loops T at test time", ylabel="val loss (nats per token)",
                             title="Test-time loops at the largest budget: L(T) = L_inf + Z exp(-z T)")
        top = max(key[3] for key in fits["test_time"]) / 1.1
        shown = sorted({key[1]: key for key in reversed(fits["test_time"]) if key[3] >= top}.items())
        for i, (mu, key) in enumerate(shown):
            data = sorted((r for r in fits["rows"] if run_key(r) == key), key=lambda r: r["recurrence"])
            T, style = np.geomspace(data[0]["recurrence"], data[-1]["recurrence"], 80), dict(color=shade(i, len(shown)))
            axes.plot(column(data, "recurrence"), column(data, "val_loss"), markers[i % 10], **style, label=f"mu_rec = {mu:g}")
            axes.plot(T, predict_law(fits["test_time"][key], [data[0] | {"recurrence": t} for t in T]), "-", lw=1, **style)
        axes.legend(fontsize=8)
        save(figure, "test-time")

# ----------------------------------------------------------------------------- predictions


def costs_of(rows):
    """{mu_rec: FLOPs of a token} of a table."""
    return {row["mu_rec"]: row["flops"] / row["tokens"] for row in sorted(rows, key=lambda row: row["mu_rec"])}


def efficient(fit, size, costs, flops):
    """(mu, D, loss) of lowest predicted loss at a budget; size: a row with the parameters of the model; costs: {mu: FLOPs of a
    token}, in between by interpolation of logarithms."""
    known = np.log(list(costs))
    mu = np.exp(np.linspace(known[0], known[-1], 400))
    tokens = flops / np.exp(np.interp(np.log(mu), known, np.log(list(costs.values()))))
    loss = predict_law(fit, [size | {"mu_rec": m, "tokens": d} for m, d in zip(mu, tokens)])
    best = loss.argmin()
    return mu[best], tokens[best], loss[best]


def predict(args):
    rows, accounting = read_tables(args.tables or default_tables(), args.accounting)
    out, fits = fit_table([row for row in rows if row["accounting"] == accounting])
    if "training_law" not in fits:
        raise UserError("these tables do not determine a training law: " + "; ".join(out["notes"]))
    rows, C, law = trained_depth(fits["rows"]), args.flops, fits["training_law"]
    top, low = column(rows, "flops").max(), column(rows, "flops").min()
    print(f"from {out['runs']} runs of {out['model']} at {low:.2g} to {top:.2g} FLOPs ({accounting})")
    size, costs, intervals = rows[0], costs_of(rows), {}
    if args.preset:
        if args.preset not in PRESETS:
            raise UserError(f"--preset is {args.preset}, must be one of {', '.join(PRESETS)}")
        with torch.device("meta"):
            models = {mu: Parcae(ParcaeConfig(**PRESETS[args.preset] | {"mean_recurrence": int(mu)})) for mu in costs}
        costs = {mu: model.flops_per_token(accounting=accounting) for mu, model in models.items()}
        size = size | dict(zip(("params_noncore", "params_core"), models[min(models)].matmul_params(accounting)))
        ratio = (size["params_core"] + size["params_noncore"]) / (rows[0]["params_core"] + rows[0]["params_noncore"])
        print(f"{args.preset}: {ratio:.3g} times the parameters of the model fitted" +
              ("" if 1 / 1.5 < ratio < 1.5 else ": the laws were not measured at this size, take this as a direction"))
    if fits["laws"] and not args.preset:
        mu, tokens = (fits["laws"][name]["coefficient"] * C ** fits["laws"][name]["exponent"] for name in ("mu_rec", "tokens"))
        for name, law_ in fits["laws"].items():
            b, const = law_["band"]
            intervals[name] = "   95 % interval " + span(interval(np.exp(const + b * math.log(C))))
    else:
        mu, tokens, _ = efficient(law, size, costs, C)
        print(f"by the minimum of the training law among mu_rec {min(costs):g} to {max(costs):g}:")
    cell = [size | {"mu_rec": max(1, mu), "tokens": tokens}]
    print(f"mu*  = {mu:.3g}{intervals.get('mu_rec', '')}\nD*   = {tokens:.3g} tokens{intervals.get('tokens', '')}\n"
          f"loss = {predict_law(law, cell)[0]:.4g} nats per token   95 % interval "
          f"{span(interval(predict_law(law, cell, samples=True)[:, 0]))}")
    if not low / 2 < C < 2 * top:
        print(f"warning: {max(C / top, low / C):.3g} times beyond the budgets measured ({low:.2g} to {top:.2g}); "
              "the intervals know nothing of that")

# ----------------------------------------------------------------------------- sweeps


def dry_run(flags):
    """What config.json of a run with these flags would say. Raises UserError with train.py's own words."""
    done = subprocess.run([sys.executable, HERE / "train.py", *flags, "--dry-run"], capture_output=True, text=True)
    if done.returncode:
        raise UserError("train.py says: " + (done.stderr.strip().splitlines() or ["nothing"])[-1].removeprefix("train.py: error: "))
    return json.loads(done.stdout[done.stdout.index("{"):])


class Cell:
    """One run of a sweep: a budget, a recurrence, a seed. plan: what dry_run says of such runs."""

    process = None

    def __init__(self, folder, flops, mu, seed, flags, plan):
        self.path, self.flops, self.mu, self.seed, self.plan = folder / f"C{flops:.3g}-mu{mu}-seed{seed}", flops, mu, seed, plan
        self.flags = ["--out", self.path, "--max-flops", repr(flops), "--mean-recurrence", str(mu), "--seed", str(seed), *flags]

    def state(self):
        return last_line(self.path / "log.jsonl")

    def check(self):
        """Raise UserError if the run that is there has other settings."""
        if self.path.exists():
            with lock(self.path):  # refused where an orphan of a sweep that was killed still trains
                pass
        if (self.path / "config.json").exists():
            before = read_json(self.path / "config.json")
            other = [k for part in ("settings", "model") for k, value in self.plan[part].items() if before[part].get(k) != value
                     and k not in ("out", "max_flops", "seed", "device", "eval_recurrence")]
            if other:
                raise UserError(f"{self.path} was run with other settings ({', '.join(other)}): choose another --out or remove it")

    def run(self, environment):
        """Train, or go on with an interrupted run. Returns the last line of its output, None if it finished."""
        resume = ["--resume"] if (self.path / "ckpt.pt").exists() else []
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "output.txt", "w") as file:
            self.process = subprocess.Popen([sys.executable, HERE / "train.py", *self.flags, *resume], stdout=file,
                                            stderr=subprocess.STDOUT, env=os.environ | environment)
            self.process.wait()
        if self.state()["kind"] != "done":
            return ((self.path / "output.txt").read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]


def sweep(args, flags):
    folder = Path(args.out)
    if min(args.budgets) < 1:
        raise UserError(f"--budgets is {min(args.budgets):g}, must be at least 1")
    own = [f for f in flags if f.split("=")[0] in ("--out", "--max-flops", "--mean-recurrence", "--seed", "--resume", "--overwrite")]
    if own:
        raise UserError(f"{own[0]} is set by the sweep itself (--out, --budgets, --recurrences, --seeds)")
    flags = [*flags, "--eval-recurrence", *map(str, sorted({*args.eval_recurrence, *args.recurrences}))]
    plans = {mu: dry_run(["--out", folder / "plan", "--mean-recurrence", str(mu), "--max-flops", "1", *flags])
             for mu in tqdm(args.recurrences, desc="planning", leave=False, disable=None)}
    cells = [Cell(folder, c, mu, seed, flags, plans[mu]) for c in sorted(args.budgets) for mu in args.recurrences for seed in args.seeds]
    for cell in cells:
        cell.check()
    todo = [cell for cell in cells if cell.state()["kind"] != "done"]
    # time: by the FLOP/s that runs of this recurrence reached, else any run, else a share of the matmul peak
    speed = {cell.mu: last["flops"] / last["seconds"] for cell in cells if (last := cell.state()).get("seconds")}
    rate = lambda cell: speed.get(cell.mu) or np.mean(list(speed.values()) or [0.3 * cell.plan["peak_flops"] / args.jobs])
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished, {sum(cell.flops for cell in todo):.3g} FLOPs to spend\n\n"
          "    FLOPs   mu_rec   mu_bwd   seed   FLOPs a token       tokens     steps   minutes")
    for cell in cells:
        settings, model = cell.plan["settings"], cell.plan["model"]
        per_token = cell.plan["cost"][settings["accounting"]]["flops_per_token"]
        tokens = cell.flops / per_token
        print(f"{cell.flops:9.3g}   {cell.mu:6d}   {min(cell.mu, model['backprop_depth']):6d}   {cell.seed:4d}   {per_token:13,.0f}   "
              f"{tokens:10,.0f}   {tokens / settings['batch_size'] / model['block_size']:7,.0f}   "
              + (f"{cell.flops / rate(cell) / 60:7.1f}" if cell in todo else "   done"))
    print(f"about {sum(cell.flops / rate(cell) for cell in todo) / args.jobs / 3600:.1f} hours with {args.jobs} jobs" +
          ("" if speed else ", if training reaches 30 % of the matmul peak measured here"))
    if args.dry_run:
        return
    failed = run_cells(todo, args.jobs)
    rows = sum((read_run(cell.path) for cell in cells), [])
    if rows:
        write_csv(folder / "table.csv", rows)
        print(f"wrote {folder / 'table.csv'}; fit it with: python scaling.py fit {folder / 'table.csv'}")
    for cell, line in failed:
        print(f"failed: {cell.path}: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


def run_cells(cells, jobs):
    """Run cells, `jobs` at a time, largest first, one GPU each where there are several; [(cell, last line)] of those that failed."""
    gpus = torch.cuda.device_count()
    slots, failed, interrupted = list(range(jobs)), [], threading.Event()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore unless told otherwise

    def work(cell):
        if interrupted.is_set():
            return
        slot = slots.pop()
        line = cell.run({"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} |
                        ({"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus > 1 else {}))
        slots.append(slot)
        if line is not None:
            failed.append((cell, line))

    spent = lambda: sum(min(cell.state()["flops"], cell.flops) for cell in cells)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool, \
            tqdm(total=sum(cell.flops for cell in cells), initial=spent(), unit="FLOP", unit_scale=True, desc="sweep", disable=None) as bar:
        futures = [pool.submit(work, cell) for cell in sorted(cells, key=lambda cell: -cell.flops)]
        try:
            while not all(future.done() for future in futures):
                time.sleep(1)
                bar.n, done = spent(), sum(future.done() for future in futures)
                bar.set_postfix_str(f"{done} of {len(cells)} cells" + (f", {len(failed)} failed" if failed else ""))
        except KeyboardInterrupt:
            interrupted.set()
            for cell in cells:
                if cell.process:
                    cell.process.terminate()  # it saves and stops
    for future in futures:
        future.result()
    return failed

# ----------------------------------------------------------------------------- command line


def default_tables():
    tables = sorted((HERE / "results").glob("sweep*.csv"))
    if not tables:
        raise UserError(f"{HERE / 'results'} holds no sweep*.csv: run a sweep, or name a table")
    return tables


def fit(args):
    rows, accounting = read_tables(args.tables or default_tables(), args.accounting)
    out, fits = fit_table([row for row in rows if row["accounting"] == accounting], args.resamples)
    report(out)
    for other in sorted({row["accounting"] for row in rows} - {accounting} if not args.accounting else ()):
        optima, laws, _ = isoflop([row for row in rows if row["accounting"] == other and row["model"] == out["model"]], args.resamples)
        out.setdefault("other_accounting", {})[other] = {"isoflop": optima, "power_laws": without_bands(laws)}
        print(f"\nby {other} FLOPs: " + (", ".join(f"{label} ~ C^{laws[k]['exponent']:.3f} {span(laws[k]['ci'])}"
              for k, label in (("mu_rec", "mu*"), ("tokens", "D*"))) if laws else "no power law"))
    if args.json:
        write_text(args.json, json.dumps(out, indent=1))
        print("wrote", args.json)
    draw(out, fits, Path(args.figures))


def parse_args():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(prog="python scaling.py", dest="command", metavar="command")
    add = commands.add_parser("sweep", help="train a grid of budgets and recurrences; unknown flags go to train.py",
                              allow_abbrev=False).add_argument
    add("--budgets", type=number(float, 0), nargs="+", required=True, metavar="C", help="training FLOPs")
    add("--recurrences", type=LOOPS, nargs="+", required=True, metavar="MU", help="mean recurrences; mu_bwd is ceil(mu / 2) unless given")
    add("--seeds", type=SEED, nargs="+", default=[0], metavar="N", help="(default: 0)")
    add("--eval-recurrence", type=LOOPS, nargs="+", default=[1, 2, 4, 8, 16], metavar="T",
        help="loops to evaluate each run at, those of --recurrences besides (default: 1 2 4 8 16)")
    add("--jobs", type=COUNT, default=1, metavar="N", help="runs side by side (default: 1)")
    add("--out", type=some_path, default="out/sweep", metavar="DIR", help="(default: %(default)s)")
    add("--dry-run", action="store_true", help="print the grid and stop")
    for name, about in (("fit", "fit the laws and draw"), ("predict", "the best recurrence and tokens for a budget")):
        add = commands.add_parser(name, help=about).add_argument
        add("tables", nargs="*", metavar="DIR|CSV", help="runs or tables (default: results/sweep*.csv)")
        add("--accounting", metavar="NAME", help="rows to use (default: exact, then the others' power laws)")
        if name == "fit":
            add("--json", metavar="FILE", help="write every fitted number")
            add("--figures", default="results", metavar="DIR", help="where figures go (default: %(default)s)")
            add("--resamples", type=number(int, 0), default=RESAMPLES, metavar="N", help="of the bootstrap (default: %(default)s)")
        else:
            add("--flops", type=number(float, 1), required=True, metavar="C", help="training FLOPs")
            add("--preset", metavar="NAME", help="a model of train.py (default: the model fitted)")
    args, flags = parser.parse_known_args()
    if args.command is None and not flags:
        args = parser.parse_args(["fit"])
    elif args.command != "sweep" and flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return args, flags


def main(args, flags):
    torch.set_num_threads(1)  # the fits are small: threads cost more than they bring
    if args.command == "sweep":
        sweep(args, flags)
    else:
        {"fit": fit, "predict": predict}[args.command](args)


if __name__ == "__main__":
    run_script(lambda: main(*parse_args()))
