"""Tokenizers: text to numbers and back, all of them tiktoken.Encodings.

"bytes" has a token for each byte, "bpe:N" is trained on the text at hand, "gpt2" is fetched by
tiktoken. tokenizer.json keeps one, in data and run directories.
"""

import base64
import codecs
import contextlib
import heapq
import json
from collections import Counter, defaultdict
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from parts.cli import UserError, progress_bar
from parts.files import write_text
from parts.reading import read_json

EOT = "<|endoftext|>"
BEGIN = (EOT, "<|bos|>", "<|begin_of_text|>", "<s>")  # names under which tokenizers have it

# words, numbers of up to three digits, punctuation, spaces; a word takes the space before it
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def make_tokenizer(name, docs=()):
    """Return a tiktoken.Encoding: "bytes", "gpt2" (tiktoken fetches it), "bpe:N" trained on docs,
    or that of a directory. Raises UserError."""
    if name == "gpt2":
        return tiktoken.get_encoding("gpt2")
    kind, _, size = name.partition(":")
    if name == "bytes":
        pattern, ranks = r"(?s:.{1,256})", {bytes([i]): i for i in range(256)}
    elif kind == "bpe" and size.isdecimal() and 257 <= int(size) <= 65536:
        pattern, ranks = WORDS, train_bpe(docs, int(size) - 1)
    elif Path(name).is_dir():  # one with a name of these is ./bytes
        return load_tokenizer(name)
    else:
        raise UserError(f"tokenizer is {name!r}, must be bytes, gpt2, bpe:N with N from 257 to "
                        "65536, or a directory with tokenizer.json")
    special = {EOT: len(ranks)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


PIECE = 1 << 17  # characters given to a tokenizer at once: tiktoken fails on 999,999 spaces
LONGEST_WORD = 1000  # characters, in training a tokenizer
# Up to the last place where every tokenizer cuts: between the end of a line and a letter, or
# between a letter and a single space before another.
UP_TO_CUT = regex.compile(r"(?s).+(?:(?<=\S\n)(?=\p{L})|(?<=\p{L})(?= \p{L}))")


def pieces(text, bar=None):
    """Yield a text in pieces of at most PIECE characters that have the tokens of the whole; a
    progress bar counts them. A text with no place to cut for so long is cut anywhere."""
    at = 0
    while at < len(text):
        end = at + PIECE
        if end < len(text) and (whole := UP_TO_CUT.match(text, at, end)):
            end = whole.end()
        piece = text[at:end]
        yield piece
        if bar is not None:
            bar.update(len(piece))
        at = end


def encode(tokenizer, text, bar=None):
    """Yield the tokens of a text in arrays, see pieces. Raises UserError."""
    for piece in pieces(text, bar):
        try:
            tokens = tokenizer.encode_to_numpy(piece, disallowed_special=())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # tiktoken's panics are not Exceptions
            raise UserError(f"the tokenizer {tokenizer.name} fails on this text: "
                            f"{error}") from None
        yield tokens


def count_words(docs):
    """Return how often each word comes in docs, a Counter; of a long word its parts count."""
    counts = Counter()
    with progress_bar(total=sum(map(len, docs)), desc="counting words", unit="char",
                      unit_scale=True) as bar:
        for doc in docs:
            for piece in pieces(doc, bar):
                counts.update(regex.findall(WORDS, piece))
    for word in [word for word in counts if len(word) > LONGEST_WORD]:
        count = counts.pop(word)
        for i in range(0, len(word), LONGEST_WORD):
            counts[word[i:i + LONGEST_WORD]] += count
    return counts


def train_bpe(docs, vocab_size):
    """Return byte-pair ranks {bytes: id} of at most vocab_size tokens: the most frequent pair of
    neighbours (of several, the one with the lowest ids) becomes a token, again and again (Sennrich
    et al. 2016)."""
    # each different word once, as a string in which the character chr(i) is token i
    word_counts = count_words(docs)
    words = [word.encode().decode("latin-1") for word in word_counts]
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
    with progress_bar(total=vocab_size - 256, desc="training tokenizer", unit="merge") as bar:
        while heap and heap[0][0] < 0 and len(tokens) < vocab_size:
            count, best = heapq.heappop(heap)
            if count != -pair_counts[best]:  # fewer than when it was put there
                heapq.heappush(heap, (-pair_counts[best], best))
                continue
            a, b = best
            new, made = chr(len(tokens)), set()  # the token, and the pairs that it is in
            tokens.append(tokens[ord(a)] + tokens[ord(b)])
            for i in where.pop(best):
                before, words[i] = words[i], words[i].replace(a + b, new)
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
    """Write a tiktoken.Encoding as JSON, or its name where tiktoken knows it; text: the fingerprint
    of the data."""
    saved = {"name": tokenizer.name} | ({"text": text} if text else {})
    if tokenizer.name not in tiktoken.list_encoding_names():
        ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
        saved |= {"pattern": tokenizer._pat_str, "special": tokenizer._special_tokens,
                  "ids": [i for _, i in ranks],
                  "tokens": [base64.b64encode(token).decode() for token, _ in ranks]}
    write_text(path, json.dumps(saved))


def load_tokenizer(directory):
    """Return the tiktoken.Encoding of a data or run directory. Raises UserError."""
    path = Path(directory) / "tokenizer.json"
    saved = read_json(path)
    try:
        if "model" in saved:
            raise UserError("this is Hugging Face's format; make it ours with: "
                            f"python -m tools.published tokenizer {directory} --out DIR")
        if "tokens" not in saved:
            return tiktoken.get_encoding(saved["name"])
        ids = saved.get("ids", range(len(saved["tokens"])))
        tokens = [base64.b64decode(token, validate=True) for token in saved["tokens"]]
        ranks = dict(zip(tokens, ids, strict=True))
        if len(ranks) < len(tokens):
            raise UserError("it has a token twice")
        return checked_encoding(saved["name"], saved["pattern"], ranks, saved["special"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer of this project: {error}") from None


def checked_encoding(name, pattern, ranks, special):
    """Return a tiktoken.Encoding. Raises UserError where its ids or its pattern cannot work."""
    ids = [*ranks.values(), *special.values()]
    if not all(type(i) is int and 0 <= i < 2 ** 24 for i in ids) or len(set(ids)) < len(ids):
        raise UserError("its token ids must be different whole numbers from 0 to 16,777,215")
    tokenizer = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                  special_tokens=special)
    text = " \n".join(map(chr, range(1, 0x250)))
    if tokenizer.decode([i for tokens in encode(tokenizer, text) for i in tokens]) != text:
        raise UserError("its pattern loses part of a text")
    return tokenizer


def same_tokens(a, b):
    """Return whether two tokenizers have the same tokens and ids."""
    return (a._mergeable_ranks, a._special_tokens) == (b._mergeable_ranks, b._special_tokens)


def begin_token(tokenizer):
    """Return the id of the token with which documents begin. Raises UserError without one."""
    for name in BEGIN:
        if name in tokenizer._special_tokens:
            return tokenizer._special_tokens[name]
    raise UserError(f"the tokenizer has none of the special tokens {', '.join(BEGIN)}")


def decode_stream(tokenizer, tokens):
    """Yield the text of each token as it comes. Bytes that are not UTF-8 show as U+FFFD, ids of no
    token (a model's vocabulary is rounded up) as nothing."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        with contextlib.suppress(KeyError):
            yield decoder.decode(tokenizer.decode_single_token_bytes(int(token)))
    yield decoder.decode(b"", final=True)

