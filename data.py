"""Text in, token shards out, batches back.

    python data.py                            the Python standard library's source, as bytes
    python data.py stdlib --tokenizer bpe:4096
    python data.py shakespeare
    python data.py text book.txt notes.txt    your own files
    python data.py fineweb-edu --shards 10    GPT-2 tokens, 100M a shard, for GPUs
    python data.py p-hop                      a task that takes p steps in a row: see p_hop_docs

A data directory holds {train,val}_000000.bin, ... in the llm.c shard format (a header of 256 int32:
magic 20240520, version 1, number of tokens; then the tokens as uint16; or 20240801, 7 and uint32
for vocabularies of more than 65,536) and tokenizer.json. Every document begins with the
end-of-text token, which also serves as "begin of text".
"""

import base64
import codecs
import contextlib
import hashlib
import heapq
import inspect
import json
import os
import platform
import re
import shutil
import sysconfig
import urllib.request
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import torch
from tqdm import tqdm

from common import (
    Parser,
    UserError,
    from_hub,
    lock,
    read_json,
    run_script,
    some_path,
    whole_directory,
    whole_file,
    write_text,
)

# llm.c's shard formats, magic number: (version, dtype); the second is for large vocabularies
FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000
EOT = "<|endoftext|>"
BEGIN = (EOT, "<|bos|>", "<|begin_of_text|>", "<s>")  # names under which tokenizers have it

# ----------------------------------------------------------------------------- tokenizers

# words, numbers of up to three digits, punctuation, spaces; a word takes the space before it
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def make_tokenizer(name, docs=()):
    """A tiktoken.Encoding: "bytes", "gpt2" (tiktoken fetches it), "bpe:N" trained on docs, or that
    of a directory. Raises UserError."""
    if Path(name).is_dir():
        return load_tokenizer(name)
    if name == "gpt2":
        return tiktoken.get_encoding("gpt2")
    kind, _, size = name.partition(":")
    if name == "bytes":
        pattern, ranks = r"(?s:.{1,256})", {bytes([i]): i for i in range(256)}
    elif kind == "bpe" and size.isdigit() and 257 <= int(size) <= 65536:
        pattern, ranks = WORDS, train_bpe(docs, int(size) - 1)
    else:
        raise UserError(f"tokenizer is {name!r}, must be bytes, gpt2, bpe:N with N from 257 to "
                        "65536, or a directory with tokenizer.json")
    special = {EOT: len(ranks)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


PIECE = 1 << 17  # characters given to a tokenizer at once: tiktoken fails on 999,999 spaces
LONGEST_WORD = 1000  # characters, in training a tokenizer
# Every tokenizer cuts here: after the end of a line, before a letter; and between a letter and a
# single space with a letter behind it. (?r) searches from the right.
CUT = regex.compile(r"(?r)(?<=\S\n)(?=\p{L})|(?<=\p{L})(?= \p{L})")


def pieces(text):
    """Yield a text, a string or an iterable of strings, in pieces of at most PIECE characters that
    have the tokens of the whole. A text with no place to cut for so long is cut anywhere."""
    parts = text
    if isinstance(text, str):
        parts = (text[i:i + PIECE] for i in range(0, len(text), PIECE))
    rest = ""
    for part in parts:
        rest += part
        while len(rest) > PIECE:
            place = CUT.search(rest, 1, PIECE)
            cut = place.start() if place else PIECE
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def encode(tokenizer, text, bar=None):
    """Yield the tokens of a text (see pieces) in arrays; a progress bar counts its characters.
    Raises UserError."""
    for piece in pieces(text):
        try:
            yield tokenizer.encode_to_numpy(piece, disallowed_special=())
        except Exception as error:
            raise UserError(f"the tokenizer {tokenizer.name} fails on this text: {error}") from None
        if bar is not None:
            bar.update(len(piece))


def count_words(docs):
    """How often each word comes in docs, a Counter; of a long word its parts are counted."""
    counts = Counter()
    with tqdm(total=sum(map(len, docs)), desc="counting words", unit="char", unit_scale=True,
              leave=False) as bar:
        for doc in docs:
            for piece in pieces(doc):
                for word in regex.findall(WORDS, piece):
                    for i in range(0, len(word), LONGEST_WORD):
                        counts[word[i:i + LONGEST_WORD]] += 1
                bar.update(len(piece))
    return counts


def merge(word, pair, new):
    """The ids of a word with each occurrence of the pair, from the left, replaced by the id `new`.

    >>> merge([5, 6, 5, 6, 7], (5, 6), 9)
    [9, 9, 7]
    """
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and word[i + 1:i + 2] == [pair[1]]:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def pop_most_frequent(heap, pair_counts):
    """Take the most frequent pair (of several, that of the lowest ids) from a heap of
    (-count, pair). Counts may have fallen since: such entries go back with the count of today.
    None: no pair is left.

    >>> pop_most_frequent([(-9, (5, 6)), (-8, (6, 7))], Counter({(5, 6): 3, (6, 7): 8}))
    (6, 7)
    """
    while heap:
        count, pair = heapq.heappop(heap)
        if pair_counts[pair] == -count != 0:
            return pair
        if pair_counts[pair] > 0:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    return None


def train_bpe(docs, vocab_size):
    """Byte-pair ranks {bytes: id} of at most vocab_size tokens: the most frequent pair of
    neighbours becomes a token, again and again (Sennrich et al. 2016)."""
    # each different word once, as a list of ids, first of its bytes
    word_counts = count_words(docs)
    words = [list(word.encode()) for word in word_counts]
    counts = list(word_counts.values())

    # how often a pair comes, and in which words: a merge looks at those alone
    pair_counts, where = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    tokens = [bytes([i]) for i in range(256)]
    with tqdm(total=vocab_size - 256, desc="training tokenizer", unit="merge", leave=False) as bar:
        while len(tokens) < vocab_size and (best := pop_most_frequent(heap, pair_counts)):
            new = len(tokens)
            tokens.append(tokens[best[0]] + tokens[best[1]])
            made = set()  # pairs with the new token
            for i in where.pop(best):
                before, words[i] = words[i], merge(words[i], best, new)
                for pair in zip(before, before[1:]):
                    pair_counts[pair] -= counts[i]
                for pair in zip(words[i], words[i][1:]):
                    pair_counts[pair] += counts[i]
                    if new in pair:
                        where[pair].add(i)
                        made.add(pair)
            for pair in made:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            bar.update()
    return {token: i for i, token in enumerate(tokens)}


def save_tokenizer(tokenizer, path, text=None):
    """Write a tiktoken.Encoding as JSON, one that tiktoken knows by name as that name; `text` is
    the fingerprint of the data."""
    saved = {"name": tokenizer.name}
    if text:
        saved["text"] = text
    if tokenizer.name not in tiktoken.list_encoding_names():
        ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
        saved["pattern"] = tokenizer._pat_str
        saved["special"] = tokenizer._special_tokens
        saved["ids"] = [i for _, i in ranks]
        saved["tokens"] = [base64.b64encode(token).decode() for token, _ in ranks]
    write_text(path, json.dumps(saved))


def load_tokenizer(directory):
    """The tiktoken.Encoding of a data or run directory. Raises UserError."""
    path = Path(directory) / "tokenizer.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if "model" in saved:
            raise UserError("this is Hugging Face's format; make it ours with: "
                            f"python published.py tokenizer {directory} --out DIR")
        if "tokens" not in saved:
            return tiktoken.get_encoding(saved["name"])
        ids = saved.get("ids", range(len(saved["tokens"])))
        ranks = {base64.b64decode(token): i for token, i in zip(saved["tokens"], ids)}
        return checked_encoding(saved["name"], saved["pattern"], ranks, saved["special"])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer of this project: {error}") from None


# texts on which a pattern that loses characters, or tries too many ways to match, shows it
PROBES = ["".join(map(chr, range(1, 0x250))), " word" * 300]
PROBES += [c * 3000 + end for c in "a1 \n-" for end in "x!"]


def checked_encoding(name, pattern, ranks, special):
    """A tiktoken.Encoding of parts from a file. Raises UserError where its ids or its pattern
    cannot work."""
    ids = [*ranks.values(), *special.values()]
    if not all(type(i) is int and 0 <= i < 2 ** 24 for i in ids) or len(set(ids)) < len(ids):
        raise UserError("its token ids must be different whole numbers from 0 to 16,777,215")
    tokenizer = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                  special_tokens=special)
    with quiet_stderr():  # tiktoken prints a page of its own where it fails
        for text in PROBES:
            try:
                same = tokenizer.decode(tokenizer.encode_ordinary(text)) == text
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic in tiktoken is no Exception
                raise UserError(f"its pattern fails on text such as {text[:5]!r}...: "
                                f"{error}") from None
            if not same:
                raise UserError(f"its pattern loses part of text such as {text[:5]!r}...")
    return tokenizer


@contextlib.contextmanager
def quiet_stderr():
    """Nothing reaches the standard error in here, from no language."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def same_tokens(a, b):
    """Whether two tokenizers have the same tokens and ids."""
    return (a._mergeable_ranks, a._special_tokens) == (b._mergeable_ranks, b._special_tokens)


def begin_token(tokenizer):
    """The id of the token with which documents begin. Raises UserError where there is none."""
    for name in BEGIN:
        if name in tokenizer._special_tokens:
            return tokenizer._special_tokens[name]
    raise UserError(f"the tokenizer has none of the special tokens {', '.join(BEGIN)}")


def decode_stream(tokenizer, tokens):
    """Yield the text of each token as it comes; bytes that are not UTF-8 show as U+FFFD, numbers
    that are no token (a model's vocabulary is rounded up) as nothing."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        with contextlib.suppress(KeyError):
            yield decoder.decode(tokenizer.decode_single_token_bytes(int(token)))
    yield decoder.decode(b"", final=True)

# ----------------------------------------------------------------------------- sources

# What some distributions of Python have and others leave out, or make anew for each machine:
# without it classmates get the same text from the same version of Python.
NOT_EVERYWHERE = {
    "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "distutils",
    "macholib", "lib-dynload", "site-packages", "dist-packages", "__phello__", "sitecustomize.py",
    "usercustomize.py", "_distutils_system_mod.py"}


def stdlib_docs():
    """(train, val) lists of source texts; every 20th file or so, by a hash of its path, is for
    validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    train, val = [], []
    for name in sorted(names, key=Path.as_posix):  # the same order on every system
        made_here = name.parts[0].startswith(("config-", "_sysconfigdata"))
        if made_here or NOT_EVERYWHERE & set(name.parts):
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        docs = val if zlib.crc32(name.as_posix().encode()) % 20 == 0 else train
        docs.append(text)
    if not train or not val:
        raise UserError(f"no source text of the standard library in {root}; "
                        "try: python data.py text FILE...")
    return train, val


def read_text(path):
    """Yield the text of a UTF-8 file in parts. Raises UserError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0  # bytes
    with open(path, "rb") as file:
        while True:
            part = file.read(1 << 20)
            pending = len(decoder.getstate()[0])  # bytes of a character not yet whole
            try:
                yield decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                where = f"{error.reason} at byte {read - pending + error.start}"
                raise UserError(f"{path} is not UTF-8 text: {where}") from None
            if not part:
                return
            read += len(part)


class TextFile:
    """The characters start to stop of a UTF-8 file, read a part at a time."""

    def __init__(self, path, start, stop):
        self.path, self.start, self.stop = path, start, stop

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        at = 0
        for part in read_text(self.path):
            yield part[max(0, self.start - at):max(0, self.stop - at)]
            at += len(part)


def text_docs(files):
    """(train, val) lists of texts: of each file the first nine tenths and the last."""
    train, val = [], []
    for file in files:
        try:
            size = sum(map(len, read_text(file)))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from None
        cut = size * 9 // 10
        if cut == 0:
            raise UserError(f"{file} is too short, must have at least 2 characters")
        train.append(TextFile(file, 0, cut))
        val.append(TextFile(file, cut, size))
    return train, val


def p_hop_docs(n_train=100_000, n_val=1000, questions=64, hops=8, symbols=4, seed=0):
    """(train, val) lists of random strings with questions about them (p-hop induction, Sanford et
    al. 2024, arXiv 2402.09268).

    "3cA" reads: the string goes on with c; hop 3 times from here and you get to an a. A hop leads
    to what came after the last occurrence of the symbol one is at: p lookups one after the other,
    none of which says more than where to look next."""
    rng = np.random.default_rng(seed)
    # steps of 1 to symbols - 1: never the same symbol twice in a row
    steps = rng.integers(1, symbols, size=(n_train + n_val, questions))
    strings = steps.cumsum(axis=1) % symbols
    chances = rng.random(strings.shape)
    docs = []
    rows = zip(strings, chances)
    for string, chance in tqdm(rows, total=len(strings), desc="p-hop", unit="doc", leave=False):
        docs.append(p_hop_doc(string.tolist(), chance.tolist(), hops))
    return docs[:n_train], docs[n_train:]


def p_hop_doc(string, chances, hops):
    """A text with a question for each symbol of a string, a list of ints; chances in [0, 1) choose
    how many hops, at most `hops` and at most what the string so far allows.

    >>> p_hop_doc([0, 1, 0, 2], [0.9, 0.9, 0.9, 0.9], 8)  # from the second a one gets to the b
    '0aA0bB1aB0cC'
    """
    last = {}  # symbol: where it came last
    hop = []  # of each place, where a hop from it leads; None: its symbol is new
    longest = []  # of each place, how many hops can be made from it
    text = ""
    for i, symbol in enumerate(string):
        to = last[symbol] + 1 if symbol in last else None
        hop.append(to)
        longest.append(0 if to is None else longest[to] + 1)
        last[symbol] = i

        p = int(chances[i] * (min(longest[i], hops) + 1))
        at = i
        for _ in range(p):
            at = hop[at]
        text += f"{p}{chr(ord('a') + symbol)}{chr(ord('A') + string[at])}"
    return text


# where it is, its length and sha256
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


def shakespeare_docs():
    """(train, val) lists of one text each, parts of Shakespeare's plays (1.1 MB). Raises
    UserError."""
    url, size, sha256 = SHAKESPEARE
    file = Path("data") / "shakespeare.txt"
    if not file.exists():
        try:
            with urllib.request.urlopen(url, timeout=60) as reply:
                content = reply.read(size + 1)
        except OSError as error:
            raise UserError(f"{url}: {getattr(error, 'reason', error)}") from None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{url} sent another text than Shakespeare's {size:,} bytes: a login "
                            "page of this network?")
        file.parent.mkdir(exist_ok=True)
        with whole_file(file, "wb") as copy:
            copy.write(content)
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{file} is not Shakespeare's text of {size:,} bytes: move it away, and it "
                        "is fetched again")
    return text_docs([file])


# What makes the texts of each SOURCE: a function that returns (train, val), two lists of documents,
# each a string or an object as TextFile. One with a parameter `files` gets the FILEs named.
SOURCES = {"stdlib": stdlib_docs, "shakespeare": shakespeare_docs, "p-hop": p_hop_docs,
           "text": text_docs}

FINEWEB = "kjj0/finewebedu10B-gpt2"  # a dataset on the Hugging Face hub, already in shards
FINEWEB_SHARDS = 99


def fetch_fineweb(out, shards):
    """Fetch shards of FineWeb-Edu, 100M GPT-2 tokens each, to the directory `out`, each by itself,
    so that a long download can go on. Raises UserError."""
    check_replaceable(out)
    saved = out / "tokenizer.json"
    if saved.exists() and read_json(saved)["name"] != "gpt2":
        raise UserError(f"--out {out} holds data of another tokenizer: choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.hub")  # huggingface_hub keeps here what has arrived
    staging.mkdir(exist_ok=True)
    with lock(staging):
        # theirs count from 1, ours from 0; the validation shard comes first
        names = {"finewebedu_val_000000.bin": out / "val_000000.bin"}
        for i in range(shards):
            names[f"finewebedu_train_{i + 1:06d}.bin"] = out / f"train_{i:06d}.bin"
        for name, path in names.items():
            if not path.exists():
                arrived = from_hub("hf_hub_download", FINEWEB, name, repo_type="dataset",
                                   local_dir=staging)
                open_shard(arrived)  # checks it
                os.replace(arrived, path)
        write_text(saved, json.dumps({"name": "gpt2"}))  # tiktoken fetches it when it is needed
        shutil.rmtree(staging, ignore_errors=True)

# ----------------------------------------------------------------------------- shards


def write_shards(directory, split, docs, tokenizer):
    """Tokenise docs into {split}_000000.bin, ... of at most SHARD_TOKENS each; returns the number
    of tokens."""
    small, large = FORMATS
    writer = ShardWriter(directory, split, small if tokenizer.n_vocab <= 2 ** 16 else large)
    with tqdm(total=sum(map(len, docs)), desc=f"tokenizing {split}", unit="char", unit_scale=True,
              leave=False) as bar:
        for doc in docs:
            writer.write(np.array([begin_token(tokenizer)]))
            for tokens in encode(tokenizer, doc, bar):
                writer.write(tokens)
    writer.close()
    return writer.total


class ShardWriter:
    """Writes tokens to {split}_000000.bin, ... as they come."""

    def __init__(self, directory, split, magic):
        self.directory, self.split, self.magic = directory, split, magic
        self.version, self.dtype = FORMATS[magic]
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


class Loader:
    """Windows of block_size tokens and their targets, by sample number.

    Sample i is a function of (seed, i) alone: training resumes by remembering a number, and ranks
    share the work by asking for different ones. Within an epoch every window comes once, in random
    order; each epoch cuts the shards at other places. Raises UserError on missing or bad shards."""

    def __init__(self, directory, split, block_size, vocab_size, seed=0):
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.paths = sorted(Path(directory).glob(f"{split}_*.bin"))
        if not self.paths:
            raise UserError(f"{directory} has no {split}_*.bin; make it with: python data.py")
        self.shards = [open_shard(path) for path in self.paths]
        # windows in each shard: one less than fit, to have room for cutting elsewhere
        counts = [(len(shard) - 1) // block_size - (len(shard) > 2 * block_size)
                  for shard in self.shards]
        self.first = np.cumsum([0, *counts])  # shard s holds windows first[s] to first[s + 1]
        self.epoch = None
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
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order, self.shift = epoch, rng.permutation(len(self)), rng.random()
        # the window's shard, and where in it the window begins
        w = self.order[i]
        s = int(np.searchsorted(self.first, w, side="right")) - 1
        shard = self.shards[s]
        spare = len(shard) - 1 - (self.first[s + 1] - self.first[s]) * self.block_size
        start = (w - self.first[s]) * self.block_size
        start += int(self.shift * min(spare, self.block_size))
        tokens = shard[start:start + self.block_size + 1].astype(np.int64)
        if tokens.max() >= self.vocab_size:
            raise UserError(f"{self.paths[s]} has token {tokens.max()}, must be below the model's "
                            f"vocab_size {self.vocab_size}")
        return tokens

    def batch(self, samples):
        """(idx, targets), each (len(samples), block_size) int64, for an iterable of sample
        numbers."""
        tokens = torch.from_numpy(np.stack([self.window(int(i)) for i in samples]))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

# ----------------------------------------------------------------------------- command line

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


def other_text(directory):
    """A sentence that says so where a data directory has bytes of another standard library than
    the tables in results/; or ""."""
    saved = read_json(Path(directory) / "tokenizer.json")
    text = saved.get("text") or {"source": Path(directory).name}
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


def prepare(source="stdlib", out=None, tokenizer="bytes", files=(), shards=1):
    """Make the data directory `out` (default data/<source>) whole or not at all; returns its path.
    Raises UserError."""
    out = Path(out or Path("data") / source)
    if source == "fineweb-edu":
        fetch_fineweb(out, shards)
        print(f"{out}: {shards} train and 1 val shard, tokenizer gpt2")
        return out
    with whole_directory(out, check_replaceable) as temporary:
        train, val = SOURCES[source](files) if files else SOURCES[source]()
        encoding = make_tokenizer(tokenizer, train)
        n_train = write_shards(temporary, "train", train, encoding)
        n_val = write_shards(temporary, "val", val, encoding)
        text = fingerprint(temporary, source, len(train) + len(val))
        save_tokenizer(encoding, temporary / "tokenizer.json", text)
    characters = sum(map(len, train)) / n_train
    print(f"{out}: {n_train:,} train and {n_val:,} val tokens, tokenizer {encoding.name} "
          f"({encoding.n_vocab:,} tokens, {characters:.2f} characters each)\n"
          f"Python {text['python']}, {text['files']:,} files, sha256 {text['sha256'][:16]}")
    return out


def main():
    choices = [*SOURCES, "fineweb-edu"]
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("source", nargs="?", default="stdlib", metavar="SOURCE", choices=choices,
        help=f"{', '.join(choices)} (default: stdlib); text is followed by files")
    add("files", nargs="*", metavar="FILE", help="UTF-8 files, for SOURCE text")
    add("--out", type=some_path, metavar="DIR",
        help="data directory to make (default: data/SOURCE)")
    add("--tokenizer", default="bytes", metavar="NAME",
        help="bytes (default), gpt2, bpe:N (a vocabulary of N tokens trained on the text), or a "
             "directory with a tokenizer.json")
    add("--shards", type=int, default=1, metavar="N",
        help=f"fineweb-edu: train shards of 100M tokens, 1 to {FINEWEB_SHARDS} (default: 1)")
    args = parser.parse_args()
    function = SOURCES.get(args.source, fetch_fineweb)
    takes_files = "files" in inspect.signature(function).parameters
    if takes_files and not args.files:
        parser.error(f"SOURCE {args.source} needs files: python data.py {args.source} FILE...")
    if args.files and not takes_files:
        parser.error(f"SOURCE {args.source} takes no files, got {args.files[0]}")
    if not 1 <= args.shards <= FINEWEB_SHARDS:
        parser.error(f"--shards is {args.shards}, must be 1 to {FINEWEB_SHARDS}")
    prepare(args.source, args.out, args.tokenizer, args.files, args.shards)


if __name__ == "__main__":
    run_script(main)
