"""Losses of a model on rows: the mean over supervised tokens, in total and per source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from datatools import DataError, files
from pipelines.models import load as models
from pipelines.models.losses import token_losses
from pipelines.rows.prepare import prepare
from pipelines.rows.rows import Rows
from pipelines.runs.progress import progress
from pipelines.runs.workers import rank, world_size
from pipelines.settings.train import EvaluateConfig


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Return `loss` (mean over supervised tokens), `tokens` (their number), `rows`, and the same per source.

    Args:
        config: The settings.

    Raises:
        UsageError: A setting is wrong.
        DataError: A row cannot be used, or a loss is not finite.
        EnvironmentProblem: The model cannot be loaded.
    """
    loaded = models.load(config.model, merge=False)  # merging into bfloat16 would round a small adapter away
    with files.scratch_folder() as scratch:
        rows = prepare(config.data, config.model, loaded.tokenizer, cache=scratch, label="data", limits=loaded.limits)
        return losses(loaded.model, rows, token_budget=config.token_budget)


def losses(model: Any, rows: Rows, *, token_budget: int, label: str = "losses") -> dict[str, Any]:
    """Return the result of `evaluate` for rows and a model that are loaded.

    Args:
        model: The model.
        rows: The rows.
        token_budget: The padded tokens of a batch.
        label: The label of the progress.
    """
    chosen = np.flatnonzero(rows.usable).tolist()
    lengths = [int(rows.scan.tokens[i]) for i in chosen]
    with progress(label, sum(lengths), "tokens") as bar, torch.inference_mode():
        sums, counts = _sums(model, rows, chosen, token_budget=token_budget, advance=bar.advance)
    if not sums.isfinite().all():
        first = chosen[int((~sums.isfinite()).nonzero()[0])]
        raise DataError(f"{rows.pool.where(first)}: the loss is not finite; this model cannot be evaluated on this row")
    by_source: dict[str, list[int]] = {}
    for place, row in enumerate(chosen):
        by_source.setdefault(rows.pool.sources[row], []).append(place)
    return {
        "loss": float(sums.sum() / counts.sum()),
        "tokens": int(counts.sum()),
        "rows": len(chosen),
        "bad_rows": len(rows.bad),
        "sources": {name: _mean(sums, counts, places) for name, places in sorted(by_source.items())},
    }


def validation_loss(model: Any, rows: Rows, *, token_budget: int) -> float:
    """Return the mean loss over the supervised tokens of rows; not finite if a loss is not.

    Each of several processes measures a part, and all return the same number.

    Args:
        model: The model.
        rows: The rows.
        token_budget: The padded tokens of a batch.
    """
    sums, counts = _sums(model, rows, np.flatnonzero(rows.usable).tolist(), token_budget=token_budget, shared=True)
    return float(sums.sum() / counts.sum())


def _sums(
    model: Any,
    rows: Rows,
    chosen: Sequence[int],
    *,
    token_budget: int,
    advance: Callable[[int], object] = int,
    shared: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of the losses, number of supervised tokens) of each row, in the order of `chosen`."""
    lengths = [int(rows.scan.tokens[i]) for i in chosen]
    sums, counts = torch.zeros(len(chosen), dtype=torch.float64), torch.zeros(len(chosen), dtype=torch.int64)
    part = slice(rank(), None, world_size()) if shared else slice(None)
    for group, batch in rows.micro_batches(chosen, token_budget, model.device)[part]:
        values, where = token_losses(model, batch)
        index = torch.tensor(group)
        sums[index] = torch.zeros(len(group), dtype=torch.float64).index_add(0, where.cpu(), values.double().cpu())
        counts[index] = torch.bincount(where.cpu(), minlength=len(group))
        advance(sum(lengths[i] for i in group))
    if shared and world_size() > 1:
        both = [each.to(model.device) for each in (sums, counts)]
        for each in both:
            torch.distributed.all_reduce(each)
        sums, counts = (each.cpu() for each in both)
    return sums, counts


def _mean(sums: torch.Tensor, counts: torch.Tensor, places: list[int]) -> Mapping[str, Any]:
    index = torch.tensor(places)
    return {"loss": float(sums[index].sum() / counts[index].sum()), "tokens": int(counts[index].sum())}
