"""Text in, token shards out, batches back.

    python data.py                            the Python standard library's source, as bytes
    python data.py stdlib --tokenizer bpe:4096
    python data.py shakespeare
    python data.py text book.txt notes/       your own files, and folders of .txt, .md and .py
    python data.py fineweb-edu --shards 10    GPT-2 tokens, 100M a shard, for GPUs
    python data.py p-hop                      a task that takes p steps in a row: see p_hop_docs

A data directory holds {train,val}_000000.bin, ... in the llm.c shard format (a header of 256 int32:
magic 20240520, version 1, number of tokens; then the tokens as uint16; or 20240801, 7 and uint32
for vocabularies of more than 65,536) and tokenizer.json. Every document begins with the
end-of-text token, which also serves as "begin of text".
"""

import functools
import hashlib
import inspect
import json
import os
import platform
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from parts.cli import Parser, UserError, progress_bar, run_script, some_path
from parts.files import from_hub, lock, read_json, whole_directory, write_text
from parts.sources import SOURCES
from parts.tokenizer import begin_token, encode, make_tokenizer, save_tokenizer

# llm.c's shard formats, magic number: (version, dtype); the second is for large vocabularies
FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000
EVAL_SEED = 1234  # of a Loader's order of validation sequences: every script reads the same first
EVAL_TOKENS = 8192  # read at once in an evaluation, which holds all their logits

# ----------------------------------------------------------------------------- shards


def write_shards(directory, split, docs, tokenizer):
    """Tokenise docs into {split}_000000.bin, ... of at most SHARD_TOKENS each; returns the number
    of tokens."""
    writer = ShardWriter(directory, split, tokenizer.n_vocab)
    with progress_bar(total=sum(map(len, docs)), desc=f"tokenizing {split}", unit="char",
                      unit_scale=True) as bar:
        for doc in docs:
            writer.write(np.array([begin_token(tokenizer)]))
            for tokens in encode(tokenizer, doc, bar):
                writer.write(tokens)
    writer.close()
    return writer.total


class ShardWriter:
    """Writes tokens to {split}_000000.bin, ... as they come."""

    def __init__(self, directory, split, n_vocab):
        self.directory, self.split = directory, split
        small, large = FORMATS
        self.magic = small if n_vocab <= 2 ** 16 else large
        self.version, self.dtype = FORMATS[self.magic]
        self.file, self.shards, self.total = None, 0, 0

    def write(self, tokens):
        while len(tokens):
            if self.file is None:
                path = self.directory / f"{self.split}_{self.shards:06d}.bin"
                self.file = open(path, "wb")
                self.file.write(bytes(HEADER_BYTES))
                self.count = 0
                self.shards += 1
            part = tokens[:SHARD_TOKENS - self.count]
            tokens = tokens[len(part):]
            self.file.write(part.astype(self.dtype).tobytes())
            self.count += len(part)
            self.total += len(part)
            if self.count == SHARD_TOKENS:
                self.close()

    def close(self):
        """Put the header in front of the shard, now that its length is known."""
        if self.file:
            header = np.array([self.magic, self.version, self.count], dtype=np.int32)
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.close()
            self.file = None


def open_shard(path):
    """The tokens of a shard as a read-only memory map; UserError where the file is not a whole
    shard."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype=np.int32, count=256)
    if len(header) < 256 or int(header[0]) not in FORMATS:
        magic = header[0] if len(header) else "missing"
        raise UserError(f"{path} is not a token shard: its magic number is {magic}, "
                        f"must be {' or '.join(map(str, FORMATS))}")
    version, dtype = FORMATS[int(header[0])]
    if header[1] != version:
        raise UserError(f"{path} has shard version {header[1]}, must be {version}")
    count = int(header[2])
    expected = HEADER_BYTES + count * np.dtype(dtype).itemsize
    if size != expected or count == 0:
        raise UserError(f"{path} is damaged: {size} bytes for {count} tokens, must be {expected}")
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES)


def check_tokens(tokens, path, vocab_size):
    """Raise UserError where some of a shard's tokens are not of the vocabulary."""
    if tokens.max() >= vocab_size:
        raise UserError(f"{path} has token {tokens.max()}, must be below the model's vocab_size "
                        f"{vocab_size}")


@functools.lru_cache(maxsize=4)  # a batch may touch two epochs, of train and of val
def epoch_order(seed, epoch, count):
    """(the order of an epoch's windows, where its shards are cut): a permutation of `count` and a
    number in [0, 1)."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(count), rng.random()


class Loader:
    """Windows of block_size tokens and their targets, by sample number.

    Sample i is a function of (seed, i) alone: training resumes by remembering a number, and ranks
    share the work by asking for different ones. Within an epoch every window comes once, in random
    order; each epoch cuts the shards at other places. (What remains of a shard after as many
    windows as fit, less than one, is never read.) Raises UserError on missing or bad shards."""

    def __init__(self, directory, split, block_size, vocab_size, seed=0):
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.paths = sorted(Path(directory).glob(f"{split}_*.bin"))
        if not self.paths:
            raise UserError(f"{directory} has no {split}_*.bin; make it with: python data.py")
        self.shards = [open_shard(path) for path in self.paths]
        # Small data is checked before the work; of large data, what it takes an instant to read,
        # and each window as it comes.
        checked = 0
        for path, shard in zip(self.paths, self.shards):
            if checked < SHARD_TOKENS:
                check_tokens(shard, path, vocab_size)
            checked += len(shard)
        # windows in each shard: one less than fit, to have room for cutting elsewhere
        counts = [(len(shard) - 1) // block_size - (len(shard) > 2 * block_size)
                  for shard in self.shards]
        self.first = np.cumsum([0, *counts])  # shard s holds windows first[s] to first[s + 1]
        if len(self) < 1:
            raise UserError(f"{directory} has no {split} shard of more than {block_size} tokens, "
                            "the block size")

    def __len__(self):
        """Windows in an epoch."""
        return int(self.first[-1])

    def window(self, i):
        """Sample i: block_size + 1 tokens, int64."""
        # the order of the windows and where the shards are cut, anew for each epoch
        epoch, i = divmod(i, len(self))
        order, shift = epoch_order(self.seed, epoch, len(self))
        # the window's shard, and where in it the window begins
        w = order[i]
        s = int(np.searchsorted(self.first, w, side="right")) - 1
        shard = self.shards[s]
        spare = len(shard) - 1 - (self.first[s + 1] - self.first[s]) * self.block_size
        start = (w - self.first[s]) * self.block_size
        start += int(shift * min(spare, self.block_size))
        tokens = shard[start:start + self.block_size + 1].astype(np.int64)
        check_tokens(tokens, self.paths[s], self.vocab_size)
        return tokens

    def batch(self, samples):
        """(idx, targets), each (len(samples), block_size) int64, for an iterable of sample
        numbers."""
        samples = [int(i) for i in samples]
        windows = {i: self.window(i) for i in sorted(samples)}  # one epoch after the other
        tokens = torch.from_numpy(np.stack([windows[i] for i in samples]))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

# ----------------------------------------------------------------------------- data directories

# the tokens of `python data.py` with Python 3.11.7, with which the tables in results/ were made
STDLIB_SHA256 = "97e9ca11ca0842f423d751061ce90d28cbdbaeaea19f55797fcf9175a3d06568"


def fingerprint(directory, source, files):
    """What tells whether two data directories are the same: {"source", "python", "files", "sha256"
    of all tokens}."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.bin")):
        with open(path, "rb") as file:
            file.seek(HEADER_BYTES)
            while part := file.read(1 << 20):
                digest.update(part)
    return {"source": source, "python": platform.python_version(), "files": files,
            "sha256": digest.hexdigest()}


def text_of(directory):
    """Return the fingerprint of a data directory's text; None where it is not known."""
    file = Path(directory) / "tokenizer.json"
    return read_json(file).get("text") if file.exists() else None


def identity(text):
    """Return what tells a fingerprint from those of other texts; None if it says nothing."""
    return text.get("sha256", text.get("source")) if isinstance(text, dict) else None


def texts_differ(text, other):
    """Return whether two fingerprints are known to be those of different texts."""
    known = identity(text), identity(other)
    return None not in known and known[0] != known[1]


def changed_text(run, directory):
    """Return a sentence that says so where a data directory holds another text than a run was
    trained on; or ""."""
    trained_on = read_json(Path(run) / "config.json").get("text")
    if not texts_differ(trained_on, text_of(directory)):
        return ""
    return (f"{directory} holds another text than {run} was trained on: the run may have seen part "
            "of it in training")


def other_text(directory):
    """A sentence that says so where a data directory has bytes of another standard library than
    the tables in results/; or ""."""
    saved = read_json(Path(directory) / "tokenizer.json")
    text = saved.get("text")
    if not isinstance(text, dict):
        text = {"source": Path(directory).name}
    stdlib_bytes = saved.get("name") == "bytes" and text.get("source") == "stdlib"
    if not stdlib_bytes or text.get("sha256") == STDLIB_SHA256:
        return ""
    return (f"{directory} is another text than that of the tables in results/ (made with Python "
            f"{text.get('python', 'unknown')}, theirs with 3.11.7): losses will differ somewhat")


def check_place(directory):
    """Raise UserError where no directory can be made whole."""
    directory = Path(directory)
    if directory.is_symlink():
        raise UserError(f"--out {directory} is a link that leads round in a circle (Too many "
                        "levels of symbolic links)")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {directory} is no directory: choose another name")
    if directory == Path.cwd().resolve():
        raise UserError(f"--out {directory} is the current directory: choose a name of its own")


def check_replaceable(directory):
    """Raise UserError where a directory holds anything that data.py did not make: it is replaced
    as a whole."""
    check_place(directory)
    directory = Path(directory)
    for path in sorted(directory.iterdir()) if directory.exists() else ():
        ours = False
        if path.is_file() and path.name == "tokenizer.json":
            ours = "name" in read_json(path)  # those of others have a model
        elif path.is_file() and re.fullmatch(r"(train|val)_\d{6}\.bin", path.name):
            magic = np.fromfile(path, dtype=np.int32, count=1)
            ours = len(magic) == 0 or magic[0] in FORMATS
        if not ours:
            raise UserError(f"--out {directory} holds {path.name}, which data.py did not make: "
                            "choose another directory")
    if (directory / "tokenizer.json").exists() and not any(directory.glob("*.bin")):
        raise UserError(f"--out {directory} holds a tokenizer alone: choose another directory")


FINEWEB = "kjj0/finewebedu10B-gpt2"  # a dataset on the Hugging Face hub, already in shards
FINEWEB_SHARDS = 99


def fetch_fineweb(out, shards):
    """Fetch shards of FineWeb-Edu, 100M GPT-2 tokens each, to the directory `out`, each by itself,
    so that a long download can go on. Returns how many train shards are there. Raises
    UserError."""
    out = Path(os.path.realpath(out))
    check_replaceable(out)
    saved, made = out / "tokenizer.json", {"name": "gpt2", "text": {"source": FINEWEB}}
    if saved.exists() and read_json(saved) not in (made, {"name": "gpt2"}):
        raise UserError(f"--out {out} holds other data: choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.hub")  # huggingface_hub keeps here what has arrived
    staging.mkdir(exist_ok=True)
    with lock(staging):
        # theirs count from 1, ours from 0; the validation shard comes first
        names = {"finewebedu_val_000000.bin": out / "val_000000.bin"}
        for i in range(shards):
            names[f"finewebedu_train_{i + 1:06d}.bin"] = out / f"train_{i:06d}.bin"
        for name, path in progress_bar(names.items(), desc="fetching", unit="shard"):
            if not path.exists():
                arrived = from_hub("hf_hub_download", FINEWEB, name, repo_type="dataset",
                                   local_dir=staging)
                open_shard(arrived)  # checks it
                os.replace(arrived, path)
        write_text(saved, json.dumps(made))  # tiktoken fetches gpt2 when it is needed
        shutil.rmtree(staging, ignore_errors=True)
    return len(list(out.glob("train_*.bin")))


def prepare(source="stdlib", out=None, tokenizer="bytes", files=(), shards=1):
    """Make the data directory `out` (default data/<source>) whole or not at all; returns its path.
    Raises UserError."""
    out = Path(out or Path("data") / source)
    if source == "fineweb-edu":
        there = fetch_fineweb(out, shards)
        print(f"{out}: {there} train and 1 val shard, tokenizer gpt2")
        return out
    with whole_directory(out, check_replaceable) as temporary:
        train, val = SOURCES[source](files) if files else SOURCES[source]()
        for docs, what in ((train, "train on"), (val, "validate")):
            if not any(map(len, docs)):
                raise UserError(f"SOURCE {source} gives no text to {what}: it is too short")
        encoding = make_tokenizer(tokenizer, train)
        n_train = write_shards(temporary, "train", train, encoding)
        n_val = write_shards(temporary, "val", val, encoding)
        text = fingerprint(temporary, source, len(train) + len(val))
        save_tokenizer(encoding, temporary / "tokenizer.json", text)
    characters = sum(map(len, train)) / n_train
    print(f"{out}: {n_train:,} train and {n_val:,} val tokens, tokenizer {encoding.name} "
          f"({encoding.n_vocab:,} tokens, {characters:.2f} characters each)\n"
          f"Python {text['python']}, {text['files']:,} documents, sha256 {text['sha256'][:16]}")
    return out

# ----------------------------------------------------------------------------- command line


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
    add("--shards", type=int, metavar="N",
        help=f"fineweb-edu: train shards of 100M tokens, 1 to {FINEWEB_SHARDS} (default: 1)")
    args = parser.parse_args()
    function = SOURCES.get(args.source, fetch_fineweb)
    takes_files = "files" in inspect.signature(function).parameters
    if takes_files and not args.files:
        parser.error(f"SOURCE {args.source} needs files: python data.py {args.source} FILE...")
    if args.files and not takes_files:
        parser.error(f"SOURCE {args.source} takes no files, got {args.files[0]}")
    if args.source == "fineweb-edu":
        if args.tokenizer not in (None, "gpt2"):
            parser.error(f"--tokenizer is {args.tokenizer}, must be gpt2 (or left out): "
                         "fineweb-edu comes in its tokens")
    elif args.shards is not None:
        parser.error(f"--shards is for SOURCE fineweb-edu: {args.source} has as many as it needs")
    shards = 1 if args.shards is None else args.shards
    if not 1 <= shards <= FINEWEB_SHARDS:
        parser.error(f"--shards is {shards}, must be 1 to {FINEWEB_SHARDS}")
    prepare(args.source, args.out, args.tokenizer or "bytes", args.files, shards)


if __name__ == "__main__":
    run_script(main)
