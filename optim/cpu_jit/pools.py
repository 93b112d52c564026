"""Pools of tensors that one compiled step can process: plain, dense, on the CPU, and of equal dtypes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optim.rule import State, UpdateRule

PLAIN = {Tensor, Parameter}
on_cpu, dtype_of, shape_of = attrgetter("is_cpu"), attrgetter("dtype"), attrgetter("shape")


@dataclass
class Pool:
    """Tensors that one kernel steps.

    Args:
        index: The positions of the parameters.
        names: The entries of the state.
        columns: The parameters, the gradients, and the tensors of each entry of the state.
    """

    index: Sequence[int]
    names: tuple[str, ...]
    columns: Sequence[Sequence[Tensor]]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of each tensor."""
        return tuple(map(Tensor.numel, self.columns[0]))


def pools_of(
    rule: UpdateRule, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State]
) -> tuple[list[Pool], list[int]]:
    """Divide tensors into pools of equal dtypes (and shapes, unless the rule is elementwise).

    Args:
        rule: The rule.
        params: The parameters, of any shapes.
        grads: The gradients, of the same shapes.
        states: The states.

    Returns:
        The pools, and the positions of the parameters that are in none.
    """
    names = tuple(states[0])
    if all(map(names.__eq__, map(tuple, states))):
        columns = [params, grads, *([state[name] for state in states] for name in names)]
        alike = rule.elementwise or len(set(map(shape_of, params))) < 2  # a gradient has its parameter's shape
        if alike and all(_uniform(c, not rule.elementwise) for c in columns) and not any(map(Tensor.is_neg, grads)):
            return [Pool(range(len(params)), names, columns)], []
    rows: dict[Any, list[tuple[int, list[Tensor]]]] = {}
    rest = []
    for i, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
        row = _dense([param, grad, *state.values()], rule.elementwise)
        if row is None:
            rest.append(i)
        else:
            key = (*state, *map(dtype_of, row), *([] if rule.elementwise else map(shape_of, row)))
            rows.setdefault((tuple(state), key), []).append((i, row))
    return [
        Pool([i for i, _ in pool], names, [list(column) for column in zip(*(row for _, row in pool), strict=True)])
        for (names, _), pool in rows.items()
    ], rest


def _uniform(column: Sequence[Tensor], sizes: bool) -> bool:
    """Return whether these are plain contiguous CPU tensors of one dtype (and one size), without a Python loop."""
    return (
        set(map(type, column)) <= PLAIN
        and all(map(on_cpu, column))
        and all(map(Tensor.is_contiguous, column))
        and len(set(map(dtype_of, column))) == 1
        and not (sizes and len(set(map(Tensor.numel, column))) > 1)
    )


def _dense(row: list[Tensor], elementwise: bool) -> list[Tensor] | None:
    """Return parameter, gradient and state with the same order of coordinates in memory; None if that is impossible.

    A gradient with another memory layout is copied.
    """
    if any(type(t) not in PLAIN or not t.is_cpu or t.layout != torch.strided for t in row) or row[1].is_neg():
        return None
    if all(t.is_contiguous() for t in row):
        return row
    param, grad = row[0], row[1]
    if not (torch.ops.aten.is_non_overlapping_and_dense(param) if elementwise else param.is_contiguous()):
        return None
    if any(t.stride() != param.stride() if t.shape == param.shape else not t.is_contiguous() for t in row[2:]):
        return None
    if grad.stride() != param.stride():
        row[1] = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return row
