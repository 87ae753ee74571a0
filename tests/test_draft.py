from collections import Counter
from itertools import islice

import pytest
import torch
from conftest import script

from parts.draft import accept, draft_stream, propose
from parts.generation import probabilities, stream


def greedy(logits):
    return probabilities(logits, 0)


@pytest.mark.parametrize("draft, ahead", [(1, 1), (2, 4), (3, 7)])
@pytest.mark.parametrize("length", [1, 5, 16])  # the last one fills the context of 32
def test_greedy_text_is_that_of_plain_generation(build, tokens, draft, ahead, length):
    model, idx = build().eval(), tokens[:1, :length]
    plain = list(stream(model, idx, 26, recurrence=5, temperature=0))
    counts = Counter()
    drafted = list(draft_stream(model, idx, 26, recurrence=5, draft=draft, ahead=ahead,
                                temperature=0, counts=counts))
    assert torch.equal(torch.cat(drafted), torch.cat(plain))
    assert 0 <= counts["kept"] <= counts["drafted"] > 0


def test_the_loops_that_are_counted_are_those_that_ran(build, tokens):
    model, ran, counts = build().eval(), [], Counter()
    advance = model.advance

    def counted(idx, cache, start, stop, *state):
        ran.append(stop - start)
        return advance(idx, cache, start, stop, *state)
    model.advance = counted
    drafted = list(draft_stream(model, tokens[:1, :4], 12, recurrence=5, draft=2, ahead=3,
                                counts=counts, temperature=0))
    assert len(drafted) == 12 and counts["loops"] == sum(ran)


@pytest.mark.parametrize("n, ahead", [(11, 3), (12, 3), (1, 4)])
def test_compiled_drafting_is_two_graphs_for_all_positions(build, tokens, n, ahead):
    """One drafts a token, one verifies; never a single token is verified, which were another."""
    model, idx, graphs = build(n_recurrent=1).eval(), tokens[:1, :5], []
    plain = torch.cat(list(stream(model, idx, n, recurrence=2, temperature=0)))
    torch._dynamo.reset()
    model.advance = torch.compile(model.advance, dynamic=True, fullgraph=True,
                                  backend=lambda graph, _: graphs.append(graph) or graph)
    drafted = torch.cat(list(draft_stream(model, idx, n, recurrence=2, draft=1, ahead=ahead,
                                          temperature=0)))
    assert torch.equal(plain, drafted) and len(graphs) == 2


def test_the_drafts_loops_are_the_first_of_the_verification(build, tokens):
    """Logits and cache after drafting and verifying are those of one pass over the same tokens."""
    model, idx = build().eval(), tokens[:1, :8]
    cache = model.new_cache(1, 16, 6)
    with torch.no_grad():
        model.hidden(idx[:, :-1], 6, cache)
        new, _, h, u = propose(model, idx[:, -1:], cache, 2, 3, greedy, None)
        seen = torch.cat([idx[:, -1:], new], dim=1)
        cache.pos -= 4
        logits, _, _ = model.advance(seen, cache, 2, 6, h, u)

        whole = model.new_cache(1, 16, 6)
        at_once = model.lm_head(model.hidden(torch.cat([idx, new], dim=1), 6, whole)).float()
    assert torch.allclose(logits, at_once[:, 7:], atol=1e-4)
    assert cache.pos == whole.pos == 11
    for ours, theirs in zip(cache.pairs, whole.pairs):
        for pair, other in zip(ours, theirs):
            for a, b in zip(pair, other):
                assert torch.allclose(a[:, :, :11], b[:, :, :11], atol=1e-4)


def test_tokens_of_a_full_context_are_not_drafted_and_wait_for_every_loop(build, tokens):
    model, idx, counts = build().eval(), torch.cat([tokens[:1], tokens[:1]], dim=1), Counter()
    list(draft_stream(model, idx, 5, recurrence=3, draft=1, counts=counts))
    assert counts["loops"] == 5 * 3 and not counts["drafted"]


def test_what_is_thrown_away_leaves_no_trace(build, tokens):
    """A model whose drafts are all refused writes the same text from the same cache."""
    model, idx = build(seed=3).eval(), tokens[:1, :4]
    model.lm_head.weight.data *= 30  # sure of itself, and of other things after one loop
    counts = Counter()
    drafted = list(draft_stream(model, idx, 20, recurrence=8, draft=1, ahead=5, temperature=0,
                                counts=counts))
    assert counts["kept"] < counts["drafted"]  # or there is nothing to throw away
    assert torch.equal(torch.cat(drafted),
                       torch.cat(list(stream(model, idx, 20, recurrence=8, temperature=0))))


def test_what_is_accepted_is_a_draw_from_the_full_model():
    """First tokens of 5,000 draws on a vocabulary of four, chi-squared with 3 degrees."""
    generator = torch.Generator().manual_seed(0)
    q = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    p = torch.tensor([[0.2, 0.4, 0.4, 0.0]])
    counts = torch.zeros(4)
    for token in torch.multinomial(q[0], 5000, replacement=True, generator=generator):
        counts[accept(token.view(1, 1), q, p.expand(2, -1), generator)[0, 0]] += 1
    expected = 5000 * p[0]
    assert counts[3] == 0
    chi_squared = ((counts - expected)[:3] ** 2 / expected[:3]).sum()
    assert chi_squared < 13.8  # exceeded once in a thousand


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9}])
def test_sampled_frequencies_are_those_of_plain_sampling(build, tokens, options):
    """The second new token's distribution, from the exact one; 500 draws."""
    model, idx = build(vocab_size=8, n_recurrent=1, seed=2).eval(), tokens[:1, :2] % 8
    model.lm_head.weight.data *= 4  # one loop and three differ much
    generator = torch.Generator().manual_seed(1)
    options = {"recurrence": 3, "temperature": 0.8} | options
    limits = {name: options.get(name) for name in ("top_k", "top_p")}
    with torch.no_grad():
        first = probabilities(model(idx, recurrence=3)[0][:, -1], 0.8, **limits)[0]
        exact = torch.zeros(8)
        for token in range(8):
            longer = torch.cat([idx, torch.tensor([[token]])], dim=1)
            logits = model(longer, recurrence=3)[0][:, -1]
            exact += first[token] * probabilities(logits, 0.8, **limits)[0]
    draws = 500
    counts = torch.zeros(8)
    for _ in range(draws):
        text = draft_stream(model, idx, 3, draft=1, ahead=2, generator=generator, **options)
        counts[[*islice(text, 2)][1].item()] += 1
    possible = exact > 1e-6
    assert counts[~possible].sum() == 0
    expected = draws * exact[possible]
    chi_squared = ((counts[possible] - expected) ** 2 / expected).sum()
    assert chi_squared < 24.4  # 7 degrees of freedom: exceeded once in a thousand


def test_the_table_of_speeds(run, tmp_path):
    done = script("runs/draft.py", "--run", run, "--data", run.parent / "data", "--recurrence", 3,
                  "--draft", 1, "--ahead", 2, "--tokens", 6, "--rounds", 1, "--out",
                  tmp_path / "d.csv", "--dtype", "float32", "int8", "--exit", "0.1")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "d.csv").read_text().splitlines()
    # plain, drafted and stopped early, of both dtypes, at both temperatures
    assert len(lines) == 1 + 3 * 2 * 2 and lines[1].startswith("3,float32,,,,,0,")
    kept, loops = map(float, lines[2].split(",")[-2:])
    assert 0 <= kept <= 1 and 1 < loops <= 5


def test_drafting_from_the_command_line(run):
    done = script("sample.py", "--run", run, "--prompt", "a", "--tokens", 9, "--recurrence", 3,
                  "--draft", 1, "--temperature", 0)
    assert done.returncode == 0 and "of the drafts kept" in done.stdout, done.stderr
    plain = script("sample.py", "--run", run, "--prompt", "a", "--tokens", 9, "--recurrence", 3,
                   "--temperature", 0)
    assert done.stdout.rpartition("\n---")[0] == plain.stdout.rpartition("\n---")[0]
    for flags, said in ((["--draft", 3, "--recurrence", 3], "must be below --recurrence 3"),
                        (["--draft", 1, "--exit-threshold", 1], "needs a cache for each loop")):
        done = script("sample.py", "--run", run, *flags)
        assert done.returncode == 2 and said in done.stderr
