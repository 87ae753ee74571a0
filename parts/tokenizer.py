"""Tokenizers turn text into numbers and back. All of them are tiktoken.Encodings.

data.py makes them, and tokenizer.json stores one in each data and run directory.
"""

import base64
import codecs
import contextlib
import json
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from parts.errors import UserError
from parts.files import write_text
from parts.reading import read_json

EOT = "<|endoftext|>"
BEGIN = (EOT, "<|bos|>", "<|begin_of_text|>", "<s>")  # the begin token's names in tokenizers
PIECE = 1 << 17  # characters given to a tokenizer at once: tiktoken fails on 999,999 spaces
# The text up to the last place where every tokenizer cuts: between the end of a line and a letter,
# or between a letter and a single space that another letter follows.
UP_TO_CUT = regex.compile(r"(?s).+(?:(?<=\S\n)(?=\p{L})|(?<=\p{L})(?= \p{L}))")


def pieces(text, bar=None):
    """Yield pieces of at most PIECE characters, whose tokens together are the tokens of the text;
    only a piece without a place to cut is cut anywhere. bar: a progress bar of the characters."""
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
    """Yield the tokens of a text in arrays, one for each of its `pieces`. Raises UserError."""
    for piece in pieces(text, bar):
        try:
            tokens = tokenizer.encode_to_numpy(piece, disallowed_special=())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # tiktoken's panics are not Exceptions
            raise UserError(f"the tokenizer {tokenizer.name} fails on this text: "
                            f"{error}") from None
        yield tokens


def save_tokenizer(tokenizer, path, text=None):
    """Write a tiktoken.Encoding as JSON: only its name if tiktoken knows it, otherwise its tokens.
    text: the fingerprint of the data."""
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
            raise UserError("this is Hugging Face's format; convert it with: "
                            f"python -m tools.published tokenizer {directory} --out DIR")
        if "tokens" not in saved:
            return tiktoken.get_encoding(saved["name"])
        tokens = [base64.b64decode(token, validate=True) for token in saved["tokens"]]
        ranks = dict(zip(tokens, saved["ids"], strict=True))
        if len(ranks) < len(tokens):
            raise UserError("it has a token twice")
        return checked_encoding(saved["name"], saved["pattern"], ranks, saved["special"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer of this project: {error}") from None


def checked_encoding(name, pattern, ranks, special):
    """Return a tiktoken.Encoding. Raises UserError if its ids or its pattern cannot work."""
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
    """Yield the text of each token as it arrives. Bytes that are not UTF-8 become U+FFFD. Ids
    without a token, which exist since a model's vocabulary is rounded up, become nothing."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        with contextlib.suppress(KeyError):
            yield decoder.decode(tokenizer.decode_single_token_bytes(int(token)))
    yield decoder.decode(b"", final=True)
