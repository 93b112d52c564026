"""What a param group may hold: the checks of its parameters, gradients and learning rate, with names for messages."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from optim.saved import expected_state


def kind_name(value: object) -> str:
    """What a value is, for messages."""
    return value.__name__ + " (a class)" if isinstance(value, type) else type(value).__name__


def check_lr(lr: float | Tensor) -> None:
    """Check a learning rate.

    Raises:
        ValueError: Unless it is one finite number of at least 0.
    """
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements; it must be one number")
    if isinstance(lr, bool) or not isinstance(lr, int | float | Tensor) or not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr = {lr!r}; it must be a finite number of at least 0")


def label_of(group: Mapping[str, Any], offset: int, i: int) -> str:
    """A parameter's name for messages: its own, or its number in the optimizer and its shape."""
    names = group.get("param_names")
    return repr(names[i]) if names else f"number {offset + i} of shape {tuple(group['params'][i].shape)}"


def labelled(group: Mapping[str, Any], offset: int) -> Iterator[tuple[str, Tensor]]:
    """The group's parameters, each with its name for messages."""
    for i, param in enumerate(group["params"]):
        yield label_of(group, offset, i), param


def check_params(group: Mapping[str, Any], offset: int) -> None:
    """Check that the parameters of a group are such as its rule steps, each of them once.

    Raises:
        TypeError: For a parameter that is not of a real floating-point dtype.
        ValueError: For a parameter that stands there twice, or whose state the rule refuses to make.
    """
    seen: set[Tensor] = set()
    for label, param in labelled(group, offset):
        if param in seen:
            raise ValueError(f"parameter {label} is in its param group twice; it would be stepped twice")
        seen.add(param)
        if not param.is_floating_point():
            raise TypeError(
                f"parameter {label} is {param.dtype}; optimizers here take real floating-point parameters "
                "(for a complex one, optimize torch.view_as_real of it)"
            )
        try:
            expected_state(group["rule"], param)
        except ValueError as error:
            raise ValueError(f"parameter {label}: {error}") from error


def check_gradients(group: Mapping[str, Any], offset: int) -> None:
    """Check that the parameters with a gradient have data, and no gradient is sparse.

    Raises:
        TypeError: For the first that is otherwise.
    """
    for label, param in labelled(group, offset):
        if param.grad is not None and param.is_meta:
            raise TypeError(f"parameter {label} has no data (meta device); materialise the model before step()")
        if param.grad is not None and param.grad.layout != torch.strided:
            raise TypeError(
                f"parameter {label} has a sparse gradient ({param.grad.layout}); make it dense before step()"
            )
