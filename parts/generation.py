"""Generate tokens with a model: draw them, leave the loop early, `stream` and `generate`."""

import math
from collections import Counter, namedtuple

import torch
import torch.nn.functional as F

from parts.cli import UserError

FIXED_POINT = 2.0 ** 54  # keeps every bit of a float32 probability above 1e-9
GREEDY = 1e-6  # below this temperature, take the likeliest token: a division would overflow


def probabilities(logits, temperature, top_k=None, top_p=None):
    """Return the probabilities (B, vocab_size) of the next token, for logits (B, vocab_size)."""
    if temperature < GREEDY:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    probs = (logits / temperature).softmax(-1)
    some = top_p is not None and top_p < 1  # 1 keeps all tokens, whatever rounding does
    if top_k is None and not some:
        return probs
    probs, tokens = probs.sort(-1, descending=True)
    if top_k is not None:
        probs[:, top_k:] = 0
        probs /= probs.sum(-1, keepdim=True)
    if some:
        # whole numbers add up exactly, on every device: mps has no float64
        parts = (probs * FIXED_POINT).long()
        before = parts.cumsum(-1) - parts
        probs[before >= math.ceil(top_p * FIXED_POINT)] = 0  # the likelier tokens reach top_p
        probs /= probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, tokens, probs)


def choose(logits, temperature, top_k=None, top_p=None, generator=None):
    """Draw tokens (B, 1) from logits (B, vocab_size). Raises UserError if they are not finite."""
    check_predicts(logits)
    p = probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(p, 1, generator=generator)


def check_predicts(values, loops="so many"):
    """Raise UserError if logits or losses are not finite; loops: how many produced them."""
    if not values.isfinite().all():
        raise UserError(f"what the model predicts after {loops} loops is not finite: its state may "
                        "have grown without bound (docs/guide.md, section 2)")


# A token has looped enough when its exit rule returns less than a threshold. The rule compares two
# loops, this one and the last: their states h (B, S, D) and log-probabilities (B, S, vocab_size).
Look = namedtuple("Look", "h log_probs")


def kl(now, last):
    """Return how far the prediction moved, KL(now || last) in nats (arXiv 2502.05171)."""
    return F.kl_div(last.log_probs, now.log_probs, reduction="sum", log_target=True)


def state(now, last):
    """Return how far the state moved, relative to its norm."""
    return (now.h - last.h).norm() / now.h.norm()


EXIT_RULES = {"kl": kl, "state": state}


def settle(model, idx, most, cache, threshold, rule="kl"):
    """Return logits (B, S, vocab_size) for idx (B, S), and how many loops ran, at most `most`.

    The loop ends once the rule is below `threshold`, after the second loop at the earliest. Tokens
    that stop early have no keys and values for later loops, so the cache must be a shared one."""
    last = None
    for loops, (h, inputs) in enumerate(model.states(idx, most, cache), start=1):
        logits = model.head(model.readout(h, inputs, cache))
        now = Look(h, logits.log_softmax(-1))
        if loops > 1 and EXIT_RULES[rule](now, last) < threshold:
            break
        last = now
    return logits, loops


@torch.no_grad()
def stream(model, idx, n, *, recurrence=None, temperature=1.0, top_k=None, top_p=None,
           generator=None, exit_threshold=None, exit_rule="kl", counts=None):
    """Yield the next n tokens, each (B, 1) and drawn given the last block_size tokens before it.

    Arguments are as in `generate`. counts: a Counter of the "tokens" and all their "loops".
    Once the context is full, the window slides, and every token in it gets a new position. Then no
    cache can be used and no loop ends early: each token costs a full forward pass."""
    counts = Counter() if counts is None else counts
    capacity = min(idx.shape[1] + n, model.config.block_size)
    exits = exit_threshold is not None
    training = model.training
    model.eval()
    try:
        recurrence, = model.depths_of(1, recurrence)
        cache = model.new_cache(len(idx), capacity, recurrence, "shared" if exits else "per-loop")
        for _ in range(n):
            loops, last, slides = recurrence, idx[:, -1:], idx.shape[1] > capacity
            if slides or cache.pos == 0:  # all tokens at once; no cache once the window slides
                x = model.hidden(idx[:, -capacity:], recurrence, None if slides else cache)
                logits = model.head(x[:, -1:])
            elif exits:
                logits, loops = settle(model, last, recurrence, cache, exit_threshold, exit_rule)
            else:  # one more token
                logits, _, _ = model.advance(last, cache, 0, recurrence)
            counts.update(tokens=1, loops=loops)
            token = choose(logits[:, -1], temperature, top_k, top_p, generator)
            idx = torch.cat([idx, token], dim=1)
            yield token
    finally:
        model.train(training)


def generate(model, idx, n, **options):
    """Return idx (B, S) int64 continued by n tokens: (B, S + n) int64.

    recurrence: loops (None: mean_recurrence); temperature: 0 is greedy; top_k: keep the k likeliest
    tokens; top_p: keep the fewest with total probability p; generator: on idx's device;
    exit_threshold, exit_rule: see `settle` (B = 1). Raises UserError for a recurrence below 1."""
    return torch.cat([idx, *stream(model, idx, n, **options)], dim=1)
