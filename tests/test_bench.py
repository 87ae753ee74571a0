import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import cache_bytes, script

import bench
from model import PRESETS, KVCache, Parcae, ParcaeConfig
from parts.footprint import counting
from runs.memory import break_even

SMALL = ParcaeConfig(
    vocab_size=256,
    block_size=64,
    n_embd=64,
    n_head=2,
    n_prelude=1,
    n_recurrent=2,
    n_coda=1,
    value_embeds=True,
)
TINY = replace(SMALL, vocab_size=64, n_embd=16, n_head=1, n_recurrent=1, mean_recurrence=2)


CPU = torch.device("cpu")
FLAGS = SimpleNamespace(context=8, batch=1, rounds=1, device=CPU, dtype=torch.float32,
                        compile=False, eager=False)


@pytest.fixture(scope="module")
def cases():
    """What parcae-140m is compared with, by name."""
    config = ParcaeConfig(**PRESETS["parcae-140m"])
    return {case.name: case.config for case in bench.cases_of(config, [8])}


def test_cases_are_what_they_are_called(cases):
    size = {name: bench.parameters(config) for name, config in cases.items()}
    assert size["plain, same parameters"] == pytest.approx(size["looped"], rel=0.02)
    assert size["plain, twice the parameters"] == pytest.approx(2 * size["looped"], rel=0.1)
    flops = []
    for name in ("looped", "plain, depth of T = 8"):
        with torch.device("meta"):
            flops.append(Parcae(cases[name]).flops_per_token(backprop_depth=0))
    assert flops[1] == pytest.approx(flops[0], rel=0.02)
    assert all(config.n_embd == 768 for config in cases.values())


@pytest.mark.parametrize("recurrence", [1, 5])
def test_caches_take_the_predicted_memory(recurrence):
    cache = KVCache(SMALL, 3, 64, recurrence, "cpu", torch.bfloat16)
    assert cache_bytes(cache) == 3 * bench.kv_bytes(SMALL, 64, recurrence)
    shared = KVCache(SMALL, 3, 64, recurrence, "cpu", torch.bfloat16, "shared")
    assert cache_bytes(shared) == 3 * bench.kv_bytes(SMALL, 64, 1)


def replace_flags(**flags):
    return SimpleNamespace(**vars(FLAGS) | flags)


@pytest.fixture
def clock(monkeypatch):
    """Every run takes as long as its kind does; the machine has round numbers."""
    seconds = {"training": 0.5, "decode": 4.0}
    monkeypatch.setattr(bench, "alternate", lambda runs, rounds, device, what: [
        [seconds[what]] * 3 for _ in runs])
    monkeypatch.setattr(bench, "bandwidth", lambda device: 1e6)
    monkeypatch.setattr(bench.machine, "matmul_peak", lambda device, dtype: 1e9)


def test_speeds_are_of_their_tokens_and_limits_of_all_that_is_read(clock):
    config, cases = TINY, bench.cases_of(TINY, [3])
    rows = bench.decode_speed(cases, replace_flags(context=24))
    row, model = rows[0], bench.build(config, CPU)
    assert row["tokens/s"] == 16 / 4
    loop = sum(p.numel() for p in model.recurrent.parameters() if p.ndim == 2)
    matrices = [p for p in model.parameters() if p.ndim == 2]  # the head is the embedding
    once = sum(p.numel() for p in matrices) - loop
    once -= sum(p.numel() for p in model.value_embeds.parameters())  # looked up
    read = 4 * (once + 3 * loop) + bench.kv_bytes(config, 24, 3, 4)
    assert row["memory limit"] == pytest.approx(1e6 / read)
    flops = model.flops_per_token(3, 0, context=24)
    assert row["compute limit"] == pytest.approx(1e9 / flops)
    assert row["share of limit"] == pytest.approx(4 * max(flops / 1e9, read / 1e6))

    rows = bench.train_speed(cases, replace_flags(context=16, batch=5))
    assert all(row["tokens/s"] == 5 * 16 / 0.5 for row in rows)
    assert rows[1]["model"] == cases[1].name
    plain = bench.build(cases[1].config, CPU)
    share = 160 * plain.flops_per_token(1, 1, context=16) / 1e9
    assert rows[1]["share of peak"] == pytest.approx(share)


def test_bytes_are_counted_while_they_exist():
    with counting() as held:
        x = torch.empty(7, 30)
        assert held.now == x.nbytes == held.most
        y = x.view(30, 7).t() + 1  # a view takes nothing
        z = y.exp()
        del y
    assert held.now == 2 * z.nbytes and held.most == 3 * z.nbytes
    del x, z
    assert held.now == 0


def test_fused_kernels_keep_their_inputs_and_a_number_for_each_row():
    with counting() as held:
        x = torch.empty(2, 3, 64, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(16, dtype=torch.bfloat16)
        before = held.now
        y = F.rms_norm(x, (16,), weight)
        assert held.now - before == pytest.approx(y.nbytes, rel=0.26)
        before = held.now
        attended = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        assert held.now - before == pytest.approx(attended.nbytes + 2 * 3 * 64 * 4, abs=32)
        attended.sum().backward()
    assert x.grad.shape == x.shape


def test_activations_depend_on_the_loops_with_a_gradient():
    def kept(loops, depth):
        config = replace(SMALL, mean_recurrence=loops, backprop_depth=depth)
        return bench.memory_of(bench.Case("looped", config, loops), replace_flags(context=64))

    three, more, deep = kept(9, 3), kept(64, 3), kept(9, 5)
    assert more["activations"] == pytest.approx(three["activations"], rel=0.01)
    layer = (deep["activations"] - three["activations"]) / 2 / SMALL.n_recurrent
    # a layer keeps two inputs and two outputs of norms, q and k twice, v, what attention returns,
    # and two activations of the MLP, four times as wide; each second layer the injection's state
    assert layer * 1e6 == pytest.approx((10 + 2 * 4 + 0.5) * 64 * 64 * 4, rel=0.02)
    assert three["most held"] > three["activations"] + 12 * three["parameters"] / 1e6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_what_was_counted():
    config = ParcaeConfig(**PRESETS["parcae-micro"])
    row = bench.memory_of(bench.Case("looped", config, 8), replace_flags(
        context=256, batch=16, device=torch.device("cuda"), dtype=torch.bfloat16))
    assert row["most held"] == pytest.approx(row["measured"], rel=0.05)


def test_break_even_is_where_both_take_the_same(cases):
    config, double = cases["looped"], cases["plain, twice the parameters"]
    tokens = break_even(config, double)
    looped = 2 * bench.parameters(config) + tokens * bench.kv_bytes(config, 1, 8)
    assert looped == pytest.approx(
        2 * bench.parameters(double) + tokens * bench.kv_bytes(double, 1, 1)
    )


def test_runs_alternate_after_a_warm_up():
    order = []
    seconds = bench.alternate(
        [lambda name=name: order.append(name) for name in "ab"], 3, CPU, ""
    )
    assert order == list("ab") * 4 and [len(s) for s in seconds] == [3, 3]


def test_mistakes_get_one_line():
    for flags, message in (
        (["--preset", "gpt-nano"], "--preset is 'gpt-nano', must be one of 'parcae-140m'"),
        (["--recurrence", "0"], "--recurrence is 0"),
        (["--context", "0"], "--context is 0"),
        (["--only", "memory", "--rounds", "2", "--compile"], "leave out --rounds, --compile"),
        (["--only", "decode", "--batch", "2"], "leave out --batch"),
        (["--eager", "--device", "cpu"], "--eager is for a GPU"),
    ):
        run = script("bench.py", *flags)
        assert run.returncode == 2 and message in run.stderr and run.stderr.count("\n") == 1


@pytest.fixture
def tiny_preset(monkeypatch):
    """The preset parcae-nano, with a vocabulary that takes no time."""
    monkeypatch.setitem(PRESETS["parcae-nano"], "vocab_size", 256)


def test_every_table_is_printed(tiny_preset):
    run = script("bench.py", "--preset", "parcae-nano", "--context", 8, "--rounds", 2,
                 "--recurrence", 2, "--device", "cpu", "--batch", 2)
    assert run.returncode == 0, run.stderr
    for words in (
        "Memory in MB",
        "Training",
        "Generation",
        "plain, twice the parameters",
    ):
        assert words in run.stdout
    memory, _, speed = run.stdout.partition("\nTraining")
    assert "shared cache" in memory and "%" not in memory and "%" in speed
    rows = [re.findall(r"  ([\d,]+\.\d)", line) for line in speed.split("\n")]
    rows = [[float(n.replace(",", "")) for n in row[:3]] for row in rows if len(row) in (3, 5)]
    assert len(rows) == 8 and all(least <= middle <= most for middle, least, most in rows)
