import json
import math

import numpy as np
import pytest
from conftest import save_run, script

import figures
import scaling
from common import UserError
from runs.coverage import BUDGETS, coverage, made_up, parabolic, parametric


def rng(seed=0):
    return np.random.default_rng(seed)


def table(noise=0.002, loops=(1, 2, 4, 8, 16), phi=1.0, sizes=(1.0,)):
    """A sweep that follows the unified law, evaluated at several T."""
    rows = []
    for row in made_up(lambda row: parametric(row, phi), noise, rng(), sizes):
        for n in sorted({row["mu_rec"], *loops}):
            loss = row["val_loss"] + 0.1 * math.exp(-2 * n / row["mu_rec"])
            rows.append(row | {"recurrence": float(n), "val_loss": loss})
    return rows


@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_exponents_are_recovered_and_their_intervals_hold_the_truth(noise):
    found = coverage(60, noise)
    for name in ("mu_rec", "tokens"):
        error, share = found[name]
        # The study with 200 sweeps: python -m runs.coverage
        assert abs(error) < 0.03 and share >= 0.85, found


def test_the_optimum_of_exact_data_is_the_laws():
    optima, laws, notes = scaling.isoflop(made_up(parabolic, 0, rng()), resamples=50)
    expected = [4 * (c / 4e12) ** 0.4 for c in BUDGETS]
    assert [o["mu_rec"] for o in optima] == pytest.approx(expected, rel=1e-6)
    for o in optima:
        assert o["tokens"] == pytest.approx(o["flops"] / 1e5 / (2 + o["mu_rec"]), rel=5e-3)
    assert laws["mu_rec"]["exponent"] == pytest.approx(0.4)
    assert laws["mu_rec"]["coefficient"] == pytest.approx(4 / 4e12 ** 0.4)
    assert notes == []


def test_laws_are_recovered():
    out, _ = scaling.fit_table(table(noise=1e-4), resamples=0)
    law = out["unified"]
    assert (law["x"], law["y"], law["z"]) == pytest.approx((0.4, 0.6, 2), rel=0.1)
    assert law["E"] == pytest.approx(0.8, abs=0.05)
    assert law["held_out_error"] < 0.002 and law["error_given_loss_at_mu"] < 0.006
    assert all(run["error"] < 0.001 for run in out["test_time"])
    assert len(out["test_time"]) == 5 * 6  # not for mu_rec = 1
    rows = made_up(parametric, 1e-4, rng())
    law = scaling.natural(scaling.fit_law("training", rows, resamples=0))
    assert (law["x"], law["y"]) == pytest.approx((0.4, 0.6), rel=0.1)
    assert law["X"] == pytest.approx(40, rel=0.5)
    assert law["Y"] == pytest.approx(3e3, rel=0.5)


def test_phi_is_recovered_from_several_sizes():
    rows = made_up(lambda row: parametric(row, 0.5), 0.002, rng(), sizes=(0.5, 1, 2))
    worth = scaling.fit_table(rows, resamples=40)[0]["recurrence_worth"]
    assert worth["phi"] == pytest.approx(0.5, abs=0.05)
    assert worth["ci"][0] < 0.5 < worth["ci"][1]
    objective = worth["objective"]
    assert objective["free"] < min(objective["phi = 0"], objective["phi = 1"]) / 1.2


def test_budgets_planned_by_another_accounting_are_interpolated():
    rows = made_up(parabolic, 0, rng())
    other = [row | {"flops": row["flops"] * (1 + 0.05 * row["mu_rec"])} for row in rows]
    assert all(len(set(mu)) == 7 for _, _, mu in scaling.budgets_of(other))
    _, laws, _ = scaling.isoflop(other, resamples=0)

    # The same law from runs that were planned by that accounting.
    planned = []
    for row in made_up(parabolic, 0, rng()):
        counted = row | {"flops": row["flops"] / (1 + 0.05 * row["mu_rec"])}
        planned.append(row | {"val_loss": parabolic(counted)})
    _, direct, _ = scaling.isoflop(planned, resamples=0)
    assert laws["mu_rec"]["exponent"] == pytest.approx(direct["mu_rec"]["exponent"], abs=0.02)


def edge(row):
    """The row with a loss whose optimum, mu = 256, is beyond every recurrence."""
    return row | {"val_loss": 1 + (8 - math.log2(row["mu_rec"])) ** 2 / 100}


@pytest.mark.parametrize("rows, said", [
    ([r for r in table() if r["flops"] == 1e12], "a power law needs 2"),
    ([r for r in table() if r["mu_rec"] in (1, 2)], "no budget has 3 recurrences"),
    ([r | {"val_loss": 1.5} for r in table()], "all losses are equal"),
    ([edge(r) for r in table()], "no optimum inside"),
    ([r for r in table() if r["recurrence"] != r["mu_rec"]], "evaluated at T = mu_rec"),
], ids=["one budget", "two recurrences", "equal losses", "optimum at the edge", "not at mu_rec"])
def test_what_cannot_be_fitted_is_said_and_the_rest_fitted(rows, said, tmp_path, capsys):
    out, fits = scaling.fit_table(rows, resamples=20)
    assert said in " ".join(out["notes"])
    assert len(out["test_time"]) > 0
    scaling.report(out)
    assert said in capsys.readouterr().out
    json.dumps(out, allow_nan=False)
    scaling.draw(out, fits, tmp_path)
    drawn = "isoflop.png" if scaling.budgets_of(scaling.trained_depth(rows)) else "test-time.png"
    assert (tmp_path / drawn).stat().st_size > 5000


def test_a_table_survives_writing_and_bad_rows_are_named(tmp_path):
    rows, path = table(), tmp_path / "t.csv"
    scaling.write_csv(path, rows)
    again = scaling.read_csv(path)
    assert [r["model"] for r in again] == [r["model"] for r in rows]
    losses = [scaling.column(some, "val_loss") for some in (again, rows)]
    assert np.allclose(*losses, rtol=1e-5)
    lines = path.read_text().splitlines()
    start = lines[2].rsplit(",", 2)[0]  # all but loss and seed
    for broken, said in (
        (start + ",nan,0", "row 3: val_loss is nan"),
        ("x,1", "row 3: params_noncore is None"),
        (start + ",abc,0", "row 3: val_loss is 'abc'"),
        (start + ",1,0.5", "row 3: seed is '0.5', must be a whole number"),
    ):
        path.write_text("\n".join([*lines[:2], broken, *lines[3:]]))
        with pytest.raises(UserError, match=said):
            scaling.read_csv(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no column model"):
        scaling.read_csv(path)


def run(*args, cwd, code=0):
    done = script("scaling.py", *args, cwd=cwd)
    assert done.returncode == code, done.stderr[-2000:]
    return done


def test_fit_and_predict_from_the_command_line(tmp_path):
    scaling.write_csv(tmp_path / "t.csv", made_up(parabolic, 0.002, rng()))
    said = run("fit", "t.csv", "--json", "fit.json", "--figures", "figures", "--resamples", 30,
               cwd=tmp_path).stdout
    assert "published: C^0.40" in said
    fit = json.loads((tmp_path / "fit.json").read_text())
    assert fit["power_laws"]["mu_rec"].keys() == {"exponent", "coefficient", "ci"}
    assert fit.keys() >= {"power_laws", "isoflop", "training_law", "test_time", "recurrence_worth"}
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn >= {"isoflop.png", "power-laws.png", "contours.png"}
    said = run("predict", "t.csv", "--flops", "1.6e14", cwd=tmp_path).stdout
    mu = float(said.split("mu*  = ")[1].split()[0])
    assert mu == pytest.approx(4 * 40 ** 0.4, rel=0.25) and "warning: 10 times beyond" in said
    said = run("predict", "t.csv", "--flops", "1e13", "--preset", "parcae-micro",
               cwd=tmp_path).stdout
    assert "mu_rec 1 to 16" in said


def test_without_matplotlib_the_tables_are_printed(tmp_path, monkeypatch):
    def pyplot():
        raise UserError("pictures need matplotlib")
    monkeypatch.setattr(figures, "pyplot", pyplot)
    scaling.write_csv(tmp_path / "t.csv", made_up(parabolic, 0.002, rng()))
    done = run("fit", "t.csv", "--figures", "figures", "--resamples", 2, cwd=tmp_path)
    assert done.stdout.startswith("no figures: pip install matplotlib\n")
    assert "published: C^0.40" in done.stdout
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("args, said", [
    (["fit", "nowhere.csv"], "nowhere.csv cannot be read"),
    (["predict", "--flops", "1e13", "nowhere.csv"], "nowhere.csv cannot be read"),
    (["sweep", "--budgets", "1e9", "--recurrences", "1"], "python sweep.py"),
    (["fit", "--nonsense"], "unrecognized arguments: --nonsense"),
])
def test_bad_input_gets_one_line(args, said, tmp_path):
    error = run(*args, cwd=tmp_path, code=2).stderr
    assert said in error.splitlines()[-1] and "Traceback" not in error


def test_a_run_counts_once(tmp_path, capsys):
    rows = table()
    scaling.write_csv(tmp_path / "t.csv", rows)
    once, _ = scaling.read_tables([tmp_path / "t.csv"])
    twice, _ = scaling.read_tables([tmp_path / "t.csv", tmp_path / "t.csv"])
    assert once == twice
    assert "count once" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_left_out_and_said(build, tmp_path, capsys):
    model = build()
    cost = {"exact": {"params_core": 10, "params_noncore": 10, "flops_per_token": 100}}
    save_run(model, tmp_path / "r", settings={"accounting": "exact", "seed": 0}, cost=cost)
    losses = {"1": 2.0, "4": 1.9, "16": math.nan}
    done = {"kind": "done", "tokens": 1000, "flops": 1e5, "val_loss": losses}
    (tmp_path / "r" / "log.jsonl").write_text(json.dumps(done) + "\n")
    rows, _ = scaling.read_tables([tmp_path])
    assert [row["recurrence"] for row in rows] == [1, 4]
    assert "T = 16 is not finite" in capsys.readouterr().out
    scaling.write_csv(tmp_path / "t.csv", rows)
    assert len(scaling.read_csv(tmp_path / "t.csv")) == 2
