"""Draw what a model would predict after each loop, at each token of a prompt.

    python -m tools.trace --prompt "for i in range(10):" trace.png

The picture shows the last TRACED tokens: after each loop the likeliest next token, its probability,
and how far the loop moved the state. Needs matplotlib.
"""

from itertools import chain

import numpy as np
import torch

from parts import figures
from parts.cli import LOOPS, Parser, UserError, new_file, run_script
from parts.generation import check_predicts
from parts.tokenizer import begin_token, decode_stream, encode
from sample import add_prompt_flags, read_prompt
from tools.evaluate import open_run

TRACED = 40  # tokens of a prompt that a picture shows


@torch.no_grad()
def trace(model, idx, recurrence, last, k=1):
    """Return what the model would predict after each loop at the last tokens of idx (1, T): the
    probabilities and numbers of the k likeliest tokens, (loops, last, k) each; and how far the loop
    moved the state, |h_t - h_{t-1}| / |h_t|, (loops, last). Raises UserError where a prediction is
    not finite."""
    tops, moved, before = [], [], 0
    for loops, (h, inputs) in enumerate(model.states(idx, recurrence), start=1):
        logits = model.lm_head(model.readout(h, inputs)[0, -last:]).float()  # (last, vocab_size)
        check_predicts(logits, loops)
        tops.append(logits.softmax(-1).topk(k))
        moved.append(((h - before).norm(dim=-1) / h.norm(dim=-1))[0, -last:])
        before = h
    probs, tokens = map(torch.stack, zip(*tops))
    return probs, tokens, torch.stack(moved)


def draw_trace(model, tokenizer, idx, recurrence, path):
    """Write the picture of a trace of the last tokens of idx (1, T)."""
    if not model.config.n_recurrent or idx.shape[1] < 2:
        raise UserError("a trace needs a model that loops and a prompt")
    idx = idx[:, -model.config.block_size:]
    probs, tokens, moved = trace(model, idx, recurrence, TRACED)
    read = [label(tokenizer, i) for i in idx[0, -TRACED:].tolist()]
    tops = [[label(tokenizer, i) for i in row] for row in tokens[..., 0].tolist()]
    picture(path, read, tops, probs[..., 0].cpu().numpy(), moved.cpu().numpy())
    print(f"wrote {path}: {len(read)} tokens, {recurrence} loops")


def label(tokenizer, i):
    """Return token i in up to five visible characters."""
    if i >= tokenizer.n_vocab:
        return "?"  # vocabularies are rounded up
    text = "".join(decode_stream(tokenizer, [i]))
    return repr(text)[1:-1].replace(" ", "\u2423")[:5]


def picture(path, tokens, tops, probabilities, moved):
    """Draw what each loop would predict.

    tokens: the T labels of what is read. tops, probabilities, moved: (loops, T), the likeliest next
    token, its probability, and how far the loop moved the state, |h_t - h_(t-1)| / |h_t|."""
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
    parser.add_argument("file", type=new_file, metavar="FILE", help="the PNG to write")
    parser.set_defaults(dtype="float32")
    args = parser.parse_args()
    figures.pyplot()  # where matplotlib is missing, say so now
    model, tokenizer, _ = open_run(args)
    tokens = map(int, chain.from_iterable(encode(tokenizer, read_prompt(args) or "")))
    idx = torch.tensor([[begin_token(tokenizer), *tokens]], device=model.wte.weight.device)
    draw_trace(model, tokenizer, idx, args.recurrence or 2 * model.config.mean_recurrence,
               args.file)


if __name__ == "__main__":
    run_script(main)
