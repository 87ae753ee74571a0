"""Draw what a model would predict after each loop, at each token of a prompt.

    python -m tools.trace --prompt "for i in range(10):" trace.html    a page with a slider
    python -m tools.trace --prompt "for i in range(10):" trace.png     a picture (needs matplotlib)

The page is one file and needs no network. Each token is coloured by the probability of the
likeliest next token; the five likeliest after the token that is pointed at stand above the text.
The picture shows the last TRACED tokens: after each loop the likeliest next token, its probability,
and how far the loop moved the state.
"""

from pathlib import Path

import numpy as np
import torch

from parts import figures
from parts.cli import LOOPS, Parser, UserError, new_file, run_script
from parts.files import json_text, write_text
from parts.generation import check_predicts
from sample import add_prompt_flags, read_prompt
from tools.evaluate import open_run

TRACED = 40  # tokens of a prompt that a picture shows
PAGE = Path(__file__).with_suffix(".html")


@torch.no_grad()
def trace(model, idx, recurrence, last, k):
    """Return what each loop would predict at the last tokens of idx (1, T), probabilities and
    numbers of the k likeliest tokens, (loops, last, k) each; and how far it moved the state,
    |h_t - h_{t-1}| / |h_t|, (loops, last). Raises UserError where a prediction is not finite."""
    tops, moved, before = [], [], 0
    for loops, (h, inputs) in enumerate(model.states(idx, recurrence), start=1):
        logits = model.head(model.readout(h, inputs)[0, -last:])  # (last, vocab_size)
        check_predicts(logits, loops)
        tops.append(logits.softmax(-1).topk(k))
        moved.append(((h - before).norm(dim=-1) / h.norm(dim=-1))[0, -last:])
        before = h
    probs, tokens = map(torch.stack, zip(*tops))
    return probs, tokens, torch.stack(moved)


def draw_trace(model, tokenizer, idx, recurrence, path):
    """Write the page or the picture of a trace of the last tokens of idx (1, T)."""
    if not model.config.n_recurrent or idx.shape[1] < 2:
        raise UserError("a trace needs a model that loops and a prompt")
    page = is_page(path)
    last, k = (model.config.block_size, 5) if page else (TRACED, 1)
    idx = idx[:, -model.config.block_size:].to(model.wte.weight.device)
    probs, tokens, moved = trace(model, idx, recurrence, last, k)
    read = [text_of(tokenizer, i) for i in idx[0, -last:].tolist()]
    tops = [[[text_of(tokenizer, i) for i in top] for top in row] for row in tokens.tolist()]
    if page:
        write_page(path, read, tops, probs.tolist())
    else:
        tops = [[short(text) for text, in row] for row in tops]
        picture(path, [*map(short, read)], tops, probs[..., 0].cpu().numpy(), moved.cpu().numpy())
    print(f"wrote {path}: {len(read)} tokens, {recurrence} loops")


def is_page(path):
    return Path(path).suffix.lower() == ".html"


def text_of(tokenizer, i):
    """Return token i as text; a byte that is not text alone, half a letter, as \\xc3."""
    try:
        return tokenizer.decode_single_token_bytes(i).decode("utf-8", errors="backslashreplace")
    except KeyError:
        return "?"  # vocabularies are rounded up


def short(text):
    """Return up to five visible characters of a text."""
    return repr(text)[1:-1].replace("\\\\", "\\").replace(" ", "\u2423")[:5]


def write_page(path, tokens, tops, probabilities):
    """Write the page.

    tokens: the T texts that are read. tops, probabilities: of each loop and token the texts and
    probabilities of the likeliest next tokens, lists (loops, T, k), the likeliest first."""
    loops = [[[(text, round(p, 5)) for text, p in zip(*top)] for top in zip(*rows)]
             for rows in zip(tops, probabilities)]
    # ASCII, and no "<": nothing in a text can end the script element that holds it
    data = json_text({"tokens": tokens, "loops": loops}, separators=(",", ":"))
    page = PAGE.read_text(encoding="utf-8")
    write_text(path, page.replace("__DATA__", data.replace("<", "\\u003c")))


def picture(path, tokens, tops, probabilities, moved):
    """Draw what each loop would predict.

    tokens: the T labels of what is read. tops, probabilities, moved: (loops, T), the likeliest next
    token, its probability, and how far the loop moved the state."""
    moved = np.asarray(moved)
    loops, T = moved.shape
    figure, (axes, below) = figures.pyplot().subplots(
        2, 1, figsize=(2 + 0.32 * T, 1.8 + 0.3 * loops), sharex=True, layout="constrained",
        height_ratios=[loops, 3])
    image = figures.cells(axes, np.asarray(probabilities), tops, lowest=0)
    figure.colorbar(image, ax=axes, label="probability", pad=0.01)
    for i in range(T):
        # the loop from which on the prediction stays
        settled = max((t for t in range(1, loops) if tops[t][i] != tops[t - 1][i]), default=0)
        box = figures.pyplot().Rectangle((i - 0.5, settled - 0.5), 1, 1, fill=False, lw=1.5)
        axes.add_patch(box)
    axes.set_yticks(range(loops), range(1, loops + 1))
    axes.set(ylabel="loops", title="What each loop would predict next (box: from here on it stays)")

    # The first loop starts from nothing, so that it moves all of the state: no line for it.
    for t in range(1, loops):
        color = figures.shade(t - 1, loops - 1)
        below.semilogy(moved[t], lw=1, color=color)
        below.text(T - 0.5, moved[t, -1], f" {t + 1}", color=color, fontsize=7, va="center")
    below.set(ylabel="$|h_t - h_{t-1}|$ / $|h_t|$",
              xlabel="token read (lines: loops t = 2, 3, ...)")
    below.set_xticks(range(T), tokens, fontsize=7, parse_math=False)
    figures.save(figure, path)


def main():
    parser = Parser(description=__doc__)
    add_prompt_flags(parser)
    parser.add_argument("--recurrence", type=LOOPS, metavar="T",
                        help="loops (default: twice the model's mean)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("file", type=new_file, metavar="FILE",
                        help="FILE.html: the page, of all tokens in the context; else the PNG")
    parser.set_defaults(dtype="float32")
    args = parser.parse_args()
    if not is_page(args.file):
        figures.pyplot()  # where matplotlib is missing, say so now
    model, tokenizer, _ = open_run(args)
    _, idx = read_prompt(args, tokenizer)
    recurrence = args.recurrence or 2 * model.config.mean_recurrence
    draw_trace(model, tokenizer, idx, recurrence, args.file)


if __name__ == "__main__":
    run_script(main)
