"""Many tensors in one launch: a table of their addresses, and which part of which tensor each program takes."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def on_device(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rows as a tensor on the device, without waiting for it."""
    table = torch.tensor(rows, dtype=dtype, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@lru_cache(maxsize=64)
def chunks(sizes: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """int64 [programs, 2]: (number of the tensor, its first element) of every chunk of `size` elements."""
    counts = torch.tensor([-(-n // size) for n in sizes], device="cpu")
    tensor = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    first = torch.cumsum(counts, 0) - counts
    start = (torch.arange(len(tensor), device="cpu") - first[tensor]) * size
    return torch.stack([tensor, start], 1).to(device)


def aligned(addresses: Sequence[Sequence[int]]) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes, so that memory can be read 16 bytes at a time."""
    return not any(address & 15 for row in addresses for address in row)
