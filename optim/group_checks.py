"""Checks of what a param group holds: its parameters, gradients and learning rate, with names for error messages."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from optim.saved import expected_state


def kind_name(value: object) -> str:
    """Return the name of a value's type, for error messages.

    Args:
        value: Any value, which may itself be a class.

    Returns:
        The name of its type, or its own name if it is a class.
    """
    return value.__name__ + " (a class)" if isinstance(value, type) else type(value).__name__


def label_of(group: Mapping[str, Any], offset: int, i: int) -> str:
    """Return a parameter's name for error messages: its own name, or its position in the optimizer and its shape.

    Args:
        group: The param group.
        offset: The position of the group's first parameter in the optimizer.
        i: The position of the parameter in the group.

    Returns:
        The quoted name, or "number ... of shape ...".
    """
    names = group.get("param_names")
    return repr(names[i]) if names else f"number {offset + i} of shape {tuple(group['params'][i].shape)}"


def labelled(group: Mapping[str, Any], offset: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the group's parameters, each with its name for error messages.

    Args:
        group: The param group.
        offset: The position of the group's first parameter in the optimizer.

    Yields:
        The label and the parameter.
    """
    for i, param in enumerate(group["params"]):
        yield label_of(group, offset, i), param


def check_params(group: Mapping[str, Any], offset: int) -> None:
    """Check that the rule of a group can step its parameters.

    Args:
        group: The param group.
        offset: The position of the group's first parameter in the optimizer.

    Raises:
        TypeError: For a parameter that does not have a real floating-point dtype.
        ValueError: For a parameter for which the rule refuses to create a state.
    """
    for label, param in labelled(group, offset):
        if not param.is_floating_point():
            raise TypeError(
                f"parameter {label} is {param.dtype}; optimizers here take real floating-point parameters "
                "(for a complex parameter, optimize its torch.view_as_real)"
            )
        try:
            expected_state(group["rule"], param)
        except ValueError as error:
            raise ValueError(f"parameter {label}: {error}") from error


def without_duplicates(params: Any, offset: int) -> Any:
    """Return the parameters of a group without repeated ones, of which a warning names the first.

    Args:
        params: Parameters or (name, parameter) pairs, in a list or tuple; anything else is returned as it is.
        offset: The position of the group's first parameter in the optimizer.

    Returns:
        The same object if nothing is repeated.
    """
    if not isinstance(params, list | tuple):
        return params
    seen: set[int] = set()
    kept: list[Any] = []
    repeated: list[str] = []
    for i, entry in enumerate(params):
        named = isinstance(entry, tuple) and len(entry) == 2
        if id(param := entry[1] if named else entry) in seen:
            repeated.append(repr(entry[0]) if named else f"number {offset + i}")
        else:
            seen.add(id(param))
            kept.append(entry)
    if not repeated:
        return params
    warnings.warn(
        f"optimizer contains a parameter group with duplicate parameters ({len(repeated)}, such as {repeated[0]}); "
        "each is stepped once",
        stacklevel=2,
    )
    return kept


def check_gradients(group: Mapping[str, Any], offset: int) -> None:
    """Check that parameters with a gradient have data and that no gradient is sparse.

    Args:
        group: The param group.
        offset: The position of the group's first parameter in the optimizer.

    Raises:
        TypeError: For the first parameter on the meta device or with a sparse gradient.
    """
    for label, param in labelled(group, offset):
        if param.grad is not None and param.is_meta:
            raise TypeError(f"parameter {label} has no data (meta device); materialise the model before step()")
        if param.grad is not None and param.grad.layout != torch.strided:
            raise TypeError(
                f"parameter {label} has a sparse gradient ({param.grad.layout}); make it dense before step()"
            )
