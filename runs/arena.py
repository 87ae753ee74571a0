"""Which published rule makes the best loop? Train each on the same text, with several seeds.

    python -m runs.arena --rule zero-order-hold --seed 1 --out out/arena/zero-order-hold-2e-2-1
    python -m runs.arena --table out/arena results    write arena.csv and arena.png in results
    python -m runs.arena --table results/arena.csv results    print and draw again, from the table

RULES has the rules. Each is a model that changes Parcae from outside and that train.py trains; all
other flags go to train.py. Runs are named RULE-RATE-SEED; other scripts refuse most of them.
The table has a rule at the rate that most of its runs have. runs/arena.sh makes the published one.
"""

import sys
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from model import INJECTIONS, Diagonal, Parcae, count_parameters
from parts import figures
from parts.cli import Parser, run_script
from parts.layers import Block, HeadLoss
from runs.common import (
    collect,
    differences,
    each_at_one_rate,
    error_text,
    finished,
    loss_at,
    losses_of,
    split_name,
)

LOOPS, AT_OWN = (1, 2, 4, 8, 16), "val_loss_4"  # at test time; loss at the mean of training
COLUMNS = {"rule": str, "rate": float, "seed": int, "flops": float, "spectral_radius": float}
COLUMNS |= {f"val_loss_{T}": float for T in LOOPS}

# ------------------------------------------------------------------------------- injection


def injecting(rule):
    """Return a Parcae class whose injection is `rule`, a class like those in model.INJECTIONS."""
    class Model(Parcae):
        def __init__(self, config):
            super().__init__(config)
            self.injection = rule(config.n_embd)
    Model.__name__ = rule.__name__
    return Model


class ZeroOrderHold(Diagonal):
    """Multiply B e by (1 - A_bar) / -A, the integral over a step, instead of by dt."""

    def input(self, e):
        gain = (1 - self.A_bar()) / self.log_A.float().exp()
        return F.linear(e, self.B.to(e.dtype)) * gain.to(e.dtype)


class Euler(Diagonal):
    """Use A_bar = 1 + dt A, not exp(dt A), with the same initial value; it may fall below -1."""

    def __init__(self, d):
        super().__init__(d)
        start = (1 - super().A_bar()) / self.dt()
        self.log_A.data = start.log().detach()

    def A_bar(self):
        return 1 - self.dt() * self.log_A.float().exp()


class FirstLoopOnly(Parcae):
    """Add e only in the first loop."""

    def recurrent_pass(self, h, u, inputs, cache=None, t=0):
        first = (t == 0)[..., None] if torch.is_tensor(t) else t == 0                   # (B, 1, 1)
        return super().recurrent_pass(h, u * first, inputs, cache, t)

# ------------------------------------------------------------------------------- what loops


class LoopVector(Parcae):
    """Add a learned vector to the state in each loop, a different one in each of the first 64."""

    MOST = 64  # later loops share the last vector

    def __init__(self, config):
        super().__init__(config)
        self.vectors = nn.Parameter(torch.zeros(self.MOST, config.n_embd))

    def recurrent_pass(self, h, u, inputs, cache=None, t=0):
        loop = t.clamp(max=self.MOST - 1) if torch.is_tensor(t) else min(t, self.MOST - 1)
        return super().recurrent_pass(h, u + self.vectors[loop].to(u.dtype), inputs, cache, t)


class ResidualOverN(Parcae):
    """Divide what a layer in the loop adds by N, the mean number of loops (2606.18524)."""

    def run(self, layers, first, x, inputs, cache, t=0):
        if layers is not self.recurrent:
            return super().run(layers, first, x, inputs, cache, t)
        for i, block in enumerate(layers, first):
            added = super().run([block], i, x, inputs, cache, t) - x
            x = x + added / self.config.mean_recurrence
        return x


class PostNorm(Block):
    """A layer that computes Norm(alpha x + what a sublayer adds) twice, as in DeepNorm."""

    def forward(self, x, rope, ve=None, kv=None):
        x = self.norm_1(self.alpha * x + self.attn(x, rope, ve, kv))
        return self.norm_2(self.alpha * x + 0.5 * self.mlp(x))


class DeepNorm(Parcae):
    """Use PostNorm in the loop, alpha = (2 N)^1/2 for N unrolled layers (2607.13491). DeepNorm's
    factor beta of the initial weights is left out."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.recurrent:
            block.__class__ = PostNorm
            block.alpha = (2 * config.n_recurrent * config.mean_recurrence) ** 0.5


class HyperConnections(Parcae):
    """Keep two streams as state, (B, S, 2, D). Each layer reads a learned mixture of them and adds
    its output to both, with learned weights; a learned matrix mixes the streams (2604.21106).
    """

    def __init__(self, config):
        super().__init__(config)
        n = config.n_recurrent
        self.reads = nn.Parameter(torch.eye(2).repeat(n // 2 + 1, 1)[:n])  # streams take turns
        self.writes = nn.Parameter(torch.ones(n, 2))
        self.mixes = nn.Parameter(torch.eye(2).repeat(n, 1, 1))

    def matmul_params(self, accounting="exact"):
        once, core = super().matmul_params(accounting)
        return once, core + 4 * self.config.n_embd * self.config.n_recurrent  # the mixing

    def begin(self, idx, cache=None):
        inputs, u, h = super().begin(idx, cache)
        return inputs, u, torch.stack([h, h], dim=2)

    def recurrent_pass(self, h, u, inputs, cache=None, t=0):
        h = self.injection(h, u[:, :, None])
        weights = zip(self.recurrent, *(w.to(h.dtype) for w in (self.reads, self.writes,
                                                                self.mixes)))
        for i, (block, read, write, mix) in enumerate(weights, self.config.n_prelude):
            x = (read[:, None] * h).sum(2)
            added = self.run([block], i, x, inputs, cache, t) - x
            h = mix @ h + write[:, None] * added[:, :, None]
        return h

    def readout(self, h, inputs, cache=None):
        return super().readout(h.mean(2), inputs, cache)

# ------------------------------------------------------------------------------- training


class EveryLoop(Parcae):
    """Train on the mean loss of all loops that have a gradient, not on the loss of the last loop
    (Ouro, 2510.25741, without its learned weights)."""

    def forward(self, idx, targets=None, *, recurrence=None, depths=None):
        if not self.training:
            return super().forward(idx, targets, recurrence=recurrence, depths=depths)
        depths = torch.tensor(self.depths_of(len(idx), recurrence, depths), device=idx.device)
        depths, order = depths.sort(descending=True, stable=True)
        targets = targets[order]
        inputs, u, h = self.begin(idx[order])
        rounds = depths.clamp(max=self.config.backprop_depth)
        done = depths - rounds
        with torch.no_grad():
            h = self.loop(h, u.detach(), inputs, torch.zeros_like(done), done.tolist())
        total = 0
        for n in range(int(rounds[0])):
            live = int((rounds > n).sum())
            h = self.loop(h, u, inputs, done + n, [1] * live + [0] * (len(h) - live))
            some = inputs.each(lambda ve, live=live: ve[:live])
            x = self.readout(h[:live], some)
            loss = HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets[:live].flatten(),
                                  self.loss_and_gradient)
            total = total + loss * live
        return None, total / rounds.sum()

    def flops_per_token(self, recurrence=None, backprop_depth=None, context=None,
                        accounting="exact"):
        flops = super().flops_per_token(recurrence, backprop_depth, context, accounting)
        if backprop_depth == 0:
            return flops
        cfg, readout = self.config, nn.ModuleList([self.coda, self.C_proj])
        products = count_parameters(readout, dimensions=2) + self.lm_head.weight.numel()
        once = 2 * products + cfg.n_coda * 4 * cfg.n_embd * (context or cfg.block_size)
        with_gradient = cfg.backprop_depth if backprop_depth is None else backprop_depth
        with_gradient = min(with_gradient, recurrence or cfg.mean_recurrence)
        return flops + 3 * (with_gradient - 1) * once  # coda and head after each of these loops


def grow(model, args, progress, step_seed):
    """Return the depths of a batch, (batch_size,), instead of train.draw_depths. Their mean is 1,
    then 2, 4, ..., up to mean_recurrence, each in an equal part of the training (2609.19107)."""
    stages = (model.config.mean_recurrence - 1).bit_length() + 1  # 6: 1, 2, 4, 6
    mean = min(model.config.mean_recurrence, 2 ** int(progress * stages))
    generator = torch.Generator().manual_seed(step_seed)
    return model.sample_depths(args.batch_size, generator, mean)


RULES = {  # name: its model, and what table and picture call it
    "diagonal": (Parcae, "A_bar h + dt B e (Parcae)"),
    "add": (injecting(INJECTIONS["add"]), "h + e"),
    "concat": (injecting(INJECTIONS["concat"]), "W [h; e]"),
    "zero-order-hold": (injecting(ZeroOrderHold), "exact zero-order hold for B"),
    "euler": (injecting(Euler), "Euler's step for A"),
    "first-loop": (FirstLoopOnly, "e in the first loop only"),
    "loop-vector": (LoopVector, "a learned vector for each loop"),
    "over-n": (ResidualOverN, "what a layer in the loop adds, over N"),
    "deepnorm": (DeepNorm, "DeepNorm in the loop"),
    "streams": (HyperConnections, "two residual streams"),
    "every-loop": (EveryLoop, "the loss of all loops with gradient"),
    "growing": (Parcae, "loops grow during training"),  # see grow
}

# ------------------------------------------------------------------------------- the table


def read_row(path):
    """Return the row of a run, None if it is not finished. Raises UserError."""
    rule, rate, seed = split_name(path, "RULE-RATE-SEED", RULES)
    done = finished(path)
    if not done:
        return None
    return {"rule": rule, "rate": rate, "seed": seed, "flops": done["flops"],
            "spectral_radius": round(done["spectral_radius"], 4)} | {
        f"val_loss_{T}": loss_at(path, done, T) for T in LOOPS}


def print_table(rows):
    """Print the losses of seed 0 at each rate, and a table of means over seeds (see at_one_rate).
    Return {rule: its rows by seed}, the best first."""
    chosen = each_at_one_rate({rule: rule for rule in RULES}, rows, "rule", AT_OWN)

    def mean(mine, column):
        return np.mean([row[column] for row in mine])
    chosen = dict(sorted(chosen.items(), key=lambda item: mean(item[1], AT_OWN)))
    diagonal = losses_of(chosen.get("diagonal", ()), AT_OWN)
    print("| rule | " + " | ".join(f"T = {T}" for T in LOOPS)
          + " | minus diagonal (standard error) | FLOPs | spectral radius |")
    print("|" + "---|" * (len(LOOPS) + 4))
    for rule, mine in chosen.items():
        cells = [RULES[rule][1], *(f"{mean(mine, f'val_loss_{T}'):.4f}" for T in LOOPS)]
        lost = differences(losses_of(mine, AT_OWN), diagonal)
        compared = rule != "diagonal" and len(lost)
        cells.append(f"{lost.mean():+.4f} ({error_text(lost)})" if compared else "")
        radius = max(row["spectral_radius"] for row in mine)
        cells += [f"{mean(mine, 'flops'):.3g}", f"{radius:.2f}"]
        print("| " + " | ".join(cells) + " |")
    return chosen


def draw(chosen, path):
    """Draw val loss against loops at test time, once more enlarged. chosen: see print_table."""
    figure, both = figures.panels(2, 12, 4.5)
    colors = cycle("C0 C1 C2 C4 C5 C6 C7 C8 C9 k navy".split())  # C3 is like the diagonal's red
    for i, (rule, rows) in enumerate(chosen.items()):
        losses = np.mean([[row[f"val_loss_{T}"] for T in LOOPS] for row in rows], axis=0)
        style = {"color": figures.RED, "lw": 2.5} if rule == "diagonal" else {
            "color": next(colors), "lw": 1}
        for axes in both:
            axes.plot(LOOPS, losses, f"{figures.marker(i)}-", ms=4, label=RULES[rule][1], **style)
    best = min(np.mean([row[AT_OWN] for row in rows]) for rows in chosen.values())
    for axes, above in zip(both, (0.4, 0.05)):
        figures.loops_axis(axes, "loops T at test time (mean of training: 4)")
        axes.set(ylim=(best - above / 20, best + above))
    both[0].set_ylabel("val loss (nats per byte)")
    both[1].set_title("enlarged")
    both[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figures.save(figure, path)


def main():
    parser = Parser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rule", choices=RULES, metavar="RULE", help=f"one of {', '.join(RULES)}")
    what.add_argument("--table", type=Path, nargs=2, metavar=("DIR|CSV", "OUT"),
                      help="make table and picture from a directory of runs, or from a table")
    args, rest = parser.parse_known_args()
    if args.rule:
        train.Parcae, _ = RULES[args.rule]
        train.SCRIPT = f"-m runs.arena --rule {args.rule}"
        if args.rule == "growing":
            train.draw_depths = grow
        sys.argv[1:] = rest
        train.main()
        return
    source, out = args.table
    figures.pyplot()
    draw(print_table(collect(source, out / "arena.csv", read_row, COLUMNS)), out / "arena.png")


if __name__ == "__main__":
    run_script(main)
