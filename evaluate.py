"""Bits per byte, perplexity and CORE of a model, at chosen numbers of loops.

    python evaluate.py --run out/default --recurrence 1 2 4 8 16
    python evaluate.py --run out/default --text book.txt
    python evaluate.py --run out/default --kv-cache shared     the price of keeping the last loop's keys and values only
    python evaluate.py --run out/default --exit-threshold 0.1 0.01 0.001 --sequences 32     what stopping early costs
    python evaluate.py --run out/default --core eval_data --max-per-task 100
    python evaluate.py --init-from SandyResearch/parcae-140m --text book.txt

CORE (DCLM, arXiv 2406.11794) is the mean over 22 tasks of the centred accuracy, (accuracy - baseline) / (1 - baseline).
--core takes the public bundle's eval_data folder. Three kinds of task: multiple choice (one context, several
continuations) and schema (several contexts, one continuation) are right where the right option has the lowest mean
loss over the continuation; language modelling where greedy decoding gives the whole continuation.
"""

import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (
    COUNT,
    LOOPS,
    Parser,
    UserError,
    keep_freed_memory,
    number,
    pick_device,
    pick_dtype,
    read_json,
    run_script,
    some_path,
    write_text,
)
from data import Loader, begin_token, encode, load_tokenizer, read_text, same_tokens
from model import KVCache, Parcae, Settled, local_files, read_config

EVAL_SEED = 1234  # as in train.py: the first sequences are those that train.py evaluates on

# name: (file, kind, examples shown, what comes between context and continuation, baseline accuracy in %); the baselines are
# those with which CORE has been reported: some are the largest class's share, and DCLM corrected some later (its issue 114)
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
    "bigbench_dyck_languages": ("symbolic_problem_solving/bigbench_dyck_languages", "language", 10, " ", 0),
    "agi_eval_lsat_ar": ("symbolic_problem_solving/agi_eval_lsat_ar", "choice", 3, " ", 20),
    "bigbench_cs_algorithms": ("symbolic_problem_solving/bigbench_cs_algorithms", "language", 10, " ", 0),
    "bigbench_operators": ("symbolic_problem_solving/bigbench_operators", "language", 10, " ", 0),
    "bigbench_repeat_copy_logic": ("symbolic_problem_solving/bigbench_repeat_copy_logic", "language", 10, " ", 0),
    "squad": ("reading_comprehension/squad", "language", 10, " ", 0),
    "coqa": ("reading_comprehension/coqa", "language", 0, " ", 0),
    "boolq": ("reading_comprehension/boolq", "choice", 10, "\nAnswer: ", 62),
    "bigbench_language_identification": ("language_understanding/bigbench_language_identification", "choice", 10, " ", 9.1),
}


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=some_path, default="out/default", metavar="DIR", help="run directory of train.py (default: %(default)s)")
    add("--init-from", type=some_path, metavar="DIR", help="a model in the published format instead: a directory, or owner/name on the hub")
    add("--recurrence", type=LOOPS, nargs="+", default=[1, 2, 4, 8, 16], metavar="T", help="loops (default: 1 2 4 8 16)")
    add("--data", type=some_path, metavar="DIR", help="data directory whose val tokens are read (default: the run's)")
    add("--text", type=some_path, metavar="FILE", help="read this text instead")
    add("--sequences", type=COUNT, default=512, metavar="N", help="sequences of block_size tokens to read (default: %(default)s)")
    add("--core", type=some_path, metavar="DIR", help="measure CORE too, on the tasks in this folder (eval_data of the public bundle)")
    add("--max-per-task", type=COUNT, metavar="N", help="items of a task, the first N after shuffling (default: all)")
    add("--batch-size", type=COUNT, default=32, metavar="N", help="sequences at a time (default: %(default)s)")
    add("--kv-cache", choices=("none", "per-loop", "shared"), default="none",
        help="read token by token as in generation, through a KV cache: per-loop (exact), or the last loop's keys and values only")
    add("--exit-threshold", type=number(float, 0), nargs="+", metavar="EPS",
        help="also with a depth of its own for each token: its loop ends, at "
        "the largest --recurrence at the latest, when its prediction changes by less than EPS nats (shared cache, token by token)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the activations (default: auto)")
    return parser.parse_args()

# ----------------------------------------------------------------------------- bits per byte


@torch.no_grad()
def token_losses(model, idx, targets, recurrence, kv_cache="none", until=None):
    """Loss in nats (B, T) of each target, all at once or, with a cache, one token after the other; until: see Settled, for B = 1."""
    if kv_cache == "none":
        logits, _ = model(idx, recurrence=recurrence)
    else:
        cache = KVCache(model.config, *idx.shape, recurrence, idx.device, model.compute_dtype, kv_cache)
        x = torch.cat([model.hidden(token, recurrence, cache=cache, until=until) for token in idx.split(1, dim=1)], dim=1)
        logits = model.lm_head(x).float()
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def text_windows(file, tokenizer, block_size, most):
    """[(idx, targets)] of a text file, one after the other, each (1, T), the last one shorter; no more than `most` of them, and
    no more of the file is read than they need. Raises UserError."""
    tokens = [begin_token(tokenizer)]
    for part in encode(tokenizer, read_text(file)):
        tokens += part.tolist()
        if len(tokens) > most * block_size:
            break
    tokens = torch.tensor([tokens[:most * block_size + 1]])
    if tokens.shape[1] < 2:
        raise UserError(f"--text {file} is empty")
    return [(tokens[:, i:i + block_size][:, :tokens.shape[1] - 1 - i], tokens[:, i + 1:i + 1 + block_size])
            for i in range(0, tokens.shape[1] - 1, block_size)]


def bits_per_byte(model, batches, tokenizer, recurrence, kv_cache, until=None):
    """Rows of val_loss (nats per token), perplexity and bits per byte, one for each number of loops, and the tokens and bytes
    read. batches: an iterable of (idx, targets)."""
    token_bytes = torch.zeros(tokenizer.n_vocab, dtype=torch.int64)  # those that separate texts are none
    for token, i in tokenizer._mergeable_ranks.items():
        token_bytes[i] = len(token)
    nats, tokens, size = torch.zeros(len(recurrence), dtype=torch.float64), 0, 0
    device = model.wte.weight.device
    for idx, targets in batches:
        size += int(token_bytes[targets].sum())
        tokens += targets.numel()
        for i, T in enumerate(recurrence):
            nats[i] += token_losses(model, idx.to(device), targets.to(device), T, kv_cache, until).double().sum().item()
    return [{"recurrence": T, "val_loss": n / tokens, "perplexity": math.exp(n / tokens), "bits_per_byte": n / math.log(2) / size}
            for T, n in zip(recurrence, nats.tolist())], tokens, size

# ----------------------------------------------------------------------------- CORE


def read_task(file, kind):
    """Items of a task, shuffled. Raises UserError that names the file and the line."""
    items = []
    for number_, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                items.append(json.loads(line))
                pairs, gold = options(items[-1], kind, "")
                if not all(isinstance(text, str) for pair in pairs for text in pair):
                    raise TypeError("an option is no text")
                if type(gold) is not int or not 0 <= gold < len(pairs):
                    raise ValueError(f"gold is {gold!r}, must be the number of one of {len(pairs)} options")
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{file} has an item that is not of kind {kind} in line {number_}: {error}") from None
    if not items:
        raise UserError(f"{file} has no items")
    random.Random(1337).shuffle(items)
    return items


def options(item, kind, delimiter):
    """[(context, continuation)] of an item's options, and the number of the right one."""
    if kind == "choice":
        return [(item["query"] + delimiter, choice) for choice in item["choices"]], item["gold"]
    if kind == "schema":
        return [(context + delimiter, item["continuation"]) for context in item["context_options"]], item["gold"]
    return [(item["context"].strip() + delimiter, item["continuation"])], 0


class Item:
    """The token rows of an item's options and, for each, where the scored part starts; the right option."""

    def __init__(self, i, items, kind, shots, delimiter, tokenizer, block_size):
        others = [j for j in range(len(items)) if j != i]
        shown = [options(items[j], kind, delimiter) for j in random.Random(1234 + i).sample(others, min(shots, len(others)))]
        before = "".join("".join(pairs[gold]) + "\n\n" for pairs, gold in shown)
        pairs, self.gold = options(items[i], kind, delimiter)
        encode = lambda text: [begin_token(tokenizer), *tokenizer.encode_ordinary(text)]
        rows = [encode(before + context + continuation) for context, continuation in pairs]
        if kind == "choice":  # what differs comes last
            starts = [shared(rows)] * len(rows)
        elif kind == "schema":  # what differs comes first, the same continuation is scored
            starts = [len(row) - shared([row[::-1] for row in rows]) for row in rows]
        else:
            starts = [shared([encode((before + pairs[0][0]).strip()), rows[0]])]
        cut = max(0, max(map(len, rows)) - block_size - 1)  # a long context loses its beginning, the same for all options
        self.rows = [row[cut:] for row in rows]
        self.starts = [max(1, min(start, len(row) - 1) - cut) for start, row in zip(starts, rows)]  # at least one token counts
        self.prefix = min([shared(self.rows) if len(rows) > 1 else len(rows[0]), *(start - 1 for start in self.starts)])


def shared(rows):
    """Length of the common prefix."""
    return next((i for i, column in enumerate(zip(*rows)) if len(set(column)) > 1), min(map(len, rows)))


@torch.no_grad()
def score(model, items, recurrence):
    """For each item, for each option: (mean loss of the scored part in nats per token, whether greedy decoding gives it).

    The shortest prefix that an item's options share is run once for each item, into a KV cache; the rest of every option
    then reads from it. Options are padded at their ends, which nothing before the padding sees."""
    device, T = model.wte.weight.device, recurrence
    rows = [(i, row[:-1], row[1:], start - 1) for i, item in enumerate(items) for row, start in zip(item.rows, item.starts)]
    n, longest = min(item.prefix for item in items), max(len(inputs) for _, inputs, _, _ in rows)
    cache = KVCache(model.config, len(items), longest, T, device, model.compute_dtype or model.wte.weight.dtype)
    if n:
        model.hidden(torch.tensor([item.rows[0][:n] for item in items], device=device), T, cache=cache)
    cache = cache.rows(torch.tensor([i for i, *_ in rows], device=device))
    idx = torch.tensor([inputs[n:] + [0] * (longest - len(inputs)) for _, inputs, _, _ in rows], device=device)
    x = model.hidden(idx, T, cache=cache)
    results = [[] for _ in items]
    for (i, inputs, targets, start), x_ in zip(rows, x):
        targets = torch.tensor(targets[start:], device=device)
        logits = model.lm_head(x_[start - n:len(inputs) - n]).float()
        results[i].append((F.cross_entropy(logits, targets).item(), bool((logits.argmax(-1) == targets).all())))
    return results


def accuracy(model, items, kind, recurrence, batch_size=32, bar=None):
    """Share of the items (Item) that the model gets right."""
    items = sorted(items, key=lambda item: (item.prefix, max(map(len, item.rows))))  # items of like length side by side
    right, batch = 0, []
    for i, item in enumerate(items):
        batch.append(item)
        if i + 1 == len(items) or sum(len(other.rows) for other in batch) + len(items[i + 1].rows) > batch_size:
            for item_, scores in zip(batch, score(model, batch, recurrence)):
                losses = [loss for loss, _ in scores]
                right += scores[0][1] if kind == "language" else losses.index(min(losses)) == item_.gold
            if bar:
                bar.update(len(batch))
            batch = []
    return right / len(items)


def core(model, tokenizer, folder, recurrence, batch_size, limit):
    """{task: {"items", "baseline", "accuracy": {T: share}, "centered": {T: share}}} of the tasks in the folder."""
    present = {name: Path(folder) / f"{task[0]}.jsonl" for name, task in TASKS.items() if (Path(folder) / f"{task[0]}.jsonl").exists()}
    if not present:
        raise UserError(f"--core {folder} holds none of the tasks, such as {next(iter(TASKS.values()))[0]}.jsonl")
    tasks = {name: read_task(file, TASKS[name][1]) for name, file in present.items()}
    results = {}
    with tqdm(total=sum(len(items[:limit]) for items in tasks.values()) * len(recurrence), unit="item", leave=False, disable=None) as bar:
        for name, items in tasks.items():
            _, kind, shots, delimiter, baseline = TASKS[name]
            bar.set_description(name)
            items = [Item(i, items, kind, shots, delimiter, tokenizer, model.config.block_size) for i in range(len(items))[:limit]]
            right = {T: accuracy(model, items, kind, T, batch_size, bar) for T in recurrence}
            results[name] = {"items": len(items), "baseline": baseline / 100, "accuracy": right,
                             "centered": {T: (a - baseline / 100) / (1 - baseline / 100) for T, a in right.items()}}
    return results


def show_core(results, recurrence):
    """Print the tasks and their mean; returns its name and {T: mean}."""
    print(f"\naccuracy (centred) by loops{'':10s}  items" + "".join(f"{f'T = {T}':>18s}" for T in recurrence))
    for name, task in results.items():
        print(f"{name:35s}  {task['items']:7d}" + "".join(f"{task['accuracy'][T]:9.3f} ({task['centered'][T]:+.3f})" for T in recurrence))
    missing = [name for name in TASKS if name not in results]
    label = "CORE" if not missing else f"mean of {len(results)} of the 22 tasks, not CORE"
    mean = {T: sum(task["centered"][T] for task in results.values()) / len(results) for T in recurrence}
    print(f"{label:44s}" + "".join(f"{'':9s} ({mean[T]:+.3f})" for T in recurrence))
    if missing:
        print("missing:", ", ".join(missing))
    return label, mean

# ----------------------------------------------------------------------------- command line


def main(args):
    keep_freed_memory()
    device = pick_device(args.device)
    source = local_files(args.init_from) if args.init_from else Path(args.run)
    read_config(source)  # a run that is not there is no name on the hub
    model = Parcae.from_pretrained(source).to(device)
    model.compute_dtype = pick_dtype(device, args.dtype)
    tokenizer = load_tokenizer(source)
    settings = read_json(source / "config.json")
    recurrence = args.recurrence if model.config.n_recurrent else [1]
    data = args.text or args.data or settings.get("data")
    if not isinstance(data, str | None):
        raise UserError(f"{source / 'config.json'}: data is {data!r}, must be the name of a directory")
    record = {"kv_cache": args.kv_cache, "dtype": str(model.compute_dtype)}
    if args.text:
        windows = text_windows(args.text, tokenizer, model.config.block_size, args.sequences)
        batches = lambda size: windows
    elif data:
        if (Path(data) / "tokenizer.json").exists() and not same_tokens(load_tokenizer(data), tokenizer):
            raise UserError(f"{data} has other tokens than {source} was trained on")
        loader = Loader(data, "val", model.config.block_size, tokenizer.n_vocab, EVAL_SEED)
        samples = range(min(args.sequences, len(loader)))
        batches = lambda size: map(loader.batch, tqdm([samples[i:i + size] for i in range(0, len(samples), size)], desc="evaluating",
                                                      unit="batch", leave=False, disable=None))
    elif not args.core:
        raise UserError(f"{source} names no data: give --data DIR, --text FILE or --core DIR")
    if data:
        rows, tokens, size = bits_per_byte(model, batches(args.batch_size), tokenizer, recurrence, args.kv_cache)
        print(f"{source} on {tokens:,} tokens ({size:,} bytes) of {data}, KV cache: {args.kv_cache}")
        print("recurrence T   nats per token   perplexity   bits per byte")
        line = "{recurrence:12.4g}   {val_loss:14.4f}   {perplexity:10.3f}   {bits_per_byte:13.4f}"
        for row in rows:
            print(line.format(**row))
        record |= {"data": data, "tokens": tokens, "bytes": size, "results": rows}
        for threshold in args.exit_threshold or ():
            until = Settled(model, threshold)
            row, = bits_per_byte(model, batches(1), tokenizer, [max(recurrence)], "shared", until)[0]
            row |= {"recurrence": sum(until.loops) / len(until.loops), "exit_threshold": threshold, "most": max(recurrence)}
            print(line.format(**row) + f"   exit threshold {threshold:g}: mean of loops used, at most {max(recurrence)}")
            record.setdefault("exit", []).append(row)
    if args.core:
        tasks = core(model, tokenizer, args.core, recurrence, args.batch_size, args.max_per_task)
        label, mean = show_core(tasks, recurrence)
        record["core"] = {"label": label, "mean": mean, "max_per_task": args.max_per_task, "tasks": tasks}
    write_text(source / "eval.json", json.dumps(record, indent=1))


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
