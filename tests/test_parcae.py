"""parcae.py is the model, the cost and the training of model.py and train.py."""

import ast
import sys

import pytest
import torch
from conftest import ROOT

import parcae
import train
from model import PRESETS, Parcae, ParcaeConfig
from parts.settings import DEFAULT_PRESET, parse_args

# parcae.py's name of a weight: model.py's
NAMES = {".out.": ".attn.c_proj.", ".q.": ".attn.c_q.", ".k.": ".attn.c_k.", ".v.": ".attn.c_v.",
         ".gate.": ".attn.ve_gate.", ".up.": ".mlp.fc.", ".down.": ".mlp.proj."}


def name_there(name):
    """The name in model.py of a weight of parcae.py."""
    if name in ("log_A", "dt_bias", "B"):
        return f"injection.{name}"
    for here, there in NAMES.items():
        name = name.replace(here, there)
    if name.endswith(".table.weight"):
        part, i, _ = name.split(".", 2)
        first = {"prelude": 0, "recurrent": parcae.PRELUDE, "coda": parcae.PRELUDE + parcae.LOOP}
        return f"value_embeds.{first[part] + int(i)}.weight"
    return name


@pytest.fixture(params=[DEFAULT_PRESET, "parcae-nano"])  # the second has a prelude and a coda
def both(request, monkeypatch):
    """(parcae.py's model, model.py's with the same weights, {name in parcae.py: its weight}), all
    in float64."""
    # model.py computes its loss in float32, whatever the rest is in
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    config = ParcaeConfig(**PRESETS[request.param], vocab_size=parcae.VOCAB)
    for name, count in (("PRELUDE", config.n_prelude), ("LOOP", config.n_recurrent),
                        ("CODA", config.n_coda), ("LAYERS", config.n_layer)):
        monkeypatch.setattr(parcae, name, count)
    torch.manual_seed(0)
    mine = parcae.Parcae()
    with torch.no_grad():
        for name, p in mine.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                p.normal_(std=0.2)  # or layers would add nothing
    theirs = Parcae(config)
    weights = {name_there(name): p.detach() for name, p in mine.named_parameters()}
    theirs.load_state_dict(weights | {"lm_head.weight": weights["wte.weight"]})
    return mine.double(), theirs.double(), dict(mine.named_parameters())


def test_logits_loss_and_gradients_are_those_of_model_py(both):
    mine, theirs, weights = both
    tokens = torch.randint(parcae.VOCAB, (4, 33), generator=torch.Generator().manual_seed(1))
    idx, targets, depths = tokens[:, :-1], tokens[:, 1:], torch.tensor([3, 1, 6, 2])
    for T, (logits, (h, inputs)) in enumerate(zip(mine.every_loop(idx, 5), theirs.eval().states(
            idx, 5)), start=1):
        there = theirs.lm_head(theirs.readout(h, inputs))
        torch.testing.assert_close(logits, there, atol=1e-9, rtol=1e-9, msg=f"T = {T}")
    torch.manual_seed(2)  # of the noise
    loss = mine(idx, targets, depths)
    torch.manual_seed(2)
    _, there = theirs.train()(idx, targets, depths=depths)
    torch.testing.assert_close(loss, there, atol=1e-9, rtol=1e-9)
    loss.backward()
    there.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in weights.items():
        torch.testing.assert_close(p.grad, grads[name_there(name)], atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("depths", [[1, 1], [4, 4], [1, 2, 9, 5]])
def test_flops_are_those_of_model_py(both, depths):
    mine, theirs, _ = both
    depths = torch.tensor(depths)
    with_gradient = depths.clamp(max=parcae.GRADIENT_LOOPS).double().mean().item()
    there = theirs.flops_per_token(depths.double().mean().item(), with_gradient)
    assert mine.flops_per_token(depths) == pytest.approx(there, rel=1e-12)


def test_ten_steps_end_where_those_of_train_py_do(both):
    mine, theirs, weights = both
    theirs.train()
    args = parse_args("", ["--max-steps", "10"])
    optimizers = train.make_optimizers(theirs, args)
    ours = mine.optimizers()
    generator = torch.Generator().manual_seed(3)
    for step in range(10):
        tokens = torch.randint(parcae.VOCAB, (4, 33), generator=generator)
        idx, targets, depths = tokens[:, :-1], tokens[:, 1:], torch.tensor([4, 1, 3, 2])
        torch.manual_seed(step)
        loss = parcae.train_step(mine, ours, idx, targets, depths, step, steps=10)
        torch.manual_seed(step)
        there = theirs(idx, targets, depths=depths)[1]
        there.backward()
        there, _, finite = train.update(theirs, optimizers, args, there.detach(), step / 10, step)
        assert finite and loss == pytest.approx(there, rel=1e-6)
    moved = dict(theirs.named_parameters())
    for name, p in weights.items():
        # rounding decides whether a weight decays whose update is next to 0
        torch.testing.assert_close(p, moved[name_there(name)], atol=5e-4, rtol=1e-5, msg=name)


def test_its_weights_start_as_those_of_model_py_do():
    torch.manual_seed(0)
    there = dict(Parcae(ParcaeConfig(**PRESETS[DEFAULT_PRESET],
                                     vocab_size=parcae.VOCAB)).named_parameters())
    for name, p in parcae.Parcae().named_parameters():
        q = there[name_there(name)]
        assert p.std(correction=0).item() == pytest.approx(
            q.std(correction=0).item(), rel=0.3, abs=1e-6), name
        assert p.mean().item() == pytest.approx(q.mean().item(), abs=0.05), name


def test_its_constants_are_the_defaults_of_train_py():
    args, config = parse_args("", []), ParcaeConfig(**PRESETS[DEFAULT_PRESET])
    assert (parcae.D, parcae.H, parcae.CONTEXT) == (config.n_embd, config.n_head, config.block_size)
    assert (parcae.PRELUDE, parcae.LOOP, parcae.CODA) == (
        config.n_prelude, config.n_recurrent, config.n_coda)
    assert parcae.LAYERS == config.n_layer
    assert parcae.MEAN_LOOPS == config.mean_recurrence
    assert parcae.GRADIENT_LOOPS == config.backprop_depth
    assert parcae.BATCH == args.batch_size and parcae.STEPS == args.max_steps
    assert args.cooldown == 0.5 and args.grad_clip == 1
    assert parcae.RATE == args.muon_lr and parcae.DECAY == args.weight_decay


def test_it_is_one_file_that_a_reader_can_take_in():
    text = (ROOT / "parcae.py").read_text()
    lines = text.splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
            [node.module] if isinstance(node, ast.ImportFrom) else [])
        for name in names:
            assert name.split(".")[0] in {"torch", *sys.stdlib_module_names}


def test_it_trains_evaluates_and_writes_a_sample(monkeypatch, capsys, tmp_path):
    (tmp_path / "test").mkdir()
    for i in range(60):
        (tmp_path / f"{i}.py").write_bytes(b"x = 1\n" * 20)
    (tmp_path / "test" / "left-out.py").write_bytes(b"\xff" * 2000)
    monkeypatch.setattr(parcae.sysconfig, "get_paths", lambda *_, **__: {"stdlib": tmp_path})
    texts = [*parcae.read_stdlib()]
    assert [int((text == 256).sum()) for text in texts] == [len(texts[0]) // 121,
                                                            len(texts[1]) // 121]
    assert sum(map(len, texts)) == 60 * 121 and len(texts[0]) > len(texts[1]) > 0
    monkeypatch.setattr(parcae, "STEPS", 40)
    monkeypatch.setattr(parcae, "CONTEXT", 32)
    parcae.main()
    said = capsys.readouterr().out
    assert "step 39: loss" in said and "recurrence T   val loss (nats per token)" in said
    losses = [float(line.split()[1]) for line in said.splitlines() if line.startswith("     ")]
    assert len(losses) == 5 and all(loss < 1 for loss in losses)
    assert "a sample:\n" in said and "x = 1\nx = 1\n" in said


def test_the_rate_of_the_default_run_is_not_that_of_other_models():
    for flags, rate in (([], 2e-2), (["--preset", "parcae-140m"], 8e-3),
                        (["--init-from", "x"], 8e-3)):
        assert parse_args("", flags).muon_lr == rate
