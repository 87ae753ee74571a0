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
import json
import os
import platform
import re
import shutil
import sysconfig
import urllib.request
import zlib
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import torch
from tqdm import tqdm

from common import Parser, UserError, from_hub, lock, read_json, run_script, some_path, whole_directory, whole_file, write_text

# llm.c's shard formats, magic number: (version, dtype); the second one for vocabularies of more than 65,536 tokens
FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000
EOT = "<|endoftext|>"
# where it is, its length and sha256
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", 1_115_394,
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
FINEWEB = "kjj0/finewebedu10B-gpt2"  # a dataset on the Hugging Face hub
FINEWEB_SHARDS = 99

# ----------------------------------------------------------------------------- tokenizers

# words, numbers of up to three digits, punctuation, spaces; a word takes the space before it
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def make_tokenizer(name, docs=()):
    """A tiktoken.Encoding: "bytes", "gpt2" (fetched by tiktoken), "bpe:N" trained on docs (strings), or that of a directory."""
    if Path(name).is_dir():
        return load_tokenizer(name)
    if name == "gpt2":
        return tiktoken.get_encoding("gpt2")
    ranks = {bytes([i]): i for i in range(256)}
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,256})", mergeable_ranks=ranks, special_tokens={EOT: 256})
    kind, _, size = name.partition(":")
    if kind != "bpe" or not size.isdigit() or not 257 <= int(size) <= 65536:
        raise UserError(f"tokenizer is {name!r}, must be bytes, gpt2, bpe:N with N from 257 to 65536, or a directory with "
                        "tokenizer.json")
    ranks = train_bpe(docs, int(size) - 1)
    return tiktoken.Encoding(name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


PIECE = 1 << 17  # characters that a tokenizer is given at once: tiktoken fails on runs of 999,999 spaces
LONGEST_WORD = 1000  # characters, in training a tokenizer
# where every tokenizer cuts: between one end of a line and a letter, and before a single space between two letters
CUT = regex.compile(r"(?r)(?<=\S\n)(?=\p{L})|(?<=\p{L})(?= \p{L})")


def pieces(text):
    """Yield a text, a string or an iterable of strings, in pieces of at most PIECE characters that have the tokens of the whole.

    A text without a place to cut for so long is cut anywhere."""
    parts = (text[i:i + PIECE] for i in range(0, len(text), PIECE)) if isinstance(text, str) else text
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
    """Yield the tokens of a text (see pieces) in arrays; a progress bar counts its characters. Raises UserError."""
    for piece in pieces(text):
        try:
            yield tokenizer.encode_to_numpy(piece, disallowed_special=())
        except Exception as error:
            raise UserError(f"the tokenizer {tokenizer.name} fails on this text: {error}") from None
        if bar is not None:
            bar.update(len(piece))


def train_bpe(docs, vocab_size):
    """Byte-pair ranks {bytes: id} of at most vocab_size tokens: merge the most frequent pair, again and
    again (Sennrich et al. 2016), each time in just the words that contain it."""
    counts = Counter()
    with tqdm(total=sum(map(len, docs)), desc="counting words", unit="char", unit_scale=True, leave=False) as bar:
        for piece in chain.from_iterable(map(pieces, docs)):
            for word in regex.findall(WORDS, piece):  # a merge takes time with the length of a word: long ones count in parts
                counts.update(word[i:i + LONGEST_WORD] for i in range(0, len(word), LONGEST_WORD))
            bar.update(len(piece))
    words = [list(word.encode()) for word in counts]
    counts = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # pair -> its count, pair -> words that may contain it
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[w]
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in pairs.items()]  # most frequent first, then lowest ids; stale entries are skipped
    heapq.heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    with tqdm(total=vocab_size - 256, desc="training tokenizer", unit="merge", leave=False) as bar:
        while len(tokens) < vocab_size and heap:
            n, pair = heapq.heappop(heap)
            if pairs[pair] != -n:
                if pairs[pair] > 0:
                    heapq.heappush(heap, (-pairs[pair], pair))
                continue
            new, changed = len(tokens), set()
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
            for w in where.pop(pair):
                word, i = words[w], 0
                while i < len(word) - 1:
                    if (word[i], word[i + 1]) == pair:
                        for j in (i - 1, i + 1):  # the neighbouring pairs go, new ones come
                            if 0 <= j < len(word) - 1:
                                pairs[word[j], word[j + 1]] -= counts[w]
                        word[i:i + 2] = [new]
                        for j in (i - 1, i):
                            if 0 <= j < len(word) - 1:
                                p = word[j], word[j + 1]
                                pairs[p] += counts[w]
                                where[p].add(w)
                                changed.add(p)
                    i += 1
            pairs.pop(pair)
            for p in changed:
                heapq.heappush(heap, (-pairs[p], p))
            bar.update()
    return {token: i for i, token in enumerate(tokens)}


def save_tokenizer(tokenizer, path, text=None):
    """Write a tiktoken.Encoding as JSON; one that tiktoken knows by name is kept as that name. text: see fingerprint."""
    saved = {"name": tokenizer.name} | ({"text": text} if text else {})
    if tokenizer.name not in tiktoken.list_encoding_names():
        tokens, ids = zip(*sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1]))
        saved |= {"pattern": tokenizer._pat_str, "special": tokenizer._special_tokens, "ids": ids,
                  "tokens": [base64.b64encode(token).decode() for token in tokens]}
    write_text(path, json.dumps(saved))


# texts on which a pattern that loses characters, or tries too many ways to match, shows it
PROBES = ["".join(map(chr, range(1, 0x250))), " word" * 300, *(c * 3000 + end for c in "a1 \n-" for end in "x!")]


def checked_encoding(name, pattern, ranks, special):
    """A tiktoken.Encoding from foreign parts. Raises UserError where its ids or its pattern cannot work."""
    ids = [*ranks.values(), *special.values()]
    if not all(type(i) is int and 0 <= i < 2 ** 24 for i in ids) or len(set(ids)) < len(ids):
        raise UserError("its token ids must be different whole numbers from 0 to 16,777,215")
    tokenizer = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    with quiet_stderr():  # tiktoken prints a page of its own where it fails
        for text in PROBES:
            try:
                same = tokenizer.decode(tokenizer.encode_ordinary(text)) == text
            except BaseException as error:  # a panic is no Exception
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                raise UserError(f"its pattern fails on text such as {text[:5]!r}...: {error}") from None
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


def load_tokenizer(path):
    """The tiktoken.Encoding in a data or run directory; a Hugging Face byte-level BPE tokenizer.json becomes one with the
    same token ids. Raises UserError."""
    path = Path(path) / "tokenizer.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if "model" in saved:
            return from_hugging_face(saved)
        if "tokens" not in saved:
            return tiktoken.get_encoding(saved["name"])
        ranks = {base64.b64decode(token): i for token, i in zip(saved["tokens"], saved.get("ids", range(len(saved["tokens"]))))}
        return checked_encoding(saved["name"], saved["pattern"], ranks, saved["special"])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer of this project or a Hugging Face byte-level BPE: {error}") from None


def same_tokens(a, b):
    """Whether two tokenizers have the same tokens and ids."""
    return (a._mergeable_ranks, a._special_tokens) == (b._mergeable_ranks, b._special_tokens)


GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def from_hugging_face(saved):
    """A tiktoken.Encoding from the JSON of a Hugging Face tokenizer. Raises UserError for what is not plain byte-level BPE.

    tiktoken merges the adjacent pair whose union has the lowest id; Hugging Face the pair that comes first in a list.
    Both agree where the merges that can happen come in the order of the ids they make, which is checked."""
    def need(ok, what):
        if not ok:
            raise UserError(f"{what}: not byte-level BPE as it is implemented here")
    model = saved["model"]
    need(model.get("type", "BPE") == "BPE", f"model is {model.get('type')}")
    need(not saved.get("normalizer"), f"normalizer is {(saved.get('normalizer') or {}).get('type')}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        need(not model.get(name), f"{name} is {model.get(name)!r}")
    steps = saved.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    need(steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space"),
         f"pre_tokenizer ends with {steps[-1].get('type')}, add_prefix_space {steps[-1].get('add_prefix_space')}")
    pattern = [GPT2_PATTERN] if steps[-1].get("use_regex", True) else []
    for step in steps[:-1]:
        need(step["type"] == "Split" and step["behavior"] == "Isolated" and not step.get("invert") and "Regex" in step["pattern"],
             f"pre_tokenizer has {step['type']}")
        pattern.append(step["pattern"]["Regex"])
    need(len(pattern) == 1, f"pre_tokenizer splits by {len(pattern)} patterns")

    for token in saved.get("added_tokens", []):  # we never take these from text; others do, where they are not special
        need(token.get("special"), f"added token {token['content']!r} is not special")
    special = {token["content"]: token["id"] for token in saved.get("added_tokens", [])}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves; the others follow 255
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    to_bytes = lambda token: bytes(byte[c] for c in token)
    ranks = {to_bytes(token): i for token, i in model["vocab"].items() if token not in special}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    order = {(to_bytes(a), to_bytes(b)): i for i, (a, b) in enumerate(merges)}
    need(all(bytes([b]) in ranks for b in range(256)), "the vocabulary lacks some of the 256 bytes")
    last = -1
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = [bytes([b]) for b in token]
            while len(parts) > 2:  # as tiktoken would
                _, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
                if ranks.get(parts[i] + parts[i + 1], rank) >= rank:
                    break
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) != 2:  # no merge makes this token: tiktoken takes it where it is a whole word, they where merges are ignored
                need(model.get("ignore_merges"), f"token {rank} ({token!r}) is made by no merge")
            else:
                need(order.get(tuple(parts), -1) > last, f"token {rank} ({token!r}) does not follow the order of the merges")
                last = order[tuple(parts)]
    return checked_encoding("hugging-face", pattern[0], ranks, special)


BEGIN = (EOT, "<|bos|>", "<|begin_of_text|>", "<s>")


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


# What some distributions of Python have and others leave out, or make anew for each machine: without it classmates get the
# same text from the same version of Python.
NOT_EVERYWHERE = {"test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "distutils", "macholib", "lib-dynload",
                  "site-packages", "dist-packages", "__phello__", "sitecustomize.py", "usercustomize.py", "_distutils_system_mod.py"}


def stdlib_docs():
    """(train, val) lists of source texts; every 20th file or so, by a hash of its path, is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, val = [], []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):  # the same order on every system
        name = path.relative_to(root)
        if NOT_EVERYWHERE & set(name.parts) or name.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        (val if zlib.crc32(name.as_posix().encode()) % 20 == 0 else train).append(text)
    if not train or not val:
        raise UserError(f"no source text of the standard library in {root}; try: python data.py text FILE...")
    return train, val


class TextFile:
    """The characters start to stop of a UTF-8 file, read a piece at a time."""

    def __init__(self, path, start, stop):
        self.path, self.start, self.stop = path, start, stop

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        at = 0
        for part in read_text(self.path):
            yield part[max(0, self.start - at):max(0, self.stop - at)]
            at += len(part)


def read_text(path):
    """Yield the text of a UTF-8 file in parts. Raises UserError."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while True:
            data = file.read(1 << 20)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {read - pending + error.start}") from None
            if not data:
                return
            read += len(data)


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
    """(train, val) lists of random strings with questions about them (p-hop induction, Sanford et al. 2024, arXiv 2402.09268).

    "3cA" reads: the string goes on with c; hop 3 times from here and you get to an a. A hop leads to what came after the
    last occurrence of the symbol one is at: p lookups one after the other, none of which says more than where to look next."""
    rng = np.random.default_rng(seed)
    n = n_train + n_val
    s = rng.integers(1, symbols, size=(n, questions)).cumsum(axis=1) % symbols  # never the same symbol twice in a row
    u = rng.random(s.shape)
    rows, last, hop, possible = np.arange(n), np.full((n, symbols), -1), np.zeros_like(s), np.zeros_like(s)
    for i in range(questions):
        to = hop[:, i] = last[rows, s[:, i]] + 1  # 0: this symbol has not been there before
        possible[:, i] = np.where(to > 0, possible[rows, to] + 1, 0)
        last[rows, s[:, i]] = i
    p = (u * (possible.clip(max=hops) + 1)).astype(int)
    at = np.broadcast_to(np.arange(questions), s.shape)
    for k in range(hops):
        at = np.where(k < p, np.take_along_axis(hop, at, 1), at)
    text = np.stack([p + ord("0"), s + ord("a"), np.take_along_axis(s, at, 1) + ord("A")], axis=-1).astype(np.uint8)
    docs = [row.tobytes().decode() for row in text]
    return docs[:n_train], docs[n_train:]


def shakespeare_docs():
    """(train, val) lists of one text each, parts of Shakespeare's plays (1.1 MB). Raises UserError."""
    url, size, sha256 = SHAKESPEARE
    file = Path("data") / "shakespeare.txt"
    if not file.exists():
        try:
            with urllib.request.urlopen(url, timeout=60) as reply:
                content = reply.read(size + 1)
        except OSError as error:
            raise UserError(f"{url}: {getattr(error, 'reason', error)}") from None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{url} sent another text than Shakespeare's {size:,} bytes: a login page of this network?")
        file.parent.mkdir(exist_ok=True)
        with whole_file(file, "wb") as copy:
            copy.write(content)
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{file} is not Shakespeare's text of {size:,} bytes: move it away, and it is fetched again")
    return text_docs([file])


def fetch_fineweb(out, shards):
    """Fetch shards of FineWeb-Edu, 100M GPT-2 tokens each, to the directory `out`. Raises UserError.

    Each is checked and kept by itself, so that a long download can go on."""
    check_replaceable(out)
    if (out / "tokenizer.json").exists() and read_json(out / "tokenizer.json")["name"] != "gpt2":
        raise UserError(f"--out {out} holds data of another tokenizer: choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.hub")  # huggingface_hub keeps here what has arrived
    staging.mkdir(exist_ok=True)
    with lock(staging):
        for i in range(shards + 1):
            path = out / (f"train_{i - 1:06d}.bin" if i else "val_000000.bin")
            if path.exists():
                continue
            name = f"finewebedu_train_{i:06d}.bin" if i else "finewebedu_val_000000.bin"
            arrived = from_hub("hf_hub_download", FINEWEB, name, repo_type="dataset", local_dir=staging)
            open_shard(arrived)
            os.replace(arrived, path)
        write_text(out / "tokenizer.json", json.dumps({"name": "gpt2"}))  # tiktoken fetches it when it is needed
        shutil.rmtree(staging, ignore_errors=True)

# ----------------------------------------------------------------------------- shards


def write_shards(directory, split, docs, tokenizer):
    """Tokenise docs into {split}_000000.bin, ... of at most SHARD_TOKENS each; returns the number of tokens."""
    magic = next(magic for magic, (_, dtype) in FORMATS.items() if tokenizer.n_vocab <= np.iinfo(dtype).max + 1)
    _, dtype = FORMATS[magic]
    begin, writer = np.array([begin_token(tokenizer)], dtype=dtype), ShardWriter(directory, split, magic)
    with tqdm(total=sum(map(len, docs)), desc=f"tokenizing {split}", unit="char", unit_scale=True, leave=False) as bar:
        for doc in docs:
            writer.write(begin)
            for tokens in encode(tokenizer, doc, bar):
                writer.write(tokens.astype(dtype))
    return writer.close()


class ShardWriter:
    """Writes tokens to {split}_000000.bin, ... as they come."""

    def __init__(self, directory, split, magic):
        self.directory, self.split, self.magic, self.file, self.shards, self.total = directory, split, magic, None, 0, 0

    def write(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(self.directory / f"{self.split}_{self.shards:06d}.bin", "wb")
                self.file.write(bytes(HEADER_BYTES))
                self.count = 0
                self.shards += 1
            part, tokens = tokens[:SHARD_TOKENS - self.count], tokens[SHARD_TOKENS - self.count:]
            self.file.write(part.tobytes())
            self.count += len(part)
            self.total += len(part)
            if self.count == SHARD_TOKENS:
                self.close()

    def close(self):
        """Put the header in front of the shard; returns the number of tokens of all shards."""
        if self.file:
            self.file.seek(0)
            self.file.write(np.array([self.magic, FORMATS[self.magic][0], self.count], dtype=np.int32).tobytes())
            self.file.close()
            self.file = None
        return self.total


def open_shard(path):
    """The tokens of a shard as a read-only memory map; UserError where the file is not a whole shard."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype=np.int32, count=256)
    if len(header) < 256 or int(header[0]) not in FORMATS:
        raise UserError(f"{path} is not a token shard: its magic number is {header[0] if len(header) else 'missing'}, "
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
        paths = sorted(Path(directory).glob(f"{split}_*.bin"))
        if not paths:
            raise UserError(f"{directory} has no {split}_*.bin; make it with: python data.py")
        self.paths, self.shards = paths, [open_shard(path) for path in paths]
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        counts = [(len(shard) - 1) // block_size - (len(shard) > 2 * block_size) for shard in self.shards]  # room to shift
        self.first = np.cumsum([0, *counts])  # shard s holds windows first[s] to first[s + 1]
        self.epoch = None
        if len(self) < 1:
            raise UserError(f"{directory} has no {split} shard of more than {block_size} tokens, the block size")

    def __len__(self):
        """Windows in an epoch."""
        return int(self.first[-1])

    def window(self, i):
        """Sample i: block_size + 1 tokens, int64."""
        epoch, i = divmod(i, len(self))
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order, self.shift = epoch, rng.permutation(len(self)), rng.random()
        s = int(np.searchsorted(self.first, self.order[i], side="right")) - 1
        shard = self.shards[s]
        spare = len(shard) - 1 - (self.first[s + 1] - self.first[s]) * self.block_size
        start = (self.order[i] - self.first[s]) * self.block_size + int(self.shift * min(spare, self.block_size))
        tokens = shard[start:start + self.block_size + 1].astype(np.int64)
        if tokens.max() >= self.vocab_size:
            raise UserError(f"{self.paths[s]} has token {tokens.max()}, must be below the model's vocab_size {self.vocab_size}")
        return tokens

    def batch(self, samples):
        """(idx, targets), each (len(samples), block_size) int64, for an iterable of sample numbers."""
        tokens = torch.from_numpy(np.stack([self.window(int(i)) for i in samples]))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

# ----------------------------------------------------------------------------- command line


# the tokens of `python data.py` with Python 3.11.7, with which the tables in results/ were made
STDLIB_SHA256 = "97e9ca11ca0842f423d751061ce90d28cbdbaeaea19f55797fcf9175a3d06568"


def fingerprint(directory, source, files):
    """What tells whether two data directories are the same: {"source", "python", "files", "sha256" of all tokens}."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.bin")):
        with open(path, "rb") as file:
            file.seek(HEADER_BYTES)
            while part := file.read(1 << 20):
                digest.update(part)
    return {"source": source, "python": platform.python_version(), "files": files, "sha256": digest.hexdigest()}


def other_text(directory):
    """A sentence that says so where a data directory has bytes of another standard library than the tables in results/; or ""."""
    saved = read_json(Path(directory) / "tokenizer.json")
    text = saved.get("text") or {"source": Path(directory).name}
    if saved.get("name") != "bytes" or text.get("source") != "stdlib" or text.get("sha256") == STDLIB_SHA256:
        return ""
    return (f"{directory} is another text than that of the tables in results/ (made with Python {text.get('python', 'unknown')}, theirs "
            "with 3.11.7): losses will differ somewhat")


def check_replaceable(directory):
    """Raise UserError where `directory` holds anything that data.py did not make: it is replaced as a whole."""
    directory = Path(directory)
    if directory.is_symlink():
        raise UserError(f"--out {directory} is a link that leads round in a circle (Too many levels of symbolic links)")
    if not directory.exists():
        return
    if not directory.is_dir() or directory == Path.cwd().resolve():
        what = "the current directory" if directory.is_dir() else "no directory"
        raise UserError(f"--out {directory} is {what}: choose a name of its own for the data")
    for path in sorted(directory.iterdir()):
        ours = path.is_file() and (path.name == "tokenizer.json" or re.fullmatch(r"(train|val)_\d{6}\.bin", path.name))
        if ours and path.name == "tokenizer.json":
            ours = "name" in read_json(path)  # those of others have a model
        elif ours:
            magic = np.fromfile(path, dtype=np.int32, count=1)
            ours = len(magic) == 0 or magic[0] in FORMATS
        if not ours:
            raise UserError(f"--out {directory} holds {path.name}, which data.py did not make: choose another directory")


def prepare(source="stdlib", out=None, tokenizer="bytes", files=(), shards=1):
    """Make the data directory `out` (default data/<source>) whole or not at all; returns its path. Raises UserError."""
    out = Path(out or Path("data") / source)
    if source == "fineweb-edu":
        fetch_fineweb(out, shards)
        print(f"{out}: {shards} train and 1 val shard, tokenizer gpt2")
        return out
    make_docs = {"stdlib": stdlib_docs, "shakespeare": shakespeare_docs, "p-hop": p_hop_docs, "text": lambda: text_docs(files)}
    with whole_directory(out, check_replaceable) as temporary:
        train, val = make_docs[source]()
        encoding = make_tokenizer(tokenizer, train)
        sizes = {split: write_shards(temporary, split, docs, encoding) for split, docs in (("train", train), ("val", val))}
        text = fingerprint(temporary, source, len(train) + len(val))
        save_tokenizer(encoding, temporary / "tokenizer.json", text)
    characters = sum(map(len, train)) / sizes["train"]
    print(f"{out}: {sizes['train']:,} train and {sizes['val']:,} val tokens, "
          f"tokenizer {encoding.name} ({encoding.n_vocab:,} tokens, {characters:.2f} characters each)\n"
          f"Python {text['python']}, {text['files']:,} files, sha256 {text['sha256'][:16]}")
    return out


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("source", nargs="?", default="stdlib", metavar="SOURCE",
                        choices=("stdlib", "shakespeare", "fineweb-edu", "p-hop", "text"),
                        help="stdlib (default), shakespeare, fineweb-edu, p-hop, or text followed by files")
    parser.add_argument("files", nargs="*", metavar="FILE", help="UTF-8 files, for SOURCE text")
    parser.add_argument("--out", type=some_path, metavar="DIR", help="data directory to make (default: data/SOURCE)")
    parser.add_argument("--tokenizer", default="bytes", metavar="NAME",
                        help="bytes (default), gpt2, bpe:N (a vocabulary of N tokens trained on the text), or a directory with a "
                             "tokenizer.json, ours or Hugging Face's")
    parser.add_argument("--shards", type=int, default=1, metavar="N",
                        help=f"fineweb-edu: train shards of 100M tokens, 1 to {FINEWEB_SHARDS} (default: 1)")
    args = parser.parse_args()
    if (args.source == "text") != bool(args.files):
        parser.error("SOURCE text needs files: python data.py text FILE..." if args.source == "text" else
                     f"SOURCE {args.source} takes no files, got {args.files[0]}")
    if not 1 <= args.shards <= FINEWEB_SHARDS:
        parser.error(f"--shards is {args.shards}, must be 1 to {FINEWEB_SHARDS}")
    prepare(args.source, args.out, args.tokenizer, args.files, args.shards)


if __name__ == "__main__":
    run_script(main)
