"""The blanks that students fill in: empty they fail, filled in they pass, and mistakes are told."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

FILE = Path(__file__).parents[1] / "docs" / "blanks" / "loop.py"
spec = importlib.util.spec_from_file_location("blank_loop", FILE)
blank = importlib.util.module_from_spec(spec)
spec.loader.exec_module(blank)


def right(one_loop, h, depths, with_gradient):
    for t in range(int(depths.max())):
        for gradient in (False, True):
            last = depths - t <= with_gradient
            rows = torch.nonzero((t < depths) & (last == gradient)).flatten()
            if len(rows):
                with torch.set_grad_enabled(gradient):
                    new = one_loop(h[rows], rows)
                h = h.index_copy(0, rows, new)  # outside, or the other rows lose their gradients
    return h


def all_rows_equally(one_loop, h, depths, with_gradient):
    for _ in range(int(depths.max())):
        h = one_loop(h, torch.arange(len(h)))
    return h


def every_gradient(one_loop, h, depths, with_gradient):
    return right(one_loop, h, depths, 100)


def done_rows_again(one_loop, h, depths, with_gradient):
    one_loop(h, torch.arange(len(h)))
    return right(one_loop, h, depths, with_gradient)


def one_by_one(one_loop, h, depths, with_gradient):
    return torch.cat([right(lambda state, _, i=i: one_loop(state, torch.tensor([i])), h[i:i + 1],
                            depths[i:i + 1], with_gradient) for i in range(len(h))])


def test_a_right_loop_passes_and_each_mistake_is_told():
    assert blank.faults(right) == []
    assert "rows [0, 1, 3] is wrong" in blank.faults(all_rows_equally)[0]
    assert "last 2 loops" in blank.faults(every_gradient)[0]
    assert blank.faults(done_rows_again) == ["16 loops of a row were computed, 12 are needed"]
    assert blank.faults(one_by_one) == ["rows loop one by one, not together"]
    assert "has shape" in blank.faults(lambda one_loop, h, *rest: h[:2])[0]


def test_the_blank_says_that_it_is_blank():
    done = subprocess.run([sys.executable, FILE], capture_output=True, text=True)
    assert done.returncode == 1 and "run_loop is still blank" in done.stderr
