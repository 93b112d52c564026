"""The random directions of zeroth-order steps: pure functions of (seed, name, index), drawn by pieces, never stored.

Entry i of a tensor's direction depends on the seed, the tensor's name and i alone: not on what was drawn before, on the
parameters beside it, or on how the tensor is sharded. `PIECE` entries at a time are drawn from a generator of their
own, so that adding a direction to a tensor needs one piece of memory and no more.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from optim.kernels import perturb

PIECE = 1 << 16

Kind = Literal["normal", "uniform"]


def mix(*numbers: object) -> int:
    """One seed of 63 bits from several numbers and names."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def pieces(
    kind: Kind, seed: int, total: int, *, start: int = 0, count: int | None = None, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, Tensor]]:
    """Entries start .. start + count of a stream of `total` float32 numbers: (offset from start, numbers), in order.

    The tensors that come out are overwritten by the next piece. Streams of CPU and GPU differ; on a GPU with Triton
    normal numbers are those of `optim.kernels.perturb`.
    On the CPU torch seeds its generator with 32 of the bits: two of the pieces of a run may hold the same numbers.
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


def add_normal_(target: Tensor, scale: float, seed: int, *, total: int | None = None, start: int = 0) -> None:
    """target += scale z, in place and rounded once to target's dtype; z is standard normal, float32 before that.

    target: any shape; a contiguous part of a tensor of `total` entries, from entry `start` on (a shard), or all of it.
    Memory: one piece (262 kB), for a target that is not contiguous all of z.
    """
    if perturb.fits(target):
        return perturb.add_normals_(target, scale, seed, start=start)
    total = target.numel() if total is None else total
    stream = pieces("normal", seed, total, start=start, count=target.numel(), device=target.device)
    add_pieces_(target, stream, scale)


def add_pieces_(target: Tensor, stream: Iterator[tuple[int, Tensor]], scale: float) -> None:
    """target += scale times the stream, entry by entry."""
    flat = target.view(-1) if target.is_contiguous() else torch.zeros(target.numel(), device=target.device)
    factor = scale if target.is_contiguous() else 1.0
    for offset, numbers in stream:
        flat[offset : offset + len(numbers)].add_(numbers, alpha=factor)
    if not target.is_contiguous():
        target.add_(flat.view(target.shape), alpha=scale)


def masked(
    stream: Iterator[tuple[int, Tensor]], draws: Iterator[tuple[int, Tensor]], dropped: float
) -> Iterator[tuple[int, Tensor]]:
    """The stream with zeros where the draws, of the same pieces, are below `dropped`."""
    for (offset, numbers), (_, drawn) in zip(stream, draws, strict=True):
        yield offset, numbers.mul_(drawn >= dropped)
