"""The scaling laws of looping: sweeps of runs at equal FLOPs, fits of the laws, predictions, figures.

    python scaling.py                                     fit the tables in results/, compare with the paper, draw
    python scaling.py sweep --budgets 1e12 2e12 4e12 8e12 --recurrences 1 2 4 8 --jobs 2 --out out/sweep --n-embd 32
    python scaling.py fit out/sweep --json out/fit.json   a directory of runs, or CSV files from anywhere
    python scaling.py predict --flops 1e14                the best recurrence and tokens for a budget
    python scaling.py coverage                            do the intervals hold what they promise? on made-up data

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

import argparse
import concurrent.futures
import csv
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import UserError

COLUMNS = {"model": str, "params_core": float, "params_noncore": float, "flops": float, "accounting": str, "mu_rec": float,
           "mu_bwd": float, "tokens": float, "recurrence": float, "val_loss": float, "seed": int}
PUBLISHED = {"mu_rec": 0.40, "tokens": 0.78, "phi": (0.46, 0.41, 0.53), "training": "1.3 % (140M), 0.8 % (370M)", "unified": "0.85 to 1.31 %"}
RESAMPLES = 200
HERE = Path(__file__).parent

# ----------------------------------------------------------------------------- tables


def read_csv(path):
    """Rows of a table, checked. Raises UserError that names the file and the row."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise UserError(f"{path} has no column {', '.join(missing)}; needed: {', '.join(COLUMNS)}")
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=2):
        row = {}
        for name, kind in COLUMNS.items():
            try:
                row[name] = kind(line[name])
            except (TypeError, ValueError):
                raise UserError(f"{path}, row {number}: {name} is {line[name]!r}, must be a number") from None
            if kind is float and not (math.isfinite(row[name]) and row[name] > 0) and not (name == "params_core" and row[name] == 0):
                raise UserError(f"{path}, row {number}: {name} is {line[name]}, must be finite and above 0")
        rows.append(row)
    return rows


def read_run(path):
    """Rows of a finished run of train.py, two for each T: FLOPs by exact and by published accounting; [] if not finished."""
    try:
        config = json.loads((path / "config.json").read_text())
        last = json.loads((path / "log.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return []
    if last["kind"] != "done":
        return []
    settings, model, cost = config["settings"], config["model"], config["cost"]
    own = cost[settings["accounting"]]["flops_per_token"]
    return [{"model": "{n_prelude}/{n_recurrent}/{n_coda} x {n_embd}".format(**model), "params_core": c["params_core"],
             "params_noncore": c["params_noncore"], "flops": last["flops"] * c["flops_per_token"] / own, "accounting": accounting,
             "mu_rec": model["mean_recurrence"], "mu_bwd": min(model["mean_recurrence"], model["backprop_depth"]), "tokens": last["tokens"], "recurrence": int(T),
             "val_loss": loss, "seed": settings["seed"]}
            for accounting, c in cost.items() for T, loss in last["val_loss"].items()]


def read_tables(paths):
    """All rows of CSV files and of directories of runs."""
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
    return rows


def write_csv(path, rows):
    with open(f"{path}.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if k == "val_loss" else f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()}
                         for row in rows)
    os.replace(f"{path}.tmp", path)


def column(rows, name):
    return np.array([row[name] for row in rows])


def trained_depth(rows):
    """The rows evaluated at T = mu_rec."""
    return [row for row in rows if row["recurrence"] == row["mu_rec"]]

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
    n = min(len(set(flops[i])) for i in groups.values())
    result = []
    for c in np.geomspace(low, high, n):
        W = np.zeros((len(groups), len(rows)))
        for k, i in enumerate(groups.values()):
            x = np.log(flops[i] / c)
            W[k, i] = np.linalg.pinv(np.vander(x, 3))[-1]
        result.append((c, W, np.array(list(groups))))
    return result


def slope(x, y, ok):
    """Exponents and log coefficients (R,) of y = c + b x by least squares over the entries that are ok; x (n,), y and ok (n, R)."""
    x = np.broadcast_to(x[:, None], y.shape)
    with np.errstate(all="ignore"):
        mean = lambda z: np.where(ok, z, 0).sum(0) / ok.sum(0)
        dx = x - mean(x)
        b = mean(dx * np.where(ok, y, 0)) / mean(dx * dx)
        b = np.where(ok.sum(0) >= 2, b, np.nan)
        return b, mean(y) - b * mean(x)


def interval(samples):
    """The central 95 % of what is finite."""
    samples = np.asarray(samples, dtype=float)
    samples = samples[np.isfinite(samples)]
    return np.percentile(samples, [2.5, 97.5]).tolist() if len(samples) >= 20 else [None, None]


def isoflop(rows, resamples=RESAMPLES, seed=0):
    """Parabolas in log mu of the log loss at each budget, their minima, and the power laws through those.

    Returns (optima, power_laws, notes). Intervals: the noise of a run's log loss is estimated from what the
    parabolas leave over, all budgets together, and added to the data anew RESAMPLES times, each time with a
    noise level drawn from its own uncertainty."""
    rows, notes, fits = trained_depth(rows), [], []
    if not rows:
        return [], {}, ["no row has recurrence = mu_rec"]
    for c, W, mu in budgets_of(rows):
        if len(set(mu)) < 3:
            notes.append(f"{c:.3g} FLOPs: {len(set(mu))} recurrences, a parabola needs 3")
            continue
        V = np.vander(np.log(mu), 3)
        fits.append((c, mu, W, V, np.linalg.pinv(V)))
    if not fits:
        return [], {}, [*notes, "no budget has 3 recurrences: no optimum can be fitted"]
    y = np.log(column(rows, "val_loss"))
    left = np.concatenate([W - V @ pinv @ W for _, _, W, V, pinv in fits])  # runs -> residuals
    gram = left.T @ left
    freedom = np.trace(gram) ** 2 / (gram ** 2).sum() if np.trace(gram) > 1e-9 else 0
    noise = np.linalg.norm(left @ y) / math.sqrt(np.trace(gram)) if freedom else math.nan
    rng = np.random.default_rng(seed)
    Y = np.repeat(y[:, None], resamples + 1, 1)  # the first column is the data itself
    if freedom:
        level = noise * np.sqrt(freedom / rng.chisquare(freedom, resamples))
        Y[:, 1:] += level * rng.standard_normal((len(y), resamples))
    optima, log_mu, log_d, inside = [], [], [], []
    logs = [np.log(column(rows, name)) for name in ("mu_rec", "tokens", "flops")]
    per_token = np.polynomial.Polynomial.fit(logs[0], logs[2] - logs[1], min(3, len(set(logs[0])) - 1))  # log FLOPs of a token
    for c, mu, W, V, pinv in fits:
        a, b, const = pinv @ W @ Y
        with np.errstate(all="ignore"):
            best = np.where(a > 1e-12, -b / (2 * a), np.nan)
        ok = (best > np.log(mu.min())) & (best < np.log(mu.max()))
        d = np.log(c) - per_token(best)
        optimum = {"flops": c, "recurrences": sorted(set(mu.tolist())), "parabola": [a[0], b[0], const[0]], "inside": bool(ok[0]),
                   "mu_rec": None, "tokens": None, "val_loss": None, "ci": [None, None]}
        if ok[0]:
            optimum |= {"mu_rec": math.exp(best[0]), "tokens": math.exp(d[0]), "val_loss": math.exp(const[0] - b[0] ** 2 / (4 * a[0])),
                        "ci": interval(np.exp(best[1:])[ok[1:]]) if freedom else [None, None]}
        else:
            lowest = mu[np.argmin(W @ y)]
            notes.append(f"{c:.3g} FLOPs: no optimum inside recurrences {mu.min():g} to {mu.max():g} (lowest loss at {lowest:g}); "
                         "left out of the power laws")
        optima.append(optimum)
        log_mu.append(best), log_d.append(d), inside.append(ok)
    inside = np.array(inside)
    laws = {}
    if inside[:, 0].sum() < 2:
        notes.append(f"{inside[:, 0].sum()} budgets with an optimum inside the recurrences, a power law needs 2")
    else:
        x = np.log([c for c, *_ in fits])
        for name, values in (("mu_rec", log_mu), ("tokens", log_d)):
            b, const = slope(x, np.array(values), inside & inside[:, :1])
            laws[name] = {"exponent": b[0], "coefficient": math.exp(const[0]), "ci": interval(b[1:]) if freedom else [None, None],
                          "band": [b[1:], const[1:]]}
    if not freedom:
        notes.append("3 recurrences a budget and one seed leave nothing over to estimate the noise from: no intervals")
    return optima, laws, notes

# ----------------------------------------------------------------------------- parametric laws

# name: (parameters, prediction from them and columns); all parameters but phi are positive. Sizes enter in units of
# their geometric mean over the data (columns N_core, N_once and D are given so), else the fit is ill-conditioned.
LAWS = {
    "training": ("E X x Y y", lambda p, c: p.E + p.X * (c.once + c.mu * c.core) ** -p.x + p.Y * c.D ** -p.y),
    "unified": ("E X x Y y Z z", lambda p, c: p.E + p.X * (c.once + c.mu * c.core) ** -p.x + p.Y * c.D ** -p.y +
                p.Z * torch.exp(-p.z * c.T / c.mu)),
    "excess": ("Z z", lambda p, c: c.L_mu + p.Z * torch.exp(-p.z * c.T / c.mu)),
    "test time": ("L_inf Z z", lambda p, c: p.L_inf + p.Z * torch.exp(-p.z * c.T)),
    "worth": ("E A alpha B beta phi", lambda p, c: p.E + p.A * (c.once + c.mu ** p.phi * c.core) ** -p.alpha + p.B * c.D ** -p.beta),
}


class Columns:
    """Columns of a table as tensors (rows,), and parameters of many fits as tensors (fits, 1)."""

    def __init__(self, **values):
        self.__dict__.update(values)


def columns(rows, units):
    tensor = lambda name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
    return Columns(once=tensor("params_noncore") / units["N"], core=tensor("params_core") / units["N"], D=tensor("tokens") / units["D"],
                   mu=tensor("mu_rec"), T=tensor("recurrence"), L=tensor("val_loss"),
                   L_mu=tensor("L_mu") if "L_mu" in rows[0] else None)


def units_of(rows):
    N = column(rows, "params_noncore") + column(rows, "mu_rec") * column(rows, "params_core")
    return {"N": math.exp(np.log(N).mean()), "D": math.exp(np.log(column(rows, "tokens")).mean())}


def parameters(law, theta):
    return Columns(**{name: (theta[:, i] if name == "phi" else theta[:, i].clamp(-40, 40).exp()).unsqueeze(1)
                      for i, name in enumerate(LAWS[law][0].split())})


def minimise(law, data, starts, weights=None, fixed=None):
    """Huber loss (delta 1e-3) of the log prediction minimised by L-BFGS, as Hoffmann et al. 2022 (approach 3).

    starts: (fits, parameters), all at once: the fits are independent, so their sum has its minimum where each has.
    weights: (fits, rows), how often each row counts. fixed: {index: value}. Returns (parameters, objective (fits,))."""
    theta, target = starts.clone().requires_grad_(), data.L.log()
    free = torch.ones_like(theta)
    for i, value in (fixed or {}).items():
        theta.data[:, i], free[:, i] = value, 0

    def objective():
        error = LAWS[law][1](parameters(law, theta), data).log() - target
        huber = torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=1e-3) * 1e6
        return (huber if weights is None else huber * weights).sum(1)
    optimizer = torch.optim.LBFGS([theta], max_iter=600, history_size=30, line_search_fn="strong_wolfe", tolerance_grad=1e-7,
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


def starts_for(law, rows, n, seed=0):
    """n random starts: the asymptote somewhat below the lowest loss, the terms sharing what is above it."""
    generator, names = torch.Generator().manual_seed(seed), LAWS[law][0].split()
    draw = lambda low, high: low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
    low, high = column(rows, "val_loss").min(), column(rows, "val_loss").max()
    value = {"E": draw(0.3, 0.98).log() + math.log(low), "L_inf": draw(0.9, 1).log() + math.log(low), "phi": draw(0, 1)}
    for name in ("x", "y", "alpha", "beta"):
        value[name] = draw(math.log(0.1), math.log(1.5))
    for name in ("X", "Y", "A", "B", "Z"):
        value[name] = draw(math.log(0.05), math.log(1)) + math.log(max(high - low, 1e-3))
    value["z"] = draw(math.log(0.2), math.log(3))
    return torch.stack([value[name] for name in names], 1)


def fit_law(law, rows, n_starts=24, resamples=RESAMPLES, fixed=None, seed=0, units=None):
    """The best of many fits, with bootstrap fits over the runs.

    Returns {"units", "theta" (parameters,), "samples" (resamples, parameters), "objective"}."""
    units = units or units_of(rows)
    data = columns(rows, units)
    theta, objective = minimise(law, data, starts_for(law, rows, n_starts, seed), fixed=fixed)
    theta, objective = minimise(law, data, theta[objective.argmin()][None], fixed=fixed)
    samples = torch.empty(0, theta.shape[1])
    if resamples:
        runs = [tuple(row[k] for k in ("model", "mu_rec", "flops", "seed", "tokens")) for row in rows]
        index = {run: i for i, run in enumerate(dict.fromkeys(runs))}
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), resamples)
        weights = torch.tensor(counts[:, [index[run] for run in runs]], dtype=torch.float64)
        samples, _ = minimise(law, data, theta.repeat(resamples, 1), weights, fixed)
    return {"law": law, "units": units, "theta": theta[0], "samples": samples, "objective": objective.item()}


def predict_law(fit, rows, samples=False):
    """Losses (rows,), or (resamples, rows)."""
    theta = fit["samples"] if samples else fit["theta"][None]
    with torch.no_grad():
        values = LAWS[fit["law"]][1](parameters(fit["law"], theta), columns(rows, fit["units"])).numpy()
    return values if samples else values[0]


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
    fit = fit_law(law, seen, resamples=0)
    return float(np.abs(predict_law(fit, unseen) / column(unseen, "val_loss") - 1).mean())

# ----------------------------------------------------------------------------- all fits of a table


def run_key(row):
    return tuple(row[k] for k in ("model", "mu_rec", "mu_bwd", "flops", "tokens", "seed"))


def fit_table(rows, resamples=RESAMPLES):
    """Everything that can be fitted to a table of one accounting: the dict that --json writes, and the fits themselves
    (for figures and predictions). The laws of the main model, that with most runs; the worth of a recurrence from all."""
    by_model = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    main, everything = max(by_model.values(), key=lambda r: len(set(map(run_key, r)))), rows
    own = trained_depth(main)
    optima, laws, notes = isoflop(main, resamples)
    out = {"model": main[0]["model"], "accounting": main[0]["accounting"], "runs": len(set(map(run_key, main))),
           "power_laws": {name: {k: v for k, v in law.items() if k != "band"} for name, law in laws.items()}, "isoflop": optima}
    fits = {"rows": main, "laws": laws}

    def attempt(key, law, data, sizes, show=natural):
        """Fit a law if the data can tell its parameters."""
        names = LAWS[law][0].split()
        few = [f"{n} distinct {what}, it needs {least}" for what, n, least in sizes if n < least]
        if len(data) <= len(names):
            few.append(f"{len(data)} rows for {len(names)} parameters")
        if len(set(column(data, "val_loss"))) < 2 if data else False:
            few.append("all losses are equal")
        if few:
            notes.append(f"{law} law: not fitted ({'; '.join(few)})")
            return
        fits[key] = fit_law(law, data, resamples=resamples)
        out[key] = show(fits[key])
        error = held_out(law, data)
        if error is not None:
            out[key]["held_out_error"] = error

    count = lambda data, name: len({row[name] for row in data})
    shape = [("recurrences", count(own, "mu_rec"), 3), ("token counts", count(own, "tokens"), 3)]
    attempt("training_law", "training", own, shape)
    attempt("unified", "unified", main, [*shape, ("loops T", count(main, "recurrence"), 3)])
    at_mu = {run_key(row): row["val_loss"] for row in own}
    excess = [row | {"L_mu": at_mu[run_key(row)]} for row in main if run_key(row) in at_mu]
    if "unified" in out and excess:
        fit = fit_law("excess", excess, resamples=0)
        out["unified"]["error_given_loss_at_mu"] = float(np.abs(predict_law(fit, excess) / column(excess, "val_loss") - 1).mean())
    out["test_time"], fits["test_time"] = [], {}
    for key in dict.fromkeys(map(run_key, main)):
        data = [row for row in main if run_key(row) == key]
        if key[1] > 1 and len(data) >= 4:
            fit = fit_law("test time", data, n_starts=8, resamples=0)
            p = {name: value for name, value in natural(fit).items() if name != "ci"}
            error = float(np.abs(predict_law(fit, data) / column(data, "val_loss") - 1).mean())
            out["test_time"].append({"mu_rec": key[1], "flops": key[3], "tokens": key[4], "seed": key[5], **p, "error": error})
            fits["test_time"][key] = fit
    own = trained_depth(everything)
    attempt("recurrence_worth", "worth", own, [("recurrences", count(own, "mu_rec"), 3), ("token counts", count(own, "tokens"), 3)],
            lambda fit: {"phi": natural(fit)["phi"], "ci": natural(fit)["ci"]["phi"], "law": natural(fit)})
    if "recurrence_worth" in out:
        out["recurrence_worth"]["objective"] = {"free": fits["recurrence_worth"]["objective"]} | {
            f"phi = {phi}": fit_law("worth", own, resamples=0, fixed={5: float(phi)})["objective"] for phi in (0, 1)}
        if len(by_model) < 2:
            notes.append("recurrence worth: one model size only, so phi, alpha, A and E can stand in for each other")
    out["gain"] = gains(main)
    out["notes"] = notes
    return out, fits


def gains(rows):
    """Loss at mu_rec = 1 less the lowest at each budget, runs of several seeds averaged."""
    result = []
    for c, W, mu in budgets_of(trained_depth(rows)):
        losses = W @ column(trained_depth(rows), "val_loss")
        mean = {m: losses[mu == m].mean() for m in sorted(set(mu))}
        if 1 in mean:
            best = min(mean, key=mean.get)
            result.append({"flops": c, "best": best, "gain": mean[1] - mean[best], "fixed": mean[1], "seeds": [int((mu == 1).sum()), int((mu == best).sum())],
                           "spread": [float(np.ptp(losses[mu == m])) for m in (1, best)]})
    return result


def text(value, digits=3):
    return "-" if value is None else f"{value:.{digits}g}"


def span(ci):
    return f"[{text(ci[0])}, {text(ci[1])}]"


def report(out):
    """Print the fits beside the published figures."""
    print(f"\n{out['model']}, {out['runs']} runs, {out['accounting']} FLOPs")
    if out["isoflop"]:
        print("\n     FLOPs   mu* [95 %]                 D*         loss at mu*   lowest run   gain over mu_rec = 1")
        gain = {g["flops"]: g for g in out["gain"]}
        for o in out["isoflop"]:
            g = gain.get(o["flops"])
            at = f"{text(o['mu_rec'])} {span(o['ci'])}" if o["inside"] else "outside the recurrences"
            print(f"{o['flops']:10.3g}   {at:24s}   {text(o['tokens']):9s}  {text(o['val_loss'], 5):11s}   " +
                  (f"mu_rec {g['best']:<3g}   {g['gain']:+.4f}" if g else ""))
    for name, label in (("mu_rec", "mu*"), ("tokens", "D*")):
        if name in out["power_laws"]:
            law = out["power_laws"][name]
            print(f"{label:3s} = {law['coefficient']:.3g} C^{law['exponent']:.3f}   95 % interval {span(law['ci'])}   published: C^{PUBLISHED[name]:.2f}")
    for key, label in (("training_law", "training law"), ("unified", "unified law")):
        if key in out:
            law = out[key]
            print(f"{label}: " + ", ".join(f"{k} {text(v)} {span(law['ci'][k])}" for k, v in law.items() if k in law["ci"]))
            if "held_out_error" in law:
                print(f"  error on the largest budget, fitted without it: {law['held_out_error']:.2%}   "
                      f"published: {PUBLISHED[key.split('_')[0]]}")
            if "error_given_loss_at_mu" in law:
                print(f"  error of the test-time term alone, loss at T = mu_rec given: {law['error_given_loss_at_mu']:.2%}   published: 0.10 to 0.17 %")
    if out["test_time"]:
        errors = [run["error"] for run in out["test_time"]]
        print(f"test-time law, {len(errors)} runs: mean error {np.mean(errors):.2%}, largest {max(errors):.2%}")
    if "recurrence_worth" in out:
        worth, (phi, low, high) = out["recurrence_worth"], PUBLISHED["phi"]
        print(f"worth of a recurrence: phi = {worth['phi']:.2f} {span(worth['ci'])}   published: {phi} [{low}, {high}]; objective: " +
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
    rows, made = trained_depth(fits["rows"]), []
    markers, grey = "osD^vP*X<>", lambda i, n: plt.cm.viridis(0.9 * i / max(n - 1, 1))

    def save(figure, name):
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)
        made.append(str(folder / f"{name}.png"))

    def recurrence_axis(axes):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")

    figure, axes = plt.subplots(figsize=(6, 4.2), constrained_layout=True)
    cells, n = budgets_of(rows), len(budgets_of(rows))
    for i, (c, W, mu) in enumerate(cells):
        axes.plot(mu, np.exp(W @ np.log(column(rows, "val_loss"))), markers[i % 10], color=grey(i, n), label=f"{c:.2g} FLOPs")
    for i, o in enumerate(out["isoflop"]):
        k = next(k for k, cell in enumerate(cells) if cell[0] == o["flops"])
        x = np.geomspace(min(o["recurrences"]), max(o["recurrences"]), 100)
        axes.plot(x, np.exp(np.polyval(o["parabola"], np.log(x))), "-", color=grey(k, n), lw=1)
        if o["inside"]:
            axes.plot(o["mu_rec"], o["val_loss"], "*", ms=13, color="k", mfc=grey(k, n), zorder=3)
    recurrence_axis(axes)
    axes.set(xlabel="mean recurrence mu_rec in training (loops)", ylabel="val loss at T = mu_rec (nats per token)",
             title=f"Equal FLOPs and parameters ({out['model']}); stars: optima")
    axes.legend(fontsize=8)
    save(figure, "isoflop")

    if fits["laws"]:
        figure, both = plt.subplots(1, 2, figsize=(8.5, 3.8), constrained_layout=True)
        inside = [o for o in out["isoflop"] if o["inside"]]
        c = np.array([o["flops"] for o in inside])
        x = np.geomspace(c.min() / 1.5, c.max() * 1.5, 50)
        for axes, name, label in zip(both, ("mu_rec", "tokens"), ("best mean recurrence mu* (loops)", "best token count D*")):
            law, y = fits["laws"][name], np.array([o[name] for o in inside])
            b, const = law["band"]
            lines = np.exp(const[None] + np.log(x)[:, None] * b[None])
            axes.fill_between(x, *np.nanpercentile(lines, [2.5, 97.5], axis=1), color="0.85", label="95 % interval")
            axes.loglog(x, law["coefficient"] * x ** law["exponent"], "k-", label=f"fit: C^{law['exponent']:.2f}")
            middle = np.exp(np.log(c).mean())
            axes.loglog(x, law["coefficient"] * middle ** law["exponent"] * (x / middle) ** PUBLISHED[name], "k:",
                        label=f"published slope: C^{PUBLISHED[name]:.2f}")
            axes.loglog(c, y, "ko", mfc="w")
            axes.set_xticks(c, [f"{v:.2g}" for v in c], minor=False)
            axes.set_xticks([], minor=True)
            axes.set(xlabel="training FLOPs C", ylabel=label)
            axes.legend(fontsize=8)
        save(figure, "power-laws")

    if "training_law" in fits:
        figure, axes = plt.subplots(figsize=(6, 4.2), constrained_layout=True)
        mu, tokens = column(rows, "mu_rec"), column(rows, "tokens")
        x, y = np.geomspace(mu.min(), mu.max(), 60), np.geomspace(tokens.min(), tokens.max(), 60)
        grid = [rows[0] | {"mu_rec": a, "tokens": b} for b in y for a in x]
        loss = predict_law(fits["training_law"], grid).reshape(60, 60)
        levels = np.quantile(loss, np.linspace(0.03, 0.97, 12))
        axes.clabel(axes.contour(x, y, loss, levels=np.unique(levels.round(3)), cmap="viridis_r", linewidths=1), fontsize=7)
        axes.plot(mu, tokens, "o", color="0.6", ms=3, label="runs")
        frontier = [efficient(fits["training_law"], rows, c) for c in np.geomspace(*np.quantile(column(rows, "flops"), [0, 1]), 40)]
        axes.plot([f[0] for f in frontier], [f[1] for f in frontier], "k-", lw=2, label="efficient frontier (training law)")
        recurrence_axis(axes)
        axes.set(yscale="log", ylim=(y[0], y[-1]), xlabel="mean recurrence mu_rec (loops)", ylabel="training tokens D",
                 title="Val loss by the training law (nats per token)")
        axes.legend(fontsize=8)
        save(figure, "contours")

    if fits["test_time"]:
        figure, axes = plt.subplots(figsize=(6, 4.2), constrained_layout=True)
        top = max(key[3] for key in fits["test_time"]) / 1.1
        shown = {key[1]: (key, fit) for key, fit in reversed(fits["test_time"].items()) if key[3] >= top}
        for i, (mu, (key, fit)) in enumerate(sorted(shown.items())):
            data = sorted((r for r in fits["rows"] if run_key(r) == key), key=lambda r: r["recurrence"])
            T = np.geomspace(data[0]["recurrence"], data[-1]["recurrence"], 80)
            axes.plot(column(data, "recurrence"), column(data, "val_loss"), markers[i % 10], color=grey(i, len(shown)), label=f"mu_rec = {mu:g}")
            axes.plot(T, predict_law(fit, [data[0] | {"recurrence": t} for t in T]), "-", color=grey(i, len(shown)), lw=1)
        recurrence_axis(axes)
        axes.set(xlabel="loops T at test time", ylabel="val loss (nats per token)", title="L(T) = L_inf + Z exp(-z T), largest budget")
        axes.legend(fontsize=8)
        save(figure, "test-time")
    print("wrote", ", ".join(made))

# ----------------------------------------------------------------------------- predictions


def efficient(fit, rows, flops, cost=None, grid=np.geomspace(1, 64, 400)):
    """(mu, D, loss) of lowest predicted loss for a budget. The FLOPs of a token are a + b (mu_rec + 2 mu_bwd), as
    flops_per_token in model.py counts them; cost: (a, b), None: as in rows, whose mu_bwd goes with mu_rec in any case."""
    mu, bwd = (column(rows, name) for name in ("mu_rec", "mu_bwd"))
    a, b = np.polynomial.polynomial.polyfit(mu + 2 * bwd, column(rows, "flops") / column(rows, "tokens"), 1) if cost is None else cost
    tokens = flops / (a + b * grid * (1 + 2 * np.interp(grid, np.unique(mu), [(bwd / mu)[mu == m].mean() for m in np.unique(mu)])))
    loss = predict_law(fit, [rows[0] | {"mu_rec": m, "tokens": d} for m, d in zip(grid, tokens)])
    best = loss.argmin()
    return grid[best], tokens[best], loss[best]


def predict(args):
    rows = choose(read_tables(args.tables or default_tables()), args.accounting)
    out, fits = fit_table(rows)
    if "training_law" not in fits:
        raise UserError("these tables do not determine a training law: " + "; ".join(out["notes"]))
    rows, C = fits["rows"], args.flops
    law, top, low = fits["training_law"], max(r["flops"] for r in rows), min(r["flops"] for r in rows)
    print(f"from {out['runs']} runs of {out['model']} at {low:.2g} to {top:.2g} FLOPs ({out['accounting']})")
    if args.preset:
        costs = [dry_run(["--preset", args.preset, "--mean-recurrence", str(mu)])["cost"][out["accounting"]] for mu in (1, 2)]
        f1, f2 = (c["flops_per_token"] for c in costs)
        size = {k: costs[0][k] for k in ("params_noncore", "params_core")}
        target, cost = [rows[0] | size], (f1 - 3 * (f2 - f1), f2 - f1)
        mu, tokens, loss = efficient(law, target, C, cost)
        ratio = sum(size.values()) / (rows[0]["params_noncore"] + rows[0]["params_core"])
        print(f"{args.preset}: {ratio:.3g} times the parameters of the model fitted"
              f"{'' if 1 / 1.5 < ratio < 1.5 else ': the laws were not measured at this size, take this as a direction'}")
    elif fits["laws"]:
        mu, tokens = (fits["laws"][name]["coefficient"] * C ** fits["laws"][name]["exponent"] for name in ("mu_rec", "tokens"))
        for name, value, label in (("mu_rec", mu, "mu*"), ("tokens", tokens, "D*")):
            b, const = fits["laws"][name]["band"]
            print(f"{label} = {value:.3g}  95 % interval {span(interval(np.exp(const + b * math.log(C))))}")
        target = rows[:1]
    else:
        target = rows[:1]
        mu, tokens, _ = efficient(law, target, C)
        print("no power law in these tables, the minimum of the training law instead:")
    cell = [target[0] | {"mu_rec": max(1, mu), "tokens": tokens}]
    if args.preset or not fits["laws"]:
        print(f"mu* = {mu:.3g}, D* = {tokens:.3g}")
    print(f"loss = {predict_law(law, cell)[0]:.4g} nats per token  95 % interval {span(interval(predict_law(law, cell, samples=True)[:, 0]))}")
    if C > 2 * top or C < low / 2:
        far = C / top if C > top else low / C
        print(f"warning: {far:.3g} times beyond the budgets measured ({low:.2g} to {top:.2g}); intervals know nothing of that")

# ----------------------------------------------------------------------------- made-up data


def synthetic(rng, noise, recurrences=(1, 2, 4, 6, 8, 12, 16), budgets=(1e12, 2e12, 4e12, 8e12, 16e12), exponent=0.4, curvature=0.02):
    """A sweep whose optimum is mu* = 4 (C / 4e12)^exponent: log L = log(1 + 2 (C / 1e12)^-0.1) + curvature (log mu - log mu*)^2.

    Tokens follow from FLOPs of a token 1e5 (2 + mu), so D* is known as well. noise: sd of the log loss."""
    return [{"model": "made up", "params_core": 5e4, "params_noncore": 5e4, "flops": c, "accounting": "exact", "mu_rec": float(mu),
             "mu_bwd": float(math.ceil(mu / 2)), "tokens": c / (1e5 * (2 + mu)), "recurrence": float(mu), "seed": 0,
             "val_loss": math.exp(math.log(1 + 2 * (c / 1e12) ** -0.1) + curvature * math.log(mu / (4 * (c / 4e12) ** exponent)) ** 2
                                  + noise * rng.standard_normal())}
            for c in budgets for mu in recurrences]


def synthetic_law(rng, noise, budgets=(1e12, 2e12, 4e12, 8e12, 16e12), recurrences=(1, 2, 4, 6, 8, 12, 16), sizes=(1.0,), phi=1.0):
    """A sweep from L = 0.8 + 40 (N_once + mu^phi N_core)^-0.4 + 3e3 D^-0.6, of models of 1e5 parameters times each size."""
    rows = [{"model": f"made up {s:g}", "params_core": 5e4 * s, "params_noncore": 5e4 * s, "flops": c, "accounting": "exact",
             "mu_rec": float(mu), "mu_bwd": float(math.ceil(mu / 2)), "tokens": c / (3e5 * s * (1 + mu)), "recurrence": float(mu), "seed": 0}
            for s in sizes for c in budgets for mu in recurrences]
    for row in rows:
        N = row["params_noncore"] + row["mu_rec"] ** phi * row["params_core"]
        row["val_loss"] = (0.8 + 40 * N ** -0.4 + 3e3 * row["tokens"] ** -0.6) * math.exp(noise * rng.standard_normal())
    return rows


def coverage(repeats, noise, seed=0, resamples=RESAMPLES):
    """{exponent: (mean error, share of the 95 % intervals that hold the truth)} over made-up sweeps of known exponents."""
    x = np.log([1e12, 2e12, 4e12, 8e12, 16e12])
    best = 4 * (np.exp(x) / 4e12) ** 0.4
    truth = {"mu_rec": 0.4, "tokens": np.polyfit(x, x - np.log(2 + best), 1)[0]}
    found = {name: [] for name in truth}
    for i in tqdm(range(repeats), desc=f"noise {noise:.1%}", leave=False, disable=None):
        _, laws, _ = isoflop(synthetic(np.random.default_rng([seed, i]), noise), resamples, seed=i)
        for name, law in laws.items():
            found[name].append((law["exponent"] - truth[name], law["ci"][0] <= truth[name] <= law["ci"][1]))
    return {name: (np.mean([e for e, _ in f]), np.mean([c for _, c in f])) for name, f in found.items()}


def coverage_laws(repeats, noise, seed=0):
    """As coverage, for the exponents of the training law (x, y) and phi."""
    truth = {"x": 0.4, "y": 0.6, "phi": 0.5}
    found = {name: [] for name in truth}
    for i in tqdm(range(repeats), desc=f"laws, noise {noise:.1%}", leave=False, disable=None):
        fits = [natural(fit_law("training", synthetic_law(np.random.default_rng([seed, i]), noise), seed=i)),
                natural(fit_law("worth", synthetic_law(np.random.default_rng([seed, i]), noise, sizes=(0.5, 1, 2), phi=0.5), seed=i))]
        for name, value in truth.items():
            fit = fits[name == "phi"]
            found[name].append((fit[name] - value, fit["ci"][name][0] <= value <= fit["ci"][name][1]))
    return {name: (np.median([e for e, _ in f]), np.mean([c for _, c in f])) for name, f in found.items()}

# ----------------------------------------------------------------------------- sweeps


def train_command(flags):
    return [sys.executable, str(HERE / "train.py"), *flags]


def dry_run(flags):
    """What config.json of a run with these flags would say. Raises UserError with train.py's own words."""
    done = subprocess.run(train_command([*flags, "--dry-run"]), capture_output=True, text=True)
    if done.returncode:
        raise UserError("train.py says: " + (done.stderr.strip().splitlines() or ["nothing"])[-1].removeprefix("train.py: error: "))
    return json.loads(done.stdout[done.stdout.index("{"):])


def last_lines(path, count=1):
    """The last lines of a file as JSON objects, or []."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 4096))
            lines = file.read().decode().split("\n")[:-1]
        return [json.loads(line) for line in lines[-count:]]
    except (OSError, ValueError):
        return []


class Cell:
    """One run of a sweep: a budget, a recurrence, a seed."""

    def __init__(self, folder, flops, mu, seed, flags):
        self.name, self.flops = f"C{flops:.3g}-mu{mu}-seed{seed}", flops
        self.path = folder / self.name
        self.flags = ["--out", str(self.path), "--max-flops", repr(flops), "--mean-recurrence", str(mu), "--seed", str(seed), *flags]

    def state(self):
        """(kind of the log's last line, FLOPs spent)."""
        last = last_lines(self.path / "log.jsonl")
        return (last[0]["kind"], last[0]["flops"]) if last else (None, 0)

    def run(self, environment):
        """Train, or go on with an interrupted run. Returns the last line of its output, None if it finished."""
        fresh = not (self.path / "ckpt.pt").exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "output.txt", "w") as file:
            command = train_command([*self.flags, *([] if fresh else ["--resume"])])
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment).returncode
        if code == 0 and self.state()[0] == "done":
            return None
        return ((self.path / "output.txt").read_text(errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]


def sweep(args, flags):
    folder = Path(args.out)
    for flag, values in (("budgets", args.budgets), ("recurrences", args.recurrences), ("jobs", [args.jobs])):
        if min(values) < 1:
            raise UserError(f"--{flag} is {min(values):g}, must be at least 1")
    taken = [f for f in flags if f.split("=")[0] in ("--out", "--max-flops", "--mean-recurrence", "--seed", "--resume", "--overwrite")]
    if taken:
        raise UserError(f"{taken[0]} is set by the sweep itself (--out, --budgets, --recurrences, --seeds)")
    flags = [*flags, "--eval-recurrence", *map(str, sorted({1, *args.eval_recurrence, *args.recurrences}))]
    plans = {}
    for mu in tqdm(args.recurrences, desc="planning", leave=False, disable=None):
        plans[mu] = dry_run(["--out", str(folder / "plan"), "--mean-recurrence", str(mu), "--max-flops", "1", *flags])
    cells = [(Cell(folder, c, mu, seed, flags), plans[mu], mu) for c in sorted(args.budgets) for mu in args.recurrences for seed in args.seeds]
    todo, same = [], ("settings", "model")
    for cell, plan, _ in cells:
        if (cell.path / "config.json").exists():
            before = json.loads((cell.path / "config.json").read_text())
            other = [k for part in same for k in plan[part] if k not in ("out", "max_flops", "seed", "device", "eval_recurrence")
                     and before[part].get(k) != plan[part][k]]
            if other:
                raise UserError(f"{cell.path} was run with other settings ({', '.join(other)}): choose another --out or remove it")
        if cell.state()[0] != "done":
            todo.append(cell)
    # time: the FLOP/s that finished cells of this recurrence reached, else a share of the matmul peak
    speed = {}
    for cell, _, mu in cells:
        last = last_lines(cell.path / "log.jsonl")
        if last and last[0]["seconds"]:
            speed[mu] = last[0]["flops"] / last[0]["seconds"]
    share = 0.3
    rate = lambda plan, mu: speed.get(mu) or np.mean(list(speed.values()) or [share * plan["peak_flops"] / args.jobs])
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished, {sum(cell.flops for cell in todo):.3g} FLOPs to spend\n\n"
          "    FLOPs   mu_rec   mu_bwd   FLOPs a token       tokens     steps   minutes   seeds (- finished)")
    for c in sorted(args.budgets):
        for mu in args.recurrences:
            plan, names = plans[mu], [f"{seed}{'-' if Cell(folder, c, mu, seed, flags).state()[0] == 'done' else ''}" for seed in args.seeds]
            per_token = plan["cost"][plan["settings"]["accounting"]]["flops_per_token"]
            tokens = c / per_token
            print(f"{c:9.3g}   {mu:6d}   {min(mu, plan['model']['backprop_depth']):6d}   {per_token:13,.0f}   {tokens:10,.0f}   "
                  f"{tokens / plan['settings']['batch_size'] / plan['model']['block_size']:7,.0f}   {c / rate(plan, mu) / 60:7.1f}   {' '.join(names)}")
    hours = sum(cell.flops / rate(plan, mu) for cell, plan, mu in cells if cell in todo) / args.jobs / 3600
    print(f"about {hours:.1f} hours with {args.jobs} jobs" + ("" if speed else f", if training reaches {share:.0%} of the matmul peak measured here"))
    if args.dry_run:
        return
    failed = run_cells(todo, args.jobs)
    rows = sum((read_run(cell.path) for cell, _, _ in cells), [])
    if rows:
        write_csv(folder / "table.csv", rows)
        print(f"wrote {folder / 'table.csv'}; fit it with: python scaling.py fit {folder / 'table.csv'}")
    for cell, line in failed:
        print(f"failed: {cell.path}: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


def run_cells(cells, jobs):
    """Run cells, `jobs` at a time, largest first, one GPU each where there are several; [(cell, last line)] of those that failed."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    threads = max(1, (os.cpu_count() or 1) // jobs)
    slots, failed = list(range(jobs)), []
    interrupted = threading.Event()

    def work(cell):
        if interrupted.is_set():
            return
        slot = slots.pop()
        environment = {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus > 1 else {})
        line = cell.run(environment)
        slots.append(slot)
        if line is not None:
            failed.append((cell, line))

    spent = lambda: sum(min(cell.state()[1], cell.flops) for cell in cells)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool, \
            tqdm(total=sum(cell.flops for cell in cells), initial=spent(), unit="FLOP", unit_scale=True, desc="sweep", disable=None) as bar:
        futures = [pool.submit(work, cell) for cell in sorted(cells, key=lambda cell: -cell.flops)]
        try:
            while not all(future.done() for future in futures):
                time.sleep(1)
                bar.n = spent()
                bar.set_postfix_str(f"{sum(f.done() for f in futures)} of {len(cells)} cells" + (f", {len(failed)} failed" if failed else ""))
        except KeyboardInterrupt:  # the runs got it too: they save and stop
            interrupted.set()
    for future in futures:
        future.result()
    return failed

# ----------------------------------------------------------------------------- command line


def default_tables():
    return sorted((HERE / "results").glob("sweep*.csv"))


def choose(rows, accounting):
    """The rows of one accounting: the one asked for, else exact, else whatever there is."""
    there = sorted({row["accounting"] for row in rows})
    if accounting and accounting not in there:
        raise UserError(f"--accounting is {accounting}, these tables have {', '.join(there)}")
    accounting = accounting or ("exact" if "exact" in there else there[0])
    return [row for row in rows if row["accounting"] == accounting]


def fit(args):
    tables = args.tables or default_tables()
    if not tables:
        raise UserError(f"{HERE / 'results'} holds no sweep*.csv: run a sweep, or name a table")
    rows = read_tables(tables)
    out, fits = fit_table(choose(rows, args.accounting), args.resamples)
    report(out)
    others = {} if args.accounting else {row["accounting"] for row in rows} - {out["accounting"]}
    for accounting in sorted(others):
        optima, laws, _ = isoflop(choose([r for r in rows if r["model"] == out["model"]], accounting), args.resamples)
        out.setdefault("other_accounting", {})[accounting] = {
            "isoflop": optima, "power_laws": {name: {k: v for k, v in law.items() if k != "band"} for name, law in laws.items()}}
        print(f"\nby {accounting} FLOPs: " + (", ".join(f"{label} ~ C^{laws[k]['exponent']:.3f} {span(laws[k]['ci'])}"
              for k, label in (("mu_rec", "mu*"), ("tokens", "D*"))) if laws else "no power law"))
    if args.json:
        Path(f"{args.json}.tmp").write_text(json.dumps(out, indent=1))
        os.replace(f"{args.json}.tmp", args.json)
        print("wrote", args.json)
    folder = Path(args.figures)
    folder.mkdir(parents=True, exist_ok=True)
    draw(out, fits, folder)


def parse_args():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="command")

    def tables(add):
        add("tables", nargs="*", metavar="DIR|CSV", help="runs or tables (default: results/sweep*.csv)")
        add("--accounting", metavar="NAME", help="rows to use (default: exact, then the others' power laws)")
    add = commands.add_parser("sweep", help="train a grid of budgets and recurrences; unknown flags go to train.py").add_argument
    add("--budgets", type=float, nargs="+", required=True, metavar="C", help="training FLOPs")
    add("--recurrences", type=int, nargs="+", required=True, metavar="MU", help="mean recurrences; mu_bwd is ceil(mu / 2) unless given")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="(default: 0)")
    add("--eval-recurrence", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="T",
        help="loops to evaluate each run at, those of --recurrences besides (default: 1 2 4 8 16)")
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side (default: 1)")
    add("--out", default="out/sweep", metavar="DIR", help="(default: %(default)s)")
    add("--dry-run", action="store_true", help="print the grid and stop")
    for name, about in (("fit", "fit the laws and draw"), ("predict", "the best recurrence and tokens for a budget")):
        add = commands.add_parser(name, help=about).add_argument
        tables(add)
        if name == "fit":
            add("--json", metavar="FILE", help="write every fitted number")
            add("--figures", default="results", metavar="DIR", help="where figures go (default: %(default)s)")
            add("--resamples", type=int, default=RESAMPLES, metavar="N", help="of the bootstrap (default: %(default)s)")
        else:
            add("--flops", type=float, required=True, metavar="C", help="training FLOPs")
            add("--preset", metavar="NAME", help="a model of train.py (default: the model fitted)")
    add = commands.add_parser("coverage", help="do the intervals hold the truth? made-up sweeps of known laws").add_argument
    add("--repeats", type=int, default=200, metavar="N", help="sweeps for each noise level (default: %(default)s)")
    add("--noise", type=float, nargs="+", default=[0.002, 0.005, 0.01], metavar="SD", help="of the loss, relative (default: 0.002 0.005 0.01)")
    add("--laws", action="store_true", help="the training law and phi as well (slow)")
    args, flags = parser.parse_known_args()
    if args.command is None and not flags:
        args = parser.parse_args(["fit"])
    elif args.command != "sweep" and flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return parser, args, flags


def main(args, flags):
    if args.command == "sweep":
        sweep(args, flags)
    elif args.command == "coverage":
        for noise in args.noise:
            found = coverage(args.repeats, noise) | (coverage_laws(args.repeats, noise) if args.laws else {})
            print(f"noise {noise:.1%}, {args.repeats} sweeps: " + "; ".join(
                f"{name} off by {error:+.4f}, interval holds the truth {share:.1%}" for name, (error, share) in found.items()))
    else:
        {"fit": fit, "predict": predict}[args.command](args)


if __name__ == "__main__":
    parser, args, flags = parse_args()
    try:
        main(args, flags)
    except UserError as error:
        parser.error(str(error))
