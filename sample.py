"""Text from a trained model, at any number of loops.

    python sample.py --run out/default --prompt "def " --recurrence 1 4 8
    cat prompt.txt | python sample.py --prompt-file -
    python sample.py --prompt "for i in range(10):" --trace trace.png     what each loop would predict, as a picture
"""

import sys
import time
from itertools import chain
from pathlib import Path

import torch

from common import COUNT, LOOPS, SEED, Parser, UserError, number, pick_device, pick_dtype, run_script, some_path, whole_file
from data import begin_token, decode_stream, encode, load_tokenizer
from model import Parcae, Settled, local_files, read_config


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=some_path, default="out/default", metavar="DIR", help="run directory of train.py (default: %(default)s)")
    add("--init-from", type=some_path, metavar="DIR", help="a model in the published format instead: a directory, or owner/name on the hub")
    add("--prompt", metavar="TEXT", help="text to continue (default: none, a new document)")
    add("--prompt-file", metavar="FILE", help="read the prompt from a file; - is standard input")
    add("--recurrence", type=LOOPS, nargs="+", metavar="T", help="loops, one block of text for each (default: the model's mean)")
    add("--tokens", type=COUNT, default=300, metavar="N", help="new tokens (default: %(default)s)")
    add("--temperature", type=number(float, 0), default=0.7, help="0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=COUNT, metavar="K", help="sample from the K likeliest tokens (default: all)")
    add("--top-p", type=float, metavar="P", help="sample from the fewest tokens with total probability P (default: all)")
    add("--kv-cache", choices=("per-loop", "shared"), default="per-loop",
        help="shared: keep keys and values of the last loop only, less memory, not exact (default: %(default)s)")
    add("--trace", type=some_path, metavar="FILE",
        help="no new text: draw what the model would predict after each loop at each token of the prompt "
        "(the last 40), up to the largest --recurrence (default: twice the model's mean), as PNG")
    add("--exit-threshold", type=number(float, 0), metavar="EPS",
        help="end each token's loop when its prediction changes by less than EPS nats "
        "(KL) from one loop to the next; --recurrence is then the most it may take. Uses the shared cache")
    add("--seed", type=SEED, default=0, help="(default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of weights and activations; auto is float32 on CPUs, "
        "where bfloat16 is slower for small models and faster for large ones (default: auto)")
    add("--compile", action="store_true", help="compile the decoding step: about twice as fast, after a minute or two of compiling")
    return parser.parse_args()


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


@torch.no_grad()
def trace(model, idx, recurrence):
    """What coda and head make of every state of the loop: probabilities (loops, T, vocab_size) for idx (1, T), and how far
    each loop moved the state, |h_t - h_{t-1}| / |h_t|, (loops, T)."""
    states, probs = [], []
    hook = model.C_proj.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0][0].float()))
    model.hidden(idx, recurrence, until=lambda x, t: probs.append(model.lm_head(x)[0].float().softmax(-1)))
    hook.remove()
    states.pop()  # the last one is seen once more at the end
    moved = [(new - old).norm(dim=-1) / new.norm(dim=-1) for old, new in zip([torch.zeros_like(states[0]), *states], states)]
    return torch.stack(probs), torch.stack(moved)


def draw_trace(probs, moved, tokenizer, idx, path):
    """The picture of a trace: the likeliest token and its probability, boxed where the prediction has settled."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--trace needs matplotlib: pip install matplotlib") from None
    loops, T, _ = probs.shape
    name = lambda i: repr("".join(decode_stream(tokenizer, [i])))[1:-1].replace(" ", "\u2423")[:5] if i < tokenizer.n_vocab else "?"
    p, top = (z.tolist() for z in probs.max(-1))
    figure, (axes, below) = plt.subplots(2, 1, figsize=(2 + 0.32 * T, 1.8 + 0.3 * loops), sharex=True, constrained_layout=True,
                                         gridspec_kw={"height_ratios": [loops, 3]})
    image = axes.imshow(p, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i in range(T):
        settled = max([t for t in range(1, loops) if top[t][i] != top[t - 1][i]], default=0)  # nothing changes from here on
        axes.add_patch(plt.Rectangle((i - 0.5, settled - 0.5), 1, 1, fill=False, lw=1.5))
        for t in range(loops):
            axes.text(i, t, name(top[t][i]), ha="center", va="center", fontsize=7, color="w" if p[t][i] > 0.6 else "k", parse_math=False)
    axes.set_yticks(range(loops), range(1, loops + 1))
    axes.set(ylabel="loops", title="What each loop would predict next (box: from here on it stays)")
    figure.colorbar(image, ax=axes, label="probability", pad=0.01)
    below.semilogy(moved[1:].T, lw=1)
    for t, color in zip(range(1, loops), plt.rcParams["axes.prop_cycle"].by_key()["color"]):
        below.text(T - 0.5, moved[t, -1], f" {t + 1}", color=color, fontsize=7, va="center")
    below.set(ylabel="|h - last h| / |h|", xlabel="token read (lines: loops 2, 3, ...)")
    below.set_xticks(range(T), [name(i) for i in idx[0].tolist()], fontsize=7, parse_math=False)
    with whole_file(path, "wb") as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def main(args):
    device = pick_device(args.device)
    source = local_files(args.init_from) if args.init_from else Path(args.run)
    read_config(source)  # a run that is not there is no name on the hub
    exact = args.trace or device.type == "cpu" and args.dtype == "auto"  # token by token, bfloat16 is no faster for small models
    dtype = torch.float32 if exact else pick_dtype(device, args.dtype)
    model = Parcae.from_pretrained(source).to(device, dtype)
    if args.compile:
        model.step = torch.compile(model.step, dynamic=True)
    tokenizer = load_tokenizer(source)
    prompt = read_prompt(args)
    idx = torch.tensor([[begin_token(tokenizer), *map(int, chain.from_iterable(encode(tokenizer, prompt or "")))]], device=device)
    recurrence = args.recurrence or [model.config.mean_recurrence]
    if not model.config.n_recurrent:
        print("a plain transformer: nothing loops, --recurrence has no effect")
        recurrence = [1]
    if args.trace:
        if not model.config.n_recurrent or idx.shape[1] < 2:
            raise UserError("--trace needs a model that loops and a prompt")
        idx = idx[:, -40:]
        loops = max(args.recurrence or [2 * model.config.mean_recurrence])
        probs, moved = trace(model, idx, loops)
        draw_trace(probs.cpu(), moved.cpu(), tokenizer, idx, args.trace)
        print(f"wrote {args.trace}: {idx.shape[1]} tokens, {loops} loops")
        return
    for T in recurrence:
        until = None if args.exit_threshold is None else Settled(model, args.exit_threshold)
        generator = torch.Generator(device).manual_seed(args.seed)
        tokens = model.stream(idx, args.tokens, recurrence=T, temperature=args.temperature, top_k=args.top_k,
                              top_p=args.top_p, generator=generator, kv_cache="shared" if until else args.kv_cache, until=until)
        print(f"--- recurrence {T}\n{prompt or ''}", end="")
        start = time.perf_counter()
        for text in decode_stream(tokenizer, tokens):
            print(text, end="", flush=True)
        seconds = time.perf_counter() - start
        used = f", {sum(until.loops) / len(until.loops):.2f} loops a token" if until and until.loops else ""
        print(f"\n--- {args.tokens} tokens, {args.tokens / seconds:,.1f} tokens/s{used}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
