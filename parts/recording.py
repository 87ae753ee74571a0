"""Decoding with fixed shapes: model.advance recorded once, then replayed for any position.

    model.advance = Recorder(model.advance)    # then generate as before

A token is hundreds of small operations, and on a GPU each takes longer to launch than to compute. A
CUDA graph records the launches of one call and repeats them at once, with the same shapes, at the
same addresses: so what goes in lives in buffers, and attention reads the cache's whole capacity and
masks what stands behind a token. Other devices make the call each time, with the same shapes.
"""

from functools import partial

import torch

WARM_UP = 3  # calls before a recording: kernels are chosen, graphs compiled


class Recording:
    """One call of `advance`, for T tokens: loops start, ..., stop - 1 of idx (B, T). It stands in
    for the KVCache there, whose places are numbers in a tensor (T,)."""

    def __init__(self, advance, cache, start, stop, idx, h, u):
        self.buffers = [None if x is None else x.clone() for x in (idx, h, u)]
        self.places = torch.arange(idx.shape[1], device=idx.device)
        self.everywhere = torch.arange(cache.capacity, device=idx.device)
        self.pair_of = cache.pair_of
        idx, h, u = self.buffers
        self.call = partial(advance, idx, self, start, stop, h, u)
        self.graph = None

    def reserve(self, T):
        """Return the places, (T,), and the mask of what stands at or before each, (T, capacity)."""
        return self.places, self.everywhere <= self.places[:, None]

    def replay(self, position, *inputs):
        """Return what the call returns for idx, h and u at the places from `position` on."""
        torch.arange(position, position + len(self.places), out=self.places)
        for buffer, value in zip(self.buffers, inputs):
            if value is not None:
                buffer.copy_(value)
        if self.places.device.type != "cuda":
            return self.call()
        if self.graph is None:
            self.record()
        self.graph.replay()
        return [output.clone() for output in self.outputs]  # the next replay overwrites them

    def record(self):
        """Record the call. Each time it writes the same keys and values at the same places."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.call()


class Recorder:
    """`advance` of a model, recorded: once for each number of tokens, first and last loop."""

    def __init__(self, advance):
        self.advance = advance
        self.cache, self.recordings = None, {}

    def __call__(self, idx, cache, start, stop, h=None, u=None):
        if cache is not self.cache:  # recordings read and write one cache
            self.cache, self.recordings = cache, {}
        key = (idx.shape, start, stop)
        if key not in self.recordings:
            self.recordings[key] = Recording(self.advance, cache, start, stop, idx, h, u)
        position = cache.pos
        cache.reserve(idx.shape[1])
        return self.recordings[key].replay(position, idx, h, u)


def speed_up(model, compiled, recorded=True):
    """Have `model` generate faster: on a GPU recorded, with its layers compiled one by one if asked
    for; elsewhere all of `advance` is compiled as one graph."""
    if recorded and model.wte.weight.device.type == "cuda":
        if compiled:
            model.compile_layers()
        model.advance = Recorder(model.advance)
    elif compiled:
        torch._dynamo.config.recompile_limit = 64  # one for each number of loops and tokens
        model.advance = torch.compile(model.advance, dynamic=True)
