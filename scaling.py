"""The scaling laws of looping: fit a table of training runs, predict, plan the next runs.

    python scaling.py                               fit the tables in results/
    python scaling.py fit out/sweep --json f.json   a directory of runs, or CSV files from anywhere
    python scaling.py predict --flops 1e14          the best recurrence and tokens for a budget
    python scaling.py design --budgets 4e12 8e12 --recurrences 1 2 4 8 --seeds 0 1 2
                                                    what would such a sweep find, and cost?

With parameters and training FLOPs C fixed, loops compete with tokens: the best mean recurrence mu*
and token count D* grow with C (§5.2 of "Parcae", arXiv 2604.12946). Tables come from
tools/sweep.py. Tables without loops are fitted too: then the training law is that of Chinchilla.

parts/isoflop.py reads mu* off the runs, parts/laws.py fits laws of the loss and finds mu* on them.
Both are printed side by side: where they disagree, neither is to be trusted.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from parts import figures
from parts.cli import (
    COUNT,
    LOOPS,
    POSITIVE,
    SEED,
    Parser,
    UserError,
    new_directory,
    new_file,
    number,
    run_script,
)
from parts.files import write_json
from parts.fit_report import draw, frontier_text, optimum_text, report, value_text
from parts.isoflop import (
    budgets_of,
    fit_parabolas,
    gains,
    lack_of_fit,
    seed_differences,
    without_a_pair,
)
from parts.laws import (
    LAWS,
    RESAMPLES,
    far_exponents,
    fit_law,
    frontier,
    frontier_exponents,
    interval,
    reasons_against,
    token_cost,
)
from parts.outliers import without_diverged
from parts.tables import (
    at_trained_depth,
    column,
    comparable,
    distinct,
    kept,
    read_tables,
    rows_by_budget,
    run_key,
    runs_in,
    same_budget,
    sizes,
    trained_depth,
    without_seed_effects,
)
from tools.design import design

HERE = Path(__file__).parent
COMMANDS = {  # name: (what it does, its flags in an example)
    "fit": ("Fit the laws to a table of runs, print and draw them.", "out/sweep --json fit.json"),
    "predict": ("The best recurrence and tokens for a budget, by the law fitted to a table.",
                "--flops 1e14"),
    "design": ("What a sweep would find and cost, by simulation, before it is run.",
               "--budgets 4e12 8e12 --recurrences 1 2 4 8 --seeds 0 1 2"),
}
PUBLISHED_LAWS = ("training", "unified", "worth", "test time")  # others are a reader's own

# ----------------------------------------------------------------------------- all fits of a table


def fit_without_largest(law, rows, notes):
    """(a fit to all but the largest budget, the rows of that). None, and a note says why, where
    that cannot be."""
    top = column(rows, "flops").max()
    seen = [row for row in rows if not same_budget(row["flops"], top)]
    largest = [row for row in rows if same_budget(row["flops"], top)]
    reasons = reasons_against(law, seen) if seen else ["there is one budget"]
    if distinct(rows, "mu_rec") > 1 and distinct(largest, "mu_rec") < 3:
        # also where the runs were planned by another accounting and share no budgets in this one
        reasons.append("it has fewer than three recurrences")
    if reasons:
        notes.append(f"{law} law: no error on the largest budget, fitted without it "
                     f"({'; '.join(reasons)})")
        return None
    return fit_law(law, seen, resamples=0), largest


def summary_of(fit, without_largest):
    """What --json writes of a law. without_largest: what fit_without_largest returns."""
    error = None
    if without_largest:
        smaller, unseen = without_largest
        error = smaller.error(unseen)
    return fit.summary() | {"held_out_error": error}


def fit_unified(rows, resamples, notes):
    """What --json writes of the unified law.

    Its error is mostly that of the training law; "given_loss" takes the loss at T = mu_rec as
    measured."""
    without_largest = fit_without_largest("unified", rows, notes)
    result = summary_of(fit_law("unified", rows, resamples=resamples), without_largest)
    result["held_out_error_given_loss"] = None
    if without_largest:
        fit, unseen = without_largest
        measured = {run_key(row): row["val_loss"] for row in trained_depth(unseen)}
        unseen = kept(unseen, lambda row: run_key(row) in measured, notes, "of the largest budget "
                      "have no row at T = mu_rec: of the error given that loss they are")
        if unseen:
            at_mu = fit.predict([row | {"recurrence": row["mu_rec"]} for row in unseen])
            loss = fit.predict(unseen) - at_mu + [measured[run_key(row)] for row in unseen]
            error = np.abs(loss / column(unseen, "val_loss") - 1).mean()
            result["held_out_error_given_loss"] = float(error)
    return result


def fit_worth(rows, resamples):
    """phi, and how much worse the law fits where a loop is worth nothing (0) or a layer (1)."""
    fit = fit_law("worth", rows, resamples=resamples)
    law = fit.summary()
    unlooped = [row | {"mu_rec": 1} for row in rows]
    objective = {"free": fit.objective,
                 "phi = 0": fit_law("training", unlooped, resamples=0).objective,
                 "phi = 1": fit_law("training", rows, resamples=0).objective}
    return {"phi": law["phi"], "ci": law["ci"]["phi"], "law": law, "objective": objective,
            "sizes": sizes(rows)}


def fit_test_time(rows, notes):
    """[(run's rows, fit, what --json writes)] of each recurrence's run with most FLOPs, and of
    those the lowest seed."""
    result, few = [], []
    for mu in sorted({row["mu_rec"] for row in rows} - {1}):
        largest = rows_by_budget([row for row in rows if row["mu_rec"] == mu])[-1]
        run = run_key(min(largest, key=lambda row: row["seed"]))
        data = sorted((row for row in rows if run_key(row) == run), key=lambda r: r["recurrence"])
        if len(data) < 4 or distinct(data, "val_loss") == 1:
            few.append(f"{mu:g}")
        else:
            fit = fit_law("test time", data, starts=16, resamples=0)
            values = {name: float(value) for name, value in fit.values(fit.theta).items()}
            result.append((data, fit, run._asdict() | values | {"error": fit.error(data)}))
    if few:
        notes.append(f"test-time law: not fitted for mu_rec {', '.join(few)} (it needs losses that "
                     "differ at 4 values of T)")
    return result


def exponents_of(fit, size, cost, flops):
    """{"mu_rec", "tokens"}: exponents along the frontier, over the range of these FLOPs."""
    low, high = flops.min(), flops.max()
    point = frontier_exponents(fit, size, cost, low, high)[:, 0]
    sampled = frontier_exponents(fit, size, cost, low, high, fit.samples)
    result = {}
    for name, value, samples in zip(("mu_rec", "tokens"), point, sampled):
        result[name] = {"exponent": float(value) if np.isfinite(value) else None,
                        "ci": interval(samples, value)}
    return result


class Table:
    """The runs of a table's main model, and what its fits, pictures and plans share.

    every_row: of all accountings. `at_every_T` has a row for each loop count at evaluation, `rows`
    those at T = mu_rec, `every_model` those of other models, too. Their losses are without the
    effects of seeds; `measured`: `rows` with the losses as they were. `cost`: FLOPs of a token by
    mu_rec; `budgets`: see isoflop.budgets_of. `fit` is the training law's, None where it could not
    be fitted; `test_time`: of fit_test_time. `notes` say which runs are left out."""

    def __init__(self, every_row, accounting):
        self.every_row, self.accounting, self.notes = every_row, accounting, []
        mine = kept(every_row, lambda row: row["accounting"] == accounting, self.notes,
                    f"have no {accounting} FLOPs and are")
        mine = without_diverged(mine, self.notes)
        models = {row["model"] for row in max(comparable(mine), key=runs_in)}
        main = kept(mine, lambda row: row["model"] in models, self.notes, "of other models are")
        self.measured = kept(main, at_trained_depth, self.notes,
                             "have no row at T = mu_rec, where loss is compared, and are")
        corrected = without_seed_effects(mine)
        self.every_model = trained_depth(corrected)
        self.at_every_T = [row for row in corrected if row["model"] in models]
        self.rows = trained_depth(self.at_every_T)
        self.model = main[0]["model"] if len(models) == 1 else f"{len(models)} models"
        self.cost = token_cost(self.at_every_T)
        self.budgets = budgets_of(self.rows)
        self.fit, self.test_time = None, []

    def looped(self):
        return distinct(self.at_every_T, "mu_rec") > 1


def fit_optima(every_row, accounting, resamples=RESAMPLES):
    """Optima at equal FLOPs by both methods: isoFLOP, and the training law's frontier.

    every_row: of all accountings; another one than `accounting` is another cost of a token under
    the same law. Returns (a dict for --json, the Table)."""
    table = Table(every_row, accounting)
    rows = table.rows
    out = {"model": table.model, "accounting": accounting, "looped": table.looped(),
           "runs": runs_in(table.at_every_T), "noise": None, "isoflop": [],
           "power_laws": {}, "gain": [], "seeds": None, "notes": table.notes.copy()}
    one_size = table.looped() and sizes(rows) <= 1
    if one_size:
        found = fit_parabolas(table.budgets, table.cost)
        out |= found | {"notes": out["notes"] + found["notes"]}
        out["seeds"] = seed_differences(budgets_of(table.measured), out["noise"])
        out["gain"] = gains(table.budgets, out["noise"])
        alone = without_a_pair(table.budgets)
        if alone:
            out["notes"].append(f"gain over mu_rec = 1: {alone} runs have no other of their budget "
                                "and seed to be compared with, and are left out")
    elif table.looped():
        out["notes"].append("the optimum at equal FLOPs: not computed, the runs called "
                            f"{table.model} have {sizes(rows)} sizes")
    if can_fit("training", rows, out["notes"]):
        table.fit = fit_law("training", rows, resamples=resamples)
        law = summary_of(table.fit, fit_without_largest("training", rows, out["notes"]))
        out["training_law"] = law
        law["lack_of_fit"] = None
        if one_size:
            law["lack_of_fit"] = lack_of_fit(*left_by_law(table), out["noise"])
            law["frontier"], law["other_accounting"] = frontiers(table, bool(out["isoflop"]))
        law["far_exponents"] = far_exponents(table.fit)
    return out, table


def left_by_law(table):
    """(squares that the training law leaves over of mean log losses, degrees of freedom): see
    isoflop.left_by_parabola."""
    squares, freedom = 0.0, -len(table.fit.law.parameters)
    for budget in table.budgets:
        cells = [table.rows[0] | {"mu_rec": mu, "recurrence": mu, "tokens": tokens}
                 for mu, tokens in zip(budget.mu, budget.tokens)]
        left = budget.log_loss - np.log(table.fit.predict(cells))
        squares += (budget.seeds * left ** 2).sum()
        freedom += len(cells)
    return squares, freedom


def can_fit(law, rows, notes):
    """Whether a law can be fitted; if not, a note says why."""
    reasons = reasons_against(law, rows)
    if reasons:
        notes.append(f"{law} law: not fitted ({'; '.join(reasons)})")
    return not reasons


def frontiers(table, shared_budgets):
    """The training law's optima at the table's budgets; its exponents by other accountings.

    Where the runs share no budgets, having been planned by another accounting: at five."""
    fit, rows, cost = table.fit, table.rows, table.cost
    budgets = [budget.flops for budget in table.budgets]
    if not shared_budgets:
        budgets = np.geomspace(budgets[0], budgets[-1], 5).tolist()
    optima = []
    for flops in budgets:
        (mu,), (tokens,), (loss,) = frontier(fit, rows[0], cost, flops)
        sampled = frontier(fit, rows[0], cost, flops, fit.samples)[0]
        optima.append({"flops": flops, "mu_rec": mu, "ci": interval(sampled, mu),
                       "tokens": tokens, "val_loss": loss})

    others = {}
    for name in sorted({row["accounting"] for row in table.every_row} - {table.accounting}):
        theirs = [row for row in table.every_row
                  if row["accounting"] == name and row["model"] == table.model]
        if theirs:  # the size stays as the law was fitted; the price of a token is another
            others[name] = exponents_of(fit, rows[0], token_cost(theirs), column(theirs, "flops"))
    exponents = exponents_of(fit, rows[0], cost, column(rows, "flops"))
    return {"optima": optima, "exponents": exponents}, others


def fit_table(every_row, accounting, resamples=RESAMPLES):
    """Everything that can be fitted to a table: fit_optima, and the other laws of looping."""
    out, table = fit_optima(every_row, accounting, resamples)
    if out["seeds"] and table.fit:
        raw = fit_law("training", table.measured, resamples=resamples)
        out["training_law"]["with_seed_effects"] = exponents_of(
            raw, table.rows[0], table.cost, column(table.rows, "flops"))
    if table.looped():
        if can_fit("unified", table.at_every_T, out["notes"]):
            out["unified"] = fit_unified(table.at_every_T, resamples, out["notes"])
        if can_fit("worth", table.every_model, out["notes"]):
            out["recurrence_worth"] = fit_worth(table.every_model, resamples)
        table.test_time = fit_test_time(table.at_every_T, out["notes"])
    out["laws"] = {}
    for name in LAWS:
        if name not in PUBLISHED_LAWS and can_fit(name, table.rows, out["notes"]):
            out["laws"][name] = summary_of(
                fit_law(name, table.rows, resamples=resamples),
                fit_without_largest(name, table.rows, out["notes"]))
    out["test_time"] = [numbers for _, _, numbers in table.test_time]
    return out, table

# ----------------------------------------------------------------------------- commands


def fitted(args):
    """(out, Table) of the tables of the command line. Raises UserError without a training law."""
    rows, accounting = read_tables(args.tables or default_tables(), args.accounting)
    out, table = fit_optima(rows, accounting)
    if "frontier" not in out.get("training_law", {}):
        reasons = "; ".join(out["notes"]) or "they have no loops"
        raise UserError(f"these tables do not determine a training law of loops: {reasons}")
    return out, table


def predict(args):
    """Print the best recurrence, tokens and loss for a budget, by the training law."""
    out, table = fitted(args)
    rows, fit = table.rows, table.fit
    flops = args.flops
    low, top = column(rows, "flops").min(), column(rows, "flops").max()
    print(f"from {out['runs']} runs of {out['model']} at {low:.2g} to {top:.2g} FLOPs "
          f"({out['accounting']})")
    for note in table.notes:
        print("note:", note)

    best = frontier(fit, rows[0], table.cost, flops)
    sampled = frontier(fit, rows[0], table.cost, flops, fit.samples)
    for label, value, samples, unit in zip(("mu*", "D*", "loss"), best, sampled,
                                           ("loops", "tokens", "nats per token")):
        said = frontier_text if label == "mu*" else value_text
        print(f"{label:4s} = {said(value[0], interval(samples, value[0]))} {unit}")

    for optimum in out["isoflop"]:
        if same_budget(flops, optimum["flops"]):
            print(f"the runs at this budget, without the law: mu* = {optimum_text(optimum)}")
    mu, tried = best[0][0], column(rows, "mu_rec")
    if not tried.min() < mu < tried.max():
        beyond = max(mu / tried.max(), tried.min() / mu)
        by = f"{beyond:.3g} times beyond" if beyond > 1 else "at the edge of"
        print(f"warning: mu* is not inside the recurrences tried but {by} them, {tried.min():g} to "
              f"{tried.max():g}: the law goes on where no run has been")
    if not low / 2 < flops < 2 * top:
        print(f"warning: {max(flops / top, low / flops):.3g} times beyond the budgets measured; "
              "the intervals know nothing of that")


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


def fit_command(args):
    """Fit everything, print it beside the published figures, write --json, draw."""
    rows, accounting = read_tables(args.tables or default_tables(), args.accounting)
    drawing = can_draw()  # asked before the fit, which takes a while
    out, table = fit_table(rows, accounting, args.resamples)
    report(out)
    if args.json:
        write_json(args.json, out)
        print("wrote", args.json)
    if drawing:
        draw(out, table, Path(args.figures))


def parse_args(words):
    """The command's settings; `fit` where no command is given."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(prog="python scaling.py", dest="command", metavar="command")
    adders = {}
    for name, (does, example) in COMMANDS.items():
        about = f"{does}\n\n    python scaling.py {name} {example}"
        adders[name] = add = commands.add_parser(name, help=does, description=about).add_argument
        add("--tables" if name == "design" else "tables", nargs="*", metavar="DIR|CSV",
            help="runs or tables to fit (default: results/sweep*.csv)")
        add("--accounting", metavar="NAME",
            help="FLOPs to fit by (default: exact, if the table has it)")

    add = adders["fit"]
    add("--json", type=new_file, metavar="FILE", help="write every fitted number")
    add("--figures", type=new_directory, default="out/scaling", metavar="DIR",
        help="where figures go (default: %(default)s)")
    add("--resamples", type=number(int, 0), default=RESAMPLES, metavar="N",
        help="of the bootstrap of the laws; with fewer than 20 no intervals (default: %(default)s)")

    add = adders["predict"]
    add("--flops", type=number(float, 1), required=True, metavar="C", help="training FLOPs")

    add = adders["design"]
    add("--budgets", type=number(float, 1), nargs="+", required=True, metavar="C", help="FLOPs")
    add("--recurrences", type=LOOPS, nargs="+", required=True, metavar="MU",
        help="mean recurrences to try at each budget")
    add("--seeds", type=SEED, nargs="+", default=[0], metavar="N",
        help="seeds of each cell, such as 0 1 2 for three (default: 0)")
    add("--noise", type=POSITIVE, metavar="SD",
        help="of a run's loss, relative (default: the tables')")
    add("--speed", type=POSITIVE, default=2.8e10, metavar="F",
        help="FLOP/s of a core or GPU (default: %(default)g, a core of an AMD EPYC, 16 channels)")
    add("--repeats", type=COUNT, default=100, metavar="N",
        help="made-up sweeps (default: %(default)s)")

    return parser.parse_args(words or ["fit"])


def main():
    args = parse_args(sys.argv[1:])
    torch.set_num_threads(1)  # the fits are small: threads cost more than they bring
    if args.command == "fit":
        fit_command(args)
    elif args.command == "predict":
        predict(args)
    else:
        design(args, *fitted(args))


if __name__ == "__main__":
    run_script(main)
