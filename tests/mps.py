"""A device that refuses what Apple's mps refuses, on any machine: tensors of the CPU with a mark.

Within `FakeMps`, torch.device("mps") works: what is made there or moved there is marked, and so is
all that comes from it. It refuses what mps does not have or do: float64, mixed floating dtypes (in
our own files; PyTorch's are trusted), some functions, tensors of the host beside its own, and
copies that nobody waits for.
"""

import sys

import torch
import torch._dynamo  # noqa: F401  optimisers import it, which fails under FakeMps
from conftest import ROOT
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

MPS = torch.device("mps")
MARKED = WeakTensorKeyDictionary()  # {tensor on the device: True}
MISSING = ("eig", "linalg.qr", "linalg.svd", "gammainc", "Tensor.double", "Tensor.numpy",
           "Tensor.__array__")
ANYWHERE = ("Tensor.to", "Tensor.copy_", "Tensor.type")  # take tensors of two devices or dtypes


class Refused(AssertionError):
    """What mps would say."""


def leaves(values):
    """Yield what lists, tuples and dicts hold, at whatever depth."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from leaves(value)
        elif isinstance(value, dict):
            yield from leaves(value.values())
        else:
            yield value


def on_host(value):
    """The same arguments, on the device that is really there."""
    if isinstance(value, list | tuple):
        return tuple(map(on_host, value))
    return "cpu" if isinstance(value, str | torch.device) and str(value) == "mps" else value


def mark(result):
    """Mark what a function returns, a tensor or several."""
    for tensor in leaves([result]):
        if isinstance(tensor, torch.Tensor):
            if tensor.dtype in (torch.float64, torch.complex64, torch.complex128):
                raise Refused(f"Cannot convert a MPS Tensor to {tensor.dtype}")
            MARKED[tensor] = True
    return result


class FakeMps(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = (resolve_name(func) or "").removeprefix("torch.")
        if not name or name == "device":  # it computes nothing
            return func(*args, **kwargs)
        flat = list(leaves([args, kwargs]))
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        here = [tensor for tensor in tensors if tensor in MARKED]
        devices = [str(value) for value in flat if isinstance(value, str | torch.device)
                   and str(value) in ("cpu", "mps")]
        if not here and "mps" not in devices:
            return func(*args, **kwargs)
        if name == "Tensor.device.__get__":
            return MPS

        check(name, args, kwargs, tensors, here)
        result = func(*map(on_host, args), **{key: on_host(kwargs[key]) for key in kwargs})
        if name == "Tensor.data.__set__":  # so modules move their parameters
            mark(args[0] if args[1] in MARKED else None)
        elif name in ("Tensor.cpu", "Tensor.tolist") or devices == ["cpu"]:
            return result.clone() if isinstance(result, torch.Tensor) else result
        elif here:
            mark(result)
        else:  # made there, or moved there
            result = mark(result.detach().clone())
        return result


def check(name, args, kwargs, tensors, here):
    """Raise Refused for what mps would not do."""
    if any(part in name for part in MISSING):
        raise Refused(f"{name} is not there for MPS Tensors")
    if kwargs.get("non_blocking") or name == "Tensor.to" and args[3:4] == (True,):
        raise Refused(f"{name} that nobody waits for")
    if name in ANYWHERE or name.endswith(("__get__", "__set__")):
        return
    floats = {tensor.dtype for tensor in here if tensor.is_floating_point() and tensor.ndim}
    ours = sys._getframe(2).f_code.co_filename.startswith(str(ROOT))
    if ours and len(floats) > 1:
        raise Refused(f"{name} requires the same element type for all operands, not {floats}")
    if here and any(tensor.ndim and tensor not in MARKED for tensor in tensors):
        raise Refused(f"{name} expected all tensors to be on the same device")
