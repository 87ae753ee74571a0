"""Tables of training runs: columns, reading from CSV files and run directories, adding rows.

A row is one run evaluated with one number of loops, its recurrence (T); mu_rec (mu) is the mean in
training. A model without loops has params_core 0, and 1 for mu_rec, mu_bwd and recurrence.
"""

import csv
import itertools
import math
from pathlib import Path

import numpy as np

from parts.cli import UserError
from parts.comparable import say_differences
from parts.files import lock, whole_file
from parts.reading import log_line, read_json

SAME_BUDGET = 1.03  # runs overshoot their budget by part of a step

COLUMNS = {
    "model": str,  # prelude/recurrent/coda x channels, then its rule or class if another
    "params_core": float,  # parameters that multiply each token once per loop, by `accounting`
    "params_noncore": float,  # parameters that multiply each token once
    "flops": float,  # of the whole training
    # exact, paper: see model.py. 6ND: six FLOPs per parameter and token, for models without loops
    "accounting": str,
    "mu_rec": float,  # mean recurrence in training
    "mu_bwd": float,  # loops with a gradient
    "tokens": float,  # of the whole training
    "recurrence": float,  # T, loops at evaluation
    "val_loss": float,  # nats per token
    "seed": int,
}

# ----------------------------------------------------------------------------- CSV files


def read_csv(path):
    """Return the rows of a table, a list of dicts. Raise UserError with the file and line of a
    mistake, also for a repeated column: csv.DictReader would silently take the last."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            lines = [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        raise UserError(f"{path} has the column {', '.join(twice)} more than once")
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; needed: {', '.join(COLUMNS)}")
    rows = []
    for number, line in lines:
        try:
            rows.append(row_of(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return rows


def row_of(line):
    """Return a row of a table from its {column: text}. Raise ValueError for a bad cell."""
    if None in line:  # e.g. after a decimal comma
        raise ValueError("it has more cells than the header")
    row = {name: value_of(name, line[name]) for name in COLUMNS}
    if row["accounting"] not in ("exact", "paper", "6ND"):
        raise ValueError(f"accounting is {row['accounting']!r}, must be exact, paper, or 6ND "
                         "for models without loops")
    if row["accounting"] == "6ND" and row["mu_rec"] != 1:
        raise ValueError(f"accounting is '6ND' and mu_rec {row['mu_rec']:g}: with loops it must be "
                         "exact or paper")
    return row


def value_of(name, text):
    """Return a cell's value. text: None if the cell is missing. Raise ValueError if it is bad."""
    kind = COLUMNS[name]
    if text is None or not text.strip():
        why = "missing: the line is too short" if text is None else "empty"
        raise ValueError(f"{name} is {why}")
    if kind is str:
        return text.strip()
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, must be a number") from None
    if kind is int and not value.is_integer():
        raise ValueError(f"{name} is {text!r}, must be a whole number")
    none = value == 0 and name == "params_core"  # a plain transformer has no core
    if kind is float and not (0 < value < math.inf or none):
        raise ValueError(f"{name} is {text}, must be finite and above 0")
    return kind(value)


def as_written(row):
    """Return a row as write_csv writes it, with 6 digits of losses and 10 of other floats."""
    return {name: f"{value:.{6 if name == 'val_loss' else 10}g}" if isinstance(value, float)
            else value for name, value in row.items()}


def identity(row):
    """Return a tuple that identifies a row, the same before and after writing to a table."""
    return tuple(as_written(typed(row)).values())


def typed(row):
    """Return a row, columns in order, from a dict that has them and perhaps other keys."""
    return {name: kind(row[name]) for name, kind in COLUMNS.items()}


def write_csv(path, rows, columns=COLUMNS):
    """Write a table, of runs or with other columns; the file appears whole or not at all."""
    with whole_file(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(as_written, rows))


def add_rows(table, rows):
    """Append the rows that a table lacks. All others stay, also what other processes add."""
    table = Path(table).resolve()  # all links to a table share one lock
    table.parent.mkdir(parents=True, exist_ok=True)
    with lock(table.parent, patience=60):  # a table is written in milliseconds
        text, there = ",".join(COLUMNS), set()
        if table.exists():
            there = set(map(identity, read_csv(table)))
            text = table.read_text(encoding="utf-8-sig").rstrip("\n")
        missing = [as_written(row) for row in rows if identity(row) not in there]
        if missing:
            # the table may have additional columns
            names = [name.strip() for name in next(csv.reader(text.splitlines()))]
            with whole_file(table) as file:
                file.write(text + "\n")
                csv.DictWriter(file, names, lineterminator="\n").writerows(missing)

# ----------------------------------------------------------------------------- run directories


def last_line(run):
    """Return a log's last complete line, a dict; {"kind": None, "flops": 0} if there is none."""
    path = run / "log.jsonl"
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))  # only the end: a sweep calls this often
            line = log_line(file.read().split(b"\n")[-2])  # a complete line ends in a newline
        if {"kind", "flops"} <= line.keys():
            return line
    except (OSError, ValueError, IndexError):
        pass
    return {"kind": None, "flops": 0.0}


def model_columns(config):
    """Return a row's columns model, mu_rec and mu_bwd. config: "model" in config.json."""
    mu = config["mean_recurrence"] if config["n_recurrent"] else 1
    name = "{n_prelude}/{n_recurrent}/{n_coda} x {n_embd}".format(**config)
    if config["n_recurrent"] and config.get("injection", "diagonal") != "diagonal":
        name += f" {config['injection']}"  # another injection rule makes another model
    return {"model": name, "mu_rec": mu, "mu_bwd": min(mu, config["backprop_depth"])}


def rows_of_run(path):
    """Return the rows of a run of train.py, one per accounting and loop count, or [] if it is not
    finished. Raise UserError if a file is bad. FLOPs by an accounting that is not the run's own are
    scaled by the FLOPs per token at its mean depth."""
    last = last_line(path)
    if last["kind"] != "done":
        return []
    config, rows = read_json(path / "config.json"), []
    try:
        columns = model_columns(config["model"])
        if config.get("class", "Parcae") != "Parcae":  # a rule of runs/arena.py
            columns["model"] += f" {config['class']}"
        settings, cost = config["settings"], config["cost"]
        own = cost[settings["accounting"]]["flops_per_token"]
        if settings.get("loop_from"):  # then FLOPs of the two accountings are not in proportion
            cost = {settings["accounting"]: cost[settings["accounting"]]}
        for accounting, its in cost.items():
            for loops, loss in last["val_loss"].items():
                rows.append(typed(columns | its | {
                    "flops": last["flops"] * its["flops_per_token"] / own, "accounting": accounting,
                    "tokens": last["tokens"], "recurrence": loops, "val_loss": loss,
                    "seed": settings["seed"]}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__} {error}"
        raise UserError(f"{path} is not the directory of a run: {what}") from None
    lost = sorted({row["recurrence"] for row in rows if not math.isfinite(row["val_loss"])})
    if lost:
        print(f"{path}: the val loss at T = {', '.join(f'{T:g}' for T in lost)} is not finite and "
              "left out")
    return [row for row in rows if row["recurrence"] not in lost]


def read_tables(paths, accounting=None):
    """Return (the rows of CSV files and run directories, each once, of all accountings; the name of
    one: the given, else exact, else another that is there). Raise UserError for bad files."""
    rows, folders = [], []
    for path in map(Path, paths):
        if path.is_dir():
            found = [log.parent for log in sorted(path.rglob("log.jsonl"))]
            runs = [rows_of_run(folder) for folder in found]
            if [] in runs:
                print(f"{path}: {runs.count([])} of {len(runs)} runs are not finished and left out")
            folders += [folder for folder, its_rows in zip(found, runs) if its_rows]
        else:
            runs = [read_csv(path)]
        rows += itertools.chain(*runs)
    if not rows:
        raise UserError(f"no finished run in {', '.join(map(str, paths)) or 'results/sweep*.csv'}")
    say_differences(folders)
    once = list({identity(row): row for row in rows}.values())
    if len(once) < len(rows):
        print(f"{len(rows) - len(once)} rows are repetitions of others and count once")

    there = sorted({row["accounting"] for row in once})
    if accounting and accounting not in there:
        raise UserError(f"--accounting is {accounting}, but these tables have {', '.join(there)}")
    return once, accounting or ("exact" if "exact" in there else there[0])

# ----------------------------------------------------------------------------- rows


def column(rows, name):
    """Return one column as an array (rows,)."""
    return np.array([row[name] for row in rows])


def unrolled(rows):
    """Return the parameters of each run's unrolled model, (rows,)."""
    return column(rows, "params_noncore") + column(rows, "mu_rec") * column(rows, "params_core")


def alike(rows, *names):
    """Return the rows in groups (lists) that have equal values in these columns."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def distinct(rows, *names):
    """Return how many different values, or combinations of values, these columns have."""
    return len(alike(rows, *names))


def trained_depth(rows):
    """Return the rows evaluated at T = mu_rec."""
    return [row for row in rows if row["recurrence"] == row["mu_rec"]]


def run_key(row):
    """Return a tuple that all rows of one run share: they differ only in T and the loss."""
    return tuple(row[name] for name in ("flops", "model", "mu_rec", "mu_bwd", "tokens", "seed"))


def runs_in(rows):
    """Return how many runs there are. Rows of one run have different FLOPs by accounting."""
    return len({run_key(row)[1:] for row in rows})


def kept(rows, keep, notes, why):
    """Return the rows for which keep(row) is true. Add a note: how many runs are left out, why."""
    result = [row for row in rows if keep(row)]
    left_out = runs_in(rows) - runs_in(result)
    if left_out:
        notes.append(f"{left_out} runs {why} left out")
    return result


def same_budget(flops, other):
    """Return whether two FLOP counts belong to the same budget."""
    return max(flops / other, other / flops) <= SAME_BUDGET


def rows_by_budget(rows):
    """Return the rows in groups (lists) of one budget each, by rising FLOPs."""
    groups = []
    for row in sorted(rows, key=lambda row: row["flops"]):
        if not groups or not same_budget(row["flops"], groups[-1][0]["flops"]):
            groups.append([])
        groups[-1].append(row)
    return groups


def distinct_budgets(budgets):
    """Return sorted budgets without repetitions. Raise UserError if two would count as one."""
    budgets = sorted({*budgets})
    apart = SAME_BUDGET ** 2  # a run may overshoot by 3%, and 3% apart counts as one
    for low, high in itertools.pairwise(budgets):
        if high <= apart * low:
            raise UserError(f"--budgets {low:g} and {high:g} are less than {apart - 1:.0%} apart "
                            "and would count as one")
    return budgets


def comparable(rows):
    """Return the rows in groups (lists) whose losses follow one law: one group per model, or one
    for a table without loops, where models differ in size."""
    unlooped = all(row["mu_rec"] == 1 for row in rows)
    return [rows] if unlooped else alike(rows, "model")


class Budget:
    """The runs at one budget: the mean log loss of each recurrence, and its number of seeds.

    cells: {mu_rec: {seed: log loss}}; arrays: (recurrences,). Of runs of equal recurrence and seed,
    the one with most tokens counts (a token costs least), and of several such the highest loss."""

    def __init__(self, rows):
        self.flops = math.exp(np.mean(np.log(column(rows, "flops"))))
        self.cells, tokens = {}, {}
        # sorted so that the run that counts comes last
        for row in sorted(rows, key=lambda row: (row["mu_rec"], row["tokens"], row["val_loss"])):
            self.cells.setdefault(row["mu_rec"], {})[row["seed"]] = math.log(row["val_loss"])
            tokens[row["mu_rec"]] = row["tokens"]
        self.mu, self.tokens = np.array(list(tokens.items())).T
        self.log_mu = np.log(self.mu)
        cells = [list(cell.values()) for cell in self.cells.values()]
        self.seeds = np.array([len(cell) for cell in cells])
        self.log_loss = np.array([np.mean(cell) for cell in cells])
        self.left_out = len(rows) - self.seeds.sum()


def budgets_of(rows):
    """Return [Budget] by rising FLOPs. rows: those at T = mu_rec, of one accounting."""
    return [Budget(group) for group in rows_by_budget(rows)]
