"""Losses in parts, and what every estimate of curvature does with them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from optim.rule import moment_dtype
from optim.sharding import is_sharded

Loss: TypeAlias = Callable[[], Tensor]
Parts: TypeAlias = Loss | Sequence[Loss]
"""A function that computes the loss anew, or several (micro-batches) whose sum is the loss; one graph at a time."""


def parts_of(loss_fn: Parts) -> Sequence[Loss]:
    """A loss as its parts."""
    return [loss_fn] if callable(loss_fn) else loss_fn


def scalar(loss: Tensor) -> Tensor:
    """Return a loss as a scalar.

    Raises:
        ValueError: If it is not a single number, or depends on no parameter.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"curvature: loss_fn returned {what}; expected one number that depends on the parameters")
    return loss.reshape(())


def add(total: list[Tensor | None], more: Sequence[Tensor | None]) -> None:
    """Sum in the moments' dtype, detached; None counts as nothing."""
    for i, value in enumerate(more):
        if value is not None:
            kept = value.detach().to(moment_dtype(value))
            before = total[i]
            total[i] = kept if before is None else before + kept


def mix(*numbers: object) -> int:
    """Return one seed of 63 bits made from several numbers and names.

    Example:
        >>> from optim import curvature
        >>> curvature.mix(0, 1) == curvature.mix(0, 1) != curvature.mix(1, 0)
        True
    """
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rank_count() -> int:
    """The number of processes of `torch.distributed`; 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(estimates: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """The mean over all ranks, where a rank whose loss does not reach a parameter counts as zero; None if none does."""
    if rank_count() == 1 or not params:
        return list(estimates)
    reached = torch.tensor([estimate is not None for estimate in estimates], dtype=torch.float32)
    reached = reached.to(params[0].device)
    dist.all_reduce(reached)  # every rank makes the same calls, whatever its own loss reaches
    averaged: list[Tensor | None] = []
    for estimate, param, ranks in zip(estimates, params, reached.tolist(), strict=True):
        if ranks == 0:
            averaged.append(None)
            continue
        mean = torch.zeros(param.shape, dtype=moment_dtype(param), device=param.device)
        if estimate is not None:
            mean.copy_(estimate)
        dist.all_reduce(mean)
        averaged.append(mean / rank_count())
    return averaged


def refuse_sharded(params: Iterable[Tensor]) -> None:
    """Check that no parameter is sharded.

    Raises:
        TypeError: If one is.
    """
    if any(map(is_sharded, params)):
        raise TypeError("curvature: a parameter is sharded (DTensor); estimates of shards are not supported")


@contextmanager
def private(params: Sequence[Tensor]) -> Iterator[None]:
    """Enable gradients, and restore the global generators at the end.

    Args:
        params: The parameters, whose devices' generators are restored.

    Example:
        >>> from optim import curvature
        >>> before = torch.get_rng_state()
        >>> with curvature.private([]):
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    gpus = sorted({p.device.index for p in params if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus), torch.enable_grad():
        yield
