"""Linear layers for generation with 8-bit weights: a quarter of the bytes of float32.

    python sample.py --run out/parcae-140m --dtype int8

Each row of a weight matrix becomes integers from -127 to 127 and one scale. All other weights are
bfloat16. On a CPU, a token of a large model waits for its weights, not for arithmetic, so fewer
bytes take less time. The result cannot be trained.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.layers import Linear

FEW = 16  # up to so many rows of x, PyTorch's int8 kernel is faster than F.linear
WIDTH = 32  # the kernel reads 16 weights at a time, even past a row's end; multiples of 32 are safe


class Int8Linear(nn.Module):
    """A Linear whose weight (n_out, n_in) is int8, times scale (n_out,) bfloat16."""

    def __init__(self, weight):
        super().__init__()
        weight = weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
        whole = (weight / scale.float().unsqueeze(1)).round().clamp(-127, 127)
        self.weight = nn.Parameter(whole.to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu" and len(rows) <= FEW and x.shape[-1] % WIDTH == 0:
            product = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
            return product.view(*x.shape[:-1], -1)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


def activations(dtype):
    """Return the dtype of the activations for weights of a dtype."""
    return torch.bfloat16 if dtype == torch.int8 else dtype


def prepare_weights(model, device, dtype):
    """Move a model to a device and a dtype, for generation only. Return it. With torch.int8 its
    linear layers and its head become Int8Linear, and everything else becomes bfloat16."""
    if dtype == torch.int8:
        for module in [*model.modules()]:
            for name, child in module.named_children():
                if isinstance(child, Linear):
                    setattr(module, name, Int8Linear(child.weight))
    return model.to(device, activations(dtype))
