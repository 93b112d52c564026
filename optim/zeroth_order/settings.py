"""The settings of a source: their checks, the share of entries that masks drop, and MeZO's param groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from optim.checks import check_choice, check_positive, check_positive_counts, check_unit_interval
from optim.param_groups import without_decay

Estimator = Literal["two-sided", "one-sided", "forward"]


def check_settings(
    estimated: Mapping[str, Tensor],
    first_order: Mapping[str, Tensor],
    *,
    estimator: str,
    eps: float,
    q: int,
    sign: str | None,
    conserve: bool,
    sparsity: float,
    mask: str,
    sparse_by: str,
    mask_steps: int,
    block_order: str,
    restore: str,
    module: nn.Module | None,
) -> None:
    """Check the settings of a `ZerothOrder`.

    Args:
        estimated: The parameters whose gradients are estimated, by name.
        first_order: The parameters that have gradients by back-propagation, by name.
        estimator: See `ZerothOrder`.
        eps: See `ZerothOrder`.
        q: See `ZerothOrder`.
        sign: See `ZerothOrder`.
        conserve: See `ZerothOrder`.
        sparsity: See `ZerothOrder`.
        mask: See `ZerothOrder`.
        sparse_by: See `ZerothOrder`.
        mask_steps: See `ZerothOrder`.
        block_order: See `ZerothOrder`.
        restore: See `ZerothOrder`.
        module: See `ZerothOrder`.

    Raises:
        ValueError: For a setting out of range, or settings that exclude each other.
    """
    for key, value, known in (
        ("estimator", estimator, get_args(Estimator)),
        ("sign", sign, (None, "scalar", "elementwise")),
        ("mask", mask, ("uniform", "normal")),
        ("sparse_by", sparse_by, ("layer", "global")),
        ("block_order", block_order, ("coordinate", "joint")),
        ("restore", restore, ("inplace", "copy")),
    ):
        check_choice("ZerothOrder", known, **{key: value})
    check_positive("ZerothOrder", eps=eps)
    check_unit_interval("ZerothOrder", sparsity=sparsity)
    check_positive_counts("ZerothOrder", q=q, mask_steps=mask_steps)
    if estimator == "forward" and module is None:
        raise ValueError("ZerothOrder: estimator 'forward' differentiates the model; pass it as module=")
    if conserve and first_order:
        raise ValueError("ZerothOrder: conserve compares zeroth-order steps; it cannot be combined with first_order")
    for name, p in [*estimated.items(), *first_order.items()]:
        if not p.is_floating_point():
            raise ValueError(f"ZerothOrder: parameter {name!r} is {p.dtype}; expected a real floating-point dtype")


def decay_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    weight_decay: float,
    *,
    decay_filter: Callable[[str], bool] | None = None,
) -> list[dict[str, Any]]:
    """Return two param groups, with and without weight decay.

    MeZO and the forward gradient step p <- p - lr (pg z + weight_decay p), which is decoupled weight decay.

    Args:
        named_parameters: (name, parameter) pairs, as `model.named_parameters()` returns them.
        weight_decay: The weight decay of the first group; the second has none.
        decay_filter: A function from the name of a parameter to whether it has weight decay. By default biases and
            norms have none (`optim.without_decay`).

    Returns:
        The groups that have parameters, to be given to an optimizer.

    Example:
        >>> from optim.zeroth_order import decay_groups
        >>> groups = decay_groups(torch.nn.Linear(4, 2).named_parameters(), 0.1)
        >>> [(name, group["weight_decay"]) for group in groups for name, _ in group["params"]]
        [('weight', 0.1), ('bias', 0.0)]
    """
    named = list(named_parameters)
    if decay_filter is None:
        spared = without_decay(name for name, _ in named)
        decays = {name: name not in spared for name, _ in named}
    else:
        decays = {name: decay_filter(name) for name, _ in named}
    groups = [([e for e in named if decays[e[0]] == decayed], decayed) for decayed in (True, False)]
    return [{"params": part, "weight_decay": weight_decay if decayed else 0.0} for part, decayed in groups if part]


_SAMPLE = 10_000_000


def dropped_shares(params: Mapping[str, Tensor], sparsity: float, sparse_by: str) -> dict[str, float]:
    """Return the share of each tensor's entries that a mask drops.

    Args:
        params: The parameters, by name.
        sparsity: The share of all entries that is dropped.
        sparse_by: "layer" or "global"; see `ZerothOrder`.

    Returns:
        The shares, by name.
    """
    if sparse_by == "layer":
        return dict.fromkeys(params, sparsity)
    total = sum(p.numel() for p in params.values())
    stride = math.ceil(total / _SAMPLE)  # every k-th entry: a sample that needs no generator
    magnitudes = {name: p.detach().flatten()[::stride].abs().float() for name, p in params.items()}
    everything = torch.cat(list(magnitudes.values()))
    rank = max(1, math.ceil(sparsity * len(everything)))
    threshold = everything.kthvalue(rank).values
    return {name: float((m <= threshold).float().mean()) if len(m) else 0.0 for name, m in magnitudes.items()}
