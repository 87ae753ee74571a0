import math

import numpy as np
import pytest
import sweeps
from conftest import ROOT
from sweeps import chinchilla, evaluated, parabolic, parametric, sweep

import scaling
from parts.chance import diverged, seed_effects, without_diverged, without_seed_effects
from parts.tables import read_tables, trained_depth

OURS = trained_depth(row for row in read_tables([ROOT / "results" / "sweep-stdlib-16.csv"])[0]
                     if row["accounting"] == "exact")


def at(rows, **columns):
    """The position of the one row with these values; flops: roughly."""
    flops = columns.pop("flops")
    (found,) = (i for i, row in enumerate(rows) if columns.items() <= row.items()
                and abs(row["flops"] / flops - 1) < 0.01)
    return found


@pytest.mark.parametrize("flops, mu, seed", [
    (3.2e13, 8, 0),  # of three seeds
    (8e12, 4, 1),  # of two, one of which must be the bad one
    (4e12, 1, 0),  # the only run without a loop at its budget
    (4e12, 32, 0),  # a corner of the table, to which a law can bend
    (1.6e13, 16, 0),
])
@pytest.mark.parametrize("loss", [2.2, 5.0, 0.16])
def test_a_diverged_run_is_named_and_no_other(flops, mu, seed, loss):
    i = at(OURS, flops=flops, mu_rec=mu, seed=seed)
    rows, gone = diverged([row | {"val_loss": loss} if row is OURS[i] else row for row in OURS])
    assert [row["val_loss"] for row, _ in gone] == [loss] and gone[0][1] > 8
    assert rows == [row for row in OURS if row is not OURS[i]]


@pytest.mark.parametrize("pair", [
    ((1.6e13, 1, 0), (1.6e13, 1, 2)),  # two of the three seeds of a cell
    ((4e12, 1, 0), (4e12, 32, 0)),  # both alone, at both ends of a budget
    ((8e12, 32, 1), (3.2e13, 2, 0)),
])
def test_of_two_diverged_runs_neither_hides_the_other(pair):
    bad = [at(OURS, flops=flops, mu_rec=mu, seed=seed) for flops, mu, seed in pair]
    for losses in ((5.0, 3.0), (2.2, 5.0)):
        rows = [dict(row) for row in OURS]
        for i, loss in zip(bad, losses):
            rows[i]["val_loss"] = loss
        assert sorted(row["val_loss"] for row, _ in diverged(rows)[1]) == sorted(losses)


def test_a_small_table_has_diverged_runs_too():
    rows = sweep(parametric, 0.003, seeds=3, recurrences=(1, 8))[:6]  # one budget
    rows[4]["val_loss"] = 5.0
    assert [row["val_loss"] for row, _ in diverged(rows)[1]] == [5.0]
    rows = sweep(parametric, 0.003, recurrences=(1, 2, 4, 8))[:12]
    rows[0]["val_loss"] = 5.0
    assert [row["val_loss"] for row, _ in diverged(rows)[1]] == [5.0]


def test_no_run_of_the_tables_here_is_named():
    for path in (ROOT / "results").rglob("*.csv"):
        if path.name.startswith("sweep") or path.parent.name == "others":
            rows, accounting = read_tables([path])
            notes = []
            mine = [row for row in rows if row["accounting"] == accounting]
            assert without_diverged(mine, notes) == mine and notes == [], path


@pytest.mark.parametrize("loss", [parametric, parabolic, lambda row: 2.0])
def test_no_run_of_a_clean_sweep_is_named(loss):
    for number in range(40):
        rng = np.random.default_rng(number)
        noise, seeds = rng.choice([0, 0.001, 0.003, 0.01]), rng.integers(1, 4)
        rows = sweep(loss, noise, seeds, seed=number,
                     recurrences=((1, 8), (1, 4, 16), (1, 2, 4, 8, 16, 32))[number % 3])
        rows = [row for row in rows if row["seed"] == 0 or rng.random() < 0.6]
        assert diverged(rows)[1] == []
    assert diverged(chinchilla())[1] == []


def test_no_run_beside_cells_of_several_seeds_is_named(monkeypatch):
    """A fit that saw them goes through those cells: what it leaves over is no noise of a run that
    is alone in its own."""
    monkeypatch.setattr(sweeps, "BUDGETS", (1e11, 1e12, 1e13, 1e14))
    for number in range(30):
        rng = np.random.default_rng(number)
        rows = sweep(parametric, 0.001, 3, seed=number,
                     recurrences=((1, 8), (1, 4, 16))[number % 2])
        rows = [row for row in rows if row["seed"] == 0 or rng.random() < 0.6]
        assert diverged(rows)[1] == []


def test_what_a_law_misses_has_not_diverged():
    # All runs of a recurrence are off, whatever their seed: it is the law that is wrong.
    def bent(row):
        return parametric(row) * (1 + 0.08 * (row["mu_rec"] == 4))
    for seeds in (1, 2, 3):
        assert diverged(sweep(bent, 0.002, seeds))[1] == []


def test_a_diverged_run_changes_nothing_that_is_fitted():
    rows = sweep(parametric, 0.003, seeds=2, recurrences=(1, 2, 4, 8))
    bad = [rows[13] | {"val_loss": 5.0}, rows[13] | {"val_loss": 4.9, "recurrence": 2.0}]
    without = rows[:13] + rows[14:]
    expected, found = scaling.Table(without, "exact"), scaling.Table(without + bad, "exact")
    (said,) = found.notes
    assert said.startswith("diverged and left out of everything: made up 1, 2e+12 FLOPs, mu_rec 4, "
                           "seed 1, val loss 5, ")
    assert "times the noise" in said and expected.notes == []
    assert found.rows == expected.rows and found.at_every_T == expected.at_every_T
    assert found.every_model == expected.every_model and found.measured == expected.measured
    assert scaling.noise_of(found.budgets) == scaling.noise_of(expected.budgets)


def test_a_run_is_judged_beside_its_own_model():
    # A larger model with lower losses is no reason to leave out the smaller one.
    rows = sweep(parametric, 0.002, recurrences=(1, 2, 4, 8))
    other = [row | {"model": "other", "val_loss": row["val_loss"] / 3} for row in rows[:4]]
    notes = []
    assert without_diverged(rows + other, notes) == rows + other and notes == []
    assert len(without_seed_effects(rows + other)) == len(rows + other)


def blocks(effects, cells):
    """[{seed: log loss}]: cells of these seeds, each at a level of its own."""
    return [{seed: 3.0 + i + effects[seed] for seed in seeds} for i, seeds in enumerate(cells)]


def test_the_effects_of_seeds_are_found_within_cells():
    true = {0: -0.004, 1: 0.001, 2: 0.003}
    # Where seed 0 is alone its level says nothing of it: it is that of the cell.
    cells = blocks(true, [(0,), (0,), (1, 2), (0, 1), (0, 1, 2), (2,), (1, 2)])
    effects, squares, freedom = seed_effects(cells)
    assert effects == pytest.approx(true) and freedom == 2
    within = sum(len(cell) * np.var(list(cell.values())) for cell in cells)
    assert squares == pytest.approx(within)
    # Two seeds that share one cell alone, or none, have no effect that could be known.
    assert seed_effects(blocks(true, [(0, 1), (0,), (1,), (1, 2), (2,)])) == ({}, 0, 0)
    only = seed_effects(blocks(true, [(0, 1), (0, 1), (1, 2), (2,)]))[0]
    assert only == pytest.approx({0: -0.0025, 1: 0.0025})


def test_losses_without_the_effects_of_seeds_are_those_of_no_seed():
    def loss(row):
        return parametric(row) * math.exp({0: -0.006, 1: 0.002, 2: 0.004}[row["seed"]])
    rows = evaluated(sweep(loss, seeds=3))
    few = [row for row in rows if row["seed"] == 0 or row["mu_rec"] in (1, 8)]
    for row in trained_depth(without_seed_effects(few)):
        true = parametric(row) + 0.1 * math.exp(-2)
        assert row["val_loss"] == pytest.approx(true, rel=2e-4)
    assert len(without_seed_effects(few)) == len(few)  # at every T
