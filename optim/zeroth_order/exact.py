"""Gradients by back-propagation for the first-order parameters of a hybrid step."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from optim.curvature.losses import graph_leaves, rank_count
from optim.zeroth_order.replay import Loss, NotFinite


def exact_gradients(
    parts: Sequence[Loss],
    first_order: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    refused: Callable[[str, str, float], NotFinite],
) -> dict[int, Tensor]:
    """Return the gradients of the first-order parameters, from a graph that begins at the first of them.

    Args:
        parts: Functions whose sum is the loss.
        first_order: The parameters, by name.
        others: The other parameters, which are not part of the graph.
        refused: A function that creates the error for a gradient that is not finite.

    Returns:
        The gradients, by the ids of the parameters.

    Raises:
        NotFinite: If a gradient is not finite.
    """
    wanted = list(first_order.values())
    total: list[Tensor | None] = [None] * len(wanted)
    for p in others.values():
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            for part in parts:
                loss = part()
                graph_leaves(loss)  # refuses a graph that hides parameters
                grads = torch.autograd.grad(loss, wanted, allow_unused=True)
                for i, (before, grad) in enumerate(zip(total, grads, strict=True)):
                    total[i] = before if grad is None else grad if before is None else before + grad
    finally:
        for p in others.values():
            p.requires_grad_(True)
    found = {id(p): g for p, g in zip(wanted, total, strict=True) if g is not None}
    if rank_count() > 1:
        for grad in found.values():
            dist.all_reduce(grad)
            grad.div_(rank_count())
    for gradient in found.values():
        if not bool(gradient.isfinite().all()):
            raise refused("gradient of the last layers", "not finite", math.nan)
    return found
