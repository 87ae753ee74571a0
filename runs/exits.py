"""What does a token that may stop early cost, by each exit rule? A table and a picture.

    python -m runs.exits --run out/default --most 8      some minutes; results/exits.csv, exits.png

Each token's loop ends when the number of a rule (sample.py, EXIT_RULES) falls below a threshold.
Beside them: the same number of loops for every token. All read the same sequences, so that what a
rule loses against all `--most` loops has a small standard error.
"""

from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

import figures
from common import LOOPS, Parser, UserError, run_script, some_path
from evaluate import (
    add_text_flags,
    bytes_of_tokens,
    early_exit_losses,
    open_run,
    open_text,
    row_of,
    token_losses,
)
from tables import write_csv

THRESHOLDS = {  # of each rule, from a late stop to an early one
    "kl": (0.003, 0.01, 0.03, 0.1, 0.3),
    "state": (0.03, 0.1, 0.2, 0.3, 0.5),
    "entropy": (0.03, 0.1, 0.3, 1, 2),
}
COLUMNS = ["rule", "threshold", "loops", "val_loss", "standard_error", "above", "above_error"]


def measure(model, batches, most):
    """{(rule, threshold)}: (nats of each sequence, loops of each token); tokens of each sequence.

    The rule of a fixed number of loops is "fixed", its threshold that number. batches: of one
    sequence each."""
    nats, loops_used, lengths = defaultdict(list), defaultdict(list), []
    fixed = range(1, most + 1)
    settings = [(rule, threshold) for rule in THRESHOLDS for threshold in THRESHOLDS[rule]]
    for idx, targets in batches:
        lengths.append(targets.numel())
        for T, losses in token_losses(model, idx, targets, fixed).items():
            nats["fixed", T].append(losses.double().sum().item())
            loops_used["fixed", T] += [T] * lengths[-1]
        for rule, threshold in tqdm(settings, desc="rules", leave=False, disable=None):
            losses, loops = early_exit_losses(model, idx, targets, most, threshold, rule)
            nats[rule, threshold].append(losses.double().sum().item())
            loops_used[rule, threshold] += loops
    return nats, loops_used, lengths


def rows_of(nats, loops_used, lengths, most, size):
    """The rows of the table; "above": nats a token more than with `most` loops."""
    rows = []
    for (rule, threshold), own in nats.items():
        loops = sum(loops_used[rule, threshold]) / len(loops_used[rule, threshold])
        row = row_of(loops, own, lengths, size, nats["fixed", most])
        rows.append({
            "rule": rule, "threshold": threshold, "loops": round(loops, 3),
            "val_loss": round(row["val_loss"], 5),
            "standard_error": round(row["standard_error"], 5),
            "above": round(-row["gain"], 5), "above_error": round(row["gain_standard_error"], 5)})
    return rows


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=some_path, default="out/default", metavar="DIR",
        help="run directory of train.py, of a looped model (default: %(default)s)")
    add_text_flags(add, 64)
    add("--most", type=LOOPS, default=8, metavar="T",
        help="loops that no token may exceed (default: %(default)s)")
    add("--out", type=Path, default="results", metavar="DIR",
        help="where exits.csv and exits.png go (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="float32",
        help="of the activations (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    figures.pyplot()  # where matplotlib is missing, say so now
    args.recurrence = [args.most]
    model, tokenizer, _ = open_run(args)
    if not model.config.n_recurrent:
        raise UserError(f"{args.run} is a plain transformer: it has no loop to leave")
    if args.sequences < 2:
        raise UserError("--sequences is 1, must be at least 2: one has no standard error")
    args.out.mkdir(parents=True, exist_ok=True)
    name, batches = open_text(args, model, tokenizer)
    sizes, device = bytes_of_tokens(tokenizer), model.wte.weight.device
    windows = [(idx.to(device), targets.to(device)) for idx, targets in batches(1)]
    size = sum(int(sizes[targets.cpu()].sum()) for _, targets in windows)
    nats, loops_used, lengths = measure(model, tqdm(windows, unit="sequence", disable=None),
                                        args.most)
    rows = rows_of(nats, loops_used, lengths, args.most, size)
    print(f"{args.run} on {sum(lengths):,} tokens of {name}, at most {args.most} loops")
    print("  ".join(COLUMNS))
    for row in rows:
        print("  ".join(f"{value:>{len(column)}}" for column, value in row.items()))
    write_csv(args.out / "exits.csv", rows, COLUMNS)
    figures.exits(args.out / "exits.png", rows)
    print("wrote", args.out / "exits.csv", "and", args.out / "exits.png")


if __name__ == "__main__":
    run_script(main)
