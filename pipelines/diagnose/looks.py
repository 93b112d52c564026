"""What the checks of `datatools diagnose` look at: a model, rows, and the losses of both in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from datatools import token_batches
from optim import diagnostics
from pipelines.models.losses import collate, supervised_tokens, token_losses
from pipelines.rows.rows import Rows
from pipelines.runs.progress import progress
from pipelines.settings.diagnose import DiagnoseConfig


@dataclass
class Look:
    """One model and the rows that it is looked at on.

    Args:
        model: in float32, all of its parameters with gradients; None for a check that needs no model.
        rows: all rows of the data.
        picked: those that are looked at.
        config: the settings.

    """

    model: Any
    rows: Rows
    picked: Sequence[int]
    config: DiagnoseConfig

    @cached_property
    def parts(self) -> list[Callable[[], Tensor]]:
        """See `loss_parts`."""
        return loss_parts(self.model, self.rows, self.picked, self.config.token_budget)


@dataclass(frozen=True)
class Check:
    """The record of a check.

    Args:
        title: what it measures, in one line.
        cost: what it costs, in a few words, as `datatools ls checks` shows it.
        measure: (what is looked at, seed) -> plain values for `checks/NAME.json`.
        passes: settings -> passes over the rows, forward and backward; a Hessian-vector product counts as three.
        keeps: (settings, trained parameters) -> bytes that it keeps beside a gradient.
        needs_model: whether it looks at the model at all.
        source: where the method comes from.

    """

    title: str
    cost: str
    measure: Callable[[Look, int], dict[str, Any]]
    passes: Callable[[DiagnoseConfig], int] = lambda config: 0
    keeps: Callable[[DiagnoseConfig, int], int] = lambda config, parameters: 0
    needs_model: bool = True
    source: str = ""


def loss_parts(model: Any, rows: Rows, picked: Sequence[int], token_budget: int) -> list[Callable[[], Tensor]]:
    """Functions whose losses sum to the mean loss over the rows' supervised tokens, each a few rows by length."""
    items = [rows.item(i) for i in picked]
    supervised = supervised_tokens(items)

    def part(group: Sequence[int]) -> Tensor:
        batch = {key: t.to(model.device) for key, t in collate([items[i] for i in group]).items()}
        return token_losses(model, batch)[0].sum() / supervised

    return [partial(part, group) for group in token_batches([len(ids) for ids, _ in items], token_budget)]


def gradients(model: Any, parts: Sequence[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Gradients of the sum of the parts by parameter name; the model's own `.grad` stay as they are."""
    named = list(model.named_parameters())
    total: list[Tensor | None] = [None] * len(named)
    with progress("gradient", len(parts), "batches") as bar:
        for part in parts:
            loss = part()
            if not bool(loss.detach().isfinite()):
                raise ValueError(f"the loss is {float(loss.detach())} on these rows")
            found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            total = [b if a is None else a if b is None else a.add_(b) for a, b in zip(total, found, strict=True)]
            bar.advance()
    return {name: g for (name, _), g in zip(named, total, strict=True) if g is not None}


def roles(model: Any, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The matrices in a parameter, each with its role in the layer."""
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    return list(diagnostics.roles(name, tensor, heads=heads, kv_heads=kv_heads))
