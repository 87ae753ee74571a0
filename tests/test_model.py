import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import cache_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import INJECTIONS, PRESETS, KVCache, Parcae, ParcaeConfig, UserError
from tools.published import our_name


def executed_flops(run):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name, parameters, flops",
    [
        ("parcae-140m", 144_323_136, 1_359_902_976),
        ("parcae-370m", 388_003_328, 4_173_740_032),
        ("parcae-770m", 776_655_680, 8_859_905_280),
        ("parcae-1.3b", 1_338_591_744, 15_833_634_816),
    ],
)
def test_published_sizes_and_flops(name, parameters, flops):
    with torch.device("meta"):
        model = Parcae(ParcaeConfig(**PRESETS[name]))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.flops_per_token(accounting="paper") == flops


# ------------------------------------------------------------------ the loop


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.any_config
def test_each_row_loops_as_if_it_were_alone(build, tokens, injection):
    model = build(injection=injection, value_embeds=True, state_init="zero").train()
    depths = torch.tensor([3, 1, 7, 4, 1, 9])
    logits, _ = model(tokens, depths=depths)
    _, loss = model(tokens, tokens, depths=depths)
    loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, depth in enumerate(depths):
        alone, _ = model(tokens[row : row + 1], recurrence=int(depth))
        _, loss = model(tokens[row : row + 1], tokens[row : row + 1], recurrence=int(depth))
        torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-5, rtol=1e-4)
        (loss / len(depths)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(together[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)


class WithLoopVectors(Parcae):
    """What people add first: a learned vector for each loop."""

    def __init__(self, config):
        super().__init__(config)
        self.vectors = torch.nn.Parameter(torch.randn(20, config.n_embd))

    def recurrent_pass(self, h, u, inputs, cache=None, t=0):
        return super().recurrent_pass(h + self.vectors[t], u, inputs, cache, t)


@pytest.mark.any_config
def test_a_loop_knows_its_number_in_training_and_in_generation(build, tokens):
    model = WithLoopVectors(build(state_init="zero", backprop_depth=2).config)
    with torch.no_grad():
        for p in model.matrices():
            p.normal_(std=0.2)
    depths = torch.tensor([3, 1, 7, 4, 1, 9])
    together = model.train()(tokens, depths=depths)[0]
    for row, depth in enumerate(depths.tolist()):
        alone = model(tokens[row : row + 1], recurrence=depth)[0]
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    model.eval()
    for loops, (h, inputs) in enumerate(model.states(tokens, 9), start=1):
        logits = model.lm_head(model.readout(h, inputs))
        torch.testing.assert_close(logits, model(tokens, recurrence=loops)[0], atol=1e-5, rtol=1e-4)
    assert not torch.equal(h, [*model.states(tokens, 8)][-1][0])


def test_gradient_is_that_of_the_loop_written_out(build, tokens):
    """eq. 3 step by step, the state detached before the last backprop_depth loops."""
    model = build(backprop_depth=2, state_init="zero").train()
    _, loss = model(tokens, tokens, recurrence=5)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    rope, inject = model.rope[:, : tokens.shape[1]], model.injection
    A = -inject.log_A.exp()
    dt = torch.log1p(inject.dt_bias.exp())
    x = model.wte(tokens)
    for block in model.prelude:
        x = block(x, rope)
    e = model.norm_prelude(x)
    h = torch.zeros_like(e)
    for t in range(5):
        h = h.detach() if t == 3 else h
        h = torch.exp(dt * A) * h + dt * (e @ inject.B.T)
        for block in model.recurrent:
            h = block(h, rope)
    x = model.C_proj(h)
    for block in model.coda:
        x = block(x, rope)
    logits = model.norm_f(x) @ model.wte.weight.T
    expected = -logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "log_A, dt_bias", [(-40, -40), (0, 0), (40, 40), (-40, 40), (0.3, -100), (100, 100)]
)
def test_state_matrix_is_stable_whatever_is_learned(build, log_A, dt_bias):
    injection = build().injection
    torch.nn.init.constant_(injection.log_A, log_A)
    torch.nn.init.constant_(injection.dt_bias, dt_bias)
    assert ((0 < injection.A_bar()) & (injection.A_bar() < 1)).all()


def test_diagonal_rule_starts_at_the_papers_values(build):
    injection = build().injection
    torch.testing.assert_close(injection.A_bar(), torch.full((32,), math.sqrt(1 / 5)))
    torch.testing.assert_close(injection.B, torch.eye(32))


def test_state_settles_under_the_diagonal_rule(build, tokens):
    model = build(mean_recurrence=8).eval()
    logits = [model(tokens, recurrence=T)[0] for T in (1, 64, 128)]
    assert (logits[2] - logits[1]).abs().max() < 1e-2 * (logits[2] - logits[0]).abs().max()


def test_training_starts_from_noise_and_evaluation_from_zero(build, tokens):
    model = build().train()
    a, b = (model(tokens, recurrence=2)[0] for _ in range(2))
    assert not torch.equal(a, b)
    model.eval()
    a, b = (model(tokens)[0] for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(a, model(tokens, recurrence=4)[0])  # mean_recurrence
    assert not model.begin(tokens)[2].any()


def test_initial_weights_and_optimisers_are_the_published_ones():
    """parcae-140m, its vocabulary cut to 1,024; init.json has every tensor of theirs."""
    expected = json.loads((Path(__file__).parent / "init.json").read_text())["parameters"]
    torch.manual_seed(0)
    model = Parcae(ParcaeConfig(**PRESETS["parcae-140m"] | {"vocab_size": 1024}))
    muon = {id(p) for p in model.matrices()}
    found = dict(model.named_parameters())
    assert {our_name(name) for name in expected} == found.keys()
    for name, theirs in expected.items():
        p = found[our_name(name)]
        assert list(p.shape) == theirs["shape"], name
        assert ("muon" if id(p) in muon else "adamw") == theirs["trained_by"], name
        gate = "ve_gate" in name  # 192 numbers: their standard deviation varies by some 3 %
        std = p.std(correction=0).item()
        assert std == pytest.approx(theirs["std"], rel=0.15 if gate else 0.01, abs=1e-5), name
        mean = p.mean().item()
        assert mean == pytest.approx(theirs["mean"], abs=0.05 if gate else 3e-3), name
        largest = p.abs().max().item()
        assert largest == pytest.approx(theirs["absmax"], rel=0.2 if std else 1e-4), name
    for block in model.recurrent:
        singular = torch.linalg.svdvals(block.attn.c_q.weight.detach())
        torch.testing.assert_close(singular, singular[0].expand_as(singular))


@pytest.mark.any_config
def test_future_tokens_change_nothing(build, tokens):
    model = build(value_embeds=True).eval()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    a, b = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert (a[:, 9:] - b[:, 9:]).abs().max() > 1e-3


@pytest.mark.any_config
def test_bf16_activations_and_float32_agree(build, tokens):
    model = build(value_embeds=True).eval()
    exact = model(tokens)[0]
    model.compute_dtype = torch.bfloat16
    assert 0 < (model(tokens)[0] - exact).abs().mean() < 0.03 * exact.std()


def test_plain_transformer_is_an_empty_loop(build, tokens):
    model = build(n_prelude=3, n_recurrent=0, n_coda=0)
    assert not any(
        "injection" in name or "C_proj" in name or "norm_prelude" in name
        for name, _ in model.named_parameters()
    )
    assert torch.equal(model.eval()(tokens, recurrence=1)[0], model(tokens, recurrence=9)[0])
    assert (model.sample_depths(8) == 1).all()


# ------------------------------------------------------------------ depths


@pytest.mark.parametrize("mean", [2, 8, 40])
def test_depths_are_poisson_and_at_least_one(build, mean):
    model, n, batches = build(mean_recurrence=mean), 32, 2000
    generator = torch.Generator().manual_seed(0)
    depths = torch.stack([model.sample_depths(n, generator) for _ in range(batches)])
    assert depths.dtype == torch.int64 and depths.min() >= 1
    assert depths.double().mean() == pytest.approx(mean + math.exp(-mean), rel=2e-3)
    for k in range(1, 3 * mean):  # P(T = k), each within 5 standard errors of independent draws
        p = math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) + (k == 1) * math.exp(-mean)
        error = math.sqrt(p * (1 - p) / (n * batches))
        assert (depths == k).double().mean() == pytest.approx(p, abs=5 * error + 1e-6)
    # shuffled: no place in the batch is deeper than another
    assert depths.double().mean(0) == pytest.approx(
        [mean] * n, abs=0.2 + 6 * math.sqrt(mean / batches)
    )
    # stratified: totals vary far less than those of independent draws, sd sqrt(n * mean)
    assert depths.sum(1).double().std() < 0.25 * math.sqrt(n * mean)


def test_depths_repeat_with_a_seed_and_mean_one_is_fixed(build):
    model = build()
    draws = [model.sample_depths(32, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert (build(mean_recurrence=1).sample_depths(100) == 1).all()


# ------------------------------------------------------------------ FLOPs and memory


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"value_embeds": True, "tie_embeddings": False},
        {"injection": "add"},
        {"injection": "concat"},
        {"mean_recurrence": 1},
        {"n_prelude": 4, "n_recurrent": 0, "n_coda": 0},
        {"n_prelude": 0, "n_coda": 0},
    ],
    ids=["looped", "value-embeds-untied", "add", "concat", "fixed", "plain", "loop-only"],
)
@pytest.mark.any_config
def test_flops_per_token_are_those_executed(build, kwargs):
    model = build(n_embd=64, block_size=32, backprop_depth=2, **kwargs)
    for S, T in ((32, 1), (32, 2), (8, 6)):
        idx = torch.randint(50, (4, S))
        assert model.flops_per_token(T, context=S) * idx.numel() == pytest.approx(
            executed_flops(lambda: model.train()(idx, idx, recurrence=T)[1].backward()),  # noqa: B023
            rel=5e-3,
        )
        with torch.no_grad():
            assert model.flops_per_token(T, 0, context=S) * idx.numel() == pytest.approx(
                executed_flops(lambda: model.eval()(idx, recurrence=T)),  # noqa: B023
                rel=5e-3,
            )


@pytest.mark.any_config
def test_only_live_rows_are_computed(build):
    model = build(mean_recurrence=8, n_embd=64)
    idx, depths = (
        torch.randint(50, (32, 32)),
        model.sample_depths(32, torch.Generator().manual_seed(0)),
    )
    needed = sum(32 * model.flops_per_token(int(T)) for T in depths)
    assert executed_flops(lambda: model(idx, idx, depths=depths)[1].backward()) == pytest.approx(
        needed, rel=0.02
    )


@pytest.mark.any_config
def test_activation_memory_depends_on_backprop_depth_alone(build, tokens):
    def saved_bytes(recurrence, backprop_depth):
        model = build(backprop_depth=backprop_depth).train()
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (
                t,
                sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()),
            )[0],
            lambda t: t,
        ):
            model(tokens, tokens, recurrence=recurrence)
        return sum(sizes.values())

    assert saved_bytes(64, 4) == pytest.approx(saved_bytes(8, 4), rel=0.01)
    assert saved_bytes(64, 8) > 1.3 * saved_bytes(64, 4)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.any_config
def test_loss_without_the_logits(build, monkeypatch, dtype, close):
    model = build(state_init="zero").train()
    model.compute_dtype = dtype
    idx, targets = torch.randint(50, (2, 6, 32))
    targets[0, :20] = -100
    results = []
    monkeypatch.setattr("parts.layers.CHUNK", 50)
    for written_out in (False, True):
        model.zero_grad()
        if written_out:
            logits = model(idx, recurrence=3)[0].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
        else:
            logits, loss = model(idx, targets, recurrence=3)
            assert logits is None
        (2 * loss).backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results):
        assert (a - b).norm() <= close * b.norm()


# ------------------------------------------------------------------ generation


@pytest.mark.parametrize(
    "kwargs", [{}, {"value_embeds": True, "injection": "concat"}, {"n_recurrent": 0}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.any_config
def test_cached_logits_are_those_without_cache(build, tokens, kwargs, dtype):
    model = build(**kwargs).eval()
    model.compute_dtype = dtype
    full = model(tokens, recurrence=3)[0]
    cache = KVCache(model.config, len(tokens), 16, 3, tokens.device, dtype)
    with torch.no_grad():
        pieces = [
            model.advance(tokens[:, a:b], cache, 0, 3)[0]
            for a, b in ((0, 5), (5, 6), (6, 7), (7, 12), (12, 16))
        ]
    torch.testing.assert_close(
        torch.cat(pieces, 1), full, atol=1e-5 if dtype == torch.float32 else 0.15, rtol=1e-4
    )


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"n_embd": 30, "n_head": 4}, "n_embd is 30, must be a multiple of 2 \\* n_head"),
        ({"injection": "mul"}, "injection is 'mul'"),
        ({"mean_recurrence": 0}, "mean_recurrence is 0, must be at least 1"),
        ({"n_coda": -1}, "n_coda is -1"),
        ({"state_init": "one"}, "state_init is 'one'"),
        ({"n_prelude": 0, "n_recurrent": 0, "n_coda": 0}, "n_recurrent is 0"),
    ],
)
def test_bad_configs_are_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        Parcae(ParcaeConfig(**kwargs))


def test_bad_calls_are_refused(build, tokens):
    model = build()
    for recurrence in (0, -1, 2.5):
        with pytest.raises(UserError, match=f"recurrence is {recurrence}, must be at least 1"):
            model(tokens, recurrence=recurrence)
    with pytest.raises(UserError, match="depths has shape"):
        model(tokens, depths=torch.tensor([1, 2]))
    with pytest.raises(UserError, match="40 tokens do not fit block_size 32"):
        model(torch.zeros(1, 40, dtype=torch.int64))
    with pytest.raises(UserError, match="accounting"):
        model.flops_per_token(accounting="guess")


def test_bad_files_are_refused(build, tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        Parcae.from_pretrained(tmp_path / "none")
    model = build()
    (tmp_path / "config.json").write_text(json.dumps({"model": asdict(model.config)}))
    with pytest.raises(UserError, match="ckpt.pt does not exist"):
        Parcae.from_pretrained(tmp_path)
    torch.save({"model": model.state_dict()}, tmp_path / "ckpt.pt")
    assert torch.equal(Parcae.from_pretrained(tmp_path).wte.weight, model.wte.weight)
    data = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a checkpoint"):
        Parcae.from_pretrained(tmp_path)
    torch.save({"model": {"wte.weight": model.wte.weight}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="do not fit its config.json: no C_proj.weight"):
        Parcae.from_pretrained(tmp_path)


def test_spectral_radius_is_the_growth_of_the_state_alone():
    for rule in INJECTIONS.values():
        injection = rule(16)
        with torch.no_grad():
            for p in injection.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
            h = torch.randn(
                1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
            )
            injection.double()
            norms = []
            for _ in range(4000):
                h = injection(h, torch.zeros_like(h))
                norms.append(h.norm())
                h = h / norms[-1]
        assert torch.stack(norms[2000:]).log().mean().exp().item() == pytest.approx(
            injection.spectral_radius().item(), rel=1e-3
        )


# ------------------------------------------------------------------ loop by loop


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.any_config
def test_every_loop_reads_as_if_it_were_the_last(build, tokens, injection):
    model = build(value_embeds=True, injection=injection).eval()
    read = [model.lm_head(model.readout(*state)) for state in model.states(tokens, 5)]
    assert len(read) == 5 and not next(model.states(tokens, 1))[0].requires_grad
    for loops, logits in enumerate(read, start=1):
        torch.testing.assert_close(logits, model(tokens, recurrence=loops)[0])


def test_a_plain_transformer_is_the_same_after_any_number_of_loops(build, tokens):
    model = build(n_recurrent=0, n_prelude=3)
    losses = [model(tokens, tokens, recurrence=loops)[1] for loops in (1, 5)]
    gradients = [torch.autograd.grad(loss, model.prelude[0].mlp.fc.weight)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*gradients)


@pytest.mark.parametrize("kind, pairs", [("per-loop", [1, 5, 5, 1]), ("shared", [1, 1, 1, 1])])
def test_the_cache_has_a_pair_for_each_layer_and_loop(build, tokens, kind, pairs):
    model = build().eval()
    cache = KVCache(model.config, 6, 16, 5, "cpu", torch.float32, kind)
    assert [len(p) for p in cache.pairs] == pairs
    assert cache_bytes(cache) == sum(pairs) * 2 * 6 * 16 * 32 * 4
    first, last = (cache.pair_of(1, t)[0] for t in (0, 4))
    assert last.shape == (6, 2, 16, 16)
    assert (first.data_ptr() == last.data_ptr()) == (kind == "shared")
    with pytest.raises(UserError, match="20 tokens do not fit a cache of 16"):
        cache.reserve(20)
    assert cache.pos == 0
    if kind == "per-loop":  # a sixth loop would overwrite another's
        with pytest.raises(IndexError):
            model.hidden(tokens, 6, KVCache(model.config, 6, 16, 5, "cpu", torch.float32))
        with pytest.raises(IndexError):  # one loop's own is not shared
            model.hidden(tokens, 2, KVCache(model.config, 6, 16, 1, "cpu", torch.float32))
    with torch.no_grad():
        model.hidden(tokens, 5, cache)
    assert cache.pos == 16 and cache.rows(torch.tensor([2, 2, 0])).pair_of(0)[0].shape[0] == 3


@torch.no_grad()
@pytest.mark.any_config
def test_a_loop_can_be_left_at_any_time(build, tokens):
    """What the cache then holds is that of a model with so many loops."""
    model = build(value_embeds=True).eval()
    caches = [KVCache(model.config, 6, 16, n, "cpu", torch.float32) for n in (5, 2)]
    for loops, state in enumerate(model.states(tokens[:, :9], 5, caches[0]), start=1):
        if loops == 2:
            model.readout(*state, caches[0])
            break
    model.advance(tokens[:, :9], caches[1], 0, 2)[0]
    a, b = (model.advance(tokens[:, 9:], cache, 0, 2)[0] for cache in caches)
    torch.testing.assert_close(a, b)
