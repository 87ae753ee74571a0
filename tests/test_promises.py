"""What README.md and docs/manual.md promise about numbers, commands and packages."""

import ast
import csv
import re
import sys

import numpy as np
import pytest
import torch
from conftest import OUR_FILES, ROOT, script

from model import PRESETS, Parcae, ParcaeConfig, count_parameters
from parts.settings import DEFAULT_PRESET, parse_args
from runs import first, paper
from runs.common import error_text

SCRIPTS = [f"{name}.py" for name in ("bench", "data", "sample", "scaling", "train")]
SCRIPTS += sorted(f"{path.parent.name}/{path.name}" for folder in ("tools", "runs")
                  for path in ROOT.glob(f"{folder}/*.py") if path.stem != "common")


def test_the_gains_in_the_readme_are_those_of_the_table():
    kinds = dict.fromkeys(("layers", "variant"), str)
    kinds |= dict.fromkeys(("channels", "mean_recurrence", "seed", "tokens"), int)
    with open(ROOT / "results" / "first.csv", newline="") as file:
        rows = [{name: kinds.get(name, float)(text or ("" if name in kinds else "nan"))
                 for name, text in row.items()} for row in csv.DictReader(file)]
    found = [by_seed for key, T, _, by_seed in first.gains(rows)
             if (*key, T) == (64, "0/1/0", 0.02, 4)]  # equal tokens, then equal FLOPs
    found += [minus for channels, _, _, minus in first.rivals(rows) if channels == 52]
    said = (ROOT / "README.md").read_text().replace("*", "")
    for by_seed in found:
        gains = first.counted(by_seed)
        assert f"| {-np.mean(gains):+.3f} ({float(error_text(gains)):.3f}) |" in said
    assert len(found) == 3


def test_the_default_model_is_what_the_readme_says():
    def built(**change):
        with torch.device("meta"):
            return Parcae(ParcaeConfig(**PRESETS[DEFAULT_PRESET] | {"vocab_size": 320} | change))
    looped, once, two = (built(), built(mean_recurrence=1),
                         built(n_prelude=2, n_recurrent=0, n_embd=52))
    assert count_parameters(looped) == 98_752 and count_parameters(two) == 98_500
    flops = looped.flops_per_token()
    assert flops / once.flops_per_token() == pytest.approx(2.2, abs=0.05)
    assert 1200 * 16 * 256 * flops == pytest.approx(7.2e12, rel=0.02)


def test_the_exponents_of_the_paper_under_exact_flops():
    said = {}
    for name, table in paper.TABLE_6.items():
        flops, mu = np.array(list(table)), np.array(list(table.values()))
        costs, *_ = paper.costs_and_size(name)
        exact = flops * costs["exact"](mu) / costs["paper"](mu)
        ends = paper.slopes_within(flops, *paper.rounding(mu))
        slopes = paper.slope_of(flops, mu), paper.slope_of(exact, mu), *ends
        said[name] = [round(float(x), 2) for x in slopes]
    assert said == {"140m": [0.44, 0.42, 0.36, 0.52], "370m": [0.29, 0.28, 0.07, 0.58]}


def test_the_worked_changes_of_the_manual_fit_the_code():
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/manual.md").read_text(), re.S)
    assert len(blocks) == 4
    for part in (part for block in blocks for part in block.split("--- ")[1:]):
        name, *lines = part.splitlines()
        code = (ROOT / name.split(",")[0]).read_text().splitlines()
        for line in lines:
            assert line[0] == "+" or line[1:] in code, line


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself(name):
    done = script(name, "--help")
    command = f"-m {name[:-3].replace('/', '.')}" if "/" in name else name
    assert done.returncode == 0 and f"python {command}" in done.stdout


def test_optional_packages_are_imported_where_they_are_used():
    """Matplotlib, datasets and others may be missing: only four packages are promised."""
    allowed = {"torch", "numpy", "tiktoken", "regex", "tqdm", "parts", "tools", "runs",
               *sys.stdlib_module_names, *(path.stem for path in OUR_FILES)}
    for path in OUR_FILES:
        for node in ast.parse(path.read_text()).body:
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert {name.split(".")[0] for name in names} <= allowed, path


@pytest.mark.parametrize("name, words", [("sample.py", []), ("tools/evaluate.py", []),
                                         ("tools/trace.py", ["t.html", "--prompt", "a"])])
def test_other_scripts_look_where_train_py_writes(name, words, tmp_path):
    out = parse_args("", []).out
    done = script(name, *words, cwd=tmp_path)
    assert done.returncode == 2 and f"{out} holds no model" in done.stderr
