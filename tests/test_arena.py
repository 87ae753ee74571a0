"""Rules and recipes that change the model from outside: each still counts and caches exactly."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from data import prepare
from model import Parcae, ParcaeConfig, UserError
from parts import muon
from runs import arena, first, recipe
from runs.common import split_name

CONFIG = ParcaeConfig(vocab_size=64, block_size=8, n_embd=32, n_head=2, n_prelude=1, n_recurrent=2,
                      n_coda=1, mean_recurrence=4)


def build(rule):
    """Return a model of a rule whose layers do add something."""
    torch.manual_seed(0)
    model = arena.RULES[rule][0](CONFIG)
    for name, p in model.named_parameters():
        if name.endswith("proj.weight") and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("rule", arena.RULES)
def test_a_rule_of_the_arena_counts_its_flops_and_generates_as_it_trains(rule):
    model = build(rule)
    idx, depths = torch.randint(64, (4, 8)), torch.tensor([3, 6, 1, 5])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.train()(idx, idx, depths=depths)[1].backward()
    loops, with_gradient = depths.double().mean(), depths.clamp(max=2).double().mean()
    expected = model.flops_per_token(loops.item(), with_gradient.item()) * idx.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)
    assert all(p.grad is not None for p in model.parameters())

    model.eval()
    logits, _ = model(idx, recurrence=3)
    cache = model.new_cache(4, 8, 3)
    cached = torch.cat([model.hidden(token, 3, cache) for token in idx.split(1, dim=1)], dim=1)
    torch.testing.assert_close(model.head(cached), logits, rtol=1e-4, atol=1e-5)
    *_, (h, inputs) = model.states(idx, 3)
    torch.testing.assert_close(model.head(model.readout(h, inputs)), logits)


def test_each_rule_of_the_arena_says_something_else():
    idx = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0))
    losses = {}
    for rule in set(arena.RULES) - {"growing"}:  # which differs in the depths that are drawn
        torch.manual_seed(1)
        losses[rule] = round(build(rule).train()(idx, idx, depths=torch.tensor([4] * 4))[1].item(),
                             5)
    # these start where the diagonal rule does, and differ once they are trained
    starts_alike = {"diagonal", "concat", "euler", "loop-vector", "streams"}
    assert len({losses[rule] for rule in starts_alike}) == 1
    others = [loss for rule, loss in losses.items() if rule not in starts_alike]
    assert len({losses["diagonal"], *others}) == len(others) + 1


def test_loops_grow_during_training():
    args, model = SimpleNamespace(batch_size=4000), Parcae(CONFIG)
    means = [arena.grow(model, args, progress, 0).double().mean().item()
             for progress in (0, 0.4, 0.99)]
    assert means == pytest.approx([1, 2 + 0.135, 4 + 0.018], abs=0.01)
    six = Parcae(replace(CONFIG, mean_recurrence=6))  # no power of two
    assert arena.grow(six, args, 0.99, 0).double().mean().item() == pytest.approx(6, abs=0.01)


def test_runs_of_the_arena_are_named_by_rule_rate_and_seed():
    form = "RULE-RATE-SEED"
    assert split_name(Path("x/over-n-8e-3-0"), form, arena.RULES) == ["over-n", 0.008, 0]
    assert split_name(Path("zero-order-hold-1.6e-2-12"), form, arena.RULES) == [
        "zero-order-hold", 0.016, 12]
    for name in ("over-8e-3-0", "add-8e-3", "add-fast-0"):
        with pytest.raises(UserError, match=form):
            split_name(Path(name), form, arena.RULES)


def test_no_other_script_takes_a_run_of_a_rule_for_a_diagonal_one(tmp_path, monkeypatch):
    for name in ("Parcae", "SCRIPT"):
        monkeypatch.setattr(train, name, getattr(train, name))  # the arena changes them
    data, out = prepare("text", tmp_path / "data", "bytes", [ROOT / "model.py"]), tmp_path / "run"
    flags = ["--data", data, "--n-embd", 32, "--block-size", 32, "--batch-size", 2, "--device",
             "cpu", "--eval-sequences", 1, "--max-steps", 1]
    for more in (flags, ["--resume", "--max-steps", 2]):
        done = script("runs/arena.py", "--rule", "euler", "--out", out, *more)
        assert done.returncode == 0, done.stderr
    said = script("runs/arena.py", "--rule", "euler", "--out", out, "--overwrite", *flags).stdout
    assert f"python -m runs.arena --rule euler --out {out}" in said and "sample.py" not in said
    done = script("train.py", "--resume", "--out", out, "--max-steps", 3)
    assert done.returncode == 2
    assert "was trained by python -m runs.arena --rule euler: resume it with that" in done.stderr
    with pytest.raises(UserError, match="class Euler: only runs/arena.py reads it"):
        Parcae.from_pretrained(out)


@pytest.fixture
def undone(monkeypatch):
    """Return a function that undoes a part of the recipe until the test ends."""
    for owner, name in ((Parcae, "reset_parameters"), (Parcae, "matrices"), (train, "momentum_at"),
                        (muon, "POLAR_EXPRESS"), (muon, "even_out"), (muon, "decays")):
        monkeypatch.setattr(owner, name, getattr(owner, name))

    def undo(part):
        for change in recipe.PARTS[part][0]:
            change()
    return undo


def test_each_part_of_the_recipe_is_undone_alone(undone):
    config = ParcaeConfig(vocab_size=64, block_size=8, n_embd=64, n_head=2, n_prelude=1,
                          n_recurrent=2, n_coda=1, value_embeds=True)
    torch.manual_seed(0)
    published = Parcae(config)
    undone("tables")
    model = Parcae(config)
    assert model.value_embeds["1"].weight.std().item() == pytest.approx(model.init_std, rel=0.1)
    assert published.value_embeds["1"].weight.std().item() == pytest.approx(1, rel=0.1)
    undone("gates")
    gate = Parcae(config).recurrent[0].attn.ve_gate.weight
    assert gate.square().mean().sqrt().item() == pytest.approx(model.init_std, rel=0.1)
    gates = {id(p) for name, p in model.named_parameters() if name.endswith("ve_gate.weight")}
    assert gates <= {id(p) for p in model.matrices()}
    undone("adamw")
    assert gates and not gates & {id(p) for p in model.matrices()}
    assert train.momentum_at(0) == 0.85
    undone("momentum")
    assert train.momentum_at(0) == 0.95
    X, v = torch.randn(1, 4, 8), torch.zeros(1, 1, 8)
    assert not torch.equal(muon.even_out(X, v, 0.95), X)
    undone("uneven")
    assert torch.equal(muon.even_out(X, v, 0.95), X)
    undone("newton-schulz")
    assert len(muon.POLAR_EXPRESS) == 5 and len(set(muon.POLAR_EXPRESS)) == 1
    undone("decay")
    assert muon.decays(X, -X)


def arena_row(rule, rate, seed, loss):
    return {"rule": rule, "rate": rate, "seed": seed, "flops": 1e12, "spectral_radius": 0.5} | {
        f"val_loss_{T}": loss for T in arena.LOOPS}


def test_rules_of_ones_own_find_a_place_in_table_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(arena, "RULES", arena.RULES | {"a": (Parcae, "one"), "b": (Parcae, "two")})
    rows = [arena_row(rule, 0.02, 0, 1.0) for rule in arena.RULES]
    arena.draw(arena.print_table(rows), tmp_path / "arena.png")
    assert len(rows) == 14 and (tmp_path / "arena.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_the_arena_compares_seed_by_seed_at_the_rate_of_most_runs(capsys):
    rows = [arena_row("diagonal", 0.02, seed, 1 + seed / 10) for seed in range(4)]
    rows += [arena_row("add", 0.02, seed, 1.2 + seed / 10) for seed in range(3)]
    rows += [arena_row("add", 0.04, 0, 0.5), arena_row("euler", 0.01, 0, 1.5),
             arena_row("euler", 0.02, 0, 1.4)]
    chosen = arena.print_table(rows)
    assert {rule: [row["seed"] for row in mine] for rule, mine in chosen.items()} == {
        "diagonal": [1, 2, 3],  # with three others, seed 0 does not count
        "add": [0, 1, 2], "euler": [0]}
    assert [*chosen] == ["diagonal", "add", "euler"]  # the best first
    said = capsys.readouterr().out
    assert "add: seed 0 by rate 0.02: 1.2000, 0.04: 0.5000" in said
    assert "| h + e | " + "1.3000 | " * 5 + "+0.2000 (0.0000) |" in said
    assert "| Euler's step for A | " + "1.4000 | " * 5 + " |" in said  # no seed in common


def test_a_plain_model_is_compared_with_the_looped_default_of_its_seed():
    looped = [first.DEFAULT | {"seed": seed, "tokens": 10, "val_loss_1": 9, "val_loss_4": 1 + seed}
              for seed in range(3)]
    others = [{"channels": 52, "layers": "2/0/0", "variant": "", "mean_recurrence": 1, "rate": rate,
               "seed": seed, "tokens": 20, "val_loss_1": 0.5 + seed}
              for rate, seed in ((0.02, 1), (0.02, 2), (0.02, 7), (0.04, 0))]
    assert list(first.rivals(looped + others)) == [(52, "2/0/0", 20, {1: -0.5, 2: -0.5})]
