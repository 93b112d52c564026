"""A small problem whose reference run is recorded in milliseconds, for the examples of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from datatools.order.problem import Params, Problem
from datatools.order.recipe import Recipe
from datatools.order.reference_run import ReferenceRun, record
from optim import AdamW


def example_run(batches: int = 4) -> tuple[Problem, ReferenceRun]:
    """Record least squares on random batches, trained by AdamW with an anchor at every step.

    Args:
        batches: T, the number of batches and of steps.

    Returns:
        The problem, and its recorded run in the order 0..T-1.

    Example:
        >>> problem, reference = example_run()
        >>> len(problem.batches), reference.sequence
        (4, (0, 1, 2, 3))

    """
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(8, 4, generator=generator) for _ in range(batches + 1)]

    def loss(params: Params, batch: Tensor) -> Tensor:
        return (batch[:, :3] @ params["weight"] - batch[:, 3]).square().mean()

    problem = Problem(loss, data[:-1], data[-1:])
    params = {"weight": torch.ones(3)}
    optimizer = AdamW([("weight", torch.nn.Parameter(params["weight"].clone()))], lr=0.1)
    recipe = Recipe.of(optimizer, [0.1] * batches)
    return problem, record(problem, recipe, range(batches), params, anchors=batches + 1)
