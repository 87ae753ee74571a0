"""Text in, token shards out, batches back.

    python data.py                            the Python standard library's source, as bytes
    python data.py stdlib --tokenizer bpe:4096
    python data.py text book.txt notes/       your own files, and folders of .txt, .md and .py
    python data.py fineweb-edu --shards 10    GPT-2 tokens, 100M a shard, for GPUs

A data directory holds {train,val}_000000.bin, ... in the llm.c shard format (a header of 256 int32:
magic 20240520, version 1, number of tokens; then the tokens as uint16; or 20240801, 7 and uint32
for vocabularies of more than 65,536) and tokenizer.json. Every document begins with the
end-of-text token, which also serves as "begin of text".
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

from parts.cli import Parser, number, progress_bar, run_script, some_path
from parts.errors import UserError, first_line
from parts.files import whole_directory, write_text
from parts.reading import read_json
from parts.sources import SOURCES
from parts.tokenizer import begin_token, encode, make_tokenizer, save_tokenizer

# llm.c's shard formats, magic number: (version, dtype); the second is for large vocabularies
FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000
EVAL_SEED = 1234  # of a Loader's order of validation sequences: every script reads the same first
EVAL_TOKENS = 8192  # read at once in an evaluation, which holds all their logits

# ----------------------------------------------------------------------------- shards


def write_shards(directory, split, arrays, n_vocab):
    """Write arrays of tokens, one after the other, to {split}_000000.bin, ... of at most
    SHARD_TOKENS each. Return the number of tokens."""
    small, large = FORMATS
    magic = small if n_vocab <= 2 ** 16 else large
    version, dtype = FORMATS[magic]
    total, files = 0, []
    with contextlib.ExitStack() as stack:
        for tokens in arrays:
            while len(tokens):
                room = SHARD_TOKENS - total % SHARD_TOKENS
                if room == SHARD_TOKENS:  # a new shard begins
                    path = directory / f"{split}_{len(files):06d}.bin"
                    files.append(stack.enter_context(open(path, "wb")))
                    files[-1].write(bytes(HEADER_BYTES))
                files[-1].write(tokens[:room].astype(dtype).tobytes())
                total += len(tokens[:room])
                tokens = tokens[room:]
        for i, file in enumerate(files):  # the headers, now that the lengths are known
            count = min(SHARD_TOKENS, total - i * SHARD_TOKENS)
            file.seek(0)
            file.write(np.array([magic, version, count], dtype=np.int32).tobytes())
    return total


def tokens_of(docs, tokenizer, title):
    """Yield the tokens of docs in arrays, the begin token before each document."""
    with progress_bar(total=sum(map(len, docs)), desc=title, unit="char", unit_scale=True) as bar:
        for doc in docs:
            yield np.array([begin_token(tokenizer)])
            yield from encode(tokenizer, doc, bar)


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

# ----------------------------------------------------------------------------- data directories


def fingerprint(directory, source, files):
    """Return what tells a data directory from others, {"sha256": of all tokens, ...}."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.bin")):
        with open(path, "rb") as file:
            file.seek(HEADER_BYTES)
            hashlib.file_digest(file, lambda: digest)
    return {"source": source, "python": platform.python_version(), "files": files,
            "sha256": digest.hexdigest()}


def check_replaceable(directory):
    """Raise UserError where a directory holds anything that data.py did not make: it is replaced
    as a whole."""
    paths = sorted(Path(directory).glob("*"))
    for path in paths:
        ours = False
        if path.name == "tokenizer.json":
            ours = "name" in read_json(path)  # those of others have a model
        elif re.fullmatch(r"(train|val)_\d{6}\.bin", path.name):
            ours = np.fromfile(path, dtype=np.int32, count=1).tolist() in [[m] for m in FORMATS]
        if not ours:
            raise UserError(f"--out {directory} holds {path.name}, which data.py did not make: "
                            "choose another directory")
    if [path.name for path in paths] == ["tokenizer.json"]:
        raise UserError(f"--out {directory} holds a tokenizer alone: choose another directory")


FINEWEB = "kjj0/finewebedu10B-gpt2"  # a dataset on the Hugging Face hub, already in shards
FINEWEB_SHARDS = 99


def from_hub(function, repository, *arguments, **options):
    """Return the path that a function of huggingface_hub fetches to. Raises UserError."""
    try:
        import huggingface_hub
        return Path(getattr(huggingface_hub, function)(repository, *arguments, **options))
    except ImportError:
        raise UserError(f"{repository} is on the Hugging Face hub: "
                        "pip install huggingface_hub") from None
    except Exception as error:  # whatever the network or the hub makes of it
        reason = first_line(error, type(error).__name__)
        raise UserError(f"{repository} was not fetched from the Hugging Face hub: "
                        f"{reason}") from None


def fetch_fineweb(out, shards):
    """Fetch shards of FineWeb-Edu to the directory `out`, each by itself: a long download goes on
    with the first that is missing. Raises UserError."""
    check_replaceable(out)
    saved, made = out / "tokenizer.json", {"name": "gpt2", "text": {"source": FINEWEB}}
    if saved.exists() and read_json(saved) not in (made, {"name": "gpt2"}):
        raise UserError(f"--out {out} holds other data: choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    names = {"val_000000.bin": "finewebedu_val_000000.bin"}
    for i in range(shards):  # theirs count from 1
        names[f"train_{i:06d}.bin"] = f"finewebedu_train_{i + 1:06d}.bin"
    with tempfile.TemporaryDirectory(prefix=".hub-", dir=out.resolve().parent) as arriving:
        for name, theirs in progress_bar(names.items(), desc="fetching", unit="shard"):
            if not (out / name).exists():
                arrived = from_hub("hf_hub_download", FINEWEB, theirs, repo_type="dataset",
                                   local_dir=arriving)
                open_shard(arrived)  # checks it
                os.replace(arrived, out / name)
    write_text(saved, json.dumps(made))  # tiktoken fetches gpt2 when it is needed
    print(f"{out}: {len(list(out.glob('train_*.bin')))} train and 1 val shard, tokenizer gpt2")


def prepare(source="stdlib", out=None, tokenizer="bytes", files=(), shards=1):
    """Make the data directory `out` (default data/<source>), whole or not at all. Return its path.
    Raises UserError."""
    out = Path(out or f"data/{source}")
    if source == "fineweb-edu":
        fetch_fineweb(out, shards)
        return out
    with whole_directory(out, check_replaceable) as new:
        train, val = SOURCES[source](files) if files else SOURCES[source]()
        for docs, what in ((train, "train on"), (val, "validate")):
            if not any(map(len, docs)):
                raise UserError(f"SOURCE {source} gives no text to {what}: it is too short")
        encoding = make_tokenizer(tokenizer, train)
        counts = [write_shards(new, split, tokens_of(docs, encoding, f"tokenizing {split}"),
                               encoding.n_vocab)
                  for split, docs in (("train", train), ("val", val))]
        text = fingerprint(new, source, len(train) + len(val))
        save_tokenizer(encoding, new / "tokenizer.json", text)
    characters = sum(map(len, train)) / counts[0]
    print(f"{out}: {counts[0]:,} train and {counts[1]:,} val tokens, tokenizer {encoding.name} "
          f"({encoding.n_vocab:,} tokens, {characters:.2f} characters each)\n"
          f"Python {text['python']}, {text['files']:,} documents, sha256 {text['sha256'][:16]}")
    return out


def main():
    choices = [*SOURCES, "fineweb-edu"]
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("source", nargs="?", default="stdlib", metavar="SOURCE", choices=choices,
        help=f"{', '.join(choices)} (default: stdlib); text is followed by files and folders")
    add("files", nargs="*", type=some_path, metavar="FILE",
        help="for SOURCE text: UTF-8 files, and folders whose .txt, .md and .py files are read")
    add("--out", type=some_path, metavar="DIR",
        help="data directory to make (default: data/SOURCE)")
    add("--tokenizer", metavar="NAME",
        help="bytes (default), gpt2, bpe:N (a vocabulary of N tokens trained on the text), or a "
             "directory with a tokenizer.json")
    add("--shards", type=number(int, 1, FINEWEB_SHARDS), metavar="N",
        help=f"fineweb-edu: train shards of 100M tokens, 1 to {FINEWEB_SHARDS} (default: 1)")
    args = parser.parse_args()
    if args.source == "text" and not args.files:
        parser.error("SOURCE text needs files: python data.py text FILE...")
    if args.source != "text" and args.files:
        parser.error(f"SOURCE {args.source} takes no files, got {args.files[0]}")
    if args.source == "fineweb-edu" and args.tokenizer not in (None, "gpt2"):
        parser.error(f"--tokenizer is {args.tokenizer}, must be gpt2 (or left out): "
                     "fineweb-edu comes in its tokens")
    if args.source != "fineweb-edu" and args.shards:
        parser.error(f"--shards is for SOURCE fineweb-edu: {args.source} has as many as it needs")
    prepare(args.source, args.out, args.tokenizer or "bytes", args.files, args.shards or 1)


if __name__ == "__main__":
    run_script(main)
