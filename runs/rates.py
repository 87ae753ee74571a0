"""Is one learning rate best for plain and looped models, and for all widths?

    python -m runs.rates results       reads half*.csv there and writes rates.png
"""

from pathlib import Path

import numpy as np

from parts import figures
from parts.cli import Parser, run_script
from runs.half import COLUMNS, NAMES, losses_of, read_table
from runs.worth import TABLES

MODELS = ("plain", "deep", "looped")


def by_rate(rows, model):
    """Return {rate: losses of a model}, by rising rate, for the seeds that all rates have."""
    mine = [row for row in rows if row["model"] == model]
    rates = sorted({row["rate"] for row in mine})
    loss = {rate: losses_of(row for row in mine if row["rate"] == rate) for rate in rates}
    seeds = set.intersection(*(set(some) for some in loss.values())) if loss else ()
    return {rate: [loss[rate][seed] for seed in sorted(seeds)] for rate in rates}


def picture(path, groups, looped):
    """Draw loss minus the lowest loss of the same model, against learning rate.

    groups: {title of a panel: {model: {rate: losses of the seeds}}}; looped: the model in red."""
    figure, every = figures.panels(len(groups), 3.2 * len(groups), 3.4)
    for axes, (title, models) in zip(every, groups.items()):
        for i, (name, losses) in enumerate(models.items()):
            means = np.array([np.mean(some) for some in losses.values()])
            color = figures.RED if name == looped else None
            axes.semilogx([*losses], means - means.min(initial=np.inf), f"{figures.marker(i)}-",
                          label=name, color=color)
        ticks = sorted(set().union(*models.values()))
        axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axes.minorticks_off()
        axes.set(xlabel="both learning rates", title=title)
    every[0].set_ylabel("val loss above the model's lowest (nats)")
    every[0].legend(fontsize=8)
    figures.save(figure, path)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("results", type=Path, metavar="DIR", help="directory of the tables")
    args = parser.parse_args()
    figures.pyplot()
    panels = {}
    for channels, name in TABLES.items():
        rows = read_table(args.results / name, COLUMNS)
        panels[f"{channels} channels"] = {NAMES[model]: by_rate(rows, model) for model in MODELS}
    for title, models in panels.items():
        print(f"{title}: val loss (seeds) by learning rate")
        for name, losses in models.items():
            print(f"  {name}: " + ", ".join(f"{rate:g}: {np.mean(some):.4f} ({len(some)})"
                                            for rate, some in losses.items()))
    picture(args.results / "rates.png", panels, NAMES["looped"])


if __name__ == "__main__":
    run_script(main)
