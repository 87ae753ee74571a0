"""The published optimiser: four steps on given matrices, and the parts of a step."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from parts.muon import POLAR_EXPRESS, Muon, momentum_at, orthogonalise

PARITY = json.loads((Path(__file__).parent / "muon.json").read_text())


def fill(name, shape, scale):
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.tensor(scale * values, dtype=torch.float32)


@pytest.mark.parametrize("products, close", [(torch.bfloat16, 0.03), (torch.float32, 0.25)])
def test_four_steps_of_the_published_optimiser(products, close):
    """Theirs are in bfloat16. `close`: of the size of a middling update of an entry."""
    for case in PARITY["cases"]:
        shape = case["shape"]
        params = [torch.nn.Parameter(fill("w" + n, shape, 0.05)) for n in case["names"]]
        optimizer = Muon(params, lr=0.02, products=products)
        for step, expected in enumerate(case["steps"]):
            before = [p.detach().clone() for p in params]
            for name, p in zip(case["names"], params):
                p.grad = fill(f"g{step}{name}", shape, 0.01) + fill("const" + name, shape, 0.002)
            (group,) = optimizer.param_groups  # one shape is one group
            group |= {"momentum": momentum_at(step), "weight_decay": 0.2 * (1 - step / 10)}
            optimizer.step()
            for p, old, theirs in zip(params, before, expected):
                assert p.norm().item() == pytest.approx(theirs["norm"], rel=1e-3)
                assert (p - old).norm().item() == pytest.approx(theirs["update_norm"], rel=0.02)
                middling = theirs["update_norm"] / p.numel() ** 0.5
                row = torch.tensor(theirs["first_row"])
                assert (p[0, : len(row)] - row).abs().max() < close * middling, (shape, step)


def test_the_momentum_rises_over_300_steps():
    assert [momentum_at(step) for step in (0, 150, 300, 10_000)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95])


@pytest.mark.parametrize("shape", [(3, 48, 32), (3, 32, 48), (1, 32, 32)])
def test_all_directions_of_a_matrix_become_alike(shape):
    X = orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.float32)
    singular = torch.linalg.svdvals(X)
    assert len(POLAR_EXPRESS) == 5 and 0.7 < singular.min() and singular.max() < 1.2


def test_weights_decay_only_where_the_update_shrinks_them():
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    changes = []
    for decay in (0, 0.5):
        with torch.no_grad():
            p.fill_(1)
        Muon([p], lr=0.1, weight_decay=decay).step()
        changes.append(p.detach() - 1)
    shrinks = changes[0] < 0
    torch.testing.assert_close(changes[1] - changes[0], -0.05 * shrinks.float())


def test_matrices_of_one_shape_do_not_see_each_other():
    params = [torch.nn.Parameter(fill(f"w{i}", shape, 1)) for i, shape in
              enumerate([(8, 4), (4, 8), (8, 4)])]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for i, (p, one) in enumerate(zip(params, alone)):
        p.grad = one.grad = fill(f"g{i}", p.shape, 1)
        Muon([one], products=torch.float32).step()
    Muon(params, products=torch.float32).step()
    for p, one in zip(params, alone):
        torch.testing.assert_close(p, one, rtol=0, atol=1e-6)
