"""The processes of a run, as started by torchrun, accelerate or Slurm, or a single process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """One process of a run.

    Args:
        rank: The rank of the process.
        size: The number of processes.
        device: The device of the process.

    Example:
        >>> from optim.distributed import world
        >>> with world() as here:
        ...     here.rank, here.size
        (0, 1)
    """

    rank: int
    size: int
    device: torch.device


@contextmanager
def world() -> Iterator[World]:
    """Yield the world that the environment describes, with its process group while the block runs.

    RANK, WORLD_SIZE and LOCAL_RANK are read as ``torchrun`` sets them (``torchrun --nproc-per-node 2 train.py``).
    Without them, or with one process, there is no process group and every collective of `optim` does nothing. An
    existing group is used and left unchanged. The device is this process's GPU (NCCL) if there are GPUs, and the CPU
    (gloo) otherwise.

    Yields:
        This process.

    Raises:
        ValueError: For a variable that is missing or not a number, by name.

    Example:
        >>> from optim.distributed import world
        >>> with world() as here:
        ...     model = torch.nn.Linear(4, 2).to(here.device)
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), _device(_number("LOCAL_RANK", dist.get_rank())))
        return
    size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", None if size > 1 else 0)
    device = _device(_number("LOCAL_RANK", rank))
    if size == 1:
        yield World(0, 1, device)
        return
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {size}, but {missing[0]} is not set; start the processes with torchrun")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=size)
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


def _number(key: str, default: int | None) -> int:
    text = os.environ.get(key)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ValueError(f"{key} is {text!r}; it must be an integer, as torchrun sets it")
    return int(text)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
