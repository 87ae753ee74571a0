"""Each picture is drawn from plain numbers, whole or not at all."""

import numpy as np
import pytest
from conftest import OUR_FILES

from parts import figures
from runs import guide, paper

X = np.array([1.0, 2, 4, 8])

INSIDE = {"flops": 1e12, "inside": True, "fitted_to": [2, 4, 8], "mu_rec": 4.0, "val_loss": 2.1,
          "parabola": [0.1, -0.3, 1.0], "ci": [2.0, 5.0], "tokens": 1e6, "at_most": None,
          "at_least": None}
EDGE = {"flops": 2e12, "inside": False, "at_most": 1.0, "at_least": None, "ci": [1.0, 2.2],
        "mu_rec": None}
PICTURES = {
    "fixed_point": (np.geomspace(1, 1e-3, 12).reshape(4, 3).T, 0.4, 2),
    "optima": ([INSIDE, EDGE],
               [{"flops": x * 1e12, "mu_rec": x, "ci": [x / 2, x * 2], "tokens": x,
                 "ci_tokens": [x / 2, x * 2]} for x in X], {"mu_rec": 0.4, "tokens": 0.78}),
    "paper": ([{"model": "a", "flops": X * 1e18, "mu": X, "rounding": [X / 1.2, X * 1.2],
                "published": (X, X / 2, X * 2), "exact": (X, X / 2, X * 2)}],),
}

@pytest.mark.parametrize("name", PICTURES)
def test_each_picture_is_drawn_whole(name, tmp_path):
    file = tmp_path / "a.png"
    draw = {"fixed_point": guide.fixed_point, "optima": figures.optima, "paper": paper.picture}
    draw[name](file, *PICTURES[name])
    assert file.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert not figures.pyplot().get_fignums()  # closed: a sweep of pictures keeps no memory


def test_a_bound_has_its_interval_in_the_picture_too(tmp_path, monkeypatch):
    drawn = []
    axes = figures.pyplot().Axes
    monkeypatch.setattr(axes, "errorbar", lambda *args, **_: drawn.append(args[1:]))
    figures.optima(tmp_path / "a.png", *PICTURES["optima"])
    ends = [(point, *(point + np.ravel(away) * [-1, 1])) for _, point, away in drawn]
    assert ends == [(4, 2, 5), (1, 1, 2.2)]


def test_a_full_disk_leaves_no_half_picture(tmp_path, full_disk):
    with pytest.raises(OSError):
        guide.fixed_point(tmp_path / "a.png", *PICTURES["fixed_point"])
    assert not list(tmp_path.iterdir())


def test_no_experiment_imports_matplotlib_itself():
    users = [file.name for file in OUR_FILES if "import matplotlib" in file.read_text()]
    assert users == ["figures.py"]
