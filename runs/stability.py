"""Which injection survives which learning rate? The table and the picture of runs/stability.sh.

    python -m runs.stability out/stability results    writes OUT/stability.csv and OUT/stability.png

Runs are named RULE-RATE. Those that broke off count: they are what the picture is about.
"""

import math
from pathlib import Path

from parts import figures
from parts.cli import Parser, UserError, run_script
from parts.comparable import say_differences
from parts.reading import read_json_lines
from parts.tables import write_csv


def read_logs(folder):
    """{(rate, rule): lines of the log} of a folder's runs, by rising rate. Raises UserError."""
    runs = {}
    for path in sorted(folder.iterdir()):
        rule, _, rate = path.name.partition("-")
        try:
            key = float(rate), rule
        except ValueError:
            raise UserError(f"{path} is not named RULE-RATE, as add-1e-2") from None
        # A run that broke off before its first checkpoint, where it was to replace another.
        file = path / ".new" / "log.jsonl"
        if not file.exists():
            file = path / "log.jsonl"
        lines, _ = read_json_lines(file)
        if lines:
            runs[key] = lines
    if not runs:
        raise UserError(f"{folder} holds no run")
    return dict(sorted(runs.items()))


def value(line, key, T):
    """What an evaluation says of T loops, NaN where it says nothing."""
    return line.get(key, {}).get(T, math.nan)


def summary(rate, rule, lines):
    """The table's row of a run. Losses are those of finished runs."""
    end = lines[-1]
    finished = end["kind"] == "done"
    final = end if finished else {}
    evaluations = [line for line in lines if line["kind"] in ("eval", "done")]
    last = evaluations[-1] if evaluations else {}
    return {
        "rule": rule, "rate": rate, "finished": finished,
        "steps": end["step"], "skipped": end["skipped"],
        "val_loss_8": value(final, "val_loss", "8"),
        "val_loss_64": value(final, "val_loss", "64"),
        "state_rms_8": value(last, "state_rms", "8"),
        "state_rms_64": value(final, "state_rms", "64"),
        "spectral_radius": last.get("spectral_radius", math.nan),
    }


def short(row):
    """A row as the table has it: four digits."""
    return {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()}


def print_table(rows):
    print(f"{'rate':>6} {'rule':9} {'loss T=8':>9} {'T=64':>9} {'|h| T=8':>9} {'T=64':>9} "
          f"{'rho':>7}  steps (skipped)")
    for r in rows:
        end = "" if r["finished"] else "  broke off"
        print(f"{r['rate']:6g} {r['rule']:9} {r['val_loss_8']:9.3f} {r['val_loss_64']:9.3f} "
              f"{r['state_rms_8']:9.3g} {r['state_rms_64']:9.3g} {r['spectral_radius']:7.3f}  "
              f"{r['steps']} ({r['skipped']}){end}")


def curves(row, lines):
    """What the picture shows of a run, see figures.stability."""
    evaluations = [line for line in lines if "spectral_radius" in line]
    sizes = lines[-1]["state_rms"] if row["finished"] else {}
    return {
        "rule": row["rule"], "rate": row["rate"], "loss": row["val_loss_8"],
        "loops": [int(T) for T in sizes],
        "size": list(sizes.values()),
        "step": [line["step"] for line in evaluations],
        "radius": [line["spectral_radius"] for line in evaluations],
    }


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="a directory of runs")
    add("out", type=Path, metavar="OUT", help="directory for the table and the picture")
    args = parser.parse_args()
    figures.pyplot()
    runs = read_logs(args.folder)
    say_differences(args.folder.iterdir())
    rows = [summary(*key, lines) for key, lines in runs.items()]
    write_csv(args.out / "stability.csv", list(map(short, rows)), rows[0])
    print_table(rows)
    shown = [curves(row, lines) for row, lines in zip(rows, runs.values())]
    figures.stability(args.out / "stability.png", shown)


if __name__ == "__main__":
    run_script(main)
