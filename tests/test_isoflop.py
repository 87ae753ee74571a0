import json
import math

import numpy as np
import pytest
from sweeps import BUDGETS, cost, parabolic, sweep

from parts.chance import gains, lack_of_fit, most_by_chance, seed_differences
from parts.show_fit import notes_on
from parts.tables import budgets_of
from scaling import fit_parabolas, left_by_parabola, line_through, noise_of


def optima_of(rows, resamples=1000):
    found = fit_parabolas(budgets_of(rows), cost, resamples)
    optima, noise = found["isoflop"], found["noise"]
    return optima, found["power_laws"], noise, notes_on(budgets_of(rows), optima, noise)


def test_the_optimum_of_exact_data_is_the_laws():
    optima, laws, _, notes = optima_of(sweep(parabolic), resamples=50)
    expected = [4 * (c / 4e12) ** 0.4 for c in BUDGETS]
    assert [o["mu_rec"] for o in optima] == pytest.approx(expected, rel=1e-6)
    for o in optima:
        assert o["tokens"] == pytest.approx(o["flops"] / cost(o["mu_rec"]))
    assert laws["mu_rec"]["exponent"] == pytest.approx(0.4)
    assert laws["mu_rec"]["coefficient"] == pytest.approx(4 / 4e12 ** 0.4)
    assert notes == []


def test_a_lowest_loss_at_the_edge_is_a_bound_and_no_number():
    # The optimum of the two smaller budgets is 0.1 and 0.9, of the largest 21.
    rows = [row for row in sweep(lambda row: parabolic(row, 3), noise=1e-4, seeds=2)
            if row["flops"] in (4e12, 8e12)]
    rows += [row for row in sweep(lambda row: parabolic(row, 0.7), noise=1e-4, seeds=2)
             if row["flops"] <= 2e12]
    rows += [row for row in sweep(lambda row: parabolic(row, 12), noise=1e-4, seeds=2)
             if row["flops"] == 16e12]
    optima, laws, _, notes = optima_of(rows)
    assert [o["inside"] for o in optima] == [False, False, True, True, False]
    assert [o["at_most"] for o in optima] == [1, 1, None, None, None]
    assert optima[-1]["at_least"] == 16 and optima[-1]["mu_rec"] is None
    assert optima[0]["ci"][0] == 1 and optima[0]["ci_at_edge"][0]
    assert "3 of 5 budgets have their lowest loss at an edge" in notes[0]
    # The power law goes through the two inside, unless it contradicts a bound: here "at least 16".
    assert laws["mu_rec"]["exponent"] > 0.4
    json.dumps(optima, allow_nan=False)


def test_a_table_of_edges_gives_no_exponent():
    optima, laws, _, notes = optima_of(sweep(lambda row: parabolic(row, 0.3), 0.002))
    assert not any(o["inside"] for o in optima) and laws == {}
    assert "no exponent" in notes[-1]


def test_a_parabola_sees_its_window_alone():
    rows = sweep(parabolic, recurrences=(1, 2, 4, 8, 16, 64))
    # Far from the optimum the loss is no parabola. It must not matter there.
    bent = [row | {"val_loss": row["val_loss"] * (1.5 if row["mu_rec"] == 64 else 1)}
            for row in rows]
    assert [o["mu_rec"] for o in optima_of(bent, 0)[0]] == pytest.approx(
        [o["mu_rec"] for o in optima_of(rows, 0)[0]])


def test_an_interval_holds_its_own_point_and_says_where_it_meets_the_edge():
    optima, laws, _, _ = optima_of(sweep(lambda row: parabolic(row, 2), 0.004, seed=3))
    for o in optima:
        if o["inside"]:
            assert o["ci"][0] <= o["mu_rec"] <= o["ci"][1]
        assert o["ci_at_edge"][0] == ("<= " if o["ci"][0] == 1 else "")
    assert any(o["ci_at_edge"][0] for o in optima)


def test_the_noise_is_that_of_the_seeds():
    rows = sweep(parabolic, 0.003, seeds=3)
    noise = noise_of(budgets_of(rows))
    assert noise["freedom"] == 5 * 7 * 2 - 2 and noise["source"] == "seeds"
    assert noise["sd"] == pytest.approx(0.003, rel=0.2)
    single = sweep(parabolic, 0.003)
    by_parabolas = noise_of(budgets_of(single))
    assert by_parabolas["source"] == "parabolas"
    assert by_parabolas["sd"] == pytest.approx(0.003, rel=0.4)
    # One run more makes nothing worse: a pair of seeds knows less of the noise than the parabolas.
    again = single[2] | {"seed": 1, "val_loss": single[2]["val_loss"] * 1.0001}
    one_more = noise_of(budgets_of([*single, again]))
    assert one_more["source"] == "parabolas" and one_more["freedom"] >= by_parabolas["freedom"]
    equal = [row | {"val_loss": 2.0, "seed": seed} for row in single for seed in (0, 1)]
    assert noise_of(budgets_of(equal)) is None


def test_what_is_no_parabola_shows_against_the_noise():
    def wedge(row):
        return 2 * math.exp(0.1 * abs(math.log(row["mu_rec"] / 4)))
    for loss, most in ((wedge, 0.001), (parabolic, 1)):
        rows = sweep(loss, 0.001, seeds=3, recurrences=(1, 2, 4, 8, 16))
        budget = budgets_of(rows)[2]
        chance = lack_of_fit(*left_by_parabola(budget), noise_of([budget]))
        assert chance <= most and (most < 1 or chance > 0.01)


def test_a_line_through_bounds_bends_only_where_it_contradicts_them():
    x, low, high = np.arange(4.0), np.zeros(4), np.full(4, 3.0)
    inside = np.array([-np.inf, 0.5, 1.5, 2.5])  # the line is at -0.5, as "at most 0" says
    assert line_through(x, inside, low, high) == pytest.approx((1, -0.5))
    above = np.array([-np.inf, 1.0, 1.5, 2.0])  # it would be at 0.5: the bound counts as a point
    slope, intercept = line_through(x, above, low, high)
    assert slope > 0.5 and intercept < 0.5
    assert math.isnan(line_through(x, np.array([-np.inf, 1, np.inf, np.inf]), low, high)[0])


def test_seeds_are_pairs():
    rows = sweep(parabolic, seeds=3, recurrences=(1, 4))
    for row in rows:  # what a seed shares is no noise of the difference
        row["val_loss"] = (1.9 if row["mu_rec"] == 4 else 2.0) + row["seed"]
    rows = [row for row in rows if (row["mu_rec"], row["seed"]) != (1, 2)]
    for gain in gains(budgets_of(rows), None)[0]:
        assert gain["by_seed"] == pytest.approx([0.1, 0.1]) and gain["mu_rec"] == [4]
        assert gain["ci"] == [None, None]


def test_the_interval_of_a_gain_holds_what_two_pairs_do_not_know():
    held = []
    for number in range(40):
        budgets = budgets_of(sweep(lambda row: 2.0 - 0.02 * (row["mu_rec"] == 4), 0.004, seeds=2,
                                   recurrences=(1, 4), seed=number))
        for gain in gains(budgets, noise_of(budgets))[0]:
            held.append(gain["ci"][0] <= 0.02 <= gain["ci"][1])
    assert 0.9 < np.mean(held) < 0.99


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_largest_of_several_gains_by_nothing_is_no_gain(seeds):
    found = []
    for number in range(40):
        found += gains(budgets_of(sweep(lambda row: 2.0, 0.004, seeds=seeds, seed=number)), None)[0]
    mean = np.mean([gain["gain"] for gain in found])
    if seeds == 1:  # six recurrences, one pair each: said to be the largest
        assert mean > 0.005 and all(gain["single"] for gain in found)
    else:
        error = np.std([gain["gain"] for gain in found]) / len(found) ** 0.5
        assert abs(mean) < 3 * error and not any(gain["single"] for gain in found)


def test_runs_that_differ_in_something_else_are_noted():
    rows = sweep(parabolic)
    _, _, _, notes = optima_of(rows + [rows[3] | {"mu_bwd": 9}], 0)
    assert "1 runs have the budget, recurrence and seed of another" in notes[0]


def test_of_runs_that_differ_in_mu_bwd_the_cheapest_counts_in_any_order():
    rows = sweep(parabolic)
    dearer = [row | {"mu_bwd": 99, "tokens": row["tokens"] / 2, "val_loss": row["val_loss"] * 1.1}
              for row in rows]
    expected = optima_of(rows, 0)[0]
    for every in (rows + dearer, dearer + rows):
        assert optima_of(every, 0)[0] == expected


def test_what_seeds_do_to_all_runs_alike_is_no_noise():
    def loss(row):
        return parabolic(row) * math.exp(0.02 * (row["seed"] - 1))
    budgets = budgets_of(sweep(loss, 0.003, seeds=3))
    noise = noise_of(budgets)
    assert noise["sd"] == pytest.approx(0.003, rel=0.2) and noise["freedom"] == 5 * 7 * 2 - 2
    seeds = seed_differences(budgets, noise)
    assert seeds["chance"] < 1e-3
    assert seeds["effects"] == pytest.approx({"0": -0.02, "1": 0, "2": 0.02}, abs=0.002)
    # Seeds that are only noise are seldom called different.
    found = [seed_differences(every, noise_of(every))["chance"] for every in
             (budgets_of(sweep(parabolic, 0.003, seeds=3, seed=number)) for number in range(40))]
    assert np.mean(np.array(found) < 0.1) < 0.25
    assert seed_differences(budgets_of(sweep(parabolic, 0.003)), None) is None


def test_noise_is_that_of_one_run_whatever_the_number_of_seeds():
    for seeds in (2, 4, 8):  # degrees of freedom, not runs, are what squares are shared among
        found = [noise_of(budgets_of(sweep(parabolic, 0.01, seeds, seed=number)))["sd"] ** 2
                 for number in range(30)]
        assert np.mean(found) == pytest.approx(0.01 ** 2, rel=0.08)
    singles = [budgets_of(sweep(parabolic, 0.01, seed=number)) for number in range(60)]
    by_parabolas = np.mean([noise_of(budgets)["sd"] ** 2 for budgets in singles])
    assert by_parabolas == pytest.approx(0.01 ** 2, rel=0.2)


def test_an_interval_of_a_parabola_holds_the_truth_as_often_as_it_says():
    held, widths, found = [], [], []
    for number in range(20):
        rows = sweep(parabolic, 0.004, 4, recurrences=(1, 2, 4, 8, 16), seed=number)
        for optimum in optima_of(rows, 100)[0][1:4]:
            truth = 4 * (optimum["flops"] / 4e12) ** 0.4
            held.append(optimum["ci"][0] <= truth <= optimum["ci"][1])
            if optimum["inside"]:
                widths.append(math.log(optimum["ci"][1] / optimum["ci"][0]))
                found.append(math.log(optimum["mu_rec"] / truth))
    assert np.mean(held) > 0.88
    assert np.median(widths) == pytest.approx(3.92 * np.std(found), rel=0.35)


def test_means_of_more_seeds_count_for_more():
    rows = sweep(parabolic, recurrences=(1, 2, 4, 8, 16))[10:15]  # one budget, mu* = 4
    rows = [row | {"val_loss": row["val_loss"] * (1.004 if row["mu_rec"] == 2 else 1)}
            for row in rows]
    often = rows + [row | {"seed": seed} for row in rows for seed in range(1, 9)
                    if row["mu_rec"] != 2]
    one, nine = (optima_of(some, 0)[0][0]["mu_rec"] for some in (rows, often))
    assert abs(math.log(nine / 4)) < 0.4 * abs(math.log(one / 4))


def test_budgets_that_may_be_meant_as_one_are_named():
    rows = [row | {"flops": row["flops"] * (1.05 if row["mu_rec"] > 4 else 1)}
            for row in sweep(parabolic) if row["flops"] in (1e12, 4e12)]
    note = "budgets of 1e+12 and 1.05e+12; 4e+12 and 4.2e+12 FLOPs are less than 10% apart"
    assert note in " ".join(optima_of(rows, 0)[3])
    for factor, said in ((1.02, False), (1.08, True), (1.15, False)):  # the same recurrences
        rows = sweep(parabolic)[:7]
        every = rows + [row | {"flops": factor * row["flops"], "seed": 1} for row in rows]
        assert any("apart" in note for note in optima_of(every, 0)[3]) == said


def test_a_single_pair_has_the_interval_of_two_runs():
    rows = sweep(parabolic, 0.003, seeds=3, recurrences=(1, 4))
    rows = [row for row in rows if row["seed"] == 0 or row["flops"] > 1e12]
    budgets = budgets_of(rows)
    noise = noise_of(budgets)
    first, second = gains(budgets, noise)[0][:2]
    most = most_by_chance(noise, 1) * math.exp(budgets[0].log_loss[0])
    assert first["single"] and first["ci"] == pytest.approx(
        [first["gain"] - most, first["gain"] + most])
    assert not second["single"] and len(second["by_seed"]) == 3
    # Two runs differ by sqrt(2) of the noise, and 95 % of a Student's t is above 1.96.
    assert 1.96 * 2 ** 0.5 < most_by_chance(noise, 1) / noise["sd"] < 2.5 * 2 ** 0.5
    assert most_by_chance(noise, 4) == pytest.approx(most_by_chance(noise, 1) / 2)


def test_runs_that_have_no_pair_are_counted():
    rows = sweep(parabolic, seeds=2, recurrences=(1, 4, 8))
    assert gains(budgets_of(rows), None)[1] == 0
    fewer = [row for row in rows if (row["flops"], row["mu_rec"], row["seed"]) not in
             ((1e12, 1, 1), (2e12, 4, 1), (2e12, 8, 1))]
    assert gains(budgets_of(fewer), None)[1] == 2 + 1
    assert gains(budgets_of([row for row in rows if row["mu_rec"] > 1]), None)[1] == 20


def test_tokens_at_the_optimum_follow_the_cost():
    optima, laws, _, _ = optima_of(sweep(parabolic), 0)
    tokens = [optimum["flops"] / cost(optimum["mu_rec"]) for optimum in optima]
    slope = np.polyfit(np.log([o["flops"] for o in optima]), np.log(tokens), 1)[0]
    assert laws["tokens"]["exponent"] == pytest.approx(slope) and slope < 1
    # "At most two loops" is at least so many tokens. The line through the others contradicts both.
    smallest = sweep(lambda row: parabolic(row, 0.5))[1:7]
    optima, laws, _, _ = optima_of([*smallest, *sweep(parabolic)[7:]], 0)
    assert [o["at_most"] for o in optima] == [2, None, None, None, None]
    flops, mu = np.array([(o["flops"], o["mu_rec"] or o["at_most"]) for o in optima]).T
    for name, values in (("mu_rec", mu), ("tokens", flops / cost(mu))):
        slope = np.polyfit(np.log(flops), np.log(values), 1)[0]
        assert laws[name]["exponent"] == pytest.approx(slope)
