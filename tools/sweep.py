"""Train a grid of budgets and mean recurrences at equal FLOPs, and collect their losses in a table.

    python -m tools.sweep --budgets 1e12 2e12 --recurrences 1 2 4 8 --jobs 2 --n-embd 32
    python -m tools.sweep ... --table results/x.csv  share a table with other sweeps or machines
    python -m tools.sweep ... --print                print the commands, for a cluster's scheduler

All other flags go to train.py. The same command resumes a sweep that was stopped. It skips a run
that is finished or has a row in the table. A row belongs to a run if model (only layers, width,
injection and parameters are compared), accounting, budget (within 3%), recurrence, mu_bwd and seed
agree, so sweeps that differ in anything else need separate tables. When the commands from --print
have run, the command without --print adds their rows to the table.
"""

import contextlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from parts import tables
from parts.cli import COUNT, LOOPS, SEED, Parser, number, progress_bar, run_script, some_path
from parts.comparable import texts_differ
from parts.errors import UserError
from parts.files import lock
from parts.reading import read_json
from parts.settings import parse_args
from train import caught_signals, setup

TRAIN = Path(__file__).parent.parent / "train.py"
# all runs of a recurrence share one plan (see Cell), from which they may differ in these settings
MAY_DIFFER = ("out", "max_flops", "seed", "device", "eval_recurrence")
OWN_FLAGS = ("--max-flops", "--max-tokens", "--max-steps", "--mean-recurrence", "--seed",
             "--resume", "--overwrite", "--dry-run")

# ------------------------------------------------------------------------------- cells


def dry_run(flags):
    """Return what train.py with these flags would write to config.json. Raises UserError."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the commands of --print
            record = setup(parse_args("", [*flags, "--dry-run"])).record
    except UserError as error:
        raise UserError(f"train.py says: {error}") from None
    return json.loads(json.dumps(record))  # as if read from the file


class Cell:
    """A run of a sweep: a budget, a mean recurrence and a seed. plan: what dry_run returns."""

    def __init__(self, folder, flops, mu, seed, flags, plan):
        self.path = folder / f"C{flops:.3g}-mu{mu}-seed{seed}"
        self.flops, self.seed, self.plan = flops, seed, plan
        self.flags = ["--out", str(self.path), "--max-flops", repr(flops),
                      "--mean-recurrence", str(mu), "--seed", str(seed), *flags]

    def words(self):
        """Return the arguments with which train.py begins or resumes the run."""
        return self.flags + ["--resume"] * (self.path / "ckpt.pt").exists()

    def is_done(self):
        return tables.last_line(self.path)["kind"] == "done"

    def has_row(self, rows):
        """Return whether a table has a row of this run. FLOPs need not equal the budget exactly,
        since the last step overshoots it."""
        accounting = self.plan["settings"]["accounting"]
        cost = self.plan["cost"][accounting]
        own = tables.model_columns(self.plan["model"]) | {
            "accounting": accounting, "seed": self.seed,
            "params_core": cost["params_core"], "params_noncore": cost["params_noncore"]}
        return any(own.items() <= row.items() and tables.same_budget(row["flops"], self.flops)
                   for row in rows)

    def check_directory(self):
        """Raise UserError if the directory holds a run with other settings, or one in training."""
        if self.path.exists():
            with lock(self.path):  # an error while another process trains there
                pass
        file = self.path / "config.json"
        before = {"settings": {}, "model": {}} | read_json(file) if file.exists() else self.plan
        other = [name for part in ("settings", "model") for name, value in self.plan[part].items()
                 if name not in MAY_DIFFER and before[part].get(name) != value]
        if texts_differ(before.get("text"), self.plan["text"]):
            other.append("text")
        if other:
            raise UserError(f"{self.path} was run with other settings ({', '.join(other)}): "
                            "choose another --out or remove this directory")


def make_cells(args, flags):
    """Return the cells of the grid, ordered by budget, recurrence and seed. Raises UserError if
    train.py would refuse their settings."""
    for flag in flags:
        if flag.split("=")[0] in OWN_FLAGS:
            raise UserError(f"{flag} is not for a sweep: choose its runs with --budgets, "
                            "--recurrences, --seeds and --out")
    budgets, folder = tables.distinct_budgets(args.budgets), Path(args.out)
    recurrences, seeds = sorted({*args.recurrences}), sorted({*args.seeds})
    loops = sorted({*args.eval_recurrence, *recurrences})
    flags = [*flags, "--eval-recurrence", *map(str, loops)]
    plans = {mu: dry_run(Cell(folder, 1.0, mu, 0, flags, None).flags)
             for mu in progress_bar(recurrences, desc="planning")}
    device = plans[recurrences[0]]["settings"]["device"]
    if ":" in device and torch.cuda.device_count() > 1:
        raise UserError(f"--device is {device}: a sweep spreads its runs over all GPUs that it "
                        "sees; choose some of them with CUDA_VISIBLE_DEVICES")
    return [Cell(folder, flops, mu, seed, flags, plans[mu])
            for flops, mu, seed in itertools.product(budgets, recurrences, seeds)]

# ------------------------------------------------------------------------------- running


def share(slot, jobs):
    """Return environment variables for the runs in one of `jobs` slots: their share of this
    process's cores and GPUs. If the user set OMP_NUM_THREADS, each run gets that many threads."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, cores // jobs)
    environment = {"OMP_NUM_THREADS": str(threads)}
    count = torch.cuda.device_count()
    if count > 1:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")  # numbers or names, in torch's order
        names = given.split(",")[:count] if given else range(count)
        environment["CUDA_VISIBLE_DEVICES"] = str(names[slot % len(names)]).strip()
    return environment


def begin(cell, environment):
    """Return the process that trains a cell. Its output goes to output.txt in its directory."""
    cell.path.mkdir(parents=True, exist_ok=True)
    with open(cell.path / "output.txt", "w") as file:
        return subprocess.Popen([sys.executable, TRAIN, *cell.words()], stdout=file,
                                stderr=subprocess.STDOUT, env=os.environ | environment)


def collect(cell, table):
    """Add the rows of a run that has ended to the table. Return None, or why it has no rows."""
    if not cell.is_done():
        said = (cell.path / "output.txt").read_text(errors="replace").strip().splitlines()
        return said[-1] if said else "it printed nothing"
    try:
        tables.add_rows(table, tables.rows_of_run(cell.path))
    except (UserError, OSError) as error:
        return str(error)
    return None


def spent(cells):
    """Return the FLOPs that the runs have used so far, each at most its budget."""
    return sum(min(tables.last_line(cell.path)["flops"], cell.flops) for cell in cells)


def run_cells(cells, jobs, table):
    """Train cells, `jobs` at a time, largest budget first. Where there are several GPUs, each run
    gets one. Return ([(cell, why)] for failed cells, whether a signal stopped the sweep)."""
    waiting = sorted(cells, key=lambda cell: -cell.flops)
    running, failed = {}, []  # {slot: (cell, process)}; [(cell, why)]
    told = False  # tell the runs only once to save and stop: a second signal might end the saving
    bar = progress_bar(total=sum(cell.flops for cell in cells), initial=spent(cells), unit="FLOP",
                       unit_scale=True, desc="sweep", leave=True)
    with caught_signals() as received, bar:
        environments = [share(slot, jobs) for slot in range(jobs)]
        while running or waiting and not received:
            for slot, environment in enumerate(environments):
                if slot not in running and waiting and not received:
                    cell = waiting.pop(0)
                    try:
                        running[slot] = cell, begin(cell, environment)
                    except OSError as error:  # train the other cells
                        failed.append((cell, str(error)))
            time.sleep(0.2)
            if received and not told:
                told = True
                for _, process in running.values():
                    process.terminate()
            for slot, (cell, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    failure = collect(cell, table)
                    if failure and not told:
                        failed.append((cell, failure))
            bar.n = spent(cells)
            bar.set_postfix_str(f"{len(waiting)} cells wait, {len(failed)} failed")
    return failed, bool(received)


def sweep(args, flags):
    """Train the cells that are not finished. Print the plan first and the failures last."""
    table = Path(args.table or Path(args.out) / "table.csv")
    cells = make_cells(args, flags)
    for cell in cells:
        cell.check_directory()
    rows = tables.read_csv(table) if table.exists() else []
    new = [cell for cell in cells if not cell.has_row(rows)]
    todo = [cell for cell in new if not cell.is_done()]
    flops = sum(cell.flops for cell in todo)
    speed = 0.3 * cells[0].plan["peak_flops"]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished, {flops:.3g} FLOPs to "
          f"spend, about {flops / speed / 3600:.1f} hours one by one, at 30% of the matmul peak",
          file=sys.stderr if args.print else None)
    if args.print:
        for cell in todo:
            print(shlex.join(["python", "train.py", *cell.words()]))
        return
    # finished runs from the commands of --print, or from a sweep killed before it wrote the rows
    tables.add_rows(table, [row for cell in new for row in tables.rows_of_run(cell.path)])
    failed, stopped = run_cells(todo, args.jobs, table)
    if table.exists():
        print(f"wrote {table}; fit it with: python scaling.py fit {table}")
    for cell, failure in failed:
        print(f"failed: {cell.path}: {failure}", file=sys.stderr)
    if stopped:
        print("stopped; the same command resumes the sweep")
    if stopped or failed:
        sys.exit(130 if stopped else 1)


def sweep_args():
    """Return (the sweep's settings, the flags for train.py)."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--budgets", type=number(float, 1), nargs="+", required=True, metavar="C", help="in FLOPs")
    add("--recurrences", type=LOOPS, nargs="+", required=True, metavar="MU",
        help="mean recurrences; mu_bwd is ceil(mu / 2) unless --backprop-depth is given")
    add("--seeds", type=SEED, nargs="+", default=[0], metavar="N", help="(default: 0)")
    add("--eval-recurrence", type=LOOPS, nargs="+", default=[1, 2, 4, 8, 16], metavar="T",
        help="evaluate each run at these loops and at --recurrences (default: 1 2 4 8 16)")
    add("--jobs", type=COUNT, default=1, metavar="N",
        help="runs at the same time, which share the cores and GPUs that this process may use; "
        "OMP_NUM_THREADS, if set, holds for each of them (default: 1)")
    add("--out", type=some_path, default="out/sweep", metavar="DIR",
        help="directory for the runs (default: %(default)s)")
    add("--table", type=some_path, metavar="FILE",
        help="CSV file to add the rows to (default: table.csv in --out)")
    add("--print", action="store_true",
        help="print a line with the command of each unfinished run, and stop; still makes the "
        "default text where it is missing")
    return parser.parse_known_args()


if __name__ == "__main__":
    run_script(lambda: sweep(*sweep_args()))
