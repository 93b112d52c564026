"""Double descent and conditioning: does the peak of the test error remain if the optimizer does not reach the minimum?

The setting is a random-feature regression in which everything is known in closed form: the result of T steps of
gradient descent, at any width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optim.checks import check_choice

Variant = Literal["raw", "standardised", "scaled_init"]
VARIANTS: tuple[Variant, ...] = ("raw", "standardised", "scaled_init")
WIDTHS = (5, 10, 20, 30, 36, 40, 44, 50, 60, 80, 120, 200, 320)
STEPS = (100, 1_000, 10_000, 1_000_000)


@dataclass(frozen=True)
class Regression:
    """A regression problem.

    Args:
        x: The training inputs, [n, d].
        y: The training answers, [n].
        x_test: The test inputs, [rows, d].
        y_test: The test answers, [rows].
        v: The directions of the features, [P, d], of which a width uses the first ones.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    v: Tensor


def make_data(
    *, rows: int = 40, inputs: int = 10, noise: float = 0.5, test_rows: int = 500, width: int = 320, seed: int = 0
) -> Regression:
    """Draw a regression problem in float64: Gaussian inputs, a linear teacher with |w| about 1, and noisy answers.

    Args:
        rows: The number of training rows.
        inputs: The number of inputs.
        noise: The standard deviation of the noise.
        test_rows: The number of test rows.
        width: The largest width.
        seed: The seed of a private generator.

    Returns:
        The problem.
    """
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    x, x_test, teacher = normal(rows, inputs), normal(test_rows, inputs), normal(inputs) / math.sqrt(inputs)
    y, y_test = x @ teacher + noise * normal(rows), x_test @ teacher + noise * normal(test_rows)
    return Regression(x, y, x_test, y_test, normal(width, inputs))


def features(data: Regression, width: int, variant: Variant = "raw") -> tuple[Tensor, Tensor]:
    """Return the features of the training and test inputs, relu(X V_P^T / sqrt(d)) / sqrt(P).

    Args:
        data: The problem.
        width: The number P of features.
        variant: With "standardised", each feature is standardised and a constant is added.

    Returns:
        F [n, P] and F_test [rows, P].

    Raises:
        ValueError: For a width that v does not have, or an unknown variant.
    """
    if not 1 <= width <= len(data.v):
        raise ValueError(f"double_descent: width = {width}; it must be between 1 and {len(data.v)}, the rows of v")
    check_choice("double_descent", VARIANTS, variant=variant)
    f, f_test = (_hidden(x, data.v[:width]) for x in (data.x, data.x_test))
    if variant == "standardised":
        mean, spread = f.mean(0), f.std(0, correction=0)
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        f, f_test = ((g - mean) / spread for g in (f, f_test))
        f, f_test = (torch.cat([g, torch.ones(len(g), 1, dtype=g.dtype)], 1) for g in (f, f_test))
    return f, f_test


def _hidden(x: Tensor, v: Tensor) -> Tensor:
    """Return the features [n, P] of inputs x [n, d] with directions v [P, d]."""
    return (x @ v.T / math.sqrt(x.shape[1])).relu() / math.sqrt(len(v))


def start_of(columns: int, variant: Variant, like: Tensor) -> Tensor:
    """Return the start of gradient descent.

    Args:
        columns: The number of features.
        variant: With "scaled_init" the start is 3 cos(1 + i), which is partly outside the row space of the data.
        like: A tensor that has the dtype.

    Returns:
        A tensor [columns], otherwise of zeros.
    """
    index = torch.arange(columns, dtype=like.dtype)
    return 3 * torch.cos(1 + index) if variant == "scaled_init" else torch.zeros_like(index)


class Solved:
    """The least-squares problem 0.5 / n |F theta - y|^2 from `start`, in the basis of F's right singular vectors.

    Args:
        f: The features F, [n, P].
        y: The answers, [n].
        start: The start of gradient descent, [P].
    """

    def __init__(self, f: Tensor, y: Tensor, start: Tensor) -> None:
        u, s, basis = torch.linalg.svd(f, full_matrices=False)
        kept = s > s[0] * max(f.shape) * torch.finfo(s.dtype).eps
        self.start, self.basis, self.eigenvalues = start, basis[kept], s[kept].square()
        self.way: Tensor = (u[:, kept].T @ y) / s[kept] - self.basis @ start  # from the start to the minimum

    @property
    def condition(self) -> float:
        """The condition number lambda_max / lambda_min of F^T F on its numerical range."""
        return float(self.eigenvalues[0] / self.eigenvalues[-1])

    def minimum(self) -> Tensor:
        """Return the minimum of the loss that is nearest to the start (from zeros, the minimum-norm solution).

        Returns:
            theta [P].
        """
        place: Tensor = self.start + self.basis.T @ self.way
        return place

    def after(self, steps: int) -> Tensor:
        """Return the exact result of gradient descent with lr = 1 / lambda_max(F^T F / n).

        Args:
            steps: The number of steps.

        Returns:
            theta [P].
        """
        left = (1 - self.eigenvalues / self.eigenvalues[0]) ** steps
        place: Tensor = self.start + self.basis.T @ ((1 - left) * self.way)
        return place


def experiment(
    data: Regression, *, widths: Sequence[int] = WIDTHS, steps: Sequence[int] = STEPS, variant: Variant = "raw"
) -> dict[str, list[Any]]:
    """Return the mean squared errors by width.

    Args:
        data: The problem.
        widths: The widths.
        steps: The numbers of steps of gradient descent.
        variant: As in `features`.

    Returns:
        `condition_number` and `min_norm_{train,test}_mse` by width, and `gd_{train,test}_mse` by width and number of
        steps.

    Source:
        After arXiv 2312.03951, whose data settings could not be read; this setting is our own.
    """
    found: dict[str, list[Any]] = {key: [] for key in (
        "condition_number", "min_norm_train_mse", "min_norm_test_mse", "gd_train_mse", "gd_test_mse")}  # fmt: skip
    for width in widths:
        f, f_test = features(data, width, variant)
        solved = Solved(f, data.y, start_of(f.shape[1], variant, f))
        found["condition_number"].append(solved.condition)
        for part, g, y in (("train", f, data.y), ("test", f_test, data.y_test)):
            found[f"min_norm_{part}_mse"].append(_mse(g, solved.minimum(), y))
            found[f"gd_{part}_mse"].append([_mse(g, solved.after(t), y) for t in steps])
    return found


def descend(
    data: Regression,
    width: int,
    make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    *,
    steps: int,
    batch: int | None = None,
    variant: Variant = "raw",
    both_layers: bool = False,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the errors after some steps of an optimizer on 0.5 |F theta - y|^2 / n, from `start_of`.

    Args:
        data: The problem.
        width: The number of features.
        make: A function from named parameters to an optimizer; "weight" is theta [1, P].
        steps: The number of steps.
        batch: The number of rows per step, in another order in each epoch; None for all rows.
        variant: As in `features`.
        both_layers: Whether "features", the directions [P, d] of the features, are trained too; not for
            "standardised".
        seed: The seed of the order of the rows.

    Returns:
        The mean squared errors on the training and the test rows.

    Raises:
        ValueError: As in `features`, and for both layers with standardised features.
    """
    if both_layers and variant == "standardised":
        raise ValueError("double_descent: standardised features are fixed; use the variant 'raw' to train both layers")
    f, f_test = features(data, width, variant)
    weight = nn.Parameter(start_of(f.shape[1], variant, f)[None].clone())
    first = nn.Parameter(data.v[:width].clone())
    optimizer = make([("features", first), ("weight", weight)] if both_layers else [("weight", weight)])
    order = _order(len(f), batch or len(f), seed)
    for _ in range(steps):
        rows = next(order)
        hidden = _hidden(data.x[rows], first.detach()) if both_layers else f[rows]
        residual = hidden @ weight.detach()[0] - data.y[rows]
        weight.grad = (residual @ hidden / len(rows))[None]
        if both_layers:  # the derivative of an entry of `hidden` is a constant where the entry is not 0
            back = residual[:, None] * weight.detach() * (hidden > 0) / len(rows)
            first.grad = back.T @ data.x[rows] / math.sqrt(data.x.shape[1] * width)
        optimizer.step()
    if both_layers:
        f, f_test = (_hidden(x, first.detach()) for x in (data.x, data.x_test))
    theta = weight.detach()[0]
    return _mse(f, theta, data.y), _mse(f_test, theta, data.y_test)


def _order(rows: int, batch: int, seed: int) -> Iterator[Tensor]:
    made = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(rows, generator=made) if batch < rows else torch.arange(rows)
        yield from torch.split(order, batch)


def _mse(f: Tensor, theta: Tensor, y: Tensor) -> float:
    return float((f @ theta - y).square().mean())
