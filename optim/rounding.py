"""Rounding of bfloat16 parameters after a step, for every rule.

An update below half the distance between two neighbouring bfloat16 numbers is lost when the result is rounded to
nearest. At a learning rate of 1e-5 that is most of the update, and all of it for norms. With stochastic rounding, which
rounds up or down at random with the exact value as the mean, the update arrives on average (arXiv 1502.02551). It needs
no additional memory.

`set_rounding` marks the param groups. Parameters of a marked group are stepped as float32, a part of the group at a
time, and rounded afterwards. The random bits are a function of the group's step count, the parameter's position and
the element's position. The count is saved with the group, so that runs repeat and resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from optim.kernels import philox
from optim.sharding import is_sharded

Rounding = Literal["nearest", "stochastic"]

WIDE = 1 << 26
"""The number of elements that are held in float32 at a time (256 MiB), unless a single tensor is larger."""

PIECE = 1 << 22
"""The number of elements that are rounded at a time."""

_SEED = 0x5EED_0F_B16


@dataclass
class Arrived:
    """The share of the intended updates of bfloat16 parameters that survived rounding; `Optimizer.arrived` collects it.

    Both shares are <made, intended> / <intended, intended>. 1 means that nothing was lost. They are None before a step.

    Args:
        made: The sum of <made, intended> over all parameters.
        intended: The sum of <intended, intended> over all parameters.
        made_small: The first sum, over vectors and scalars only (norms and biases).
        intended_small: The second sum, over vectors and scalars only.

    Example:
        >>> from optim import SGD, Arrived, set_rounding
        >>> param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        >>> optimizer = SGD([param], lr=1e-4)
        >>> set_rounding(optimizer, "nearest")
        >>> optimizer.arrived, param.grad = Arrived(), torch.ones_like(param)
        >>> optimizer.step()
        >>> optimizer.arrived.share  # below the resolution of bfloat16 near 1
        0.0
    """

    made: float = 0.0
    intended: float = 0.0
    made_small: float = 0.0
    intended_small: float = 0.0

    @property
    def share(self) -> float | None:
        """The share of the intended movement that was made, over all parameters."""
        return self.made / self.intended if self.intended else None

    @property
    def small(self) -> float | None:
        """The share of the intended movement that was made, over norms and biases."""
        return self.made_small / self.intended_small if self.intended_small else None

    def add(self, before: Tensor, exact: Tensor, after: Tensor) -> None:
        """Add the step of one parameter.

        Args:
            before: The parameter before the step, of any shape, in bfloat16.
            exact: The parameter after the step, in float32.
            after: The parameter after the step, rounded.
        """
        wanted = exact - before.float()
        made, intended = float((wanted * (after.float() - before.float())).sum()), float(wanted.square().sum())
        self.made, self.intended = self.made + made, self.intended + intended
        if before.ndim < 2:
            self.made_small, self.intended_small = self.made_small + made, self.intended_small + intended


def set_rounding(optimizer: torch.optim.Optimizer, how: Rounding) -> None:
    """Choose how the bfloat16 parameters of all groups are rounded from the next step on; others are not affected.

    On a GPU, AdamW and 8-bit AdamW round in their own kernels (`stochastic_rounding`), where tensors share random bits.

    Args:
        optimizer: An optimizer of this package.
        how: "nearest" or "stochastic".

    Example:
        >>> from optim import Lion, set_rounding
        >>> param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        >>> optimizer = Lion([param], lr=1e-4)
        >>> set_rounding(optimizer, "stochastic")
        >>> param.grad = torch.ones_like(param)
        >>> optimizer.step()
        >>> abs(float(param.detach().float().mean()) - (1 - 1e-4)) < 1e-4  # right on average
        True
    """
    for group in optimizer.param_groups:
        itself = how == "stochastic" and all(param.is_cuda for param in group["params"])
        if group["rule"].rounds_itself:
            group["rule"] = group["rule"].with_settings(stochastic_rounding=itself)
        else:
            itself = False
        group.pop("rounding", None)
        if not itself:
            group["rounding"] = how


StepThose: TypeAlias = Callable[..., list[bool]]
"""`Optimizer._step_those`: (rule, params, grads, lr=, weight_decay=) -> whether each parameter was stepped."""


def step(
    step_those: StepThose,
    group: dict[str, Any],
    offset: int,
    params: list[Tensor],
    grads: list[Tensor],
    arrived: Arrived | None,
) -> list[bool]:
    """Step the parameters of a marked group.

    Args:
        step_those: The function that steps parameters in float32.
        group: The param group.
        offset: The position of the group's first parameter in the optimizer.
        params: The parameters that have a gradient, of any shapes.
        grads: Their gradients, of the same shapes.
        arrived: Where to record how much of the updates survives, or None.

    Returns:
        For each parameter, whether it was stepped.
    """
    if not params:
        return []
    count = group["rounding_step"] = group.get("rounding_step", 0) + 1
    place = {param: offset + i for i, param in enumerate(group["params"])}
    fine: list[bool] = []
    for part in _parts(params):
        before = {i: params[i].data for i in part if params[i].dtype == torch.bfloat16}
        try:
            for i, narrow in before.items():
                params[i].data = narrow.float()
            fine += step_those(
                group["rule"], [params[i] for i in part], [grads[i] for i in part], lr=group["lr"],
                weight_decay=group["weight_decay"],
            )  # fmt: skip
            exact = {i: params[i].data for i in before}
        finally:
            for i, narrow in before.items():
                params[i].data = narrow
        for i, value in exact.items():
            stream = place[params[i]] if group["rounding"] == "stochastic" else None
            _write_back(arrived, _local(params[i].data), _local(value), count, stream)
    return fine


def _write_back(arrived: Arrived | None, param: Tensor, exact: Tensor, count: int, place: int | None) -> None:
    rounded = exact.to(param.dtype).contiguous()
    if place is not None:
        flat, into = exact.reshape(-1), rounded.view(-1)
        for lo in range(0, flat.numel(), PIECE):  # each random word needs several copies of 8 bytes
            part = flat[lo : lo + PIECE]
            words = philox.random_words(part.numel(), seed=_SEED + place, stream=count, start=lo, device=exact.device)
            into[lo : lo + PIECE] = philox.stochastic_round(part, words)
    if arrived is not None:
        arrived.add(param, exact, rounded)
    param.copy_(rounded)


def _local(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found


def _parts(params: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield runs of positions whose tensors together have at most `WIDE` elements, or that are a single tensor."""
    part: list[int] = []
    held = 0
    for i, param in enumerate(params):
        if part and held + param.numel() > WIDE:
            yield part
            part, held = [], 0
        part.append(i)
        held += param.numel()
    yield part
