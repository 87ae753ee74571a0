"""docs/class.ipynb runs from its first cell to its last and shows its pictures."""

import csv
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="needs ipykernel: pip install nbclient ipykernel")


def read_notebook():
    return nbformat.read(ROOT / "docs/class.ipynb", as_version=4)


def copy_tracked(folder):
    """What a clone would have, with what is not committed yet in it."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: what belongs to the repository is not known")
    for name in done.stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def write_small_table(folder):
    """Three runs of the table: to fit all of it takes half as long as the rest of the notebook."""
    with open(folder / "results/sweep-stdlib-16.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file)
                if row["accounting"] == "exact" and float(row["flops"]) > 2e13
                and row["seed"] == "0" and row["mu_rec"] in ("1", "2", "4")
                and row["recurrence"] == row["mu_rec"]]
    assert len(rows) == 3
    with open(folder / "few.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def set_variable(cells, name, value):
    """Another value for what the notebook sets at its top."""
    pattern = re.compile(rf"^{name} = .*$", re.MULTILINE)
    assert sum(bool(pattern.search(cell.source)) for cell in cells) == 1
    for cell in cells:
        cell.source = pattern.sub(f"{name} = {value!r}", cell.source)


FORKS = f"""
import sys
sys.path.append({str(ROOT / "tests")!r})
from forks import run_line

def system(line):
    get_ipython().user_ns["_exit_code"] = run_line(get_ipython().var_expand(line))

get_ipython().system = system
"""


def test_it_is_committed_without_outputs():
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert len(cells) >= 10
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_it_runs_and_shows_its_pictures(tmp_path, monkeypatch):
    copy_tracked(tmp_path)
    write_small_table(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = read_notebook()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    set_variable(cells, "STEPS", 5)
    set_variable(cells, "SEQUENCES", 5)
    set_variable(cells, "TABLE", "few.csv")
    pictures = [len(re.findall(r"^Image\(", cell.source, re.MULTILINE)) for cell in cells]
    for cell in cells:
        # A script that fails does not stop a notebook: here it does.
        cell.source = re.sub(r"^(!(?:.*\\\n)*.*)$", r"\1\nassert _exit_code == 0", cell.source,
                             flags=re.MULTILINE)
    cells[0].source = FORKS + cells[0].source  # what it has a shell start need not import torch

    before = set(ROOT.glob("out/class/**/*"))
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}}).execute()

    for cell, count in zip(cells, pictures):
        shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(shown) == count
    assert sum(pictures) >= 3
    pages = [output.data["text/html"] for cell in cells for output in cell.outputs
             if "text/html" in output.get("data", {})]
    assert len(pages) == 1 and "srcdoc='&lt;!doctype html&gt;" in pages[0]
    assert (tmp_path / "out/class/looped/eval.json").exists()
    assert set(ROOT.glob("out/class/**/*")) == before  # it wrote in its own folder only
