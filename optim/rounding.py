"""How bfloat16 parameters are rounded after a step, for every rule.

A step below half the distance between two neighbours of the format is lost when it is rounded to the nearest: at a
learning rate of 1e-5 that is most of the update, and all of it on norms. Rounded up or down at random, with the exact
value as the mean, it arrives on average (arXiv 1502.02551), at no cost in memory.

`set_rounding` marks the param groups. Parameters of a marked group are stepped as float32, a part of the group at a
time, and rounded afterwards. The random bits are a function of the group's count of steps, the parameter's place and
the element's: the count is saved with the group, so runs repeat and resume to the bit.
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
"""Elements that are held in float32 at a time, if no tensor is larger: 256 MiB."""

PIECE = 1 << 22
"""Elements that are rounded at a time."""

_SEED = 0x5EED_0F_B16


@dataclass
class Arrived:
    """How much of the intended updates of bfloat16 parameters arrived; `Optimizer.arrived` collects it.

    share: of all parameters; small: of vectors and scalars (norms and biases). The part of the intended movement that
    was made, 1 is all: <made, intended> / <intended, intended>; None before a step.
    """

    made: float = 0.0
    intended: float = 0.0
    made_small: float = 0.0
    intended_small: float = 0.0

    @property
    def share(self) -> float | None:
        """Of all parameters."""
        return self.made / self.intended if self.intended else None

    @property
    def small(self) -> float | None:
        """Of norms and biases."""
        return self.made_small / self.intended_small if self.intended_small else None

    def add(self, before: Tensor, exact: Tensor, after: Tensor) -> None:
        """Count the step of one parameter."""
        wanted = exact - before.float()
        made, intended = float((wanted * (after.float() - before.float())).sum()), float(wanted.square().sum())
        self.made, self.intended = self.made + made, self.intended + intended
        if before.ndim < 2:
            self.made_small, self.intended_small = self.made_small + made, self.intended_small + intended


def set_rounding(optimizer: torch.optim.Optimizer, how: Rounding) -> None:
    """Round the bfloat16 parameters of all groups in this way from the next step on; others are not affected.

    On a GPU AdamW and 8-bit AdamW do it themselves (`stochastic_rounding`), in their kernels; there tensors share their
    random bits.
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
"""`Optimizer._step_those`: (rule, params, grads, lr=, weight_decay=) -> for each, whether it was stepped."""


def step(
    step_those: StepThose,
    group: dict[str, Any],
    offset: int,
    params: list[Tensor],
    grads: list[Tensor],
    arrived: Arrived | None,
) -> list[bool]:
    """The step of a marked group's parameters; for each, whether it was stepped. offset: the group's first place."""
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
        for lo in range(0, flat.numel(), PIECE):  # random words take 8 bytes each, several times over
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
    """Runs of places whose tensors have at most `WIDE` elements together, or one tensor."""
    part: list[int] = []
    held = 0
    for i, param in enumerate(params):
        if part and held + param.numel() > WIDE:
            yield part
            part, held = [], 0
        part.append(i)
        held += param.numel()
    yield part
