"""Batches of token shards, whose format is described in data.py."""

import functools
from pathlib import Path

import numpy as np
import torch

from parts.errors import UserError

# of shards, magic number: (version, dtype); the second is for large vocabularies
FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000
EVAL_SEED = 1234  # of a Loader's order of validation sequences: every script reads the same first
EVAL_TOKENS = 8192  # read at once in an evaluation, which holds all their logits


def open_shard(path):
    """Return the tokens of a shard, a read-only memory map. Raises UserError if it is damaged."""
    header = np.fromfile(path, dtype=np.int32, count=256).tolist()
    magic, version, count = header[:3] if len(header) == 256 else ["missing"] * 3
    if magic not in FORMATS:
        raise UserError(f"{path} is not a token shard: its magic number is {magic}, "
                        f"must be {' or '.join(map(str, FORMATS))}")
    right_version, dtype = FORMATS[magic]
    if version != right_version:
        raise UserError(f"{path} has shard version {version}, must be {right_version}")
    size, expected = path.stat().st_size, HEADER_BYTES + count * np.dtype(dtype).itemsize
    if size != expected or count == 0:
        raise UserError(f"{path} is damaged: {size} bytes for {count} tokens, must be {expected}")
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES)


def check_tokens(tokens, path, vocab_size):
    """Raise UserError where some of a shard's tokens are not in the vocabulary."""
    if tokens.max() >= vocab_size:
        raise UserError(f"{path} has token {tokens.max()}, must be below the model's vocab_size "
                        f"{vocab_size}")


@functools.lru_cache(maxsize=4)  # a batch may touch two epochs, of train and of val
def epoch_order(seed, epoch, count):
    """Return an epoch's order of its windows, and how far they are moved, in [0, 1)."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(count), rng.random()


class Loader:
    """Windows of block_size tokens and their targets, by sample number.

    Sample i depends on (seed, i) alone: training resumes by remembering a number, and ranks ask for
    different ones. In an epoch every window comes once, in random order; each epoch cuts the shards
    at other places. Raises UserError on missing or bad shards."""

    def __init__(self, directory, split, block_size, vocab_size, seed=0):
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.paths = sorted(Path(directory).glob(f"{split}_*.bin"))
        if not self.paths:
            raise UserError(f"{directory} has no {split}_*.bin; make it with: python data.py")
        self.shards = [open_shard(path) for path in self.paths]
        lengths = np.array([len(shard) for shard in self.shards])
        # The first shards are checked before the work, and each window of any as it comes.
        for path, shard, end in zip(self.paths, self.shards, lengths.cumsum()):
            if end - len(shard) < SHARD_TOKENS:
                check_tokens(shard, path, vocab_size)

        # A shard has as many windows as fit, but for one: its room lets an epoch move the others
        # by up to a window. A shard with a single window has the tokens behind it as room.
        fit, behind = np.divmod(lengths - 1, block_size)
        several = lengths > 2 * block_size
        self.room = np.where(several, block_size, behind)
        self.first = np.cumsum([0, *(fit - several)])  # shard s: windows first[s] to first[s + 1]
        if len(self) < 1:
            raise UserError(f"{directory} has no {split} shard of more than {block_size} tokens, "
                            "the block size")

    def __len__(self):
        """Return the number of windows in an epoch."""
        return int(self.first[-1])

    def window(self, i):
        """Return sample i: block_size + 1 tokens, int64."""
        epoch, i = divmod(i, len(self))
        order, moved = epoch_order(self.seed, epoch, len(self))
        s = int(np.searchsorted(self.first, order[i], side="right")) - 1
        start = (order[i] - self.first[s]) * self.block_size + int(moved * self.room[s])
        tokens = self.shards[s][start:start + self.block_size + 1].astype(np.int64)
        check_tokens(tokens, self.paths[s], self.vocab_size)
        return tokens

    def batch(self, samples):
        """Return (idx, targets), each (len(samples), block_size) int64; samples: their numbers."""
        samples = [int(i) for i in samples]
        windows = {i: self.window(i) for i in sorted(samples)}  # one epoch after the other
        tokens = torch.from_numpy(np.stack([windows[i] for i in samples]))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
