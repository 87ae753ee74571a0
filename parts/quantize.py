"""Linear layers with weights of 8 bits, to generate: a quarter of the bytes of float32.

    python sample.py --run out/parcae-140m --dtype int8

A row of a weight matrix becomes whole numbers from -127 to 127 and one scale. All else stays
bfloat16. On a CPU a token of a large model waits for weights, not for arithmetic: fewer bytes take
less time. Not for training.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.layers import Linear

FEW = 16  # rows up to which PyTorch's kernel beats a product with weights turned back
WIDTH = 32  # it reads 16 weights at a time, beyond the end of rows of other widths; 32 is safe


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
    """Return the dtype of what is multiplied with weights of a dtype."""
    return torch.bfloat16 if dtype == torch.int8 else dtype


def prepare_weights(model, device, dtype):
    """Return a model that only generates from now on, on a device, with weights of a dtype: with
    torch.int8 its linear layers (also the head) become Int8Linear, and all else bfloat16."""
    if dtype == torch.int8:
        for module in [*model.modules()]:
            for name, child in module.named_children():
                if isinstance(child, Linear):
                    setattr(module, name, Int8Linear(child.weight))
    return model.to(device, activations(dtype))

