"""Write the looped forward pass yourself: a depth for each row, a gradient for its last loops.

    python docs/blanks/loop.py    says what is still wrong, or that nothing is

Replace the last line of run_loop. `Parcae.forward` in model.py is one answer: look afterwards.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from model import Parcae, ParcaeConfig


def run_loop(one_loop, h, depths, with_gradient):
    """Return the state (B, S, D) after depths[i] loops of row i, from h (B, S, D).

    one_loop(h, rows): the state (n, S, D) of n > 0 rows after one more loop of them; h (n, S, D) is
        their state before, rows (n,) int64 are their numbers in the batch.
    depths: (B,) int64, at least 1.
    with_gradient: of each row only so many of its last loops get a gradient (torch.no_grad).
    Loop rows together, and do not compute a row again that is done."""
    raise NotImplementedError("run_loop is still blank")


# ------------------------------------------------------------------------------- what must hold


def faults(run_loop):
    """Return what is wrong with a run_loop, a list of texts."""
    torch.manual_seed(0)
    config = ParcaeConfig(vocab_size=16, block_size=4, n_embd=8, n_head=1, n_prelude=1,
                          n_recurrent=1, n_coda=0)
    model = Parcae(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    inputs, u, h = model.begin(torch.randint(16, (4, 4)))
    depths, with_gradient = torch.tensor([3, 1, 6, 2]), 2
    looped = []

    def one_loop(h, rows):
        looped.append(len(rows))
        return model.recurrent_pass(h, u[rows], inputs)

    def gradients(state):
        loss = (state * torch.linspace(-1, 1, state.numel()).view_as(state)).sum()
        grads = torch.autograd.grad(loss, list(model.recurrent.parameters()), retain_graph=True)
        return torch.cat([grad.flatten() for grad in grads])

    # each row alone, with nothing clever
    alone = []
    for row, depth in enumerate(depths.tolist()):
        state = h[row:row + 1]
        for t in range(depth):
            with torch.set_grad_enabled(t >= depth - with_gradient):
                state = model.recurrent_pass(state, u[row:row + 1], inputs)
        alone.append(state)
    expected = torch.cat(alone)

    found = run_loop(one_loop, h.clone(), depths, with_gradient)
    if found.shape != expected.shape:
        return [f"the state has shape {tuple(found.shape)}, must be {tuple(expected.shape)}"]
    if not torch.allclose(found, expected):
        wrong = [i for i in range(4) if not torch.allclose(found[i], expected[i])]
        return [f"the state of rows {wrong} is wrong; depths are {depths.tolist()}"]
    must_hold = {
        f"the gradient is not that of each row's last {with_gradient} loops":
            found.requires_grad and torch.allclose(gradients(found), gradients(expected)),
        f"{sum(looped)} loops of a row were computed, {depths.sum()} are needed":
            sum(looped) == depths.sum(),
        "rows loop one by one, not together": len(looped) < depths.sum()}
    return [problem for problem, holds in must_hold.items() if not holds]


if __name__ == "__main__":
    problems = faults(run_loop)
    print("\n".join(problems) or "right: states, gradients and no loop too many")
    sys.exit(1 if problems else 0)
