"""The pictures of docs/guide.md: a loop in one dimension, and a trained model's fixed point.

    python -m runs.guide --run out/default    writes guide-loop.png and guide-fixed-point.png

The second reads val text with more and more loops. After t of them the state h_t of each token is
compared with h_last, its state after four times as many as are shown. Were the loop nothing but
h <- A_bar h + b with one A_bar, the distance would be A_bar^t.
"""

from pathlib import Path

import numpy as np
import torch

from model import Parcae
from parts import figures
from parts.cli import COUNT, Parser, UserError, run_script, some_path
from parts.generation import check_predicts
from parts.tokenizer import load_tokenizer
from tools.evaluate import add_text_flags, open_text

RULES = {0.45: "a = 0.45: settles at 1.82", 1.0: "a = 1: grows by 1 a loop",
         1.1: "a = 1.1: explodes"}
LAST = 4  # times the loops shown: where the fixed point is taken from


def one_dimension(a, b=1.0, loops=16):
    """The states (loops + 1,) of h <- a h + b, from 0 on."""
    h = [0.0]
    for _ in range(loops):
        h.append(a * h[-1] + b)
    return h


def distances(model, idx, loops):
    """|h_t - h_last| / |h_last|, (tokens, loops), of the tokens of idx (B, T), t = 1, 2, ..."""
    first = []
    for h, _ in model.states(idx, LAST * loops):
        if len(first) < loops:
            first.append(h)
    check_predicts(h, LAST * loops)
    apart = torch.stack([(h_t - h).norm(dim=-1) / h.norm(dim=-1) for h_t in first], dim=-1)
    return apart.flatten(0, 1).numpy()


def open_model(run):
    """The model of a run directory in float64. Raises UserError where it has no A_bar."""
    # In float32, rounding alone would be a floor near 1e-7.
    model = Parcae.from_pretrained(run).double()
    if not hasattr(model.injection, "A_bar"):
        rule = model.config.injection if model.config.n_recurrent else "none, it does not loop"
        raise UserError(f"{run} has no A_bar: injection is {rule}, must be diagonal")
    return model


def print_table(apart, factor):
    low, median, high, most = np.quantile(apart, [0.05, 0.5, 0.95, 1], axis=0)
    print(f"{'t':>3} {'median':>9} {'5 %':>9} {'95 %':>9} {'farthest':>9} {'A_bar^t':>9}")
    for i in range(len(median)):
        print(f"{i + 1:3} {median[i]:9.2e} {low[i]:9.2e} {high[i]:9.2e} {most[i]:9.2e} "
              f"{factor ** (i + 1):9.2e}")


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=some_path, default="out/default", metavar="DIR",
        help="run directory of train.py, of a looped model (default: %(default)s)")
    add_text_flags(add, 16)
    add("--loops", type=COUNT, default=32, metavar="T",
        help="loops to show (default: %(default)s)")
    add("--out", type=Path, default="out", metavar="DIR",
        help="directory for the pictures (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    figures.pyplot()
    model = open_model(args.run)
    text = open_text(args, model, load_tokenizer(args.run))
    with torch.no_grad():
        apart = np.concatenate([distances(model, idx, args.loops) for idx, _ in text.batches(1)])
        A_bar = model.injection.A_bar()
    factor = A_bar.mean().item()
    print(f"{args.run} on {len(apart):,} tokens of {text.name}; A_bar is {factor:.3f} on average, "
          f"{A_bar.min():.3f} to {A_bar.max():.3f}")
    print_table(apart, factor)

    curves = [(a, label, one_dimension(a)) for a, label in RULES.items()]
    figures.one_dimension(args.out / "guide-loop.png", curves)
    figures.fixed_point(args.out / "guide-fixed-point.png", apart, factor,
                        model.config.mean_recurrence)


if __name__ == "__main__":
    run_script(main)
