"""Self-speculative decoding: a looped model drafts with few loops and verifies with all of them.

    python sample.py --recurrence 8 --draft 2 --ahead 4

A looped model holds a cheap draft of itself: the same weights, fewer loops. `ahead` tokens are
drafted one by one with `draft` loops. Then all of them go through the remaining loops together, as
a prompt would, and what the full model would not have said is thrown away (Leviathan et al., arXiv
2211.17192). What comes out is distributed exactly as without drafting.

No loop is computed twice. In loop t a token sees the keys and values of loop t of the tokens before
it, and nothing of later loops or of the coda. So the draft's loops are the first loops of the
verification, its cache entries are the final ones, and its states are where the verification goes
on. This holds for a cache with a pair for every loop; not for a shared one, where a token's keys
and values are those of its last loop.
"""

import torch

from common import UserError, nothing_to_run
from sample import check, probabilities, stream


def propose(model, last, cache, recurrence, ahead, pick):
    """Draft tokens after `last` (1, 1), with `recurrence` loops each.

    pick: a function, logits (1, vocab_size) -> (token (1, 1), its distribution (1, vocab_size)).
    Returns (tokens (1, ahead), distributions, one each, and for `last` and all drafts the states
    and the loop's input u, both (1, ahead + 1, C)). The cache has then moved on by ahead + 1."""
    token, tokens, distributions, states, inputs = last, [], [], [], []
    for i in range(ahead + 1):
        looked_up, u, h = model.begin(token, cache)
        for t in range(recurrence):
            h = model.recurrent_pass(h, u, looked_up, cache, t)
        states.append(h)
        inputs.append(u)
        if i < ahead:  # after the last draft comes a token of the full model
            logits = model.lm_head(model.readout(h, looked_up, cache)).float()
            token, distribution = pick(logits[:, -1])
            tokens.append(token)
            distributions.append(distribution)
    tokens = torch.cat([last[:, :0], *tokens], dim=1)
    return tokens, distributions, torch.cat(states, dim=1), torch.cat(inputs, dim=1)


def verify(model, idx, h, u, cache, start, recurrence):
    """Logits (1, T, vocab_size) of idx (1, T), the last T tokens of the cache, whose states h
    (1, T, C) are those after `start` loops."""
    cache.pos -= idx.shape[1]
    tokens = model.look_up(idx, cache)
    for t in range(start, recurrence):
        h = model.recurrent_pass(h, u, tokens, cache, t)
    return model.lm_head(model.readout(h, tokens, cache)).float()


def accept(tokens, drafted, wanted, generator):
    """The drafts that stay and one token more, (1, kept + 1).

    tokens: (1, k). drafted: k distributions (1, vocab_size) that they were drawn from; wanted: the
    full model's, k + 1. A draft stays with probability wanted / drafted, at most 1. At the first
    that does not, a token is drawn from what the draft gave too little, max(0, wanted - drafted):
    together that is a draw from `wanted`. If all stay, the token more is one of the full model."""
    for i, (q, p) in enumerate(zip(drafted, wanted)):
        token = tokens[:, i:i + 1]
        chance = torch.rand((), generator=generator, device=p.device)
        if chance * q.gather(-1, token) >= p.gather(-1, token):
            short = (p - q).clamp(min=0)
            # Equal distributions reject by rounding alone: then short is nothing.
            left = short if short.sum() > 0 else p
            return torch.cat([tokens[:, :i], torch.multinomial(left, 1, generator=generator)], 1)
    return torch.cat([tokens, torch.multinomial(wanted[-1], 1, generator=generator)], 1)


@torch.no_grad()
def draft_stream(model, idx, n, *, draft, ahead=4, recurrence=None, temperature=1.0, top_k=None,
                 top_p=None, generator=None, counts=None):
    """Yield n next tokens (1, 1) of idx (1, T), as sample.stream does, but drafted.

    draft: loops of a draft, fewer than `recurrence`; ahead: tokens drafted at a time. counts: a
    dict that gets "drafted" and "kept" tokens, and "loops", those that had to wait for one another.
    Once the context is full the window slides, and nothing is drafted. Raises UserError."""
    check(idx, temperature, top_k, top_p, None)
    mean = model.config.mean_recurrence
    recurrence = model.depths_of(1, mean if recurrence is None else recurrence)[0]
    if len(idx) != 1:
        raise UserError(f"{len(idx)} sequences: drafting takes one at a time")
    if not 1 <= draft < recurrence:
        raise UserError(f"draft is {draft}, must be from 1 to {recurrence - 1}, below recurrence")

    def pick(logits):
        distribution = probabilities(logits, temperature, top_k, top_p)
        return torch.multinomial(distribution, 1, generator=generator), distribution
    counts = {} if counts is None else counts
    counts.update(drafted=0, kept=0, loops=0)
    training = model.training
    model.eval()
    try:
        capacity = min(idx.shape[1] + n, model.config.block_size)
        cache = model.new_cache(1, capacity, recurrence)
        if 1 < idx.shape[1] <= capacity:
            model.hidden(idx[:, :-1], recurrence, cache)  # all of the prompt but its last token
        while n > 0 and idx.shape[1] <= capacity:
            # Room for the last token and its drafts; never more than are asked for.
            k = min(ahead, n - 1, capacity - cache.pos - 1)
            start, last = cache.pos, idx[:, -1:]
            tokens, drafted, h, u = propose(model, last, cache, draft, k, pick)
            seen = torch.cat([last, tokens], dim=1)
            logits = verify(model, seen, h, u, cache, draft, recurrence)
            wanted = [pick(logits[:, i])[1] for i in range(k + 1)]
            new = accept(tokens, drafted, wanted, generator)
            counts["drafted"] += k
            counts["kept"] += new.shape[1] - 1
            counts["loops"] += (k + 1) * draft + recurrence - draft
            # What was thrown away leaves the cache; its places are written anew.
            cache.pos = start + new.shape[1]
            idx = torch.cat([idx, new], dim=1)
            n -= new.shape[1]
            yield from new.split(1, dim=1)
        yield from stream(model, idx, n, recurrence=recurrence, temperature=temperature,
                          top_k=top_k, top_p=top_p, generator=generator)
    finally:
        model.train(training)


if __name__ == "__main__":
    nothing_to_run(__doc__)
