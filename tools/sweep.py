"""Train a grid of budgets and mean recurrences at equal FLOPs, and collect their losses in a table.

    python -m tools.sweep --budgets 1e12 2e12 --recurrences 1 2 4 8 --jobs 2 --n-embd 32
    python -m tools.sweep ... --dry-run              print the plan: tokens, steps and hours
    python -m tools.sweep ... --table results/x.csv  a table that several sweeps or machines share
    python -m tools.sweep ... --print                print the commands, for a cluster's scheduler

Flags that are not the sweep's go to train.py. The same command resumes a sweep that was stopped:
it does not repeat a run that is finished, or that has a row in the table with its model,
accounting, budget (within 3%), recurrence, mu_bwd and seed. The table knows a model by its layers,
width and parameters alone: sweeps that differ in anything else need tables of their own. After the
commands of --print have run, the command without --print adds their rows to the table.
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

from parts.cli import COUNT, LOOPS, SEED, Parser, number, progress_bar, run_script, some_path
from parts.comparable import texts_differ
from parts.errors import UserError
from parts.files import lock
from parts.reading import read_json
from parts.settings import parse_args
from parts.tables import (
    SAME_BUDGET,
    add_rows,
    distinct_budgets,
    last_line,
    model_columns,
    read_csv,
    rows_of_run,
    same_budget,
)
from train import caught_signals, setup

TRAIN = Path(__file__).parent.parent / "train.py"
# one plan serves all budgets and seeds of a recurrence, so a run may differ from it in these
MAY_DIFFER = ("out", "max_flops", "seed", "device", "eval_recurrence")
OWN_FLAGS = ("--max-flops", "--max-tokens", "--max-steps", "--mean-recurrence", "--seed",
             "--resume", "--overwrite")

# ------------------------------------------------------------------------------- cells


def dry_run(flags):
    """Return what config.json of a run with these flags would hold. Raises UserError."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the commands of --print
            record = setup(parse_args("", [*flags, "--dry-run"])).record
    except UserError as error:
        raise UserError(f"train.py says: {error}") from None
    return json.loads(json.dumps(record))  # as it comes back from the file


class Cell:
    """One run of a sweep: a budget, a mean recurrence, a seed. plan: what dry_run returns for it"""

    def __init__(self, folder, flops, mu, seed, flags, plan):
        self.path = folder / f"C{flops:.3g}-mu{mu}-seed{seed}"
        self.flops, self.mu, self.seed, self.plan = flops, mu, seed, plan
        self.flags = ["--out", str(self.path), "--max-flops", repr(flops),
                      "--mean-recurrence", str(mu), "--seed", str(seed), *flags]

    def words(self):
        """Return the arguments for train.py, which begins the run or resumes it."""
        return self.flags + ["--resume"] * (self.path / "ckpt.pt").exists()

    def last_line(self):
        """Return the last line of its log: {"kind": "train", "eval" or "done", "flops", ...}."""
        return last_line(self.path / "log.jsonl")

    def is_done(self):
        return self.last_line()["kind"] == "done"

    def has_row(self, rows):
        """Return whether a table has a row of this run. Its FLOPs are near the budget, not equal:
        the last step overshoots."""
        accounting = self.plan["settings"]["accounting"]
        cost = self.plan["cost"][accounting]
        own = model_columns(self.plan["model"]) | {
            "accounting": accounting, "seed": self.seed,
            "params_core": cost["params_core"], "params_noncore": cost["params_noncore"]}
        return any(own.items() <= row.items() and same_budget(row["flops"], self.flops)
                   for row in rows)

    def check_directory(self):
        """Raise UserError if its directory holds a run with other settings, or one in training."""
        if self.path.exists():
            with lock(self.path):  # refused while another process trains there
                pass
        if not (self.path / "config.json").exists():
            return
        before = {"settings": {}, "model": {}} | read_json(self.path / "config.json")
        other = [name for part in ("settings", "model") for name, value in self.plan[part].items()
                 if name not in MAY_DIFFER and before[part].get(name) != value]
        if texts_differ(before.get("text"), self.plan["text"]):
            other.append("text")
        if other:
            raise UserError(f"{self.path} was run with other settings ({', '.join(other)}): "
                            "choose another --out or remove it")


def make_cells(args, flags):
    """Return the cells of the grid, by budget, recurrence and seed. Raises UserError where train.py
    would refuse their settings."""
    for flag in flags:
        if flag.split("=")[0] in OWN_FLAGS:
            raise UserError(f"{flag} is not for a sweep, which sets --out, --budgets, "
                            "--recurrences and --seeds of its runs")
    budgets, folder = distinct_budgets(args.budgets), Path(args.out)
    recurrences, seeds = sorted({*args.recurrences}), sorted({*args.seeds})
    loops = sorted({*args.eval_recurrence, *recurrences})
    flags = [*flags, "--eval-recurrence", *map(str, loops)]
    plans = {}
    for mu in progress_bar(recurrences, desc="planning"):
        plans[mu] = dry_run(Cell(folder, 1.0, mu, 0, flags, None).flags)
    device = plans[recurrences[0]]["settings"]["device"]
    if ":" in device and torch.cuda.device_count() > 1:
        raise UserError(f"--device is {device}: a sweep deals its runs to all GPUs that it sees; "
                        "choose some of them with CUDA_VISIBLE_DEVICES")
    return [Cell(folder, flops, mu, seed, flags, plans[mu])
            for flops, mu, seed in itertools.product(budgets, recurrences, seeds)]

# ------------------------------------------------------------------------------- the plan


def hours(cells, todo, jobs):
    """Return about how many hours the cells to do take: as fast as the runs so far, or, where there
    are none, at 30% of the matmul peak."""
    lines = [cell.last_line() for cell in cells]
    speeds = [line["flops"] / line["seconds"] for line in lines if line.get("seconds")]
    speed = 0.3 * cells[0].plan["peak_flops"] * min(jobs, max(1, torch.cuda.device_count()))
    if speeds:
        speed = jobs * sum(speeds) / len(speeds)
    return sum(cell.flops for cell in todo) / speed / 3600


def print_plan(cells, todo, jobs):
    """Print what each cell trains on and how long all may take."""
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished, "
          f"{sum(cell.flops for cell in todo):.3g} FLOPs to spend\n\n"
          "    FLOPs   mu_rec   mu_bwd   seed   FLOPs a token       tokens     steps")
    all_steps = []
    for cell in cells:
        settings, model = cell.plan["settings"], cell.plan["model"]
        per_token = cell.plan["cost"][settings["accounting"]]["flops_per_token"]
        tokens = cell.flops / per_token
        steps = tokens / settings["batch_size"] / model["block_size"]
        all_steps.append(steps)
        print(f"{cell.flops:9.3g}   {cell.mu:6d}   {min(cell.mu, model['backprop_depth']):6d}   "
              f"{cell.seed:4d}   {per_token:13,.0f}   {tokens:10,.0f}   {steps:7,.0f}"
              f"{'' if cell in todo else '   done'}")
    if min(all_steps) < 1 / (SAME_BUDGET - 1):
        print(f"{min(all_steps):,.0f} steps are few: a run may overshoot its budget by more than "
              f"{SAME_BUDGET - 1:.0%}, and count as one of another budget")
    print(f"about {hours(cells, todo, jobs):.1f} hours with {jobs} jobs")

# ------------------------------------------------------------------------------- running


def share(slot, jobs):
    """Return the environment of the runs in one of `jobs` slots: their share of the threads and
    GPUs that this process was given. Threads that the user gave are those of each run."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, cores // jobs)
    environment = {"OMP_NUM_THREADS": str(threads)}
    count = torch.cuda.device_count()
    if count > 1:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")  # numbers or names, in our numbers' order
        names = given.split(",")[:count] if given else range(count)
        environment["CUDA_VISIBLE_DEVICES"] = str(names[slot % len(names)]).strip()
    return environment


def begin(cell, environment):
    """Return the process that trains a cell; what it prints goes to output.txt in its directory."""
    cell.path.mkdir(parents=True, exist_ok=True)
    with open(cell.path / "output.txt", "w") as file:
        return subprocess.Popen([sys.executable, TRAIN, *cell.words()], stdout=file,
                                stderr=subprocess.STDOUT, env=os.environ | environment)


def collect(cell, table):
    """Add the rows of a run that has ended to the table. Returns why there are none, or None."""
    if not cell.is_done():
        said = (cell.path / "output.txt").read_text(errors="replace").strip().splitlines()
        return said[-1] if said else "it printed nothing"
    try:
        add_rows(table, rows_of_run(cell.path))
    except (UserError, OSError) as error:
        return str(error)
    return None


def spent(cells):
    """Return the FLOPs that the runs have used so far, without what is over budget."""
    return sum(min(cell.last_line()["flops"], cell.flops) for cell in cells)


def run_cells(cells, jobs, table):
    """Train cells, `jobs` at a time, largest first, one GPU each where there are several.

    Returns ([(cell, why)] of those that failed, whether it was stopped). A signal has every run
    save and stop."""
    waiting = sorted(cells, key=lambda cell: -cell.flops)
    running, failed = {}, []  # {process: (cell, environment)}; [(cell, why)]
    told = False  # the runs are asked to stop once: a second signal could cut their saving short
    bar = progress_bar(total=sum(cell.flops for cell in cells), initial=spent(cells), unit="FLOP",
                       unit_scale=True, desc="sweep", leave=True)
    with caught_signals() as received, bar:
        free = [share(slot, jobs) for slot in range(jobs)]
        while running or waiting and not received:
            while free and waiting and not received:
                cell, environment = waiting.pop(0), free.pop(0)
                try:
                    running[begin(cell, environment)] = cell, environment
                except OSError as error:  # the other cells go on
                    failed.append((cell, str(error)))
                    free.append(environment)
            time.sleep(0.2)
            if received and not told:
                told = True
                for process in running:
                    process.terminate()
            for process in [process for process in running if process.poll() is not None]:
                cell, environment = running.pop(process)
                free.append(environment)
                failure = collect(cell, table)
                if failure and not told:
                    failed.append((cell, failure))
            bar.n = spent(cells)
            ended = len(cells) - len(waiting) - len(running)
            bar.set_postfix_str(f"{ended} of {len(cells)} cells, {len(failed)} failed")
    return failed, bool(received)


def sweep(args, flags):
    """Train the cells that are not finished; print the plan before and what failed after."""
    table = Path(args.table or Path(args.out) / "table.csv")
    cells = make_cells(args, flags)
    for cell in cells:
        cell.check_directory()
    rows = read_csv(table) if table.exists() else []
    new = [cell for cell in cells if not cell.has_row(rows)]
    todo = [cell for cell in new if not cell.is_done()]
    if args.print:
        for cell in todo:
            print(shlex.join(["python", "train.py", *cell.words()]))
        return
    print_plan(cells, todo, args.jobs)
    if args.dry_run:
        return
    # what others trained, or a sweep that was killed before it wrote the rows
    add_rows(table, [row for cell in new for row in rows_of_run(cell.path)])
    failed, stopped = run_cells(todo, args.jobs, table)
    if table.exists():
        print(f"wrote {table}; fit it with: python scaling.py fit {table}")
    for cell, failure in failed:
        print(f"failed: {cell.path}: {failure}", file=sys.stderr)
    if stopped:
        print("stopped; the same command goes on")
    if stopped or failed:
        sys.exit(130 if stopped else 1)


def sweep_args():
    """Return (the sweep's settings, the flags for train.py)."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--budgets", type=number(float, 1), nargs="+", required=True, metavar="C", help="FLOPs")
    add("--recurrences", type=LOOPS, nargs="+", required=True, metavar="MU",
        help="mean recurrences; mu_bwd is ceil(mu / 2) unless given")
    add("--seeds", type=SEED, nargs="+", default=[0], metavar="N", help="(default: 0)")
    add("--eval-recurrence", type=LOOPS, nargs="+", default=[1, 2, 4, 8, 16], metavar="T",
        help="loops to evaluate each run at, and those of --recurrences (default: 1 2 4 8 16)")
    add("--jobs", type=COUNT, default=1, metavar="N",
        help="runs side by side, which share the cores and GPUs that this process may use; "
        "OMP_NUM_THREADS, if set, is the threads of each (default: 1)")
    add("--out", type=some_path, default="out/sweep", metavar="DIR",
        help="directory of the runs (default: %(default)s)")
    add("--table", type=some_path, metavar="FILE",
        help="CSV file that rows are added to (default: table.csv in --out)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true",
                     help="print the plan and stop (the default text is made where it is missing)")
    how.add_argument("--print", action="store_true",
                     help="print the command of each unfinished run, one a line, and stop")
    return parser.parse_known_args()


if __name__ == "__main__":
    run_script(lambda: sweep(*sweep_args()))
