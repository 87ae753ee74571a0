"""Measure CORE, a score on 22 in-context tasks, at chosen numbers of loops.

    python -m tools.core eval_data --run out/default --recurrence 1 4 8 --max-per-task 100

CORE (DCLM, arXiv 2406.11794) is the mean over 22 tasks of the centred accuracy, (accuracy -
baseline) / (1 - baseline). FOLDER is eval_data from the public bundle. There are three kinds of
task. In choice (one context, several continuations) and schema (several contexts, one continuation)
the model picks the option with the lowest mean loss over the continuation; options that tie share
the point. In language, greedy decoding must give the whole continuation. A prediction that is not
finite is an error. The results go to core.json in the run directory.
"""

import hashlib
import json
import math
import random
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F

from parts.cli import COUNT, Parser, UserError, progress_bar, run_script, some_path
from parts.files import write_json
from parts.generation import check_predicts
from parts.tokenizer import begin_token
from tools.evaluate import add_run_flags, open_run

# task: (file name, kind, examples shown, text between context and continuation, baseline in %).
# Published CORE scores use these baselines; DCLM's issue 114 corrected some of them later.
TASKS = {
    "hellaswag_zeroshot": ("hellaswag", "choice", 0, " ", 25),
    "jeopardy": ("jeopardy_all", "language", 10, "\nAnswer: ", 0),
    "bigbench_qa_wikidata": ("bigbench_qa_wikidata", "language", 10, " ", 0),
    "arc_easy": ("arc_easy", "choice", 10, "\nAnswer: ", 25),
    "arc_challenge": ("arc_challenge", "choice", 10, "\nAnswer: ", 25),
    "copa": ("copa", "choice", 0, " ", 50),
    "commonsense_qa": ("commonsense_qa", "choice", 10, " ", 20),
    "piqa": ("piqa", "choice", 10, "\nAnswer: ", 50),
    "openbook_qa": ("openbook_qa", "choice", 0, " ", 25),
    "lambada_openai": ("lambada_openai", "language", 0, " ", 0),
    "hellaswag": ("hellaswag", "choice", 10, " ", 25),
    "winograd": ("winograd_wsc", "schema", 0, " ", 50),
    "winogrande": ("winogrande", "schema", 0, " ", 50),
    "bigbench_dyck_languages": ("bigbench_dyck_languages", "language", 10, " ", 0),
    "agi_eval_lsat_ar": ("agi_eval_lsat_ar", "choice", 3, " ", 20),
    "bigbench_cs_algorithms": ("bigbench_cs_algorithms", "language", 10, " ", 0),
    "bigbench_operators": ("bigbench_operators", "language", 10, " ", 0),
    "bigbench_repeat_copy_logic": ("bigbench_repeat_copy_logic", "language", 10, " ", 0),
    "squad": ("squad", "language", 10, " ", 0),
    "coqa": ("coqa", "language", 0, " ", 0),
    "boolq": ("boolq", "choice", 10, "\nAnswer: ", 62),
    "bigbench_language_identification": (
        "bigbench_language_identification", "choice", 10, " ", 9.1),
}

# ------------------------------------------------------------------------------- prompts


def read_task(file, kind, delimiter):
    """Return what `options` makes of a file's lines, shuffled. UserErrors name the line."""
    items = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            pairs, gold = options(json.loads(line), kind, delimiter)
            if not all(isinstance(text, str) for pair in pairs for text in pair):
                raise TypeError("an option is not text")
            if type(gold) is not int or not 0 <= gold < len(pairs):
                raise ValueError(f"gold is {gold!r}, must be the number of an option")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{file} has an item that is not of kind {kind} in line {number}: "
                            f"{error}") from None
        items.append((pairs, gold))
    if not items:
        raise UserError(f"{file} has no items")
    random.Random(1337).shuffle(items)
    return items


def options(item, kind, delimiter):
    """Return [(context, continuation)], one for each option, and the number of the right one."""
    if kind == "choice":
        return [(item["query"] + delimiter, choice) for choice in item["choices"]], item["gold"]
    if kind == "schema":
        pairs = [(context + delimiter, item["continuation"]) for context in item["context_options"]]
        return pairs, item["gold"]
    return [(item["context"].strip() + delimiter, item["continuation"])], 0


@dataclass
class Question:
    rows: list  # for each option: the tokens of examples, context and continuation
    starts: list  # for each option: where the scored part of its row starts
    gold: int  # the number of the right option
    cut: bool  # whether a row was longer than the model's context

    @cached_property
    def prefix(self):
        """Return how many tokens all rows share before the one that predicts a scored token."""
        return min(common_prefix(self.rows), *(start - 1 for start in self.starts))


def make_question(i, items, kind, shots, tokenizer, block_size):
    """Return the Question for item number i. Its examples (shots) are other items, each with its
    right option and a blank line."""
    def encoded(text):
        return [begin_token(tokenizer), *tokenizer.encode_ordinary(text)]

    before = ""
    others = [j for j in range(len(items)) if j != i]
    for j in random.Random(1234 + i).sample(others, min(shots, len(others))):
        pairs, gold = items[j]
        before += "".join(pairs[gold]) + "\n\n"
    pairs, gold = items[i]
    rows = [encoded(before + context + continuation) for context, continuation in pairs]
    if kind == "choice":  # the options differ at their ends
        starts = [common_prefix(rows)] * len(rows)
    elif kind == "schema":  # the options differ first; their common end is scored
        tail = common_prefix([row[::-1] for row in rows])
        starts = [len(row) - tail for row in rows]
    else:
        starts = [common_prefix([encoded((before + pairs[0][0]).strip()), *rows])]

    # a row that is too long loses its beginning; at least one token is scored
    cuts = [max(0, len(row) - block_size - 1) for row in rows]
    starts = [max(1, min(start, len(row) - 1) - cut) for start, row, cut in zip(starts, rows, cuts)]
    return Question([row[cut:] for row, cut in zip(rows, cuts)], starts, gold, any(cuts))


def common_prefix(rows):
    """Return the length of the common prefix of lists: 2 for [1, 2, 3] and [1, 2, 4, 5]."""
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*rows))
    return len(list(alike))

# ------------------------------------------------------------------------------- scores


@torch.no_grad()
def score(model, questions, recurrence):
    """Return for each question a list with, for each option, (mean loss of the scored part in nats
    per token, whether greedy decoding gives it). Raises UserError if a prediction is not finite.

    The prefix that a question's options share (up to 10 examples) runs once and fills a KV cache,
    which every option then reads. Padding is at the end, where no earlier token attends to it."""
    device = model.wte.weight.device
    owner, rows, starts = [], [], []  # of all options; owner: the number of its question
    for number, question in enumerate(questions):
        owner += [number] * len(question.rows)
        rows += question.rows
        starts += question.starts

    # first the prefixes, a row for each question, cut to n tokens, the length of the shortest
    n = min(question.prefix for question in questions)
    longest = max(len(row) - 1 for row in rows)
    cache = model.new_cache(len(questions), longest, recurrence)
    if n:
        prefixes = torch.tensor([question.rows[0][:n] for question in questions], device=device)
        model.hidden(prefixes, recurrence, cache)

    # then the rest, a row for each option; the last token of a row is only a target
    cache = cache.rows(torch.tensor(owner, device=device))
    padded = [row[n:-1] + [0] * (longest - len(row) + 1) for row in rows]
    idx = torch.tensor(padded, device=device)                             # (rows, longest - n)
    x = model.hidden(idx, recurrence, cache)

    results = [[] for _ in questions]
    for number, row, start, hidden in zip(owner, rows, starts, x):
        targets = torch.tensor(row[start:], device=device)
        first = start - 1 - n  # the position that predicts targets[0]
        logits = model.head(hidden[first:first + len(targets)])
        check_predicts(logits, recurrence)
        greedy = bool((logits.argmax(-1) == targets).all())
        results[number].append((F.cross_entropy(logits, targets).item(), greedy))
    return results


def credit(question, scores):
    """Return the points, 0 to 1, for a question with several options: the options with the lowest
    loss share one point. scores: a list of (loss, greedy), one for each option, see `score`."""
    losses = {}  # equal tokens get equal losses, so that rounding does not decide between them
    parts = [(start, *row) for start, row in zip(question.starts, question.rows)]
    for part, (loss, _) in zip(parts, scores):
        losses.setdefault(part, loss)
    lowest = min(losses.values())
    tied = [math.isclose(losses[part], lowest, rel_tol=1e-6) for part in parts]
    return tied[question.gold] / sum(tied)


def accuracy(model, questions, kind, recurrence, batch_size=32):
    """Return the share of questions that the model gets right; a tie counts in part, see credit.
    batch_size: options in a batch."""
    # questions of similar length share a batch
    questions = sorted(questions, key=lambda one: (one.prefix, max(map(len, one.rows))))
    size = max(1, batch_size // max(len(one.rows) for one in questions))
    right = 0
    for i in progress_bar(range(0, len(questions), size), desc=f"{kind}, T = {recurrence}"):
        batch = questions[i:i + size]
        for question, scores in zip(batch, score(model, batch, recurrence)):
            right += scores[0][1] if kind == "language" else credit(question, scores)
    return right / len(questions)


def core(model, tokenizer, files, recurrence, batch_size, limit):
    """Return {task: {"items", "cut", "baseline", "accuracy": {T: share}, "centered": {T: share}}};
    "cut" counts items longer than the context. files: {task: file}. Raises UserError."""
    tasks = {name: read_task(file, TASKS[name][1], TASKS[name][3]) for name, file in files.items()}
    results = {}
    for name, items in tasks.items():
        _, kind, shots, _, percent = TASKS[name]
        baseline = percent / 100
        questions = [make_question(i, items, kind, shots, tokenizer, model.config.block_size)
                     for i in range(len(items))[:limit]]
        right = {T: accuracy(model, questions, kind, T, batch_size) for T in recurrence}
        centered = {T: (share - baseline) / (1 - baseline) for T, share in right.items()}
        results[name] = {"items": len(questions), "cut": sum(one.cut for one in questions),
                         "baseline": baseline, "accuracy": right, "centered": centered}
    return results


def show(results, recurrence):
    """Print the tasks and their mean. Return the name of the mean and {T: mean}."""
    heads = "".join(f"{f'T = {T}':>18s}" for T in recurrence)
    print(f"accuracy (centred) by loops{'':10s}  items{heads}")
    for name, task in results.items():
        cells = [f"{task['accuracy'][T]:9.3f} ({task['centered'][T]:+.3f})" for T in recurrence]
        print(f"{name:35s}  {task['items']:7d}{''.join(cells)}")
    tasks, missing = results.values(), [name for name in TASKS if name not in results]
    mean = {T: sum(task["centered"][T] for task in tasks) / len(tasks) for T in recurrence}
    label = f"mean of {len(tasks)} of the 22 tasks, not CORE" if missing else "CORE"
    print(f"{label:44s}" + "".join(f"{'':9s} ({mean[T]:+.3f})" for T in recurrence))
    if missing:
        print("missing:", ", ".join(missing))
    if cut := sum(task["cut"] for task in tasks):
        print(f"{cut} of {sum(task['items'] for task in tasks)} items are longer than the model's "
              "context and lost their beginnings")
    return label, mean


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folder", type=some_path, metavar="FOLDER", help="eval_data from the public bundle")
    add_run_flags(add)
    add("--max-per-task", type=COUNT, metavar="N",
        help="use only the first N items of each task, after shuffling (default: all)")
    add("--batch-size", type=COUNT, default=32, metavar="N",
        help="options in a batch (default: %(default)s)")
    args = parser.parse_args()
    files = {name: file for name, task in TASKS.items()
             for file in Path(args.folder).glob(f"*/{task[0]}.jsonl")}
    if not files:
        raise UserError(f"{args.folder} holds none of the tasks, such as "
                        "language_understanding/hellaswag.jsonl")
    model, tokenizer, recurrence = open_run(args)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files.values())).hexdigest()
    tasks = core(model, tokenizer, files, recurrence, args.batch_size, args.max_per_task)
    label, mean = show(tasks, recurrence)
    write_json(Path(args.run) / "core.json", {
        "step": model.step, "text": {"source": str(args.folder), "sha256": digest},
        "sequences": sum(task["items"] for task in tasks.values()), "label": label, "mean": mean,
        "max_per_task": args.max_per_task, "dtype": str(model.dtype), "tasks": tasks})


if __name__ == "__main__":
    run_script(main)
