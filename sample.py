"""Write text with a trained model, at any number of loops.

    python sample.py --run out/default --prompt "def " --recurrence 1 4 8
    python sample.py --prompt "def " --samples 3          three texts with the mean number of loops
    python sample.py --recurrence 8 --draft 1 --ahead 8   drafts with one loop (parts/draft.py)

tools/trace.py draws what each loop would predict.
"""

import time
from collections import Counter
from itertools import chain, takewhile

import torch

from model import Parcae, UserError
from parts.cli import COUNT, LOOPS, SEED, Parser, number, run_script, some_path
from parts.draft import draft_stream
from parts.generation import stream
from parts.machine import pick_device, pick_dtype, use_threads
from parts.quantize import prepare_weights
from parts.recording import speed_up
from parts.tokenizer import begin_token, decode_stream, encode, load_tokenizer


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=some_path, default="out/default", metavar="DIR",
        help="run directory of train.py (default: %(default)s)")
    add("--prompt", metavar="TEXT", help="text to continue (default: begin a new document)")
    add("--recurrence", type=LOOPS, nargs="+", metavar="T",
        help="numbers of loops, each with its own block of text (default: the model's mean)")
    add("--samples", type=COUNT, default=1, metavar="N",
        help="continuations of the prompt, one after the other (default: %(default)s)")
    add("--tokens", type=COUNT, default=200, metavar="N",
        help="new tokens, fewer if the text ends (default: %(default)s)")
    add("--temperature", type=number(float, 0), default=0.7,
        help="0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=COUNT, metavar="K",
        help="sample from the K likeliest tokens (default: all)")
    add("--top-p", type=number(float, 0, 1, above=True), metavar="P",
        help="sample from the fewest tokens with total probability P (default: all)")
    add("--exit-threshold", type=number(float, 0), metavar="EPS",
        help="end each token's loop once it changes the prediction by less than EPS nats, after "
        "--recurrence loops at the latest")
    add("--draft", type=LOOPS, metavar="T",
        help="draft with T loops and verify with --recurrence; exact, and faster in small models "
        "without --compile")
    add("--ahead", type=COUNT, metavar="N", help="tokens drafted at a time (default: 4)")
    add("--seed", type=SEED, default=0, help="seed of the draws (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32", "int8"), default="auto",
        help="dtype of weights and activations; auto is float32 on a CPU; int8 has 8-bit weights, "
        "which are faster on a CPU for large models (default: auto)")
    add("--compile", action="store_true",
        help="compile the model: 2 to 5 times as fast on a CPU, after a minute per number of loops")
    args = parser.parse_args()

    # flags that have no effect or exclude each other
    exits = args.exit_threshold is not None
    if args.ahead and not args.draft:
        raise UserError("--ahead does nothing without --draft")
    if exits and args.draft:
        raise UserError("--draft needs a cache for each loop: leave out --exit-threshold")
    if exits and args.compile:
        raise UserError("--compile does not compile --exit-threshold: leave out one of them")
    return args


def read_prompt(args, tokenizer):
    """Return the prompt as text, and the tokens that the model reads, (1, S): one that begins a
    document, then the prompt's. Raises UserError."""
    if args.prompt == "":
        raise UserError("--prompt is empty: leave it out for a new document")
    prompt = args.prompt or ""
    tokens = map(int, chain.from_iterable(encode(tokenizer, prompt)))
    return prompt, torch.tensor([[begin_token(tokenizer), *tokens]])


def recurrences_of(args, config):
    """Return the numbers of loops; each makes one block of text. Raises UserError."""
    if not config.n_recurrent:
        flag = "--draft" if args.draft else "--exit-threshold"
        if args.draft or args.exit_threshold is not None:
            raise UserError(f"{flag} needs a model that loops: this is a plain transformer")
        return [1]
    recurrences = args.recurrence or [config.mean_recurrence]
    if args.draft and args.draft >= min(recurrences):
        raise UserError(f"--draft is {args.draft}, must be below --recurrence {min(recurrences)}")
    return recurrences


def write_sample(args, model, tokenizer, prompt, idx, recurrence, generator):
    """Print the prompt, the tokens after idx (1, S) as they are drawn, and their speed."""
    counts, made = Counter(), []
    options = {"recurrence": recurrence, "temperature": args.temperature, "top_k": args.top_k,
               "top_p": args.top_p, "generator": generator, "counts": counts}
    if args.draft:
        tokens = draft_stream(model, idx, args.tokens, draft=args.draft, ahead=args.ahead or 4,
                              **options)
    else:
        tokens = stream(model, idx, args.tokens, exit_threshold=args.exit_threshold, **options)

    def before_end():
        for token in takewhile(lambda token: token != begin_token(tokenizer), tokens):
            made.append(token)
            yield token
    print(prompt, end="")
    start = time.perf_counter()
    for text in decode_stream(tokenizer, before_end()):
        print(text, end="", flush=True)
    speed = len(made) / (time.perf_counter() - start)

    notes = f"{len(made)} tokens, {speed:,.1f} tokens/s{', compiling included' * args.compile}"
    loops = f"{counts['loops'] / max(1, counts['tokens']):.2f}"
    if args.draft:
        kept = counts["kept"] / max(1, counts["drafted"])
        notes += f", {kept:.0%} of the drafts kept, {loops} sequential loops per token"
    if args.exit_threshold is not None:
        notes += f", {loops} loops per token"
    print(f"\n--- {notes}")


def main():
    args = parse_args()
    device = pick_device(args.device, args.compile)
    model = Parcae.from_pretrained(args.run)
    use_threads(model.config.n_embd)
    if device.type == "cpu" and args.dtype == "auto":
        args.dtype = "float32"  # bfloat16 is not faster there, one token at a time
    prepare_weights(model, device, pick_dtype(device, args.dtype))
    speed_up(model, args.compile)

    tokenizer = load_tokenizer(args.run)
    prompt, idx = read_prompt(args, tokenizer)
    recurrences = recurrences_of(args, model.config)
    S, block_size = idx.shape[1], model.config.block_size
    if S > block_size:
        print(f"of {S} tokens (one begins the text), the model reads only the last {block_size}")
    for recurrence in recurrences:
        generator = torch.Generator(device).manual_seed(args.seed)
        for i in range(1, args.samples + 1):
            sample = f", sample {i} of {args.samples}" if args.samples > 1 else ""
            print(f"--- recurrence {recurrence}{sample}")
            write_sample(args, model, tokenizer, prompt, idx.to(device), recurrence, generator)


if __name__ == "__main__":
    run_script(main)
