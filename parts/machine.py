"""The machine: its devices, dtypes, threads and peak FLOP/s."""

import contextlib
import ctypes
import importlib.util
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch

from parts.errors import UserError

# dense FLOP/s in bfloat16, from data sheets; the first name that fits counts
BF16_PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12,
             "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
LESS = ("MIG", "Laptop", "4090 D")  # a slice of a chip, or a smaller chip of the same name
SMALL = 64  # models with at most so many channels use one thread
CXX = {"darwin": "clang++", "win32": "cl"}  # C++ compilers; elsewhere g++


def pick_device(device="auto", compiled=False):
    """Return a torch.device; "auto" is the first available of cuda, mps and cpu. A numbered GPU
    becomes the current one, whose memory is counted and whose graphs are recorded. Raises
    UserError, also if `compiled` and a tool that compiling needs is missing."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    available = [name for name in there if there[name]]
    device = available[0] if device == "auto" else device
    name, _, index = device.partition(":")
    if name not in available or device != name and not index.isdecimal():
        raise UserError(f"--device is {device}, must be auto or one of {', '.join(available)}")
    if name == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {device}, there are {torch.cuda.device_count()} CUDA devices")
    if compiled:
        check_compiler(name)
    if name == "cuda" and index:
        torch.cuda.set_device(int(index))
    return torch.device(device)


def check_compiler(kind):
    """Raise UserError if a tool that torch.compile needs on a kind of device is missing."""
    cxx = os.environ.get("CXX") or CXX.get(sys.platform, "g++")  # as PyTorch chooses it
    if kind == "cpu" and not shutil.which(cxx):
        raise UserError(f"--compile on a CPU needs a C++ compiler, and {cxx} does not exist: "
                        "install g++, name another compiler in CXX, or leave out --compile")
    if kind == "cuda" and not importlib.util.find_spec("triton"):
        raise UserError("--compile on a GPU needs triton: pip install triton, or leave out "
                        "--compile")


def pick_dtype(device, dtype="auto"):
    """Return a torch.dtype for activations; "auto" is bfloat16 if faster, otherwise float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":  # measured, because some CPUs are slower with bf16 instructions
        faster = matmul_peak(device, torch.bfloat16, 256) > matmul_peak(device, torch.float32, 256)
    else:
        faster = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if faster else torch.float32


def matmul_peak(device, dtype, size=1024):
    """Return the FLOP/s of large matrix products, from a data sheet or the best of a few runs."""
    if device.type == "cuda":
        name = machine_name(device)
        known = [peak for part, peak in BF16_PEAK.items() if part in name]
        if known and dtype == torch.bfloat16 and not any(word in name for word in LESS):
            return known[0]
        size = 8 * size  # in a small product, most of the time would go to its launch
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    while len(seconds) < 8 and sum(seconds) < 0.5:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(seconds)


def machine_name(device):
    """Return the name of a GPU, or of the processor, as well as the system knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def use_threads(channels, asked=None):
    """Set the number of threads to `asked`. None means one thread for small models, whose rounding
    then does not depend on the cores, and PyTorch's default for others (OMP_NUM_THREADS, cores)."""
    if asked or channels <= SMALL:
        torch.set_num_threads(asked or 1)


def keep_freed_memory():
    """Make glibc keep freed memory. By default it maps and clears each large activation anew."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc; Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD, bytes
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
