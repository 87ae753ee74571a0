"""Turn text into token shards, from which parts/loader.py reads batches.

    python data.py                            the Python standard library's source, as bytes
    python data.py stdlib --tokenizer bpe:4096 --out data/bpe
    python data.py text book.txt notes/       your own files, and folders of .txt, .md and .py
    python data.py fineweb-edu --shards 10    GPT-2 tokens, 100M a shard, for GPUs

A data directory holds tokenizer.json and shards {train,val}_000000.bin, ... in the llm.c format: a
header of 256 int32 (magic number 20240520, version 1, number of tokens), then the tokens as uint16.
Vocabularies of more than 65,536 tokens have magic number 20240801, version 7 and uint32. Every
document begins with the end-of-text token, or another tokenizer's own begin token.
"""

import contextlib
import hashlib
import os
import platform
import re
import tempfile
from pathlib import Path

import numpy as np
import tiktoken

from parts.bpe import WORDS, train_bpe
from parts.cli import Parser, number, progress_bar, run_script, some_path
from parts.errors import UserError, first_line
from parts.files import whole_directory, write_json
from parts.loader import FORMATS, HEADER_BYTES, SHARD_TOKENS, open_shard
from parts.reading import read_json
from parts.sources import SOURCES
from parts.tokenizer import EOT, begin_token, encode, load_tokenizer, save_tokenizer

# ---------------------------------------------------------------------- tokens and shards


def make_tokenizer(name, docs=()):
    """Return a tiktoken.Encoding by name: "bytes", "gpt2" (tiktoken downloads it), "bpe:N" (trained
    on docs) or a directory whose tokenizer.json to load. Raises UserError."""
    if name == "gpt2":
        return tiktoken.get_encoding("gpt2")
    kind, _, size = name.partition(":")
    if name == "bytes":
        pattern, ranks = r"(?s:.{1,256})", {bytes([i]): i for i in range(256)}
    elif kind == "bpe" and size.isdecimal() and 257 <= int(size) <= 65536:
        pattern, ranks = WORDS, train_bpe(docs, int(size) - 1)
    elif Path(name).is_dir():  # a directory called bytes is given as ./bytes
        return load_tokenizer(name)
    else:
        raise UserError(f"tokenizer is {name!r}, must be bytes, gpt2, bpe:N with N from 257 to "
                        "65536, or a directory with tokenizer.json")
    special = {EOT: len(ranks)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def write_shards(directory, split, arrays, n_vocab):
    """Write arrays of tokens, one after the other, to shards {split}_000000.bin, ... of at most
    SHARD_TOKENS tokens. Return the number of all tokens."""
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
        for i, file in enumerate(files):  # write the headers, now that the lengths are known
            count = min(SHARD_TOKENS, total - i * SHARD_TOKENS)
            file.seek(0)
            file.write(np.array([magic, version, count], dtype=np.int32).tobytes())
    return total


def tokens_of(docs, tokenizer, title):
    """Yield the tokens of docs in arrays. Each document begins with the begin token."""
    with progress_bar(total=sum(map(len, docs)), desc=title, unit="char", unit_scale=True) as bar:
        for doc in docs:
            yield np.array([begin_token(tokenizer)])
            yield from encode(tokenizer, doc, bar)

# ---------------------------------------------------------------------- data directories


def fingerprint(directory, source, documents):
    """Return what identifies a data directory: its source, Python, the tokens' sha256, and the
    number of documents, as "files" (a file that is cut in two counts twice)."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.bin")):
        digest.update(open_shard(path))
    return {"source": source, "python": platform.python_version(), "files": documents,
            "sha256": digest.hexdigest()}


def check_replaceable(directory):
    """Raise UserError if a directory to replace or to fill holds what data.py did not make."""
    paths = sorted(Path(directory).glob("*"))
    for path in paths:
        ours = False
        if path.name == "tokenizer.json":
            ours = "name" in read_json(path)  # Hugging Face's file has "model" instead
        elif re.fullmatch(r"(train|val)_\d{6}\.bin", path.name):
            ours = np.fromfile(path, dtype=np.int32, count=1).tolist() in [[m] for m in FORMATS]
        if not ours:
            raise UserError(f"--out {directory} holds {path.name}, which data.py did not make: "
                            "choose another directory")
    if [path.name for path in paths] == ["tokenizer.json"]:
        raise UserError(f"--out {directory} holds only a tokenizer: choose another directory")


FINEWEB = "kjj0/finewebedu10B-gpt2"  # a dataset on the Hugging Face hub, already in shards
FINEWEB_SHARDS = 99


def from_hub(function, repository, *arguments, **options):
    """Return the path to which a function of huggingface_hub downloads. Raises UserError."""
    try:
        import huggingface_hub
        return Path(getattr(huggingface_hub, function)(repository, *arguments, **options))
    except ImportError:
        raise UserError(f"{repository} is on the Hugging Face hub: "
                        "pip install huggingface_hub") from None
    except Exception as error:  # the network and the hub raise many kinds
        reason = first_line(error, type(error).__name__)
        raise UserError(f"{repository} was not fetched from the Hugging Face hub: "
                        f"{reason}") from None


def fetch_fineweb(out, shards):
    """Download shards of FineWeb-Edu to the directory `out`. Shards that are there already are
    skipped, so an interrupted download can be repeated. Raises UserError."""
    check_replaceable(out)
    saved = out / "tokenizer.json"
    there = read_json(saved) if saved.exists() else {"name": "gpt2"}
    if there["name"] != "gpt2" or FINEWEB not in str(there.get("text", FINEWEB)):
        raise UserError(f"--out {out} holds other data: choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    names = {"val_000000.bin": "finewebedu_val_000000.bin"}
    for i in range(shards):  # the hub counts shards from 1
        names[f"train_{i:06d}.bin"] = f"finewebedu_train_{i + 1:06d}.bin"
    with tempfile.TemporaryDirectory(prefix=".hub-", dir=out.resolve().parent) as arriving:
        for name, theirs in progress_bar(names.items(), desc="fetching", unit="shard"):
            if not (out / name).exists():
                arrived = from_hub("hf_hub_download", FINEWEB, theirs, repo_type="dataset",
                                   local_dir=arriving)
                open_shard(arrived)  # raises UserError if it is damaged
                os.replace(arrived, out / name)
    count = len(list(out.glob("train_*.bin")))
    text = {"source": f"{FINEWEB}, {count} train shards"}  # with more, other windows are read
    write_json(saved, {"name": "gpt2", "text": text})  # tiktoken downloads gpt2
    print(f"{out}: {count} train and 1 val shard, tokenizer gpt2")


def prepare(source="stdlib", out=None, tokenizer="bytes", files=(), shards=1):
    """Make the data directory `out` (default: data/<source>) and return its path. It is written
    whole or not at all, except for fineweb-edu. Raises UserError."""
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
        help=f"one of {', '.join(choices)} (default: stdlib); text needs files or folders")
    add("files", nargs="*", type=some_path, metavar="FILE",
        help="for SOURCE text: UTF-8 files, or folders, whose .txt, .md and .py files are read")
    add("--out", type=some_path, metavar="DIR",
        help="data directory to make (default: data/SOURCE)")
    add("--tokenizer", type=some_path, metavar="NAME",
        help="bytes (default), gpt2, bpe:N (a vocabulary of N tokens trained on the text), or a "
             "directory with a tokenizer.json")
    add("--shards", type=number(int, 1, FINEWEB_SHARDS), metavar="N",
        help=f"for fineweb-edu: number of 100M-token shards, 1 to {FINEWEB_SHARDS} (default: 1)")
    args = parser.parse_intermixed_args()  # FILEs may also follow flags
    if args.source == "text" and not args.files:
        parser.error("SOURCE text needs files: python data.py text FILE...")
    if args.source != "text" and args.files:
        parser.error(f"SOURCE {args.source} takes no files, got {args.files[0]}")
    if args.source == "fineweb-edu" and args.tokenizer not in (None, "gpt2"):
        parser.error(f"--tokenizer is {args.tokenizer}, must be gpt2 (or left out): "
                     "fineweb-edu is already in GPT-2 tokens")
    if args.source != "fineweb-edu" and args.shards:
        parser.error(f"--shards is for SOURCE fineweb-edu: leave it out for {args.source}")
    prepare(args.source, args.out, args.tokenizer or "bytes", args.files, args.shards or 1)


if __name__ == "__main__":
    run_script(main)
