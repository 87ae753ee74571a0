"""Each picture is drawn from plain numbers, whole or not at all."""

import numpy as np
import pytest
from conftest import OUR_FILES

from parts import figures
from parts.cli import UserError
from parts.tables import budgets_of
from runs import guide, half, p_hop, paper, short, stability, worth

X = np.array([1.0, 2, 4, 8])
LOSS = np.array([3.0, 2.5, 2.2, 2.1])

INSIDE = {"flops": 1e12, "inside": True, "fitted_to": [2, 4, 8], "mu_rec": 4.0, "val_loss": 2.1,
          "parabola": [0.1, -0.3, 1.0], "ci": [2.0, 5.0], "tokens": 1e6, "at_most": None,
          "at_least": None}
EDGE = {"flops": 2e12, "inside": False, "at_most": 1.0, "at_least": None, "ci": [1.0, 2.2],
        "mu_rec": None}
BUDGETS = budgets_of([{"flops": c, "mu_rec": mu, "tokens": c, "val_loss": loss, "seed": 0}
                      for c in (1e12, 2e12, 3e12) for mu, loss in zip(X, LOSS)])
PICTURES = {
    "one_dimension": (),
    "fixed_point": (np.geomspace(1, 1e-3, 12).reshape(4, 3).T, 0.4, 2),
    "isoflop": (BUDGETS, [INSIDE | {"flops": BUDGETS[0].flops},
                          EDGE | {"flops": BUDGETS[1].flops}], "a title"),
    "optima": ([INSIDE, EDGE],
               [{"flops": x * 1e12, "mu_rec": x, "ci": [x / 2, x * 2], "tokens": x,
                 "ci_tokens": [x / 2, x * 2]} for x in X], {"mu_rec": 0.4, "tokens": 0.78}),
    "paper": ([{"model": "a", "flops": X * 1e18, "mu": X, "rounding": [X / 1.2, X * 1.2],
                "published": (X, X / 2, X * 2), "exact": (X, X / 2, X * 2)}],),
    "half": ([{"label": "looped", "parameters": 8e4, "flops": 1e12, "losses": [1.3],
               "looped": True},
              {"label": "plain", "parameters": 9e4, "flops": 2e12, "losses": [1.2, 1.3],
               "looped": False}],),
    "worth": ([{"label": "ours", "ours": True, "f": 0.6, "worth": 1.5},
               {"label": "paper", "ours": False, "f": 0.5, "worth": 1.48}], X / 8, {0.3: X}),
    "short": ([{"label": "looped", "color": "r", "passes": [4, 8], "flops": [1e12, 2e12],
                "losses": [[1.3], [1.2, 1.3]]}],),
    "p_hop": (range(3), [1, 2, 4, 8], np.full((3, 4), 0.5), None, [1, 1, 0.9], 4),
    "stability": ([{"rule": "add", "rate": 0.1, "loss": 2.0, "loops": [1, 2], "size": [1, 9],
                    "step": [20, 40], "radius": [1.0, 1.0]},
                   {"rule": "concat", "rate": 0.3, "loss": float("nan"), "loops": [], "size": [],
                    "step": [20], "radius": [5.0]}],),
}

NAMED = {name: (guide, name) for name in ("one_dimension", "fixed_point")}
NAMED |= {module.__name__.removeprefix("runs."): (module, "picture")
          for module in (half, p_hop, paper, short, stability, worth)}


@pytest.mark.parametrize("name", PICTURES)
def test_each_picture_is_drawn_whole(name, tmp_path):
    file = tmp_path / "a.png"
    module, function = NAMED.get(name, (figures, name))
    getattr(module, function)(file, *PICTURES[name])
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


def test_pictures_say_that_they_need_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        figures.pyplot()
