"""The looped transformer: a decoder-only transformer whose middle layers are run T times.

    e       = Norm(P(tokens))                       prelude, once
    h_0     ~ N(0, sigma^2)                         start state
    h_{t+1} = A_bar * h_t + B_bar e + R(h_t, e)     recurrent block, T times, same weights (eq. 3)
    logits  = Head(Norm(C(C_proj h_T)))             coda, once

With 0 < A_bar < 1 the loop forgets its past and cannot blow up, whatever is learned ("Parcae:
Scaling Laws For Stable Looped Language Models", arXiv 2604.12946; "§" and "eq." refer to it).
A plain transformer is this one with an empty recurrent block (n_recurrent=0); a fixed-depth model
is one that loops once (mean_recurrence=1).

What differs from a textbook GPT, as in the published model:
- RMSNorm before each layer; no biases; ReLU squared in the MLP, halved; embedding and head tied
- rotary positions on adjacent pairs; queries and keys normalised after the rotation
- optional value embeddings: every second layer adds a gated lookup of its token to its values
- linear weights start orthogonal, the layers' output projections at zero
- every sequence of a training batch draws its own number of loops, and starts them from noise
- gradient flows through a sequence's last `backprop_depth` loops only
and, departing from the published code:
- only rows that still loop are computed: sorted by depth, deepest first, they are a prefix of the batch
- the noise is one draw for all rows of a batch (so any split of the batch over devices agrees), and in
  eval mode its mean, zero (so evaluation and sampling are deterministic)
- float32 weights are cast to the dtype of the activations where they are used: `compute_dtype`, no autocast
"""

import copy
import json
import math
import re
import typing
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, from_hub, load_checkpoint, read_json, whole_file, write_text

QK_NORM_EPS = torch.finfo(torch.float32).eps
A0 = math.sqrt(1 / 5)  # A_bar's initial value
LARGEST = 2 ** 24  # of any size: beyond it is a slip of the finger
CHUNK = 1024  # tokens whose logits are held at once in training
VE_GATE_CHANNELS = 32  # the first channels of x decide how much value embedding a head takes


@dataclass
class ParcaeConfig:
    vocab_size: int = 32768
    block_size: int = 2048  # longest context, tokens
    n_embd: int = 768  # channels, d
    n_head: int = 6  # attention heads
    n_prelude: int = 2  # layers before the loop, P
    n_recurrent: int = 2  # layers in the loop, R; 0 is a plain transformer
    n_coda: int = 2  # layers after the loop, C
    mlp_width: int | None = None  # hidden channels of the MLP; None is 4 * n_embd
    mean_recurrence: int = 8  # mean number of loops in training, mu_rec; 1 is fixed depth
    backprop_depth: int | None = None  # last loops that get a gradient, mu_bwd; None is ceil(mean_recurrence / 2)
    injection: str = "diagonal"  # how the state takes in the prelude's output: diagonal, add or concat
    prelude_norm: bool = True  # normalise the prelude's output
    qk_norm: bool = True  # normalise queries and keys
    value_embeds: bool = False  # gated per-token tables added to the values of every second layer
    tie_embeddings: bool = True  # the head is the embedding
    state_init: str = "normal"  # start state of the loop in training: normal or zero
    rope_base: float = 50_000.0  # of the rotary positions
    norm_eps: float = 1e-5  # of the RMSNorms

    def __post_init__(self):
        if self.mlp_width is None and type(self.n_embd) is int:
            self.mlp_width = 4 * self.n_embd
        if self.backprop_depth is None and type(self.mean_recurrence) is int:
            self.backprop_depth = -(-self.mean_recurrence // 2)

        def need(ok, name, allowed):
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)!r}, must be {allowed}")
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        for field in fields(self):
            kind, value = (typing.get_args(field.type) or (field.type,))[0], getattr(self, field.name)
            if type(value) not in ((int, float) if kind is float else (kind,)):
                raise TypeError(f"{field.name} is {value!r}, must be {words[kind]}")
            if kind in (int, float):
                need(abs(value) < LARGEST, field.name, f"below {LARGEST:,}")
        need(self.norm_eps > 0, "norm_eps", "above 0")
        need(self.rope_base >= 1, "rope_base", "at least 1")
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "mlp_width", "mean_recurrence", "backprop_depth"):
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("n_prelude", "n_recurrent", "n_coda"):
            need(getattr(self, name) >= 0, name, "at least 0")
        need(self.n_layer > 0, "n_recurrent", "at least 1 where there is no other layer")
        need(self.n_embd % (2 * self.n_head) == 0, "n_embd", f"a multiple of 2 * n_head ({2 * self.n_head})")
        need(self.injection in INJECTIONS, "injection", f"one of {', '.join(INJECTIONS)}")
        need(self.state_init in ("normal", "zero"), "state_init", "normal or zero")

    @property
    def n_layer(self):
        """Distinct layers, P + R + C."""
        return self.n_prelude + self.n_recurrent + self.n_coda


def _published(layers, d, heads):
    return dict(n_prelude=layers, n_recurrent=layers, n_coda=layers, n_embd=d, n_head=heads, value_embeds=True)

PRESETS = {
    "parcae-140m": _published(2, 768, 6),
    "parcae-370m": _published(4, 1024, 8),
    "parcae-770m": _published(6, 1280, 10),
    "parcae-1.3b": _published(8, 1536, 12),
    "parcae-nano": dict(n_prelude=1, n_recurrent=2, n_coda=1, n_embd=64, n_head=2, value_embeds=True,
                        mean_recurrence=4, block_size=256),
    "parcae-micro": dict(n_prelude=2, n_recurrent=2, n_coda=2, n_embd=256, n_head=4, value_embeds=True,
                         block_size=256, vocab_size=4096),
}
# the plain transformer of each size: the same layers without loop, injection, C_proj and prelude norm
PRESETS |= {name.replace("parcae", "gpt"): preset | dict(
                n_prelude=preset["n_prelude"] + preset["n_recurrent"] + preset["n_coda"], n_recurrent=0, n_coda=0)
            for name, preset in PRESETS.items()}


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Linear(nn.Linear):
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x, rope):
    """Rotary positions on adjacent pairs (x0, x1), (x2, x3), ... of x (B, T, n_head, head_dim).

    rope: cos and sin, each (T, 1, head_dim) with every angle twice, sin negative at even places."""
    cos, sin = rope
    return x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin


def attend(q, k, v):
    """Causal attention of q (B, n_head, T, head_dim) to k, v (B, n_head, S, head_dim), of which the
    last T are q's own positions."""
    (B, H, T, D), S = q.shape, k.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= 1024:  # the fused kernel takes twice as long there
        mask = torch.full((T, S), -torch.inf, dtype=q.dtype).triu(S - T + 1)
        q, k, v = (z.reshape(B * H, -1, D) for z in (q, k, v))
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D ** -0.5)
        return (scores.softmax(-1) @ v).view(B, H, T, D)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T > 1 and T == S)


class Attention(nn.Module):
    def __init__(self, config, has_ve):
        super().__init__()
        d = config.n_embd
        self.n_head, self.qk_norm = config.n_head, config.qk_norm
        self.c_q, self.c_k, self.c_v, self.c_proj = (Linear(d, d) for _ in range(4))
        self.ve_gate = Linear(min(d, VE_GATE_CHANNELS), config.n_head) if has_ve else None

    def forward(self, x, rope, ve=None, cache=None):
        # x: (B, T, C); ve: None or (B, T, C); cache: None or (keys, values, position)
        B, T, C = x.shape
        qk = torch.cat([self.c_q(x), self.c_k(x)], dim=-1).view(B, T, 2 * self.n_head, -1)
        v = self.c_v(x).view(B, T, self.n_head, -1)
        if self.ve_gate is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))  # (B, T, n_head)
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        qk = rotate(qk, rope)
        if self.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:], eps=QK_NORM_EPS)
        q, k, v = (z.transpose(1, 2) for z in (*qk.chunk(2, dim=2), v))                    # (B, n_head, T, head_dim)
        if cache is not None:
            keys, values, pos = cache                                          # (B, n_head, capacity, head_dim)
            keys[:, :, pos:pos + T], values[:, :, pos:pos + T] = k, v
            k, v = keys[:, :, :pos + T], values[:, :, :pos + T]
        return self.c_proj(attend(q, k, v).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = Linear(config.n_embd, config.mlp_width)
        self.proj = Linear(config.mlp_width, config.n_embd)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, has_ve):
        super().__init__()
        self.norm_1, self.norm_2 = (RMSNorm(config.n_embd, eps=config.norm_eps) for _ in range(2))
        self.attn = Attention(config, has_ve)
        self.mlp = MLP(config)

    def forward(self, x, rope, ve=None, cache=None):
        x = x + self.attn(self.norm_1(x), rope, ve, cache)
        return torch.add(x, self.mlp(self.norm_2(x)), alpha=0.5)  # relu(x)^2 / 2, as published; halved here at no cost

    def matmul_params(self):
        return sum(p.numel() for p in self.parameters() if p.ndim == 2)


class Diagonal(nn.Module):
    """The injection of Parcae (eq. 3): A_bar * h + dt * (B e), stable whatever is learned.

    A = -exp(log_A), dt = softplus(dt_bias), A_bar = exp(dt * A) (zero-order hold): all of A_bar lies in (0, 1)."""

    def __init__(self, d, a0=A0):
        super().__init__()
        self.log_A = nn.Parameter(torch.zeros(d))
        self.dt_bias = nn.Parameter(torch.full((d,), math.log(1 / a0 - 1)))  # softplus(dt_bias) = -ln a0: A_bar starts at a0
        self.B = nn.Parameter(torch.eye(d))

    def A_bar(self):
        """(C,) float32 factors by which the state shrinks each loop."""
        A_bar = torch.exp(-F.softplus(self.dt_bias.float()) * self.log_A.float().exp())
        return A_bar.clamp(torch.finfo(torch.float32).tiny, 1 - 2 ** -24)  # float32 would round the ends to 0 and 1

    def spectral_radius(self):
        return self.A_bar().max()

    def input(self, e):
        """What e adds to the state, (B, T, C): the same at every loop, so computed once."""
        return F.linear(e, self.B.to(e.dtype)) * F.softplus(self.dt_bias).to(e.dtype)

    def forward(self, h, u):
        """The injected state (B, T, C) from the state h and u = input(e), both (B, T, C)."""
        return (self.A_bar() * h + u).to(u.dtype)


class Add(nn.Module):
    """h + e (table 1): as if A_bar were the identity, marginally stable."""

    def __init__(self, d):
        super().__init__()

    def spectral_radius(self):
        return torch.ones(())

    def input(self, e):
        return e

    def forward(self, h, u):
        return h + u


class Concat(nn.Module):
    """W [h; e] (table 1): unconstrained. W starts where the diagonal rule does, at [a0 I, dt I]."""

    def __init__(self, d, a0=A0):
        super().__init__()
        self.W = nn.Parameter(torch.cat([a0 * torch.eye(d), -math.log(a0) * torch.eye(d)], dim=1))

    def spectral_radius(self):
        """Of the half of W that sees the state: above 1, the loop alone lets it grow (table 2)."""
        return torch.linalg.eigvals(self.W[:, :len(self.W)].float()).abs().max()

    def input(self, e):
        return F.linear(e, self.W[:, e.shape[-1]:].to(e.dtype))

    def forward(self, h, u):
        return F.linear(h, self.W[:, :h.shape[-1]].to(h.dtype)) + u


INJECTIONS = {"diagonal": Diagonal, "add": Add, "concat": Concat}


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x (N, C) @ weight.T against targets (N,), CHUNK rows at a time: all logits
    (N, vocab) in float32 would be the largest tensor of a training step. So that none need be kept or
    computed again, the forward pass computes the gradient too."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        w, d_x, d_weight = weight.to(x.dtype), torch.empty_like(x), torch.zeros_like(weight)
        loss, count = x.new_zeros((), dtype=torch.float32), (targets != -100).sum()
        for x_, t, d in zip(*(z.split(CHUNK) for z in (x, targets, d_x))):
            log_probs = F.linear(x_, w).float().log_softmax(-1)
            loss += F.nll_loss(log_probs, t, ignore_index=-100, reduction="sum")
            d_logits = log_probs.exp_()
            d_logits[torch.arange(len(t), device=t.device), t.clamp(min=0)] -= 1
            d_logits = (d_logits * ((t != -100) / count).unsqueeze(-1)).to(x.dtype)
            torch.matmul(d_logits, w, out=d)
            d_weight += d_logits.T @ x_
        ctx.save_for_backward(d_x, d_weight)
        return loss / count

    @staticmethod
    def backward(ctx, d_loss):
        d_x, d_weight = ctx.saved_tensors
        return d_x * d_loss.to(d_x.dtype), d_weight * d_loss, None


def each(f, *tensors):
    """f of each tensor; None stays None."""
    return [t if t is None else f(t) for t in tensors]


class KVCache:
    """Keys and values of a context, preallocated.

    kind "per-loop": a pair for every layer and every loop, exact. "shared": a loop overwrites the
    pair of the loop before, so that earlier tokens show all loops the keys and values of their last
    one (recurrent-depth models, arXiv 2502.05171): memory does not grow with the number of loops."""

    def __init__(self, config, batch_size, capacity, recurrence, device, dtype, kind="per-loop"):
        if kind not in ("per-loop", "shared"):
            raise UserError(f"kv_cache is {kind!r}, must be per-loop or shared")
        P, R, C = config.n_prelude, config.n_recurrent, config.n_coda
        loops = recurrence if kind == "per-loop" else 1
        self.slot = [*range(P), *(P + t % loops * R + r for t in range(recurrence) for r in range(R)),
                     *range(P + loops * R, P + loops * R + C)]  # of each layer in the order in which layers run
        self.hold(torch.empty(P + loops * R + C, 2, batch_size, config.n_head, capacity, config.n_embd // config.n_head,
                              device=device, dtype=dtype))
        self.pos = 0  # tokens held

    def hold(self, kv):
        self.kv, pairs = kv, [tuple(pair) for pair in kv]
        self.pairs = [pairs[slot] for slot in self.slot]

    def rows(self, index):
        """A copy with the sequences of an index (N,), which may name one several times."""
        other = copy.copy(self)
        other.hold(self.kv[:, :, index])
        return other

    def slots(self):
        """(keys, values, tokens held) of each layer in the order in which layers run."""
        return [(keys, values, self.pos) for keys, values in self.pairs]


class Settled:
    """Ends the loop for a token once its prediction changes, from one loop to the next, by less than `threshold` nats of KL
    divergence (recurrent-depth models, arXiv 2502.05171). Tokens that stop early have no keys and values for later loops,
    so this needs the shared cache, in which each layer shows the last ones. loops: how many each token took."""

    def __init__(self, model, threshold):
        if not threshold >= 0:
            raise UserError(f"exit threshold is {threshold}, must be at least 0")
        self.head, self.threshold, self.loops = model.lm_head, threshold, []

    def __call__(self, x, t):
        before, self.log_p = getattr(self, "log_p", None), self.head(x).float().log_softmax(-1)
        if t == 1:
            self.loops.append(0)
        self.loops[-1] = t
        return t > 1 and F.kl_div(before, self.log_p, reduction="sum", log_target=True).item() < self.threshold


class Parcae(nn.Module):
    """See the head of this file. `compute_dtype` is the dtype of the activations; None: that of the weights."""

    compute_dtype = None

    def __init__(self, config: ParcaeConfig):
        super().__init__()
        self.config = config
        P, R, d = config.n_prelude, config.n_recurrent, config.n_embd
        last = config.n_layer - 1
        ve_layers = [i for i in range(config.n_layer) if config.value_embeds and (i % 2 == 1 or i == last)]
        blocks = [Block(config, i in ve_layers) for i in range(config.n_layer)]
        self.wte = nn.Embedding(config.vocab_size, d)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(config.vocab_size, d) for i in ve_layers})
        self.prelude = nn.ModuleList(blocks[:P])
        self.recurrent = nn.ModuleList(blocks[P:P + R])
        self.coda = nn.ModuleList(blocks[P + R:])
        if R:
            self.norm_prelude = RMSNorm(d, eps=config.norm_eps) if config.prelude_norm else nn.Identity()
            self.injection = INJECTIONS[config.injection](d)
            self.C_proj = Linear(d, d)
        self.norm_f = RMSNorm(d, eps=config.norm_eps)
        self.lm_head = Linear(d, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

        angle = torch.outer(torch.arange(config.block_size),
                            config.rope_base ** -(torch.arange(0, d // config.n_head, 2) / (d // config.n_head)))
        cos, sin = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)
        sin[:, ::2] *= -1
        self.register_buffer("rope", torch.stack([cos, sin]).unsqueeze(2), persistent=False)  # (2, T, 1, head_dim)
        self.reset_parameters()

    @property
    def init_std(self):
        return math.sqrt(2 / (5 * self.config.n_embd))

    @torch.no_grad()
    def reset_parameters(self):
        """Initial weights of the published code: scaled orthogonal, output projections zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.init_std)
            elif name.endswith(("attn.c_proj", "mlp.proj")):
                nn.init.zeros_(module.weight)
            elif isinstance(module, Linear) and module.weight is not self.wte.weight:
                nn.init.orthogonal_(module.weight, gain=self.init_std * math.sqrt(max(module.weight.shape)))

    def sample_depths(self, batch_size, generator=None):
        """Numbers of loops (B,) int64 for a training batch: Poisson(mean_recurrence), at least 1 (§4).

        Stratified: one draw from each of batch_size equal slices of the distribution, shuffled. A
        row's depth is distributed as an independent draw, yet the sum hardly varies between batches.
        The mean is mean_recurrence + exp(-mean_recurrence); a mean of 1 stands for fixed depth: all 1."""
        mean = self.config.mean_recurrence
        if mean == 1 or not self.config.n_recurrent:
            return torch.ones(batch_size, dtype=torch.int64)
        u = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        u = (torch.arange(batch_size) + u) / batch_size
        k = torch.arange(mean + 12 * math.ceil(math.sqrt(mean)) + 12, dtype=torch.float64)
        cdf = torch.special.gammaincc(k + 1, torch.tensor(mean, dtype=torch.float64))  # P(Poisson <= k)
        depths = torch.searchsorted(cdf, u).clamp(1, len(k) - 1)
        return depths[torch.randperm(batch_size, generator=generator)]

    def forward(self, idx, targets=None, *, recurrence=None, depths=None, cache=None):
        """Logits (B, T, vocab_size) float32 and the mean loss in nats per token (None without targets). In train mode the
        loss of a large batch is computed without the logits, which are None then.

        idx, targets: (B, T) int64, targets of -100 ignored. recurrence: loops for every sequence;
        depths: (B,) int64, loops for each; neither: sampled in train mode, mean_recurrence in eval
        mode. In train mode the gradient flows through the last backprop_depth loops (§4, appendix E).
        cache: a KVCache that holds the tokens before idx. Raises UserError on bad shapes or depths."""
        x = self.hidden(idx, recurrence, depths, cache)
        if self.training and targets is not None and idx.numel() > CHUNK:
            return None, HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.lm_head(x).float()
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        return logits, loss

    def hidden(self, idx, recurrence=None, depths=None, cache=None, until=None):
        """What the head reads, (B, T, C); arguments as in forward. until(x, t): called after each loop t = 1, 2, ... with
        what the head would read if it were the last; where it returns True, it is the last."""
        cfg = self.config
        (B, T), P, R, C = idx.shape, cfg.n_prelude, cfg.n_recurrent, cfg.n_coda
        pos = cache.pos if cache is not None else 0
        if pos + T > cfg.block_size:
            raise UserError(f"{pos + T} tokens do not fit block_size {cfg.block_size}")
        depths = self._depths(B, recurrence, depths)
        sort = depths != depths[:1] * B
        if sort:  # deepest first: live rows are a prefix
            order = sorted(range(B), key=lambda row: -depths[row])
            depths, order = [depths[row] for row in order], torch.tensor(order, device=idx.device)
            idx, inverse = idx[order], order.argsort()

        x = self.wte(idx)
        x = x.to(self.compute_dtype or x.dtype)
        ve = [self.value_embeds[str(i)](idx).to(x.dtype) if str(i) in self.value_embeds else None
              for i in range(cfg.n_layer)]
        rope = self.rope[:, pos:pos + T].to(x.dtype)
        slots = cache.slots() if cache is not None else [None] * (P + max(depths) * R + C)

        def run(blocks, x, ve, slots):
            for block, v, slot in zip(blocks, ve, slots):
                x = block(x, rope, v, slot)
            return x

        def finish(x):
            return self.norm_f(run(self.coda, x, ve[P + R:], slots[len(slots) - C:]))

        x = run(self.prelude, x, ve, slots)
        if R:
            x = self.loop(self.norm_prelude(x), ve[P:P + R], depths, lambda x, ve, t: run(self.recurrent, x, ve, slots[P + t * R:]),
                          until and (lambda h, t: until(finish(self.C_proj(h)), t)))
        if sort:
            x, *ve = each(lambda z: z[inverse], x, *ve)
        x = finish(x)
        if cache is not None:
            cache.pos += T
        return x

    def loop(self, e, ve, depths, block, until=None):
        """C_proj h_T (B, T, C) from e (B, T, C). depths: B numbers, falling; block(x, ve, t) runs the recurrent block for the
        t-th time, t = 0, 1, ...; until(h, t): whether to stop after t loops."""
        h = torch.zeros_like(e[:1])
        if self.training and self.config.state_init == "normal":
            h = torch.randn_like(h) * self.init_std
        h, inputs = h.expand_as(e), [self.injection.input(e), *ve]
        with_grad = [min(n, self.config.backprop_depth) for n in depths] if self.training else depths

        def iterate(h, inputs, depths):
            finished = []
            for t in range(depths[0]):
                live = sum(depth > t for depth in depths)
                if live < len(h):
                    finished.append(h[live:])
                    h, *inputs = each(lambda z: z[:live], h, *inputs)  # noqa: B023
                h = block(self.injection(h, inputs[0]), inputs[1:], t)
                if until and until(h, t + 1):
                    break
            return torch.cat([h, *reversed(finished)])

        with torch.no_grad():
            h = iterate(h, each(torch.detach, *inputs), [n - m for n, m in zip(depths, with_grad)])
        return self.C_proj(iterate(h, inputs, with_grad))

    def _depths(self, batch_size, recurrence, depths):
        """Loops of each row, a list."""
        if depths is None and recurrence is None and self.training:
            depths = self.sample_depths(batch_size)
        if depths is None:
            depths = [self.config.mean_recurrence if recurrence is None else int(recurrence)] * batch_size
        elif depths.shape != (batch_size,):
            raise UserError(f"depths has shape {tuple(depths.shape)}, must be ({batch_size},), one for each sequence")
        else:
            depths = depths.tolist()
        if min(depths) < 1:
            raise UserError(f"recurrence is {min(depths)}, must be at least 1")
        return depths

    def step(self, token, recurrence, cache):
        """Logits (B, 1, vocab_size) after one more token (B, 1) of the sequences in the cache. Generation goes through here:
        `model.step = torch.compile(model.step, dynamic=True)` makes one graph of all layers and loops, for any position."""
        return self(token, recurrence=recurrence, cache=cache)[0]

    def compile_layers(self):
        """torch.compile each layer, once for all batch sizes. Layers with and without value embeddings, with and
        without gradient, in training and evaluation are graphs of their own: more than the 8 that PyTorch allows."""
        torch._dynamo.config.recompile_limit = 64
        for block in [*self.prelude, *self.recurrent, *self.coda]:
            block.compile(dynamic=True)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, *, recurrence=None, temperature=1.0, top_k=None, top_p=None, generator=None,
               kv_cache="per-loop", until=None):
        """Yield max_new_tokens next tokens (B, 1), each sampled given the last block_size before it.

        Arguments as in `generate`; until: see Settled, for B = 1 and the shared cache. The cache
        serves until the context is full; from then on the window slides, which moves every token in it,
        and each token costs a full forward pass."""
        if idx.ndim != 2 or idx.shape[1] == 0:
            raise UserError("the prompt is empty, must hold at least one token")
        if not temperature >= 0:
            raise UserError(f"temperature is {temperature}, must be at least 0")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is {top_k}, must be at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p}, must be in (0, 1]")
        cfg, dtype = self.config, self.compute_dtype or self.wte.weight.dtype
        recurrence = self._depths(1, cfg.mean_recurrence if recurrence is None else recurrence, None)[0]
        capacity = min(idx.shape[1] + max_new_tokens, cfg.block_size)
        cache = KVCache(cfg, len(idx), capacity, recurrence, idx.device, dtype, kv_cache)
        training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                if idx.shape[1] > capacity:
                    logits, _ = self(idx[:, -capacity:], recurrence=recurrence)
                elif cache.pos and until:
                    logits = self.lm_head(self.hidden(idx[:, cache.pos:], recurrence, cache=cache, until=until)).float()
                elif cache.pos:
                    logits = self.step(idx[:, cache.pos:], recurrence, cache)
                else:
                    logits, _ = self(idx, recurrence=recurrence, cache=cache)
                token = sample(logits[:, -1], temperature, top_k, top_p, generator)
                idx = torch.cat([idx, token], dim=1)
                yield token
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, **options):
        """Continue idx (B, T) int64 by max_new_tokens tokens: (B, T + max_new_tokens) int64.

        options: recurrence (None: mean_recurrence), temperature (0: greedy), top_k, top_p (keep the
        k likeliest tokens; the fewest with total probability p), generator (a seeded torch.Generator
        on idx's device), kv_cache ("per-loop", or "shared": see KVCache). Raises UserError on an empty
        prompt and on values out of range."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **options)], dim=1)

    def matrices(self):
        """The weight matrices of the layers: what Muon trains (appendix E)."""
        return [p for part in (self.prelude, self.recurrent, self.coda) for name, p in part.named_parameters()
                if p.ndim == 2 and "ve_gate" not in name]

    def matmul_params(self, accounting="exact"):
        """(once, core): parameters by which a token is multiplied once, and at every loop; see flops_per_token."""
        cfg, d = self.config, self.config.n_embd
        if accounting == "paper":
            core = sum(p.numel() for p in self.recurrent.parameters())
            return sum(p.numel() for p in self.parameters()) - core - self.wte.weight.numel(), core
        if accounting != "exact":
            raise UserError(f"accounting is {accounting!r}, must be exact or paper")
        core = sum(block.matmul_params() for block in self.recurrent)
        once = sum(block.matmul_params() for block in [*self.prelude, *self.coda]) + self.lm_head.weight.numel()
        if cfg.n_recurrent:
            once += d * d + (cfg.injection != "add") * d * d  # C_proj; B or the half of W that sees e
            core += (cfg.injection == "concat") * d * d       # the half of W that sees the state
        return once, core

    def flops_per_token(self, recurrence=None, backprop_depth=None, context=None, accounting="exact"):
        """Training FLOPs per token (a multiply-add is two), with T = recurrence loops.

        recurrence: None: mean_recurrence (a mean over sequences may be fractional).
        backprop_depth: loops with gradient, None: as configured; 0: inference.
        context: tokens attended to, None: block_size; attention is not halved for causality.
        accounting: "exact" counts matmuls; "paper" is the published code's count (appendix D), which
        takes value-embedding tables for matmuls and leaves out the tied head."""
        cfg = self.config
        d, T = cfg.n_embd, cfg.mean_recurrence if recurrence is None else recurrence
        bwd = min(T, cfg.backprop_depth) if backprop_depth is None else backprop_depth
        attention = 4 * d * (context or cfg.block_size)  # per layer, forward
        once, core = self.matmul_params(accounting)
        # the first loop with gradient has no earlier state to pass it to
        saved = 2 * d * d if cfg.n_recurrent and cfg.injection == "concat" and accounting == "exact" else 0
        forward_once = 2 * once + (cfg.n_prelude + cfg.n_coda) * attention
        forward_loop = 2 * core + cfg.n_recurrent * attention
        if bwd == 0 and cfg.n_recurrent or backprop_depth == 0:
            return float(forward_once + T * forward_loop)
        return float(3 * forward_once + (T + 2 * bwd) * forward_loop - saved)

    @classmethod
    def from_pretrained(cls, path):
        """A model in eval mode from a run directory of train.py, from a directory in the published format (config.json
        beside pytorch_model.bin or model.pt), or from the Hugging Face hub ("owner/name"). Raises UserError."""
        path = local_files(path)
        config, settings = read_config(path), read_json(path / "config.json")
        if "model" in settings:
            weights = load_checkpoint(path / "ckpt.pt")
            weights = weights.get("model") if isinstance(weights, dict) else None
        else:
            file = next((path / f for f in ("pytorch_model.bin", "model.pt") if (path / f).exists()), path / "model.pt")
            weights = load_checkpoint(file)
            if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
                raise UserError(f"{file} must hold a plain state dict, names and tensors")
            weights = {_our_name(name): w for name, w in weights.items() if not name.endswith("freqs_cis")}
            config.value_embeds = any(name.startswith("value_embeds") for name in weights)
            if config.tie_embeddings and "wte.weight" in weights:
                weights["lm_head.weight"] = weights["wte.weight"]
        model = cls(config)
        fit_weights(model, weights, f"the weights in {path} do not fit its config.json")
        for name, w in model.state_dict().items():
            if not w.isfinite().all():
                raise UserError(f"the weights in {path} are damaged: {name} is not finite")
        return model.eval()

    def export(self, directory):
        """Write the model in the published format: config.json and pytorch_model.bin, float32."""
        cfg, directory = self.config, Path(directory)
        looped = cfg.n_recurrent > 0
        settings = PUBLISHED_FIXED | {theirs: getattr(cfg, ours) for theirs, ours in PUBLISHED_FIELDS.items()} | {
            "model_class_name": "Parcae" if looped else "GPT", "vocab_size": cfg.vocab_size, "num_key_value_heads": cfg.n_head,
            "recurrent_embedding_dimension": cfg.n_embd, "recurrent_intermediation_embedding_dimension": cfg.mlp_width,
            "state_init": "zero" if cfg.state_init == "zero" else "like-init", "rope_settings.rope_condense_ratio": 1}
        rope = ("use_rope", "rope_condense_ratio", "rope_base")
        settings["rope_settings"] = {name: settings.pop(f"rope_settings.{name}") for name in rope}
        weights = {_their_name(name): w.float().cpu() for name, w in self.state_dict().items()}
        directory.mkdir(parents=True, exist_ok=True)
        with whole_file(directory / "pytorch_model.bin", "wb") as file:
            torch.save(weights, file)
        write_text(directory / "config.json", json.dumps(settings, indent=1))

# ----------------------------------------------------------------------------- files

# The published config.json: fields that are ours under another name; fields that must have one value, since nothing else is
# implemented here; fields on which the function that the model computes does not depend. Any other field that is not
# switched off (false, null, 0 or empty) is refused.
PUBLISHED_FIELDS = {
    "padded_vocab_size": "vocab_size", "block_size": "block_size", "n_embd": "n_embd", "num_attention_heads": "n_head",
    "n_layers_in_prelude": "n_prelude", "n_layers_in_recurrent_block": "n_recurrent", "n_layers_in_coda": "n_coda",
    "intermediate_size": "mlp_width", "mean_recurrence": "mean_recurrence", "mean_backprop_depth": "backprop_depth",
    "injection_type": "injection", "prelude_norm": "prelude_norm", "qk_norm": "qk_norm", "tie_embeddings": "tie_embeddings",
    "norm_eps": "norm_eps", "rope_settings.rope_base": "rope_base"}
PUBLISHED_FIXED = {
    "block_class_name": "TransformerPreNormBlock", "norm_class_name": "RMSNorm", "mlp_class_name": "BaseMLP", "nonlin_name": "ReLU2",
    "mup_model_scaling_factor": 1, "rope_settings.use_rope": True}
PUBLISHED_FREE = {
    "name", "hf_config", "vocab_size", "padding_multiple", "attn_impl", "init_strategy", "init_orthogonal", "skip_initialization",
    "use_fused_head", "activation_checkpoint_impl", "simple_ops", "strategy", "sampling_scheme", "lockstep_n", "lockstep_k",
    "curriculum_target", "recurrent_iteration_method", "_class_name", "model_class_name", "architecture_class_name"}


def local_files(path):
    """A directory with a model: path itself, or what the Hugging Face hub has under the name "owner/name"."""
    if Path(path).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return Path(path)
    return from_hub("snapshot_download", str(path), allow_patterns=["config.json", "pytorch_model.bin", "model.pt", "tokenizer.json"])


def read_config(path):
    """The ParcaeConfig of a run directory or of a directory in the published format. Raises UserError."""
    file = Path(path) / "config.json"
    if not file.exists():
        raise UserError(f"{path} holds no model: {file} does not exist; train one first: python train.py")
    try:
        settings = read_json(file)
    except UserError as error:
        raise UserError(f"{file} is not the JSON of a model: {error}") from None
    try:
        if "model" in settings:
            return ParcaeConfig(**settings["model"])
        return _published_config(settings)
    except KeyError as error:
        raise UserError(f"{file} has no {error}") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not the JSON of a model: {error}") from None


def _published_config(settings):
    """A ParcaeConfig from the fields of a published config.json; raises UserError for what is not implemented here."""
    c = dict(settings)
    c |= {f"rope_settings.{name}": value for name, value in c.pop("rope_settings").items()}
    if "n_layer" in c:  # a GPT
        c |= {"n_layers_in_prelude": c.pop("n_layer"), "n_layers_in_recurrent_block": 0, "n_layers_in_coda": 0}
    for name in ("injection_type", "prelude_norm", "mean_recurrence", "mean_backprop_depth"):  # of no meaning without a loop
        if c.get("n_layers_in_recurrent_block") == 0:
            c.setdefault(name, getattr(ParcaeConfig(), PUBLISHED_FIELDS[name]))
    required = PUBLISHED_FIXED | {
        "num_key_value_heads": c["num_attention_heads"], "recurrent_num_attention_heads": c["num_attention_heads"],
        "recurrent_embedding_dimension": c["n_embd"], "recurrent_intermediation_embedding_dimension": c["intermediate_size"],
        "rope_settings.rope_condense_ratio": 1}
    for name, value in c.items():
        known = name in PUBLISHED_FIELDS or name in PUBLISHED_FREE or name == "state_init"
        if not known and value != required.get(name) and (value or name in PUBLISHED_FIXED):
            only = f", only {required[name]!r}" if name in required else ""
            raise UserError(f"{name} is {value!r}, which is not implemented here{only}")
    states = {"zero": "zero", "normal": "normal", "like-init": "normal"}
    if c.get("state_init", "normal") not in states:
        raise UserError(f"state_init is {c['state_init']!r}, must be one of {', '.join(states)}")
    return ParcaeConfig(**{ours: c[theirs] for theirs, ours in PUBLISHED_FIELDS.items()}, state_init=states[c.get("state_init", "normal")])


RENAMED = (("transformer.adapter.A_log", "injection.log_A"), ("transformer.adapter.", "injection."), ("transformer.h.", "prelude."),
           ("transformer.core_block.", "recurrent."), ("transformer.C.", "C_proj."), ("transformer.ln_f.", "norm_f."),
           ("transformer.ln_prelude.", "norm_prelude."))


def _our_name(name):
    """Our name for a tensor of the published format."""
    for theirs, ours in RENAMED:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name.removeprefix("transformer.")


def _their_name(name):
    """The published format's name for a tensor of ours."""
    for theirs, ours in RENAMED:
        if name.startswith(ours) and theirs != "transformer.h.":
            return theirs + name.removeprefix(ours)
    return name if name.startswith(("value_embeds.", "lm_head.")) else f"transformer.{name}"


def fit_weights(model, weights, complaint):
    """Load a state dict. Raises UserError that begins with `complaint` and names what is missing, unknown or of another shape."""
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise UserError(f"{complaint}: they are no state dict of names and tensors")
    expected = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    found = {name: tuple(w.shape) if w.layout == torch.strided and w.device.type != "meta" else "no plain tensor"
             for name, w in weights.items()}
    problems = [f"no {name}" for name in sorted(expected.keys() - found)] + \
        [f"unknown {name}" for name in sorted(found.keys() - expected)] + \
        [f"{name} is {found[name]}, must be {shape}" for name, shape in expected.items() if found.get(name, shape) != shape]
    if problems:
        raise UserError(f"{complaint}: {'; '.join(problems)}")
    model.load_state_dict(weights)


def sample(logits, temperature, top_k, top_p, generator):
    """Draw tokens (B, 1) from logits (B, vocab)."""
    if temperature < 1e-6:  # logits divided by less overflow
        return logits.argmax(-1, keepdim=True)
    logits, tokens = (logits / temperature).sort(-1, descending=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probs = logits.softmax(-1)
    if top_p is not None:
        probs[probs.cumsum(-1) - probs >= top_p] = 0  # what comes before already holds top_p
    return tokens.gather(-1, torch.multinomial(probs, 1, generator=generator))
