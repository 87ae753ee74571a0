"""Table of runs/ablation.sh: python runs/ablation.py RUN... ; runs are named VARIANT-SEED. Writes results/ablation.csv."""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from scaling import last_line, write_csv

rows, table = [], defaultdict(list)
for path in map(Path, sys.argv[1:]):
    name, seed = path.name.rsplit("-", 1)
    done = last_line(path / "log.jsonl")
    if done["kind"] != "done":
        print(f"{path} is not finished and left out")
        continue
    rows.append({"variant": name, "seed": int(seed), "flops": f"{done['flops']:.4g}", "seconds": round(done["seconds"]),
                 **{f"val_loss_{T}": round(loss, 5) for T, loss in done["val_loss"].items()}})
    table[name].append(rows[-1])
write_csv("results/ablation.csv", rows, rows[0])
loops = [key for key in rows[0] if key.startswith("val_loss")]
print("| variant | " + " | ".join(key.replace("val_loss_", "T = ") for key in loops) + " | each seed at T = 4 | FLOPs | time |")
print("|" + "---|" * (len(loops) + 4))
for name, mine in table.items():
    print(f"| {name} | " + " | ".join(f"{np.mean([row[key] for row in mine]):.4f}" for key in loops) +
          f" | {', '.join(str(row['val_loss_4']) for row in mine)} | {np.mean([float(row['flops']) for row in mine]):.3g} | "
          f"{np.mean([row['seconds'] for row in mine]):.0f} s |")
