"""Does the state of a trained model reach a fixed point? Draw this and docs/guide.md's pictures.

    python -m runs.guide --run out/default    writes out/guide-*.png: five that explain, and this

It reads val text and compares the state h_t of each token after t loops with h_last, its state
after four times as many loops as are shown. Without layers, the loop would be h <- A_bar h + b, and
each loop would multiply the distance by the largest entry of A_bar, or by less.
"""

from pathlib import Path

import numpy as np
import torch

from model import Parcae
from parts import figures
from parts.cli import COUNT, Parser, UserError, new_directory, run_script, some_path
from parts.generation import check_predicts
from parts.machine import use_threads
from parts.tokenizer import load_tokenizer
from tools.evaluate import add_text_flags, open_text

RULES = {0.45: "a = 0.45: settles at 1.82", 1.0: "a = 1: grows by 1 per loop",
         1.1: "a = 1.1: explodes"}
LAST = 4  # h_last is the state after LAST times as many loops as are shown

# ------------------------------------------------------------------------------- explanations


def box(axes, x, y, text, color="0.92", width=0.8):
    """Draw a box with its centre at (x, y)."""
    axes.add_patch(figures.pyplot().Rectangle((x - width / 2, y - 0.3), width, 0.6, fc=color,
                                              ec="k", lw=0.8))
    axes.text(x, y, text, ha="center", va="center")


def arrow(axes, start, end, color="k"):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color})


def unrolled(path):
    """Draw three loops in a row: e enters each, and the gradient passes through the last two."""
    figure, [axes] = figures.panels(1, 9.5, 2.9)
    box(axes, -1.2, 2, "prelude", width=1)
    arrow(axes, (-2.2, 2), (-1.75, 2))
    axes.text(-2.3, 2, "tokens", ha="right", va="center")
    axes.plot([-0.7, 6.6], [2, 2], "k-", lw=1)
    axes.text(-0.3, 2.12, "e", ha="center")
    axes.text(-0.9, 0.5, "$h_0$ (noise)", ha="right", va="center")
    arrow(axes, (-0.85, 0.5), (0, 0.5))
    for t in range(3):
        x = 0.6 + 3 * t
        box(axes, x, 0.5, "$\\bar A h + \\bar B e$", width=1.2)
        box(axes, x + 1.5, 0.5, "layers", color="0.8")
        arrow(axes, (x, 2), (x, 0.82), color=figures.RED)
        arrow(axes, (x + 0.62, 0.5), (x + 1.08, 0.5))
        arrow(axes, (x + 1.92, 0.5), (x + 2.38, 0.5))
        axes.text(x + 0.85, -0.15, f"loop {t + 1}", ha="center", va="top")
    box(axes, 9.45, 0.5, "coda", width=0.9)
    arrow(axes, (9.92, 0.5), (10.3, 0.5))
    axes.text(10.35, 0.5, "logits", va="center")
    axes.axvline(2.75, 0.06, 0.95, color="0.5", ls="--")
    axes.text(2.65, -0.6, "no gradient", ha="right", color="0.4", fontsize=8)
    axes.text(2.85, -0.6, "gradient: the last 2 loops", color="0.4", fontsize=8)
    axes.set(xlim=(-3.2, 11.2), ylim=(-0.8, 2.6),
             title="T = 3 loops with the same weights; e enters each of them")
    axes.axis("off")
    figures.save(figure, path)


def one_dimension(path, loops=16):
    """Draw the loop h <- a h + 1 in one dimension, starting from h = 0."""
    figure, [axes] = figures.panels(1, 7.5, 3.8)
    for i, (a, label) in enumerate(RULES.items()):
        h = [0.0]
        for _ in range(loops):
            h.append(a * h[-1] + 1)
        color = figures.RED if a > 1 else figures.shade(i, len(RULES))
        axes.plot(h, f"{figures.marker(i)}-", ms=4, color=color)
        axes.text(loops + 0.4, h[-1], label, color=color, va="center")
    axes.set(xlim=(0, 1.5 * loops), xticks=range(0, loops + 1, 4), xlabel="loops t",
             ylabel="state h", title="h <- a h + 1, from h = 0: what a decides")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines.bottom.set_bounds(0, loops)
    figures.save(figure, path)


def exponential(path):
    """Draw the factor of the old state against dt |A|: exact, and for a step of Euler's method."""
    figure, [axes] = figures.panels(1, 7, 3.6)
    x = np.linspace(0, 3, 200)
    axes.axhspan(-1, 1, color="0.93")
    axes.plot(x, np.exp(-x), "k-")
    axes.plot(x, 1 - x, color=figures.RED)
    axes.text(2.05, 0.2, "exp(-dt |A|): always in (0, 1)")
    axes.text(1.12, -0.75, "Euler's step 1 - dt |A|", color=figures.RED, ha="right")
    axes.plot(2, -1, "o", color=figures.RED)
    axes.text(1.95, -1.2, "below -1 the loop explodes", color=figures.RED, ha="right", va="top")
    axes.text(0.05, -0.93, "grey: stable", color="0.4")
    start = -np.log(0.2 ** 0.5)
    axes.plot(start, 0.2 ** 0.5, "ko")
    axes.text(start + 0.06, 0.2 ** 0.5 + 0.03, "start of training: 0.447")
    axes.set(xlim=(0, 3), ylim=(-2, 1.1), xlabel="dt |A|", ylabel="factor of the old state")
    axes.spines[["top", "right"]].set_visible(False)
    figures.save(figure, path)


def cache_grid(path, tokens=5, loops=4, kept=2):
    """Draw what the last token attends to in loop 3, with a cache for each loop and with a shared
    cache; and in which step drafting computes each loop of the tokens after the first."""
    figure, axes = figures.panels(3, 9, 3.4)
    last, others = tokens - 1, range(1, tokens)
    drafted = [(token, loop) for token in others for loop in range(kept)]
    step = {cell: n for n, cell in enumerate(drafted, start=1)}
    step |= {(token, loop): len(drafted) + loop - kept + 1
             for token in others for loop in range(kept, loops)}
    panels = {  # title: (green cells, {cell: its text}, the column that is known, the red cell)
        "a cache for each loop: red reads green":
            ([(token, 2) for token in range(tokens)], {}, None, (last, 2)),
        "one shared cache: red reads green":
            ([*((token, loops - 1) for token in range(last)), (last, 2)], {}, None, (last, 2)),
        "drafts: in which step each loop runs\n"
        f"({max(step.values())} steps, not {len(step)})": (drafted, step, 0, None),
    }
    for ax, (title, (green, texts, known, red)) in zip(axes, panels.items()):
        for cell in np.ndindex(tokens, loops):
            color = figures.shade(1, 2) if cell in green else "0.85" if cell[0] == known else "w"
            edge = {"ec": figures.RED, "lw": 2.5, "zorder": 2} if cell == red else {
                "ec": "k", "lw": 0.7}
            ax.add_patch(figures.pyplot().Rectangle(cell, 0.9, 0.9, fc=color, **edge))
            ax.text(cell[0] + 0.45, cell[1] + 0.45, texts.get(cell, ""), ha="center", va="center")
        ax.set(xlim=(-0.2, tokens + 0.1), ylim=(-0.2, loops + 0.1), title=title, xlabel="token",
               xticks=np.arange(tokens) + 0.45, yticks=np.arange(loops) + 0.45)
        ax.set_xticklabels(range(1, tokens + 1))
        ax.set_yticklabels(range(1, loops + 1))
        ax.title.set_fontsize(9)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    axes[0].set_ylabel("loop")
    figures.save(figure, path)


def isoflop(path):
    """Draw the parts of an isoFLOP curve, from an invented law that is not fitted to any run."""
    figure, [axes] = figures.panels(1, 7.5, 4)
    mu = np.geomspace(1, 32, 200)
    size, tokens = 0.25 + 0.75 * mu, 1 / (0.4 + 0.6 * mu)  # of the unrolled model; at equal FLOPs
    depth, data = 0.5 * size ** -0.5, 0.16 * tokens ** -0.4
    loss = 1 + depth + data
    axes.fill_between(mu, 0.9, 1, color="0.8")
    axes.fill_between(mu, 1, 1 + depth, color=figures.shade(1, 3), alpha=0.5)
    axes.fill_between(mu, 1 + depth, loss, color=figures.shade(2, 3), alpha=0.5)
    axes.plot(mu, loss, "k-")
    best = loss.argmin()
    axes.plot(mu[best], loss[best], "ko")
    axes.text(mu[best], loss[best] + 0.03, "mu*", ha="center", va="bottom")
    axes.text(1.1, 0.93, "what no number of loops or tokens removes")
    axes.text(1.1, 1.12, "lost to too few loops")
    axes.text(11, 1.3, "lost to too few tokens")
    figures.loops_axis(axes, "mean recurrence mu (equal training FLOPs: more loops, fewer tokens)")
    axes.set(xlim=(1, 32), ylim=(0.9, 1.8), ylabel="loss (an invented example)")
    figures.save(figure, path)

# ------------------------------------------------------------------------------- a trained model


def distances(model, idx, loops):
    """Return |h_t - h_last| / |h_last|, (tokens, loops), for all tokens of idx (B, S) and t = 1,
    2, ..., loops."""
    first = []
    for h, _ in model.states(idx, LAST * loops):
        if len(first) < loops:
            first.append(h)
    check_predicts(h, LAST * loops)
    apart = torch.stack([(h_t - h).norm(dim=-1) / h.norm(dim=-1) for h_t in first], dim=-1)
    return apart.flatten(0, 1).numpy()


def open_model(run):
    """Return the model of a run directory in float64. Raises UserError if it has no A_bar."""
    # in float32, rounding would keep distances above about 1e-7
    model = Parcae.from_pretrained(run).double()
    if not hasattr(model.injection, "A_bar"):
        rule = model.config.injection if model.config.n_recurrent else "none, it does not loop"
        raise UserError(f"{run} has no A_bar: injection is {rule}, must be diagonal")
    use_threads(model.config.n_embd)
    return model


def print_table(apart, factor):
    """Print the distances after each loop, and how many tokens are far away after the last one."""
    low, median, high, most = np.quantile(apart, [0.05, 0.5, 0.95, 1], axis=0)
    print(f"{'t':>3} {'median':>9} {'5%':>9} {'95%':>9} {'farthest':>9} {'A_bar^t':>9}")
    for i in range(len(median)):
        print(f"{i + 1:3} {median[i]:9.2e} {low[i]:9.2e} {high[i]:9.2e} {most[i]:9.2e} "
              f"{factor ** (i + 1):9.2e}")
    far = (apart[:, -1] > 0.01).sum()
    print(f"after {apart.shape[1]} loops {far} of {len(apart):,} tokens are more than 1% away")


def fixed_point(path, apart, factor, trained):
    """Draw how fast the states of a trained model approach their fixed points.

    apart: distances (tokens, loops). factor: the largest entry of A_bar; its powers are drawn, too.
    trained: the mean recurrence in training."""
    figure, [axes] = figures.panels(1, 8.5, 4.2)
    low, median, high, farthest = np.quantile(apart, [0.05, 0.5, 0.95, 1], axis=0)
    t = np.arange(1, len(median) + 1)
    axes.fill_between(t, low, high, color="0.85")
    labels = {"the farthest token": (farthest, "k:"),
              "the median token\n(grey: 90% of all)": (median, "k-")}
    for label, (line, style) in labels.items():
        axes.semilogy(t, line, style)
        axes.text(t[-1] + 0.4, line[-1], label, va="center")
    alone = factor ** np.arange(len(t) + 1)  # before the first loop h is 0, at a distance of 1
    axes.semilogy(alone, color=figures.RED)
    bottom, step = max(low.min() / 3, 1e-16), max(1, len(t) // 8)  # float64 rounds at 1e-16
    place = np.abs(np.log(alone / bottom) - 3).argmin()  # low, where there is room
    label = f"the slowest channel,\nA_bar = {factor:.2f}, without layers"
    axes.text(place + 0.6, alone[place], label, color=figures.RED, va="bottom")
    axes.axvline(trained, color="0.6", lw=1, zorder=0)
    axes.text(trained + 0.2, 1.5, f"mean of training: {trained} loops", color="0.4", va="center")
    axes.set(ylim=(bottom, 3), xlim=(0, 1.3 * t[-1]), xticks=range(0, t[-1] + 1, step),
             xlabel="loops t", ylabel="distance |h_t - h_last| / |h_last|",
             title="A trained model: most states approach a fixed point")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines.bottom.set_bounds(0, t[-1])
    figures.save(figure, path)


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=some_path, default="out/default", metavar="DIR",
        help="run directory of train.py, of a looped model (default: %(default)s)")
    add_text_flags(add, 16)
    add("--loops", type=COUNT, default=32, metavar="T",
        help="loops to show (default: %(default)s)")
    add("--out", type=new_directory, default="out", metavar="DIR",
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
    factor = A_bar.max().item()
    print(f"{args.run} on {len(apart):,} tokens of {text.name}; A_bar is {A_bar.mean():.3f} on "
          f"average, {A_bar.min():.3f} to {factor:.3f}")
    print_table(apart, factor)

    drawn = {"unrolled": unrolled, "loop": one_dimension, "exponential": exponential,
             "cache": cache_grid, "isoflop": isoflop}
    out = Path(args.out)
    for name, draw in drawn.items():
        draw(out / f"guide-{name}.png")
    fixed_point(out / "guide-fixed-point.png", apart, factor, model.config.mean_recurrence)


if __name__ == "__main__":
    run_script(main)
