"""The layers of a transformer, as in the published model.

Nothing here loops; a plain transformer has the same layers. model.py builds the models from them
and explains the shape (B, S, D).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

QK_NORM_EPS = torch.finfo(torch.float32).eps
CHUNK = 1024  # tokens whose logits are held at once in training
GPU_CHUNK = 4096  # fewer chunks, because each reads and writes the head's gradient
IGNORED = -100  # targets with this value do not count
FEW = 6  # rows up to which compiled code should multiply itself, see Linear
VE_GATE_CHANNELS = 32  # the first channels decide how much value embedding a head takes


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Linear(nn.Linear):
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        """Return x (..., n_in) times the weight's transpose, (..., n_out)."""
        weight = self.weight.to(x.dtype)
        # For few rows on a CPU, a loop that the compiler writes is 1.2 to 1.8 times as fast
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x.shape[:-1].numel() <= FEW:
            return (weight * x.unsqueeze(-2)).sum(-1)
        return F.linear(x, weight)


def rotate(x, rope):
    """Return x (B, S, n_head, head_dim) with adjacent pairs (x0, x1), (x2, x3), ... rotated:
    (x0 cos - x1 sin, x1 cos + x0 sin). rope: cos and sin, each (S, 1, head_dim), so each angle
    comes twice, and sin is negated at even places."""
    cos, sin = rope
    swapped = x.view(*x.shape[:-1], -1, 2).flip(-1).view_as(x)  # (x1, x0), (x3, x2), ...
    return x * cos + swapped * sin


def attend(q, k, v, mask=None):
    """Return the attention of q (B, n_head, S, head_dim) over k and v (B, n_head, K, head_dim).
    mask (S, K): true for what is seen. Without it, attention is causal; q has the last S places."""
    S, K = q.shape[2], k.shape[2]
    if mask is None and q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < S <= 1024:
        return attend_written_out(q, k, v)
    if mask is None and 1 < S < K:
        mask = torch.ones(S, K, dtype=torch.bool, device=q.device).tril(K - S)
    causal = mask is None and S > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attend_written_out(q, k, v):
    """Return causal attention for bfloat16 on CPUs, where PyTorch's own takes twice as long."""
    S, K = q.shape[2], k.shape[2]
    mask = torch.full((S, K), -torch.inf, dtype=q.dtype).triu(K - S + 1)
    q_, k_, v_ = (z.flatten(0, 1) for z in (q, k, v))                   # (B * n_head, S, head_dim)
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
        """Return what each token of x (B, S, D) reads, (B, S, D). rope: see rotate; ve: value
        embeddings (B, S, D); kv: (keys, values, places, mask), see KVCache.pair_of and reserve."""
        B, S, D = x.shape
        q = self.c_q(x).view(B, S, self.n_head, -1)                       # (B, S, n_head, head_dim)
        k = self.c_k(x).view(B, S, self.n_head, -1)
        v = self.c_v(x).view(B, S, self.n_head, -1)

        # value embeddings: each head adds its part of the token's, times a gate from 0 to 2
        if self.ve_gate is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))      # (B, S, n_head)
            v = v + gate.unsqueeze(-1) * ve.view_as(v)

        q, k = rotate(q, rope), rotate(k, rope)
        if self.qk_norm:
            q = F.rms_norm(q, q.shape[-1:], eps=QK_NORM_EPS)
            k = F.rms_norm(k, k.shape[-1:], eps=QK_NORM_EPS)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))                  # (B, n_head, S, head_dim)

        # with a cache: store these keys and values, then read all so far (with a mask, all places)
        mask = None
        if kv is not None:
            keys, values, places, mask = kv
            keys[:, :, places], values[:, :, places] = k, v
            k, v = keys, values
            if mask is None:  # places is a slice
                k, v = k[:, :, :places.stop], v[:, :, :places.stop]

        return self.c_proj(attend(q, k, v, mask).transpose(1, 2).reshape(B, S, D))


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


def loss_and_gradient(logits, targets):
    """Return the summed cross-entropy of logits (n, vocab_size), float32, and its gradient with
    respect to the logits, in their dtype. That of ignored rows is wrong; HeadLoss makes it 0."""
    log_probs = logits.float().log_softmax(-1)
    loss = F.nll_loss(log_probs, targets, ignore_index=IGNORED, reduction="sum")
    # d loss / d logits = softmax - 1 at the target
    gradient = log_probs.exp_()  # in place, because it is the largest tensor here
    gradient[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1
    return loss, gradient.to(logits.dtype)


class HeadLoss(torch.autograd.Function):
    """Compute the mean cross-entropy of x (N, D) @ weight.T against targets (N,) in little memory.
    All logits, (N, vocab_size) in float32, would be the largest tensor of a training step, so they
    are made in chunks of rows. Forward computes the gradient, too, so that no chunk must be kept.

    loss_and_gradient: the function above, perhaps compiled."""

    @staticmethod
    def forward(ctx, x, weight, targets, loss_and_gradient):
        w = weight.to(x.dtype)
        valid = targets != IGNORED                                                          # (N,)
        x = x * valid.unsqueeze(-1)  # so that ignored rows add nothing to d_weight
        d_x, d_weight, loss = torch.empty_like(x), torch.zeros_like(weight), 0.0
        chunk = GPU_CHUNK if x.device.type in ("cuda", "meta") else CHUNK  # meta: footprint.py
        for x_, target, d_x_ in zip(*(tensor.split(chunk) for tensor in (x, targets, d_x))):
            loss_, d_logits = loss_and_gradient(F.linear(x_, w), target)       # (chunk, vocab_size)
            loss = loss + loss_
            torch.matmul(d_logits, w, out=d_x_)
            d_weight += (d_logits.T @ x_).to(d_weight.dtype)
        ctx.save_for_backward(d_x, d_weight, valid)
        return loss / valid.sum()

    @staticmethod
    def backward(ctx, d_loss):
        d_x, d_weight, valid = ctx.saved_tensors
        scale = d_loss / valid.sum()
        d_x = (d_x * (scale * valid).unsqueeze(-1)).to(d_x.dtype)
        return d_x, d_weight * scale, None, None
