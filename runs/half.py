"""Table and figure of runs/half.sh: python runs/half.py out/half results

Of several learning rates, each model gets the one at which its seed 0 does best."""

import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).parent.parent))
from bench import kv_bytes
from model import Parcae, ParcaeConfig
from scaling import last_line, write_csv

NAMES = {"looped": "looped, T = 4", "plain": "transformer", "longer": "transformer, as many FLOPs",
         "deep": "transformer, twice the layers", "wide": "transformer, 1.5 times the width"}

folder, results = map(Path, sys.argv[1:])
rows = []
for path in sorted(folder.iterdir()):
    name, _, rest = path.name.partition("-")
    rate, _, seed = rest.rpartition("-")
    config = json.loads((path / "config.json").read_text())
    done = last_line(path / "log.jsonl")
    if done["kind"] != "done":
        print(f"{path} is not finished and left out")
        continue
    model = Parcae(ParcaeConfig(**config["model"]))
    T = model.config.mean_recurrence if model.config.n_recurrent else 1
    loss = done["val_loss"][str(T)]
    rows.append({"model": name, "rate": float(rate), "seed": int(seed), "parameters": config["parameters"], "tokens": done["tokens"],
                 "training_flops": f"{done['flops']:.4g}", "inference_flops_per_token": model.flops_per_token(T, 0),
                 "cache_bytes_per_token": kv_bytes(model.config, 1, T), "val_loss": round(loss, 5),
                 "bits_per_byte": round(loss / math.log(2), 5)})
write_csv(results / "half.csv", rows, rows[0])

runs = {}
for name in NAMES:
    mine = [row for row in rows if row["model"] == name]
    best = min((row for row in mine if row["seed"] == 0), key=lambda row: row["val_loss"])["rate"]
    print(f"{NAMES[name]}: seed 0 by rate", ", ".join(f"{row['rate']:g}: {row['val_loss']:.4f}" for row in mine if row["seed"] == 0))
    runs[name] = sorted((row for row in mine if row["rate"] == best), key=lambda row: row["seed"])
loss = {name: np.array([row["val_loss"] for row in mine]) for name, mine in runs.items()}
print("| model | parameters | training FLOPs | inference FLOPs a token | cache of a token | val loss | bits per byte |\n|" + "---|" * 7)
for name, mine in runs.items():
    row, values = mine[0], loss[name]
    print(f"| {NAMES[name]} | {row['parameters']:,} | {row['training_flops']} | {row['inference_flops_per_token']:,.0f} | "
          f"{row['cache_bytes_per_token']:,} B | {values.mean():.4f} ({', '.join(f'{v:.4f}' for v in values)}) | "
          f"{values.mean() / math.log(2):.3f} |")
for name in ("deep", "wide"):
    share = (loss["plain"] - loss["looped"]) / (loss["plain"] - loss[name])
    print(f"share of the gap to the {NAMES[name]} that looping closes: {share.mean():.0%} ({', '.join(f'{s:.0%}' for s in share)})")
print(f"looped less transformer on as many FLOPs: {loss['looped'].mean() - loss['longer'].mean():+.4f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, constrained_layout=True)
for ax, key, unit, low, high in ((axes[0], "parameters", 1e3, 70, 170), (axes[1], "training_flops", 1e12, 6, 14)):
    for name, mine in runs.items():
        x = float(mine[0][key]) / unit
        right = x > (low + high) / 2  # labels towards the middle
        ax.plot([x] * len(mine), loss[name], "o" if name == "looped" else "s", color="C3" if name == "looped" else "0.4", ms=5, alpha=0.7)
        ax.annotate(NAMES[name], (x, loss[name].mean()), xytext=(-8 if right else 8, 0), textcoords="offset points", va="center",
                    ha="right" if right else "left", fontsize=8)
    ax.set_xlim(low, high)
axes[0].set(xlabel="parameters (thousands)", ylabel="val loss (nats per byte)", title="What it is worth: parameters")
axes[1].set(xlabel="training FLOPs (1e12)", title="What it costs: FLOPs")
figure.savefig(results / "half.png", dpi=150)
