"""How much does each part of the published recipe lower the loss? Train with one part undone.

    python -m runs.recipe --undo decay --seed 1 --out out/recipe/decay-1
    python -m runs.recipe --table out/recipe out     read the finished runs, write out/recipe.csv

To undo a part, this script replaces a function or constant in the modules that train.py uses. All
other flags go to train.py. Runs are named PART-SEED.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import train
from model import Parcae
from parts import muon
from parts.cli import Parser, UserError, run_script
from parts.tables import write_csv
from runs.common import differences, error_text, finished, finished_rows, loss_at, split_name

LOOPS = (1, 2, 4, 8, 16)  # at test time


def set_start(ending, fill):
    """Change how the weights with `ending` in their names start: fill(p, std of the embedding)."""
    published = Parcae.reset_parameters

    def reset_parameters(self):
        published(self)
        for name, p in self.named_parameters():
            if ending in name:
                fill(p.data, self.init_std)
    Parcae.reset_parameters = reset_parameters


def small_tables():
    set_start("value_embeds.", lambda p, std: p.normal_(std=std))


def small_gates():
    set_start("ve_gate.weight",
              lambda p, std: torch.nn.init.orthogonal_(p, gain=std * max(p.shape) ** 0.5))


def gates_by_adamw():
    all_matrices = Parcae.matrices

    def matrices(self):
        gates = {id(p) for name, p in self.named_parameters() if name.endswith("ve_gate.weight")}
        return [p for p in all_matrices(self) if id(p) not in gates]
    Parcae.matrices = matrices


def constant_momentum():
    train.momentum_at = lambda step: 0.95


def newton_schulz():
    muon.POLAR_EXPRESS = ((3.4445, -4.7750, 2.0315),) * 5


def uneven():
    muon.even_out = lambda X, v, beta2: X


def decay_everywhere():
    muon.decays = lambda X, W: True


PARTS = {  # name: what undoes it, and what table and --help call it
    "published": ([], "nothing is undone"),
    "tables": ([small_tables],
               "value embeddings start with the embedding's standard deviation, not with 1"),
    "gates": ([small_gates],
              "gates of the value embeddings start with the embedding's standard deviation"),
    "adamw": ([gates_by_adamw], "gates of the value embeddings are trained by AdamW"),
    "momentum": ([constant_momentum], "Muon's momentum is 0.95 from the first step"),
    "newton-schulz": ([newton_schulz], "Newton-Schulz with one set of coefficients"),
    "uneven": ([uneven], "rows and columns of Muon's update are not evened out"),
    "decay": ([decay_everywhere], "all weights decay, also where the update makes them larger"),
}
PARTS["all"] = ([undo for undos, _ in PARTS.values() for undo in undos],
                "all seven parts are undone")


def row_of(path):
    """Return the row of a run named PART-SEED, None if it is not finished. Raises UserError."""
    part, seed = split_name(path, "PART-SEED", PARTS)
    done = finished(path)
    if not done:
        return None
    return {"undone": part, "seed": seed, "tokens": done["tokens"],
            "flops": f"{done['flops']:.4g}"} | {
        f"val_loss_{T}": loss_at(path, done, T) for T in LOOPS}


def print_table(rows):
    """Print how much higher the loss is with a part undone, at T = 4, over the seeds that both runs
    have. Raises UserError without a run to compare with."""
    losses = {}
    for row in rows:
        losses.setdefault(row["undone"], {})[row["seed"]] = row["val_loss_4"]
    if "published" not in losses:
        raise UserError("no finished run is named published-SEED: there is nothing to compare with")
    published = losses["published"]
    print("| undone | val loss at T = 4 | higher by | standard error | by seed |")
    print("|---|---|---|---|---|")
    for part in losses:
        each = differences(losses[part], published)
        higher = f"{each.mean():+.4f}" if len(each) else ""
        print(f"| {PARTS[part][1]} | {np.mean([*losses[part].values()]):.4f} | {higher} | "
              f"{error_text(each)} | {', '.join(f'{one:+.4f}' for one in each)} |")


def main():
    parser = Parser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--undo", choices=PARTS, metavar="PART",
                      help="; ".join(f"{part}: {about}" for part, (_, about) in PARTS.items()))
    what.add_argument("--table", type=Path, nargs=2, metavar=("DIR", "OUT"),
                      help="make the table from finished runs; directory for recipe.csv")
    args, rest = parser.parse_known_args()
    if args.undo:
        for undo in PARTS[args.undo][0]:
            undo()
        train.SCRIPT = f"-m runs.recipe --undo {args.undo}"
        sys.argv[1:] = rest
        train.main()
        return
    folder, out = args.table
    rows = finished_rows(folder, row_of)
    rows.sort(key=lambda row: ([*PARTS].index(row["undone"]), row["seed"]))
    write_csv(out / "recipe.csv", rows, rows[0])
    print_table(rows)


if __name__ == "__main__":
    run_script(main)
