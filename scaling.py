"""The scaling laws of looping: fit a table of training runs, predict the best recurrence.

    python scaling.py                               fit the tables in results/
    python scaling.py fit out/sweep --json f.json   a directory of runs, or CSV files from anywhere
    python scaling.py predict --flops 1e14          the best recurrence and tokens for a budget

With parameters and training FLOPs C fixed, more loops leave fewer tokens. The best mean recurrence
mu* and token count D* grow with C (§5.2 of "Parcae", arXiv 2604.12946). Two methods estimate them
here; where they disagree, trust neither.

1. Parabolas: at each budget, a parabola in log mu is fitted to the log loss near its minimum. Its
   bottom is mu*, D* is C / (FLOPs per token at mu*), and lines through their logs are power laws.
2. Training law: a law of the loss is fitted to all runs (parts/laws.py). mu* minimises it at C.

tools/sweep.py makes the tables, and tools/design.py plans the next sweep. Without loops, the
training law is that of Chinchilla.
"""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import torch

from parts import chance, figures, laws, tables
from parts.cli import Parser, UserError, new_directory, new_file, number, run_script
from parts.files import write_json
from parts.show_fit import SLOPES, notes_on, optimum_text, report, span
from parts.tables import column, kept, read_tables, runs_in, trained_depth

TABLES = sorted((Path(__file__).parent / "results").glob("sweep*.csv"))  # fitted by default
WINDOW = math.log(4)  # the parabola sees recurrences within a factor of 4 of the best one
ENOUGH_SEEDS = 5  # degrees of freedom: below this, parabolas estimate the noise if they have more

# ----------------------------------------------------------------------------- parabolas


def bottom(budget, log_loss):
    """Return (log mu*, parabola [a, b, c], positions of the recurrences it was fitted to).

    If log_loss (recurrences,) is lowest at an edge, log mu* is -inf ("at most the fewest loops
    tried") or +inf. A parabola through all recurrences would still have its bottom inside, but
    power laws through such bottoms would have an exponent that is not in the data."""
    x, lowest = budget.log_mu, np.argmin(log_loss)
    if lowest in (0, len(x) - 1):
        return (math.inf if lowest else -math.inf), None, []
    near = np.flatnonzero(np.abs(x - x[lowest]) <= WINDOW + 1e-9)
    near = np.union1d(near, [lowest - 1, lowest + 1])
    # Weight each mean by its number of seeds; polyfit squares weights, so pass the root.
    a, b, c = np.polyfit(x[near], log_loss[near], 2, w=np.sqrt(budget.seeds[near]))
    if a <= 0 or not x[near[0]] < -b / (2 * a) < x[near[-1]]:
        near = np.array([lowest - 1, lowest, lowest + 1])  # this parabola has its bottom inside
        a, b, c = np.polyfit(x[near], log_loss[near], 2)
    return -b / (2 * a), [a, b, c], near


def left_by_parabola(budget):
    """Return (residual sum of squares, scaled to single runs; its degrees of freedom)."""
    _, parabola, near = bottom(budget, budget.log_loss)
    if len(near) <= 3:
        return 0.0, 0
    residuals = budget.log_loss[near] - np.polyval(parabola, budget.log_mu[near])
    return (budget.seeds[near] * residuals ** 2).sum(), len(near) - 3


def noise_of(budgets):
    """Return {"sd": standard deviation of a run's log loss, "freedom": its degrees of freedom,
    "source": "seeds" or "parabolas", whose residuals give it}, or None if all residuals are 0."""
    source, (squares, freedom) = "seeds", chance.left_by_seeds(budgets)
    by_parabolas = np.sum([(0, 0), *map(left_by_parabola, budgets)], axis=0)
    if freedom < min(ENOUGH_SEEDS, by_parabolas[1]):
        source, (squares, freedom) = "parabolas", by_parabolas
    if not squares:
        return None
    return {"sd": math.sqrt(squares / freedom), "freedom": int(freedom), "source": source}


def optimum_of(budget, every, cost, noise):
    """Return the optimum at a budget, for --json. every: its log mu*, then each resample's."""
    log_mu, parabola, near = bottom(budget, budget.log_loss)
    low, high = budget.mu[[0, -1]].tolist()
    optimum = {
        "flops": budget.flops, "mu_tried": budget.mu.tolist(), "inside": math.isfinite(log_mu),
        "at_most": low if log_mu == -math.inf else None,
        "at_least": high if log_mu == math.inf else None,
        "mu_rec": None, "ci": [None, None], "ci_at_edge": ["", ""], "tokens": None,
        "val_loss": None, "parabola": parabola, "fitted_to": budget.mu[near].tolist(),
        "lack_of_fit": chance.lack_of_fit(*left_by_parabola(budget), noise),
    }
    if parabola:
        optimum["mu_rec"] = math.exp(log_mu)
        optimum["tokens"] = budget.flops / float(cost(math.exp(log_mu)))
        optimum["val_loss"] = math.exp(np.polyval(parabola, log_mu))
    if len(every) > 1:
        at_edge = {-math.inf: "<= ", math.inf: ">= "}
        ends = np.quantile(every[1:], [0.025, 0.975], method="nearest").tolist()
        ends = [min(ends[0], log_mu), max(ends[1], log_mu)]  # the interval contains its estimate
        optimum["ci"] = np.exp(np.clip(ends, math.log(low), math.log(high))).tolist()
        optimum["ci_at_edge"] = [at_edge.get(end, "") for end in ends]
    return optimum


def fit_parabolas(budgets, cost, resamples=1000, seed=0):
    """Return a dict for --json: the optimum at each budget that has three recurrences, power laws
    of these optima, and the noise of a run. cost: see laws.token_cost."""
    noise, usable = noise_of(budgets), [budget for budget in budgets if len(budget.mu) >= 3]
    rng = np.random.default_rng(seed)
    # A parametric bootstrap: log mu* of the measured mean losses, then of those plus drawn noise.
    every = np.empty((1 + (resamples if noise else 0), len(usable)))
    every[0] = [bottom(budget, budget.log_loss)[0] for budget in usable]
    for sample in every[1:]:
        # The noise level is uncertain itself: draw it too, by its chi-squared distribution.
        sd = noise["sd"] * math.sqrt(noise["freedom"] / rng.chisquare(noise["freedom"]))
        for j, budget in enumerate(usable):
            added = sd / np.sqrt(budget.seeds) * rng.standard_normal(len(budget.mu))
            sample[j] = bottom(budget, budget.log_loss + added)[0]
    optima = [optimum_of(*pair, cost, noise) for pair in zip(usable, every.T)]
    if noise:
        noise["two_runs"] = chance.most_by_chance(noise, 1)  # 95% of pairs differ by less
    return {"isoflop": optima, "power_laws": power_laws(usable, every, cost), "noise": noise}


def line_through(x, y, low, high):
    """Return (slope, intercept) of the least-squares line through y (n,), NaN with fewer than two
    finite values. y = -inf means at most low[i], +inf at least high[i]. Such a bound counts only if
    the line violates it; the fit repeats until the violated bounds stay the same (active set)."""
    used = known = np.isfinite(y)
    if known.sum() < 2:
        return math.nan, math.nan
    target = np.where(known, y, y.clip(low, high))
    for _ in range(2 * len(x)):
        slope, intercept = np.polyfit(x[used], target[used], 1)
        line = slope * x + intercept
        violated = (y == -np.inf) & (line > low) | (y == np.inf) & (line < high)
        before, used = used, known | violated
        if np.array_equal(used, before):
            break
    return slope, intercept


def power_laws(budgets, every, cost):
    """Return {"mu_rec", "tokens"}: power laws of mu* and D* in C; {} without two optima inside.
    "defined" is the share of resamples that have an exponent. every: log mu* (fits, budgets)."""
    if np.isfinite(every[0]).sum() < 2:
        return {}
    x = np.log([budget.flops for budget in budgets])
    low, high = np.array([budget.log_mu[[0, -1]] for budget in budgets]).T

    def log_tokens(log_mu):
        # An upper bound on mu*, -inf, is a lower bound on tokens, +inf.
        tokens = x - np.log(cost(np.exp(log_mu.clip(low, high))))
        return np.where(np.isfinite(log_mu), tokens, -log_mu)

    def power_law(of_fits, at_most, at_least):
        slopes, intercepts = np.array([line_through(x, y, at_most, at_least) for y in of_fits]).T
        defined = float(np.isfinite(slopes[1:]).mean()) if len(of_fits) > 1 else None
        return laws.exponent(slopes) | {"coefficient": math.exp(intercepts[0]), "defined": defined}

    # more loops are fewer tokens: the two bounds change places
    return {"mu_rec": power_law(every, low, high),
            "tokens": power_law(log_tokens(every), log_tokens(high), log_tokens(low))}

# ----------------------------------------------------------------------------- all laws


class Table:
    """The runs of the model with most runs: `at_every_T`, and `rows` at T = mu_rec; `every_model`
    adds the other models' to `rows`. Seed effects are removed from the losses. `measured`: `rows`
    with losses as measured. `fit`: the training law, or None. `notes` say which are left out."""

    def __init__(self, every_row, accounting):
        self.notes, self.fit = [], None
        counted = kept(every_row, lambda row: row["accounting"] == accounting, self.notes,
                       f"have no {accounting} FLOPs and are")
        counted = chance.without_diverged(counted, self.notes)
        models = {row["model"] for row in max(tables.comparable(counted), key=runs_in)}
        ours = kept(counted, lambda row: row["model"] in models, self.notes, "of other models are")
        self.measured = kept(ours, lambda row: row["recurrence"] == row["mu_rec"], self.notes,
                             "have no row at T = mu_rec, where loss is compared, and are")
        corrected = chance.without_seed_effects(counted)
        self.every_model = trained_depth(corrected)
        self.at_every_T = [row for row in corrected if row["model"] in models]
        self.rows = trained_depth(self.at_every_T)
        self.model = ours[0]["model"] if len(models) == 1 else f"{len(models)} models"
        self.looped = tables.distinct(self.at_every_T, "mu_rec") > 1
        self.cost = laws.token_cost(self.at_every_T)
        self.budgets = tables.budgets_of(self.rows)

    def law_at(self, flops):
        """Return the optimum by the training law at a budget: see laws.optimum."""
        return laws.optimum(self.fit, self.rows[0], self.cost, flops)


def fit_optima(every_row, accounting, resamples=laws.RESAMPLES):
    """Return (a dict for --json, the Table): optima at equal FLOPs, by parabolas and by the law."""
    table = Table(every_row, accounting)
    notes = table.notes.copy()
    out = {"model": table.model, "accounting": accounting, "looped": table.looped,
           "runs": runs_in(table.at_every_T), "noise": None, "isoflop": [],
           "power_laws": {}, "gain": [], "seeds": None, "notes": notes}
    sizes = tables.distinct(table.rows, "params_core", "params_noncore")
    one_size = table.looped and sizes <= 1
    if one_size:
        out |= fit_parabolas(table.budgets, table.cost)
        notes += notes_on(table.budgets, out["isoflop"], out["noise"])
        out["seeds"] = chance.seed_differences(tables.budgets_of(table.measured), out["noise"])
        out["gain"], alone = chance.gains(table.budgets, out["noise"])
        if alone:
            notes.append(f"gain over mu_rec = 1: {alone} runs have no partner with the same budget "
                         "and seed, and are left out")
    elif table.looped:
        notes.append("the optimum at equal FLOPs is not computed, because the runs called "
                     f"{table.model} have {sizes} sizes")
    table.fit, law = laws.fit_with_error("training", table.rows, resamples, notes)
    if law:
        out["training_law"] = law
        law["far_exponents"] = laws.far_exponents(table.fit)
    if one_size and law:
        law["lack_of_fit"] = chance.lack_of_fit(*left_by_law(table), out["noise"])
        flops = column(table.rows, "flops")
        # Runs planned with another accounting share no budgets, so take five in their range.
        budgets = [optimum["flops"] for optimum in out["isoflop"]]
        budgets = budgets or np.geomspace(flops.min(), flops.max(), 5).tolist()
        exponents = laws.exponents_of(table.fit, table.rows[0], table.cost, flops)
        law["frontier"] = {"optima": list(map(table.law_at, budgets)), "exponents": exponents}
    return out, table


def left_by_law(table):
    """Return what left_by_parabola returns, but for the training law at all budgets."""
    squares, freedom = 0.0, -len(table.fit.law.parameters)
    for budget in table.budgets:
        cells = [table.rows[0] | {"mu_rec": mu, "recurrence": mu, "tokens": tokens}
                 for mu, tokens in zip(budget.mu, budget.tokens)]
        residuals = budget.log_loss - np.log(table.fit.predict(cells))
        squares += (budget.seeds * residuals ** 2).sum()
        freedom += len(cells)
    return squares, freedom


def fit_table(every_row, accounting, resamples=laws.RESAMPLES):
    """Return what fit_optima returns, with the fits of all other laws under "laws"."""
    out, table = fit_optima(every_row, accounting, resamples)
    out["laws"] = {}
    for name, law in laws.LAWS.items():
        if name != "training" and (table.looped or law.rows == "rows"):
            rows = getattr(table, law.rows)
            _, found = laws.fit_with_error(name, rows, resamples, out["notes"])
            if found:
                out["laws"][name] = found
    return out, table


def draw(out, table, folder):
    """Write the figures of the fits to a folder, and print their paths."""
    if out["isoflop"]:
        taken_out = ", seed effects removed" if out["seeds"] else ""
        figures.isoflop(folder / "isoflop.png", table.budgets, out["isoflop"],
                        f"Equal FLOPs ({out['model']}){taken_out}")
        print("wrote", folder / "isoflop.png")
    if "frontier" in out.get("training_law", {}):
        flops = column(table.rows, "flops")
        every = [table.law_at(c) for c in np.geomspace(flops.min() / 1.5, flops.max() * 2, 40)]
        figures.optima(folder / "optima.png", out["isoflop"], every, SLOPES)
        print("wrote", folder / "optima.png")

# ----------------------------------------------------------------------------- commands


def add_table_flags(add, name):
    """Add the flags that say which runs to fit; add: a parser's add_argument."""
    add(name, nargs="*", metavar="DIR|CSV", default=TABLES,
        help="runs or tables to fit (default: results/sweep*.csv)")
    add("--accounting", metavar="NAME",
        help="how FLOPs are counted: exact, paper or 6ND (default: exact, if the table has it)")


def fitted(args, resamples=laws.RESAMPLES):
    """Return fit_optima of the tables on the command line. Raise UserError if they do not determine
    a training law of a looped model."""
    out, table = fit_optima(*read_tables(args.tables, args.accounting), resamples)
    if "frontier" not in out.get("training_law", {}):
        reasons = "; ".join(out["notes"]) if table.looped else "they have no loops"
        raise UserError(f"these tables do not determine a training law of loops: {reasons}")
    return out, table


def predict(args):
    """Print the best recurrence and tokens for a budget, by the training law fitted to a table."""
    out, table = fitted(args)
    best = table.law_at(args.flops)
    flops, mu = column(table.rows, "flops"), column(table.rows, "mu_rec")
    print(f"training law fitted to {runs_in(table.rows)} runs of {out['model']} at "
          f"{flops.min():.2g} to {flops.max():.2g} FLOPs ({out['accounting']} count), "
          "[95% confidence intervals]:")
    for note in table.notes:
        print("note:", note)
    print(f"mu*  = {optimum_text(best)} loops, the best mean recurrence")
    print(f"D*   = {best['tokens']:.4g} {span(best['ci_tokens'])} tokens, the best token count")
    print(f"loss = {best['val_loss']:.4g} {span(best['ci_val_loss'])} nats per token, predicted")

    for optimum in out["isoflop"]:
        if tables.same_budget(args.flops, optimum["flops"]):
            print(f"a parabola through the runs at this budget: mu* = {optimum_text(optimum)}")
    if not mu.min() < best["mu_rec"] < mu.max():
        print(f"warning: mu* is not inside the recurrences tried, {mu.min():g} to {mu.max():g}")
    beyond = max(args.flops / flops.max(), flops.min() / args.flops)
    if beyond >= 2:
        print(f"warning: this budget is {beyond:.3g} times beyond those of the runs; the intervals "
              "do not include the error of extrapolation")


def fit(args):
    """Fit the laws to a table of runs, print them and draw them."""
    rows, accounting = read_tables(args.tables, args.accounting)
    drawing = importlib.util.find_spec("matplotlib")
    if not drawing:
        print("no figures: pip install matplotlib")
    out, table = fit_table(rows, accounting, args.resamples)
    report(out)
    if args.json:
        write_json(args.json, out)
        print("wrote", args.json)
    if drawing:
        draw(out, table, Path(args.figures))


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(prog="python scaling.py", dest="command", metavar="command")

    add = commands.add_parser("fit", help=fit.__doc__, description=fit.__doc__).add_argument
    add_table_flags(add, "tables")
    add("--json", type=new_file, metavar="FILE", help="write all fitted numbers to this file")
    add("--figures", type=new_directory, default="out/scaling", metavar="DIR",
        help="directory for the figures (default: %(default)s)")
    add("--resamples", type=number(int, 0), default=laws.RESAMPLES, metavar="N",
        help="bootstrap resamples for the laws (parabolas take 1000); fewer than 20 give no "
        "intervals of laws (default: %(default)s)")

    about = predict.__doc__
    add = commands.add_parser("predict", help=about, description=about).add_argument
    add_table_flags(add, "tables")
    add("--flops", type=number(float, 1), required=True, metavar="C", help="training FLOPs")
    args = parser.parse_args(sys.argv[1:] or ["fit"])
    torch.set_num_threads(1)  # the fits are so small that threads slow them down
    {"fit": fit, "predict": predict}[args.command](args)


if __name__ == "__main__":
    run_script(main)
