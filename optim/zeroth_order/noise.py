"""The random directions of zeroth-order steps: pure functions of (seed, name, index), drawn in pieces, never stored.

Entry i of a tensor's direction depends on the seed, the tensor's name and i alone: not on what was drawn before, on
other parameters, or on how the tensor is sharded. `PIECE` entries at a time are drawn from a generator of their own, so
that adding a direction to a tensor needs the memory of one piece.
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
"""(name, shape, seed, query) -> the direction, or the mask (1 where it is dropped): recorded ones, for tests."""


def pieces(
    kind: Kind, seed: int, total: int, *, start: int = 0, count: int | None = None, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, Tensor]]:
    """Yield entries start .. start + count of a stream of `total` float32 numbers, as (offset from start, numbers).

    The next piece overwrites the tensors of the last. Streams of CPU and GPU differ; on a GPU with Triton, normal
    numbers are those of `optim.kernels.perturb`. On the CPU torch seeds its generator with 32 of the bits: two of the
    pieces of a run may hold the same numbers.
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
    return math.ceil(wanted / 16) * 16  # torch has another order for lengths that 16 does not divide


def add_normal_(
    target: Float[Tensor, "..."], scale: float, seed: int, *, total: int | None = None, start: int = 0
) -> None:
    """Add scale z to `target` in place, rounded once to its dtype; z is standard normal, in float32 before that.

    Args:
        target: A tensor of any shape; a contiguous part of a tensor of `total` entries, from entry `start` on (a
            shard), or all of it.
        scale: The factor.
        seed: The seed of z.
        total: Entries of the whole tensor; those of `target` by default.
        start: The first entry.

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
    """Add scale times the stream to `target`, entry by entry."""
    flat = target.view(-1) if target.is_contiguous() else torch.zeros(target.numel(), device=target.device)
    factor = scale if target.is_contiguous() else 1.0
    for offset, numbers in stream:
        flat[offset : offset + len(numbers)].add_(numbers, alpha=factor)
    if not target.is_contiguous():
        target.add_(flat.view(target.shape), alpha=scale)


def masked(
    stream: Iterator[tuple[int, Tensor]], draws: Iterator[tuple[int, Tensor]], dropped: float
) -> Iterator[tuple[int, Tensor]]:
    """Yield the stream with zeros where the draws, of the same pieces, are below `dropped`."""
    for (offset, numbers), (_, drawn) in zip(stream, draws, strict=True):
        yield offset, numbers.mul_(drawn >= dropped)


@dataclass(frozen=True)
class Directions:
    """The directions of named parameters, masked where `dropped` has a parameter's share of dropped entries."""

    mask: Kind = "uniform"
    noise_fn: NoiseFn | None = None
    mask_fn: NoiseFn | None = None
    dropped: Mapping[str, float] = field(default_factory=dict)

    def add_(self, name: str, target: Tensor, scale: float, seed: int, query: int, mask_seed: int) -> None:
        """target += scale z, with z the direction of the parameter, masked; target has the parameter's layout."""
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
    """(what this process has of the tensor, entries of all of it, the first of them that is here)."""
    if not is_sharded(target):
        return target, target.numel(), 0
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(target, DTensor)
    if any(not isinstance(p, Replicate) and p != Shard(0) for p in target.placements):
        raise ValueError(
            f"ZerothOrder: parameter {name!r} is sharded as {target.placements}; only by rows (Shard(0), as FSDP2 does)"
        )
    _, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    row = target.numel() // max(1, target.shape[0]) if target.ndim else 1
    return target.to_local(), target.numel(), (offset[0] if offset else 0) * row
