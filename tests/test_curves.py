"""The logs of runs become one picture, also while they are written, or one line says why not."""

import json
import math
import sys

import numpy as np
import pytest
from conftest import script

from parts import figures
from tools import curves


def make_run(path, evaluations, looped=True, steps=60, mean=4, **change):
    """A run directory with a log: {step: {T: val loss}}, the last one of the end of training.

    change: other values of each step, functions of it."""
    path.mkdir()
    model = {"n_recurrent": 2 if looped else 0, "mean_recurrence": mean}
    (path / "config.json").write_text(json.dumps({"model": model}))
    lines = []
    for step in range(1, steps + 1):
        state = {"step": step, "tokens": 512 * step, "flops": 1e6 * step, "seconds": 0.5 * step}
        values = {"loss": 5 / step ** 0.2, "lr": 0.01, "grad_norm": 1 / step}
        values |= {name: function(step) for name, function in change.items()}
        lines.append({"kind": "train", **state, **values})
        if step in evaluations:
            kind = "done" if step == steps else "eval"
            sizes = {"state_rms": dict.fromkeys(evaluations[step], 2.0 * step)} if looped else {}
            lines.append({"kind": kind, **state, "val_loss": evaluations[step], **sizes})
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def drawn(monkeypatch):
    """A list that gets each figure that is saved."""
    kept, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure) or
                        save(figure, path))
    return kept


def draw(tmp_path, *runs):
    """Draw run directories in a file; whether it is a picture."""
    done = script("tools/curves.py", *runs, "--out", tmp_path / "curves.png")
    assert done.returncode == 0 and not done.stderr, done.stderr
    return (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_runs_side_by_side(tmp_path, drawn):
    looped = make_run(tmp_path / "looped", {30: {"4": 3.1}, 60: {"1": 3.5, "4": 3.0, "8": 3.0}})
    plain = make_run(tmp_path / "plain", {30: {"1": 3.3}, 60: {"1": 3.2}}, looped=False)
    with open(looped / "log.jsonl", "a") as log:
        log.write('{"kind": "train", "st')  # it is being written
    assert draw(tmp_path, looped, plain)
    axes = drawn[0].axes
    labels = [panel.get_xlabel() for panel in axes]
    assert labels == ["training tokens", "training FLOPs", "training seconds"]
    for panel, unit in zip(axes, (512, 1e6, 0.5)):
        train, val, _, plain_val = panel.lines
        assert train.get_label() == "looped, T = 4"
        np.testing.assert_allclose(train.get_xdata(), unit * np.arange(1, 61))
        np.testing.assert_allclose(val.get_xydata(), [[30 * unit, 3.1], [60 * unit, 3.0]])
        np.testing.assert_allclose(plain_val.get_ydata(), [3.3, 3.2])
        low, high = panel.get_ylim()
        assert low < 5 / 60 ** 0.2 and 3.2 < high < 5  # all but the first steps
    assert axes[0].get_legend().get_title().get_text().endswith("val loss at T loops")


def test_the_last_losses_of_two_runs_and_their_difference_are_printed(tmp_path):
    runs = [make_run(tmp_path / "looped", {30: {"4": 3.0}, 60: {"1": 3.5}}),
            make_run(tmp_path / "never", {})]
    lines = script("tools/curves.py", *runs, "--out", tmp_path / "c.png").stdout.splitlines()
    # tokens, FLOPs and seconds of that loss, not of the end
    assert lines[1].split() == ["looped", "4", "3.0000", "15,360", "3.00e+07", "15"]
    assert lines[2].split()[:3] == ["never", "4", "nan"]
    assert lines[3:5] == ["never minus looped: +nan", curves.SEEDS_DIFFER]
    alone = script("tools/curves.py", runs[0], "--out", tmp_path / "c.png").stdout
    assert "3.0000" in alone and "minus" not in alone


SAID = {"settings": {"accounting": "exact"}, "text": {"source": "text", "sha256": "a"}}


@pytest.mark.parametrize("tokens, change, named", [
    (["YQ=="], {}, None), (["YQ=="], {"text": None}, None), (["Yg=="], {}, "tokenizers"),
    (["YQ=="], {"settings": {"accounting": "paper"}}, "FLOP accountings"),
    (["Yg=="], {"text": {"source": "text", "sha256": "b"}}, "tokenizers and texts")])
def test_runs_of_different_things_are_said_to_be(tmp_path, drawn, tokens, change, named):
    runs = [make_run(tmp_path / name, {60: {"4": 3.0}}) for name in "ab"]
    for run, of_it, its in zip(runs, (["YQ=="], tokens), ({}, change)):
        config = json.loads((run / "config.json").read_text()) | SAID | its
        (run / "config.json").write_text(json.dumps(config))
        (run / "tokenizer.json").write_text(json.dumps({"name": "x", "tokens": of_it}))
    said = f"these runs have different {named}: compare nothing that depends on them"
    done = script("tools/curves.py", *runs, "--out", tmp_path / "c.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("these runs") == done.stdout.count(said) == (named is not None)
    assert drawn.pop().get_suptitle() == (said if named else "")


def test_one_run_alone_shows_what_steers_it(tmp_path, drawn):
    run = make_run(tmp_path / "a", {30: {"4": 3.1}, 60: {"1": 3.5, "4": 3.0}})
    assert draw(tmp_path, run)
    rate, norm, size = drawn[0].axes[3:]
    np.testing.assert_allclose(rate.lines[0].get_ydata(), np.full(60, 0.01))
    np.testing.assert_allclose(norm.lines[0].get_ydata(), 1 / np.arange(1, 61))
    sizes = {line.get_label(): line.get_xydata().tolist() for line in size.lines}
    assert sizes == {"T = 1": [[30720, 120]], "T = 4": [[15360, 60], [30720, 120]]}


@pytest.mark.parametrize("change", [
    {"evaluations": {}}, {"evaluations": {}, "steps": 1},
    {"evaluations": {1: {"4": 3}}, "steps": 1},
    {"evaluations": {60: {"4": 3}}, "looped": False}, {"evaluations": {60: {"4": math.nan}}},
    {"evaluations": {}, "loss": lambda step: math.nan, "grad_norm": lambda step: math.nan}])
def test_runs_with_little_in_them_are_drawn(tmp_path, change):
    one, two = (make_run(tmp_path / name, **change) for name in "ab")
    assert draw(tmp_path, one) and draw(tmp_path, one, two)


def test_runs_not_evaluated_at_their_mean_are_drawn_without_val_losses(tmp_path, drawn):
    runs = [make_run(tmp_path / T, {60: {T: 3.0}}) for T in "28"]
    assert draw(tmp_path, *runs)
    assert drawn[0].axes[0].get_legend().get_title().get_text() == "line: train loss"


def test_the_mean_is_centred_and_has_no_hook_at_its_ends():
    line = np.arange(1000.0)
    means = curves.smooth(line)
    np.testing.assert_allclose(means[10:-10], line[10:-10])
    assert means[0] == 5 and means[-1] == 994  # of eleven values each
    line[-1] += 110
    assert curves.smooth(line)[-1] == 994 + 10  # it counts as one of eleven
    line[400:430] = math.nan
    means = curves.smooth(line)
    assert np.isnan(means[410:420]).all() and np.isfinite(means[:410]).all()
    assert means[410 - 1] == 399 and curves.smooth(np.array([3.0])).tolist() == [3]


def test_val_losses_are_at_the_mean_recurrence_of_each_run(tmp_path):
    four = make_run(tmp_path / "a", {30: {"4": 3.1}, 60: {"1": 3.5, "4": 3.0, "16": 2.9}})
    once = make_run(tmp_path / "b", {30: {"1": 3.2}, 60: {"1": 3.1, "4": 3.3}}, mean=1)
    plain = make_run(tmp_path / "c", {60: {"1": 3.3}}, looped=False)
    four, once, plain = (curves.read_run(path) for path in (four, once, plain))
    assert four["val"]["loss"] == [3.1, 3.0] and (four["label"], four["T"]) == ("a", 4)
    assert once["val"]["loss"] == [3.2, 3.1] and plain["val"]["loss"] == [3.3]


def test_runs_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "x").mkdir()
    paths = [make_run(tmp_path / name, {}) for name in ("a", "b", "x/a")]
    labels = [run["label"] for run in curves.read_runs(paths)]
    assert labels == [str(paths[0]), "b", str(paths[2])]


LINE = json.dumps({"kind": "train", "step": 1, "tokens": 1, "flops": 1, "seconds": 1, "loss": 3,
                   "lr": 1, "grad_norm": 1})


@pytest.mark.parametrize("log, message", [
    (None, "has no log.jsonl"), ("", "has no training step yet"), ("3\n[]\n", "is not the log"),
    (LINE[:40], "has no training step yet"),
    ('{"kind": "train"}\n', "is not the log of a run of train"),
    (LINE + '\n{"kind": "eval", "val_loss": 3}\n', "is not the log"),
    (LINE.replace("3", '"x"') + "\n", "is not the log")])
def test_a_run_without_a_log_gets_one_line(tmp_path, log, message):
    (tmp_path / "config.json").write_text('{"model": {"n_recurrent": 1, "mean_recurrence": 4}}')
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    done = script("tools/curves.py", tmp_path, "--out", tmp_path / "curves.png")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("config", ["{}", '{"model": 3}', "[]", "x"])
def test_a_config_of_something_else_gets_one_line(tmp_path, config):
    run = make_run(tmp_path / "a", {})
    (run / "config.json").write_text(config)
    done = script("tools/curves.py", run, "--out", tmp_path / "curves.png")
    assert done.returncode == 2 and "config.json" in done.stderr and done.stderr.count("\n") == 1


def test_a_run_that_replaces_another_is_the_one_drawn(tmp_path):
    run = make_run(tmp_path / "a", {60: {"4": 3.0}})
    make_run(run / ".new", {}, steps=5)
    assert len(curves.read_run(run)["loss"]) == 60  # a dead process left that
    (run / ".lock").touch()
    new = curves.read_run(run)
    assert new["label"] == "a" and len(new["loss"]) == 5


def test_no_matplotlib_gets_one_line(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", {})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = script("tools/curves.py", run)
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr
