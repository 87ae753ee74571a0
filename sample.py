"""Text from a trained model, at any number of loops.

    python sample.py --run out/default --prompt "def " --recurrence 1 4 8
    python sample.py --prompt "def " --samples 3          three texts, at the model's mean
    python sample.py --recurrence 8 --draft 1 --ahead 8   drafted with one loop: see parts/draft.py

What each loop would predict is drawn by tools/trace.py.
"""

import time
from itertools import chain, takewhile

import torch

from model import Parcae, UserError
from parts.cli import COUNT, LOOPS, SEED, Parser, run_script, some_path
from parts.draft import draft_stream
from parts.generation import EXIT_RULES, check, stream
from parts.machine import pick_device, pick_dtype, use_threads
from parts.quantize import prepare_weights
from parts.recording import speed_up
from parts.tokenizer import begin_token, decode_stream, encode, load_tokenizer

# ------------------------------------------------------------------------------- command line


def add_prompt_flags(parser):
    """Add the flags for the model and the text that it continues."""
    parser.add_argument("--run", type=some_path, default="out/default", metavar="DIR",
                        help="run directory of train.py (default: %(default)s)")
    parser.add_argument("--prompt", metavar="TEXT",
                        help="text to continue (default: none, a new document)")


def parse_args():
    parser = Parser(description=__doc__)
    add_prompt_flags(parser)
    add = parser.add_argument
    add("--recurrence", type=LOOPS, nargs="+", metavar="T",
        help="loops, one block of text for each (default: the model's mean)")
    add("--samples", type=COUNT, default=1, metavar="N",
        help="continuations of the prompt, one after the other (default: %(default)s)")
    add("--tokens", type=COUNT, default=200, metavar="N",
        help="new tokens, at most; fewer if the text ends (default: %(default)s)")
    add("--temperature", type=float, default=0.7,
        help="0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=COUNT, metavar="K",
        help="sample from the K likeliest tokens (default: all)")
    add("--top-p", type=float, metavar="P",
        help="sample from the fewest tokens with total probability P (default: all)")
    add("--kv-cache", choices=("per-loop", "shared"),
        help="shared: keep keys and values of the last loop only, less memory, not exact "
        "(default: per-loop)")
    add("--exit-threshold", type=float, metavar="EPS",
        help="end each token's loop when --exit-rule falls below EPS; --recurrence is then the "
        "most it may take. Uses the shared cache")
    add("--exit-rule", choices=EXIT_RULES,
        help="kl: nats that the last loop changed the prediction by; entropy: nats that it is "
        "unsure of; state: change of the state, a share (default: kl)")
    add("--draft", type=LOOPS, metavar="T",
        help="draft tokens with T loops, verify them with --recurrence: exact, and faster in "
        "small models")
    add("--ahead", type=COUNT, metavar="N", help="tokens drafted at a time (default: 4)")
    add("--seed", type=SEED, default=0, help="(default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32", "int8"), default="auto",
        help="of weights and activations; auto: float32 on a CPU; int8: weights of 8 bits, which "
        "pay there with 256 channels or more (see parts/quantize.py; default: auto)")
    add("--compile", action="store_true",
        help="compile the decoding step: 1.4 to 3.3 times as fast after half a minute for each "
        "number of loops; on a GPU the layers, 1.5 times")
    args = parser.parse_args()

    # flags that do nothing, or do not go together
    exits = args.exit_threshold is not None
    if args.exit_rule and not exits:
        raise UserError("--exit-rule does nothing without --exit-threshold")
    if args.ahead and not args.draft:
        raise UserError("--ahead does nothing without --draft")
    if args.draft and (args.kv_cache == "shared" or exits):
        raise UserError("--draft needs a cache for each loop: leave out --kv-cache and "
                        "--exit-threshold")
    if exits and args.kv_cache == "per-loop":
        raise UserError("--exit-threshold needs the shared cache: leave out --kv-cache")
    if exits and args.compile:
        raise UserError("--exit-threshold goes loop by loop, which --compile does not compile: "
                        "leave out one of them")
    return args


def read_prompt(args, tokenizer):
    """Return the prompt, a text, and the tokens (1, T) that are read, of which the first is the one
    that begins a document. Raises UserError."""
    if args.prompt == "":
        raise UserError("--prompt is empty, must hold at least one character (leave it out for a "
                        "new document)")
    prompt = args.prompt or ""
    tokens = map(int, chain.from_iterable(encode(tokenizer, prompt)))
    return prompt, torch.tensor([[begin_token(tokenizer), *tokens]])


def recurrences_of(args, config):
    """Return the numbers of loops, one block of text for each. Raises UserError."""
    if not config.n_recurrent:
        if args.draft or args.exit_threshold is not None:
            flag = "--draft" if args.draft else "--exit-threshold"
            raise UserError(f"{flag} needs a model that loops: this is a plain transformer")
        if args.recurrence:
            print("a plain transformer: nothing loops, --recurrence has no effect")
        return [1]
    recurrences = args.recurrence or [config.mean_recurrence]
    if args.draft and args.draft >= min(recurrences):
        raise UserError(f"--draft is {args.draft}, must be below --recurrence {min(recurrences)}")
    return recurrences

# ------------------------------------------------------------------------------- text


def new_tokens(args, model, idx, recurrence, generator, loops_used, counts):
    """Return the stream of tokens (1, 1) that the flags ask for; see stream, draft_stream."""
    options = {"recurrence": recurrence, "temperature": args.temperature, "top_k": args.top_k,
               "top_p": args.top_p, "generator": generator}
    if args.draft:
        return draft_stream(model, idx, args.tokens, draft=args.draft, ahead=args.ahead or 4,
                            counts=counts, **options)
    return stream(model, idx, args.tokens, kv_cache=args.kv_cache or "per-loop",
                  exit_threshold=args.exit_threshold, exit_rule=args.exit_rule or "kl",
                  loops_used=loops_used, **options)


def write_text(args, tokenizer, prompt, tokens, loops_used, counts):
    """Print the prompt and the tokens that continue it, as they come, then how fast they came."""
    end, made = begin_token(tokenizer), []

    def before_end():
        for token in takewhile(lambda token: token != end, tokens):
            made.append(token)
            yield token
    print(prompt, end="")
    start = time.perf_counter()
    for text in decode_stream(tokenizer, before_end()):
        print(text, end="", flush=True)
    seconds = time.perf_counter() - start

    notes = f"\n--- {len(made)} tokens, {len(made) / seconds:,.1f} tokens/s"
    if args.compile:
        notes += " with compiling"
    if loops_used:
        notes += f", {sum(loops_used) / len(loops_used):.2f} loops a token"
    if counts:
        notes += (f", {counts['kept'] / max(1, counts['drafted']):.0%} of the drafts kept, "
                  f"{counts['loops'] / max(1, len(made)):.2f} loops a token, one after the other")
    print(notes)


def main():
    args = parse_args()
    device = pick_device(args.device, args.compile)
    model = Parcae.from_pretrained(args.run)
    use_threads(model.config.n_embd)
    # token by token bfloat16 is no faster for small models on a CPU
    in_float32 = device.type == "cpu" and args.dtype == "auto"
    dtype = torch.float32 if in_float32 else pick_dtype(device, args.dtype)
    prepare_weights(model, device, dtype)
    speed_up(model, args.compile)

    tokenizer = load_tokenizer(args.run)
    prompt, idx = read_prompt(args, tokenizer)
    check(idx, args.temperature, args.top_k, args.top_p, args.exit_threshold)
    recurrences = recurrences_of(args, model.config)
    T, block_size = idx.shape[1], model.config.block_size
    if T > block_size:
        print(f"the prompt has {T} tokens: only its last {block_size}, the context, are read")
    idx = idx.to(device)
    for recurrence in recurrences:
        generator = torch.Generator(device).manual_seed(args.seed)
        for i in range(1, args.samples + 1):
            sample = f", sample {i} of {args.samples}" if args.samples > 1 else ""
            print(f"--- recurrence {recurrence}{sample}")
            loops_used, counts = [], {}
            tokens = new_tokens(args, model, idx, recurrence, generator, loops_used, counts)
            write_text(args, tokenizer, prompt, tokens, loops_used, counts)


if __name__ == "__main__":
    run_script(main)
