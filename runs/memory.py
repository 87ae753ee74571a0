"""After how many tokens does a looped model's KV cache use up the memory that looping saves?

    python -m runs.memory results    prints a table and writes results/memory-parcae-140m.png

Computes memory in inference from the shapes, for bfloat16 weights and caches.
"""

from pathlib import Path

import numpy as np

from bench import TWICE, cases_of, kv_bytes, parameters
from model import PRESETS, ParcaeConfig
from parts import figures
from parts.cli import Parser, run_script

DRAWN = "parcae-140m"


def break_even(config, double):
    """Return how many tokens (batch x context) the KV caches hold when the looped model takes as
    much inference memory as `double`, with twice the parameters."""
    saved = 2 * (parameters(double) - parameters(config))
    cost = kv_bytes(config, 1, config.mean_recurrence) - kv_bytes(double, 1, 1)
    return saved / cost


def picture(path, config, double):
    """Draw the memory of weights and KV cache against the number of tokens in the cache."""
    even, loops = break_even(config, double), config.mean_recurrence
    tokens = np.geomspace(even / 100, 100 * even, 81)
    figure, [axes] = figures.panels(1, 6, 4)
    for label, c, cached, style in (
            (f"looped, T = {loops}", config, loops, "k-"),
            (f"looped, T = {loops}, shared cache", config, 1, "k:"),
            (f"plain, twice the parameters ({double.n_layer} layers)", double, 1, "k--")):
        gigabytes = (2 * parameters(c) + tokens * kv_bytes(c, 1, cached)) / 1e9
        axes.loglog(tokens, gigabytes, style, label=label)
    axes.axvline(even, color=figures.RED, lw=1, label=f"break-even: {even:,.0f} tokens")
    axes.set(xlabel="tokens in the cache (batch x context)",
             ylabel="weights and KV cache, bfloat16 (GB)",
             title="When has the looped model's cache eaten the weights it saved?")
    axes.legend(framealpha=1, edgecolor="none")
    figures.save(figure, path)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory for the picture")
    args = parser.parse_args()
    figures.pyplot()
    heads = ["bfloat16", "weights: looped / plain of twice the parameters",
             "cache of one token: looped / shared / plain", "break-even"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in ("parcae-140m", "parcae-370m", "parcae-770m", "parcae-1.3b"):
        config = ParcaeConfig(**PRESETS[name])
        double = next(case.config for case in cases_of(config, [1]) if case.name == TWICE)
        weights = [f"{2 * parameters(c) / 1e6:,.0f}" for c in (config, double)]
        cache = [f"{kv_bytes(c, 1, loops) / 1e3:.0f}" for c, loops in
                 ((config, config.mean_recurrence), (config, 1), (double, 1))]
        print(f"| {name} | {' / '.join(weights)} MB | {' / '.join(cache)} kB | "
              f"{break_even(config, double):,.0f} tokens |")
        if name == DRAWN:
            picture(args.out / f"memory-{name}.png", config, double)


if __name__ == "__main__":
    run_script(main)
