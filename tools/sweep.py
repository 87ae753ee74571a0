"""Train a grid of budgets and mean recurrences at equal FLOPs; a table of their losses comes out.

    python -m tools.sweep --budgets 1e12 2e12 --recurrences 1 2 4 8 --jobs 2 --n-embd 32
    python -m tools.sweep ... --dry-run              print the plan: tokens, steps, minutes of a run
    python -m tools.sweep ... --table results/x.csv  a table that several sweeps or machines share

Flags that are not the sweep's go to train.py. The same command again goes on where it was stopped:
finished runs are not repeated, others resume. A run is finished if its directory says so, or if the
table has a row of this model, accounting, budget (within 3 %), recurrence, mu_bwd and seed. The
table knows a model by its layers, width and parameters, and nothing of learning rates or text:
sweeps that differ in anything else need tables of their own.
"""

import concurrent.futures
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from data import texts_differ
from parts.cli import (
    COUNT,
    LOOPS,
    SEED,
    Parser,
    UserError,
    number,
    progress_bar,
    run_script,
    some_path,
)
from parts.files import lock, read_json
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
# settings in which a run that is there may differ from a plan: plans are of any budget and seed
MAY_DIFFER = ("out", "max_flops", "seed", "device", "eval_recurrence")
OWN_FLAGS = ("--out", "--max-flops", "--max-tokens", "--max-steps", "--mean-recurrence", "--seed",
             "--resume", "--overwrite")


def dry_run(flags):
    """What config.json of a run with these flags would say. Raises UserError: train.py's words."""
    try:
        record = setup(parse_args("", [*map(str, flags), "--dry-run"])).record
    except UserError as error:
        raise UserError(f"train.py says: {error}") from None
    return json.loads(json.dumps(record))  # as it comes back from the file


class Cell:
    """One run of a sweep: a budget, a mean recurrence, a seed. plan: what dry_run says of it."""

    def __init__(self, folder, flops, mu, seed, flags, plan):
        self.path = folder / f"C{flops:.3g}-mu{mu}-seed{seed}"
        self.flops, self.mu, self.seed, self.plan = flops, mu, seed, plan
        self.process, self.stopped = None, False
        self.starting = threading.Lock()  # a stop comes before a start or after it
        self.flags = ["--out", self.path, "--max-flops", repr(flops), "--mean-recurrence", str(mu),
                      "--seed", str(seed), *flags]

    def state(self):
        """The last line of its log: {"kind": "train", "eval" or "done", "flops": spent, ...}."""
        return last_line(self.path / "log.jsonl")

    def is_in(self, rows):
        """Whether a table has a row of this run; a run overshoots its budget by part of a step."""
        accounting = self.plan["settings"]["accounting"]
        own = {"accounting": accounting, "seed": self.seed} | model_columns(self.plan["model"])
        for name in ("params_core", "params_noncore"):
            own[name] = self.plan["cost"][accounting][name]
        near = [row for row in rows if same_budget(row["flops"], self.flops)]
        return any(own.items() <= row.items() for row in near)

    def check(self):
        """Raise UserError if the run that is there has other settings, or is still training."""
        if self.path.exists():
            with lock(self.path):  # refused where an orphan of a sweep that was killed holds it
                pass
        if not (self.path / "config.json").exists():
            return
        before = {"settings": {}, "model": {}} | read_json(self.path / "config.json")
        other = []
        for part in ("settings", "model"):
            now = {k: v for k, v in self.plan[part].items() if k not in MAY_DIFFER}
            other += [name for name in now if before[part].get(name) != now[name]]
        if texts_differ(before.get("text"), self.plan["text"]):
            other.append("text")
        if other:
            raise UserError(f"{self.path} was run with other settings ({', '.join(other)}): "
                            "choose another --out or remove it")

    def run(self, environment):
        """Train, or go on with an interrupted run. Returns why it failed, None if it finished."""
        resume = ["--resume"] if (self.path / "ckpt.pt").exists() else []
        with self.starting:
            if self.stopped:
                return "it was stopped before it began"
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / "output.txt", "w") as file:
                self.process = subprocess.Popen(
                    [sys.executable, TRAIN, *self.flags, *resume],
                    stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment)
        self.process.wait()
        if self.state()["kind"] == "done":
            return None
        said = (self.path / "output.txt").read_text(errors="replace").strip().splitlines()
        return said[-1] if said else "it printed nothing"

    def stop(self):
        """Have the run save and stop, or never start."""
        with self.starting:
            self.stopped = True
            if self.process:
                self.process.terminate()


def make_cells(args, flags):
    """The cells of the grid, by budget, recurrence and seed, their settings checked by train.py."""
    for flag in flags:
        if flag.split("=")[0] in OWN_FLAGS:
            raise UserError(f"{flag} is not for a sweep, which sets --out, --budgets, "
                            "--recurrences and --seeds of its runs")
    budgets = distinct_budgets(args.budgets)
    folder = Path(args.out)
    loops = sorted({*args.eval_recurrence, *args.recurrences})
    flags = [*flags, "--eval-recurrence", *map(str, loops)]
    plans = {}
    for mu in progress_bar(args.recurrences, desc="planning"):
        plans[mu] = dry_run(Cell(folder, 1.0, mu, 0, flags, None).flags)  # of any budget and seed
    device = plans[args.recurrences[0]]["settings"]["device"]
    if ":" in device and torch.cuda.device_count() > 1:
        raise UserError(f"--device is {device}: a sweep deals its runs to all GPUs that it sees; "
                        "choose some of them with CUDA_VISIBLE_DEVICES")
    grid = itertools.product(budgets, sorted({*args.recurrences}), sorted({*args.seeds}))
    return [Cell(folder, flops, mu, seed, flags, plans[mu]) for flops, mu, seed in grid]


def seconds_of(cells, jobs):
    """({cell: seconds it may take}, whether a run here was timed): by the FLOP/s that runs of this
    recurrence reached, else runs of others, else by a share of the matmul peak."""
    states = [(cell.mu, cell.state()) for cell in cells]
    timed = {mu: last["flops"] / last["seconds"] for mu, last in states if last.get("seconds")}
    sharing = jobs / min(jobs, max(1, torch.cuda.device_count()))  # runs on one device
    speeds = list(timed.values()) or [0.3 * cells[0].plan["peak_flops"] / sharing]
    guess = sum(speeds) / len(speeds)
    return {cell: cell.flops / timed.get(cell.mu, guess) for cell in cells}, bool(timed)


def print_plan(cells, todo, jobs):
    """Print what each cell trains on and how long it may take."""
    seconds, timed = seconds_of(cells, jobs)
    to_spend = sum(cell.flops for cell in todo)
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished, "
          f"{to_spend:.3g} FLOPs to spend\n")
    print("    FLOPs   mu_rec   mu_bwd   seed   FLOPs a token       tokens     steps   minutes")
    fewest = math.inf
    for cell in cells:
        settings, model = cell.plan["settings"], cell.plan["model"]
        per_token = cell.plan["cost"][settings["accounting"]]["flops_per_token"]
        tokens = cell.flops / per_token
        steps = tokens / settings["batch_size"] / model["block_size"]
        fewest = min(fewest, steps)
        mu_bwd = min(cell.mu, model["backprop_depth"])
        minutes = f"{seconds[cell] / 60:7.1f}" if cell in todo else "   done"
        print(f"{cell.flops:9.3g}   {cell.mu:6d}   {mu_bwd:6d}   {cell.seed:4d}   "
              f"{per_token:13,.0f}   {tokens:10,.0f}   {steps:7,.0f}   {minutes}")
    if fewest < 1 / (SAME_BUDGET - 1):
        print(f"{fewest:,.0f} steps are few: a run may overshoot its budget by more than "
              f"{SAME_BUDGET - 1:.0%}, and count as one of another budget")
    hours = sum(seconds[cell] for cell in todo) / jobs / 3600
    caveat = "" if timed else ", if training reaches 30 % of the matmul peak measured here"
    print(f"about {hours:.1f} hours with {jobs} jobs{caveat}")


def spent(cells):
    """FLOPs that the runs have used so far, those over budget not counted."""
    return sum(min(cell.state()["flops"], cell.flops) for cell in cells)


def share(slot, jobs):
    """The environment of the run in one of `jobs` slots: its share of the threads and GPUs that
    this process was given. Threads that the user gave are those of each process."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, cores // jobs)
    environment = {"OMP_NUM_THREADS": str(threads)}
    count = torch.cuda.device_count()
    if count > 1:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")  # numbers or names, in our numbers' order
        names = given.split(",")[:count] if given else range(count)
        environment["CUDA_VISIBLE_DEVICES"] = str(names[slot % len(names)]).strip()
    return environment


def work(cell, slots, jobs, stop, table):
    """Train a cell and add its rows to the table. Returns why it failed, or None."""
    if stop.is_set():
        return None
    slot = slots.pop()
    try:
        failure = cell.run(share(slot, jobs))
        if failure is None:
            add_rows(table, rows_of_run(cell.path))
        return None if stop.is_set() else failure  # it was told to stop
    except (UserError, OSError) as error:  # the other cells go on
        return str(error)
    finally:
        slots.append(slot)


def run_cells(cells, jobs, table):
    """Run cells, `jobs` at a time, largest first, one GPU each where there are several.

    Returns ([(cell, why)] of those that failed, whether it was stopped)."""
    slots = list(range(jobs))  # what tells runs side by side apart
    bar = progress_bar(total=sum(cell.flops for cell in cells), initial=spent(cells), unit="FLOP",
                       unit_scale=True, desc="sweep", leave=True)
    with caught_signals() as received, concurrent.futures.ThreadPoolExecutor(jobs) as pool, bar:
        # as an Event, whose lock is not for signal handlers: one may interrupt another
        stop = SimpleNamespace(is_set=lambda: bool(received))
        futures = {cell: pool.submit(work, cell, slots, jobs, stop, table)
                   for cell in sorted(cells, key=lambda cell: -cell.flops)}
        while not stop.is_set() and not all(future.done() for future in futures.values()):
            time.sleep(1)
            results = [future.result() for future in futures.values() if future.done()]
            failed = len(results) - results.count(None)
            bar.n = spent(cells)
            bar.set_postfix_str(f"{len(results)} of {len(cells)} cells, {failed} failed")
        if stop.is_set():
            for cell in cells:
                cell.stop()
    results = [(cell, future.result()) for cell, future in futures.items()]
    failed = [(cell, failure) for cell, failure in results if failure is not None]
    return failed, stop.is_set()


def sweep(args, flags):
    """Train the cells that are not finished, print what failed."""
    table = Path(args.table or Path(args.out) / "table.csv")
    cells = make_cells(args, flags)
    for cell in cells:
        cell.check()
    rows = read_csv(table) if table.exists() else []
    new = [cell for cell in cells if not cell.is_in(rows)]
    todo = [cell for cell in new if cell.state()["kind"] != "done"]
    print_plan(cells, todo, args.jobs)
    if args.dry_run:
        return
    # Runs that are finished and not in the table: it is a new one, or the sweep was killed then.
    add_rows(table, sum((rows_of_run(cell.path) for cell in new), []))
    failed, stopped = run_cells(todo, args.jobs, table)
    if table.exists():
        print(f"wrote {table}; fit it with: python scaling.py fit {table}")
    for cell, failure in failed:
        print(f"failed: {cell.path}: {failure}", file=sys.stderr)
    if stopped:
        print("stopped; the same command goes on")
        sys.exit(130)
    if failed:
        sys.exit(1)


def sweep_args():
    """(the sweep's settings, the flags for train.py)."""
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
    add("--dry-run", action="store_true",
        help="print the plan and stop (the default text is made where it is missing)")
    return parser.parse_known_args()


if __name__ == "__main__":
    run_script(lambda: sweep(*sweep_args()))
