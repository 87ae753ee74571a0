"""The scaling laws of looping: fit a table of training runs, predict the best recurrence.

    python scaling.py                               fit the tables in results/
    python scaling.py fit out/sweep --json f.json   a directory of runs, or CSV files from anywhere
    python scaling.py predict --flops 1e14          the best recurrence and tokens for a budget

With parameters and training FLOPs C fixed, loops compete with tokens: the best mean recurrence mu*
and token count D* grow with C (§5.2 of "Parcae", arXiv 2604.12946). Two methods find them here:
where they disagree, trust neither.

1. At each budget the log loss is a parabola in log mu around its lowest point. The bottom is mu*,
   D* = C / cost of a token at mu*, and lines through their logarithms are the power laws.
2. A law of the loss is fitted to all runs (parts/laws.py), and mu* is where it is lowest at C.

Tables come from tools/sweep.py, tools/design.py plans the next one. Without loops the training law
is that of Chinchilla.
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
WINDOW = math.log(4)  # a parabola is fitted to the recurrences within this factor of the lowest
ENOUGH_SEEDS = 5  # degrees of freedom: with fewer, what parabolas leave over may know more of noise

# ----------------------------------------------------------------------------- parabolas


def bottom(budget, log_loss):
    """Return (log mu*, parabola [a, b, c], positions of the recurrences it was fitted to).

    Where log_loss (recurrences,) is lowest at an edge, the optimum is beyond: log mu* is -inf, "at
    most the fewest loops tried", or +inf. A parabola through everything would still have its bottom
    inside, and power laws through such bottoms an exponent that the data do not have."""
    x, lowest = budget.log_mu, np.argmin(log_loss)
    if lowest in (0, len(x) - 1):
        return (math.inf if lowest else -math.inf), None, []
    near = np.flatnonzero(np.abs(x - x[lowest]) <= WINDOW + 1e-9)
    near = np.union1d(near, [lowest - 1, lowest + 1])
    # Means of several seeds count for more. The weights of polyfit are those of unsquared errors.
    a, b, c = np.polyfit(x[near], log_loss[near], 2, w=np.sqrt(budget.seeds[near]))
    if a <= 0 or not x[near[0]] < -b / (2 * a) < x[near[-1]]:
        near = np.array([lowest - 1, lowest, lowest + 1])  # through these it has a bottom inside
        a, b, c = np.polyfit(x[near], log_loss[near], 2)
    return -b / (2 * a), [a, b, c], near


def left_by_parabola(budget):
    """Return (squares that the parabola leaves over, as of single runs, degrees of freedom)."""
    _, parabola, near = bottom(budget, budget.log_loss)
    if len(near) <= 3:
        return 0.0, 0
    left = budget.log_loss[near] - np.polyval(parabola, budget.log_mu[near])
    return (budget.seeds[near] * left ** 2).sum(), len(near) - 3


def noise_of(budgets):
    """Return {"sd" of a run's log loss, "freedom", "source"}, None where nothing is left over. The
    source is "seeds", or, where those are few, "parabolas": what these leave over."""
    source, (squares, freedom) = "seeds", chance.left_by_seeds(budgets)
    by_parabolas = np.sum([(0, 0), *map(left_by_parabola, budgets)], axis=0)
    if not freedom or freedom < min(ENOUGH_SEEDS, by_parabolas[1]):
        source, (squares, freedom) = "parabolas", by_parabolas
    if not squares:
        return None
    return {"sd": math.sqrt(squares / freedom), "freedom": int(freedom), "source": source}


def optimum_of(budget, every, cost, noise):
    """Return what --json writes of a budget; every: its log mu*, (1 + resamples,)."""
    log_mu, parabola, near = bottom(budget, budget.log_loss)
    low, high = budget.mu[[0, -1]].tolist()
    optimum = {
        "flops": budget.flops, "mu_tried": budget.mu.tolist(), "inside": math.isfinite(log_mu),
        "at_most": low if log_mu == -math.inf else None,
        "at_least": high if log_mu == math.inf else None,
        "mu_rec": None, "ci": [None, None], "ci_at_edge": [False, False], "tokens": None,
        "val_loss": None, "parabola": parabola, "fitted_to": budget.mu[near].tolist(),
        "lack_of_fit": chance.lack_of_fit(*left_by_parabola(budget), noise),
    }
    if parabola:
        optimum["mu_rec"] = math.exp(log_mu)
        optimum["tokens"] = budget.flops / float(cost(math.exp(log_mu)))
        optimum["val_loss"] = math.exp(np.polyval(parabola, log_mu))
    if len(every) > 1:
        ends = np.append(np.quantile(every[1:], [0.025, 0.975], method="nearest"), log_mu)
        ends = np.array([ends.min(), ends.max()])  # it holds its own point
        optimum["ci"] = np.exp(ends.clip(math.log(low), math.log(high))).tolist()
        optimum["ci_at_edge"] = np.isinf(ends).tolist()
    return optimum


def fit_parabolas(budgets, cost, resamples=1000, seed=0):
    """Return what --json writes of the runs without a law: the optimum at each budget with three
    recurrences, power laws of these, the noise of a run. cost: of laws.token_cost."""
    noise, usable = noise_of(budgets), [budget for budget in budgets if len(budget.mu) >= 3]
    rng = np.random.default_rng(seed)
    # log mu* of the mean losses as they are, then with more noise added: a parametric bootstrap
    every = np.empty((1 + resamples if noise else 1, len(usable)))
    every[0] = [bottom(budget, budget.log_loss)[0] for budget in usable]
    for sample in every[1:]:
        # How large the noise is, is not known either: chi-squared over its degrees of freedom.
        sd = noise["sd"] * math.sqrt(noise["freedom"] / rng.chisquare(noise["freedom"]))
        for j, budget in enumerate(usable):
            added = sd / np.sqrt(budget.seeds) * rng.standard_normal(len(budget.mu))
            sample[j] = bottom(budget, budget.log_loss + added)[0]
    optima = [optimum_of(*pair, cost, noise) for pair in zip(usable, every.T)]
    if noise:
        noise["two_runs"] = chance.most_by_chance(noise, 1)  # 95 % of pairs differ by less
    return {"isoflop": optima, "power_laws": power_laws(usable, every, cost), "noise": noise}


def line_through(x, y, low, high):
    """Return (slope, intercept) of the least squares line through y (n,), NaN with fewer than two
    finite values. -inf says at most low[i], +inf at least high[i]: such a point counts only where
    the line contradicts it. Which those are is tried again until it stays (an active set)."""
    used = known = np.isfinite(y)
    if known.sum() < 2:
        return math.nan, math.nan
    target = np.where(known, y, y.clip(low, high))
    for _ in range(2 * len(x)):
        slope, intercept = np.polyfit(x[used], target[used], 1)
        contradicted = np.sign(y) * (slope * x + intercept - target) < 0  # above "at most", say
        before, used = used, known | contradicted
        if np.array_equal(used, before):
            break
    return slope, intercept


def power_laws(budgets, every, cost):
    """Return {"mu_rec", "tokens"}: mu* and D* against C; {} without two optima inside. "defined"
    is the share of resamples that have an exponent. every: log mu* (1 + resamples, budgets)."""
    if np.isfinite(every[0]).sum() < 2:
        return {}
    x = np.log([budget.flops for budget in budgets])
    low, high = np.array([budget.log_mu[[0, -1]] for budget in budgets]).T

    def log_tokens(log_mu):
        # "At most so many loops", -inf, is at least so many tokens, +inf.
        tokens = x - np.log(cost(np.exp(log_mu.clip(low, high))))
        return np.where(np.isfinite(log_mu), tokens, -log_mu)

    def power_law(every, low, high):
        slopes, intercepts = np.array([line_through(x, y, low, high) for y in every]).T
        defined = float(np.isfinite(slopes[1:]).mean()) if len(every) > 1 else None
        return laws.exponent(slopes) | {"coefficient": math.exp(intercepts[0]), "defined": defined}

    return {"mu_rec": power_law(every, low, high),
            "tokens": power_law(log_tokens(every), log_tokens(high), log_tokens(low))}

# ----------------------------------------------------------------------------- all laws


class Table:
    """The runs of a table's main model: `at_every_T`, `rows` at T = mu_rec, `every_model` with
    those of other models. Their losses are without the effects of seeds, `measured` are `rows` as
    they were. `fit`: of the training law, perhaps None. `notes` say which runs are left out."""

    def __init__(self, every_row, accounting):
        self.notes, self.fit = [], None
        mine = kept(every_row, lambda row: row["accounting"] == accounting, self.notes,
                    f"have no {accounting} FLOPs and are")
        mine = chance.without_diverged(mine, self.notes)
        models = {row["model"] for row in max(tables.comparable(mine), key=runs_in)}
        main = kept(mine, lambda row: row["model"] in models, self.notes, "of other models are")
        self.measured = kept(main, lambda row: row["recurrence"] == row["mu_rec"], self.notes,
                             "have no row at T = mu_rec, where loss is compared, and are")
        corrected = chance.without_seed_effects(mine)
        self.every_model = trained_depth(corrected)
        self.at_every_T = [row for row in corrected if row["model"] in models]
        self.rows = trained_depth(self.at_every_T)
        self.model = main[0]["model"] if len(models) == 1 else f"{len(models)} models"
        self.looped = tables.distinct(self.at_every_T, "mu_rec") > 1
        self.cost = laws.token_cost(self.at_every_T)
        self.budgets = tables.budgets_of(self.rows)

    def law_at(self, flops):
        """Return the optimum by the training law at a budget: see laws.optimum."""
        return laws.optimum(self.fit, self.rows[0], self.cost, flops)


def fit_optima(every_row, accounting, resamples=laws.RESAMPLES):
    """Return (a dict for --json, the Table): optima at equal FLOPs by parabolas and by the law."""
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
            notes.append(f"gain over mu_rec = 1: {alone} runs have no other of their budget and "
                         "seed to be compared with, and are left out")
    elif table.looped:
        notes.append("the optimum at equal FLOPs: not computed, the runs called "
                     f"{table.model} have {sizes} sizes")
    table.fit, law = laws.fit_with_error("training", table.rows, resamples, notes)
    if law:
        out["training_law"] = law
        law["far_exponents"] = laws.far_exponents(table.fit)
    if one_size and law:
        law["lack_of_fit"] = chance.lack_of_fit(*left_by_law(table), out["noise"])
        flops = column(table.rows, "flops")
        # Runs planned by another accounting share no budgets: then five of them.
        budgets = [optimum["flops"] for optimum in out["isoflop"]]
        budgets = budgets or np.geomspace(flops.min(), flops.max(), 5).tolist()
        exponents = laws.exponents_of(table.fit, table.rows[0], table.cost, flops)
        law["frontier"] = {"optima": list(map(table.law_at, budgets)), "exponents": exponents}
    return out, table


def left_by_law(table):
    """Return what left_by_parabola does, of the training law and all budgets."""
    squares, freedom = 0.0, -len(table.fit.law.parameters)
    for budget in table.budgets:
        cells = [table.rows[0] | {"mu_rec": mu, "recurrence": mu, "tokens": tokens}
                 for mu, tokens in zip(budget.mu, budget.tokens)]
        left = budget.log_loss - np.log(table.fit.predict(cells))
        squares += (budget.seeds * left ** 2).sum()
        freedom += len(cells)
    return squares, freedom


def fit_table(every_row, accounting, resamples=laws.RESAMPLES):
    """Return what fit_optima does, with all other laws."""
    out, table = fit_optima(every_row, accounting, resamples)
    out["laws"] = {}
    of_loops = {"unified": table.at_every_T, "worth": table.every_model}
    for name in laws.LAWS:
        if name != "training" and (table.looped or name not in of_loops):
            rows = of_loops.get(name, table.rows)
            _, law = laws.fit_with_error(name, rows, resamples, out["notes"])
            out["laws"] |= {name: law} if law else {}
    return out, table


def draw(out, table, folder):
    """Write the figures of what was fitted."""
    if out["isoflop"]:
        taken_out = ", effects of seeds taken out" if out["seeds"] else ""
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
        help="FLOPs to fit by (default: exact, if the table has it)")


def fitted(args, resamples=laws.RESAMPLES):
    """Return fit_optima of the tables of the command line. Raises UserError without a training law
    of loops."""
    out, table = fit_optima(*read_tables(args.tables, args.accounting), resamples)
    if "frontier" not in out.get("training_law", {}):
        reasons = "; ".join(out["notes"]) or "they have no loops"
        raise UserError(f"these tables do not determine a training law of loops: {reasons}")
    return out, table


def predict(args):
    """Print the best recurrence and tokens for a budget, by the law fitted to a table."""
    out, table = fitted(args)
    best = table.law_at(args.flops)
    flops, mu = column(table.rows, "flops"), column(table.rows, "mu_rec")
    print(f"from {out['runs']} runs of {out['model']} at {flops.min():.2g} to {flops.max():.2g} "
          f"FLOPs ({out['accounting']})")
    for note in table.notes:
        print("note:", note)
    print(f"mu*  = {optimum_text(best)} loops")
    print(f"D*   = {best['tokens']:.4g} {span(best['ci_tokens'])} tokens")
    print(f"loss = {best['val_loss']:.4g} {span(best['ci_val_loss'])} nats per token")

    for optimum in out["isoflop"]:
        if tables.same_budget(args.flops, optimum["flops"]):
            print(f"the runs at this budget, without the law: mu* = {optimum_text(optimum)}")
    beyond = max(best["mu_rec"] / mu.max(), mu.min() / best["mu_rec"])
    if beyond >= 1:
        print(f"warning: mu* is not inside the recurrences tried, {mu.min():g} to {mu.max():g}, "
              f"but {beyond:.3g} times their end: no run has been there")
    beyond = max(args.flops / flops.max(), flops.min() / args.flops)
    if beyond >= 2:
        print(f"warning: {beyond:.3g} times beyond the budgets measured; the intervals know "
              "nothing of that")


def fit(args):
    """Fit the laws to a table of runs, print and draw them."""
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
    add("--json", type=new_file, metavar="FILE", help="write every fitted number")
    add("--figures", type=new_directory, default="out/scaling", metavar="DIR",
        help="where figures go (default: %(default)s)")
    add("--resamples", type=number(int, 0), default=laws.RESAMPLES, metavar="N",
        help="of the bootstrap of the laws; with fewer than 20 no intervals (default: %(default)s)")

    about = predict.__doc__
    add = commands.add_parser("predict", help=about, description=about).add_argument
    add_table_flags(add, "tables")
    add("--flops", type=number(float, 1), required=True, metavar="C", help="training FLOPs")
    args = parser.parse_args(sys.argv[1:] or ["fit"])
    torch.set_num_threads(1)  # the fits are small: threads cost more than they bring
    {"fit": fit, "predict": predict}[args.command](args)


if __name__ == "__main__":
    run_script(main)
