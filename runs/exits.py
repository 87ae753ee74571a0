"""What does a token that may stop early cost, by each exit rule? A table and a picture.

    python -m runs.exits --run out/default --most 8      some minutes; out/exits.csv, exits.png

Each token's loop ends when the number of a rule (EXIT_RULES in parts/generation.py) falls below a
threshold. Beside them: the same number of loops for every token. All read the same sequences, so
that what a rule loses against all `--most` loops has a small standard error.
"""

from functools import partial
from pathlib import Path

import torch

from model import Parcae
from parts import figures
from parts.cli import Parser, UserError, number, progress_bar, run_script, some_path
from parts.generation import EXIT_RULES, settle
from parts.tables import write_csv
from parts.tokenizer import load_tokenizer
from tools.evaluate import (
    add_text_flags,
    bits_per_byte,
    loss_of,
    open_text,
    read_all,
    row_of,
    token_losses,
)

THRESHOLDS = {  # of each rule, from a late stop to an early one
    "kl": (0.003, 0.01, 0.03, 0.1, 0.3),
    "state": (0.03, 0.1, 0.2, 0.3, 0.5),
    "entropy": (0.03, 0.1, 0.3, 1, 2),
}


def entropy(now, last):
    """Return how unsure a prediction is, in nats: a rule that is worse than none."""
    return -(now.log_probs.exp() * now.log_probs).sum()


EXIT_RULES["entropy"] = entropy
COLUMNS = ["rule", "threshold", "loops", "val_loss", "standard_error", "above", "above_error"]


@torch.no_grad()
def early_exit_losses(model, idx, targets, most, threshold, rule):
    """Return {"loss": nats of each target, "loops": that its token took}, (1, T) each, where each
    token's loop ends as soon as its prediction settles (generation.settle)."""
    cache = model.new_cache(*idx.shape, most, "shared")
    losses, loops_used = [], []
    for token, target in zip(idx.split(1, dim=1), targets.split(1, dim=1)):
        logits, loops = settle(model, token, most, cache, threshold, rule)
        losses.append(loss_of(logits, target, loops))
        loops_used.append(loops)
    return {"loss": torch.cat(losses, dim=1), "loops": torch.tensor([loops_used])}


def early_exit(model, batches, tokenizer, most, threshold, rule, baseline=None):
    """Return the row of a threshold; its "recurrence" is the mean of the loops used.

    batches: of one sequence each, see read_all; baseline: see row_of."""
    losses_of = partial(early_exit_losses, most=most, threshold=threshold, rule=rule)
    sums, tokens, n_bytes = read_all(model, batches, tokenizer, losses_of)
    return row_of(sum(sums["loops"]) / sum(tokens), sums["loss"], tokens, n_bytes, baseline)


def row_of_table(rule, threshold, row):
    """A row of tools/evaluate.py as one of this table; "above": nats a token more than with all
    loops."""
    return {"rule": rule, "threshold": threshold, "loops": round(row["recurrence"], 3),
            "val_loss": round(row["val_loss"], 5),
            "standard_error": round(row["standard_error"], 5),
            "above": round(-row["gain"], 5), "above_error": round(row["gain_standard_error"], 5)}


def measure(model, windows, tokenizer, most):
    """The rows of the table. windows: [(idx, targets)], (1, T) int64 each.

    The rule of a fixed number of loops is "fixed", its threshold that number."""
    # What a row gains, it gains on the first one.
    fixed, _, _ = bits_per_byte(model, windows, tokenizer, [most, *range(1, most)])
    rows = [row_of_table("fixed", row["recurrence"], row)
            for row in sorted(fixed, key=lambda row: row["recurrence"])]
    device = model.wte.weight.device
    losses = [token_losses(model, idx.to(device), targets.to(device), [most])[most]
              for idx, targets in windows]
    first = [loss.cpu().double().sum().item() for loss in losses]
    for rule, thresholds in THRESHOLDS.items():
        for threshold in thresholds:
            sequences = progress_bar(windows, desc=f"{rule} {threshold:g}")
            row = early_exit(model, sequences, tokenizer, most, threshold, rule, first)
            rows.append(row_of_table(rule, threshold, row))
    return rows


def picture(path, rows):
    """Draw what leaving the loop early costs, by rule.

    rows: dicts: "rule"; "loops", their mean over tokens; "above", nats more than with all loops;
    "above_error", its standard error. The rule "fixed" gives every token the same loops."""
    figure, [axes] = figures.panels(1, 6, 4)
    for i, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
        mine = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["loops"])
        x, y, error = ([row[key] for row in mine] for key in ("loops", "above", "above_error"))
        label, color = ("all tokens alike", "0.5") if rule == "fixed" else (f"rule: {rule}", None)
        axes.errorbar(x, y, error, marker=figures.marker(i), ms=5, lw=1, capsize=2, label=label,
                      color=color)
    # A first loop that is far off would take all the height.
    high = max(row["above"] for row in rows if row["loops"] >= 2)
    axes.axhline(0, color="0.8", zorder=0)
    axes.set(xlabel="loops a token, mean", ylabel="loss above all loops (nats)",
             ylim=(-0.1 * high, 1.2 * high), title="What does stopping early cost?")
    axes.legend(fontsize=8)
    figures.save(figure, path)


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=some_path, default="out/default", metavar="DIR",
        help="run directory of train.py, of a looped model (default: %(default)s)")
    add_text_flags(add, 64)
    add("--most", type=number(int, 2, 65536), default=8, metavar="T",
        help="loops that no token may exceed (default: %(default)s)")
    add("--out", type=Path, default="out", metavar="DIR",
        help="where exits.csv and exits.png go (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    figures.pyplot()  # where matplotlib is missing, say so now
    model, tokenizer = Parcae.from_pretrained(args.run), load_tokenizer(args.run)
    if not model.config.n_recurrent:
        raise UserError(f"{args.run} is a plain transformer: it has no loop to leave")
    text = open_text(args, model, tokenizer)
    windows = list(text.batches(1))
    if len(windows) < 2:
        raise UserError(f"{text.name} gives {len(windows)} sequence, must be at least 2: one has "
                        "no standard error")
    rows = measure(model, windows, tokenizer, args.most)
    tokens = sum(targets.numel() for _, targets in windows)
    print(f"{args.run} on {tokens:,} tokens of {text.name}, at most {args.most} loops")
    print("  ".join(f"{column:>7}" for column in COLUMNS))
    for row in rows:
        print("  ".join(f"{value:>{max(7, len(column))}}" for column, value in row.items()))
    write_csv(args.out / "exits.csv", rows, COLUMNS)
    picture(args.out / "exits.png", rows)
    print("wrote", args.out / "exits.csv", "and", args.out / "exits.png")


if __name__ == "__main__":
    run_script(main)
