"""Problems whose answers are known: quadratic batches, the oracle of spec A.11."""

import torch
from torch import Tensor

from datatools.order.problem import Problem
from datatools.order.recipe import Recipe
from datatools.order.reference_run import ReferenceRun, record
from optim import UpdateRule

A11 = [
    ([[2, 0.5], [0.5, 1]], (1, 0)),
    ([[1, -0.3], [-0.3, 3]], (0, 2)),
    ([[1.5, 0.2], [0.2, 0.5]], (-1, 1)),
]
A11_VALIDATION = ([[1, 0.1], [0.1, 2]], (0.2, 0.6))


def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """1/2 (theta - c)^T A (theta - c) of the parameters laid end to end."""
    matrix, centre = batch
    away = torch.cat([p.reshape(-1) for p in params.values()]) - centre
    return 0.5 * away @ (matrix @ away)


def tensors(pair: tuple[list[list[float]], tuple[float, ...]]) -> tuple[Tensor, Tensor]:
    """A matrix and a centre, in float64."""
    return torch.tensor(pair[0], dtype=torch.float64), torch.tensor(pair[1], dtype=torch.float64)


def a11() -> Problem:
    """Spec A.11."""
    return Problem(loss, [tensors(b) for b in A11], [tensors(A11_VALIDATION)])


def recipe(rule: UpdateRule, rates: list[float], names: tuple[str, ...] = ("theta",), **more: float) -> Recipe:
    """One rule for all parameters."""
    decay = dict.fromkeys(names, more.get("weight_decay", 0.0))
    return Recipe(dict.fromkeys(names, rule), tuple(rates), dict.fromkeys(names, 1.0), decay, more.get("clip"))


def run(problem: Problem, rule: UpdateRule, start: list[float], rates: list[float], **more: float) -> ReferenceRun:
    """The reference run 0, 1, ..., with an anchor a step."""
    params = {"theta": torch.tensor(start, dtype=torch.float64)}
    return record(problem, recipe(rule, rates, **more), range(len(rates)), params, anchors=len(rates) + 1)


def random_problem(steps: int, size: int, seed: int) -> Problem:
    """`steps` quadratics with positive matrices, in two parameters a and b of `size` numbers together."""
    g = torch.Generator().manual_seed(seed)

    def one() -> tuple[Tensor, Tensor]:
        root = torch.randn(size, size, dtype=torch.float64, generator=g)
        return root @ root.T / size + 0.1 * torch.eye(size), torch.randn(size, dtype=torch.float64, generator=g)

    return Problem(loss, [one() for _ in range(steps)], [one()])
