"""Which parts of a looped model's recipe matter? Make the table of runs/ablation.sh.

    python -m runs.ablation out/ablation out    read the runs, write out/ablation.csv

Runs are named VARIANT-SEED.
"""

from pathlib import Path

import numpy as np

from parts.cli import Parser, UserError, run_script
from parts.tables import write_csv
from runs.half import finished, finished_rows


def read_row(path):
    """Return the row of a run, None if it is not finished. Raises UserError."""
    variant, _, seed = path.name.rpartition("-")
    if not variant or not seed.isdigit():
        raise UserError(f"{path} is not named VARIANT-SEED, like per-batch-0")
    done = finished(path)
    if not done:
        return None
    row = {"variant": variant, "seed": int(seed), "flops": f"{done['flops']:.4g}",
           "seconds": round(done["seconds"])}
    for T, loss in done["val_loss"].items():
        row[f"val_loss_{T}"] = round(loss, 5)
    return row


def print_table(rows):
    """Print the table of results/README.md, with means over the seeds."""
    loops = [name for name in rows[0] if name.startswith("val_loss")]
    names = [name.replace("val_loss_", "T = ") for name in loops]
    heads = ["variant", *names, "each seed at T = 4", "FLOPs", "time"]
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        losses = [f"{np.mean([row[name] for row in mine]):.4f}" for name in loops]
        seeds = ", ".join(str(row["val_loss_4"]) for row in mine)
        flops = np.mean([float(row["flops"]) for row in mine])
        seconds = np.mean([row["seconds"] for row in mine])
        cells = [variant, *losses, seeds, f"{flops:.3g}", f"{seconds:.0f} s"]
        print("| " + " | ".join(cells) + " |")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a directory of runs")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory for the table")
    args = parser.parse_args()
    rows = finished_rows(args.folder, read_row)
    if any(row.keys() != rows[0].keys() for row in rows):
        raise UserError("these runs were not all evaluated at the same numbers of loops")
    write_csv(args.out / "ablation.csv", rows, rows[0])
    print_table(rows)


if __name__ == "__main__":
    run_script(main)
