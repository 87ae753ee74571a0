"""What the experiments share: runs with names that say what they are, tables, pairs of seeds."""

import csv
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from parts import figures
from parts.cli import Parser, UserError, progress_bar
from parts.comparable import say_differences
from parts.tables import last_line, write_csv

# ------------------------------------------------------------------------------- runs and tables


def split_name(path, form, names):
    """Return what the name of a run says, a list: one of names, then a number for each further
    word of form. Raises UserError.

    >>> split_name(Path("over-n-8e-3-0"), "RULE-RATE-SEED", ["add", "over-n"])
    ['over-n', 0.008, 0]
    """
    what, *words = form.split("-")
    rate, count = r"-(\d+(?:\.\d+)?(?:e-?\d+)?)", r"-(\d+)"
    numbers = "".join(rate if word == "RATE" else count for word in words)
    found = re.fullmatch(f"({'|'.join(names)}){numbers}", path.name)
    if not found:
        raise UserError(f"{path} is not named {form}, with a {what} of {', '.join(names)}")
    name, *values = found.groups()
    return [name, *(float(v) if word == "RATE" else int(v) for word, v in zip(words, values))]


def finished(path):
    """Return the last line of a run's log. If the run is not finished, or a loss is not finite,
    print this and return None."""
    done = last_line(path)
    if done["kind"] != "done":
        print(f"{path} is not finished and is left out")
    elif not all(map(math.isfinite, done["val_loss"].values())):
        print(f"{path} has a loss that is not finite and is left out")
    else:
        return done
    return None


def loss_at(path, done, T):
    """Return a finished run's val loss at T loops. Raises UserError if it was not measured."""
    if str(T) not in done["val_loss"]:
        raise UserError(f"{path} was not evaluated at {T} loops")
    return round(done["val_loss"][str(T)], 5)


def finished_rows(folder, row_of):
    """Return the rows that row_of makes of the finished runs in a directory; print a warning if
    runs are hard to compare. Raises UserError if no run is finished."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    rows = [row for row in map(row_of, progress_bar(paths, unit="run")) if row]
    if not rows:
        raise UserError(f"{folder} holds no finished run")
    say_differences(paths)
    return rows


def read_table(path, columns):
    """Return the rows of a CSV file, dicts. columns: {name: type}. Raises UserError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
        rows = [{name: kind(line[name]) for name, kind in columns.items()} for line in lines]
    except (KeyError, TypeError, ValueError):
        needed = ", ".join(columns)
        raise UserError(f"{path} is not this experiment's table, with columns {needed}") from None
    if not rows:
        raise UserError(f"{path} holds no run")
    return rows


def collect(source, table, row_of, columns):
    """Return the rows of an experiment: from such a table; or from a directory of runs, by
    row_of(path), and write the table. Raises UserError if there are none."""
    if not source.is_dir():
        return read_table(source, columns)
    rows = finished_rows(source, row_of)
    write_csv(table, rows, columns)
    return rows


def parse_args(about):
    """Return the arguments (source, out) of an experiment that makes a table and a picture. Raises
    UserError if matplotlib is missing, before any work is done."""
    parser = Parser(description=about)
    add = parser.add_argument
    add("source", type=Path, metavar="DIR|CSV", help="a directory of runs, or a table made before")
    add("out", type=Path, metavar="OUT", help="directory for the table and the picture")
    args = parser.parse_args()
    figures.pyplot()
    return args

# ------------------------------------------------------------------------------- rates and seeds


def counted(by_seed):
    """Return the values of {seed: value}, by seed. With three other seeds, seed 0, which chose the
    rate, does not count."""
    return [by_seed[seed] for seed in sorted(by_seed) if seed or len(by_seed) < 4]


def at_one_rate(label, rows, loss="val_loss"):
    """Return a model's rows at one learning rate, by seed: at the one that has most seeds; of
    several such, at the best for seed 0. Print seed 0's loss, the column `loss`, at all rates. Seed
    0 chose the rate, so with three other seeds it does not count."""
    runs = defaultdict(dict)
    for row in rows:
        runs[row["rate"]][row["seed"]] = row
    tried = {rate: seeds[0][loss] for rate, seeds in sorted(runs.items()) if 0 in seeds}
    if tried:
        print(f"{label}: seed 0 by rate " + ", ".join(f"{r:g}: {x:.4f}" for r, x in tried.items()))
    rate = max(runs, key=lambda rate: (len(runs[rate]), -tried.get(rate, math.inf)))
    return counted(runs[rate])


def each_at_one_rate(labels, rows, column="model", loss="val_loss"):
    """Return {name: its rows, see at_one_rate} for the names in a column of rows. labels: {name:
    what is printed}, in the order of the result."""
    found = {name: [row for row in rows if row[column] == name] for name in labels}
    return {name: at_one_rate(labels[name], mine, loss) for name, mine in found.items() if mine}


def losses_of(rows, loss="val_loss"):
    """Return {seed: loss} of a model's rows, from the column `loss`."""
    return {row["seed"]: row[loss] for row in rows}


def differences(losses, base):
    """Return losses - base, (seeds,), for the seeds that both have.

    losses, base: {seed: loss} of two models."""
    seeds = sorted(losses.keys() & base.keys())
    return np.array([losses[seed] - base[seed] for seed in seeds])


def error_text(values):
    """Return, as text, the standard error of the mean of values; "-" for a single value."""
    return f"{np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else "-"


def gain_text(gained):
    """Return, as text, the mean of differences (seeds,), its standard error, and each of them."""
    return (f"{gained.mean():+.4f} nats (standard error {error_text(gained)}; "
            f"{', '.join(f'{one:+.4f}' for one in gained)})")
