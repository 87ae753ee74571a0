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
        shape = (batch_size, config.n_head, capacity, config.n_embd // config.n_head)
        in_loop = range(config.n_prelude, config.n_prelude + config.n_recurrent)
        # of each layer, whether every loop has a pair of its own
        self.own = [kind == "per-loop" and layer in in_loop for layer in range(config.n_layer)]
        self.pairs = []
        for own in self.own:
            count = recurrence if own else 1
            # zeros: a mask hides what is not written, but not a NaN that happens to be there
            self.pairs.append([(torch.zeros(shape, device=device, dtype=dtype),
                                torch.zeros(shape, device=device, dtype=dtype))
                               for _ in range(count)])
        self.capacity = capacity
        self.pos = 0  # tokens held
        self.places = None  # a tensor where shapes are fixed, see parts/recording.py

    def reserve(self, T):
        """(places of the next T tokens, mask of what each of them sees). Places are a slice, the
        mask is None: all so far. With fixed shapes: a tensor (T,) and (T, capacity)."""
        if self.places is not None:
            everywhere = torch.arange(self.capacity, device=self.places.device)
            return self.places, everywhere <= self.places[:, None]
        return self.take(T), None

    def take(self, T):
        """The places of the next T tokens, a slice: from now on they are held."""
        start, stop = self.pos, self.pos + T
        if stop > self.capacity:
            raise UserError(f"{stop} tokens do not fit a cache of {self.capacity}")
        self.pos = stop
        return slice(start, stop)

    def pair_of(self, layer, t=0):
        """Keys and values, each (B, n_head, capacity, head_dim), of a layer in loop t."""
        return self.pairs[layer][t if self.own[layer] else 0]

    @property
    def nbytes(self):
        return sum(t.nbytes for pairs in self.pairs for pair in pairs for t in pair)

    def rows(self, index):
        """A copy with the sequences of an index (N,), which may name one several times."""
        other = copy.copy(self)
        other.pairs = [[(keys[index], values[index]) for keys, values in pairs]
                       for pairs in self.pairs]
        return other
