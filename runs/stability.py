"""Table and figure of runs/stability.sh: python runs/stability.py out/stability results"""

import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).parent.parent))
from scaling import write_csv

RULES = {"add": "k--", "concat": "k:", "diagonal": "k-"}

folder, results = map(Path, sys.argv[1:])
runs = {}
for path in folder.iterdir():
    rule, _, rate = path.name.partition("-")
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    runs[float(rate), rule] = lines

rates = sorted({rate for rate, _ in runs})
rows = []
for (rate, rule), lines in sorted(runs.items()):
    done, evals = lines[-1], [line for line in lines if line["kind"] in ("eval", "done")]
    finished = done["kind"] == "done"
    last, final = evals[-1] if evals else {}, done if finished else {}
    value = lambda line, key, T: line.get(key, {}).get(T, math.nan)
    rows.append({"rule": rule, "rate": rate, "finished": finished, "steps": done["step"], "skipped": done["skipped"],
                 "val_loss_8": value(final, "val_loss", "8"), "val_loss_64": value(final, "val_loss", "64"),
                 "state_rms_8": value(last, "state_rms", "8"), "state_rms_64": value(final, "state_rms", "64"),
                 "spectral_radius": last.get("spectral_radius", math.nan)})
write_csv(results / "stability.csv", [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows], rows[0])
print(f"{'rate':>6} {'rule':9} {'loss T=8':>9} {'T=64':>9} {'|h| T=8':>9} {'T=64':>9} {'rho':>7}  steps (skipped)")
for r in rows:
    print(f"{r['rate']:6g} {r['rule']:9} {r['val_loss_8']:9.3f} {r['val_loss_64']:9.3f} {r['state_rms_8']:9.3g} {r['state_rms_64']:9.3g} "
          f"{r['spectral_radius']:7.3f}  {r['steps']} ({r['skipped']}){'' if r['finished'] else '  broke off'}")

figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
for rule, style in RULES.items():
    mine = [row for row in rows if row["rule"] == rule]
    axes[0].semilogx([row["rate"] for row in mine], [row["val_loss_8"] for row in mine], style, marker="o", label=rule)
for i, rate in enumerate(rates):
    color = plt.cm.viridis(0.9 * i / max(len(rates) - 1, 1))
    for rule, style in RULES.items():
        lines = runs.get((rate, rule), [])
        evals = [line for line in lines if "spectral_radius" in line]
        label = f"{rate:g}" if rule == "diagonal" else None
        if lines and lines[-1]["kind"] == "done":
            norms = lines[-1]["state_rms"]
            axes[1].loglog([int(T) for T in norms], norms.values(), style[1:], color=color, label=label)
        axes[2].semilogy([e["step"] for e in evals], [e["spectral_radius"] for e in evals], style[1:], color=color, label=label)
axes[0].set(xlabel="learning rate", ylabel="val loss at T = 8 (nats per byte)", title="Final loss (no point: it broke off)")
axes[1].set(xlabel="loops T", ylabel="root mean square of h_T", title="Size of the state")
axes[2].set(xlabel="step", ylabel="spectral radius", title="What multiplies the state")
axes[2].axhline(1, color="0.8", zorder=0)
axes[0].legend(fontsize=8)
axes[1].legend(fontsize=7, title="learning rate")
figure.savefig(results / "stability.png", dpi=150)
