import json

import pytest
import torch
from conftest import script

from parts.quantize import FEW, Int8Linear, prepare_weights


@pytest.mark.parametrize("n_in, n_out", [(32, 5), (64, 96), (36, 8), (10, 7)])
def test_a_product_of_few_rows_is_that_of_many(n_in, n_out):
    """Widths that PyTorch's kernel would read beyond the end of, too."""
    torch.manual_seed(0)
    weight, x = torch.randn(n_out, n_in), torch.randn(2 * FEW, n_in).bfloat16()
    linear = Int8Linear(weight)
    scale = linear.scale.float().unsqueeze(1)
    error = (linear.weight.float() * scale - weight) / scale
    assert (error.abs() <= 0.5001).all()  # half a step, at most
    many = linear(x)
    few = torch.cat([linear(rows) for rows in x.split(FEW // 2)])
    right = x.float() @ (linear.weight.float() * scale).T
    for product in (many, few):
        assert (product - right).norm() < 0.01 * right.norm()
    assert linear(x.view(2, FEW, n_in)).shape == (2, FEW, n_out)


def test_a_row_of_zeros_stays_zero():
    linear = Int8Linear(torch.zeros(2, 32))
    assert (linear(torch.ones(1, 32).bfloat16()) == 0).all()


def test_a_model_of_8_bits_says_nearly_the_same_and_costs_as_much(build, tokens):
    model = build(value_embeds=True).eval()
    flops = model.flops_per_token(8)
    with torch.no_grad():
        right = model(tokens, recurrence=8)[0]
        embedding = model.wte.weight.clone()
        prepare_weights(model, "cpu", torch.int8)
        logits = model(tokens, recurrence=8)[0]
    assert (logits - right).norm() < 0.05 * right.norm()
    assert model.flops_per_token(8) == flops
    assert model.lm_head.weight.dtype == torch.int8
    assert torch.equal(model.wte.weight, embedding.bfloat16())  # tied to the head no more


def test_scripts_take_int8(run):
    losses = {}
    for dtype in ("float32", "int8"):
        done = script("tools/evaluate.py", "--run", run, "--dtype", dtype, "--sequences", 8,
                      "--recurrence", 4)
        assert done.returncode == 0, done.stderr
        record = json.loads((run / "eval.json").read_text())
        assert record["weights"] == f"torch.{dtype}"
        losses[dtype] = record["results"][0]["val_loss"]
    assert abs(losses["int8"] - losses["float32"]) < 0.02
    for flags in ((), ("--draft", 1), ("--samples", 20), ("--exit-threshold", 0.1)):
        done = script("sample.py", "--run", run, "--dtype", "int8", "--tokens", 8, *flags)
        assert done.returncode == 0, done.stderr
    done = script("bench.py", "--dtype", "int8")
    assert done.returncode == 2 and "--only decode" in done.stderr
