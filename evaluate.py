"""Bits per byte and perplexity of a run on its val text, at chosen numbers of loops.

    python evaluate.py --run out/default --recurrence 1 2 4 8 16
    python evaluate.py --run out/default --kv-cache shared     the price of keeping the last loop's keys and values only
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Loader, load_tokenizer
from model import KVCache, Parcae, UserError, pick_device, pick_dtype

EVAL_SEED = 1234  # as in train.py: the first sequences are those that train.py evaluates on


def parse_args():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", default="out/default", metavar="DIR", help="run directory of train.py (default: %(default)s)")
    add("--data", metavar="DIR", help="data directory (default: the run's)")
    add("--recurrence", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="T", help="loops (default: 1 2 4 8 16)")
    add("--sequences", type=int, default=512, metavar="N", help="val sequences to read (default: %(default)s)")
    add("--batch-size", type=int, default=32, metavar="N", help="sequences at a time (default: %(default)s)")
    add("--kv-cache", choices=("none", "per-loop", "shared"), default="none",
        help="read token by token as in generation, through a KV cache: per-loop (exact), or the last loop's keys and values only")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the activations (default: auto)")
    return parser, parser.parse_args()


@torch.no_grad()
def token_losses(model, idx, targets, recurrence, kv_cache="none"):
    """Loss in nats (B, T) of each target, all at once or, with a cache, one token after the other."""
    if kv_cache == "none":
        logits, _ = model(idx, recurrence=recurrence)
    else:
        cache = KVCache(model.config, *idx.shape, recurrence, idx.device, model.compute_dtype, kv_cache)
        logits = torch.cat([model(token, recurrence=recurrence, cache=cache)[0] for token in idx.split(1, dim=1)], dim=1)
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def main(args):
    for flag, values in (("recurrence", args.recurrence), ("sequences", [args.sequences]), ("batch-size", [args.batch_size])):
        if min(values) < 1:
            raise UserError(f"--{flag} is {min(values)}, must be at least 1")
    device = pick_device(args.device)
    model = Parcae.from_pretrained(args.run).to(device)
    model.compute_dtype = pick_dtype(device, args.dtype)
    data = args.data or json.loads((Path(args.run) / "config.json").read_text())["data"]
    tokenizer = load_tokenizer(args.run)
    loader = Loader(data, "val", model.config.block_size, tokenizer.n_vocab, EVAL_SEED)
    token_bytes = torch.tensor([len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.n_vocab)])
    token_bytes[tokenizer.eot_token] = 0  # separates texts, is none
    recurrence = args.recurrence if model.config.n_recurrent else [1]
    nats, tokens, size = torch.zeros(len(recurrence), dtype=torch.float64), 0, 0
    samples = range(min(args.sequences, len(loader)))
    for start in tqdm(range(0, len(samples), args.batch_size), desc="evaluating", unit="batch", leave=False, disable=None):
        idx, targets = loader.batch(samples[start:start + args.batch_size])
        size += int(token_bytes[targets].sum())
        tokens += targets.numel()
        for i, T in enumerate(recurrence):
            losses = token_losses(model, idx.to(device), targets.to(device), T, args.kv_cache)
            nats[i] += losses.double().sum().item()
    print(f"{args.run} on {tokens:,} val tokens ({size:,} bytes) of {data}, KV cache: {args.kv_cache}")
    print("recurrence T   nats per token   perplexity   bits per byte")
    results = []
    for T, total in zip(recurrence, nats.tolist()):
        results.append({"recurrence": T, "val_loss": total / tokens, "perplexity": math.exp(total / tokens),
                        "bits_per_byte": total / math.log(2) / size})
        print("{recurrence:12d}   {val_loss:14.4f}   {perplexity:10.3f}   {bits_per_byte:13.4f}".format(**results[-1]))
    path = Path(args.run) / "eval.json"
    record = {"data": data, "sequences": len(samples), "tokens": tokens, "bytes": size, "kv_cache": args.kv_cache, "results": results}
    Path(f"{path}.tmp").write_text(json.dumps(record, indent=1))
    os.replace(f"{path}.tmp", path)


if __name__ == "__main__":
    parser, args = parse_args()
    try:
        main(args)
    except UserError as error:
        parser.error(str(error))
