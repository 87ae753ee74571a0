"""CORE: prompts, scores and the table, against scoring written out."""

import json
import random

import pytest
import torch
from conftest import save_run, script

from data import make_tokenizer
from model import Parcae
from tools import core


def call(*flags):
    return script("tools/core.py", *flags)


def made_up(kind, n=40, seed=0):
    """Items of a kind, with words of one byte-pair alphabet."""
    rng = random.Random(seed)
    word = lambda: "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 5)))
    text = lambda: " ".join(word() for _ in range(rng.randint(1, 4)))
    if kind == "choice":
        return [
            {
                "query": f"q {text()}",
                "choices": [f"{c} {text()}" for c in "wxyz"],
                "gold": rng.randrange(4),
            }
            for _ in range(n)
        ]
    if kind == "schema":
        return [
            {
                "context_options": [f"{text()} {c}" for c in "xy"],
                "continuation": text(),
                "gold": rng.randrange(2),
            }
            for _ in range(n)
        ]
    return [{"context": f"c {text()} ", "continuation": text()} for _ in range(n)]


TOKENIZER = make_tokenizer("bytes")
KINDS = pytest.mark.parametrize(
    "kind, shots", [("choice", 0), ("choice", 2), ("schema", 1), ("language", 2)]
)


def items_of(kind, shots, block_size, items=None):
    items = [core.options(item, kind, " ") for item in items or made_up(kind)]
    return [core.make_question(i, items, kind, shots, TOKENIZER, block_size)
            for i in range(len(items))]


@KINDS
def test_prompts(kind, shots):
    """Examples drawn from the other items, separated by blank lines, then the options; what is
    scored is the continuation."""
    items = made_up(kind, 6)
    for i, item in enumerate(items_of(kind, shots, 4096, items)):
        shown = random.Random(1234 + i).sample([j for j in range(6) if j != i], shots)
        before = ""
        for other in (items[j] for j in shown):
            if kind == "choice":
                before += f"{other['query']} {other['choices'][other['gold']]}\n\n"
            elif kind == "schema":
                before += f"{other['context_options'][other['gold']]} {other['continuation']}\n\n"
            else:
                before += f"{other['context'].strip()} {other['continuation']}\n\n"
        if kind == "choice":
            contexts, ends, scored = (
                [items[i]["query"]] * 4,
                items[i]["choices"],
                items[i]["choices"],
            )
        elif kind == "schema":
            contexts, ends = items[i]["context_options"], [items[i]["continuation"]] * 2
            scored = [" " + items[i]["continuation"]] * 2
        else:
            contexts, ends = [items[i]["context"].strip()], [items[i]["continuation"]]
            scored = [" " + items[i]["continuation"]]
        for row, start, context, end, part in zip(item.rows, item.starts, contexts, ends, scored):
            assert (
                row[0] == TOKENIZER.eot_token
                and TOKENIZER.decode(row[1:]) == f"{before}{context} {end}"
            )
            assert TOKENIZER.decode(row[start:]) == part


@KINDS
@pytest.mark.parametrize("block_size", [48, 512])
def test_batched_cached_and_cropped_scores_are_those_of_single_rows(build, kind, shots, block_size):
    model = build(vocab_size=257, block_size=block_size, value_embeds=True).eval()
    items = items_of(kind, shots, block_size)
    assert (
        block_size > 48
        or shots == 0
        or any(len(row) == block_size + 1 for item in items for row in item.rows)
    )
    batched = core.score(model, items[:20], 3)
    for item, scores in zip(items, batched):
        for row, start, (loss, right) in zip(item.rows, item.starts, scores):
            logits = model(torch.tensor([row[:-1]]), recurrence=3)[0][0, start - 1 :]
            targets = torch.tensor(row[start:])
            assert loss == pytest.approx(
                torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-4
            )
            assert right == bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("longer", [0, 47, 60])
def test_options_of_very_different_length_lose_their_own_beginnings(build, longer):
    model = build(vocab_size=257, block_size=48).eval()
    items = [{"query": "q", "choices": ["yes", "y" * (longer + 4)], "gold": 0}]
    item, = items_of("choice", 0, 48, items)
    assert [len(row) for row in item.rows] == [6, min(49, longer + 7)]
    for row, start in zip(item.rows, item.starts):
        assert 1 <= start < len(row)
    (short, _), (long, _) = core.score(model, [item], 2)[0]
    logits = model(torch.tensor([item.rows[1][:-1]]), recurrence=2)[0][0, item.starts[1] - 1:]
    targets = torch.tensor(item.rows[1][item.starts[1]:])
    expected = torch.nn.functional.cross_entropy(logits, targets)
    assert long == pytest.approx(expected.item(), rel=1e-4) and short > 0


class Oracle(Parcae):
    """Knows the rows it is given: wherever it has read the beginning of one, all its probability is
    on how that goes on."""

    def hidden(self, idx, recurrence, cache):
        B, T = idx.shape
        seen = cache.pair_of(0)[0][:, 0, :, 0]  # what it read, kept where a model keeps its keys
        seen[:, cache.pos : cache.pos + T] = idx
        logits = torch.zeros(B, T, self.config.vocab_size)
        for b in range(B):
            for t in range(T):
                prefix = tuple(seen[b, : cache.pos + t + 1].long().tolist())
                if prefix in self.next:
                    logits[b, t, self.next[prefix]] = 20
        cache.pos += T
        return logits


@KINDS
def test_an_oracle_scores_one_and_an_untrained_model_like_chance(build, kind, shots):
    items = made_up(kind, 160)
    config = build(vocab_size=257, block_size=256).config
    oracle = Oracle(config)
    oracle.lm_head = torch.nn.Identity()
    oracle.next = {
        tuple(item.rows[item.gold][:n]): item.rows[item.gold][n]
        for item in items_of(kind, shots, 256, items)
        for n in range(1, len(item.rows[item.gold]))
    }
    right = lambda model: core.accuracy(model, items_of(kind, shots, 256, items), kind, 2)
    assert right(oracle) == 1
    chance = {"choice": 0.25, "schema": 0.5, "language": 0}[kind]
    assert right(build(vocab_size=257, block_size=256).eval()) == pytest.approx(
        chance, abs=4 * (chance * (1 - chance) / 160) ** 0.5
    )


def grows(build, **config):
    """A model whose state overflows float32 in some 64 loops, and stays finite in one."""
    model = build(injection="concat", **config).eval()
    with torch.no_grad():
        model.injection.W.mul_(100)
    return model


@pytest.mark.parametrize("gold, share", [(0, 1 / 3), (1, 0), (2, 1 / 3), (3, 1 / 3)])
def test_options_that_tie_share_the_point(gold, share):
    rows, starts = [[9, 1], [9, 2, 2], [9, 3], [9, 3]], [1, 1, 1, 1]
    question = core.Question(rows, starts, gold, cut=False)
    # the last two are the same tokens, whatever rounding makes of them
    scores = [(2 * (1 + 1e-7), False), (2.1, True), (2.0, False), (2.5, False)]
    assert core.credit(question, scores) == share
    assert core.credit(question, [(1.9, False), *scores[1:]]) == (gold == 0)


def test_items_that_are_the_same_once_they_are_cut_score_like_chance(build):
    """The options of each differ in what the context loses alone."""
    model = build(vocab_size=257, block_size=32).eval()
    tail = " did not fit into the suitcase because it was far too large for it"
    items = [{"context_options": ["The trophy", "The suitcase"], "continuation": tail, "gold": gold}
             for gold in (0, 0, 0, 1)]
    questions = items_of("schema", 0, 32, items)
    assert all(question.cut for question in questions)
    assert [core.accuracy(model, questions, "schema", T, batch_size=6) for T in (1, 4)] == [.5, .5]
    assert not any(question.cut for question in items_of("schema", 0, 512, items))


def test_the_22_tasks():
    assert len(core.TASKS) == 22
    assert sum(kind == "schema" for _, kind, *_ in core.TASKS.values()) == 2
    assert all(
        baseline == 0 for _, kind, _, _, baseline in core.TASKS.values() if kind == "language"
    )


def test_core_from_the_command_line(run, build, tmp_path):
    folder = tmp_path / "eval_data" / "commonsense_reasoning"
    folder.mkdir(parents=True)
    (folder / "copa.jsonl").write_text(
        "".join(
            json.dumps(item | {"choices": item["choices"][:2], "gold": item["gold"] % 2}) + "\n"
            for item in made_up("choice", 9)
        )
    )
    done = call(folder.parent, "--run", run, "--recurrence", 1, 2, "--max-per-task", 7)
    assert done.returncode == 0, done.stderr
    assert (
        "mean of 1 of the 22 tasks, not CORE" in done.stdout
        and "missing: hellaswag_zeroshot, jeopardy" in done.stdout
    )
    saved = json.loads((run / "core.json").read_text())
    task = saved["tasks"]["copa"]
    assert saved["step"] is None and saved["sequences"] == 7
    assert saved["text"]["source"] == str(folder.parent)
    assert task["items"] == 7 and task["accuracy"].keys() == {"1", "2"}
    assert (
        task["centered"]["2"]
        == pytest.approx(2 * task["accuracy"]["2"] - 1)
        == pytest.approx(saved["mean"]["2"])
    )
    for length, cut in ((5, 0), (80, 1)):
        items = [{"query": "q", "choices": ["a", "b" * n], "gold": 0} for n in (5, length, 5)]
        (folder / "copa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        done = call(folder.parent, "--run", run, "--recurrence", 1)
        said = f"{cut} of 3 items are longer than the model's context and lost their beginnings"
        assert (said in done.stdout) == (cut > 0) == ("lost their" in done.stdout)
        before, saved = saved, json.loads((run / "core.json").read_text())
        assert saved["tasks"]["copa"]["cut"] == cut
        assert saved["text"]["sha256"] != before["text"]["sha256"]
    before = (run / "core.json").read_text()
    save_run(grows(build, vocab_size=320), run)
    done = call(folder.parent, "--run", run, "--recurrence", 1, 64)
    assert done.returncode == 2 and "is not finite" in done.stderr and done.stderr.count("\n") == 1
    assert (run / "core.json").read_text() == before
    (folder / "copa.jsonl").write_text('{"query": "x"}\n')
    for where, message in (
        (folder.parent, "copa.jsonl has an item that is not of kind choice"),
        (tmp_path, "holds none of the tasks"),
    ):
        done = call(where, "--run", run, "--recurrence", 1)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
