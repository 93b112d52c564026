"""The random directions of zeroth-order steps: pure functions of (seed, name, index), drawn in pieces and never stored.

Entry i of a tensor's direction only depends on the seed, the tensor's name and i. It does not depend on what was drawn
before, on other parameters, or on how the tensor is sharded. `PIECE` entries at a time are drawn from their own
generator, so that adding a direction to a tensor needs the memory of one piece.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from optim.curvature.losses import mix
from optim.kernels import perturb
from optim.sharding import is_sharded

PIECE = 1 << 16

Kind = Literal["normal", "uniform"]

NoiseFn: TypeAlias = Callable[[str, torch.Size, int, int], Tensor]
"""A function from (name, shape, seed, query) to a recorded direction, or to a recorded mask (1 for dropped entries); it
is used by tests."""


def pieces(
    kind: Kind, seed: int, total: int, *, start: int = 0, count: int | None = None, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, Tensor]]:
    """Yield entries start .. start + count of a stream of random numbers, in pieces.

    Each piece overwrites the tensor of the previous one. Streams on CPU and GPU differ; on a GPU with Triton, normal
    numbers are those of `optim.kernels.perturb`. On the CPU torch uses only 32 bits of a seed, so that two pieces of a
    run may contain the same numbers.

    Args:
        kind: The distribution, "normal" or "uniform".
        seed: The seed of the stream.
        total: The number of entries of the stream.
        start: The first entry.
        count: The number of entries; all of them by default.
        device: The device.

    Yields:
        The offset of a piece from `start`, and its numbers, float32.
    """
    stop = total if count is None else start + count
    if start >= stop:
        return
    generator = torch.Generator(device)
    buffer = torch.empty(min(PIECE, _drawn(total)), device=device)
    for first in range(start // PIECE * PIECE, stop, PIECE):
        drawn = buffer[: _drawn(min(PIECE, total - first))]
        generator.manual_seed(mix(seed, first))
        if kind == "normal" and perturb.fits(drawn):
            perturb.add_normals_(drawn.zero_(), 1.0, seed, start=first)
        elif kind == "normal":
            drawn.normal_(generator=generator)
        else:
            drawn.uniform_(generator=generator)
        low, high = max(start, first), min(stop, first + PIECE, total)
        yield low - start, drawn[low - first : high - first]


def _drawn(wanted: int) -> int:
    return math.ceil(wanted / 16) * 16  # torch uses another order for lengths that are not multiples of 16


def add_normal_(
    target: Float[Tensor, "..."], scale: float, seed: int, *, total: int | None = None, start: int = 0
) -> None:
    """Add scale z to `target` in place, rounded once to its dtype; z is standard normal, in float32 before that.

    Args:
        target: A tensor of any shape; a contiguous part of a tensor of `total` entries, from entry `start` on (a
            shard), or all of it.
        scale: The factor.
        seed: The seed of z.
        total: The number of entries of the whole tensor; that of `target` by default.
        start: The index of the first entry.

    Memory:
        One piece (262 kB); for a target that is not contiguous, all of z.

    Example:
        >>> from optim.zeroth_order import add_normal_
        >>> target = torch.zeros(1000)
        >>> add_normal_(target, 2.0, seed=0)
        >>> abs(float(target.std()) - 2.0) < 0.2
        True
    """
    if perturb.fits(target):
        return perturb.add_normals_(target, scale, seed, start=start)
    total = target.numel() if total is None else total
    stream = pieces("normal", seed, total, start=start, count=target.numel(), device=target.device)
    add_pieces_(target, stream, scale)


def add_pieces_(target: Tensor, stream: Iterator[tuple[int, Tensor]], scale: float) -> None:
    """Add scale times a stream to `target` in place, entry by entry.

    Args:
        target: A tensor of any shape.
        stream: Offsets and numbers, as `pieces` yields them.
        scale: The factor.
    """
    flat = target.view(-1) if target.is_contiguous() else torch.zeros(target.numel(), device=target.device)
    factor = scale if target.is_contiguous() else 1.0
    for offset, numbers in stream:
        flat[offset : offset + len(numbers)].add_(numbers, alpha=factor)
    if not target.is_contiguous():
        target.add_(flat.view(target.shape), alpha=scale)


def masked(
    stream: Iterator[tuple[int, Tensor]], draws: Iterator[tuple[int, Tensor]], dropped: float
) -> Iterator[tuple[int, Tensor]]:
    """Yield a stream with zeros where the draws are below `dropped`.

    Args:
        stream: Offsets and numbers, as `pieces` yields them.
        draws: The draws, in the same pieces.
        dropped: The threshold.

    Yields:
        The offset of a piece and its numbers.
    """
    for (offset, numbers), (_, drawn) in zip(stream, draws, strict=True):
        yield offset, numbers.mul_(drawn >= dropped)


@dataclass(frozen=True)
class Directions:
    """The directions of named parameters, which may be masked.

    Args:
        mask: The distribution of the masks' draws.
        noise_fn: Recorded directions, which replace drawn ones.
        mask_fn: Recorded masks, which replace drawn ones.
        dropped: The share of dropped entries of each parameter, by name; empty for no masks.
    """

    mask: Kind = "uniform"
    noise_fn: NoiseFn | None = None
    mask_fn: NoiseFn | None = None
    dropped: Mapping[str, float] = field(default_factory=dict)

    def add_(self, name: str, target: Tensor, scale: float, seed: int, query: int, mask_seed: int) -> None:
        """Add scale z to `target` in place, where z is the masked direction of a parameter.

        Args:
            name: The name of the parameter.
            target: A tensor with the parameter's shape and layout.
            scale: The factor.
            seed: The seed of the direction.
            query: The number of the direction within its step.
            mask_seed: The seed of the mask.
        """
        if self.noise_fn is not None:
            z = self.noise_fn(name, target.shape, seed, query).to(target)
            if self.dropped:
                z = z * (1 - self._mask(name, target, mask_seed)) if self.mask_fn is not None else z
            target.add_(z, alpha=scale)
            return
        local, total, start = _local(name, target)
        if not self.dropped:
            add_normal_(local, scale, mix(seed, name), total=total, start=start)
            return
        where: dict[str, Any] = {"start": start, "count": local.numel(), "device": local.device}
        draws: Literal["normal", "uniform"] = "normal" if self.mask == "normal" else "uniform"
        z_pieces = pieces("normal", mix(seed, name), total, **where)
        m_pieces = pieces(draws, mix(mask_seed, name), total, **where)
        add_pieces_(local, masked(z_pieces, m_pieces, self.dropped[name]), scale)

    def _mask(self, name: str, target: Tensor, seed: int) -> Tensor:
        assert self.mask_fn is not None
        return self.mask_fn(name, target.shape, seed, 0).to(target)


def _local(name: str, target: Tensor) -> tuple[Tensor, int, int]:
    """Return this process's part of a tensor, the number of entries of the whole, and the index of its first entry."""
    if not is_sharded(target):
        return target, target.numel(), 0
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(target, DTensor)
    if any(not isinstance(p, Replicate) and p != Shard(0) for p in target.placements):
        raise ValueError(
            f"ZerothOrder: parameter {name!r} is sharded as {target.placements}; only shards by rows are supported "
            "(Shard(0), as in FSDP2)"
        )
    _, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    row = target.numel() // max(1, target.shape[0]) if target.ndim else 1
    return target.to_local(), target.numel(), (offset[0] if offset else 0) * row
