"""Messages of bounded size between processes."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

MESSAGE = 1 << 25
"""The approximate size of a message in bytes: large compared with its latency, small compared with a model."""


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of processes of a group.

    Args:
        group: The process group; None for all processes.

    Returns:
        The number; 1 if there is no process group.
    """
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def bundles(sizes: Sequence[int], limit: int = MESSAGE) -> Iterator[range]:
    """Divide consecutive items into runs with a total size of about `limit`.

    Args:
        sizes: The sizes of the items.
        limit: The size at which a run ends.

    Yields:
        The positions of the items of a run.
    """
    start = total = 0
    for i, size in enumerate(sizes):
        total += size
        if total >= limit:
            yield range(start, i + 1)
            start, total = i + 1, 0
    if start < len(sizes):
        yield range(start, len(sizes))


def all_reduced_means(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the mean of each tensor over the processes.

    Args:
        tensors: The tensors, of any shapes, which are not changed.
        group: The process group; None for all processes.

    Returns:
        Tensors of the same shapes, in float32 for 16-bit tensors.
    """
    means: list[Tensor] = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    for dtype in sorted({t.dtype for t in means}, key=str):
        index = [i for i, t in enumerate(means) if t.dtype == dtype]
        for run in bundles([means[i].nbytes for i in index]):
            some = [means[index[k]] for k in run]
            flat = torch.cat([t.reshape(-1) for t in some])
            dist.all_reduce(flat, group=group)
            flat /= dist.get_world_size(group)
            for k, part in zip(run, torch.split(flat, [t.numel() for t in some]), strict=True):
                means[index[k]] = part.reshape(some[k - run.start].shape)
    return means
