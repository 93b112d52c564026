"""Launches that process many tensors: a table of addresses, and the part of a tensor that each program processes."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def on_device(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return rows as a tensor on a device, without waiting for the copy.

    Args:
        rows: The rows.
        dtype: The dtype of the tensor.
        device: The device.

    Returns:
        A tensor of shape [rows, columns].
    """
    table = torch.tensor(rows, dtype=dtype, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@lru_cache(maxsize=64)
def chunks(sizes: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Return the chunks of tensors.

    Args:
        sizes: The number of elements of each tensor.
        size: The number of elements of a chunk.
        device: The device of the result.

    Returns:
        The position of the tensor and the index of the first element of every chunk, int64 [chunks, 2].
    """
    counts = torch.tensor([-(-n // size) for n in sizes], device="cpu")
    tensor = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    first = torch.cumsum(counts, 0) - counts
    start = (torch.arange(len(tensor), device="cpu") - first[tensor]) * size
    return torch.stack([tensor, start], 1).to(device)


def aligned(addresses: Sequence[Sequence[int]]) -> bool:
    """Return whether every tensor starts at a multiple of 16 bytes, so that 16 bytes can be read at a time.

    Args:
        addresses: The addresses of the tensors.

    Returns:
        True if all of them do.
    """
    return not any(address & 15 for row in addresses for address in row)
