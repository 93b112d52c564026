"""What the battery knows of one rule, and helpers for saying it; the table is in `specs.py`, from `specs_*.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor

from optim import RULES, UpdateRule

Hyper = dict[str, Any]
Shape = tuple[int, ...]


def direction(rule: UpdateRule, *grads: Tensor) -> Tensor:
    """The direction of the last gradient, from a fresh state through the others."""
    param = torch.ones_like(grads[0])
    state = rule.init(param)
    for grad in grads:
        state = rule.told(state, lr=1.0, weight_decay=0.0)
        rule.share([grad], [state], [state])
        found, state = rule.update(grad, state, param)
    return found


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """One rule and what is known about it.

    inputs: hyper-parameter sets, exact enough for float64 comparisons; the first is the one for single-input
    properties.
    errors: hyper-parameters that must be refused, with a part of the message.
    reference: module with ``run(start, grads, lr=, weight_decay=, **hyper) -> list of arrays``.
    oracle: ``(params, lr) -> (torch optimizer, our hyper-parameters)``: published code that the float32 path must
    equal.
    limits: (what, the rule at a limit of its hyper-parameters, the base method's direction).
    symmetries: (what, a hyper-parameter set, a transformation of gradients, the same of directions).
    shapes: of the parameters in a mixed list, with zero-size and extreme ones. odd_shapes: more of them, one by one.
    lr: descends on small problems. descent: (lr, steps) that converge on the quadratic and on Rosenbrock's function.
    state_bytes: of moments, a parameter of the first shape.
    temporaries: parameter-sized float32 tensors that one step may hold at once, for float32 parameters.
    rest_decay: the share of decoupled weight decay that acts at a zero gradient; None where decay is inside the step.
    """

    name: str
    inputs: tuple[Hyper, ...]
    errors: tuple[tuple[Hyper, str], ...]
    reference: ModuleType
    oracle: Callable[[list[Tensor], float], tuple[torch.optim.Optimizer, Hyper]]
    limits: tuple[tuple[str, Hyper, Callable[[Tensor], Tensor]], ...]
    symmetries: tuple[tuple[str, Hyper, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...]
    shapes: tuple[Shape, ...] = ((4, 3), (5,), (), (0,), (2, 3, 2))
    odd_shapes: tuple[Shape, ...] = ((1,), (3,), (31,), (1023,), (1025,), (4097,), (0, 3), (1, 7), (7, 1), (2, 3, 2, 2))
    min_ndim: int = 0
    lr: float = 0.01
    descent: tuple[tuple[float, int], tuple[float, int]]
    temporaries: float
    state_bytes: float
    rest_decay: float | None = 1.0

    @property
    def default(self) -> Hyper:
        return self.inputs[0]

    def rule(self, hyper: Hyper | None = None) -> UpdateRule:
        return RULES[self.name]().with_settings(**(self.default if hyper is None else hyper))


def rotation(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


LEFT, RIGHT = rotation(4, 1), rotation(3, 2)


def identity(x: Tensor) -> Tensor:
    return x


def own_signs(x: Tensor) -> Tensor:
    """The signs of x's coordinates along its right singular vectors, where it is tall."""
    v = torch.linalg.svd(x, full_matrices=False)[2].mT
    return (x @ v).sign() @ v.mT


def tangential(x: Tensor) -> Tensor:
    """Without each row's part along (1, ..., 1), which is where `direction` has its weights."""
    return x - x.mean(1, keepdim=True)


def peer(name: str, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """An optimizer of pytorch-optimizer, where torch itself has none of that name."""
    optimizer: torch.optim.Optimizer = getattr(pytorch_optimizer, name)(*args, **kwargs)
    return optimizer


def rms(x: Tensor, dim: int | None = None) -> Tensor:
    """The root mean square of all entries, or along a dimension."""
    return x.square().mean(dim, keepdim=True).sqrt() if dim is not None else x.square().mean().sqrt()


MATRICES: tuple[Shape, ...] = ((4, 3), (3, 5), (1, 5), (0, 3), (4, 3, 2, 2))
MATRIX: dict[str, Any] = {
    "shapes": MATRICES,
    "odd_shapes": ((1, 1), (3, 1), (1, 31), (31, 33), (0, 3), (3, 0), (2, 3, 2, 2), (1, 1, 1), (65, 2)),
    "min_ndim": 2,
}
"""What all rules for matrices have in common."""
