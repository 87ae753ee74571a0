import json
import math
import sys
import types
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import INJECTIONS, PRESETS, KVCache, Parcae, ParcaeConfig, Settled, UserError, _our_name

PARITY = json.loads((Path(__file__).parent / "parity.json").read_text())


def executed_flops(run):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()

# ------------------------------------------------------------------ agreement with the published implementation


@pytest.fixture
def published(tmp_path):
    """A directory in the published format, its parameters filled by a rule from their names."""
    theirs = {"injection.log_A": "adapter.A_log", "injection.": "adapter.", "recurrent.": "core_block.",
              "C_proj.": "C.", "norm_f.": "ln_f.", "norm_prelude.": "ln_prelude."}
    c = PARITY["config"]
    model = Parcae(ParcaeConfig(c["vocab_size"], c["block_size"], c["n_embd"], 2, 2, 2, 2, mlp_width=64, value_embeds=True))
    weights = {}
    for name, p in model.named_parameters():
        for ours, published in theirs.items():
            if name.startswith(ours):
                name = published + name.removeprefix(ours)
                break
        name = name if name.startswith("value_embeds") else "transformer." + name
        phase = (zlib.crc32(name.encode()) % 10007) / 1000
        w = torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + phase).view(p.shape)
        w = w / p.shape[1] ** 0.5 if p.ndim == 2 else 0.1 * w + ("norm" in name or ".ln_" in name)
        weights[name] = w.float()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    weights["freqs_cis"] = torch.zeros(1, 24, 1, 8, 2)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(PARITY["config"]))
    return tmp_path


@pytest.mark.parametrize("recurrence", [1, 2, 4, 8])
def test_logits_of_the_published_implementation(published, recurrence):
    model = Parcae.from_pretrained(published)
    logits, loss = model(torch.tensor(PARITY["tokens"]), recurrence=recurrence)
    assert loss is None and logits.dtype == torch.float32
    torch.testing.assert_close(logits[0], torch.tensor(PARITY["logits"][str(recurrence)]), atol=1e-4, rtol=0)


def test_training_step_of_the_published_implementation(published):
    model, step = Parcae.from_pretrained(published).train(), PARITY["train"]
    _, loss = model(torch.tensor(PARITY["tokens"]), torch.tensor(step["targets"]), depths=torch.tensor(step["depths"]))
    loss.backward()
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert loss.item() == pytest.approx(step["loss"], rel=1e-4)
    assert total == pytest.approx(step["total_grad_norm"], rel=1e-4)
    ours = dict(model.named_parameters())
    for name, norm in step["grad_norm"].items():
        assert ours[_our_name(name)].grad.norm().item() == pytest.approx(norm, rel=1e-3), name


@pytest.mark.parametrize("name, parameters, flops", [
    ("parcae-140m", 144_323_136, 1_359_902_976), ("parcae-370m", 388_003_328, 4_173_740_032),
    ("parcae-770m", 776_655_680, 8_859_905_280), ("parcae-1.3b", 1_338_591_744, 15_833_634_816)])
def test_published_sizes_and_flops(name, parameters, flops):
    with torch.device("meta"):
        model = Parcae(ParcaeConfig(**PRESETS[name]))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.flops_per_token(accounting="paper") == flops

# ------------------------------------------------------------------ the loop


@pytest.mark.parametrize("injection", INJECTIONS)
def test_each_row_loops_as_if_it_were_alone(build, tokens, injection):
    model = build(injection=injection, value_embeds=True, state_init="zero").train()
    depths = torch.tensor([3, 1, 7, 4, 1, 9])
    logits, loss = model(tokens, tokens, depths=depths)
    loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, depth in enumerate(depths):
        alone, loss = model(tokens[row:row + 1], tokens[row:row + 1], recurrence=int(depth))
        torch.testing.assert_close(logits[row:row + 1], alone, atol=1e-5, rtol=1e-4)
        (loss / len(depths)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(together[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_gradient_is_that_of_the_loop_written_out(build, tokens):
    """eq. 3 step by step, the state detached before the last backprop_depth loops."""
    model = build(backprop_depth=2, state_init="zero").train()
    _, loss = model(tokens, tokens, recurrence=5)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    rope, inject = model.rope[:, :tokens.shape[1]], model.injection
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


@pytest.mark.parametrize("log_A, dt_bias", [(-40, -40), (0, 0), (40, 40), (-40, 40), (0.3, -100), (100, 100)])
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


def test_initial_weights(build):
    torch.manual_seed(0)
    model = Parcae(ParcaeConfig(vocab_size=500, n_embd=64, n_head=2))
    std = math.sqrt(2 / (5 * 64))
    assert model.wte.weight.std().item() == pytest.approx(std, rel=0.02)
    for block in [*model.prelude, *model.recurrent, *model.coda]:
        assert block.attn.c_proj.weight.abs().max() == block.mlp.proj.weight.abs().max() == 0
        for w in (block.attn.c_q.weight, block.mlp.fc.weight):
            assert w.std().item() == pytest.approx(std, rel=0.02)
            singular = torch.linalg.svdvals(w.detach())
            torch.testing.assert_close(singular, singular[0].expand_as(singular))


def test_future_tokens_change_nothing(build, tokens):
    model = build(value_embeds=True).eval()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    a, b = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert (a[:, 9:] - b[:, 9:]).abs().max() > 1e-3


def test_bf16_activations_and_float32_agree(build, tokens):
    model = build(value_embeds=True).eval()
    exact = model(tokens)[0]
    model.compute_dtype = torch.bfloat16
    assert (model(tokens)[0] - exact).abs().mean() < 0.03 * exact.std()


def test_plain_transformer_is_an_empty_loop(build, tokens):
    model = build(n_prelude=3, n_recurrent=0, n_coda=0)
    assert not any("injection" in name or "C_proj" in name or "prelude_norm" in name for name, _ in model.named_parameters())
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
    assert depths.double().mean(0) == pytest.approx([mean] * n, abs=0.2 + 6 * math.sqrt(mean / batches))
    # stratified: totals vary far less than those of independent draws, sd sqrt(n * mean)
    assert depths.sum(1).double().std() < 0.25 * math.sqrt(n * mean)


def test_depths_repeat_with_a_seed_and_mean_one_is_fixed(build):
    model = build()
    draws = [model.sample_depths(32, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert (build(mean_recurrence=1).sample_depths(100) == 1).all()

# ------------------------------------------------------------------ FLOPs and memory


@pytest.mark.parametrize("kwargs", [
    {}, {"value_embeds": True, "tie_embeddings": False}, {"injection": "add"}, {"injection": "concat"},
    {"mean_recurrence": 1}, {"n_prelude": 4, "n_recurrent": 0, "n_coda": 0}, {"n_prelude": 0, "n_coda": 0}],
    ids=["looped", "value-embeds-untied", "add", "concat", "fixed", "plain", "loop-only"])
def test_flops_per_token_are_those_executed(build, kwargs):
    model = build(n_embd=64, block_size=32, backprop_depth=2, **kwargs)
    idx = torch.randint(50, (4, 32))
    for T in (1, 2, 6):
        assert model.flops_per_token(T) * idx.numel() == pytest.approx(executed_flops(
            lambda: model.train()(idx, idx, recurrence=T)[1].backward()), rel=5e-3)  # noqa: B023
        with torch.no_grad():
            assert model.flops_per_token(T, backprop_depth=0) * idx.numel() == pytest.approx(executed_flops(
                lambda: model.eval()(idx, recurrence=T)), rel=5e-3)  # noqa: B023


def test_only_live_rows_are_computed(build):
    model = build(mean_recurrence=8, n_embd=64)
    idx, depths = torch.randint(50, (32, 32)), model.sample_depths(32, torch.Generator().manual_seed(0))
    needed = sum(32 * model.flops_per_token(int(T)) for T in depths)
    assert executed_flops(lambda: model(idx, idx, depths=depths)[1].backward()) == pytest.approx(needed, rel=0.02)


def test_activation_memory_depends_on_backprop_depth_alone(build, tokens):
    def saved_bytes(recurrence, backprop_depth):
        model = build(backprop_depth=backprop_depth).train()
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: (t, sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()))[0], lambda t: t):
            model(tokens, tokens, recurrence=recurrence)
        return sum(sizes.values())
    assert saved_bytes(64, 4) == pytest.approx(saved_bytes(8, 4), rel=0.01)
    assert saved_bytes(64, 8) > 1.3 * saved_bytes(64, 4)

@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_without_the_logits(build, monkeypatch, dtype, close):
    model = build(state_init="zero").train()
    model.compute_dtype = dtype
    idx, targets = torch.randint(50, (2, 6, 32))
    targets[0, :20] = -100
    results = []
    for chunk in (50, 10_000):
        monkeypatch.setattr("model.CHUNK", chunk)
        model.zero_grad()
        logits, loss = model(idx, targets, recurrence=3)
        (2 * loss).backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters())])
        assert (logits is None) == (chunk == 50)
    for a, b in zip(*results):
        assert (a - b).norm() <= close * b.norm()

# ------------------------------------------------------------------ generation


@pytest.mark.parametrize("kwargs", [{}, {"value_embeds": True, "injection": "concat"}, {"n_recurrent": 0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_logits_are_those_without_cache(build, tokens, kwargs, dtype):
    model = build(**kwargs).eval()
    model.compute_dtype = dtype
    full = model(tokens, recurrence=3)[0]
    cache = KVCache(model.config, len(tokens), 16, 3, tokens.device, dtype)
    with torch.no_grad():
        pieces = [model(tokens[:, a:b], recurrence=3, cache=cache)[0] for a, b in ((0, 5), (5, 6), (6, 7), (7, 12), (12, 16))]
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-5 if dtype == torch.float32 else 0.15, rtol=1e-4)


def test_compiled_decoding_step_is_one_graph_for_all_positions(build, tokens):
    model, graphs = build(value_embeds=True, block_size=32).eval(), []
    plain = model.generate(tokens, 16, recurrence=3, temperature=0)
    torch._dynamo.reset()
    model.step = torch.compile(model.step, dynamic=True, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    assert torch.equal(model.generate(tokens, 16, recurrence=3, temperature=0), plain)
    assert len(graphs) == 1


@pytest.mark.parametrize("recurrence", [1, 5, None])
def test_greedy_generation_slides_over_the_last_block(build, tokens, recurrence):
    model = build(value_embeds=True, block_size=20).eval()
    out = model.generate(tokens, 12, recurrence=recurrence, temperature=0)
    idx = tokens
    for _ in range(12):
        idx = torch.cat([idx, model(idx[:, -20:], recurrence=recurrence)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(out, idx)


def test_sampling_is_seeded_and_follows_the_logits(build, tokens):
    model = build().train()
    def draw(seed, **options):
        return model.generate(tokens[:1].repeat(500, 1), 1, generator=torch.Generator().manual_seed(seed), **options)[:, -1]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert model.training
    probs = model.eval()(tokens[:1])[0][0, -1].div(0.5).softmax(-1)
    counts = torch.bincount(draw(0, temperature=0.5), minlength=50) / 500
    assert (counts - probs).abs().max() < 5 * (0.25 / 500) ** 0.5
    ranked = probs.argsort(descending=True)
    assert set(draw(0, top_k=3).tolist()) == set(ranked[:3].tolist())
    nucleus = int((model(tokens[:1])[0][0, -1].softmax(-1).sort(descending=True).values.cumsum(-1) < 0.3).sum()) + 1
    assert set(draw(0, top_p=0.3).tolist()) == set(ranked[:nucleus].tolist())
    assert torch.equal(draw(0, top_k=1), draw(0, temperature=0))

# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("kwargs, message", [
    ({"n_embd": 30, "n_head": 4}, "n_embd is 30, must be a multiple of 2 \\* n_head"), ({"injection": "mul"}, "injection is 'mul'"),
    ({"mean_recurrence": 0}, "mean_recurrence is 0, must be at least 1"), ({"n_coda": -1}, "n_coda is -1"),
    ({"state_init": "one"}, "state_init is 'one'"), ({"n_prelude": 0, "n_recurrent": 0, "n_coda": 0}, "n_recurrent is 0")])
def test_bad_configs_are_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        ParcaeConfig(**kwargs)


def test_bad_calls_are_refused(build, tokens):
    model = build()
    for recurrence in (0, -1):
        with pytest.raises(UserError, match=f"recurrence is {recurrence}, must be at least 1"):
            model(tokens, recurrence=recurrence)
    with pytest.raises(UserError, match="depths has shape"):
        model(tokens, depths=torch.tensor([1, 2]))
    with pytest.raises(UserError, match="40 tokens do not fit block_size 32"):
        model(torch.zeros(1, 40, dtype=torch.int64))
    for options, message in (({"temperature": -1}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 1.5}, "top_p"),
                             ({"recurrence": 0}, "recurrence")):
        with pytest.raises(UserError, match=message):
            model.generate(tokens, 1, **options)
    with pytest.raises(UserError, match="prompt is empty"):
        model.generate(tokens[:, :0], 1)
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
    (tmp_path / "ckpt.pt").write_bytes(data[:len(data) // 2])
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
            h = torch.randn(1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            injection.double()
            norms = []
            for _ in range(4000):
                h = injection(h, torch.zeros_like(h))
                norms.append(h.norm())
                h = h / norms[-1]
        assert torch.stack(norms[2000:]).log().mean().exp().item() == pytest.approx(injection.spectral_radius().item(), rel=1e-3)

# ------------------------------------------------------------------ depth of its own for each token


@torch.no_grad()
@pytest.mark.parametrize("threshold, loops", [(0.0, 5), (math.inf, 2)])
def test_exit_never_and_at_once_are_fixed_depths(build, tokens, threshold, loops):
    model = build(value_embeds=True).eval()
    until = Settled(model, threshold)
    caches = [KVCache(model.config, 1, 16, n, "cpu", torch.float32, "shared") for n in (5, loops)]
    for t in range(16):
        ours = model.hidden(tokens[:1, t:t + 1], 5, cache=caches[0], until=until)
        fixed = model.hidden(tokens[:1, t:t + 1], loops, cache=caches[1])
        torch.testing.assert_close(ours, fixed)
    assert until.loops == [loops] * 16


@torch.no_grad()
def test_tokens_stop_when_their_prediction_settles(build, tokens):
    model = build().eval()
    cache, until = KVCache(model.config, 1, 16, 30, "cpu", torch.float32, "shared"), Settled(model, 1e-4)
    x = torch.cat([model.hidden(token, 30, cache=cache, until=until) for token in tokens[:1].split(1, dim=1)], 1)
    full = model.hidden(tokens[:1], 30)
    assert 2 < sum(until.loops) / 16 < 30 and len(set(until.loops)) > 1
    torch.testing.assert_close(model.lm_head(x).softmax(-1), model.lm_head(full).softmax(-1), atol=0.05, rtol=0)
    with pytest.raises(UserError, match="exit threshold is -1"):
        Settled(model, -1)

# ------------------------------------------------------------------ the published format


def test_the_published_names_come_back(published):
    before = torch.load(published / "pytorch_model.bin", weights_only=True)
    Parcae.from_pretrained(published).export(published / "again")
    after = torch.load(published / "again" / "pytorch_model.bin", weights_only=True)
    del before["freqs_cis"]
    assert before.keys() == after.keys() and all(torch.equal(w, after[name]) for name, w in before.items())
    assert not list((published / "again").glob("*.tmp"))
    ours, theirs = json.loads((published / "again" / "config.json").read_text()), PARITY["config"]
    assert {k: v for k, v in ours.items() if k in theirs and k != "state_init"} == {k: theirs[k] for k in ours if k != "state_init"}


@pytest.mark.parametrize("config", [
    {"value_embeds": True}, {"tie_embeddings": False, "prelude_norm": False}, {"injection": "concat"}, {"injection": "add"},
    {"n_prelude": 3, "n_recurrent": 0, "n_coda": 0, "value_embeds": True}, {"state_init": "zero", "mean_recurrence": 1, "mlp_width": 80}],
    ids=["looped", "untied", "concat", "add", "plain", "fixed depth"])
def test_an_exported_model_reads_back_identical(build, tokens, tmp_path, config):
    model = build(**config).eval()
    model.export(tmp_path)
    again = Parcae.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(tokens, recurrence=3)[0], model(tokens, recurrence=3)[0])


def test_a_gpt_in_one_stack_is_read(build, tokens, tmp_path):
    model = build(n_prelude=2, n_recurrent=0, n_coda=0).eval()
    model.export(tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save({name.replace(".prelude.", ".h."): w for name, w in weights.items()}, tmp_path / "model.pt")
    (tmp_path / "pytorch_model.bin").unlink()
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in ("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda", "injection_type", "prelude_norm",
                 "mean_recurrence", "mean_backprop_depth", "recurrent_embedding_dimension"):
        del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings | {"n_layer": 2}))
    assert torch.equal(Parcae.from_pretrained(tmp_path)(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("change, said", [
    ({"logit_softcap": 30.0}, "logit_softcap is 30.0, which is not implemented here"), ({"bias": True}, "bias is True"),
    ({"nonlin_name": "GELU"}, "nonlin_name is 'GELU', which is not implemented here, only 'ReLU2'"),
    ({"num_key_value_heads": 1}, "num_key_value_heads is 1, which is not implemented here, only 2"),
    ({"rope_settings": {"use_rope": False, "rope_base": 1e4}}, "rope_settings.use_rope is False"), ({"a_new_thing": 3}, "a_new_thing is 3"),
    ({"injection_type": "gated"}, "injection is 'gated', must be one of diagonal"), ({"state_init": "embed"}, "state_init is 'embed'"),
    ({"block_size": "x"}, "is not the JSON of a model"), ({"recurrent_embedding_dimension": 64}, "recurrent_embedding_dimension is 64"),
    ({"n_embd": 64, "recurrent_embedding_dimension": 64}, r"C_proj.weight is \(32, 32\), must be \(64, 64\)"),
    ({"n_layers_in_coda": 1}, "no coda.0.attn.ve_gate.weight; .*unknown coda.1"), ({"n_layers_in_coda": 3}, "no coda.2")])
def test_what_is_not_implemented_is_refused_by_name(published, change, said):
    (published / "config.json").write_text(json.dumps(PARITY["config"] | change))
    with pytest.raises(UserError, match=said):
        Parcae.from_pretrained(published)


def test_foreign_files_are_refused(published):
    torch.save({"model": {"state": 1}}, published / "pytorch_model.bin")
    with pytest.raises(UserError, match="must hold a plain state dict"):
        Parcae.from_pretrained(published)
    for content, said in (("[1]", "is not the JSON of a model"), ("{", "is not the JSON of a model"), ("{}", "has no 'rope_settings'")):
        (published / "config.json").write_text(content)
        with pytest.raises(UserError, match=said):
            Parcae.from_pretrained(published)


def test_models_on_the_hub_need_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="some/model is on the Hugging Face hub: pip install huggingface_hub"):
        Parcae.from_pretrained("some/model")
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, allow_patterns: str(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(UserError, match=f"{tmp_path} holds no model"):
        Parcae.from_pretrained("some/model")
