"""Small problems and helpers for the battery."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from optim import Optimizer
from tests.optim.spec import Hyper, OptimSpec, Shape

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-4},
    torch.float16: {"rtol": 2e-3, "atol": 1e-4},
}


def randn(shape: Shape, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def parameters(shapes: Iterable[Shape], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Parameter]:
    return [Parameter(randn(shape, seed + i, dtype)) for i, shape in enumerate(shapes)]


def named(params: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"p{i}", p) for i, p in enumerate(params)]


def set_grads(params: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    for i, p in enumerate(params):
        p.grad = scale * randn(tuple(p.shape), 7919 * seed + i, p.dtype)


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: Iterable[int]) -> None:
    """A step for each number, with gradients that the number determines."""
    for t in steps:
        set_grads(params, t + 1)
        optimizer.step()


def make(
    spec: OptimSpec, params: Any, hyper: Hyper | None = None, *, lr: Any = 0.05, weight_decay: float = 0.1
) -> Optimizer:
    return Optimizer(params, spec.rule(hyper), lr=lr, weight_decay=weight_decay)


def snapshot(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def assert_same(a: Iterable[Tensor], b: Iterable[Tensor], what: str = "") -> None:
    """Bit for bit, dtype included."""
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.dtype == y.dtype and torch.equal(x.nan_to_num(nan=1e30), y.nan_to_num(nan=1e30)), f"{what} tensor {i}"


def assert_close(
    a: Iterable[Tensor], b: Iterable[Tensor], dtype: torch.dtype, what: str = "", factor: float = 1
) -> None:
    tolerance = {k: factor * v for k, v in TOLERANCE[dtype].items()}
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda m, i=i: f"{what}, tensor {i}: {m}")


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All state tensors, in the order of parameters and entries."""
    return [
        optimizer.state[p][key]
        for group in optimizer.param_groups
        for p in group["params"]
        for key in sorted(optimizer.state[p])
    ]


def assert_same_dict(a: Any, b: Any, where: str = "state dict") -> None:
    """Equal state dicts: structure, plain values, tensors bit for bit."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {sorted(map(str, a))} and {sorted(map(str, b))}"
        for key in a:
            assert_same_dict(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_dict(x, y, f"{where}[{i}]")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b), where
    else:
        assert a == b, f"{where}: {a!r} and {b!r}"


def regression(spec: OptimSpec, dtype: torch.dtype = torch.float32) -> tuple[Parameter, Callable[[], Tensor]]:
    """A matrix to be fitted, and its loss: 0.5 mean over rows of |x w - y|^2, least at y = x w*."""
    x, target = randn((16, 4), 11, dtype), randn((4, 3), 12, dtype)
    w = Parameter(randn((4, 3), 13, dtype))
    return w, lambda: 0.5 * (x @ w - x @ target).square().sum(-1).mean()


def fit(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int, scheduler: Any = None
) -> tuple[float, float]:
    """(first, last) loss of a run."""
    first = loss().item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return first, loss().item()


def as_arrays(tensors: Iterable[Tensor | None]) -> list[np.ndarray | None]:
    return [None if t is None else t.double().numpy() for t in tensors]
