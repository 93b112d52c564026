"""Losses of a model on rows: the mean over supervised tokens, in total and per source; and its accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datatools import DataError, UsageError, bootstrap_mean, files
from pipelines.models import load as models
from pipelines.models.losses import token_losses
from pipelines.rows import preflight
from pipelines.rows.prepare import prepare
from pipelines.rows.rows import Rows
from pipelines.runs import memory
from pipelines.runs.messages import say
from pipelines.runs.progress import progress
from pipelines.runs.workers import rank, world_size
from pipelines.settings.train import EvaluateConfig
from pipelines.training.accuracy import measure


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Return `loss` (mean over supervised tokens), `tokens` (their number), `rows`, and the same per source.

    With a metric besides the loss, `metrics` holds the mean of each with its 95 % interval over rows.

    Args:
        config: The settings.

    Raises:
        UsageError: A setting is wrong.
        DataError: A row cannot be used, or a loss is not finite.
        EnvironmentProblem: The model cannot be loaded, or a metric cannot be measured on this machine.
    """
    preflight.contradictions(config)
    loaded = models.load(config.model, merge=False)  # merging into bfloat16 would round a small adapter away
    with files.scratch_folder() as scratch:
        rows = prepare(config.data, config.model, loaded.tokenizer, cache=scratch, label="data", limits=loaded.limits)
        plan = measure.plan(config.metrics, rows, [], loaded.tokenizer, loaded.limits)
        for sentence in plan.said:
            say(sentence)
        if config.predictions is not None and not plan.metrics:
            raise UsageError(
                "--predictions: nothing but the loss is measured, which answers no row; name a metric with --metric"
            )
        found = losses(loaded.model, rows, token_budget=config.token_budget, by_row=bool(plan.metrics))
        if plan.metrics:
            by_row = found.pop("by_row")
            measured = measure.measure(loaded.model, plan)
            found["metrics"] = {"loss": _interval(np.divide(*by_row), by_row[1])}
            found["metrics"] |= _accuracies(measured)
            if config.predictions is not None:
                files.write_text(config.predictions, "".join(prediction_lines(rows, measured)))
        return found


def _interval(values: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> dict[str, Any]:
    mean, low, high = bootstrap_mean(values[None], weights)
    return {"mean": mean, "low": low, "high": high, "rows": len(values)}


def _accuracies(measured: Mapping[str, measure.Measured]) -> dict[str, dict[str, Any]]:
    return {name: _interval(one.values) | dict(one.more) for name, one in measured.items()}


def accuracies(model: Any, plan: measure.Plan) -> dict[str, dict[str, Any]]:
    """Return each metric of a plan as `evaluate` does: its mean, the 95 % interval over rows, and their number.

    Args:
        model: The model, in evaluation mode.
        plan: What is measured.
    """
    return _accuracies(measure.measure(model, plan))


def prediction_lines(
    rows: Rows, measured: Mapping[str, measure.Measured], model: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Yield one line of JSON per row and metric: where the row is, what was answered, and whether that is right.

    Args:
        rows: The held-out rows.
        measured: What was measured of one model.
        model: What each line says of the model, if there are several.

    Yields:
        The lines; none for tasks of lm-eval, whose rows are not ours.
    """
    for name, one in measured.items():
        for answer, value in zip(one.answers, one.values.tolist(), strict=False):
            said = {key: value for key, value in answer.items() if key != "row"}
            index = answer["row"]
            head = {"metric": name, "id": rows.pool.ids[index], "row": rows.pool.where(index), "right": bool(value)}
            yield json.dumps({**(model or {}), **head, **said}, ensure_ascii=False) + "\n"


def losses(model: Any, rows: Rows, *, token_budget: int, label: str = "losses", by_row: bool = False) -> dict[str, Any]:
    """Return the result of `evaluate` for rows and a model that are loaded.

    Args:
        model: The model.
        rows: The rows.
        token_budget: The padded tokens of a batch.
        label: The label of the progress.
        by_row: Whether the result also holds `by_row`: two lists over rows, sums of losses and numbers of tokens.
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
        **({"by_row": (sums.numpy(), counts.double().numpy())} if by_row else {}),
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

    def keep(group: list[int], batch: dict[str, torch.Tensor]) -> None:
        values, where = token_losses(model, batch)
        index = torch.tensor(group)
        sums[index] = torch.zeros(len(group), dtype=torch.float64).index_add(0, where.cpu(), values.double().cpu())
        counts[index] = torch.bincount(where.cpu(), minlength=len(group))
        advance(sum(lengths[i] for i in group))

    budget = memory.token_budget(token_budget, "losses", "token_budget")
    batches = rows.micro_batches(chosen, token_budget, model.device)[part]
    batches.each(keep, budget, lambda i: rows.pool.where(chosen[i]))
    if shared and world_size() > 1:
        both = [each.to(model.device) for each in (sums, counts)]
        for each in both:
            torch.distributed.all_reduce(each)
        sums, counts = (each.cpu() for each in both)
    return sums, counts


def _mean(sums: torch.Tensor, counts: torch.Tensor, places: list[int]) -> Mapping[str, Any]:
    index = torch.tensor(places)
    return {"loss": float(sums[index].sum() / counts[index].sum()), "tokens": int(counts[index].sum())}
