import json
import math
import random

import pytest
import torch
from conftest import ROOT, save_run, script

import evaluate
from data import load_tokenizer, make_tokenizer, prepare
from model import Parcae


@pytest.fixture
def run(build, tmp_path):
    data = prepare("text", tmp_path / "data", "bytes", [ROOT / "model.py"])
    save_run(build(vocab_size=320), tmp_path / "run", data=str(data))
    (tmp_path / "run" / "tokenizer.json").write_text((data / "tokenizer.json").read_text())
    return tmp_path / "run"


def call(*flags):
    return script("evaluate.py", *flags)


def test_bits_per_byte_and_perplexity(run):
    done = call("--run", run, "--recurrence", 1, 3, "--sequences", 8, "--dtype", "float32")
    assert done.returncode == 0 and "bits per byte" in done.stdout, done.stderr
    saved = json.loads((run / "eval.json").read_text())
    assert [r["recurrence"] for r in saved["results"]] == [1, 3] and saved["tokens"] == 8 * 32
    for r in saved["results"]:
        assert r["perplexity"] == pytest.approx(math.exp(r["val_loss"]))
        assert r["bits_per_byte"] == pytest.approx(r["val_loss"] / math.log(2) * saved["tokens"] / saved["bytes"])
    assert load_tokenizer(run).name == "bytes" and 0 <= saved["tokens"] - saved["bytes"] <= 8


@pytest.mark.parametrize("kv_cache, same", [("per-loop", True), ("shared", False)])
def test_losses_through_the_cache(build, tokens, kv_cache, same):
    model = build().eval()
    model.compute_dtype = torch.float32
    plain, cached = (evaluate.token_losses(model, tokens, tokens, 4, kind) for kind in ("none", kv_cache))
    assert torch.allclose(plain, cached, atol=1e-4) == same
    assert torch.allclose(plain[:, 0], cached[:, 0], atol=1e-4)  # the first token has nothing to share
    once, shared = (evaluate.token_losses(model, tokens, tokens, 1, kind) for kind in ("none", "shared"))
    assert torch.allclose(once, shared, atol=1e-4)  # one loop: nothing to share either


def test_exit_thresholds(run):
    done = call("--run", run, "--recurrence", 4, "--sequences", 3, "--exit-threshold", 0, 1e9, "--dtype", "float32")
    saved = json.loads((run / "eval.json").read_text())
    assert done.returncode == 0 and [row["recurrence"] for row in saved["exit"]] == [4, 2], done.stderr
    assert saved["exit"][0]["val_loss"] != saved["exit"][1]["val_loss"]


def test_mistakes_get_one_line(run, tmp_path):
    for flags, message in ((["--run", "nowhere"], "nowhere holds no model"), (["--run", run, "--recurrence", 0], "--recurrence is 0"),
                           (["--run", run, "--data", tmp_path / "none"], "has no val_")):
        done = call(*flags)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


# ------------------------------------------------------------------ CORE


def made_up(kind, n=40, seed=0):
    """Items of a kind, with words of one byte-pair alphabet."""
    rng = random.Random(seed)
    word = lambda: "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 5)))
    text = lambda: " ".join(word() for _ in range(rng.randint(1, 4)))
    if kind == "choice":
        return [{"query": f"q {text()}", "choices": [f"{c} {text()}" for c in "wxyz"], "gold": rng.randrange(4)} for _ in range(n)]
    if kind == "schema":
        return [{"context_options": [f"{text()} {c}" for c in "xy"], "continuation": text(), "gold": rng.randrange(2)} for _ in range(n)]
    return [{"context": f"c {text()} ", "continuation": text()} for _ in range(n)]


TOKENIZER = make_tokenizer("bytes")
KINDS = pytest.mark.parametrize("kind, shots", [("choice", 0), ("choice", 2), ("schema", 1), ("language", 2)])


def items_of(kind, shots, block_size, items=None):
    items = items or made_up(kind)
    return [evaluate.Item(i, items, kind, shots, " ", TOKENIZER, block_size) for i in range(len(items))]


@KINDS
def test_prompts(kind, shots):
    """Examples drawn from the other items, separated by blank lines, then the options; what is scored is the continuation."""
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
            contexts, ends, scored = [items[i]["query"]] * 4, items[i]["choices"], items[i]["choices"]
        elif kind == "schema":
            contexts, ends = items[i]["context_options"], [items[i]["continuation"]] * 2
            scored = [" " + items[i]["continuation"]] * 2
        else:
            contexts, ends = [items[i]["context"].strip()], [items[i]["continuation"]]
            scored = [" " + items[i]["continuation"]]
        for row, start, context, end, part in zip(item.rows, item.starts, contexts, ends, scored):
            assert row[0] == TOKENIZER.eot_token and TOKENIZER.decode(row[1:]) == f"{before}{context} {end}"
            assert TOKENIZER.decode(row[start:]) == part


@KINDS
@pytest.mark.parametrize("block_size", [48, 512])
def test_batched_cached_and_cropped_scores_are_those_of_single_rows(build, kind, shots, block_size):
    model = build(vocab_size=257, block_size=block_size, value_embeds=True).eval()
    items = items_of(kind, shots, block_size)
    assert block_size > 48 or shots == 0 or any(len(row) == block_size + 1 for item in items for row in item.rows)
    batched = evaluate.score(model, items[:20], 3)
    for item, scores in zip(items, batched):
        for row, start, (loss, right) in zip(item.rows, item.starts, scores):
            logits = model(torch.tensor([row[:-1]]), recurrence=3)[0][0, start - 1:]
            targets = torch.tensor(row[start:])
            assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)
            assert right == bool((logits.argmax(-1) == targets).all())


class Oracle(Parcae):
    """Knows the rows it is given: wherever it has read the beginning of one, all its probability is on how that goes on."""

    def hidden(self, idx, recurrence=None, depths=None, cache=None):
        B, T = idx.shape
        seen = cache.kv[0, 0, :, 0, :, 0]  # what it read, kept where a model keeps its keys
        seen[:, cache.pos:cache.pos + T] = idx
        logits = torch.zeros(B, T, self.config.vocab_size)
        for b in range(B):
            for t in range(T):
                prefix = tuple(seen[b, :cache.pos + t + 1].long().tolist())
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
    oracle.next = {tuple(item.rows[item.gold][:n]): item.rows[item.gold][n]
                   for item in items_of(kind, shots, 256, items) for n in range(1, len(item.rows[item.gold]))}
    right = lambda model: evaluate.accuracy(model, items_of(kind, shots, 256, items), kind, 2)
    assert right(oracle) == 1
    chance = {"choice": 0.25, "schema": 0.5, "language": 0}[kind]
    assert right(build(vocab_size=257, block_size=256).eval()) == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 160) ** 0.5)


def test_the_22_tasks():
    assert len(evaluate.TASKS) == 22
    assert sum(kind == "schema" for _, kind, *_ in evaluate.TASKS.values()) == 2
    assert all(baseline == 0 for _, kind, _, _, baseline in evaluate.TASKS.values() if kind == "language")


def test_core_from_the_command_line(run, tmp_path):
    folder = tmp_path / "eval_data" / "commonsense_reasoning"
    folder.mkdir(parents=True)
    (folder / "copa.jsonl").write_text("".join(json.dumps(item | {"choices": item["choices"][:2], "gold": item["gold"] % 2}) + "\n"
                                               for item in made_up("choice", 9)))
    done = call("--run", run, "--recurrence", 1, 2, "--sequences", 2, "--core", folder.parent, "--max-per-task", 7)
    assert done.returncode == 0, done.stderr
    assert "mean of 1 of the 22 tasks, not CORE" in done.stdout and "missing: hellaswag_zeroshot, jeopardy" in done.stdout
    saved = json.loads((run / "eval.json").read_text())["core"]
    task = saved["tasks"]["copa"]
    assert task["items"] == 7 and task["accuracy"].keys() == {"1", "2"}
    assert task["centered"]["2"] == pytest.approx(2 * task["accuracy"]["2"] - 1) == pytest.approx(saved["mean"]["2"])
    (folder / "copa.jsonl").write_text('{"query": "x"}\n')
    for flags, message in ((["--core", folder.parent], "copa.jsonl has an item that is not of kind choice"),
                           (["--core", tmp_path], "holds none of the tasks")):
        done = call("--run", run, "--sequences", 2, "--recurrence", 1, *flags)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_text_file_is_read_whole(run, tmp_path):
    (tmp_path / "t.txt").write_text("Grüße, " * 30)
    done = call("--run", run, "--text", tmp_path / "t.txt", "--recurrence", 2)
    saved = json.loads((run / "eval.json").read_text())
    assert done.returncode == 0 and saved["bytes"] == saved["tokens"] == len(("Grüße, " * 30).encode())
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe")
    done = call("--run", run, "--text", tmp_path / "t.txt")
    assert done.returncode == 2 and "is not UTF-8" in done.stderr
