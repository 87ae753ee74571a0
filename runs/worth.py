"""How large a transformer is as good as a looped model? Ask our models and the published ones.

    python -m runs.worth results       reads half*.csv there and writes worth.png

Compare a looped model with a transformer of the same layers and with a larger one, of k times the
parameters. If looping closes a share s of the gap in loss, it is worth k^s times its parameters,
provided that loss falls linearly with their logarithm. How Much Is One Recurrence Worth? (arXiv
2604.21106) has 1 - f + f T^phi for this: f is the share of the parameters that loop, T the loops,
phi what a loop is worth (0: nothing, 1: new layers). Only parameters that multiply a token count.
The published models are those of Parcae (arXiv 2604.12946), with their published perplexities.
"""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from model import PRESETS, Parcae, ParcaeConfig
from parts import figures
from parts.cli import Parser, UserError, run_script
from runs.common import each_at_one_rate, losses_of, read_table
from runs.half import COLUMNS, NAMES, fieller, gain_and_gap

T = 8  # loops of all models here
# channels of our models: their table, from runs.half
TABLES = {32: "half-32.csv", 64: "half.csv", 128: "half-128.csv", 256: "half-256.csv"}
# size: (perplexity of the transformer, of the looped model); the larger model is the next size
PUBLISHED = {"140m": (21.48, 19.06), "370m": (15.79, 14.49), "770m": (13.08, 12.49),
             "1.3b": (11.95, 11.42)}


def products(config):
    """Return (once, core): the parameters that multiply a token once, and in every loop."""
    with torch.device("meta"):
        return Parcae(config).matmul_params()


def phi_of(worth, f):
    """Return what a loop is worth; NaN if the model is worse than with nothing for its loop."""
    return math.log((worth - 1 + f) / f) / math.log(T) if worth > 1 - f else math.nan


def point(label, looped, plain, larger, share, seeds=(), bounds=()):
    """Return what table and picture show for a looped model, a dict. looped, plain and larger are
    ParcaeConfigs; share is what looping closes of the gap between the two transformers. Only for
    our models: seeds are the shares of the seeds, bounds the share's 95% interval."""
    once, core = products(looped)
    f = core / (once + core)
    times = sum(products(larger)) / sum(products(plain))
    worth = times ** share
    return {"label": label, "ours": len(seeds) > 0, "f": f, "times": times, "share": share,
            "worth": worth, "phi": phi_of(worth, f), "seeds": seeds,
            "within": [phi_of(times ** bound, f) for bound in bounds]}


def published():
    """Return the points of the published models, except the largest, which has no larger one."""
    points = []
    for size, larger in pairwise(PUBLISHED):
        loss, looped = map(math.log, PUBLISHED[size])
        share = (loss - looped) / (loss - math.log(PUBLISHED[larger][0]))
        configs = [ParcaeConfig(**PRESETS[name])
                   for name in (f"parcae-{size}", f"gpt-{size}", f"gpt-{larger}")]
        points.append(point(f"paper, {size.upper()}", *configs, share))
    return points


def ours(channels, path):
    """Return the point of a table: the looped 1/4/1 layers against six and twelve layers. Raises
    UserError."""
    runs = each_at_one_rate(NAMES, read_table(path, COLUMNS))
    loss = {name: losses_of(rows) for name, rows in runs.items()}
    gain, gap = gain_and_gap(loss, "deep")
    if not len(gain):
        raise UserError(f"in {path}, looped, plain and deep models have no seed in common")
    config = ParcaeConfig(**PRESETS["parcae-nano"] | {
        "n_recurrent": 4, "n_embd": channels, "value_embeds": False, "vocab_size": 320})
    plain, larger = (replace(config, n_prelude=n, n_recurrent=0, n_coda=0) for n in (6, 12))
    share, bounds = gain.mean() / gap.mean(), fieller(gain, gap) or ()
    return point(f"{channels} channels", config, plain, larger, share, gain / gap, bounds)


def picture(path, points, f, laws):
    """Draw how many times its parameters a looped model is worth.

    points: dicts with "label", "f" (the share of the parameters that loop), "worth" and "ours".
    laws: {phi: worth at each of f}."""
    figure, [axes] = figures.panels(1, 6.5, 4.2)
    for i, (phi, line) in enumerate(laws.items()):
        axes.plot(f, line, color=figures.shade(i, len(laws)), lw=1, label=f"phi = {phi:g}")
    for p in points:
        color, shape = (figures.RED, "o") if p["ours"] else ("k", "s")
        axes.plot(p["f"], p["worth"], shape, color=color)
        # a label goes to the left of its point if another point is close on the right
        crowded = any(0 < q["f"] - p["f"] < 0.2 and abs(q["worth"] - p["worth"]) < 0.1
                      for q in points)
        side, shift = ("right", -6) if crowded else ("left", 6)
        axes.annotate(p["label"], (p["f"], p["worth"]), xytext=(shift, 0), ha=side, va="center",
                      fontsize=8, textcoords="offset points", color=color)
    high = max(p["worth"] for p in points)
    axes.set(xlim=(0, 1), ylim=(0.95, 1.25 * high), xlabel="share of the parameters that loop, f",
             ylabel="worth, times its parameters", title="What eight loops are worth")
    axes.legend(fontsize=8, loc="upper left")
    figures.save(figure, path)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("results", type=Path, metavar="DIR", help="directory of the tables")
    args = parser.parse_args()
    figures.pyplot()
    points = [ours(channels, args.results / name) for channels, name in TABLES.items()]
    points += published()
    print("\n| | looped share of the parameters, f | larger model | of the gap closed | worth, "
          "times its parameters | phi (95%) |\n|" + "---|" * 6)
    for p in points:
        seeds = ", ".join(f"{share:.0%}" for share in p["seeds"])
        within = " ({:.2f} to {:.2f})".format(*p["within"]) if p["within"] else ""
        print(f"| {p['label']} | {p['f']:.2f} | {p['times']:.2f} times | {p['share']:.0%}"
              f"{f' ({seeds})' if seeds else ''} | {p['worth']:.2f} | {p['phi']:.2f}{within} |")
    f = np.linspace(0, 1, 101)
    laws = {phi: 1 - f + f * T ** phi for phi in (0, 0.2, 0.3, 0.46, 0.6)}
    picture(args.results / "worth.png", points, f, laws)


if __name__ == "__main__":
    run_script(main)
