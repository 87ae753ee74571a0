"""Fast decoding: model.advance is recorded once with fixed shapes, then replayed at any position.

    model.advance = Recorder(model.advance)    # then generate as before

A token takes hundreds of small operations. On a GPU, launching each takes longer than computing it.
A CUDA graph records the launches of one call and repeats them at once, but only with the same
shapes and addresses. So buffers hold the inputs, and attention reads the cache's whole capacity and
masks what comes after a token. Other devices make the call each time, with the same shapes.
"""

from functools import partial

import torch

WARM_UP = 3  # calls before a recording, in which PyTorch chooses kernels and compiles


class Recording:
    """Hold one call of `advance`: loops start, ..., stop - 1 for idx (B, S), read from buffers. The
    call takes this object for its cache. It has the pairs of the real one, but `reserve` returns
    places in a tensor (S,), which replay moves, and a mask."""

    def __init__(self, advance, cache, start, stop, idx, h, u):
        self.buffers = [None if x is None else x.clone() for x in (idx, h, u)]
        self.places = torch.arange(idx.shape[1], device=idx.device)
        self.everywhere = torch.arange(cache.capacity, device=idx.device)
        self.pair_of = cache.pair_of
        idx, h, u = self.buffers
        self.call = partial(advance, idx, self, start, stop, h, u)
        self.graph = None

    def reserve(self, S):
        """Return the places (S,) and a mask (S, capacity), true at and before each place."""
        return self.places, self.everywhere <= self.places[:, None]

    def replay(self, position, *inputs):
        """Return what the call returns for new inputs (idx, h, u) at places from `position` on."""
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
        """Record the call. Warming up is safe: it writes the same keys and values to the places."""
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
    """Replace a model's `advance`. Record it once for each shape of idx, first and last loop."""

    def __init__(self, advance):
        self.advance = advance
        self.cache, self.recordings = None, {}

    def __call__(self, idx, cache, start, stop, h=None, u=None):
        if cache is not self.cache:  # a recording works with one cache only
            self.cache, self.recordings = cache, {}
        key = (idx.shape, start, stop)
        if key not in self.recordings:
            self.recordings[key] = Recording(self.advance, cache, start, stop, idx, h, u)
        position = cache.pos
        cache.reserve(idx.shape[1])
        return self.recordings[key].replay(position, idx, h, u)


def speed_up(model, compiled, recorded=True):
    """Make `model` generate faster. On a GPU, record `advance` and, if asked, compile each layer.
    On other devices, or unrecorded, compile all of `advance` as one graph if asked."""
    if recorded and model.wte.weight.device.type == "cuda":
        if compiled:
            model.compile_layers()
        model.advance = Recorder(model.advance)
    elif compiled:
        torch._dynamo.config.recompile_limit = 64  # a graph for each number of loops and tokens
        model.advance = torch.compile(model.advance, dynamic=True)
