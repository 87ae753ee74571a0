"""Set up ranks: the processes that torchrun starts and that train together, or a single process.

Rank 0 writes and prints. Each rank computes its share of a batch on its own device.
"""

import os

import torch
import torch.distributed as dist

from parts.errors import UserError
from parts.machine import keep_freed_memory, pick_device, pick_dtype


def ranks():
    """Return (rank of this process, number of ranks) from the variables that torchrun sets; (0, 1)
    without them. Raises UserError if they do not say how several ranks find each other."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    rank, world = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    advice = "start several ranks with torchrun; for a single one: unset RANK WORLD_SIZE"
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {world} in the environment, must be "
                        f"whole numbers with RANK below WORLD_SIZE: {advice}")
    if int(world) > 1 and missing:
        raise UserError(f"WORLD_SIZE is {world} in the environment, and {' and '.join(missing)} "
                        f"not set there: {advice}")
    return int(rank), int(world)


def rank():
    """Return the rank of this process; it is 0 for the first process or a single one."""
    return ranks()[0]


def world():
    """Return the number of ranks."""
    return ranks()[1]


def say(text):
    """Print a text on rank 0 only."""
    if rank() == 0:
        print(text)


def setup_device(args):
    """Return the device of this rank, after connecting the ranks with each other."""
    device = pick_device(args.device, args.compile)
    on_gpu = device.type == "cuda"
    if on_gpu:
        own = os.environ.get("LOCAL_RANK") if world() > 1 else None
        device = pick_device(f"cuda:{own or device.index or 0}")
        torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    if world() > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    return device


def common_dtype(device, dtype):
    """Return the dtype of activations, picked by rank 0: "auto" measures, so ranks might differ."""
    picked = [pick_dtype(device, dtype) if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(picked)
    return picked[0]


def all_sum(tensor):
    """Return the sum of a tensor over all ranks, computed in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def asked_to_stop(received, device):
    """Return whether any rank has received a signal; all ranks get the same answer."""
    if world() == 1:
        return bool(received)  # without waiting for the device
    return all_sum(torch.tensor(len(received), device=device)).item() > 0
