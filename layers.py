"""What a looped transformer is made of: its configuration, its layers, its injection rules.

Nothing here loops: a plain transformer has the same layers. model.py puts them together.
In comments B is the batch, T the tokens of a sequence and C the channels; (B, T, C) is a shape.
"""

import copy
import math
import typing
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, nothing_to_run, read_json

QK_NORM_EPS = torch.finfo(torch.float32).eps
A0 = math.sqrt(1 / 5)  # A_bar's initial value (published code)
LARGEST = 2 ** 24  # of any size: more is a typing error
IGNORED = -100  # a target that does not count
VE_GATE_CHANNELS = 32  # the first channels decide how much value embedding a head takes

# ------------------------------------------------------------------------------- configuration


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
    backprop_depth: int | None = None  # last loops with gradient, mu_bwd; None is ceil(mu_rec / 2)
    injection: str = "diagonal"  # how the state takes in the prelude's output, see INJECTIONS
    prelude_norm: bool = True  # normalise the prelude's output
    qk_norm: bool = True  # normalise queries and keys
    value_embeds: bool = False  # gated per-token tables for values, every second layer and the last
    tie_embeddings: bool = True  # the head is the embedding
    state_init: str = "normal"  # start state of the loop in training: normal or zero
    rope_base: float = 50_000.0  # of the rotary positions
    norm_eps: float = 1e-5  # of the RMSNorms

    def __post_init__(self):
        self.check_types()
        if self.mlp_width is None:
            self.mlp_width = 4 * self.n_embd
        if self.backprop_depth is None:
            self.backprop_depth = math.ceil(self.mean_recurrence / 2)

        self.need(self.norm_eps > 0, "norm_eps", "above 0")
        self.need(self.rope_base >= 1, "rope_base", "at least 1")
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "mlp_width",
                     "mean_recurrence", "backprop_depth"):
            self.need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("n_prelude", "n_recurrent", "n_coda"):
            self.need(getattr(self, name) >= 0, name, "at least 0")
        self.need(self.n_layer > 0, "n_recurrent", "at least 1 where there is no other layer")
        pairs = 2 * self.n_head  # each head rotates pairs of channels
        self.need(self.n_embd % pairs == 0, "n_embd", f"a multiple of 2 * n_head ({pairs})")
        self.need(self.injection in INJECTIONS, "injection", f"one of {', '.join(INJECTIONS)}")
        self.need(self.state_init in ("normal", "zero"), "state_init", "normal or zero")

    def check_types(self):
        """Raise TypeError for a value of another type than its field's, as files may hold."""
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        for field in fields(self):
            kinds = typing.get_args(field.type) or (field.type,)  # (int, NoneType) of int | None
            value = getattr(self, field.name)
            allowed = (int, float) if kinds == (float,) else kinds
            if type(value) not in allowed:  # bool is an int to isinstance
                raise TypeError(f"{field.name} is {value!r}, must be {words[kinds[0]]}")
            if type(value) in (int, float):
                self.need(abs(value) < LARGEST, field.name, f"closer to 0 than {LARGEST:,}")

    def check_length(self, tokens):
        """Raise UserError for a sequence that is longer than block_size."""
        if tokens > self.block_size:
            raise UserError(f"{tokens} tokens do not fit block_size {self.block_size}")

    def need(self, ok, name, allowed):
        if not ok:
            raise UserError(f"{name} is {getattr(self, name)!r}, must be {allowed}")

    @property
    def n_layer(self):
        """Distinct layers, P + R + C."""
        return self.n_prelude + self.n_recurrent + self.n_coda


def published_size(layers, channels, heads):
    """A preset of table 6: as many layers before, in and after the loop."""
    return dict(n_prelude=layers, n_recurrent=layers, n_coda=layers, n_embd=channels,
                n_head=heads, value_embeds=True)


def without_loop(size):
    """The plain transformer of a preset: the same layers without loop, injection and C_proj."""
    layers = size["n_prelude"] + size["n_recurrent"] + size["n_coda"]
    return size | dict(n_prelude=layers, n_recurrent=0, n_coda=0)


PRESETS = {
    "parcae-140m": published_size(2, 768, 6),
    "parcae-370m": published_size(4, 1024, 8),
    "parcae-770m": published_size(6, 1280, 10),
    "parcae-1.3b": published_size(8, 1536, 12),
    "parcae-nano": dict(n_prelude=1, n_recurrent=2, n_coda=1, n_embd=64, n_head=2,
                        value_embeds=True, mean_recurrence=4, block_size=256),
    "parcae-micro": dict(n_prelude=2, n_recurrent=2, n_coda=2, n_embd=256, n_head=4,
                         value_embeds=True, block_size=256, vocab_size=4096),
}
PRESETS |= {name.replace("parcae", "gpt"): without_loop(size) for name, size in PRESETS.items()}


def parse_config(file, parse):
    """parse(the JSON object in a file): a ParcaeConfig. Raises UserError that names the file."""
    try:
        settings = read_json(file)
    except UserError as error:
        raise UserError(f"{file} is not the JSON of a model: {error}") from None
    try:
        return parse(settings)
    except KeyError as error:
        raise UserError(f"{file} has no {error}") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not the JSON of a model: {error}") from None


def config_of_run(settings):
    """The ParcaeConfig of a run's config.json, a dict. Raises UserError, KeyError."""
    if "model" not in settings and "n_embd" in settings:
        raise UserError("a model in another format; python published.py import makes a run of it")
    return ParcaeConfig(**settings["model"])


def read_config(run_directory):
    """The ParcaeConfig of a run directory. Raises UserError."""
    file = Path(run_directory) / "config.json"
    if not file.exists():
        raise UserError(f"{run_directory} holds no model: {file} does not exist; "
                        "train one first: python train.py")
    return parse_config(file, config_of_run)

# ------------------------------------------------------------------------------- layers


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

    rope: cos and sin, each (T, 1, head_dim), every angle twice, sin negative at even places."""
    cos, sin = rope
    swapped = x.view(*x.shape[:-1], -1, 2).flip(-1).view_as(x)  # (x1, x0), (x3, x2), ...
    return x * cos + swapped * sin


def attend(q, k, v, mask=None):
    """Attention of q (B, n_head, T, head_dim) to k and v (B, n_head, S, head_dim): causal, the last
    T of S being q's own positions; or as a mask (T, S) says, true for what is seen."""
    T, S = q.shape[2], k.shape[2]
    if mask is None and q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= 1024:
        return attend_written_out(q, k, v)
    if mask is None and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    causal = mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attend_written_out(q, k, v):
    """Causal attention as of attend, on CPUs in bfloat16: PyTorch's fused kernel takes twice as
    long."""
    T, S = q.shape[2], k.shape[2]
    mask = torch.full((T, S), -torch.inf, dtype=q.dtype).triu(S - T + 1)
    q_, k_, v_ = (z.flatten(0, 1) for z in (q, k, v))                   # (B * n_head, T, head_dim)
    scores = torch.baddbmm(mask, q_, k_.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ v_).view_as(q)


class Attention(nn.Module):
    def __init__(self, config, has_ve):
        super().__init__()
        d = config.n_embd
        self.n_head = config.n_head
        self.qk_norm = config.qk_norm
        self.c_q = Linear(d, d)
        self.c_k = Linear(d, d)
        self.c_v = Linear(d, d)
        self.c_proj = Linear(d, d)
        self.ve_gate = Linear(min(d, VE_GATE_CHANNELS), config.n_head) if has_ve else None

    def forward(self, x, rope, ve=None, kv=None):
        """x: (B, T, C); rope: see rotate; ve: None or value embeddings (B, T, C); kv: None or
        (keys, values, places, mask) of this layer and loop: two (B, n_head, capacity, head_dim),
        and what KVCache.reserve gives."""
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, -1)                       # (B, T, n_head, head_dim)
        k = self.c_k(x).view(B, T, self.n_head, -1)
        v = self.c_v(x).view(B, T, self.n_head, -1)

        # value embeddings: each head adds as much of its token's as its gate lets through, 0 to 2
        if self.ve_gate is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))      # (B, T, n_head)
            v = v + gate.unsqueeze(-1) * ve.view_as(v)

        # positions, then normalised queries and keys
        q, k = rotate(q, rope), rotate(k, rope)
        if self.qk_norm:
            q = F.rms_norm(q, q.shape[-1:], eps=QK_NORM_EPS)
            k = F.rms_norm(k, k.shape[-1:], eps=QK_NORM_EPS)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))                  # (B, n_head, T, head_dim)

        # with a cache: put these keys and values in, take out all so far, or all and a mask
        mask = None
        if kv is not None:
            keys, values, places, mask = kv
            keys[:, :, places], values[:, :, places] = k, v
            held = places.stop if mask is None else None
            k, v = keys[:, :, :held], values[:, :, :held]

        return self.c_proj(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, C))


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
        self.norm_1 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.norm_2 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, has_ve)
        self.mlp = MLP(config)

    def forward(self, x, rope, ve=None, kv=None):
        x = x + self.attn(self.norm_1(x), rope, ve, kv)
        # relu(x)^2 / 2, as published; halved here, where it costs nothing
        return torch.add(x, self.mlp(self.norm_2(x)), alpha=0.5)

# ------------------------------------------------------------------------------- injection


class Add(nn.Module):
    """h + e (table 1): as if A_bar were the identity, marginally stable.

    A new rule is a class like this one and an entry in INJECTIONS. It says how many d x d matrices
    it multiplies a token by, once and in every loop, so that FLOPs stay exact."""

    products_once = 0
    products_per_loop = 0

    def __init__(self, d):
        super().__init__()

    def input(self, e):
        """u: what forward needs of e (B, T, C); the same in every loop, so computed once."""
        return e

    def forward(self, h, u):
        """The injected state (B, T, C) from the state h (B, T, C) and u."""
        return h + u

    def spectral_radius(self):
        """Of the matrix that multiplies the state: above 1, the loop alone lets it grow."""
        return torch.ones(())


class Replace(Add):
    """e itself, of a plain transformer: there is no loop, and so no state."""

    def forward(self, h, u):
        return u


class Diagonal(nn.Module):
    """A_bar * h + dt * (B e), the rule of Parcae (eq. 3): stable whatever is learned.

    A = -exp(log_A), dt = softplus(dt_bias), A_bar = exp(dt * A) (zero-order hold), in (0, 1)."""

    products_once = 1  # B e
    products_per_loop = 0

    def __init__(self, d, a0=A0):
        super().__init__()
        self.log_A = nn.Parameter(torch.zeros(d))
        # softplus(dt_bias) = -ln a0: A_bar starts at a0
        self.dt_bias = nn.Parameter(torch.full((d,), math.log(1 / a0 - 1)))
        self.B = nn.Parameter(torch.eye(d))

    def dt(self):
        """(C,) float32 step sizes."""
        return F.softplus(self.dt_bias.float())

    def A_bar(self):
        """(C,) float32 factors by which the state shrinks in each loop."""
        A_bar = torch.exp(-self.dt() * self.log_A.float().exp())
        # float32 would round the ends to 0 and 1
        return A_bar.clamp(torch.finfo(torch.float32).tiny, 1 - 2 ** -24)

    def input(self, e):
        return F.linear(e, self.B.to(e.dtype)) * self.dt().to(e.dtype)

    def forward(self, h, u):
        dtype = u.dtype
        if h.device.type == "mps":  # where dtypes may not be mixed
            h, u = h.float(), u.float()
        return (self.A_bar() * h + u).to(dtype)

    def spectral_radius(self):
        return self.A_bar().max()


class Concat(nn.Module):
    """W [h; e] (table 1): unconstrained. W starts where the diagonal rule does, [a0 I, dt I]."""

    products_once = 1  # the half of W that sees e
    products_per_loop = 1  # the half that sees the state

    def __init__(self, d, a0=A0):
        super().__init__()
        self.W = nn.Parameter(torch.cat([a0 * torch.eye(d), -math.log(a0) * torch.eye(d)], dim=1))

    def input(self, e):
        return F.linear(e, self.W[:, e.shape[-1]:].to(e.dtype))

    def forward(self, h, u):
        return F.linear(h, self.W[:, :h.shape[-1]].to(h.dtype)) + u

    def spectral_radius(self):
        state_half = self.W[:, :len(self.W)].float().cpu()  # mps has no eigvals
        return torch.linalg.eigvals(state_half).abs().max()


INJECTIONS = {"diagonal": Diagonal, "add": Add, "concat": Concat}

# ------------------------------------------------------------------------------- KV cache


class KVCache:
    """Keys and values of a context, preallocated: pairs[layer] is a list, one pair for each loop.

    kind "per-loop": a pair for every layer and every loop, exact. "shared": a loop overwrites the
    pair of the loop before, so that earlier tokens show all loops the keys and values of their last
    one (recurrent-depth models, arXiv 2502.05171): memory does not grow with the loops.
    capacity: tokens; recurrence: the most loops. Raises UserError."""

    def __init__(self, config, batch_size, capacity, recurrence, device, dtype, kind="per-loop"):
        config.check_length(capacity)
        if kind not in ("per-loop", "shared"):
            raise UserError(f"kv_cache is {kind!r}, must be per-loop or shared")
        shape = (batch_size, config.n_head, capacity, config.n_embd // config.n_head)
        in_loop = range(config.n_prelude, config.n_prelude + config.n_recurrent)
        # of each layer, whether every loop has a pair of its own
        self.own = [kind == "per-loop" and layer in in_loop for layer in range(config.n_layer)]
        self.pairs = []
        for own in self.own:
            count = recurrence if own else 1
            # zeros: a mask hides what is not written, but not a NaN that happens to be there
            self.pairs.append([(torch.zeros(shape, device=device, dtype=dtype),
                                torch.zeros(shape, device=device, dtype=dtype))
                               for _ in range(count)])
        self.capacity = capacity
        self.pos = 0  # tokens held
        self.places = None  # a tensor where shapes are fixed, see recording.py

    def reserve(self, T):
        """(places of the next T tokens, mask of what each of them sees). Places are a slice, the
        mask is None: all so far. With fixed shapes: a tensor (T,) and (T, capacity)."""
        if self.places is not None:
            everywhere = torch.arange(self.capacity, device=self.places.device)
            return self.places, everywhere <= self.places[:, None]
        return self.take(T), None

    def take(self, T):
        """The places of the next T tokens, a slice: from now on they are held."""
        start, stop = self.pos, self.pos + T
        if stop > self.capacity:
            raise UserError(f"{stop} tokens do not fit a cache of {self.capacity}")
        self.pos = stop
        return slice(start, stop)

    def pair_of(self, layer, t=0):
        """Keys and values, each (B, n_head, capacity, head_dim), of a layer in loop t."""
        return self.pairs[layer][t if self.own[layer] else 0]

    @property
    def nbytes(self):
        return sum(t.nbytes for pairs in self.pairs for pair in pairs for t in pair)

    def rows(self, index):
        """A copy with the sequences of an index (N,), which may name one several times."""
        other = copy.copy(self)
        other.pairs = [[(keys[index], values[index]) for keys, values in pairs]
                       for pairs in self.pairs]
        return other

# ------------------------------------------------------------------------------- memory


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x (N, C) @ weight.T against targets (N,). To save memory, nothing else.

    All logits, (N, vocab_size) in float32, would be the largest tensor of a training step. Here
    they are made `chunk` rows at a time. So that none need be kept or computed again, the forward
    pass computes the gradient too."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk):
        w = weight.to(x.dtype)
        d_x, d_weight = torch.empty_like(x), torch.zeros_like(weight)
        loss = x.new_zeros((), dtype=torch.float32)
        count = (targets != IGNORED).sum()
        for x_, target, d_x_ in zip(x.split(chunk), targets.split(chunk), d_x.split(chunk)):
            log_probs = F.linear(x_, w).float().log_softmax(-1)                  # (chunk, vocab)
            loss += F.nll_loss(log_probs, target, ignore_index=IGNORED, reduction="sum")
            # d loss / d logits = softmax - 1 at the target, and nothing for ignored rows
            d_logits = log_probs.exp_()  # in the same memory: the largest tensor here
            row = torch.arange(len(target), device=target.device)
            d_logits[row, target.clamp(min=0)] -= 1
            share = (target != IGNORED) / count
            d_logits = (d_logits * share.unsqueeze(-1)).to(x.dtype)
            torch.matmul(d_logits, w, out=d_x_)
            d_weight += (d_logits.T @ x_).to(d_weight.dtype)
        ctx.save_for_backward(d_x, d_weight)
        return loss / count

    @staticmethod
    def backward(ctx, d_loss):
        d_x, d_weight = ctx.saved_tensors
        return d_x * d_loss.to(d_x.dtype), d_weight * d_loss, None, None


if __name__ == "__main__":
    nothing_to_run(__doc__)
