"""The keys and values of a context, for each layer and each loop."""

import copy

import torch

from parts.errors import UserError


class KVCache:
    """Keys and values of a context, preallocated: pairs[layer] is a list, one pair for each loop.

    kind "per-loop": a pair for every layer and every loop, exact. "shared": a loop overwrites the
    pair of the loop before, so that earlier tokens show all loops the keys and values of their last
    one (recurrent-depth models, arXiv 2502.05171): memory does not grow with the loops.
    capacity: tokens; recurrence: the most loops. Raises UserError."""

    def __init__(self, config, batch_size, capacity, recurrence, device, dtype, kind="per-loop"):
        config.check_length(capacity)
        if kind not in ("per-loop", "shared"):
            raise UserError(f"kv_cache is {kind!r}, must be per-loop or shared")
        in_loop = range(config.n_prelude, config.n_prelude + config.n_recurrent)
        # of each layer, whether every loop has a pair of its own
        self.own = [kind == "per-loop" and layer in in_loop for layer in range(config.n_layer)]

        def zeros():  # a mask hides what is not written, but not a NaN that happens to be there
            shape = (batch_size, config.n_head, capacity, config.n_embd // config.n_head)
            return torch.zeros(shape, device=device, dtype=dtype)
        self.pairs = [[(zeros(), zeros()) for _ in range(recurrence if own else 1)]
                      for own in self.own]
        self.capacity = capacity
        self.pos = 0  # tokens held

    def reserve(self, T):
        """Return (the places of the next T tokens, a slice; a mask of what each of them sees, None:
        all so far). From now on the places are held. Raises UserError."""
        start, stop = self.pos, self.pos + T
        if stop > self.capacity:
            raise UserError(f"{stop} tokens do not fit a cache of {self.capacity}")
        self.pos = stop
        return slice(start, stop), None

    def pair_of(self, layer, t=0):
        """Return keys and values, each (B, n_head, capacity, head_dim), of a layer in loop t."""
        return self.pairs[layer][t if self.own[layer] else 0]

    @property
    def nbytes(self):
        return sum(t.nbytes for pairs in self.pairs for pair in pairs for t in pair)

    def rows(self, index):
        """Return a copy with the sequences of an index (N,), which may name one several times."""
        other = copy.copy(self)
        other.pairs = [[(keys[index], values[index]) for keys, values in pairs]
                       for pairs in self.pairs]
        return other
