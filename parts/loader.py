"""Read batches from token shards, whose format is described in data.py."""

import functools
from pathlib import Path

import numpy as np
import torch

from parts.errors import UserError

# {magic number: (version, dtype)} of shards; the second is for large vocabularies
FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000
EVAL_SEED = 1234  # of the validation Loader: every script reads the same sequences first
EVAL_TOKENS = 8192  # in a batch of an evaluation, whose logits are all in memory at once


def open_shard(path):
    """Return the tokens of a shard as a read-only memory map. Raises UserError if it is damaged."""
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
    """Raise UserError if a token of the shard at `path` is not in the vocabulary."""
    if tokens.max() >= vocab_size:
        raise UserError(f"{path} has token {tokens.max()}, must be below {vocab_size}, the number "
                        "of tokens in the tokenizer")


@functools.lru_cache(maxsize=4)  # a batch may span two epochs, for train and for val
def epoch_order(seed, epoch, count):
    """Return the order of an epoch's windows, and how far they are moved, a share in [0, 1)."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(count), rng.random()


class Loader:
    """Read windows of block_size tokens, and their targets, by sample number.

    Sample i depends on (seed, i) alone. So a run resumes from a sample number, and each rank reads
    its own numbers. An epoch has every window once, in random order; each epoch cuts the shards at
    different places. Raises UserError if shards are missing or damaged."""

    def __init__(self, directory, split, block_size, vocab_size, seed=0):
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.paths = sorted(Path(directory).glob(f"{split}_*.bin"))
        if not self.paths:
            raise UserError(f"{directory} has no {split}_*.bin; make it with: python data.py")
        self.shards = [open_shard(path) for path in self.paths]
        lengths = np.array([len(shard) for shard in self.shards])
        # The first shards are checked now, and every window again when it is read.
        for path, shard, end in zip(self.paths, self.shards, lengths.cumsum()):
            if end - len(shard) < SHARD_TOKENS:
                check_tokens(shard, path, vocab_size)

        # A shard has one window less than would fit, so that each epoch can move its windows by up
        # to block_size tokens. A single window moves within the tokens that are left behind it.
        fit, behind = np.divmod(lengths - 1, block_size)
        several = fit > 1
        self.room = np.where(several, block_size, behind)
        self.first = np.cumsum([0, *(fit - several)])  # first[s]: the first window of shard s
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
        """Return (idx, targets), each (len(samples), block_size) int64. samples: sample numbers."""
        samples = [int(i) for i in samples]
        windows = {i: self.window(i) for i in sorted(samples)}  # sorted: one epoch after the other
        tokens = torch.from_numpy(np.stack([windows[i] for i in samples]))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
