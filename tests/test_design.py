import math

import numpy as np
import pytest
from conftest import script
from sweeps import cost, parametric, sweep

from parts.laws import fit_law, token_cost
from parts.tables import write_csv
from tools import design as plan


def test_a_design_says_what_a_sweep_would_find():
    rows = sweep(parametric, 0.002, recurrences=(1, 2, 4, 8, 16))
    fit = fit_law("training", rows, resamples=0)
    spreads = {}
    for seeds in (1, 8):
        design = plan.grid(rows[0], cost, (4e12, 8e12, 1.6e13), (1, 2, 4, 8, 16), range(seeds))
        assert len(design) == 3 * 5 * seeds
        found = plan.simulate(fit, design, cost, 0.003, 60)
        true = found["truth"]["exponent"][0]
        for name, bias in (("law", 0.03), ("parabola", 0.2)):  # the truth is no parabola
            spreads[name, seeds] = found[name]["exponent"].std()
            assert found[name]["exponent"].mean() == pytest.approx(true, abs=bias)
    # Eight seeds are worth a factor near the root of eight.
    for name in ("law", "parabola"):
        assert 1.8 < spreads[name, 1] / spreads[name, 8] < 5


def test_a_design_has_the_noise_and_the_cost_of_its_runs(capsys):
    rows = sweep(parametric, recurrences=(1, 2, 4, 8, 16))
    fit = fit_law("training", rows, resamples=0)
    design = plan.grid(rows[0], cost, (4e12, 8e12), (1, 2, 4, 8, 16), range(4))
    for row in design:
        assert row["tokens"] == pytest.approx(row["flops"] / cost(row["mu_rec"]))
    found = plan.simulate(fit, design, cost, 1e-6, 20)  # without noise each finds the truth
    for j, true in enumerate(found["truth"]["mu"][0]):
        assert found["law"]["mu"][:, j] == pytest.approx(true, abs=0.01)
    assert plan.central(np.arange(1000.0)) == pytest.approx((25, 500, 975), abs=1)


def test_odd_recurrences_cost_what_their_runs_do():
    def exact(mu):  # of a token, with a gradient through ceil(mu / 2) loops
        return 72_000 + 12_000 * mu + 24_000 * math.ceil(mu / 2)
    rows = [row | {"tokens": row["flops"] / exact(row["mu_rec"]),
                   "mu_bwd": math.ceil(row["mu_rec"] / 2)}
            for row in sweep(parametric, recurrences=(1, 2, 3, 4, 8, 16))]
    for row in plan.grid(rows[0], token_cost(rows), (4e12,), (1, 2, 3, 5, 8, 15), [0]):
        assert row["tokens"] == pytest.approx(4e12 / exact(row["mu_rec"]))


def test_made_up_sweeps_have_the_noise_asked_for(monkeypatch):
    rows = sweep(parametric, recurrences=(1, 2, 4, 8))
    fit = fit_law("training", rows, starts=16, resamples=0)
    drawn = []

    def refits(fit, rows, log_loss):
        drawn.append(log_loss.numpy() - np.log(fit.predict(rows)))
        return fit._replace(every=fit.every[:1].repeat(1 + len(log_loss), 1))
    monkeypatch.setattr(plan, "refits", refits)
    plan.simulate(fit, rows, cost, 0.004, 50)
    assert drawn[0].std() == pytest.approx(0.004, rel=0.1)


def test_a_design_from_the_command_line(tmp_path):
    write_csv(tmp_path / "t.csv", sweep(parametric, 0.002, recurrences=(1, 2, 4, 8, 16)))
    done = script("tools/design.py", "--tables", "t.csv", "--budgets", "1e12", "4e12",
                  "--recurrences", 1, 4, 16, "--seeds", 0, 1, "--noise", 0.002, "--repeats", 25,
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "12 runs of made up 1" in done.stdout and "exponent of mu*: true" in done.stdout


@pytest.mark.parametrize("args, said", [
    (["--budgets", "1e12", "--recurrences", "1", "2", "4"], "needs two budgets"),
    (["--budgets", "4e12", "4.1e12", "--recurrences", "1", "2", "4"],
     "4e+12 and 4.1e+12 are less than 6% apart"),
])
def test_bad_input_gets_one_line(args, said, tmp_path):
    done = script("tools/design.py", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
