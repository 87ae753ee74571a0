"""The looped transformer: a decoder-only transformer that runs its middle layers several times.

    e       = Norm(prelude(tokens))                 once
    h_0     ~ N(0, sigma^2)                         in training; zero otherwise
    x       = A_bar * h_t + B_bar e                 each loop shrinks the old state, adds e again
    h_{t+1} = x + what the recurrent block adds     its layers are residual; T loops
    logits  = head(Norm(coda(C_proj h_T)))          once

0 < A_bar < 1, and the layers read normalised input, so what they add is bounded. For given weights
the state therefore cannot blow up, however many loops run ("Parcae: Scaling Laws For Stable Looped
Language Models", arXiv 2604.12946, eq. 3; "§" and "eq." refer to this paper).
A plain transformer is the same model with an empty recurrent block (n_recurrent=0).

Like the published model, this one differs from a textbook GPT:
- an RMSNorm precedes attention and MLP, which have no biases; the MLP has relu(x)^2 / 2
- embedding and head are the same matrix, unless the configuration unties them
- rotary positions turn adjacent pairs of channels; then queries and keys are normalised
- with value embeddings, every second layer and the last add a gated lookup to their values
- every sequence of a training batch draws its own number of loops and starts from noise
- the gradient flows through a sequence's last `backprop_depth` loops only
This code departs from the published code in four points:
- it computes only the rows that still loop
- it draws the depths of a batch together, so that their sum hardly varies (`sample_depths`)
- all rows of a batch start from the same noise, so that a batch split over devices computes the
  same; in eval mode they start from zero, its mean, which makes evaluation deterministic
- float32 weights are cast to the dtype of the activations where they are used (`compute_dtype`)

The shape (B, S, D) is B rows (sequences of a batch) of S tokens with D channels. `recurrence` is
the number of loops T of all rows, `depths` has one for each row, and t counts the loops so far.
"""

import math
import numbers
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.cache import KVCache
from parts.config import PRESETS, ParcaeConfig, read_config
from parts.errors import UserError
from parts.layers import IGNORED, Block, HeadLoss, Linear, RMSNorm, loss_and_gradient
from parts.reading import check_finite, fit_weights, load_checkpoint, read_json

__all__ = ["INJECTIONS", "PRESETS", "KVCache", "Parcae", "ParcaeConfig", "UserError"]
A0 = math.sqrt(1 / 5)  # initial value of A_bar (published code)

# ------------------------------------------------------------------------------- injection


class Diagonal(nn.Module):
    """Compute A_bar * h + dt * (B e), Parcae's rule (eq. 3), which is stable whatever is learned.

    A = -exp(log_A) and dt = softplus(dt_bias), so 0 < A_bar = exp(dt * A) < 1 (zero-order hold)."""

    products_once = 1  # D x D matrices that multiply e: B
    products_per_loop = 0  # D x D matrices that multiply the state: none, as A_bar is diagonal

    def __init__(self, d):
        super().__init__()
        self.log_A = nn.Parameter(torch.zeros(d))
        # softplus(dt_bias) = -ln A0, so A_bar starts at A0
        self.dt_bias = nn.Parameter(torch.full((d,), math.log(1 / A0 - 1)))
        self.B = nn.Parameter(torch.eye(d))

    def dt(self):
        """Return the step sizes, (D,) float32."""
        return F.softplus(self.dt_bias.float())

    def A_bar(self):
        """Return the factors, (D,) float32, by which each loop shrinks the state."""
        A_bar = torch.exp(-self.dt() * self.log_A.float().exp())
        # without the clamp, float32 would round extreme factors to 0 or 1
        return A_bar.clamp(torch.finfo(torch.float32).tiny, 1 - 2 ** -24)

    def input(self, e):
        return F.linear(e, self.B.to(e.dtype)) * self.dt().to(e.dtype)

    def forward(self, h, u):
        dtype = u.dtype
        if h.device.type == "mps":  # it cannot mix dtypes
            h, u = h.float(), u.float()
        return (self.A_bar() * h + u).to(dtype)

    def spectral_radius(self):
        return self.A_bar().abs().max()


class Add(nn.Module):
    """Compute h + e (table 1). A_bar is the identity, so this is only marginally stable."""

    products_once = 0
    products_per_loop = 0

    def __init__(self, d):
        super().__init__()

    def input(self, e):
        """Return u (B, S, D), what forward needs from e (B, S, D). All loops use the same u."""
        return e

    def forward(self, h, u):
        """Return the layers' input (B, S, D), made from the state h (B, S, D) and u (B, S, D)."""
        return h + u

    def spectral_radius(self):
        """Return the largest absolute eigenvalue of h's matrix. Above 1, this rule lets h grow."""
        return torch.ones(())


class Concat(nn.Module):
    """Compute W [h; e] (table 1), unconstrained. W starts as [A0 I, dt I], like Diagonal."""

    products_once = 1  # the half of W that sees e
    products_per_loop = 1  # the half that sees the state

    def __init__(self, d):
        super().__init__()
        self.W = nn.Parameter(torch.cat([A0 * torch.eye(d), -math.log(A0) * torch.eye(d)], dim=1))

    def input(self, e):
        return F.linear(e, self.W[:, e.shape[-1]:].to(e.dtype))

    def forward(self, h, u):
        return F.linear(h, self.W[:, :h.shape[-1]].to(h.dtype)) + u

    def spectral_radius(self):
        state_half = self.W[:, :len(self.W)].float().cpu()  # mps has no eigvals
        return torch.linalg.eigvals(state_half).abs().max()


# a new rule is a class like these and an entry here; its products count in flops_per_token
INJECTIONS = {"diagonal": Diagonal, "add": Add, "concat": Concat}

# ------------------------------------------------------------------------------- the model


@dataclass
class Inputs:
    """Hold what the layers read for a batch of tokens, in addition to the state."""

    rope: tuple  # cos and sin of the positions, each (S, 1, head_dim)
    value_embeds: dict  # {number of the layer: (B, S, D)}
    places: slice | torch.Tensor  # where a cache holds the tokens, see KVCache.reserve
    mask: torch.Tensor | None  # which places each token sees; None: all up to its own

    def each(self, f):
        """Return the same Inputs, with f applied to each tensor that has a row per sequence."""
        return replace(self, value_embeds={i: f(ve) for i, ve in self.value_embeds.items()})


class Parcae(nn.Module):
    """A looped transformer: `begin`, `recurrent_pass` in every loop, then `readout` and `head`.

    `model(idx, ...)` is for training and gives each row its own depth. `hidden` and `advance` are
    for generation with a KV cache, at one depth for all rows. `states` yields after each loop."""

    compute_dtype = None  # dtype of the activations; None: the dtype of the weights
    loss_and_gradient = staticmethod(loss_and_gradient)
    step = None  # the training step that the weights come from, see from_pretrained

    def __init__(self, config: ParcaeConfig):
        super().__init__()
        self.config = config
        config.need(config.injection in INJECTIONS, "injection",
                    f"one of {', '.join(INJECTIONS)}")
        P, R, d = config.n_prelude, config.n_recurrent, config.n_embd

        # value embeddings in layers 1, 3, 5, ... and in the last one
        with_ve = [i for i in range(config.n_layer)
                   if config.value_embeds and (i % 2 == 1 or i == config.n_layer - 1)]
        blocks = [Block(config, i in with_ve) for i in range(config.n_layer)]

        self.wte = nn.Embedding(config.vocab_size, d)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(config.vocab_size, d)
                                           for i in with_ve})
        self.prelude = nn.ModuleList(blocks[:P])
        self.recurrent = nn.ModuleList(blocks[P:P + R])
        self.coda = nn.ModuleList(blocks[P + R:])
        # a plain transformer needs none of the next three: its coda reads the prelude's output
        normed = R and config.prelude_norm
        self.norm_prelude = RMSNorm(d, eps=config.norm_eps) if normed else nn.Identity()
        self.injection = INJECTIONS[config.injection](d) if R else Add(d)
        self.C_proj = Linear(d, d) if R else nn.Identity()
        self.norm_f = RMSNorm(d, eps=config.norm_eps)
        self.lm_head = Linear(d, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

        # the tables for `rotate`, (2, block_size, 1, head_dim)
        head_dim = d // config.n_head
        frequency = config.rope_base ** -(torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.outer(torch.arange(config.block_size), frequency).repeat_interleave(2, -1)
        sign = torch.tensor([-1.0, 1.0]).repeat(head_dim // 2)
        rope = torch.stack([angle.cos(), angle.sin() * sign]).unsqueeze(2)
        self.register_buffer("rope", rope, persistent=False)

        self.init_std = math.sqrt(2 / (5 * d))  # std of weights and h_0 (published code)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Initialise weights as the published code does. A matrix that you add is orthogonal."""
        for name, p in self.named_parameters():
            if p.is_meta:
                continue  # only its shape is needed
            if name.startswith("value_embeds."):
                nn.init.normal_(p)
            elif name.endswith("ve_gate.weight"):
                limit = 1 / math.sqrt(p.shape[1])
                nn.init.uniform_(p, -limit, limit)
            elif name.endswith(("attn.c_proj.weight", "mlp.proj.weight")):
                nn.init.zeros_(p)
            elif p.ndim == 2 and not name.startswith("injection."):  # its class initialises it
                orthogonal_(p, self.init_std)

    @property
    def dtype(self):
        """Return the dtype of the activations."""
        return self.compute_dtype or self.wte.weight.dtype

    # ------------------------------------------------------------------------- one loop

    def begin(self, idx, cache=None):
        """Return what the loops need from the tokens idx (B, S): their Inputs; u = B_bar e, the
        same in all loops; h_0, noise in training, zero otherwise. u and h_0 are (B, S, D)."""
        inputs = self.look_up(idx, cache)
        x = self.wte(idx).to(self.dtype)                                                # (B, S, D)
        e = self.norm_prelude(self.run(self.prelude, 0, x, inputs, cache))
        h = torch.zeros_like(e[:1])
        if self.training and self.config.state_init == "normal":
            h = torch.randn_like(h) * self.init_std
        return inputs, self.injection.input(e), h.expand_as(e)

    def recurrent_pass(self, h, u, inputs, cache=None, t=0):
        """Return the state (B, S, D) after one more loop (eq. 3). t counts the loops before it.
        It is an int, which finds the place in a cache, or in `forward` a tensor (B, 1), for changes
        of the code that depend on the loop (docs/manual.md)."""
        if not self.recurrent:
            return u  # in a plain transformer, u is the prelude's output
        h = self.injection(h, u)
        return self.run(self.recurrent, self.config.n_prelude, h, inputs, cache, t)

    def readout(self, h, inputs, cache=None):
        """Return the head's input (B, S, D), which the coda makes from a state h (B, S, D)."""
        first = self.config.n_prelude + self.config.n_recurrent
        return self.norm_f(self.run(self.coda, first, self.C_proj(h), inputs, cache))

    def head(self, x):
        """Return the logits (B, S, vocab_size) float32 for the head's input x (B, S, D)."""
        return self.lm_head(x).float()

    def look_up(self, idx, cache=None):
        """Return the Inputs of idx (B, S). A cache reserves its next S places for them."""
        S = idx.shape[1]
        self.config.check_length(S)
        places, mask = (slice(S), None) if cache is None else cache.reserve(S)
        cos, sin = self.rope[:, places].to(self.dtype)
        value_embeds = {int(i): table(idx).to(self.dtype) for i, table in self.value_embeds.items()}
        return Inputs((cos, sin), value_embeds, places, mask)

    def run(self, layers, first, x, inputs, cache, t=0):
        """Return x (B, S, D) after `layers`, whose numbers begin with `first`, in loop t."""
        for i, block in enumerate(layers, first):
            kv = None if cache is None else (*cache.pair_of(i, t), inputs.places, inputs.mask)
            x = block(x, inputs.rope, inputs.value_embeds.get(i), kv)
        return x

    # ------------------------------------------------------------------------- all loops at once

    def forward(self, idx, targets=None, *, recurrence=None, depths=None):
        """Return (logits, None) or, with targets, (None, mean loss in nats per token). Logits are
        (B, S, vocab_size) float32; in training they would be the largest tensor, so none are kept.

        idx, targets: (B, S) int64; targets of -100 are ignored.
        recurrence: loops of every row. depths: (B,) int64, loops of each row, which replace it.
            Without both, depths are drawn in train mode and are mean_recurrence in eval mode.
        In train mode the gradient flows through the last backprop_depth loops (§4, appendix E).
        Raises UserError for a depth below 1, depths not one for each row, or S above block_size."""
        # Rows are independent. Sort the deepest first, so that rows that still loop come first.
        depths = self.depths_of(len(idx), recurrence, depths)
        order = sorted(range(len(idx)), key=lambda row: -depths[row])
        depths = [depths[row] for row in order]
        order = torch.tensor(order, device=idx.device)

        # the prelude, once
        inputs, u, h = self.begin(idx[order])

        # the loop: a row's last backprop_depth loops get a gradient, its early loops none; in eval
        # mode there are no early loops. With depths [9, 5, 2] and a backprop_depth of 4:
        most = self.config.backprop_depth if self.training else max(depths)
        last = [min(depth, most) for depth in depths]  # [4, 4, 2]
        early = [depth - n for depth, n in zip(depths, last)]  # [5, 1, 0]
        done = torch.tensor(early, device=idx.device)  # loops before the last ones
        with torch.no_grad():  # detached, because PyTorch's FLOP counter fails on views made here
            h = self.loop(h, u.detach(), inputs.each(torch.detach), torch.zeros_like(done), early)
        h = self.loop(h, u, inputs, done, last)

        # the coda, once; for a mean loss the sorted rows need not return to their original order
        x = self.readout(h, inputs)
        if targets is None:
            return self.head(x[order.argsort()]), None
        targets = targets[order]
        if self.training:
            loss = HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                  self.loss_and_gradient)
        else:
            loss = F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten(),
                                   ignore_index=IGNORED)
        return None, loss

    def loop(self, h, u, inputs, done, rounds):
        """Return the state (B, S, D) after rounds[i] more loops of row i. Rows must be sorted, most
        rounds first. done (B,): how many loops each row has already run."""
        for n in range(rounds[0]):
            live = sum(count > n for count in rounds)  # so many rows, the first ones, still loop
            some = inputs.each(itemgetter(slice(live)))  # [:live] of each tensor
            new = self.recurrent_pass(h[:live], u[:live], some, t=done[:live, None] + n)
            h = torch.cat([new, h[live:]])
        return h

    # ------------------------------------------------------------------------- loop by loop

    @torch.no_grad()
    def states(self, idx, most, cache=None):
        """Yield (state (B, S, D), Inputs) of idx (B, S) int64 after each loop 1, ..., most.

            for h, inputs in model.states(idx, 8):
                logits = model.head(model.readout(h, inputs))  # as if this loop were the last

        To exit early, use `break`. A cache has moved on by S tokens before the first loop."""
        inputs, u, h = self.begin(idx, cache)
        for t in range(most):
            h = self.recurrent_pass(h, u, inputs, cache, t)
            yield h, inputs

    def hidden(self, idx, recurrence, cache=None):
        """Return the head's input (B, S, D) after `recurrence` loops of every row."""
        inputs, u, h = self.begin(idx, cache)
        for t in range(recurrence):
            h = self.recurrent_pass(h, u, inputs, cache, t)
        return self.readout(h, inputs, cache)

    def advance(self, idx, cache, start, stop, h=None, u=None):
        """Run loops start, ..., stop - 1 for idx (B, S), the next tokens of a cache's sequences.
        Return their logits (B, S, vocab_size) float32, the state h and u, both (B, S, D).

        parts/draft.py runs the first loops of a few tokens, one after the other, then sets
        cache.pos back and runs the other loops of all of them together, from h and u."""
        if start == 0:
            inputs, u, h = self.begin(idx, cache)
        else:
            inputs = self.look_up(idx, cache)
        for t in range(start, stop):
            h = self.recurrent_pass(h, u, inputs, cache, t)
        return self.head(self.readout(h, inputs, cache)), h, u

    def new_cache(self, batch_size, capacity, recurrence, kind="per-loop"):
        """Return an empty KVCache for this model."""
        device = self.wte.weight.device
        return KVCache(self.config, batch_size, capacity, recurrence, device, self.dtype, kind)

    def compile_layers(self):
        """Compile each layer and the head's loss. PyTorch makes a graph for the first batch size
        and one for all others, both with and without value embeddings, gradient and training. These
        are more than the 8 graphs that it allows for a function by default."""
        torch._dynamo.config.recompile_limit = 64
        for block in [*self.prelude, *self.recurrent, *self.coda]:
            block.compile()
        self.loss_and_gradient = torch.compile(loss_and_gradient)

    # ------------------------------------------------------------------------- depths

    def sample_depths(self, batch_size, generator=None, mean=None):
        """Return depths for a training batch, (batch_size,) int64, drawn from Poisson(mean) but at
        least 1 (§4), so that they average mean + exp(-mean); with a mean of 1, all are 1. None
        stands for mean_recurrence.

        The draws are stratified: one comes from each of batch_size equal slices of the
        distribution, in random order. Each draw alone is Poisson, but their sum hardly varies."""
        mean = self.config.mean_recurrence if mean is None else mean
        if mean == 1 or not self.config.n_recurrent:
            return torch.ones(batch_size, dtype=torch.int64)
        uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        quantile = (torch.arange(batch_size) + uniform) / batch_size
        # the first k with P(Poisson <= k) >= quantile, up to 12 standard deviations above the mean
        end = mean + 12 * math.ceil(math.sqrt(mean)) + 12
        k = torch.arange(end, dtype=torch.float64)
        # gammaincc(k + 1, mean) is P(Poisson <= k)
        cdf = torch.special.gammaincc(k + 1, torch.tensor(mean, dtype=torch.float64))
        depths = torch.searchsorted(cdf, quantile).clamp(1, end - 1)
        return depths[torch.randperm(batch_size, generator=generator)]

    def depths_of(self, batch_size, recurrence=None, depths=None):
        """Return the loops of each row, a list of batch_size ints; arguments are as in forward."""
        if depths is not None:
            if depths.shape != (batch_size,):
                raise UserError(f"depths has shape {tuple(depths.shape)}, must be ({batch_size},), "
                                "one for each sequence")
            depths = depths.tolist()
        elif recurrence is None and self.training:
            depths = self.sample_depths(batch_size).tolist()
        else:
            loops = self.config.mean_recurrence if recurrence is None else recurrence
            depths = [loops] * batch_size
        fewest = min(depths)
        if fewest < 1 or not isinstance(fewest, numbers.Integral):
            raise UserError(f"recurrence is {fewest}, must be at least 1, a whole number")
        return depths

    # ------------------------------------------------------------------------- what it costs

    def matrices(self):
        """Return the weight matrices of the layers, which Muon trains (appendix E)."""
        blocks = [*self.prelude, *self.recurrent, *self.coda]
        return [p for block in blocks for p in block.parameters() if p.ndim == 2]

    def matmul_params(self, accounting="exact"):
        """Return (once, core): parameters that multiply a token once, and in every loop."""
        if accounting == "paper":
            core = count_parameters(self.recurrent)
            return count_parameters(self) - core - self.wte.weight.numel(), core
        if accounting != "exact":
            raise UserError(f"accounting is {accounting!r}, must be exact or paper")
        square = self.config.n_embd ** 2
        outside = nn.ModuleList([self.prelude, self.coda, self.C_proj])
        once = count_parameters(outside, dimensions=2)
        once += self.lm_head.weight.numel() + self.injection.products_once * square
        core = count_parameters(self.recurrent, dimensions=2)
        return once, core + self.injection.products_per_loop * square

    def flops_per_token(self, recurrence=None, backprop_depth=None, context=None,
                        accounting="exact"):
        """Return the training FLOPs per token; a multiply-add is two.

        recurrence: loops; None is mean_recurrence (a mean over sequences may be fractional).
        backprop_depth: loops with gradient; None is the configured number; 0 is inference.
        context: tokens attended to; None is block_size; it is not halved for causality.
        accounting: "exact" counts matmuls; "paper" counts as the published code does (appendix D),
            which takes value-embedding tables for matmuls and leaves out a tied head."""
        cfg = self.config
        loops = cfg.mean_recurrence if recurrence is None else recurrence
        with_gradient = min(loops, cfg.backprop_depth) if backprop_depth is None else backprop_depth
        once, core = self.matmul_params(accounting)
        attention = 4 * cfg.n_embd * (context or cfg.block_size)  # of one layer, forward
        forward_once = 2 * once + (cfg.n_prelude + cfg.n_coda) * attention
        forward_loop = 2 * core + cfg.n_recurrent * attention
        if backprop_depth == 0:
            return float(forward_once + loops * forward_loop)
        # A backward pass costs two forward passes. A rule that multiplies the state (Concat) saves
        # one product: its first loop with a gradient passes none on to the state before
        flops = 3 * forward_once + (loops + 2 * with_gradient) * forward_loop
        if accounting == "exact":
            flops -= 2 * self.injection.products_per_loop * cfg.n_embd ** 2
        return float(flops)

    # ------------------------------------------------------------------------- reading a run

    @classmethod
    def from_pretrained(cls, run_directory):
        """Return the model in a run directory of train.py, in eval mode. Its `step` is the training
        step of the weights, or None if the run does not record it. Raises UserError."""
        path = Path(run_directory)
        config = read_config(path)
        trained = read_json(path / "config.json").get("class", "Parcae")
        if trained not in (cls.__name__, "Parcae"):
            raise UserError(f"{path} holds a model of class {trained}: only runs/arena.py reads it")
        model = cls(config)
        checkpoint = load_checkpoint(path / "ckpt.pt")
        weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
        fit_weights(model, weights, f"the weights in {path} do not fit its config.json")
        check_finite(model, path)
        state = checkpoint.get("state")
        step = state.get("step") if isinstance(state, dict) else None
        model.step = step if type(step) is int else None
        return model.eval()


def orthogonal_(p, std):
    """Fill a matrix p with orthogonal rows (columns if it is tall) whose entries have this std.

    As published, they are made from normal numbers, truncated at two standard deviations."""
    start = nn.init.trunc_normal_(p.new_empty(max(p.shape), min(p.shape)))
    q, r = torch.linalg.qr(start)
    q = q * r.diagonal().sign() * std * math.sqrt(len(q))
    p.copy_(q if len(p) == len(q) else q.T)


def count_parameters(module, dimensions=None):
    """Return a module's number of parameters; dimensions (1 or 2): only those of such tensors."""
    return sum(p.numel() for p in module.parameters() if dimensions in (None, p.ndim))
