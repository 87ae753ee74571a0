"""What does looping gain at equal tokens or FLOPs, and how certainly? Make runs/first.sh's table.

    python -m runs.first out/first out    read the runs in out/first, write out/first.csv

A gain is the loss of layers run once, minus the loss of the same layers looped (with the same seed,
at their mean recurrence). Seed 0 chose shape and rates: with three others, it does not count.
Models without a loop, and variants of the looped default (fixed depth, another gradient), are
compared with the looped default in the same way.
"""

import math
from operator import itemgetter
from pathlib import Path

import numpy as np

from parts.cli import Parser, run_script
from parts.reading import read_json
from parts.tables import write_csv
from runs.common import counted, error_text, finished, finished_rows, gain_text

DEFAULT = {"channels": 64, "layers": "0/1/0", "variant": "", "mean_recurrence": 4, "rate": 0.02}


def row_of(path):
    """Return the row of a run, None if it is not finished."""
    done = finished(path)
    if not done:
        return None
    config = read_json(path / "config.json")
    model, settings = config["model"], config["settings"]
    layers = "/".join(str(model[name]) for name in ("n_prelude", "n_recurrent", "n_coda"))
    variant = "fixed depth" if settings["depth_sampling"] == "fixed" else ""
    if model["backprop_depth"] != math.ceil(model["mean_recurrence"] / 2):
        variant = f"gradient through {model['backprop_depth']}"
    row = {"channels": model["n_embd"], "layers": layers, "variant": variant,
           "mean_recurrence": model["mean_recurrence"] if model["n_recurrent"] else 1,
           "rate": settings["muon_lr"],
           "seed": settings["seed"], "tokens": done["tokens"],
           "flops": f"{done['flops']:.4g}", "seconds": round(done["seconds"])}
    return row | {f"val_loss_{T}": round(loss, 5) for T, loss in done["val_loss"].items()}


def gains(rows):
    """Yield ((channels, layers, rate), mean recurrence, what is equal, {seed: gain}) for each
    looped model."""
    rows = [row for row in rows if not row["variant"]]
    model = itemgetter("channels", "layers", "rate")
    for key, loops in sorted({(model(row), row["mean_recurrence"])
                              for row in rows if row["mean_recurrence"] > 1}):
        alike = [row for row in rows if model(row) == key]
        looped = {row["seed"]: row for row in alike if row["mean_recurrence"] == loops}
        once = [row for row in alike if row["mean_recurrence"] == 1 and row["seed"] in looped]
        for equal in ("tokens", "flops"):
            by_seed = {}
            for row in once:
                ours = looped[row["seed"]]
                if math.isclose(float(row[equal]), float(ours[equal]), rel_tol=0.01):
                    by_seed[row["seed"]] = row["val_loss_1"] - ours[f"val_loss_{loops}"]
            if by_seed:
                yield key, loops, equal, by_seed


def of_default(rows, variant=""):
    """Return {seed: row} of the looped default, or of a variant of it."""
    wanted = DEFAULT | {"variant": variant}
    return {row["seed"]: row for row in rows if wanted.items() <= row.items()}


def variants(rows):
    """Yield (variant of the default, T, its mean loss, {seed: minus the loss of the default})."""
    default = of_default(rows)
    for variant in sorted({row["variant"] for row in rows} - {""}):
        mine = {seed: row for seed, row in of_default(rows, variant).items() if seed in default}
        losses = [name for name in next(iter(mine.values()), ()) if name.startswith("val_loss_")]
        for loss in losses:
            minus = {seed: row[loss] - default[seed][loss] for seed, row in mine.items()}
            mean = np.mean([row[loss] for row in mine.values()])
            yield variant, loss.removeprefix("val_loss_"), mean, minus


def rivals(rows):
    """Yield (channels, layers, tokens, {seed: loss minus that of the looped default}) for models
    without a loop at the default's rate."""
    size = itemgetter("channels", "layers", "tokens")
    default = {seed: row["val_loss_4"] for seed, row in of_default(rows).items()}
    plain = [row for row in rows
             if row["layers"].endswith("/0/0") and row["rate"] == DEFAULT["rate"]]
    for channels, layers, tokens in sorted(set(map(size, plain))):
        yield channels, layers, tokens, {
            row["seed"]: row["val_loss_1"] - default[row["seed"]] for row in plain
            if size(row) == (channels, layers, tokens) and row["seed"] in default}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a directory of runs")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory for the table")
    args = parser.parse_args()
    rows = finished_rows(args.folder, row_of)
    order = ("channels", "layers", "variant", "mean_recurrence", "rate", "seed", "tokens")
    rows.sort(key=lambda row: [row[name] for name in order])
    write_csv(args.out / "first.csv", rows, max(rows, key=len))  # a plain model has fewer columns
    print("| channels | layers | mean recurrence | rates | equal | gain, mean | standard error "
          "| by seed |")
    print("|" + "---|" * 8)
    for (channels, layers, rate), loops, equal, by_seed in gains(rows):
        each = ", ".join(f"{gain:.3f}" for gain in by_seed.values())
        cells = [channels, layers, loops, f"{rate:g}", equal, f"{np.mean(counted(by_seed)):.4f}",
                 error_text(counted(by_seed)), each]
        print("| " + " | ".join(map(str, cells)) + " |")
    for variant, T, mean, minus in variants(rows):
        print(f"{variant}, T = {T}: {mean:.3f}, minus the default "
              f"{gain_text(np.array(counted(minus)))}")
    for channels, layers, tokens, minus in rivals(rows):
        print(f"{layers} layers of {channels} channels, {tokens:,} tokens: minus the default "
              f"{gain_text(np.array(counted(minus)))}")


if __name__ == "__main__":
    run_script(main)
