"""Text from a trained model, at any number of loops.

    python sample.py --run out/default --prompt "def " --recurrence 1 4 8
    cat prompt.txt | python sample.py --prompt-file -
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from data import begin_token, decode_stream, load_tokenizer
from model import Parcae, UserError, local_files, pick_device, pick_dtype


def parse_args():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", default="out/default", metavar="DIR", help="run directory of train.py (default: %(default)s)")
    add("--init-from", metavar="DIR", help="a model in the published format instead: a directory, or owner/name on the hub")
    add("--prompt", metavar="TEXT", help="text to continue (default: none, a new document)")
    add("--prompt-file", metavar="FILE", help="read the prompt from a file; - is standard input")
    add("--recurrence", type=int, nargs="+", metavar="T", help="loops, one block of text for each (default: the model's mean)")
    add("--tokens", type=int, default=300, metavar="N", help="new tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (default: all)")
    add("--top-p", type=float, metavar="P", help="sample from the fewest tokens with total probability P (default: all)")
    add("--kv-cache", choices=("per-loop", "shared"), default="per-loop",
        help="shared: keep keys and values of the last loop only, less memory, not exact (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the activations (default: auto)")
    add("--compile", action="store_true", help="compile the decoding step: about twice as fast, after a minute or two of compiling")
    return parser, parser.parse_args()


def read_prompt(args):
    """The prompt's text, or None for a new document. Raises UserError."""
    if args.prompt_file is None:
        text, name = args.prompt, "--prompt"
    else:
        name = f"--prompt-file {args.prompt_file}"
        try:
            data = sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()
            text = data.decode("utf-8")
        except OSError as error:
            raise UserError(f"{name}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{name} is not UTF-8 text") from None
    if text == "":
        raise UserError(f"{name} is empty, must hold at least one character (leave it out for a new document)")
    return text


def main(args):
    if args.tokens < 1:
        raise UserError(f"--tokens is {args.tokens}, must be at least 1")
    device = pick_device(args.device)
    source = local_files(args.init_from or args.run)
    model = Parcae.from_pretrained(source).to(device)
    model.compute_dtype = pick_dtype(device, args.dtype)
    if args.compile:
        model.step = torch.compile(model.step, dynamic=True)
    tokenizer = load_tokenizer(source)
    prompt = read_prompt(args)
    idx = torch.tensor([[begin_token(tokenizer), *tokenizer.encode_ordinary(prompt or "")]], device=device)
    recurrence = args.recurrence or [model.config.mean_recurrence]
    if not model.config.n_recurrent:
        print("a plain transformer: nothing loops, --recurrence has no effect")
        recurrence = [1]
    for T in recurrence:
        generator = torch.Generator(device).manual_seed(args.seed)
        tokens = model.stream(idx, args.tokens, recurrence=T, temperature=args.temperature, top_k=args.top_k,
                              top_p=args.top_p, generator=generator, kv_cache=args.kv_cache)
        print(f"--- recurrence {T}\n{prompt or ''}", end="")
        start = time.perf_counter()
        for text in decode_stream(tokenizer, tokens):
            print(text, end="", flush=True)
        seconds = time.perf_counter() - start
        print(f"\n--- {args.tokens} tokens, {args.tokens / seconds:,.1f} tokens/s")


if __name__ == "__main__":
    parser, args = parse_args()
    try:
        main(args)
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print()
