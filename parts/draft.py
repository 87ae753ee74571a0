"""Self-speculative decoding: a looped model drafts with few loops and verifies with all of them.

    python sample.py --recurrence 8 --draft 1 --ahead 8

`ahead` tokens are drafted one by one with `draft` loops. Then all of them go through the remaining
loops together, as a prompt would. The rule of Leviathan et al. (arXiv 2211.17192) decides which
drafts to keep, so that the text is distributed exactly as without drafting.

No loop is computed twice. In loop t, a token sees keys and values from loop t, and none from later
loops. So the verification continues from the draft's states and cache entries. A shared cache would
not work, because it holds only the last loop of each token.
"""

from collections import Counter

import torch

from parts.generation import check_predicts, probabilities, stream


def propose(model, last, cache, recurrence, ahead, distribution, generator):
    """Draft tokens after `last` (1, 1) with `recurrence` loops each. Return them, (1, ahead), the
    distributions they are drawn from, (ahead, vocab_size), and the states h and inputs u of `last`
    and all drafts, both (1, ahead + 1, D). The cache moves on by ahead + 1.

    distribution: a function, logits (S, vocab_size) -> probabilities (S, vocab_size)."""
    tokens, given, states, inputs = [last], [], [], []
    for i in range(ahead + 1):
        logits, h, u = model.advance(tokens[i], cache, 0, recurrence)
        states.append(h)
        inputs.append(u)
        if i < ahead:  # the full model predicts what comes after the last draft
            given.append(distribution(logits[:, -1]))
            tokens.append(torch.multinomial(given[i], 1, generator=generator))
    return (torch.cat(tokens[1:], dim=1), torch.cat(given), torch.cat(states, dim=1),
            torch.cat(inputs, dim=1))


def accept(tokens, given, wanted, generator):
    """Return the drafts that are kept and one more token, (1, kept + 1).

    tokens: (1, k), drawn from `given` (k, vocab_size); wanted: the full model's distributions,
    (k + 1, vocab_size). A draft is kept with probability min(1, wanted / given) if all before
    it are. The first rejected one is replaced by a draw from max(0, wanted - given), normalised.
    Then each returned token is a draw from `wanted`."""
    k = tokens.shape[1]
    p_given, p_wanted = given.gather(-1, tokens.T), wanted[:k].gather(-1, tokens.T)        # (k, 1)
    chance = torch.rand(k, 1, generator=generator, device=tokens.device)
    kept = int((chance * p_given < p_wanted).cumprod(dim=0).sum())
    p = wanted[kept]
    if kept < k:
        short = (p - given[kept]).clamp(min=0)
        # Equal distributions reject only by rounding; then `short` is zero everywhere.
        p = short if short.sum() > 0 else p
    return torch.cat([tokens[:, :kept], torch.multinomial(p, 1, generator=generator)[None]], dim=1)


@torch.no_grad()
def draft_stream(model, idx, n, *, draft, ahead=4, recurrence=None, temperature=1.0, top_k=None,
                 top_p=None, generator=None, counts=None):
    """Yield the n tokens (1, 1) after idx (1, S), distributed as by generation.stream. They are
    drafted, `ahead` at a time with `draft` loops, fewer than `recurrence`, until the window slides.
    counts: a Counter of "tokens", "drafted" and "kept" ones, and "loops" that ran in sequence."""
    def distribution(logits):
        check_predicts(logits)
        return probabilities(logits, temperature, top_k, top_p)
    counts = Counter() if counts is None else counts
    training = model.training
    model.eval()
    try:
        recurrence, = model.depths_of(1, recurrence)
        capacity = min(idx.shape[1] + n, model.config.block_size)
        cache = model.new_cache(1, capacity, recurrence)
        if 1 < idx.shape[1] < capacity:
            model.hidden(idx[:, :-1], recurrence, cache)  # the prompt without its last token
        while n > 0 and (room := capacity - idx.shape[1]) > 0:
            # Draft at most n - 1 tokens, since verification adds one. Draft at least 1, since
            # verifying a single token would need another graph if compiled.
            k = max(1, min(ahead, n - 1, room))
            # a copy, because a view would need another graph if compiled
            last = idx[:, -1:].clone(memory_format=torch.contiguous_format)
            start = cache.pos
            tokens, given, h, u = propose(model, last, cache, draft, k, distribution, generator)

            cache.pos = start  # the same tokens again, from loop `draft` on
            seen = torch.cat([last, tokens], dim=1)
            logits, _, _ = model.advance(seen, cache, draft, recurrence, h, u)
            new = accept(tokens, given, distribution(logits[0]), generator)
            counts.update(drafted=k, kept=new.shape[1] - 1,
                          loops=(k + 1) * draft + recurrence - draft)

            new = new[:, :n]
            counts["tokens"] += new.shape[1]
            cache.pos = start + new.shape[1]  # rejected tokens are overwritten later
            idx = torch.cat([idx, new], dim=1)
            n -= new.shape[1]
            yield from new.split(1, dim=1)
        del cache  # before stream makes its own
        yield from stream(model, idx, n, recurrence=recurrence, temperature=temperature,
                          top_k=top_k, top_p=top_p, generator=generator, counts=counts)
    finally:
        model.train(training)
