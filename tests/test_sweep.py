import json
import os
import shlex
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, script
from forks import Forked
from sweeps import parametric
from sweeps import sweep as made_up_sweep

from data import prepare
from parts import tables
from parts.cli import UserError
from parts.files import lock
from tools import sweep

SMALL = ["--n-embd", "16", "--n-head", "2", "--block-size", "32", "--batch-size", "4",
         "--eval-sequences", "2", "--eval-every", "20", "--device", "cpu", "--dtype", "float32"]


def run(*args, cwd, code=0):
    done = script("tools/sweep.py", *args, cwd=cwd)
    assert done.returncode == code, done.stderr[-2000:]
    return done


def start(*args, cwd):
    """The same in a process of its own, as are its runs. What it prints is in sweep.txt."""
    return Forked(["-m", "tools.sweep", *args], cwd / "sweep.txt", cwd, before=fork_runs)


def fork_runs():
    subprocess.Popen = fork_run


def fork_run(command, **options):
    """As subprocess.Popen, but train.py does not import torch again."""
    if command[1] != ROOT / "train.py":
        return BEGIN(command, **options)
    return Forked(command[1:], options["stdout"].name, env=options["env"])


class Ended:
    def poll(self):
        return 0


BEGIN = subprocess.Popen


def train_here(command, **options):
    """As subprocess.Popen, but train.py runs in this process: importing torch takes seconds."""
    if command[1] != ROOT / "train.py":
        return BEGIN(command, **options)
    done = script("train.py", *command[2:])
    options["stdout"].write(done.stdout + done.stderr)
    return Ended()


def make_data(folder):
    sources = [ROOT / name for name in ("model.py", "tools/sweep.py", "data.py", "train.py")]
    prepare("text", folder / "data", "bytes", sources)


@pytest.mark.parametrize("args, said", [
    (["--budgets", "0", "--recurrences", "1"], "--budgets is 0.0, must be at least 1"),
    (["--budgets", "1e9", "--recurrences", "1", "--preset", "huge"], "--preset is 'huge'"),
    (["--budgets", "1e9", "--recurrences", "1", "--seed", "3"], "--seed is not for a sweep"),
    (["--budgets", "1e9", "--recurrences", "1", "--seed=3"], "--seed=3 is not for a sweep"),
    (["--budgets", "1e9", "--recurrences", "1", "--max-steps", "2"], "--max-steps is not for"),
    (["--budgets", "1e9", "1.05e9", "--recurrences", "1"], "are less than 6% apart"),
    (["--budgets", "1e9", "--recurrences", "1", "--table", ""], "--table is empty"),
])
def test_bad_input_gets_one_line(args, said, tmp_path):
    error = run(*args, cwd=tmp_path, code=2).stderr
    assert said in error.splitlines()[-1] and "Traceback" not in error


def test_a_sweep_can_be_interrupted_and_repeats_nothing(tmp_path, monkeypatch):
    make_data(tmp_path)
    budgets = 4e8, 2e9
    args = ["--budgets", *budgets, "--recurrences", "1", "3", "--out", "sweep",
            "--eval-recurrence", "2", "--data", tmp_path / "data", *SMALL]
    plan = run(*args, "--print", cwd=tmp_path).stderr
    assert "4 cells, 0 of them finished, 4.8e+09 FLOPs to spend" in plan

    # What a scheduler takes: a command a line. It runs half of them.
    commands = run(*args, "--print", cwd=tmp_path).stdout.splitlines()
    assert not (tmp_path / "sweep").exists() and len({*commands}) == 4
    for command in commands[:2]:
        assert command.startswith("python train.py --out sweep/C4e+08-")
        assert script("train.py", *shlex.split(command)[2:], cwd=tmp_path).returncode == 0
    assert run(*args, "--print", cwd=tmp_path).stdout.splitlines() == commands[2:]
    assert not (tmp_path / "sweep" / "table.csv").exists()

    process = start(*args, "--jobs", "2", cwd=tmp_path)
    deadline = time.time() + 90
    while time.time() < deadline:
        if any('"step": 5,' in log.read_text() for log in tmp_path.glob("sweep/C2*/log.jsonl")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # to the sweep alone: its runs are told, and save
    assert process.wait(timeout=60) == 130
    assert "stopped; the same command resumes the sweep" in (tmp_path / "sweep.txt").read_text()
    logs = list(tmp_path.glob("sweep/*/log.jsonl"))
    done = [log for log in logs if '"done"' in log.read_text()]
    before = {log: log.stat().st_mtime_ns for log in done}
    assert 2 <= len(done) < 4
    saved = list(tmp_path.glob("sweep/C2*/ckpt.pt"))
    rest = run(*args, "--print", cwd=tmp_path).stdout
    assert rest.count("--resume") == len(saved) - (len(done) - 2) > 0

    monkeypatch.setattr(subprocess, "Popen", train_here)
    said = run(*args, "--jobs", "2", cwd=tmp_path).stdout
    assert f"{len(done)} of them finished" in said
    assert {log: log.stat().st_mtime_ns for log in done} == before
    rows = tables.read_csv(tmp_path / "sweep" / "table.csv")
    rows = [row for row in rows if row["accounting"] == "exact"]
    for row in rows:
        budget = min(budgets, key=lambda c: abs(c - row["flops"]))
        assert budget <= row["flops"] <= 1.4 * budget, row  # a step more at most
    cells = {(row["mu_rec"], row["recurrence"]) for row in rows}
    assert cells == {(mu, loops) for mu in (1, 3) for loops in (1, 2, 3)}
    assert len(rows) == 2 * 6
    assert run(*args, "--print", cwd=tmp_path).stdout == ""

    # Other settings are another sweep.
    error = run(*args, "--batch-size", "8", cwd=tmp_path, code=2).stderr
    assert "was run with other settings (batch_size)" in error

    # A table that was lost is made of the runs, without training.
    table = tmp_path / "sweep" / "table.csv"
    text = table.read_text()
    table.unlink()
    assert "4 of them finished" in run(*args, cwd=tmp_path).stdout
    assert sorted(table.read_text().splitlines()) == sorted(text.splitlines())


def test_recurrences_of_a_model_without_a_loop_are_refused(tmp_path):
    prepare("text", tmp_path / "data", "bytes", [ROOT / "model.py"])
    error = run("--budgets", "4e9", "--recurrences", "2", "--data", "data", *SMALL, "--preset",
                "gpt-nano", "--print", cwd=tmp_path, code=2).stderr
    assert "--mean-recurrence is 2, must be 1: this model has no loop" in error


def test_a_sweep_does_not_train_beside_its_orphans(tmp_path):
    prepare("text", tmp_path / "data", "bytes", [ROOT / "model.py"])
    cell = tmp_path / "sweep" / "C4e+09-mu1-seed0"
    cell.mkdir(parents=True)
    with lock(cell):
        error = run("--budgets", "4e9", "--recurrences", "1", "--out", "sweep", "--data", "data",
                    *SMALL, cwd=tmp_path, code=2).stderr
    assert "is in use by process" in error
    assert list(cell.iterdir()) == []


@pytest.mark.parametrize("given, count, expected", [
    (None, 2, ["0", "1", "0"]),
    ("2,5", 2, ["2", "5", "2"]),
    ("GPU-aa, MIG-bb,7", 3, ["GPU-aa", "MIG-bb", "7"]),
    ("3,-1,4", 1, [None] * 3),  # one GPU: all runs use it, as the sweep would
    ("3,1,-1,4", 2, ["3", "1", "3"]),  # what stands behind -1 is not visible
])
def test_a_sweep_keeps_to_the_gpus_that_it_was_given(given, count, expected, monkeypatch):
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    found = [sweep.share(slot, 3).get("CUDA_VISIBLE_DEVICES") for slot in range(3)]
    assert found == expected


def test_a_sweep_over_several_gpus_refuses_to_be_told_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "dry_run", lambda flags: {"settings": {"device": "cuda:1"}})
    args = SimpleNamespace(budgets=[1e9], recurrences=[1], seeds=[0], eval_recurrence=[1],
                           out=tmp_path)
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 1)
    assert len(sweep.make_cells(args, [])) == 1
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--device is cuda:1: .* CUDA_VISIBLE_DEVICES"):
        sweep.make_cells(args, [])


@pytest.mark.parametrize("given, jobs, expected", [
    (None, 1, 6), (None, 2, 3), (None, 4, 1), (None, 9, 1), ("1", 1, 1), ("2", 4, 2)])
def test_a_sweep_keeps_to_the_cores_and_threads_that_it_was_given(given, jobs, expected,
                                                                  monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert sweep.share(0, jobs)["OMP_NUM_THREADS"] == str(expected)
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    assert sweep.share(0, jobs)["OMP_NUM_THREADS"] == given or str(64 // jobs)


@pytest.mark.parametrize("module, name", [(sweep, "share"), (subprocess, "Popen")])
def test_a_stop_between_a_check_and_a_start_is_not_missed(module, name, tmp_path, monkeypatch):
    begin, begun = subprocess.Popen, []
    monkeypatch.setattr(sweep, "TRAIN", "-c")
    cell = sweep.Cell(tmp_path, 1e9, 1, 0, [], None)
    cell.flags = ["import time; time.sleep(60)"]

    def note_and_begin(*args, **options):
        begun.append(begin(*args, **options))
        return begun[-1]
    monkeypatch.setattr(subprocess, "Popen", note_and_begin)
    original = getattr(module, name)

    def stopped_in_here(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **options)
    monkeypatch.setattr(module, name, stopped_in_here)
    assert sweep.run_cells([cell], 1, tmp_path / "t.csv") == ([], True)
    assert all(process.returncode == -signal.SIGTERM for process in begun)
    assert len(begun) == (module is subprocess)


def test_a_sweep_does_not_go_on_with_another_text(tmp_path):
    plan = {"settings": {}, "model": {}, "text": {"sha256": "b"}}
    cell = sweep.Cell(tmp_path, 4e9, 1, 0, [], plan)
    cell.path.mkdir()
    for text in ({"sha256": "b"}, None):  # None: of before, not known
        (cell.path / "config.json").write_text(json.dumps({"text": text}))
        cell.check_directory()
    (cell.path / "config.json").write_text(json.dumps({"text": {"sha256": "a"}}))
    with pytest.raises(UserError, match=r"other settings \(text\)"):
        cell.check_directory()


def test_sweeps_share_a_table(tmp_path):
    make_data(tmp_path)
    args = ["--budgets", "1e9", "--recurrences", "2", "--data", "data", "--table", "shared/t.csv",
            *SMALL]
    sweeps = [[*args, "--seeds", seed, "--out", f"sweep{seed}"] for seed in (0, 1)]
    for words in sweeps:
        command, = run(*words, "--print", cwd=tmp_path).stdout.splitlines()
        assert script("train.py", *shlex.split(command)[2:], cwd=tmp_path).returncode == 0

    # Two at once lose nothing.
    both = [start(*words, cwd=tmp_path) for words in sweeps]
    for process in both:
        assert process.wait(timeout=120) == 0
    text = (tmp_path / "shared" / "t.csv").read_text()
    rows = tables.read_csv(tmp_path / "shared" / "t.csv")
    assert len(rows) == 2 * 2 * 5  # seeds, accountings, loops
    assert {row["seed"] for row in rows} == {0, 1}
    assert not list(tmp_path.glob("sweep*/table.csv"))

    # A third finds its cells there, trains nothing and changes nothing.
    said = run(*args, "--seeds", 0, 1, "--out", "third", cwd=tmp_path).stdout
    assert "2 cells, 2 of them finished" in said
    assert not (tmp_path / "third").exists()
    assert (tmp_path / "shared" / "t.csv").read_text() == text

    # Cells that are not there yet are still to do.
    plan = run(*args, "--seeds", 0, 1, 2, "--out", "third", "--print", cwd=tmp_path).stderr
    assert "3 cells, 2 of them finished, 1e+09 FLOPs" in plan


@pytest.fixture
def rows():
    return made_up_sweep(parametric, 0.01)


def test_rows_that_many_add_at_once_are_all_kept(rows, tmp_path):
    table = tmp_path / "t.csv"

    def add(some):
        for row in some:
            tables.add_rows(table, [row])
    threads = [threading.Thread(target=add, args=[rows[i::6]]) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = tables.read_csv(table)
    assert sorted(map(tables.identity, kept)) == sorted(map(tables.identity, rows))
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]  # no lock, no temporary file


def test_adding_rows_leaves_what_is_there(rows, tmp_path):
    table = tmp_path / "t.csv"
    tables.write_csv(table, [row | {"note": "mine, all mine"} for row in rows[:3]],
                      [*tables.COLUMNS, "note"])
    text = table.read_text()
    tables.add_rows(table, rows[:5])
    assert table.read_text().startswith(text) and len(table.read_text().splitlines()) == 6
    assert tables.read_csv(table)[4]["tokens"] == pytest.approx(rows[4]["tokens"])

    # What is no table is not replaced.
    table.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no column model"):
        tables.add_rows(table, rows)
    assert table.read_text() == "a,b\n1,2\n"


def test_a_row_is_of_a_cell_if_all_but_the_overshoot_agrees(tmp_path):
    rows = tables.read_csv(ROOT / "results" / "sweep-stdlib-16.csv")
    model = {"n_prelude": 1, "n_recurrent": 2, "n_coda": 1, "n_embd": 16, "mean_recurrence": 4,
             "backprop_depth": 2}
    settings = {"accounting": "exact"}
    of_it = next(row for row in rows if row["accounting"] == "exact")
    sizes = {name: of_it[name] for name in ("params_core", "params_noncore")}

    def there(flops=4e12, seed=0, settings=settings, sizes=sizes, **changed):
        plan = {"settings": settings, "model": model | changed,
                "cost": {settings["accounting"]: sizes}}
        return sweep.Cell(tmp_path, flops, 4, seed, [], plan).has_row(rows)
    assert there() and there(flops=3.92e12)
    assert not there(flops=4.4e12)
    assert not there(seed=5)
    assert not there(n_embd=32)
    assert not there(backprop_depth=3)
    assert not there(mean_recurrence=5)
    assert not there(settings={"accounting": "other"})
    assert not there(sizes=sizes | {"params_core": 1.0})
    by_paper = [row for row in rows if row["accounting"] == "paper" and row["mu_rec"] == 4]
    sizes = {name: by_paper[0][name] for name in sizes}
    assert there(flops=by_paper[0]["flops"], settings={"accounting": "paper"}, sizes=sizes)
