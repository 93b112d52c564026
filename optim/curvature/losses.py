"""Losses in parts, and what all estimates of curvature do with them."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from optim.moments import moment_dtype
from optim.sharding import is_sharded

Loss: TypeAlias = Callable[[], Tensor]
Parts: TypeAlias = Loss | Sequence[Loss]
"""A function that computes the loss, or several functions (one per micro-batch) whose sum is the loss. Only one graph
exists at a time."""


def parts_of(loss_fn: Parts) -> Sequence[Loss]:
    """Return a loss as its parts.

    Args:
        loss_fn: A function that computes the loss, or several functions whose sum is the loss.

    Returns:
        The functions.
    """
    return [loss_fn] if callable(loss_fn) else loss_fn


def scalar(loss: Tensor) -> Tensor:
    """Return a loss as a scalar.

    Args:
        loss: What a loss function returned.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: If it is not a single number, does not depend on parameters, or hides parameters (`graph_leaves`).
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"curvature: loss_fn returned {what}; expected one number that depends on the parameters")
    graph_leaves(loss)
    return loss.reshape(())


def graph_leaves(value: Tensor) -> list[Tensor]:
    """Return the tensors at which the graph of a value starts.

    Args:
        value: The value, of any shape.

    Returns:
        Tensors that require a gradient.

    Raises:
        ValueError: If a part of the graph is checkpointed with ``use_reentrant=True``. The graph does not contain the
            operations of that part, so that `torch.autograd.grad` gives its parameters no gradient, without an error.

    Example:
        >>> from optim import curvature
        >>> w = torch.ones(2, requires_grad=True)
        >>> [leaf is w for leaf in curvature.graph_leaves((2 * w).sum())]
        [True]
    """
    found: list[Tensor] = []
    left, seen = [value.grad_fn], {value.grad_fn}
    while left:
        node = left.pop()
        if node is None:
            continue
        if "checkpoint" in node.name().lower():
            raise ValueError(
                f"the model uses gradient checkpointing with use_reentrant=True ({node.name()}), which hides "
                "parameters from torch.autograd.grad, so that their gradients would be 0; use use_reentrant=False, or "
                "switch it off (gradient_checkpointing_disable())"
            )
        if node.name().endswith("AccumulateGrad"):
            found.append(node.variable)  # type: ignore[attr-defined]
        new = {parent for parent, _ in node.next_functions} - seen
        seen |= new
        left += new
    return found


def add(total: list[Tensor | None], more: Sequence[Tensor | None]) -> None:
    """Add tensors to totals, detached and in the moments' dtype; None counts as nothing.

    Args:
        total: The totals, which are replaced in this list.
        more: What is added.
    """
    for i, value in enumerate(more):
        if value is not None:
            kept = value.detach().to(moment_dtype(value))
            before = total[i]
            total[i] = kept if before is None else before + kept


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Return the l2 norm of several tensors together, accumulated in float64.

    Args:
        tensors: Tensors of any shapes.

    Returns:
        The norm.
    """
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def mix(*numbers: object) -> int:
    """Return one 63-bit seed computed from several numbers and names.

    Args:
        *numbers: Numbers and names.

    Returns:
        The seed.

    Example:
        >>> from optim import curvature
        >>> curvature.mix(0, 1) == curvature.mix(0, 1) != curvature.mix(1, 0)
        True
    """
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rank_count() -> int:
    """Return the number of processes of `torch.distributed`.

    Returns:
        The number; 1 without a process group.
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(estimates: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the mean of each estimate over all ranks.

    A rank whose loss does not depend on a parameter contributes zero.

    Args:
        estimates: This rank's estimates; None if its loss does not depend on the parameter.
        params: The parameters.

    Returns:
        The means; None if no rank's loss depends on the parameter.
    """
    if rank_count() == 1 or not params:
        return list(estimates)
    reached = torch.tensor([estimate is not None for estimate in estimates], dtype=torch.float32)
    reached = reached.to(params[0].device)
    dist.all_reduce(reached)  # every rank makes the same calls, whatever its own loss depends on
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

    Args:
        params: The parameters.

    Raises:
        TypeError: If one is.
    """
    if any(map(is_sharded, params)):
        raise TypeError("curvature: a parameter is sharded (DTensor); estimates of shards are not supported")


@contextmanager
def private(params: Sequence[Tensor]) -> Iterator[None]:
    """Return a context in which gradients are enabled, and that restores the global generators at its end.

    Args:
        params: The parameters, whose devices' generators are restored.

    Yields:
        None.

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
