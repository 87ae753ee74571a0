"""A table of training runs: its columns; reading CSV files and run directories; adding to one.

A row is one run, evaluated after one number of loops. Two columns count loops: mu_rec (mu), the
mean in training, and recurrence (T), those at evaluation. tools/sweep.py writes tables, scaling.py
fits them. A row by hand, for a model without loops: params_core 0, mu_rec, mu_bwd and recurrence 1.
"""

import csv
import itertools
import math
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np

from parts.cli import UserError
from parts.files import lock, log_line, read_json, whole_file
from parts.run_directory import say_differences

SAME_BUDGET = 1.03  # runs overshoot their budget by part of a step
NEAR_BUDGETS = 1.10  # budgets less apart than this may be meant as one

COLUMNS = {
    "model": str,  # prelude/recurrent/coda x channels
    "params_core": float,  # parameters that multiply a token in each loop, as `accounting` counts
    "params_noncore": float,  # ... once
    "flops": float,  # of the whole training
    "accounting": str,  # how they are counted, see ACCOUNTINGS
    "mu_rec": float,  # mean recurrence in training
    "mu_bwd": float,  # loops with gradient
    "tokens": float,  # of the whole training
    "recurrence": float,  # T, loops at evaluation
    "val_loss": float,  # nats per token
    "seed": int,
}


# exact, paper: as model.py counts. 6ND: six for each parameter and token, of models without loops.
ACCOUNTINGS = ("exact", "paper", "6ND")


def read_lines(path):
    """(column names, [(line number, {column: text})]) of a CSV file; names without spaces around.

    Raises UserError that names the file: it cannot be read, or has a column twice (a spreadsheet's
    join), of which csv.DictReader would take the last without a word."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            lines = [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    twice = [name for name, times in Counter(header).items() if name and times > 1]
    if twice:
        raise UserError(f"{path} has the column {', '.join(twice)} more than once")
    return header, lines


def read_csv(path):
    """The rows of a table, a list of dicts. Raises UserError that names the file and the row."""
    header, lines = read_lines(path)
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        needed = ", ".join(COLUMNS)
        raise UserError(f"{path} has no column {', '.join(missing)}; needed: {needed}")

    rows = []
    for number, line in lines:
        try:
            if None in line:  # a decimal comma, say
                raise UserError("it has more cells than the first line")
            rows.append({name: table_value(name, line[name]) for name in COLUMNS})
            check_accounting(rows[-1])
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return rows


def table_value(name, said):
    """An entry of a table from its text, None if the line is too short for it. Raises UserError."""
    kind = COLUMNS[name]
    if said is None:
        raise UserError(f"{name} is missing: the line is too short")
    if kind is str:
        if not said.strip():
            raise UserError(f"{name} is empty")
        return said.strip()
    try:
        value = float(said)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} is {said!r}, must be {what}") from None
    if kind is int:
        if not value.is_integer():
            raise UserError(f"{name} is {said!r}, must be a whole number")
        return int(value)
    none = value == 0 and name == "params_core"  # a plain transformer has no core
    if not (0 < value < math.inf or none):
        raise UserError(f"{name} is {said}, must be finite and above 0")
    return value


def check_accounting(row):
    """Raise UserError where a row's FLOPs are counted in no way that we know."""
    said = row["accounting"]
    if said not in ACCOUNTINGS:
        raise UserError(f"accounting is {said!r}, must be exact or paper, or 6ND without loops")
    if said == "6ND" and row["mu_rec"] != 1:
        raise UserError(f"accounting is '6ND' and mu_rec {row['mu_rec']:g}, must be exact or paper")


def last_line(path):
    """The last line of a log as a dict; {"kind": None, "flops": 0} where there is none.

    It reads the end of the file alone: a sweep asks often."""
    nothing = {"kind": None, "flops": 0.0}
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            line = log_line(file.read().split(b"\n")[-2])  # what no newline ends is not whole
    except (OSError, ValueError, IndexError):
        return nothing
    if isinstance(line, dict) and {"kind", "flops"} <= line.keys():
        return line
    return nothing


def model_columns(config):
    """What the columns of a row say of a model and its depths; config: "model" in config.json."""
    mu = config["mean_recurrence"] if config["n_recurrent"] else 1
    return {
        "model": "{n_prelude}/{n_recurrent}/{n_coda} x {n_embd}".format(**config),
        "mu_rec": mu,
        "mu_bwd": min(mu, config["backprop_depth"]),
    }


def run_rows(config, last):
    """The rows of a run, one for each accounting and number of loops; last: its last log line.

    FLOPs are what the run counted by its own accounting; by another they are in proportion, as at
    its mean depth."""
    settings, cost = config["settings"], config["cost"]
    own = cost[settings["accounting"]]  # the budget was counted so
    rows = []
    for accounting, its in cost.items():
        for loops, loss in last["val_loss"].items():
            row = model_columns(config["model"]) | {
                "params_core": its["params_core"],
                "params_noncore": its["params_noncore"],
                "flops": last["flops"] * its["flops_per_token"] / own["flops_per_token"],
                "accounting": accounting,
                "tokens": last["tokens"],
                "recurrence": loops,
                "val_loss": loss,
                "seed": settings["seed"],
            }
            rows.append({name: kind(row[name]) for name, kind in COLUMNS.items()})
    return rows


def rows_of_run(path):
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
        named = ", ".join(f"{T:g}" for T in loops)
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


def without_repeats(rows):
    """The rows without repetitions: a table may be given twice, or beside its own directory."""
    kept = {identity(row): row for row in rows}
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} rows are there twice and count once")
    return list(kept.values())


def read_tables(paths, accounting=None):
    """(rows of CSV files and directories of runs, the accounting to use). Raises UserError.

    The accounting is the one named, else exact, else what is there; rows are of all."""
    rows, folders = [], []
    for path in map(Path, paths):
        if path.is_dir():
            logs = sorted(path.rglob("log.jsonl"))
            folders += [log.parent for log in logs]
            runs = [rows_of_run(log.parent) for log in logs]
            if [] in runs:
                unfinished = f"{runs.count([])} of {len(runs)} runs"
                print(f"{path}: {unfinished} are not finished and left out")
            for run in runs:
                rows += run
        else:
            rows += read_csv(path)
    if not rows:
        raise UserError(f"no finished run in {', '.join(map(str, paths))}")
    say_differences(folders)
    rows = without_repeats(rows)

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
    table = Path(table).resolve()  # one lock, whichever link leads there
    table.parent.mkdir(parents=True, exist_ok=True)
    with lock(table.parent, patience=60):  # a table is written in milliseconds
        header, text, there = COLUMNS, ",".join(COLUMNS) + "\n", set()
        if table.exists():
            header, _ = read_lines(table)  # perhaps with columns that are not ours
            there = {identity(row) for row in read_csv(table)}
            text = table.read_text(encoding="utf-8-sig").rstrip("\n") + "\n"
        missing = [row for row in rows if identity(row) not in there]
        if not missing:
            return
        with whole_file(table) as file:
            file.write(text)
            writer = csv.DictWriter(file, header, lineterminator="\n")
            writer.writerows(map(as_written, missing))


def column(rows, name):
    """An array (rows,) of one column."""
    return np.array([row[name] for row in rows])


def at_trained_depth(row):
    """Whether a row is evaluated at T = mu_rec."""
    return row["recurrence"] == row["mu_rec"]


def trained_depth(rows):
    """The rows evaluated at T = mu_rec."""
    return list(filter(at_trained_depth, rows))


RunKey = namedtuple("RunKey", ["model", "mu_rec", "mu_bwd", "flops", "tokens", "seed"])


def run_key(row):
    """The RunKey of a row: rows of one run differ in the loops at evaluation alone."""
    return RunKey(*(row[name] for name in RunKey._fields))


def rows_by_budget(rows):
    """Lists of rows, by rising FLOPs: those of one budget each."""
    groups = []
    for row in sorted(rows, key=lambda row: row["flops"]):
        if not groups or not same_budget(row["flops"], groups[-1][0]["flops"]):
            groups.append([])
        groups[-1].append(row)
    return groups


def same_budget(flops, other):
    """Whether two numbers of FLOPs are of the same budget."""
    return max(flops / other, other / flops) <= SAME_BUDGET


def comparable(rows):
    """Lists of rows whose losses obey one law: those of each model; all of a table without loops,
    where sizes differ."""
    if all(row["mu_rec"] == 1 for row in rows):
        return [rows]
    models = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    return list(models.values())


def runs_in(rows):
    """How many runs there are; one run has other FLOPs by another accounting."""
    return len({run_key(row)._replace(flops=None) for row in rows})


def kept(rows, keep, notes, why):
    """The rows that keep(row) is true for; a note counts the runs that are left out, and says why:
    none leaves without a word."""
    result = [row for row in rows if keep(row)]
    left_out = runs_in(rows) - runs_in(result)
    if left_out:
        notes.append(f"{left_out} runs {why} left out")
    return result


def cells_of(rows):
    """Lists of rows that differ in their seed alone."""
    cells = {}
    for i, group in enumerate(rows_by_budget(rows)):
        for row in group:
            settings = (row[name] for name in ("model", "params_core", "params_noncore", "mu_rec",
                                               "mu_bwd", "recurrence"))
            cells.setdefault((i, *settings), []).append(row)
    return list(cells.values())


def seed_effects(cells):
    """({seed: effect}, squares, degrees of freedom): by how much a seed's log losses differ from
    the mean of all seeds, in every cell alike, and how much of the squares that explains.

    A seed is a block: it gives all runs the same order of the text, and some of the same initial
    weights. Effects are the least squares of log loss = cell + seed, so only seeds that share two
    cells with another have one, and the difference between cells plays no part.

    cells: [{seed: log loss}]."""
    shared = Counter(pair for cell in cells for pair in itertools.combinations(sorted(cell), 2))
    known = sorted({seed for pair, times in shared.items() if times > 1 for seed in pair})
    if not known:
        return {}, 0.0, 0
    design, losses = np.empty((0, len(known))), np.empty(0)
    for cell in cells:
        mine = [seed for seed in known if seed in cell]
        if len(mine) > 1:
            here = np.array([[seed == other for other in known] for seed in mine], dtype=float)
            loss = np.array([cell[seed] for seed in mine])
            design = np.vstack([design, here - here.mean(0)])
            losses = np.append(losses, loss - loss.mean())
    effects = np.linalg.pinv(design) @ losses  # of all that fit alike, those whose sum is 0
    squares = ((design @ effects) ** 2).sum()
    return dict(zip(known, effects.tolist())), squares, int(np.linalg.matrix_rank(design))


def without_seed_effects(rows):
    """The rows, at every T, with the effects of seeds taken out of their losses: those at T =
    mu_rec, for each model. They are taken as known then: to find them anew in each resample moves
    no interval of our exponents by more than 0.02."""
    result = []
    for group in comparable(rows):
        cells = [{row["seed"]: math.log(row["val_loss"]) for row in cell}
                 for cell in cells_of(trained_depth(group))]
        effects = seed_effects(cells)[0]
        result += [row | {"val_loss": row["val_loss"] * math.exp(-effects.get(row["seed"], 0))}
                   for row in group]
    return result


def distinct_budgets(budgets):
    """Budgets without repetitions, rising. Raises UserError where two would count as one."""
    budgets = sorted({*budgets})
    apart = SAME_BUDGET ** 2  # a run overshoots, and the lower budget has its own margin
    for low, high in itertools.pairwise(budgets):
        if high <= apart * low:
            raise UserError(f"--budgets {low:g} and {high:g} are less than {apart - 1:.0%} apart: "
                            "they would count as one")
    return budgets


def distinct(rows, name):
    """How many different values a column has."""
    return len({row[name] for row in rows})


def sizes(rows):
    """How many sizes of model there are."""
    return len({(row["params_core"], row["params_noncore"]) for row in rows})

