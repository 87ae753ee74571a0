"""Which injection trains stably at which learning rate? Make runs/stability.sh's table and picture.

    python -m runs.stability out/stability results    writes stability.csv and .png in results

Runs are named RULE-RATE. Runs that broke off count: they show where a rule is unstable.
"""

import math
from pathlib import Path

from model import INJECTIONS
from parts import figures
from parts.cli import Parser, UserError, run_script
from parts.comparable import say_differences
from parts.reading import read_json_lines
from parts.tables import write_csv
from runs.common import split_name


def read_logs(folder):
    """Return {(rate, rule): log lines} of a folder's runs, by rising rate. Raises UserError."""
    runs = {}
    for path in sorted(folder.iterdir()):
        rule, rate = split_name(path, "RULE-RATE", INJECTIONS)
        # .new has the log of a run with --overwrite that broke off before its first checkpoint
        file = path / ".new" / "log.jsonl"
        if not file.exists() or not file.stat().st_size:
            file = path / "log.jsonl"
        lines, _ = read_json_lines(file)
        if lines:
            runs[rate, rule] = lines
    if not runs:
        raise UserError(f"{folder} holds no run")
    return dict(sorted(runs.items()))


def value(line, key, T):
    """Return an evaluation's number for T loops, NaN if it has none."""
    return line.get(key, {}).get(T, math.nan)


def summary(rate, rule, lines):
    """Return the table's row of a run. Only finished runs have losses."""
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


def print_table(rows):
    print(f"{'rate':>6} {'rule':9} {'loss T=8':>9} {'T=64':>9} {'|h| T=8':>9} {'T=64':>9} "
          f"{'rho':>7}  steps (skipped)")
    for r in rows:
        end = "" if r["finished"] else "  broke off"
        print(f"{r['rate']:6g} {r['rule']:9} {r['val_loss_8']:9.3f} {r['val_loss_64']:9.3f} "
              f"{r['state_rms_8']:9.3g} {r['state_rms_64']:9.3g} {r['spectral_radius']:7.3f}  "
              f"{r['steps']} ({r['skipped']}){end}")


def picture(path, rows, logs):
    """Draw which injection rule trains stably at which learning rate. rows: the table's, by rising
    rate; logs: the lines of each run."""
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    figure = figures.pyplot().figure(figsize=(4 + 2.5 * len(rules), 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[4, 2.5 * len(rules)])
    loss = left.subplots()
    grid = right.subplots(2, len(rules), sharex="row", sharey="row", squeeze=False)
    for i, (rule, (sizes, radii)) in enumerate(zip(rules, grid.T)):
        mine = [(row, lines) for row, lines in zip(rows, logs) if row["rule"] == rule]
        points = zip(*[(row["rate"], row["val_loss_8"]) for row, _ in mine])
        loss.semilogx(*points, f"{figures.marker(i)}-", label=rule)
        for row, lines in mine:
            color = figures.shade(rates.index(row["rate"]), len(rates))
            size = lines[-1]["state_rms"] if row["finished"] else {}
            sizes.semilogy([*map(int, size)], [*size.values()], color=color)
            evaluated = [line for line in lines if "spectral_radius" in line]
            radii.semilogy([line["step"] for line in evaluated],
                           [line["spectral_radius"] for line in evaluated], color=color,
                           label=f"{row['rate']:g}")
        figures.loops_axis(sizes, "loops T")
        sizes.set_title(rule)
        radii.axhline(1, color="0.8", zorder=0)
        radii.set_xlabel("training step")
    grid[0, 0].set_ylabel("state, root mean square")
    grid[1, 0].set_ylabel("spectral radius")
    grid[1, 0].legend(title="learning rate", fontsize=7, loc="upper right")
    loss.set(xlabel="learning rate", ylabel="val loss at T = 8 (nats per byte)",
             title="Final loss (no point: it broke off)")
    loss.legend(title="injection")
    figures.save(figure, path)


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
    write_csv(args.out / "stability.csv", rows, rows[0])
    print_table(rows)
    picture(args.out / "stability.png", rows, runs.values())


if __name__ == "__main__":
    run_script(main)
