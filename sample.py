"""Text from a trained model, at any number of loops.

    python sample.py --run out/default --prompt "def " --recurrence 1 4 8
    cat prompt.txt | python sample.py --prompt-file -
    python sample.py --prompt "def " --samples 3          three of them, at the model's mean
    python sample.py --recurrence 8 --draft 1 --ahead 8   drafted with one loop: see draft.py
    python sample.py --prompt "for i in range(10):" --trace trace.png     what each loop predicts
    python sample.py --prompt "for i in range(10):" --trace trace.html    the same, as a web page

A generator of tokens is `stream`, a whole continuation `generate`. Early exit (`settle`) and the
trace go loop by loop through `model.states`, where a loop can be looked at or left.
"""

import math
import sys
import time
from collections import namedtuple
from itertools import chain, takewhile
from pathlib import Path

import torch
import torch.nn.functional as F

import figures
from common import (
    COUNT,
    LOOPS,
    SEED,
    Parser,
    UserError,
    check_idle,
    check_needs,
    new_file,
    number,
    pick_device,
    pick_dtype,
    progress_bar,
    run_script,
    some_path,
    use_threads,
)
from model import Parcae
from quantize import cast
from recording import speed_up
from tokenizer import begin_token, decode_stream, encode, load_tokenizer
from trace_page import write_page

TRACED = 40  # tokens of a prompt that a trace shows
NO_TOKEN = -1
FIXED_POINT = 2.0 ** 54  # keeps every bit of a float32 probability above 1e-9
GREEDY = 1e-6  # temperatures below take the likeliest token: logits divided by less would overflow

# ------------------------------------------------------------------------------- generation


def probabilities(logits, temperature, top_k=None, top_p=None):
    """What tokens are drawn from, (B, vocab_size), for logits (B, vocab_size)."""
    if temperature < GREEDY:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    probs = (logits / temperature).softmax(-1)
    if top_p == 1:  # all tokens, even those that rounding hides
        top_p = None
    if top_k is None and top_p is None:
        return probs
    probs, tokens = probs.sort(-1, descending=True)
    if top_k is not None:
        probs[:, top_k:] = 0
        probs /= probs.sum(-1, keepdim=True)
    if top_p is not None:
        # whole numbers add up exactly, on every device: mps has no float64
        parts = (probs * FIXED_POINT).long()
        before = parts.cumsum(-1) - parts
        probs[:, 1:][before[:, 1:] >= math.ceil(top_p * FIXED_POINT)] = 0  # held already
        probs /= probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, tokens, probs)


def choose(logits, temperature, top_k=None, top_p=None, generator=None):
    """Draw tokens (B, 1) from logits (B, vocab_size). Raises UserError if they are not finite."""
    check_predicts(logits)
    if temperature < GREEDY:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1,
                             generator=generator)


def check_predicts(values, loops="so many"):
    """Raise UserError where logits or losses are not finite. loops: that they come after."""
    if not values.isfinite().all():
        raise UserError(f"what the model predicts after {loops} loops is not finite: its state may "
                        "have grown without bound (GUIDE.md, section 2)")


# When has a token looped enough? When what a rule measures falls below a threshold. It looks at the
# state h (B, T, C) and the log of the prediction (B, T, vocab_size), now and a loop ago.
Look = namedtuple("Look", "h log_probs")
EXIT_RULES = {
    # how far the prediction moved, KL divergence in nats (recurrent-depth models, arXiv 2502.05171)
    "kl": lambda now, last: F.kl_div(last.log_probs, now.log_probs, reduction="sum",
                                     log_target=True),
    # how unsure the prediction is, in nats
    "entropy": lambda now, last: -(now.log_probs.exp() * now.log_probs).sum(),
    # how far the state moved, as a share of its size
    "state": lambda now, last: (now.h - last.h).norm() / now.h.norm(),
}


def settle(model, idx, most, cache, threshold, rule="kl"):
    """Logits (B, T, vocab_size) of idx (B, T), and the loops that they took, at most `most`.

    The loop ends once the rule is below `threshold`, after the second loop at the earliest. Tokens
    that stop early have no keys and values for later loops, so the cache must be a shared one."""
    last = None
    for loops, (h, inputs) in enumerate(model.states(idx, most, cache), start=1):
        logits = model.lm_head(model.readout(h, inputs, cache)).float()
        now = Look(h, logits.log_softmax(-1))
        if loops > 1 and EXIT_RULES[rule](now, last) < threshold:
            break
        last = now
    return logits, loops


@torch.no_grad()
def stream(model, idx, n, *, recurrence=None, temperature=1.0, top_k=None, top_p=None,
           generator=None, kv_cache="per-loop", exit_threshold=None, exit_rule="kl",
           loops_used=None):
    """Yield n next tokens (B, 1), each drawn given the last block_size before it.

    Arguments as in `generate`. loops_used: a list that gets the loops of each token whose loop may
    end early. The cache serves until the context is full; from then on the window slides, which
    moves every token in it, and each token costs a full forward pass."""
    check(idx, temperature, top_k, top_p, exit_threshold)
    capacity = min(idx.shape[1] + n, model.config.block_size)
    if exit_threshold is not None:
        kv_cache = "shared"
    training = model.training
    model.eval()
    try:
        recurrence, = model.depths_of(1, recurrence)
        cache = model.new_cache(len(idx), capacity, recurrence, kv_cache)
        for _ in range(n):
            slides = idx.shape[1] > capacity  # the window: no cache
            if slides or cache.pos == 0:  # or the prompt: all tokens at once
                x = model.hidden(idx[:, -capacity:], recurrence, None if slides else cache)
                logits = model.lm_head(x[:, -1:]).float()
            elif exit_threshold is not None:
                new = idx[:, cache.pos:]
                logits, loops = settle(model, new, recurrence, cache, exit_threshold, exit_rule)
                if loops_used is not None:
                    loops_used.append(loops)
            else:  # one more token
                logits, _, _ = model.advance(idx[:, cache.pos:], cache, 0, recurrence)
            token = choose(logits[:, -1], temperature, top_k, top_p, generator)
            idx = torch.cat([idx, token], dim=1)
            yield token
    finally:
        model.train(training)


def generate(model, idx, n, **options):
    """Continue idx (B, T) int64 by n tokens: (B, T + n) int64.

    options: recurrence: loops (None: mean_recurrence); temperature: 0 is greedy; top_k, top_p: keep
    the k likeliest tokens, the fewest with total probability p; generator: a seeded torch.Generator
    on idx's device; kv_cache: "per-loop", or "shared", see KVCache; exit_threshold, exit_rule: see
    `settle` (B = 1). Raises UserError on an empty prompt and on values out of range."""
    return torch.cat([idx, *stream(model, idx, n, **options)], dim=1)


def check(idx, temperature, top_k, top_p, exit_threshold):
    """Raise UserError for what `stream` cannot work with."""
    if idx.ndim != 2 or idx.shape[1] == 0:
        raise UserError("the prompt is empty, must hold at least one token")
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}, must be at least 0")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}, must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}, must be in (0, 1]")
    if exit_threshold is not None and not exit_threshold >= 0:
        raise UserError(f"exit threshold is {exit_threshold}, must be at least 0")

# ------------------------------------------------------------------------------- trace


@torch.no_grad()
def trace(model, idx, recurrence, last):
    """What the model would predict after each loop at the last tokens of idx (1, T), probabilities
    (loops, last, vocab_size), and how far the loop moved the state, |h_t - h_{t-1}| / |h_t|,
    (loops, last). Raises UserError where a prediction is not finite."""
    probs, moved, before = [], [], 0
    for loops, (h, inputs) in enumerate(model.states(idx, recurrence), start=1):
        logits = model.lm_head(model.readout(h, inputs)[0, -last:]).float()
        check_predicts(logits, loops)
        probs.append(logits.softmax(-1))
        moved.append(((h - before).norm(dim=-1) / h.norm(dim=-1))[0, -last:])
        before = h
    return torch.stack(probs), torch.stack(moved)


def draw_trace(model, tokenizer, idx, recurrence, path):
    """Write the picture, or the page, of a trace of the last tokens of idx (1, T)."""
    if not model.config.n_recurrent or idx.shape[1] < 2:
        raise UserError("--trace needs a model that loops and a prompt")
    idx = idx[:, -model.config.block_size:]
    if is_page(path):
        draw_page(model, tokenizer, idx, recurrence, path)
        return
    probs, moved = trace(model, idx, recurrence, TRACED)
    idx = idx[:, -TRACED:]
    likeliest, tops = probs.max(-1)
    figures.trace(path, [label(tokenizer, i) for i in idx[0].tolist()],
                  [[label(tokenizer, i) for i in row] for row in tops.tolist()],
                  likeliest.cpu().numpy(), moved.cpu().numpy())
    print(f"wrote {path}: {idx.shape[1]} tokens, {recurrence} loops")


def is_page(path):
    return Path(path).suffix.lower() == ".html"


@torch.no_grad()
def draw_page(model, tokenizer, idx, recurrence, path):
    """Write the page of a trace of idx (1, T): the five likeliest tokens at each loop. Each loop's
    are taken as it comes: `trace` would keep all probabilities."""
    tops = []
    for loops, (h, inputs) in enumerate(model.states(idx, recurrence), start=1):
        logits = model.lm_head(model.readout(h, inputs))[0].float()              # (T, vocab_size)
        check_predicts(logits, loops)
        top = logits.softmax(-1).topk(5)
        tops.append([[(text_of(tokenizer, i), p) for i, p in zip(*row)]
                     for row in zip(top.indices.tolist(), top.values.tolist())])
    write_page(path, [text_of(tokenizer, i) for i in idx[0].tolist()], tops)
    print(f"wrote {path}: {idx.shape[1]} tokens, {recurrence} loops, for a browser")


def text_of(tokenizer, i):
    """Token i as text; bytes that are none alone, half a letter, as \\xc3."""
    try:
        return tokenizer.decode_single_token_bytes(i).decode("utf-8", errors="backslashreplace")
    except KeyError:
        return "?"  # vocabularies are rounded up


def label(tokenizer, i):
    """Token i in up to five visible characters."""
    if i >= tokenizer.n_vocab:
        return "?"  # vocabularies are rounded up
    text = "".join(decode_stream(tokenizer, [i]))
    return repr(text)[1:-1].replace(" ", "\u2423")[:5]

# ------------------------------------------------------------------------------- command line


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=some_path, default="out/default", metavar="DIR",
        help="run directory of train.py (default: %(default)s)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT",
                        help="text to continue (default: none, a new document)")
    prompt.add_argument("--prompt-file", metavar="FILE",
                        help="read the prompt from a file; - is standard input")
    add("--recurrence", type=LOOPS, nargs="+", metavar="T",
        help="loops, one block of text for each (default: the model's mean)")
    add("--samples", type=COUNT, default=1, metavar="N",
        help="continuations of the prompt, made together: many take little more time than one "
        "(default: %(default)s)")
    add("--tokens", type=COUNT, default=200, metavar="N",
        help="new tokens, at most; fewer if the text ends (default: %(default)s)")
    add("--ignore-eot", action="store_true",
        help="go on after the end of the text, with another one")
    add("--temperature", type=number(float, 0), default=0.7,
        help="0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=COUNT, metavar="K",
        help="sample from the K likeliest tokens (default: all)")
    add("--top-p", type=float, metavar="P",
        help="sample from the fewest tokens with total probability P (default: all)")
    add("--kv-cache", choices=("per-loop", "shared"),
        help="shared: keep keys and values of the last loop only, less memory, not exact "
        "(default: per-loop)")
    add("--exit-threshold", type=number(float, 0), metavar="EPS",
        help="end each token's loop when --exit-rule falls below EPS; --recurrence is then the "
        "most it may take. Uses the shared cache")
    add("--exit-rule", choices=EXIT_RULES,
        help="kl: nats that the prediction changed by from one loop to the next; entropy: nats "
        "that it is unsure of; state: change of the state, a share (default: kl)")
    add("--draft", type=LOOPS, metavar="T",
        help="draft tokens with T loops and verify them together with --recurrence: exact, and "
        "faster in small models (see draft.py)")
    add("--ahead", type=COUNT, metavar="N", help="tokens drafted at a time (default: 4)")
    add("--trace", type=new_file, metavar="FILE",
        help="no new text: draw what the model would predict after each loop at each token of the "
        f"prompt, up to the largest --recurrence (default: twice the model's mean). FILE.html: a "
        f"page with a slider over loops. Else a PNG, of the last {TRACED} tokens; needs matplotlib")
    add("--seed", type=SEED, default=0, help="(default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32", "int8"), default="auto",
        help="of weights and activations; int8: weights of 8 bits, activations bfloat16, next to "
        "no loss (see quantize.py). On a CPU int8 pays with 256 channels or more, bfloat16 in "
        "large models; auto is float32 there (default: auto)")
    add("--compile", action="store_true",
        help="compile the decoding step: 1.4 to 3.3 times as fast, most for small models, after "
        "half a minute for each number of loops; on a GPU the layers, 1.5 times")
    args = parser.parse_args()
    check_flags(parser, args)
    return args


def check_flags(parser, args):
    """Raise UserError where flags do nothing, or do not go together."""
    check_needs(args, exit_rule="exit_threshold", ahead="draft")
    if args.trace:
        used = ("run", "prompt", "prompt_file", "recurrence", "trace", "device", "dtype")
        others = [name for name in vars(args) if name not in used]
        check_idle(parser, args, others, "--trace writes no new text")
        if args.dtype not in ("auto", "float32"):
            raise UserError(f"--dtype is {args.dtype}, must be float32 with --trace")
    if args.samples > 1 and (args.draft or args.exit_threshold is not None):
        raise UserError(f"--samples is {args.samples}, must be 1 with --draft or --exit-threshold: "
                        "their tokens do not keep step")
    if args.draft and (args.kv_cache == "shared" or args.exit_threshold is not None):
        raise UserError("--draft needs a cache for each loop: leave out --kv-cache and "
                        "--exit-threshold")
    if args.kv_cache == "per-loop" and args.exit_threshold is not None:
        raise UserError("--exit-threshold needs the shared cache: leave out --kv-cache")
    if args.compile and args.exit_threshold is not None:
        raise UserError("--exit-threshold goes loop by loop, which --compile does not compile: "
                        "leave out one of them")


def recurrences_of(args, config):
    """The numbers of loops to write a block of text for. Raises UserError."""
    recurrences = args.recurrence or [config.mean_recurrence]
    if not config.n_recurrent:
        for flag, value in (("--draft", args.draft), ("--exit-threshold", args.exit_threshold)):
            if value is not None:
                raise UserError(f"{flag} needs a model that loops: this is a plain transformer")
        if args.recurrence:
            print("a plain transformer: nothing loops, --recurrence has no effect")
        return [1]
    if args.draft and args.draft >= min(recurrences):
        raise UserError(f"--draft is {args.draft}, must be below --recurrence {min(recurrences)}")
    return recurrences


def read_prompt(args):
    """The prompt's text, or None for a new document. Raises UserError."""
    if args.prompt_file is None:
        text, name = args.prompt, "--prompt"
    else:
        name = f"--prompt-file {args.prompt_file}"
        try:
            if args.prompt_file == "-":
                data = sys.stdin.buffer.read()
            else:
                data = Path(args.prompt_file).read_bytes()
            text = data.decode("utf-8-sig")  # without a byte order mark
        except OSError as error:
            raise UserError(f"{name}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{name} is not UTF-8 text") from None
    if text == "":
        raise UserError(f"{name} is empty, must hold at least one character "
                        "(leave it out for a new document)")
    return text


def until(tokens, end, made):
    """Yield tokens (B, 1) until each row has had the token `end`. made: a list that gets them."""
    ended = False
    for token in tokens:
        made.append(token)
        yield token
        ended = ended | (token == end)
        if ended.all():
            return


def tokens_before(row, end):
    """The tokens of a row, a list, that come before the token `end`."""
    return row[:row.index(end)] if end in row else row


def new_tokens(args, model, idx, recurrence, loops_used, counts):
    """The stream of tokens (samples, 1) that the flags ask for; see stream and draft_stream."""
    from draft import draft_stream  # here, since draft.py imports this file

    options = {"recurrence": recurrence, "temperature": args.temperature, "top_k": args.top_k,
               "top_p": args.top_p,
               "generator": torch.Generator(idx.device).manual_seed(args.seed)}
    if args.draft:
        return draft_stream(model, idx, args.tokens, draft=args.draft, ahead=args.ahead or 4,
                            counts=counts, **options)
    return stream(model, idx.expand(args.samples, -1), args.tokens,
                  kv_cache=args.kv_cache or "per-loop", exit_threshold=args.exit_threshold,
                  exit_rule=args.exit_rule or "kl", loops_used=loops_used, **options)


def write_block(args, model, tokenizer, prompt, idx, recurrence):
    """Print continuations of the prompt at one number of loops; a single one as it comes."""
    loops_used, counts, made = [], {}, []
    end = NO_TOKEN if args.ignore_eot else begin_token(tokenizer)
    head, prompt = f"--- recurrence {recurrence}", prompt or ""
    start = time.perf_counter()
    tokens = until(new_tokens(args, model, idx, recurrence, loops_used, counts), end, made)
    if args.samples == 1:
        print(f"{head}\n{prompt}", end="")
        for text in decode_stream(tokenizer, takewhile(lambda token: token != end, tokens)):
            print(text, end="", flush=True)
        print()
    else:
        for _ in progress_bar(tokens, desc="tokens", total=args.tokens):
            pass
    seconds = time.perf_counter() - start

    rows = [tokens_before(row, end) for row in torch.cat(made, dim=1).tolist()]
    if args.samples > 1:
        for i, row in enumerate(rows, start=1):
            text = "".join(decode_stream(tokenizer, row))
            print(f"{head}, sample {i} of {len(rows)}\n{prompt}{text}")
    count = sum(map(len, rows))
    rate = f"{count / seconds:,.1f} tokens/s"
    notes = [f"{count} tokens", f"{rate} with compiling" if args.compile else rate]
    ended = sum(len(row) < len(made) for row in rows)
    if ended:
        notes.append(f"{ended} of {len(rows)} texts came to their end")
    if loops_used:
        notes.append(f"{sum(loops_used) / len(loops_used):.2f} loops a token")
    if counts:
        kept = counts["kept"] / max(1, counts["drafted"])
        notes += [f"{kept:.0%} of the drafts kept",
                  f"{counts['loops'] / len(made):.2f} loops a token, one after the other"]
    print(f"--- {', '.join(notes)}")


def main():
    args = parse_args()
    if args.trace and not is_page(args.trace):
        figures.pyplot()  # where matplotlib is missing, say so now
    device = pick_device(args.device, args.compile)
    model = Parcae.from_pretrained(args.run)
    use_threads(model.config.n_embd)
    # token by token bfloat16 is no faster for small models on a CPU
    in_float32 = args.trace or (device.type == "cpu" and args.dtype == "auto")
    dtype = torch.float32 if in_float32 else pick_dtype(device, args.dtype)
    cast(model, device, dtype)
    speed_up(model, args.compile)

    tokenizer = load_tokenizer(args.run)
    prompt = read_prompt(args)
    tokens = map(int, chain.from_iterable(encode(tokenizer, prompt or "")))
    idx = torch.tensor([[begin_token(tokenizer), *tokens]], device=device)                # (1, T)

    mean = model.config.mean_recurrence
    if args.trace:
        draw_trace(model, tokenizer, idx, max(args.recurrence or [2 * mean]), args.trace)
        return
    check(idx, args.temperature, args.top_k, args.top_p, args.exit_threshold)
    recurrences = recurrences_of(args, model.config)
    T, block_size = idx.shape[1], model.config.block_size
    if T > block_size:
        print(f"the prompt has {T} tokens: only its last {block_size}, the context, are read")
    for recurrence in recurrences:
        write_block(args, model, tokenizer, prompt, idx, recurrence)


if __name__ == "__main__":
    run_script(main)
