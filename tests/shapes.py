"""Comparing tensors with the shapes and dtypes that signatures state, for tests of all packages."""

import inspect
import typing
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Any

import torch
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor


def is_shape(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def fits(value: Any, hint: Any) -> bool:
    """Whether the value is as the hint says, of what the hint says about tensors; binds the names of dimensions."""
    if is_shape(hint):
        return isinstance(value, hint)
    if typing.get_origin(hint) is tuple and Ellipsis not in typing.get_args(hint):
        return all(fits(one, part) for one, part in zip(value, typing.get_args(hint), strict=True))
    if typing.get_origin(hint) in (UnionType, typing.Union):
        return any(fits(value, part) for part in typing.get_args(hint)) if isinstance(value, Tensor) else True
    return True


def checked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function's result, once arguments and result have been compared with its signature."""
    hints = typing.get_type_hints(inspect.unwrap(getattr(function, "__func__", function)), include_extras=True)
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    with jaxtyped("context"):
        for name, value in given.items():
            assert fits(value, hints.get(name)), f"{function.__qualname__}: {name} is {tuple(value.shape)}"
        result = function(*args, **kwargs)
        assert fits(result, hints.get("return")), f"{function.__qualname__}: it returned another shape or dtype"
    return result


def annotated(module: Any) -> Iterator[str]:
    """The public functions of a module whose signatures state a shape."""
    for name, function in vars(module).items():
        if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_"):
            hints = [*typing.get_type_hints(function).values()]
            if any(map(is_shape, [*hints, *(part for hint in hints for part in typing.get_args(hint))])):
                yield name


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
