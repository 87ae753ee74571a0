import json
import math

import numpy as np
import pytest
from conftest import save_run
from sweeps import evaluated, parametric, sweep

from parts import tables
from parts.cli import UserError

TABLE = evaluated(sweep(parametric))


def test_a_table_survives_writing_and_bad_rows_are_named(tmp_path):
    path = tmp_path / "t.csv"
    tables.write_csv(path, TABLE)
    again = tables.read_csv(path)
    assert [r["model"] for r in again] == [r["model"] for r in TABLE]
    losses = [tables.column(some, "val_loss") for some in (again, TABLE)]
    assert np.allclose(*losses, rtol=1e-5)
    lines = path.read_text().splitlines()
    start = lines[2].rsplit(",", 2)[0]  # all but loss and seed
    for broken, said in (
        (start + ",nan,0", "line 3: val_loss is nan"),
        ("x,1", "line 3: params_noncore is missing"),
        (start + ",1,5,0", "line 3: it has more cells"),  # a decimal comma
        ("," + start.split(",", 1)[1] + ",1,0", "line 3: model is empty"),
        (start + ",abc,0", "line 3: val_loss is 'abc'"),
        (start + ",1,0.5", "line 3: seed is '0.5', must be a whole number"),
    ):
        path.write_text("\n".join([*lines[:2], broken, *lines[3:]]))
        with pytest.raises(UserError, match=said):
            tables.read_csv(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no column model"):
        tables.read_csv(path)


def test_a_run_counts_once(tmp_path, capsys):
    tables.write_csv(tmp_path / "t.csv", TABLE)
    once, _ = tables.read_tables([tmp_path / "t.csv"])
    twice, _ = tables.read_tables([tmp_path / "t.csv", tmp_path / "t.csv"])
    assert once == twice
    assert "count once" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [math.nan, None])  # as older runs wrote it, and as null
def test_a_loss_that_is_not_finite_is_left_out_and_said(build, tmp_path, capsys, lost):
    model = build()
    cost = {"exact": {"params_core": 10, "params_noncore": 10, "flops_per_token": 100}}
    save_run(model, tmp_path / "r", settings={"accounting": "exact", "seed": 0}, cost=cost)
    losses = {"1": 2.0, "4": 1.9, "16": lost}
    done = {"kind": "done", "tokens": 1000, "flops": 1e5, "val_loss": losses}
    (tmp_path / "r" / "log.jsonl").write_text(json.dumps(done) + "\n")
    rows, _ = tables.read_tables([tmp_path])
    assert [row["recurrence"] for row in rows] == [1, 4]
    assert "T = 16 is not finite" in capsys.readouterr().out
    tables.write_csv(tmp_path / "t.csv", rows)
    assert len(tables.read_csv(tmp_path / "t.csv")) == 2


def test_runs_of_different_texts_are_said_to_be(build, tmp_path, capsys):
    cost = {"exact": {"params_core": 10, "params_noncore": 10, "flops_per_token": 100}}
    settings = {"accounting": "exact", "seed": 0}
    done = {"kind": "done", "tokens": 1000, "flops": 1e5, "val_loss": {"1": 2.0}}
    for name, sha256 in (("a", "x"), ("b", "x"), ("c", "y")):
        save_run(build(), tmp_path / name, settings=settings, cost=cost, text={"sha256": sha256})
        (tmp_path / name / "log.jsonl").write_text(json.dumps(done) + "\n")
    tables.read_tables([tmp_path / "a", tmp_path / "b"])
    assert "different" not in capsys.readouterr().out
    tables.read_tables([tmp_path])
    assert "these runs have different texts: " in capsys.readouterr().out


def test_rows_have_the_same_types_from_a_run_and_from_a_table(build, tmp_path):
    cost = {"exact": {"params_core": 10, "params_noncore": 10, "flops_per_token": 100}}
    save_run(build(), tmp_path / "r", settings={"accounting": "exact", "seed": 0}, cost=cost)
    done = {"kind": "done", "tokens": 1000, "flops": 100_000, "val_loss": {"4": 2}}
    (tmp_path / "r" / "log.jsonl").write_text(json.dumps(done) + "\n")
    of_run = tables.rows_of_run(tmp_path / "r")
    tables.write_csv(tmp_path / "t.csv", of_run)
    assert of_run == tables.read_csv(tmp_path / "t.csv")
    types = {name: type(value) for name, value in of_run[0].items()}
    assert types == tables.COLUMNS  # numpy's integers, say, are no JSON


def test_a_model_without_a_loop_has_a_mean_of_one(build, tmp_path):
    cost = {"exact": {"params_core": 0, "params_noncore": 10, "flops_per_token": 100}}
    save_run(build(n_recurrent=0), tmp_path, settings={"accounting": "exact", "seed": 0}, cost=cost)
    done = {"kind": "done", "tokens": 1000, "flops": 1e5, "val_loss": {"1": 2.0}}
    (tmp_path / "log.jsonl").write_text(json.dumps(done) + "\n")
    (row,) = tables.trained_depth(tables.rows_of_run(tmp_path))
    assert (row["mu_rec"], row["mu_bwd"], row["recurrence"]) == (1, 1, 1)


def test_a_column_given_twice_is_refused_by_name(tmp_path):
    path = tmp_path / "t.csv"
    tables.write_csv(path, TABLE[:3])
    header, *lines = path.read_text().splitlines()
    for added in ("val_loss", " val_loss ", "flops", "seed"):
        path.write_text("\n".join([f"{header},{added}", *(line + ",1" for line in lines)]))
        with pytest.raises(UserError, match=f"column {added.strip()} more than once"):
            tables.read_csv(path)
        path.write_text("\n".join([f"{added},{header}", *("1," + line for line in lines)]))
        with pytest.raises(UserError, match=f"column {added.strip()} more than once"):
            tables.read_csv(path)
    path.write_text("\n".join([f"note,{header},note", *(f"a,{line},b" for line in lines)]))
    with pytest.raises(UserError, match="column note more than once"):  # whichever it is
        tables.read_csv(path)
    # Empty columns of a spreadsheet and spaces around a name are no second meaning.
    path.write_text("\n".join([header.replace(",", " ,") + ",,", *(line + ",," for line in lines)]))
    assert tables.read_csv(path) == [row | {"mu_bwd": float(row["mu_bwd"])} | {
        "val_loss": float(f"{row['val_loss']:.6g}"), "tokens": float(f"{row['tokens']:.10g}")}
        for row in TABLE[:3]]


def test_an_accounting_that_nobody_knows_is_refused_by_line(tmp_path):
    path = tmp_path / "t.csv"
    for accounting, mu, said in (("Exact", 1.0, "line 3: accounting is 'Exact', must be exact"),
                                 ("papr", 4.0, "line 3: accounting is 'papr', must be exact"),
                                 ("6ND", 4.0, "line 3: accounting is '6ND' and mu_rec 4")):
        wrong = TABLE[1] | {"accounting": accounting, "mu_rec": mu}
        tables.write_csv(path, [TABLE[0], wrong, TABLE[2]])
        with pytest.raises(UserError, match=said):
            tables.read_csv(path)
    tables.write_csv(path, [TABLE[0] | {"accounting": "6ND", "mu_rec": 1.0}])
    assert tables.read_tables([path])[1] == "6ND"


def test_rows_are_added_in_the_order_of_the_columns_there(tmp_path):
    path = tmp_path / "t.csv"
    names = list(tables.COLUMNS)[::-1]
    path.write_text(" , ".join([*names, "mine"]) + "\n")
    tables.add_rows(path, TABLE[:2])
    tables.add_rows(path, TABLE[1:3])
    again = tables.read_csv(path)
    assert [tables.identity(row) for row in again] == [tables.identity(row) for row in TABLE[:3]]


def test_what_is_left_out_is_counted_in_runs():
    notes = []
    left = tables.kept(TABLE, lambda row: row["mu_rec"] != 4, notes, "of four loops are")
    assert {row["mu_rec"] for row in left} == {1, 2, 6, 8, 12, 16}
    assert notes == ["5 runs of four loops are left out"]  # not its 25 rows
    assert tables.kept(TABLE, lambda row: row["recurrence"] == 1, notes, "never")
    assert len(notes) == 1  # every run has such a row


def test_flops_by_another_accounting_are_in_proportion_to_its_cost(build, tmp_path):
    cost = {name: {"params_core": 10, "params_noncore": 10, "flops_per_token": per_token}
            for name, per_token in (("exact", 100), ("paper", 80))}
    save_run(build(), tmp_path, settings={"accounting": "exact", "seed": 0}, cost=cost)
    done = {"kind": "done", "tokens": 1000, "flops": 100_000, "val_loss": {"4": 2.0}}
    (tmp_path / "log.jsonl").write_text(json.dumps(done) + "\n")
    flops = {row["accounting"]: row["flops"] for row in tables.rows_of_run(tmp_path)}
    assert flops == {"exact": 100_000, "paper": 80_000}


def test_runs_of_other_rules_are_other_models(build, tmp_path):
    cost = {"exact": {"params_core": 10, "params_noncore": 10, "flops_per_token": 100}}
    for injection in ("diagonal", "add"):
        path = tmp_path / injection
        save_run(build(injection=injection), path, settings={"accounting": "exact", "seed": 0},
                 cost=cost)
        done = {"kind": "done", "tokens": 1000, "flops": 1e5, "val_loss": {"4": 2.0}}
        (path / "log.jsonl").write_text(json.dumps(done) + "\n")
    rows, _ = tables.read_tables([tmp_path])
    assert [row["model"] for row in rows] == ["1/2/1 x 32 add", "1/2/1 x 32"]
