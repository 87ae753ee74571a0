"""Measure the bits per byte and the perplexity of a model at chosen numbers of loops.

    python -m tools.evaluate --run out/default --recurrence 1 2 4 8 16
    python -m tools.evaluate --run out/default --text book.txt
    python -m tools.evaluate --run out/default --kv-cache shared     what the smaller cache costs

Bits per byte do not depend on the tokenizer: nats of all tokens / (ln 2 * bytes of all tokens).
Brackets hold the standard error over the sequences read. The results, the step of the weights and
the text that was read go to eval.json in the run directory. A loss that is not finite (the state
may have grown without bound) is an error, and nothing is written: leave out that T.
"""

import hashlib
import math
from collections import defaultdict
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model import Parcae
from parts.cli import COUNT, LOOPS, Parser, progress_bar, run_script, some_path
from parts.comparable import changed_text, text_of
from parts.errors import UserError
from parts.files import write_json
from parts.generation import check_predicts
from parts.loader import EVAL_SEED, EVAL_TOKENS, Loader
from parts.machine import keep_freed_memory, pick_device, pick_dtype, use_threads
from parts.quantize import prepare_weights
from parts.reading import read_json
from parts.sources import read_text
from parts.tokenizer import begin_token, encode, load_tokenizer, same_tokens

# ------------------------------------------------------------------------------- losses


@torch.no_grad()
def token_losses(model, idx, targets, recurrence, kv_cache="none"):
    """Return {loops: losses of the targets in nats, (B, S)} for the loops in the list recurrence.

    kv_cache "none" reads all tokens at once and takes all losses from one pass. "per-loop" and
    "shared" read token by token through a cache of that kind, as in generation."""
    losses = {}
    if kv_cache == "none":
        for loops, (h, inputs) in enumerate(model.states(idx, max(recurrence)), start=1):
            if loops in recurrence:
                losses[loops] = loss_of(model.head(model.readout(h, inputs)), targets, loops)
        return losses
    for loops in recurrence:
        cache = model.new_cache(*idx.shape, loops, kv_cache)
        x = [model.hidden(token, loops, cache) for token in idx.split(1, dim=1)]
        losses[loops] = loss_of(model.head(torch.cat(x, dim=1)), targets, loops)
    return losses


def loss_of(logits, targets, loops):
    """Return the loss of each target in nats, (B, S), for logits (B, S, vocab_size). Raises
    UserError if one is not finite."""
    loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    check_predicts(loss, loops)
    return loss


def read_all(model, batches, tokenizer, losses_of):
    """Return ({name: [a sum for each sequence]}, [tokens of each sequence], bytes of all of them).

    batches: an iterable of (idx, targets), (B, S) int64 each. losses_of(model, idx, targets)
    returns {name: the values to sum, such as losses in nats, (B, S)}."""
    device, sums, tokens, n_bytes = model.wte.weight.device, defaultdict(list), [], 0
    length = {i: len(token) for token, i in tokenizer._mergeable_ranks.items()}
    for idx, targets in batches:
        tokens += [targets.shape[1]] * len(targets)
        n_bytes += sum(length.get(i, 0) for i in targets.flatten().tolist())  # 0: a special token
        for name, values in losses_of(model, idx.to(device), targets.to(device)).items():
            sums[name] += values.cpu().double().sum(1).tolist()  # mps has no float64
    return sums, tokens, n_bytes


def standard_error(nats, tokens):
    """Return the standard error of nats per token, None for one sequence. Both (sequences,)."""
    n = len(nats)
    if n < 2:
        return None
    residual = nats - nats.sum() / tokens.sum() * tokens  # the mean is a ratio of two sums
    return float((residual.square().sum() * n / (n - 1)).sqrt() / tokens.sum())


def row_of(recurrence, nats, tokens, n_bytes, baseline=None):
    """Return a row of the table. nats, tokens: lists, one number a sequence; n_bytes: of all.

    baseline: the nats of the first row. The gain over it has a much smaller standard error than the
    two losses, since both rows read the same sequences."""
    nats, tokens = torch.tensor(nats).double(), torch.tensor(tokens).double()
    mean = float(nats.sum() / tokens.sum())
    row = {"recurrence": recurrence, "val_loss": mean,
           "standard_error": standard_error(nats, tokens),
           "perplexity": math.exp(min(mean, 700)),  # e^710 overflows
           "bits_per_byte": float(nats.sum()) / math.log(2) / n_bytes}
    if baseline is not None:
        gained = torch.tensor(baseline).double() - nats
        row |= {"gain": float(gained.sum() / tokens.sum()),
                "gain_standard_error": standard_error(gained, tokens)}
    return row


# ------------------------------------------------------------------------------- text


class Text(NamedTuple):
    """The text to read: the name of its file or data directory, and its sequences."""

    name: str
    fingerprint: dict | None  # None where it is not known
    windows: list  # arrays of block_size + 1 tokens, the last one perhaps fewer: inputs, targets

    def batches(self, size):
        """Return a list of (idx, targets), (B, S) int64 each, B at most `size`."""
        found = []
        for _, alike in groupby(self.windows, len):
            for tokens in torch.from_numpy(np.stack(list(alike))).split(size):
                found.append((tokens[:, :-1], tokens[:, 1:]))
        return found


def add_text_flags(add, sequences):
    """Add the flags that open_text reads. sequences: the default of --sequences."""
    add("--data", type=some_path, metavar="DIR",
        help="data directory whose val tokens are read (default: the run's)")
    add("--text", type=some_path, metavar="FILE", help="read this text instead")
    add("--sequences", type=COUNT, default=sequences, metavar="N",
        help="sequences of block_size tokens to read (default: %(default)s)")


def open_text(args, model, tokenizer):
    """Return the Text that the flags of add_text_flags name. Raises UserError."""
    block_size, file = model.config.block_size, args.text
    if file and args.data:
        raise UserError("--text replaces --data: give only one of them")
    if not file:
        data, loader = open_data(args, tokenizer, block_size)
        windows = [loader.window(i) for i in range(min(args.sequences, len(loader)))]
        return Text(data, text_of(data), windows)

    read = islice(chain.from_iterable(encode(tokenizer, read_text(file))),
                  args.sequences * block_size)
    tokens = np.array([begin_token(tokenizer), *map(int, read)])
    if len(tokens) < 2:
        raise UserError(f"--text {file} is empty")
    digest = hashlib.sha256(tokenizer.decode_bytes(tokens[1:].tolist())).hexdigest()
    windows = [tokens[i:i + block_size + 1] for i in range(0, len(tokens) - 1, block_size)]
    return Text(file, {"source": file, "sha256": digest}, windows)


def open_data(args, tokenizer, block_size):
    """Return (data directory, Loader of its val tokens) of --data, or of the run without --data.
    Print a warning if the run was trained on another text. Raises UserError."""
    data = args.data or read_json(Path(args.run) / "config.json").get("data")
    if not isinstance(data, str):
        raise UserError(f"{args.run} does not name its data: give --data DIR or --text FILE")
    there = (Path(data) / "tokenizer.json").exists()
    if there and not same_tokens(load_tokenizer(data), tokenizer):
        raise UserError(f"{data} has another tokenizer than {args.run} was trained with")
    loader = Loader(data, "val", block_size, tokenizer.n_vocab, EVAL_SEED)
    if difference := changed_text(args.run, data):
        print(difference)
    return data, loader


def add_run_flags(add):
    """Add the flags that open_run reads."""
    add("--run", type=some_path, default="out/default", metavar="DIR",
        help="run directory of train.py (default: %(default)s)")
    add("--recurrence", type=LOOPS, nargs="+", default=[1, 2, 4, 8, 16], metavar="T",
        help="numbers of loops (default: 1 2 4 8 16)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32", "int8"), default="auto",
        help="dtype of the activations; int8: bfloat16 activations and 8-bit weights, see "
        "parts/quantize.py (default: auto)")


def open_run(args):
    """Return (model, tokenizer, numbers of loops to evaluate at) for the flags of add_run_flags."""
    keep_freed_memory()
    device = pick_device(args.device)
    model = Parcae.from_pretrained(args.run).to(device)
    use_threads(model.config.n_embd)
    dtype = pick_dtype(device, args.dtype)
    if dtype == torch.int8:
        prepare_weights(model, device, dtype)
    else:
        model.compute_dtype = dtype
    recurrence = args.recurrence if model.config.n_recurrent else [1]
    return model, load_tokenizer(args.run), recurrence


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_run_flags(add)
    add_text_flags(add, 512)
    add("--kv-cache", choices=("none", "per-loop", "shared"), default="none",
        help="read token by token through a KV cache, as in generation: per-loop (exact) or "
        "shared (keys and values of the last loop only)")
    args = parser.parse_args()
    model, tokenizer, recurrence = open_run(args)
    text = open_text(args, model, tokenizer)
    batches = text.batches(max(1, EVAL_TOKENS // model.config.block_size))
    bar = progress_bar(batches, desc="evaluating", unit="batch")
    losses_of = partial(token_losses, recurrence=recurrence, kv_cache=args.kv_cache)
    nats, counts, n_bytes = read_all(model, bar, tokenizer, losses_of)
    rows = [row_of(T, nats[T], counts, n_bytes, nats[recurrence[0]]) for T in recurrence]
    tokens = sum(counts)
    print(f"{args.run} on {tokens:,} tokens ({n_bytes:,} bytes) of {text.name}, KV cache: "
          f"{args.kv_cache}\nrecurrence T   nats per token   perplexity   bits per byte   "
          f"gain over T = {recurrence[0]}")
    for row in rows:
        error, of_gain = ("-" if row[name] is None else f"{row[name]:.4f}"  # one sequence
                          for name in ("standard_error", "gain_standard_error"))
        gain = "" if row is rows[0] else f"   {row['gain']:+.4f} ({of_gain})"
        print(f"{row['recurrence']:12}   {row['val_loss']:.4f} ({error})  "
              f"{row['perplexity']:10.3f}   {row['bits_per_byte']:13.4f}{gain}")
    write_json(Path(args.run) / "eval.json", {
        "step": model.step, "data": text.name, "text": text.fingerprint,
        "sequences": len(text.windows), "tokens": tokens, "bytes": n_bytes,
        "kv_cache": args.kv_cache, "dtype": str(model.dtype),
        "weights": str(model.lm_head.weight.dtype), "results": rows})


if __name__ == "__main__":
    run_script(main)
