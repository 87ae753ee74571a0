"""Measure CORE, 22 in-context tasks, at chosen numbers of loops.

    python -m tools.core eval_data --run out/default --recurrence 1 4 8 --max-per-task 100

CORE (DCLM, arXiv 2406.11794) is the mean over 22 tasks of the centred accuracy, (accuracy -
baseline) / (1 - baseline). The folder is the public bundle's eval_data. There are three kinds of
task. Multiple choice (one context, several continuations) and schema (several contexts, one
continuation) are right where the right option has the lowest mean loss over the continuation;
language modelling where greedy decoding gives the whole continuation. Options that tie for the
lowest loss share the point: options may be the same tokens once their contexts are cut to the
model's context. Predictions that are not finite are refused.

Writes core.json in the run directory, which names the step of the weights and the items read.
"""

import hashlib
import json
import math
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from parts.cli import COUNT, Parser, UserError, progress_bar, run_script, some_path
from parts.files import write_json
from parts.generation import check_predicts
from parts.tokenizer import begin_token
from tools.evaluate import add_run_flags, open_run

ROUNDING = 1e-6  # losses that differ by less, relatively, tie

# name: (file, kind, examples shown, what comes between context and continuation, baseline in %).
# The baselines are those with which CORE has been reported: some are the largest class's share,
# and DCLM corrected some later (its issue 114).
TASKS = {
    "hellaswag_zeroshot": ("language_understanding/hellaswag", "choice", 0, " ", 25),
    "jeopardy": ("world_knowledge/jeopardy_all", "language", 10, "\nAnswer: ", 0),
    "bigbench_qa_wikidata": ("world_knowledge/bigbench_qa_wikidata", "language", 10, " ", 0),
    "arc_easy": ("world_knowledge/arc_easy", "choice", 10, "\nAnswer: ", 25),
    "arc_challenge": ("world_knowledge/arc_challenge", "choice", 10, "\nAnswer: ", 25),
    "copa": ("commonsense_reasoning/copa", "choice", 0, " ", 50),
    "commonsense_qa": ("commonsense_reasoning/commonsense_qa", "choice", 10, " ", 20),
    "piqa": ("commonsense_reasoning/piqa", "choice", 10, "\nAnswer: ", 50),
    "openbook_qa": ("commonsense_reasoning/openbook_qa", "choice", 0, " ", 25),
    "lambada_openai": ("language_understanding/lambada_openai", "language", 0, " ", 0),
    "hellaswag": ("language_understanding/hellaswag", "choice", 10, " ", 25),
    "winograd": ("language_understanding/winograd_wsc", "schema", 0, " ", 50),
    "winogrande": ("language_understanding/winogrande", "schema", 0, " ", 50),
    "bigbench_dyck_languages": (
        "symbolic_problem_solving/bigbench_dyck_languages", "language", 10, " ", 0),
    "agi_eval_lsat_ar": ("symbolic_problem_solving/agi_eval_lsat_ar", "choice", 3, " ", 20),
    "bigbench_cs_algorithms": (
        "symbolic_problem_solving/bigbench_cs_algorithms", "language", 10, " ", 0),
    "bigbench_operators": ("symbolic_problem_solving/bigbench_operators", "language", 10, " ", 0),
    "bigbench_repeat_copy_logic": (
        "symbolic_problem_solving/bigbench_repeat_copy_logic", "language", 10, " ", 0),
    "squad": ("reading_comprehension/squad", "language", 10, " ", 0),
    "coqa": ("reading_comprehension/coqa", "language", 0, " ", 0),
    "boolq": ("reading_comprehension/boolq", "choice", 10, "\nAnswer: ", 62),
    "bigbench_language_identification": (
        "language_understanding/bigbench_language_identification", "choice", 10, " ", 9.1),
}

# ------------------------------------------------------------------------------- prompts


def read_task(file, kind):
    """Return the items of a task, shuffled. Raises UserError that names the file and the line."""
    items = []
    for line_number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            check_item(item, kind)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{file} has an item that is not of kind {kind} in line "
                            f"{line_number}: {error}") from None
        items.append(item)
    if not items:
        raise UserError(f"{file} has no items")
    random.Random(1337).shuffle(items)
    return items


def check_item(item, kind):
    """Raise TypeError or ValueError where an option is not text, or gold not the number of one."""
    pairs, gold = options(item, kind, "")
    for pair in pairs:
        if not all(isinstance(text, str) for text in pair):
            raise TypeError("an option is not text")
    if type(gold) is not int or not 0 <= gold < len(pairs):
        raise ValueError(f"gold is {gold!r}, must be the number of one of {len(pairs)} options")


def options(item, kind, delimiter):
    """Return [(context, continuation)] of an item's options, and the number of the right one."""
    if kind == "choice":
        return [(item["query"] + delimiter, choice) for choice in item["choices"]], item["gold"]
    if kind == "schema":
        pairs = [(context + delimiter, item["continuation"]) for context in item["context_options"]]
        return pairs, item["gold"]
    return [(item["context"].strip() + delimiter, item["continuation"])], 0


@dataclass
class Question:
    """An item in tokens, ready to be scored."""

    rows: list  # of each option: its tokens, after the examples and the context
    starts: list  # of each option: where the scored part starts
    gold: int  # the right option
    cut: bool  # whether an option was longer than the model's context

    @cached_property
    def prefix(self):
        """Return how many tokens all rows share before any scored part."""
        return min(common_prefix(self.rows), *(start - 1 for start in self.starts))


def make_question(i, items, kind, shots, delimiter, tokenizer, block_size):
    """Return the Question of item number i, after other items for examples."""
    def encoded(text):
        return [begin_token(tokenizer), *tokenizer.encode_ordinary(text)]

    before = examples(i, items, kind, shots, delimiter)
    pairs, gold = options(items[i], kind, delimiter)
    rows = [encoded(before + context + continuation) for context, continuation in pairs]
    if kind == "choice":  # what differs comes last
        starts = [common_prefix(rows)] * len(rows)
    elif kind == "schema":  # what differs comes first, the same continuation is scored
        tail = common_prefix([row[::-1] for row in rows])
        starts = [len(row) - tail for row in rows]
    else:
        context = encoded((before + pairs[0][0]).strip())
        starts = [common_prefix([context, rows[0]])]

    # a row that is too long loses its beginning; one token at least counts
    cuts = [max(0, len(row) - block_size - 1) for row in rows]
    starts = [max(1, min(start, len(row) - 1) - cut) for start, row, cut in zip(starts, rows, cuts)]
    return Question([row[cut:] for row, cut in zip(rows, cuts)], starts, gold, any(cuts))


def examples(i, items, kind, shots, delimiter):
    """Return the text before item number i: other items, each with its right option and a blank
    line after it."""
    others = [j for j in range(len(items)) if j != i]
    text = ""
    for j in random.Random(1234 + i).sample(others, min(shots, len(others))):
        pairs, gold = options(items[j], kind, delimiter)
        text += "".join(pairs[gold]) + "\n\n"
    return text


def common_prefix(rows):
    """Return the length of the common prefix of lists.

    >>> common_prefix([[1, 2, 3], [1, 2, 4, 5]])
    2
    """
    for i, column in enumerate(zip(*rows)):
        if len(set(column)) > 1:
            return i
    return min(map(len, rows))

# ------------------------------------------------------------------------------- scores


@torch.no_grad()
def score(model, questions, recurrence):
    """Return for each question, for each option: (mean loss of the scored part in nats per token,
    whether greedy decoding gives it). Raises UserError where a prediction is not finite.

    The prefix that a question's options share, up to 10 examples long, runs once for each question,
    into a KV cache, from which every option then reads: several times as fast as running every
    option whole. Options are padded at their ends, which nothing before the padding sees."""
    device = model.wte.weight.device
    rows, owner, starts = [], [], []  # of all options: tokens, number of the question, scored part
    for number, question in enumerate(questions):
        rows += question.rows
        owner += [number] * len(question.rows)
        starts += question.starts

    # the prefixes, one row a question; n: tokens that every question's options share
    n = min(question.prefix for question in questions)
    longest = max(len(row) - 1 for row in rows)
    cache = model.new_cache(len(questions), longest, recurrence)
    if n:
        prefixes = torch.tensor([question.rows[0][:n] for question in questions], device=device)
        model.hidden(prefixes, recurrence, cache)

    # the rest, one row an option; the last token of a row is only a target
    cache = cache.rows(torch.tensor(owner, device=device))
    padded = [row[n:-1] + [0] * (longest - len(row) + 1) for row in rows]
    idx = torch.tensor(padded, device=device)                             # (rows, longest - n)
    x = model.hidden(idx, recurrence, cache)

    results = [[] for _ in questions]
    for i, row in enumerate(rows):
        targets = torch.tensor(row[starts[i]:], device=device)
        first = starts[i] - 1 - n  # the place that predicts the first of them
        logits = model.lm_head(x[i, first:first + len(targets)]).float()
        check_predicts(logits, recurrence)
        greedy = bool((logits.argmax(-1) == targets).all())
        results[owner[i]].append((F.cross_entropy(logits, targets).item(), greedy))
    return results


def credit(question, scores):
    """Return what a question with several options earns, 0 to 1: the options with the lowest loss
    share the point. scores: as of `score`."""
    # The same tokens have the same loss: rounding must not decide between them.
    losses = {}
    for row, start, (loss, _) in zip(question.rows, question.starts, scores):
        losses.setdefault((start, *row), loss)
    lowest = min(losses.values())
    tied = [math.isclose(losses[start, *row], lowest, rel_tol=ROUNDING)
            for row, start in zip(question.rows, question.starts)]
    return tied[question.gold] / sum(tied)


def batches_of(questions, batch_size):
    """Yield lists of questions of about batch_size rows, questions of like length side by side."""
    batch = []
    for question in sorted(questions, key=lambda one: (one.prefix, max(map(len, one.rows)))):
        rows = sum(len(other.rows) for other in batch)
        if batch and rows + len(question.rows) > batch_size:
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


def accuracy(model, questions, kind, recurrence, batch_size=32, bar=None):
    """Return the share of questions that the model gets right; a tie counts in part, see credit."""
    right = 0
    for batch in batches_of(questions, batch_size):
        for question, scores in zip(batch, score(model, batch, recurrence)):
            right += scores[0][1] if kind == "language" else credit(question, scores)
        if bar:
            bar.update(len(batch))
    return right / len(questions)


def files_of(folder):
    """Return {task: its file} of the tasks that are in the folder. Raises UserError."""
    files = {name: Path(folder) / f"{task[0]}.jsonl" for name, task in TASKS.items()}
    there = {name: file for name, file in files.items() if file.exists()}
    if not there:
        example = next(iter(files.values())).relative_to(folder)
        raise UserError(f"{folder} holds none of the tasks, such as {example}")
    return there


def fingerprint(folder):
    """Return what tells whether two folders hold the same tasks: {"source", "sha256"}."""
    digest = hashlib.sha256()
    for file in files_of(folder).values():
        digest.update(file.read_bytes())
    return {"source": str(folder), "sha256": digest.hexdigest()}


def core(model, tokenizer, folder, recurrence, batch_size, limit):
    """Return {task: {"items", "cut", "baseline", "accuracy": {T: share}, "centered": {T: share}}}
    of the tasks in the folder; "cut" counts the items longer than the context. Raises UserError."""
    tasks = {name: read_task(file, TASKS[name][1]) for name, file in files_of(folder).items()}
    results = {}
    total = sum(len(items[:limit]) for items in tasks.values()) * len(recurrence)
    with progress_bar(total=total, unit="item") as bar:
        for name, raw in tasks.items():
            bar.set_description(name)
            _, kind, shots, delimiter, percent = TASKS[name]
            baseline = percent / 100
            questions = [make_question(i, raw, kind, shots, delimiter, tokenizer,
                                       model.config.block_size) for i in range(len(raw))[:limit]]
            right = {T: accuracy(model, questions, kind, T, batch_size, bar) for T in recurrence}
            centered = {T: (share - baseline) / (1 - baseline) for T, share in right.items()}
            results[name] = {"items": len(questions), "cut": sum(one.cut for one in questions),
                             "baseline": baseline, "accuracy": right, "centered": centered}
    return results

# ------------------------------------------------------------------------------- command line


def show(results, recurrence):
    """Print the tasks and their mean. Return its name and {T: mean}."""
    heads = "".join(f"{f'T = {T}':>18s}" for T in recurrence)
    print(f"accuracy (centred) by loops{'':10s}  items{heads}")
    for name, task in results.items():
        cells = [f"{task['accuracy'][T]:9.3f} ({task['centered'][T]:+.3f})" for T in recurrence]
        print(f"{name:35s}  {task['items']:7d}{''.join(cells)}")
    missing = [name for name in TASKS if name not in results]
    label = "CORE" if not missing else f"mean of {len(results)} of the 22 tasks, not CORE"
    mean = {}
    for T in recurrence:
        mean[T] = sum(task["centered"][T] for task in results.values()) / len(results)
    print(f"{label:44s}" + "".join(f"{'':9s} ({mean[T]:+.3f})" for T in recurrence))
    if missing:
        print("missing:", ", ".join(missing))
    items, cut = (sum(task[key] for task in results.values()) for key in ("items", "cut"))
    if cut:
        print(f"{cut} of {items} items are longer than the model's context and lost their "
              "beginnings")
    return label, mean


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folder", type=some_path, metavar="FOLDER", help="eval_data of the public bundle")
    add_run_flags(add)
    add("--max-per-task", type=COUNT, metavar="N",
        help="items of a task, the first N after shuffling (default: all)")
    add("--batch-size", type=COUNT, default=32, metavar="N",
        help="options at a time (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    model, tokenizer, recurrence = open_run(args)
    tasks = core(model, tokenizer, args.folder, recurrence, args.batch_size, args.max_per_task)
    label, mean = show(tasks, recurrence)
    record = {"step": model.step, "text": fingerprint(args.folder),
              "sequences": sum(task["items"] for task in tasks.values()),
              "label": label, "mean": mean, "max_per_task": args.max_per_task,
              "dtype": str(model.dtype), "tasks": tasks}
    write_json(Path(args.run) / "core.json", record)


if __name__ == "__main__":
    run_script(main)
