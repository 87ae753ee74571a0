import math
from fractions import Fraction

import pytest
import torch
from conftest import save_run, script

from data import make_tokenizer
from model import KVCache, Parcae, UserError
from parts.generation import EXIT_RULES, Look, choose, generate, probabilities, settle
from parts.tokenizer import begin_token, decode_stream, load_tokenizer, save_tokenizer
from runs import exits


@pytest.fixture
def run_directory(build, tmp_path):
    save_run(build(vocab_size=320), tmp_path)
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "tokenizer.json")
    return tmp_path


def sample(directory, *flags, stdin=b""):
    return script("sample.py", "--run", directory, *flags, stdin=stdin)


def test_a_block_of_text_for_each_recurrence(run_directory):
    first, again = (
        sample(run_directory, "--prompt", "déf ", "--recurrence", "1", "3", "--tokens", "40")
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    strip = lambda out: [line for line in out.split("\n") if "tokens/s" not in line]
    assert strip(first.stdout) == strip(again.stdout)  # seeded
    assert first.stdout.startswith("--- recurrence 1\ndéf ")
    assert "--- recurrence 3\ndéf " in first.stdout and first.stdout.count("--- 40 tokens, ") == 2
    other = sample(
        run_directory, "--prompt", "déf ", "--recurrence", "1", "3", "--tokens", "40", "--seed", "1"
    )
    assert strip(other.stdout) != strip(first.stdout)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--run", "nowhere"], "nowhere holds no model"),
        (["--recurrence", "0"], "recurrence is 0, must be at least 1"),
        (["--recurrence", "4", "-1"], "recurrence is -1"),
        (["--prompt", ""], "--prompt is empty"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--top-p", "2"], "--top-p is 2.0"),
        (["--samples", "0"], "--samples is 0"),
        (["--compile", "--exit-threshold", "1"], "leave out one of them"),
        (["--ahead", "8"], "--ahead does nothing without --draft"),
    ],
)
def test_mistakes_get_one_line(run_directory, flags, message):
    run = sample(run_directory, *flags)
    assert run.returncode == 2 and message in run.stderr and run.stderr.count("\n") == 1
    assert not run.stdout


@pytest.mark.parametrize("flags", [[], ["--temperature", "0"], ["--draft", "1"]])
def test_a_state_beyond_all_bounds_is_said_to_be_so(build, run_directory, flags):
    model = build(vocab_size=320, injection="concat", qk_norm=False)
    with torch.no_grad():
        model.injection.W *= 100
    save_run(model, run_directory)
    run = sample(run_directory, "--recurrence", "64", "--prompt", "a", *flags)
    assert run.returncode == 2 and "its state may have grown without bound" in run.stderr


def test_each_sample_is_a_draw_of_its_own(run_directory):
    flags = ["--prompt", "a", "--tokens", "30", "--top-k", "250"]
    done = sample(run_directory, *flags, "--samples", "3", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    model, tokenizer = Parcae.from_pretrained(run_directory), load_tokenizer(run_directory)
    idx = torch.tensor([[begin_token(tokenizer), ord("a")]])
    generator, texts = torch.Generator().manual_seed(0), []
    for _ in range(3):
        row = generate(model, idx, 30, temperature=0.7, top_k=250, generator=generator)[0]
        texts.append("".join(decode_stream(tokenizer, row[1:].tolist())))
    assert len(set(texts)) == 3
    said = [line for line in done.stdout.split("\n") if not line.startswith("--- 30 tokens, ")]
    assert "\n".join(said) == "".join(
        f"--- recurrence 4, sample {i} of 3\n{text}\n" for i, text in enumerate(texts, start=1))


def test_the_end_of_text_ends_a_block(build, tmp_path):
    model = build(vocab_size=320, tie_embeddings=False)
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "tokenizer.json")
    end = begin_token(load_tokenizer(tmp_path))
    with torch.no_grad():  # after this prompt the end is the likeliest
        x = model.hidden(torch.tensor([[end, ord("a")]]), 4)
        model.lm_head.weight.zero_()[end] = x[0, -1]
    save_run(model, tmp_path)
    flags = ["--tokens", "5", "--temperature", "0", "--prompt", "a"]
    assert sample(tmp_path, *flags).stdout.startswith("--- recurrence 4\na\n--- 0 tokens, ")
    two = sample(tmp_path, *flags, "--samples", "2").stdout
    assert "sample 2 of 2\na\n--- 0 tokens" in two


def test_a_prompt_longer_than_the_context_says_what_is_read(run_directory):
    done = sample(run_directory, "--prompt", "a" * 40, "--tokens", "2")
    said = "of 41 tokens (one begins the text), the model reads only the last 32"
    assert done.stdout.startswith(said)


def test_only_a_model_that_loops_has_a_draft_or_an_exit(build, tmp_path):
    save_run(build(vocab_size=320, n_recurrent=0, n_prelude=2), tmp_path)
    save_tokenizer(make_tokenizer("bytes"), tmp_path / "tokenizer.json")
    for name, *flags in (("sample.py", "--draft", 1), ("sample.py", "--exit-threshold", 1)):
        done = script(name, "--run", tmp_path, "--device", "cpu", *flags)
        assert done.returncode == 2 and f"{flags[0]} needs a model that loops" in done.stderr


def test_exit_rules_measure_what_they_say():
    h, before = torch.randn(2, 1, 3, 8, generator=torch.Generator().manual_seed(0))
    p, q = torch.tensor([[[0.5, 0.25, 0.25]]]), torch.tensor([[[0.25, 0.25, 0.5]]])
    now, last = Look(h, p.log()), Look(before, q.log())
    found = {name: rule(now, last).item() for name, rule in EXIT_RULES.items()}
    assert found["state"] == pytest.approx(float((h - before).norm() / h.norm()))
    assert exits.entropy(now, last).item() == pytest.approx(1.5 * math.log(2))
    # from the last prediction to this one, 0.5 ln(0.5 / 0.25) + 0.25 ln(0.25 / 0.5)
    assert found["kl"] == pytest.approx(0.25 * math.log(2))


def test_an_exit_threshold_saves_loops(run_directory):
    done = sample(run_directory, "--tokens", "12", "--recurrence", "6", "--exit-threshold", "1e9")
    # all loops for the prompt, from which the first token is drawn; then two for each
    assert done.returncode == 0 and f", {(6 + 11 * 2) / 12:.2f} loops per token" in done.stdout


def test_the_least_temperatures_are_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (0, 1e-38, 1e-7):
        assert choose(logits, temperature).item() == 1


# ------------------------------------------------------------------ generation


def test_compiled_decoding_step_is_one_graph_for_all_positions(build, tokens):
    model, graphs = build(value_embeds=True, block_size=32).eval(), []
    plain = generate(model, tokens, 16, recurrence=3, temperature=0)
    torch._dynamo.reset()
    model.advance = torch.compile(
        model.advance,
        dynamic=True,
        fullgraph=True,
        backend=lambda graph, _: graphs.append(graph) or graph,
    )
    assert torch.equal(generate(model, tokens, 16, recurrence=3, temperature=0), plain)
    assert len(graphs) == 1


@pytest.mark.parametrize("recurrence", [1, 5, None])
def test_greedy_generation_slides_over_the_last_block(build, tokens, recurrence):
    model = build(value_embeds=True, block_size=20).eval()
    out = generate(model, tokens, 12, recurrence=recurrence, temperature=0)
    idx = tokens
    for _ in range(12):
        idx = torch.cat([idx, model(idx[:, -20:], recurrence=recurrence)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(out, idx)


def test_sampling_is_seeded_and_follows_the_logits(build, tokens):
    model = build().train()

    def draw(seed, **options):
        return generate(
            model,
            tokens[:1].repeat(500, 1),
            1,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )[:, -1]

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert model.training
    probs = model.eval()(tokens[:1])[0][0, -1].div(0.5).softmax(-1)
    counts = torch.bincount(draw(0, temperature=0.5), minlength=50) / 500
    assert (counts - probs).abs().max() < 5 * (0.25 / 500) ** 0.5
    ranked = probs.argsort(descending=True)
    assert set(draw(0, top_k=3).tolist()) == set(ranked[:3].tolist())
    nucleus = (
        int(
            (
                model(tokens[:1])[0][0, -1].softmax(-1).sort(descending=True).values.cumsum(-1)
                < 0.3
            ).sum()
        )
        + 1
    )
    assert set(draw(0, top_p=0.3).tolist()) == set(ranked[:nucleus].tolist())
    for least in ({"top_k": 1}, {"top_p": 1e-46}):  # which is 0 in float32
        assert torch.equal(draw(0, **least), draw(0, temperature=0))


def test_top_p_keeps_the_fewest_tokens_that_hold_it():
    """Against the definition, in exact arithmetic."""
    logits = 3 * torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    logits[0, :4] = torch.tensor([0.3, 0.1, 0.1, 0.5]).log()
    logits[0, 4:] = -torch.inf
    probs = probabilities(logits, 1.0)
    for top_p in (0.8, 0.1, 0.5, 0.95, 0.999999, 1 - 2 ** -53, 1e-9):
        kept = probabilities(logits, 1.0, top_p=top_p) > 0
        for row, found in zip(probs, kept):
            ranked, held, fewest = row.argsort(descending=True).tolist(), Fraction(0), 0
            while fewest < len(ranked) and held < Fraction(top_p):
                held += Fraction(row[ranked[fewest]].item())
                fewest += 1
            least = row[ranked[fewest - 1]]  # of equal tokens either may stay
            assert (row[found] >= least).all()
            assert found.sum() == min(fewest, int((row > 0).sum()))
    assert probabilities(logits, 1.0, top_p=0.8)[0].count_nonzero() == 2  # 0.5 + 0.3
    assert probabilities(logits[:, 4:9], 1.0, top_p=0.999).sum(-1)[1:] == pytest.approx(1)


def test_top_p_of_one_changes_nothing():
    logits = 4 * torch.randn(2, 50304, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"top_k": 7}):
        assert torch.equal(probabilities(logits, 1.0, top_p=1, **options),
                           probabilities(logits, 1.0, **options))
    same = choose(logits, 0.7, top_p=1.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(same, choose(logits, 0.7, generator=torch.Generator().manual_seed(1)))


def test_no_loops_are_refused(build, tokens):
    with pytest.raises(UserError, match="recurrence is 0, must be at least 1"):
        generate(build(), tokens, 1, recurrence=0)


# ------------------------------------------------------------------ depth of its own for each token


@torch.no_grad()
@pytest.mark.parametrize("threshold, loops", [(0.0, 5), (math.inf, 2)])
def test_exit_never_and_at_once_are_fixed_depths(build, tokens, threshold, loops):
    model = build(value_embeds=True).eval()
    caches = [KVCache(model.config, 1, 16, n, "cpu", torch.float32, "shared") for n in (5, loops)]
    for t in range(16):
        ours, used = settle(model, tokens[:1, t : t + 1], 5, caches[0], threshold)
        theirs, _, _ = model.advance(tokens[:1, t : t + 1], caches[1], 0, loops)
        torch.testing.assert_close(ours, theirs)
        assert used == loops


@torch.no_grad()
@pytest.mark.parametrize("rule, low, high", [("kl", 1e-6, 10), ("state", 1e-3, 10)])
def test_every_exit_rule_stops_early_or_late(build, tokens, rule, low, high):
    model = build().eval()
    used = []
    for threshold in (low, high):
        cache = model.new_cache(1, 16, 8, "shared")
        with torch.no_grad():
            used.append(settle(model, tokens[:1, :1], 8, cache, threshold, rule)[1])
    assert used[0] == 8 and used[1] == 2


def test_tokens_stop_when_their_prediction_settles(build, tokens):
    model = build().eval()
    cache = KVCache(model.config, 1, 16, 30, "cpu", torch.float32, "shared")
    logits, loops = zip(
        *(settle(model, token, 30, cache, 1e-4) for token in tokens[:1].split(1, dim=1))
    )
    full = model(tokens[:1], recurrence=30)[0]
    assert 2 < sum(loops) / 16 < 30 and len(set(loops)) > 1
    torch.testing.assert_close(
        torch.cat(logits, 1).softmax(-1), full.softmax(-1), atol=0.05, rtol=0
    )
