import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, script
from sweeps import cost, evaluated, parabolic, parametric, sweep

import scaling
from parts import laws
from parts import show_fit as report
from parts.laws import fit_law, frontier, token_cost
from parts.tables import column, read_tables, write_csv


def test_the_laws_of_a_table(tmp_path):
    out, table = scaling.fit_table(evaluated(sweep(parametric, 1e-4)), "exact", resamples=20)
    assert out["runs"] == 35 and out["model"] == "made up 1"
    law = out["training_law"]
    assert law["held_out_error"] < 0.002
    # At each budget the optimum of the law stands beside that of the runs; the loss is no parabola.
    assert [optimum["inside"] for optimum in out["isoflop"]] == [False, True, True, True, True]
    for runs, optimum in zip(out["isoflop"], law["frontier"]["optima"]):
        assert optimum["mu_rec"] == pytest.approx(runs["mu_rec"] or 1, rel=0.25)
        assert optimum["tokens"] == pytest.approx(optimum["flops"] / cost(optimum["mu_rec"]))
    exponent = law["frontier"]["exponents"]["mu_rec"]
    assert exponent["exponent"] == pytest.approx(out["power_laws"]["mu_rec"]["exponent"], abs=0.1)
    assert exponent["ci"][0] <= exponent["exponent"] <= exponent["ci"][1]
    unified = out["laws"]["unified"]
    assert unified["z"] == pytest.approx(2, rel=0.1)
    assert unified["held_out_error"] < 0.002
    json.dumps(out, allow_nan=False)
    scaling.draw(out, table, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"isoflop.png", "optima.png"}


def test_phi_and_what_it_costs_to_do_without():
    rows = sweep(lambda row: parametric(row, 0.5), 0.002, sizes=(0.5, 1, 2))
    free = fit_law("worth", rows, resamples=40)
    worth = free.summary()
    assert "phi" not in worth["undetermined"]
    assert worth["phi"] == pytest.approx(0.5, abs=0.05)
    assert worth["ci"]["phi"][0] < 0.5 < worth["ci"]["phi"][1]
    assert free.objective < min(objectives_without_phi(rows)) / 1.2


def objectives_without_phi(rows):
    """Those of a loop that is worth nothing, and a layer: phi = 0 and 1."""
    unlooped = [row | {"mu_rec": 1} for row in rows]
    return [fit_law("training", some, resamples=0).objective for some in (unlooped, rows)]


def test_another_accounting_is_another_cost_under_the_same_law():
    """Its runs share no budgets: the law has optima all the same."""
    rows = sweep(parametric, recurrences=(1, 2, 4, 8, 16))
    other = [row | {"flops": row["flops"] * (1 + 0.05 * row["mu_rec"]), "accounting": "other"}
             for row in rows]
    out, _ = scaling.fit_optima(rows + other, "other", resamples=0)
    assert out["isoflop"] == [] and len(out["training_law"]["frontier"]["optima"]) == 5
    found = out["training_law"]["frontier"]["exponents"]["mu_rec"]["exponent"]
    fit = fit_law("training", rows, resamples=0)
    direct = laws.exponents_of(fit, rows[0], lambda mu: cost(mu) * (1 + 0.05 * mu),
                               column(other, "flops"))
    assert found == pytest.approx(direct["mu_rec"]["exponent"], abs=0.02)


def test_a_largest_budget_that_is_not_shared_is_not_held_out():
    rows = sweep(parametric, 1e-3)
    other = [row | {"flops": row["flops"] * (1 + 0.05 * row["mu_rec"]), "accounting": "other"}
             for row in rows]
    notes = []
    _, unseen = laws.fit_without_largest("training", rows, notes)
    assert {row["flops"] for row in unseen} == {16e12} and len(unseen) == 7 and notes == []
    out = scaling.fit_optima(rows + other, "other", resamples=0)[0]
    assert out["training_law"]["held_out_error"] is None
    assert "no held-out error on the largest budget (it has fewer than three recur" in " ".join(
        out["notes"])


def test_mu_star_below_the_fewest_loops_tried_is_not_the_fewest():
    every = fit_law("training", sweep(parametric, recurrences=(1, 2, 4, 8, 16)), resamples=0)
    rows = sweep(parametric, recurrences=(2, 4, 8, 16))
    fit = fit_law("training", rows, resamples=0)
    for flops in (4e12, 1.6e13):
        assert frontier(fit, rows[0], token_cost(rows), flops)[0] == pytest.approx(
            frontier(every, rows[0], cost, flops)[0], rel=0.02)


def test_a_law_that_the_runs_contradict_is_said_to_be_so(capsys):
    for loss, wrong in ((parametric, False),
                        (lambda row: parametric(row) + 0.05 * (row["mu_rec"] == 4), True)):
        out, _ = scaling.fit_optima(sweep(loss, 1e-3, seeds=3), "exact", resamples=0)
        report.report(out | {"laws": {}})
        assert ("form of the law is not quite right" in capsys.readouterr().out) == wrong


def test_a_law_is_judged_at_the_tokens_that_runs_had():
    """Odd recurrences cost more than a mix of their neighbours, by the rounding of mu_bwd."""
    rows = [row | {"tokens": row["flops"] / (1e5 * (2 + row["mu_rec"] + 2 * row["mu_bwd"]))}
            for row in sweep(lambda row: 2.0, seeds=3, recurrences=(1, 2, 3, 4, 8, 16))]
    rng = np.random.default_rng(0)
    rows = [row | {"val_loss": parametric(row) * np.exp(0.001 * rng.standard_normal())}
            for row in rows]
    law = scaling.fit_optima(rows, "exact", resamples=0)[0]["training_law"]
    assert law["lack_of_fit"] > 0.02


def test_two_recurrences_are_enough_for_gains(capsys):
    rows = sweep(lambda row: 2.0 - 0.1 * (row["mu_rec"] == 8), 1e-3, seeds=3, recurrences=(1, 8))
    report.report(scaling.fit_table(rows, "exact", resamples=0)[0])
    assert capsys.readouterr().out.count("with mu_rec 8, 3 pairs") == 5


def test_runs_of_another_accounting_are_counted(capsys):
    rows = sweep(parametric, 1e-3)
    every = rows[:20] + [row | {"accounting": "Exact"} for row in rows[20:]]
    out, _ = scaling.fit_optima(every, "exact", resamples=0)
    assert "15 runs have no exact FLOPs and are left out" in out["notes"]


def test_models_of_two_sizes_have_no_optimum_and_others_are_counted(capsys):
    rows = sweep(parametric, 1e-3, sizes=(1, 2))
    one_name = [row | {"model": "one"} for row in rows]
    out, _ = scaling.fit_optima(one_name, "exact", resamples=0)
    assert out["isoflop"] == [] and out["gain"] == []
    assert "the runs called one have 2 sizes" in " ".join(out["notes"])
    out, _ = scaling.fit_optima(rows, "exact", resamples=0)
    assert "35 runs of other models are left out" in out["notes"]


def test_a_table_without_loops_is_a_chinchilla_table(tmp_path, capsys):
    rows, accounting = read_tables([ROOT / "results" / "others" / "overtrain-c4.csv"])
    out, table = scaling.fit_table(rows, accounting, resamples=60)
    law = out["training_law"]
    assert (law["x"], law["y"]) == pytest.approx((0.253, 0.262), abs=0.002)  # as in 2403.08540
    assert law["undetermined"] == []
    best = law["far_exponents"]
    assert best["params"]["exponent"] == pytest.approx(0.262 / 0.515, abs=0.005)
    assert best["params"]["exponent"] + best["tokens"]["exponent"] == pytest.approx(1)
    assert best["params"]["ci"][0] < 0.509 < best["params"]["ci"][1]
    assert out["notes"] == [] and out["laws"] == {}
    report.report(out)
    assert "best params ~ C^0.509" in capsys.readouterr().out
    scaling.draw(out, table, tmp_path)
    # Several sizes under names of their own are one table too.
    named = [row | {"model": f"{row['params_noncore']:.0f}"} for row in rows]
    assert scaling.fit_table(named, accounting, 0)[0]["training_law"]["x"] == pytest.approx(
        law["x"])


TABLE = evaluated(sweep(parametric, 0.002))


@pytest.mark.parametrize("rows, said, resamples", [
    # Two resamples: fits of one budget creep for hundreds of steps.
    ([r for r in TABLE if r["flops"] == 1e12], "no exponent", 2),
    ([r for r in TABLE if r["mu_rec"] in (1, 2)], "5 of 5 budgets have fewer than three", 20),
    ([r | {"val_loss": 1.5} for r in TABLE], "all losses are equal", 20),
    ([r for r in TABLE if r["recurrence"] != r["mu_rec"]], "training law: not fitted (0 sizes", 20),
    ([r for r in TABLE if r["recurrence"] == r["mu_rec"]], "1 values of T / mu_rec", 20),
    ([r for r in TABLE if r["mu_rec"] == 1], "1 sizes of the unrolled model", 20),
], ids=["one budget", "two recurrences", "equal losses", "not at mu_rec", "only at mu_rec",
        "no loops"])
def test_what_cannot_be_fitted_is_said_and_the_rest_fitted(
        rows, said, resamples, tmp_path, capsys):
    out, table = scaling.fit_table(rows, "exact", resamples)
    assert said in " ".join(out["notes"]) and len(out["notes"]) <= 6
    assert ("training_law" in out) == (said in ("no exponent", "1 values of T / mu_rec"))
    report.report(out)
    assert said in capsys.readouterr().out
    json.dumps(out, allow_nan=False)
    scaling.draw(out, table, tmp_path)


def run(*args, cwd, code=0):
    done = script("scaling.py", *args, cwd=cwd)
    assert done.returncode == code, done.stderr[-2000:]
    return done


def test_fit_and_predict_from_the_command_line(tmp_path, monkeypatch, capsys):
    write_csv(tmp_path / "t.csv", sweep(parametric, 0.002, recurrences=(1, 2, 4, 8, 16)))
    said = run("fit", "t.csv", "--json", "fit.json", "--figures", "figures", "--resamples", 30,
               cwd=tmp_path).stdout
    assert "published: C^0.40" in said
    fit = json.loads((tmp_path / "fit.json").read_text())
    assert fit["power_laws"]["mu_rec"].keys() >= {"exponent", "coefficient", "ci"}
    assert fit["isoflop"][0].keys() >= {"flops", "inside", "mu_rec", "ci"}
    assert fit.keys() >= {"power_laws", "isoflop", "training_law", "runs", "notes", "noise"}
    assert "ci" in fit["training_law"]
    assert "worth" not in fit["laws"]  # one size does not tell phi from x
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"isoflop.png", "optima.png"}

    # mu* of the law L = 0.8 + 40 N^-0.4 + 3e3 D^-0.6 at 1.6e14, ten times beyond: 14.
    said = run("predict", "t.csv", "--flops", "1.6e14", cwd=tmp_path).stdout
    mu = float(said.split("mu*  = ")[1].split()[0])
    tokens = float(said.split("D*   = ")[1].split()[0])
    assert mu * 1.2 > 16 and "not inside the recurrences tried" in said
    assert tokens == pytest.approx(1.6e14 / cost(mu), rel=0.01)
    assert "warning: this budget is 10 times beyond" in said
    found = scaling.fit_optima(*read_tables([tmp_path / "t.csv"]), resamples=20)
    monkeypatch.setattr(scaling, "fitted", lambda args: found)
    scaling.predict(SimpleNamespace(flops=4e12))
    assert "a parabola through the runs at this budget: mu* = " in capsys.readouterr().out


def test_the_cost_of_a_token_does_not_depend_on_the_order_of_runs():
    rows = sweep(parametric, recurrences=(1, 2, 4))
    dearer = [row | {"mu_bwd": row["mu_rec"] + 1, "tokens": row["tokens"] / 1.3} for row in rows]
    mu = np.array([1, 2, 3, 4])
    for every_row in (rows + dearer, dearer + rows, [dearer[0], *rows]):
        assert token_cost(every_row)(mu) == pytest.approx(token_cost(rows)(mu))


def test_what_no_resample_says_is_not_said(capsys):
    rows = [row for row in sweep(parabolic) if row["mu_rec"] in (2, 4, 8)]  # no noise to be seen
    out, _ = scaling.fit_table(rows, "exact", resamples=2)
    assert out["noise"] is None and out["power_laws"]["mu_rec"]["defined"] is None
    report.report(out)
    assert "no interval: the noise of a run is unknown" in capsys.readouterr().out


def test_without_matplotlib_the_tables_are_printed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_csv(tmp_path / "t.csv", sweep(parabolic, 0.002))
    done = run("fit", "t.csv", "--figures", "figures", "--resamples", 2, cwd=tmp_path)
    assert done.stdout.startswith("no figures: pip install matplotlib\n")
    assert "published: C^0.40" in done.stdout
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("args, said", [
    (["fit", "nowhere.csv"], "nowhere.csv cannot be read"),
    (["predict", "--flops", "1e13", "nowhere.csv"], "nowhere.csv cannot be read"),
    (["predict", "--flops", "1e13", ROOT / "results" / "others" / "overtrain-c4.csv"],
     "do not determine a training law of loops"),
    (["fit", "--json", ROOT], "which is not a file"),
    (["fit", "--nonsense"], "unrecognized arguments: --nonsense"),
])
def test_bad_input_gets_one_line(args, said, tmp_path):
    error = run(*args, cwd=tmp_path, code=2).stderr
    assert said in error.splitlines()[-1] and "Traceback" not in error


def test_every_run_that_leaves_is_counted():
    rows = evaluated(sweep(parametric, 1e-3))
    gone = [row for row in rows if not (row["flops"] == 16e12 and row["mu_rec"] in (2, 4)
                                        and row["recurrence"] == row["mu_rec"])]
    out, table = scaling.fit_table(gone, "exact", resamples=0)
    notes = " ".join(out["notes"])
    assert "2 runs have no row at T = mu_rec, where loss is compared, and are left out" in notes
    assert len(table.rows) == 33 and out["runs"] == 35
    alone = [row for row in rows if (row["flops"], row["mu_rec"]) != (4e12, 1)]
    assert "gain over mu_rec = 1: 6 runs have no partner" in " ".join(
        scaling.fit_optima(alone, "exact", resamples=0)[0]["notes"])


def test_a_law_is_fitted_without_the_effects_of_seeds(capsys):
    """Seed 0 is lower and alone at many recurrences: taken for the curve, it moves the optimum."""
    def loss(row):
        return parametric(row) * math.exp({0: -0.02, 1: 0.01, 2: 0.01}[row["seed"]])
    rows = [row for row in sweep(loss, 1e-4, seeds=3, recurrences=(1, 2, 4, 8, 16))
            if row["mu_rec"] in (1, 8) or row["seed"] == 0]
    out, table = scaling.fit_table(rows, "exact", resamples=30)
    law = out["training_law"]
    assert (law["x"], law["y"]) == pytest.approx((0.4, 0.6), rel=0.1)
    assert out["seeds"]["effects"] == pytest.approx({"0": -0.02, "1": 0.01, "2": 0.01}, abs=5e-4)
    assert out["noise"]["sd"] == pytest.approx(1e-4, rel=0.4)
    true = fit_law("training", sweep(parametric, recurrences=(1, 2, 4, 8, 16)), resamples=0)
    expected = laws.exponents_of(true, rows[0], table.cost, column(rows, "flops"))
    found = law["frontier"]["exponents"]["mu_rec"]["exponent"]
    assert found == pytest.approx(expected["mu_rec"]["exponent"], abs=0.02)
    raw = fit_law("training", table.measured, resamples=0)
    left_in = laws.exponents_of(raw, rows[0], table.cost, column(rows, "flops"))
    left_in = left_in["mu_rec"]["exponent"]
    assert abs(left_in - expected["mu_rec"]["exponent"]) > 0.05
    report.report(out)
    said = capsys.readouterr().out
    assert "removed from all losses: seed 0: -2.00%, seed 1: +1.00%" in said


def test_the_error_on_the_largest_budget_is_of_a_fit_that_has_not_seen_it():
    rows = sweep(parametric, 1e-4)
    above = [row | {"val_loss": row["val_loss"] * (1.03 if row["flops"] == 16e12 else 1)}
             for row in rows]
    for law in ("training", "unified"):
        some = above if law == "training" else evaluated(above, loops=(1, 4, 16))
        smaller, unseen = laws.fit_without_largest(law, some, [])
        assert {row["flops"] for row in unseen} == {16e12}
        assert smaller.error(unseen) == pytest.approx(0.03, abs=0.003)
        saw_it = fit_law(law, some, resamples=0)
        assert saw_it.error(unseen) < 0.025
    out, _ = scaling.fit_optima(above, "exact", resamples=0)
    assert out["training_law"]["held_out_error"] == pytest.approx(0.03, abs=0.003)
    unified = laws.fit_with_error("unified", some, 0, [])[1]
    assert unified["held_out_error"] == pytest.approx(0.03, abs=0.003)


def test_a_cell_headed_95_percent_has_an_interval():
    edge = {"at_most": 1.0, "at_least": None, "mu_rec": None, "ci": [1.0, 2.2],
            "ci_at_edge": ["<= ", ""]}
    assert report.optimum_text(edge) == "at most 1 [<= 1, 2.2]"
    edge = {"at_most": None, "at_least": 16.0, "mu_rec": None, "ci": [9.0, 16.0],
            "ci_at_edge": ["", ">= "]}
    assert report.optimum_text(edge) == "at least 16 [9, >= 16]"
    edge |= {"ci": [16.0, 16.0], "ci_at_edge": [">= ", ">= "]}  # all of the interval
    assert report.optimum_text(edge) == "at least 16 [>= 16, >= 16]"
    inside = {"at_most": None, "at_least": None, "mu_rec": 2.0, "ci_at_edge": ["", ""]}
    kink = inside | {"ci": [2.0, 2.0], "kink": True}
    assert report.optimum_text(kink) == "2 [2, 2], a kink of cost"
    assert report.optimum_text(inside | {"ci": [1.9, 2.1]}) == "2 [1.9, 2.1]"
    single = {"gain": -0.0121, "ci": [-0.0311, 0.0069], "mu_rec": [2.0], "single": True,
              "by_seed": [-0.0121]}
    assert report.gain_text(single).startswith("-0.012 (one pair, +-0.019) with mu_rec 2")
    assert "one pair)" in report.gain_text(single | {"ci": [None, None]})


def test_what_a_law_leaves_over_is_the_noise_of_seeds():
    table = scaling.Table(sweep(parametric, 0.003, seeds=4), "exact")
    table.fit = fit_law("training", table.rows, starts=16, resamples=0)
    squares, freedom = scaling.left_by_law(table)
    assert freedom == 35 - 5
    assert squares / freedom / 0.003 ** 2 == pytest.approx(1, abs=0.5)  # of one run, not of four


def test_where_the_cost_has_a_kink_mu_star_stays_and_is_said_to(capsys):
    def dear(mu):  # a loop more than two costs five times as much
        return 1e5 * (2 + mu + 4 * np.maximum(0, mu - 2))
    rows = [row | {"tokens": row["flops"] / dear(row["mu_rec"])}
            for row in sweep(parametric, recurrences=(1, 2, 4, 8, 16))]
    fit = fit_law("training", rows, starts=16, resamples=20)
    found = laws.optimum(fit, rows[0], dear, 4e12)
    assert found["ci"] == [2, 2] and found["kink"] and not any(found["ci_at_edge"])
    below = laws.optimum(fit, rows[0], dear, 1e10)
    assert below["at_most"] == 1 and below["ci_at_edge"] == ["<= ", "<= "] and not below["kink"]
    smooth = laws.optimum(fit._replace(every=fit.every[:1].repeat(30, 1)), rows[0], cost, 4e12)
    assert smooth["ci"] == [smooth["mu_rec"]] * 2 and not smooth["kink"]  # no noise, no kink
    json.dumps([found, below], allow_nan=False)


def test_a_loop_that_is_worth_a_layer_fits_best_as_one():
    rows = sweep(parametric, 0.001, sizes=(0.5, 1, 2), recurrences=(1, 2, 4, 8))
    free = fit_law("worth", rows, resamples=0).objective
    nothing, layer = objectives_without_phi(rows)
    assert free <= layer * (1 + 1e-6)
    assert layer < 1.2 * free < nothing / 2
