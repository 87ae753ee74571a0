"""A whole looped transformer: model, optimiser, data, training, evaluation and a sample.

    python parcae.py

Its middle layers run several times with the same weights. This file needs only torch and trains
the model of `python train.py`, on text cut a little differently. "§" and "eq." refer to "Parcae:
Scaling Laws For Stable Looped Language Models", arXiv 2604.12946.

    e       = Norm(prelude(tokens))           once
    h_0     = noise                           in training; zero in evaluation and sampling
    x       = A_bar * h_t + dt * B e          0 < A_bar = exp(dt * A) < 1 (eq. 3)
    h_{t+1} = x + what the layers add         T loops
    logits  = head(Norm(coda(C_proj h_T)))    once

Shapes: (B, S, D) is B sequences of S tokens with D channels. H counts heads, V the vocabulary.
"""

import math
import sysconfig
import time
import zlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

D, H, CONTEXT, VOCAB = 64, 2, 256, 320  # tokens 0-255 are bytes, 256 begins a text; no others
PRELUDE, LOOP, CODA, LAYERS = 0, 1, 0, 1  # layers before, in, after the loop, in all: one, looped
MEAN_LOOPS, GRADIENT_LOOPS = 4, 2  # mean T in training; how many of the last loops get a gradient
BATCH, STEPS, RATE, DECAY = 16, 1200, 2e-2, 0.2  # learning rate (8e-3 in the paper), weight decay
SIGMA, EPS, QK_EPS = math.sqrt(2 / (5 * D)), 1e-5, 2 ** -23  # SIGMA: std of h_0, initial weights
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ANGLE = torch.outer(torch.arange(CONTEXT), 50_000 ** -(torch.arange(0, D // H, 2) / (D // H)))
ROPE = torch.complex(ANGLE.cos(), ANGLE.sin())[:, None].to(DEVICE)  # (CONTEXT, 1, D/H/2)
POLAR = ((8.1565545, -22.483293, 15.878770), (4.0429299, -2.8089175, 0.50001785),
         (3.8916678, -2.7724842, 0.50606482), (3.2857537, -2.3681295, 0.46449024),
         (2.3465413, -1.7097828, 0.42323552))  # Muon's five steps (arXiv 2505.16932)

# ------------------------------------------------------------ a layer: nothing here loops

class Layer(nn.Module):
    def __init__(self, has_table):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(D, EPS), nn.RMSNorm(D, EPS)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)
        # value embeddings: a second vector for each token, which each head adds through a gate
        self.table = nn.Embedding(VOCAB, D) if has_table else None
        self.gate = nn.Linear(32, H, bias=False) if has_table else None

    def forward(self, x, idx):
        """Return x (B, S, D) plus what the layer computes from it; idx (B, S) are the tokens."""
        y = self.norm_1(x)
        q, k, v = (f(y).view(*idx.shape, H, -1) for f in (self.q, self.k, self.v))  # (B, S, H, D/H)
        if self.table:
            gate = 2 * torch.sigmoid(self.gate(y[..., :32]))                            # (B, S, H)
            v = v + gate[..., None] * self.table(idx).view_as(v)
        # rotate pairs of channels, as complex numbers, by position; then scale q, k to one length
        q, k = (torch.view_as_complex(z.unflatten(-1, (-1, 2))) * ROPE[:x.shape[1]] for z in (q, k))
        q, k = (F.rms_norm(torch.view_as_real(z).flatten(3), (D // H,), eps=QK_EPS) for z in (q, k))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))                           # (B, H, S, D/H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.relu(self.up(self.norm_2(x))).square()) / 2

    def matrices(self):
        return [m.weight for m in self.modules() if isinstance(m, nn.Linear)]

# ------------------------------------------------------------ the loop

class Parcae(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [Layer(has_table=i % 2 == 1 or i == LAYERS - 1) for i in range(LAYERS)]
        self.wte = nn.Embedding(VOCAB, D)
        self.prelude = nn.ModuleList(layers[:PRELUDE])
        self.recurrent = nn.ModuleList(layers[PRELUDE:PRELUDE + LOOP])
        self.coda = nn.ModuleList(layers[PRELUDE + LOOP:])
        self.norm_prelude, self.norm_f = nn.RMSNorm(D, EPS), nn.RMSNorm(D, EPS)
        self.log_A = nn.Parameter(torch.zeros(D))  # so A = -1; dt = ln(5) / 2 and A_bar = 5 ** -0.5
        self.dt_bias = nn.Parameter(torch.full((D,), math.log(5 ** 0.5 - 1)))
        self.B, self.C_proj = nn.Parameter(torch.eye(D)), nn.Linear(D, D, bias=False)
        # a layer adds nothing at first; most matrices are orthogonal, with entries of std SIGMA
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
        """Return u = dt * B e (B, S, D) for tokens idx (B, S). Every loop adds u to the state."""
        e = self.norm_prelude(self.run(self.prelude, self.wte(idx), idx))
        return F.linear(e, self.B) * F.softplus(self.dt_bias)

    def recurrent_pass(self, h, u, idx):
        """Return the state (B, S, D) after one more loop, by eq. 3, the paper's contribution.

        Whatever is learned, A = -exp(log_A) < 0 < dt, so 0 < A_bar = exp(dt * A) < 1. The loop
        shrinks h, then adds u; what its layers add is bounded, because they read normed input."""
        A_bar = torch.exp(-F.softplus(self.dt_bias) * self.log_A.exp())
        return self.run(self.recurrent, A_bar * h + u, idx)

    def predict(self, h, idx):
        """Return the logits (B, S, V) for a state h (B, S, D). The head has the weights of wte."""
        return F.linear(self.norm_f(self.run(self.coda, self.C_proj(h), idx)), self.wte.weight)

    def loop(self, h, u, idx, depths):
        """Return the state after depths[i] more loops of sequence i (depths: the largest first)."""
        for t in range(depths[0]):
            n = int((depths > t).sum())  # sequences that still loop
            h = torch.cat([self.recurrent_pass(h[:n], u[:n], idx[:n]), h[n:]])
        return h

    def forward(self, idx, targets, depths):
        """Return the mean loss in nats per token. Sequence i loops depths[i] times. Only its last
        GRADIENT_LOOPS loops keep activations for backward (§4), so memory does not grow with T."""
        depths, order = depths.sort(descending=True)
        idx, targets = idx[order], targets[order]
        u = self.read(idx)
        h = (torch.randn_like(u[:1]) * SIGMA).expand_as(u)  # one noise (1, S, D) for all sequences
        with torch.no_grad():
            h = self.loop(h, u, idx, (depths - GRADIENT_LOOPS).clamp(min=0))
        h = self.loop(h, u, idx, depths.clamp(max=GRADIENT_LOOPS))
        return F.cross_entropy(self.predict(h, idx).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def every_loop(self, idx, most):
        """Yield the logits (B, S, V) after 1, 2, ..., `most` loops, as if each were the last."""
        u = self.read(idx)
        h = torch.zeros_like(u)
        for _ in range(most):
            h = self.recurrent_pass(h, u, idx)
            yield self.predict(h, idx)

    def flops_per_token(self, depths):
        """Return training FLOPs per token. A backward pass costs two forward passes."""
        def forward(layers):  # a multiply-add is two; attention: q k^T and its product with v
            weights = sum(p.numel() for layer in layers for p in layer.matrices())
            return 2 * weights + len(layers) * 4 * D * CONTEXT
        once = forward([*self.prelude, *self.coda]) + 2 * (2 * D * D + D * VOCAB)  # B, C_proj, head
        loops, with_gradient = depths.double(), depths.clamp(max=GRADIENT_LOOPS)
        return 3 * once + (loops + 2 * with_gradient).mean().item() * forward(self.recurrent)

    def optimizers(self):
        """Return Muon for the layers' matrices and AdamW for all other weights (appendix E)."""
        inner = [p for m in self.modules() if isinstance(m, Layer) for p in m.matrices()]
        others = [p for p in self.parameters() if not any(p is one for one in inner)]
        adamw = torch.optim.AdamW(others, betas=(0.8, 0.95), eps=1e-10, weight_decay=0)
        return Muon(inner, {}), adamw  # train_step sets all that changes

# ------------------------------------------------------------ the optimiser: Muon

class Muon(torch.optim.Optimizer):
    """Move a matrix equally far in all directions: along U V^T for a gradient U diag(s) V^T."""
    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for W in group["params"]:
            (rows, columns), state = W.shape, self.state[W]
            axis = 1 if rows >= columns else 0
            if not state:
                state["M"], state["v"] = torch.zeros_like(W), torch.zeros_like(W.sum(axis, True))
            M = state["M"].lerp_(W.grad, 1 - group["momentum"])  # Nesterov momentum
            X = W.grad.lerp(M, group["momentum"])
            # five steps keep U and V, and bring the singular values s near to 1
            X = (X.T if rows > columns else X) / (1.02 * X.norm() + 1e-6)
            for a, b, c in POLAR:
                XX = X @ X.T
                X = a * X + (b * XX + c * XX @ XX) @ X
            X = X.T if rows > columns else X
            # make rows (or columns) about equally long, and keep the norm (arXiv 2510.05491)
            v = state["v"].lerp_((X * X).mean(axis, keepdim=True), 0.05)
            even = X * v.clamp(min=1e-10).rsqrt()
            X = even * X.norm() / even.norm().clamp(min=1e-10)
            # weights decay where the update makes them smaller anyway (arXiv 2510.12402)
            X = X + group["decay"] * W * (X * W >= 0)
            W -= group["lr"] * max(1, rows / columns) ** 0.5 * X


def train_step(model, optimizers, idx, targets, depths, step, steps=STEPS):
    """Update the weights from a batch (B, S). Return its loss."""
    loss = model(idx, targets, depths)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    muon, adamw = (optimizer.param_groups[0] for optimizer in optimizers)
    muon["lr"] = adamw["lr"] = RATE * min(1, 2 * (1 - step / steps))  # to 0 in the second half
    muon["decay"] = DECAY * (1 - step / steps)
    muon["momentum"] = 0.85 + 0.10 * min(1, step / 300)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    return loss.item()

# ------------------------------------------------------------ data, training, evaluation

def read_stdlib():
    """Return the tokens (train, val), each (N,), of the standard library's source files."""
    root, splits = Path(sysconfig.get_paths()["stdlib"]), ([], [])
    for path in sorted(root.rglob("*.py")):
        name, text = path.relative_to(root), path.read_bytes()
        if not {"test", "tests", "site-packages", "dist-packages", "idlelib"} & set(name.parts):
            val = zlib.crc32(name.as_posix().encode()) % 20 == 0  # about one file in twenty
            splits[val].append(torch.tensor([256, *text]))
    return map(torch.cat, splits)


def windows(tokens, starts):
    """Return (idx, targets), each (B, CONTEXT): tokens from a start, and the token after each."""
    rows = tokens[starts[:, None] + torch.arange(CONTEXT + 1)].to(DEVICE)
    return rows[:, :-1], rows[:, 1:]


def main():
    torch.manual_seed(0)
    train, val = read_stdlib()
    model = Parcae().to(DEVICE)
    optimizers, flops, start = model.optimizers(), 0, time.time()
    for step in range(STEPS):
        idx, targets = windows(train, torch.randint(len(train) - CONTEXT, (BATCH,)))
        # each sequence draws its own T, so that the model learns to work at many T (§4)
        depths = torch.poisson(torch.full((BATCH,), float(MEAN_LOOPS))).clamp(min=1).long()
        loss = train_step(model, optimizers, idx, targets, depths, step)
        flops += idx.numel() * model.flops_per_token(depths)
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss:.3f}, {flops:.2e} FLOPs, {time.time() - start:.0f} s")
    print("\nrecurrence T   val loss (nats per token)")
    losses = torch.zeros(16)  # after 1, ..., 16 loops: means over 32 batches
    for starts in torch.linspace(0, len(val) - CONTEXT - 1, 32 * BATCH).long().split(BATCH):
        idx, targets = windows(val, starts)
        for t, logits in enumerate(model.every_loop(idx, 16)):
            losses[t] += F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() / 32
    for T in (1, 2, 4, 8, 16):
        print(f"{T:12d}   {losses[T - 1]:.4f}")
    idx = torch.tensor([[256]], device=DEVICE)
    for _ in range(300):  # one byte at a time, at temperature 0.7
        *_, logits = model.every_loop(idx[:, -CONTEXT:], MEAN_LOOPS)
        idx = torch.cat([idx, torch.multinomial((logits[0, -1:, :256] / 0.7).softmax(-1), 1)], 1)
    print("\na sample:\n" + bytes(idx[0, 1:].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
