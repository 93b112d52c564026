"""The input of the checks of `datatools diagnose`: a model, rows, and their loss in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from optim import curvature, diagnostics
from pipelines.models.losses import supervised_tokens, token_losses
from pipelines.rows.rows import Rows
from pipelines.runs.progress import progress
from pipelines.settings.diagnose import DiagnoseConfig


@dataclass
class Look:
    """One model and the rows on which it is examined.

    Args:
        model: The model in float32, with gradients for all parameters; None for a check that needs no model.
        rows: All rows of the data.
        picked: The numbers of the examined rows.
        config: The settings.
    """

    model: Any
    rows: Rows
    picked: Sequence[int]
    config: DiagnoseConfig

    @cached_property
    def parts(self) -> list[Callable[[], Tensor]]:
        """The parts of the loss; see `loss_parts`."""
        return loss_parts(self.model, self.rows, self.picked, self.config.token_budget)


@dataclass(frozen=True)
class Check:
    """The record of a check.

    Args:
        title: What it measures, in one line.
        cost: The cost in a few words, for `datatools ls checks`.
        measure: (look, seed) -> plain values for `checks/NAME.json`.
        passes: Settings -> forward and backward passes over the rows; a Hessian-vector product counts as three.
        keeps: (settings, trained parameters) -> bytes that it keeps besides a gradient.
        needs_model: Whether it uses the model.
        source: The origin of the method.
    """

    title: str
    cost: str
    measure: Callable[[Look, int], dict[str, Any]]
    passes: Callable[[DiagnoseConfig], int] = lambda config: 0
    keeps: Callable[[DiagnoseConfig, int], int] = lambda config, parameters: 0
    needs_model: bool = True
    source: str = ""


def loss_parts(model: Any, rows: Rows, picked: Sequence[int], token_budget: int) -> list[Callable[[], Tensor]]:
    """Return functions whose losses sum to the mean loss over the supervised tokens, each for a few rows by length.

    Args:
        model: The model.
        rows: The rows.
        picked: The numbers of the rows to use.
        token_budget: The padded tokens of a part.
    """
    supervised = supervised_tokens(rows.item(i) for i in picked)
    batches = rows.micro_batches(picked, token_budget, model.device)

    def part(place: int) -> Tensor:
        return token_losses(model, batches[place][1])[0].sum() / supervised

    return [partial(part, place) for place in range(len(batches))]


def gradients(model: Any, parts: Sequence[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Return the gradients of the sum of the parts by parameter name; the `.grad` of the model is unchanged.

    Args:
        model: The model.
        parts: Functions that return a part of the loss.

    Raises:
        ValueError: The loss is not finite.
    """
    named = list(model.named_parameters())
    total: list[Tensor | None] = [None] * len(named)
    with progress("gradient", len(parts), "batches") as bar:
        for part in parts:
            loss = part()
            if not bool(loss.detach().isfinite()):
                raise ValueError(f"the loss is {float(loss.detach())} on these rows")
            curvature.graph_leaves(loss)
            found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            total = [b if a is None else a if b is None else a.add_(b) for a, b in zip(total, found, strict=True)]
            bar.advance()
    return {name: g for (name, _), g in zip(named, total, strict=True) if g is not None}


def roles(model: Any, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Return the matrices in a parameter, each with its role in the layer.

    Args:
        model: The model.
        name: The name of the parameter.
        tensor: The parameter, or a tensor of its shape.
    """
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    return list(diagnostics.roles(name, tensor, heads=heads, kv_heads=kv_heads))
