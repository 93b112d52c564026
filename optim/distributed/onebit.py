"""Means over workers for which one bit per entry is sent."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def padded(numel: int, workers: int) -> int:
    """Return the number of entries of a message, padded so that every chunk consists of whole bytes.

    Args:
        numel: The number of entries of the tensor.
        workers: The number of workers.

    Returns:
        A multiple of workers * lcm(workers, 8).
    """
    unit = workers * math.lcm(workers, 8)
    return -(-numel // unit) * unit


def compressed_means(
    xs: Sequence[Tensor], errors: Sequence[tuple[Tensor, Tensor]], group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """Return the approximate mean of each tensor over the workers, equal on all; one bit per entry is sent twice.

    A worker adds its error, which is what it could not send before, sends the signs and one scale |x| / sqrt(L), and
    keeps the difference as its new error. Chunk j of L / N entries is sent to worker j, the server of that chunk. The
    server averages, adds its own error, compresses the result in the same way and sends it to all. L is `padded`; the
    padding is included in scales, as in the published code.

    Args:
        xs: Tensors of any shapes.
        errors: Per tensor the worker's error [L] and the server's error [L / N], both changed in place.
        group: The workers; all processes by default.

    Returns:
        One tensor per tensor of `xs`, of its shape.

    Cost:
        Two collectives for all tensors; in each a worker sends (L / 8 / N + 8) (N - 1) bytes per tensor.

    Source:
        Tang et al. 2021, arXiv 2102.02888, section 3; DeepSpeed, runtime/comm/compressed.py.

    Example:
        >>> from optim.distributed import compressed_means
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> errors = [(torch.zeros(8), torch.zeros(8))]
        >>> (mean,) = compressed_means([torch.tensor([3.0, -3.0, 3.0, -3.0])], errors)
        >>> mean.sign()
        tensor([ 1., -1.,  1., -1.])
        >>> torch.distributed.destroy_process_group()
    """
    workers = dist.get_world_size(group)
    bits, scales = [], []
    for x, (error, _) in zip(xs, errors, strict=True):
        error[: x.numel()] += x.reshape(-1)
        sent, scale = _compress(error)
        bits.append(sent.reshape(workers, -1))
        scales.append(scale)
    received = _exchange(bits, scales, group)
    bits, scales = [], []
    for (_, error), (parts, sizes) in zip(errors, received, strict=True):
        error += (sizes.unsqueeze(1) * _signs(parts, error.dtype)).sum(0) / workers
        sent, scale = _compress(error)
        bits.append(sent.expand(workers, -1))
        scales.append(scale)
    return [
        (sizes.unsqueeze(1) * _signs(parts, x.dtype)).reshape(-1)[: x.numel()].reshape(x.shape)
        for x, (parts, sizes) in zip(xs, _exchange(bits, scales, group), strict=True)
    ]


def _compress(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the signs of x [L], one bit per entry, and the scale |x| / sqrt(L), and subtract what they stand for."""
    scale = x.square().sum().sqrt() / math.sqrt(max(x.numel(), 1))
    packed = ((x >= 0).reshape(-1, 8) * _BITS.to(x.device)).sum(1, dtype=torch.uint8)
    x -= scale * _signs(packed, x.dtype)
    return packed, scale


def _signs(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bits [..., bytes] as -1 and +1 [..., 8 bytes]."""
    ones = (packed.unsqueeze(-1) & _BITS.to(packed.device)) != 0
    return (ones.to(dtype) * 2 - 1).flatten(-2)


def _exchange(
    bits: Sequence[Tensor], scales: Sequence[Tensor], group: dist.ProcessGroup | None
) -> list[tuple[Tensor, Tensor]]:
    """Send row j of the bits [workers, bytes] of each tensor to worker j, and the scale to all, in one message.

    It returns what was received for each tensor: bits [workers, bytes] and scales [workers].
    """
    workers = dist.get_world_size(group)
    numbers = torch.stack([scale.double() for scale in scales]).view(torch.uint8)
    message = torch.cat([*bits, numbers.expand(workers, -1)], 1)
    received = torch.empty_like(message)
    dist.all_to_all_single(received, message, group=group)
    *parts, numbers = torch.split(received, [*(b.shape[1] for b in bits), len(numbers)], 1)
    sizes = numbers.clone(memory_format=torch.contiguous_format).view(torch.float64)  # aligned for float64
    return [(part, sizes[:, i].to(scale.dtype)) for i, (part, scale) in enumerate(zip(parts, scales, strict=True))]
