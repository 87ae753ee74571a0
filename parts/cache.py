"""The keys and values of a context, for each layer and each loop."""

import copy

import torch

from parts.errors import UserError


class KVCache:
    """Hold keys and values of a context, preallocated. pairs[layer] lists a pair for each loop.

    kind "per-loop": each loop has its own pair, which is exact. "shared": each loop overwrites the
    pair of the loop before, so all loops of a new token see the last loop of the tokens held before
    (as in recurrent-depth models, arXiv 2502.05171). Memory then does not grow with the loops.
    capacity: tokens at most; recurrence: loops at most. Raises UserError."""

    def __init__(self, config, batch_size, capacity, recurrence, device, dtype, kind="per-loop"):
        config.check_length(capacity)
        if kind not in ("per-loop", "shared"):
            raise UserError(f"kv_cache is {kind!r}, must be per-loop or shared")
        in_loop = range(config.n_prelude, config.n_prelude + config.n_recurrent)
        # for each layer: does every loop have its own pair?
        self.own = [kind == "per-loop" and layer in in_loop for layer in range(config.n_layer)]

        def zeros():  # a mask hides unwritten places, but not a NaN that happens to be there
            shape = (batch_size, config.n_head, capacity, config.n_embd // config.n_head)
            return torch.zeros(shape, device=device, dtype=dtype)
        self.pairs = [[(zeros(), zeros()) for _ in range(recurrence if own else 1)]
                      for own in self.own]
        self.capacity = capacity
        self.pos = 0  # tokens held

    def reserve(self, S):
        """Reserve places for the next S tokens. Return (the places, a slice; the mask None,
        which means that each token sees all tokens so far). Raises UserError."""
        start, stop = self.pos, self.pos + S
        if stop > self.capacity:
            raise UserError(f"{stop} tokens do not fit a cache of {self.capacity}")
        self.pos = stop
        return slice(start, stop), None

    def pair_of(self, layer, t=0):
        """Return a layer's keys and values in loop t, each (B, n_head, capacity, head_dim)."""
        return self.pairs[layer][t if self.own[layer] else 0]

    def rows(self, index):
        """Return a copy with the sequences in index (N,); it may name a sequence several times."""
        other = copy.copy(self)
        other.pairs = [[(keys[index], values[index]) for keys, values in pairs]
                       for pairs in self.pairs]
        return other
