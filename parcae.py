"""A looped transformer, all of it: model, optimiser, data, training, evaluation, a sample.

    python parcae.py

Its middle layers run several times with the same weights. This file needs torch alone, and trains
the model of `python train.py`; model.py is the same model with a cache, other injections, checks.
"§" and "eq.": of "Parcae: Scaling Laws For Stable Looped Language Models", arXiv 2604.12946.

    e       = Norm(prelude(tokens))              once
    h_0     = noise                              in training; zero afterwards
    h_{t+1} = block(A_bar * h_t + dt * B e)      T times, 0 < A_bar < 1 (eq. 3)
    logits  = head(Norm(coda(C h_T)))            once

In comments B sequences (batch) have S tokens, D channels, H heads; V is the vocabulary.
"""

import math
import sysconfig
import time
import zlib
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

D, H, CONTEXT, VOCAB = 64, 2, 256, 320  # tokens: 256 bytes, 256 for "a text begins", 63 unused
PRELUDE, LOOP, CODA = 1, 2, 1  # layers
MEAN_LOOPS, GRADIENT_LOOPS = 4, 2  # mean of T in training; the last loops, which get a gradient
BATCH, STEPS, RATE, DECAY = 16, 1200, 8e-3, 0.2  # §4.2, appendix E
EPS, SIGMA = 1e-5, math.sqrt(2 / (5 * D))  # SIGMA: of the noise, and of most weights at the start
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ------------------------------------------------------------ a layer, as any transformer has it

# rotary positions: pairs of channels turn by angles that grow with the position
ANGLE = torch.outer(torch.arange(CONTEXT), 50_000 ** -(torch.arange(0, D // H, 2) / (D // H)))
ROPE = torch.complex(ANGLE.cos(), ANGLE.sin())[:, None].to(DEVICE)          # (CONTEXT, 1, D/H / 2)
linear = partial(nn.Linear, bias=False)


def rotate(x):
    """Return x (B, S, H, D/H) with (x0, x1), (x2, x3), ... turned as complex numbers."""
    pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * ROPE[:x.shape[1]]).flatten(-2)


class Layer(nn.Module):
    def __init__(self, has_table):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(D, EPS), nn.RMSNorm(D, EPS)
        self.q, self.k, self.v, self.out = (linear(D, D) for _ in range(4))
        self.up, self.down = linear(D, 4 * D), linear(4 * D, D)
        # value embeddings: a second vector for each token, and a gate for each head
        self.table, self.gate = None, None
        if has_table:
            self.table, self.gate = nn.Embedding(VOCAB, D), linear(32, H)

    def forward(self, x, idx):
        """Return x (B, S, D) and what the layer adds to it; idx (B, S): the tokens."""
        # attention
        y = self.norm_1(x)
        q, k, v = (f(y).view(*idx.shape, H, -1) for f in (self.q, self.k, self.v))  # (B, S, H, D/H)
        if self.table:
            gate = 2 * torch.sigmoid(self.gate(y[..., :32]))                            # (B, S, H)
            v = v + gate[..., None] * self.table(idx).view_as(v)
        q, k = (F.rms_norm(rotate(z), z.shape[-1:], eps=2 ** -23) for z in (q, k))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))                           # (B, H, S, D/H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        # MLP
        return x + self.down(F.relu(self.up(self.norm_2(x))).square()) / 2

# ------------------------------------------------------------ the loop


class Parcae(nn.Module):
    def __init__(self):
        super().__init__()
        count = PRELUDE + LOOP + CODA
        layers = [Layer(has_table=i % 2 == 1 or i == count - 1) for i in range(count)]
        self.embedding = nn.Embedding(VOCAB, D)
        self.prelude = nn.ModuleList(layers[:PRELUDE])
        self.block = nn.ModuleList(layers[PRELUDE:PRELUDE + LOOP])
        self.coda = nn.ModuleList(layers[PRELUDE + LOOP:])
        self.norm_prelude, self.norm_coda = nn.RMSNorm(D, EPS), nn.RMSNorm(D, EPS)
        self.log_A = nn.Parameter(torch.zeros(D))
        self.dt_bias = nn.Parameter(torch.full((D,), math.log(5 ** 0.5 - 1)))  # A_bar = 5 ** -0.5
        self.B, self.C = nn.Parameter(torch.eye(D)), linear(D, D)
        # the start: each layer adds nothing yet; matrices are orthogonal
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(p)
            elif name.endswith("gate.weight"):
                nn.init.uniform_(p, -32 ** -0.5, 32 ** -0.5)
            elif p.ndim == 2 and not name.endswith(("table.weight", "B")):
                nn.init.orthogonal_(p, gain=SIGMA * max(p.shape) ** 0.5)

    def run(self, layers, x, idx):
        for layer in layers:
            x = layer(x, idx)
        return x

    def read(self, idx):
        """Return u = dt * B e (B, S, D) of tokens idx (B, S): what every loop adds to the state."""
        e = self.norm_prelude(self.run(self.prelude, self.embedding(idx), idx))
        return F.linear(e, self.B) * F.softplus(self.dt_bias.float()).to(e.dtype)

    def loop(self, h, u, idx):
        """Return the state (B, S, D) after one more loop: eq. 3, the paper's contribution.

        A = -exp(log_A) is negative whatever is learned, so each of the D factors A_bar =
        exp(dt * A) lies between 0 and 1: a loop shrinks the old state before it adds to it. With
        A_bar = 1, "h + e", the state can grow from loop to loop."""
        A_bar = torch.exp(-F.softplus(self.dt_bias.float()) * self.log_A.float().exp())
        return self.run(self.block, A_bar.to(h.dtype) * h + u, idx)

    def predict(self, h, idx):
        """Return the logits (B, S, V) of a state h (B, S, D). The head is the embedding."""
        return F.linear(self.norm_coda(self.run(self.coda, self.C(h), idx)), self.embedding.weight)

    def loop_rows(self, h, u, idx, depths):
        """Return the state after depths[i] more loops of sequence i, the largest of them first."""
        for t in range(depths[0]):
            n = int((depths > t).sum())  # sequences that still loop
            h = torch.cat([self.loop(h[:n], u[:n], idx[:n]), h[n:]])
        return h

    def forward(self, idx, targets, depths):
        """Return the mean loss in nats per token, of sequences that loop depths (B,) times each.

        The gradient flows through a sequence's last GRADIENT_LOOPS loops alone (§4): what the
        backward pass takes in time and memory does not grow with T."""
        depths, order = depths.sort(descending=True)
        idx, targets = idx[order], targets[order]
        u = self.read(idx)
        h = (torch.randn_like(u[:1]) * SIGMA).expand_as(u)
        with torch.no_grad():
            h = self.loop_rows(h, u, idx, (depths - GRADIENT_LOOPS).clamp(min=0))
        h = self.loop_rows(h, u, idx, depths.clamp(max=GRADIENT_LOOPS))
        return F.cross_entropy(self.predict(h, idx).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def every_loop(self, idx, most):
        """Yield the logits (B, S, V) after 1, 2, ..., `most` loops, as if each were the last."""
        u = self.read(idx)
        h = torch.zeros_like(u)
        for _ in range(most):
            h = self.loop(h, u, idx)
            yield self.predict(h, idx)

    def flops_per_token(self, depths):
        """Return the training FLOPs per token of a batch: of matrix products, two a multiply-add.
        A backward pass costs two forward passes; loops without gradient have none."""
        def forward(layers):  # weights that multiply a token; scores and values of attention
            return 2 * sum(p.numel() for p in matrices(layers)) + len(layers) * 4 * D * CONTEXT
        once = forward([*self.prelude, *self.coda]) + 2 * (2 * D * D + D * VOCAB)  # B, C, head
        loops = depths.double().mean() + 2 * depths.clamp(max=GRADIENT_LOOPS).double().mean()
        return 3 * once + loops.item() * forward(self.block)

# ------------------------------------------------------------ the optimiser: Muon


def matrices(layers):
    return [m.weight for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]


POLAR = ((8.1565545, -22.483293, 15.878770), (4.0429299, -2.8089175, 0.50001785),
         (3.8916678, -2.7724842, 0.50606482), (3.2857537, -2.3681295, 0.46449024),
         (2.3465413, -1.7097828, 0.42323552))  # arXiv 2505.16932


class Muon(torch.optim.Optimizer):
    """Update matrices equally far in all directions: along U V^T, for a gradient U S V^T."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for W in group["params"]:
            rows, columns = W.shape
            G, state, axis = W.grad, self.state[W], 1 if rows >= columns else 0
            if not state:
                state["M"], state["v"] = torch.zeros_like(W), torch.zeros_like(W.sum(axis, True))
            # Nesterov momentum
            M = state["M"].lerp_(G, 1 - group["momentum"])
            X = G.lerp(M, group["momentum"])
            # five steps bring all singular values near to 1
            X = X / (1.02 * X.norm() + 1e-6)
            for a, b, c in POLAR:
                S = X.T @ X if rows > columns else X @ X.T  # the smaller product
                S = b * S + c * S @ S
                X = a * X + (X @ S if rows > columns else S @ X)
            # its rows, or columns, about equally long, its norm as before (arXiv 2510.05491)
            v = state["v"].lerp_(X.square().mean(axis, keepdim=True), 0.05)
            even = X * v.clamp(min=1e-10).rsqrt()
            X = even * (X.norm() / even.norm().clamp(min=1e-10))
            # weights decay where the update makes them smaller anyway (arXiv 2510.12402)
            X = X + group["decay"] * W * (X * W >= 0)
            W -= group["lr"] * max(1, rows / columns) ** 0.5 * X


def make_optimizers(model):
    """Return Muon for the matrices of the layers and AdamW for all else (appendix E)."""
    ours = matrices([*model.prelude, *model.block, *model.coda])
    others = [p for p in model.parameters() if not any(p is one for one in ours)]
    return Muon(ours, dict(lr=RATE)), torch.optim.AdamW(others, RATE, (0.8, 0.95), 1e-10, 0)


def train_step(model, optimizers, idx, targets, depths, step, steps=STEPS):
    """Update the weights from a batch (B, S). Return its loss."""
    loss = model(idx, targets, depths)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        group = optimizer.param_groups[0]
        group["lr"] = RATE * min(1, 2 * (1 - step / steps))  # constant, then linearly to 0
        group["decay"] = DECAY * (1 - step / steps)
        group["momentum"] = 0.85 + 0.10 * min(1, step / 300)
        optimizer.step()
    model.zero_grad()
    return loss.item()

# ------------------------------------------------------------ data, training, evaluation


def read_stdlib():
    """Return (train, val) tokens, (N,), of the standard library's source."""
    root, splits = Path(sysconfig.get_paths()["stdlib"]), ([], [])
    for path in sorted(root.rglob("*.py")):
        name, text = path.relative_to(root), path.read_bytes()
        if not {"test", "tests", "site-packages", "dist-packages", "idlelib"} & set(name.parts):
            val = zlib.crc32(name.as_posix().encode()) % 20 == 0  # every twentieth file or so
            splits[val].append(torch.tensor([256, *text]))
    return map(torch.cat, splits)


def windows(tokens, starts):
    """Return (idx, targets), each (B, CONTEXT): tokens from each start on, and their successors."""
    rows = tokens[starts[:, None] + torch.arange(CONTEXT + 1)].to(DEVICE)
    return rows[:, :-1], rows[:, 1:]


def main():
    torch.manual_seed(0)
    train, val = read_stdlib()
    model = Parcae().to(DEVICE)
    optimizers, flops, start = make_optimizers(model), 0, time.time()
    for step in range(STEPS):
        idx, targets = windows(train, torch.randint(len(train) - CONTEXT, (BATCH,)))
        # each sequence draws its number of loops: the model learns to work at any (§4)
        depths = torch.poisson(torch.full((BATCH,), float(MEAN_LOOPS))).clamp(min=1).long()
        loss = train_step(model, optimizers, idx, targets, depths, step)
        flops += idx.numel() * model.flops_per_token(depths)
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss:.3f}, {flops:.2e} FLOPs, {time.time() - start:.0f} s")

    print("\nrecurrence T   val loss (nats per token)")
    losses = torch.zeros(16)
    for starts in torch.linspace(0, len(val) - CONTEXT - 1, 512).long().split(16):
        idx, targets = windows(val, starts)
        for t, logits in enumerate(model.every_loop(idx, 16)):
            losses[t] += F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() / 32
    for T in (1, 2, 4, 8, 16):
        print(f"{T:12d}   {losses[T - 1]:.4f}")

    idx = torch.tensor([[256]], device=DEVICE)
    for _ in range(300):
        *_, logits = model.every_loop(idx[:, -CONTEXT:], MEAN_LOOPS)
        idx = torch.cat([idx, torch.multinomial((logits[0, -1:, :256] / 0.7).softmax(-1), 1)], 1)
    print("\na sample:\n" + bytes(idx[0, 1:].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
