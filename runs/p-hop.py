"""Table and figure of runs/p-hop.sh: python runs/p-hop.py out/p-hop results

Accuracy of the answers to questions of p hops, by p and by loops T, on the 1000 strings kept for validation."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).parent.parent))
from data import open_shard
from model import Parcae
from scaling import write_csv

LOOPS, HOPS = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 32], range(9)


@torch.no_grad()
def accuracies(model, docs):
    """{T: share of right answers for each number of hops}. docs: (N, 1 + 3 * questions), begin, then hops, symbol, answer, hops, ..."""
    loops = LOOPS if model.config.mean_recurrence > 1 and model.config.n_recurrent else [1]
    right, hops = {T: [] for T in loops}, docs[:, 1::3] - ord("0")
    for batch in docs.split(100):
        def read(x, t):
            if t in loops:
                right[t].append(model.lm_head(x[:, 2::3]).argmax(-1) == batch[:, 3::3])  # noqa: B023
        x = model.hidden(batch[:, :-1], loops[-1], until=read)
        if not model.config.n_recurrent:
            read(x, 1)
    right = {T: torch.cat(answers).float() for T, answers in right.items()}
    return {T: [answers[hops == p].mean().item() for p in HOPS] for T, answers in right.items()}


folder, results = map(Path, sys.argv[1:])
docs = torch.from_numpy(open_shard(Path("data/p-hop/val_000000.bin")).astype(np.int64).reshape(1000, -1))
rows = []
for path in sorted(folder.iterdir()):
    model, (name, seed) = Parcae.from_pretrained(path), path.name.rsplit("-", 1)
    rows += [{"model": name, "seed": seed, "T": T, "p": p, "accuracy": round(a, 4)}
             for T, shares in accuracies(model, docs).items() for p, a in zip(HOPS, shares)]
write_csv(results / "p-hop.csv", rows, rows[0])


def seeds(name, T, p):
    return [row["accuracy"] for row in rows if (row["model"], row["T"], row["p"]) == (name, T, p)]


print("accuracy, mean of the seeds (range)\n" + " " * 16 + "".join(f"p = {p}{'':13}" for p in HOPS))
for name, T in sorted({(row["model"], row["T"]) for row in rows}):
    print(f"{name:8} T = {T:<3}" + "".join(f"{np.mean(a):6.3f} ({min(a):.2f}-{max(a):.2f})" for a in (seeds(name, T, p) for p in HOPS)))

figure, axes = plt.subplots(figsize=(6.6, 4), constrained_layout=True)
for p in HOPS:
    color = plt.cm.viridis(p / 9)
    axes.plot(LOOPS, [np.mean(seeds("looped", T, p)) for T in LOOPS], "o-", ms=3, color=color, label=f"p = {p}")
    for x, name, marker in ((0.6, "once", "x"), (55, "layers", "s")):
        axes.plot([x] * len(seeds(name, 1, p)), seeds(name, 1, p), marker, ms=4, color=color)
axes.axhline(1 / 4, color="0.8", zorder=0)
axes.text(32, 0.23, "guessing", ha="right", va="top", color="0.5", fontsize=8)
axes.set_xscale("log", base=2)
axes.set_xticks([0.6, 1, 2, 4, 8, 16, 32, 55], ["trained to\nrun once", 1, 2, 4, 8, 16, 32, "eight\nlayers"])
axes.set(xlabel="loops T at test time of one layer, trained with 8 on average", ylabel="accuracy", ylim=(0, 1.02),
         title="p lookups in a row: a loop for each")
axes.legend(fontsize=8, ncols=2)
figure.savefig(results / "p-hop.png", dpi=150)
