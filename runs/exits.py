"""How much loss does it cost to let tokens leave the loop early? Compare the exit rules.

    python -m runs.exits --run out/default --most 8      40 minutes; writes out/exits.csv, exits.png

A token leaves the loop when a number falls below a threshold; the rules (EXIT_RULES in
parts/generation.py) compute it. The baseline gives every token the same number of loops. All read
the same sequences, so that the loss added to that of `--most` loops has a small standard error.
"""

from functools import partial
from pathlib import Path

import torch

from model import Parcae
from parts import figures
from parts.cli import (
    Parser,
    UserError,
    new_directory,
    number,
    progress_bar,
    run_script,
    some_path,
)
from parts.generation import EXIT_RULES, settle
from parts.machine import use_threads
from parts.tables import write_csv
from parts.tokenizer import load_tokenizer
from tools.evaluate import add_text_flags, loss_of, open_text, read_all, row_of, token_losses

THRESHOLDS = {  # for each rule, from late to early exits
    "kl": (0.003, 0.01, 0.03, 0.1, 0.3),
    "state": (0.03, 0.1, 0.2, 0.3, 0.5),
    "entropy": (0.03, 0.1, 0.3, 1, 2),
}


def entropy(now, last):
    """Return the entropy of a prediction in nats: an exit rule that does worse than no rule."""
    return -(now.log_probs.exp() * now.log_probs).sum()


EXIT_RULES["entropy"] = entropy
COLUMNS = ["rule", "threshold", "loops", "val_loss", "standard_error", "above", "above_error"]


@torch.no_grad()
def early_exit_losses(model, idx, targets, most, threshold, rule):
    """Return {"loss": nats of each target, "loops": how many its token took}, (1, S) each. Each
    token leaves the loop as soon as its prediction settles, see generation.settle."""
    cache = model.new_cache(*idx.shape, most, "shared")
    losses, loops_used = [], []
    for token, target in zip(idx.split(1, dim=1), targets.split(1, dim=1)):
        logits, loops = settle(model, token, most, cache, threshold, rule)
        losses.append(loss_of(logits, target, loops))
        loops_used.append(loops)
    return {"loss": torch.cat(losses, dim=1), "loops": torch.tensor([loops_used])}


def early_exit(model, batches, tokenizer, most, threshold, rule, baseline=None):
    """Return the row for a threshold; its "recurrence" is the mean number of loops used.

    batches: one sequence in each, see read_all; baseline: see row_of."""
    losses_of = partial(early_exit_losses, most=most, threshold=threshold, rule=rule)
    sums, tokens, n_bytes = read_all(model, batches, tokenizer, losses_of)
    return row_of(sum(sums["loops"]) / sum(tokens), sums["loss"], tokens, n_bytes, baseline)


def row_of_table(rule, threshold, row):
    """Return a row of this table from a row of tools/evaluate.py. "above" is the loss in nats per
    token, minus the loss with all loops."""
    return {"rule": rule, "threshold": threshold, "loops": round(row["recurrence"], 3),
            "val_loss": round(row["val_loss"], 5),
            "standard_error": round(row["standard_error"], 5),
            "above": round(-row["gain"], 5), "above_error": round(row["gain_standard_error"], 5)}


def measure(model, windows, tokenizer, most):
    """Return the rows of the table. windows: [(idx, targets)], (1, S) int64 each.

    The rule "fixed" gives all tokens the same number of loops, which stands in "threshold"."""
    depths = range(1, most + 1)
    losses_of = partial(token_losses, recurrence=depths)
    nats, tokens, n_bytes = read_all(model, windows, tokenizer, losses_of)
    first = nats[most]  # gains are relative to all loops
    rows = [row_of_table("fixed", T, row_of(T, nats[T], tokens, n_bytes, first)) for T in depths]
    for rule, thresholds in THRESHOLDS.items():
        for threshold in thresholds:
            sequences = progress_bar(windows, desc=f"{rule} {threshold:g}")
            row = early_exit(model, sequences, tokenizer, most, threshold, rule, first)
            rows.append(row_of_table(rule, threshold, row))
    return rows


def picture(path, rows):
    """Draw what leaving the loop early costs, for each rule.

    rows: dicts with "rule", "loops" (mean over tokens), "above" (nats more than with all loops) and
    "above_error" (its standard error). The rule "fixed" gives all tokens the same loops."""
    figure, [axes] = figures.panels(1, 6, 4)
    for i, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
        mine = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["loops"])
        x, y, error = ([row[key] for row in mine] for key in ("loops", "above", "above_error"))
        label, color = ("the same for all", "0.5") if rule == "fixed" else (f"rule: {rule}", None)
        axes.errorbar(x, y, error, marker=figures.marker(i), ms=5, lw=1, capsize=2, label=label,
                      color=color)
    # the losses after one loop may be far higher and would hide the rest
    above = [row["above"] for row in rows if row["loops"] >= 2]
    low, high = min(above), max(above)
    axes.axhline(0, color="0.8", zorder=0)
    axes.set(xlabel="mean loops per token", ylabel="loss minus that of all loops (nats)",
             ylim=(low - 0.1 * high, 1.2 * high), title="What does stopping early cost?")
    axes.legend(fontsize=8)
    figures.save(figure, path)


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=some_path, default="out/default", metavar="DIR",
        help="run directory of train.py, of a looped model (default: %(default)s)")
    add_text_flags(add, 64)
    add("--most", type=number(int, 2, 65536), default=8, metavar="T",
        help="largest number of loops of a token (default: %(default)s)")
    add("--out", type=new_directory, default="out", metavar="DIR",
        help="directory for exits.csv and exits.png (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    figures.pyplot()  # fail now if matplotlib is missing
    model, tokenizer = Parcae.from_pretrained(args.run), load_tokenizer(args.run)
    if not model.config.n_recurrent:
        raise UserError(f"{args.run} is a plain transformer: it has no loop to leave")
    use_threads(model.config.n_embd)
    text = open_text(args, model, tokenizer)
    windows = list(text.batches(1))
    if len(windows) < 2:
        raise UserError(f"{text.name} gives {len(windows)} sequence, must be at least 2, since "
                        "one has no standard error")
    rows = measure(model, windows, tokenizer, args.most)
    tokens = sum(targets.numel() for _, targets in windows)
    print(f"{args.run} on {tokens:,} tokens of {text.name}, at most {args.most} loops")
    print("  ".join(f"{column:>7}" for column in COLUMNS))
    for row in rows:
        print("  ".join(f"{value:>{max(7, len(column))}}" for column, value in row.items()))
    out = Path(args.out)
    write_csv(out / "exits.csv", rows, COLUMNS)
    picture(out / "exits.png", rows)
    print("wrote", out / "exits.csv", "and", out / "exits.png")


if __name__ == "__main__":
    run_script(main)
