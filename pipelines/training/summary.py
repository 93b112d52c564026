"""Facts of a training run for its report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.rows.rows import Rows
from pipelines.runs.redact import redact
from pipelines.settings.metrics import LOSS
from pipelines.settings.train import TrainConfig
from pipelines.training.fit import Trained
from pipelines.training.validation import PREFIX

SHOWN = ("optimizer", "learning_rate", "schedule", "weight_decay", "epochs", "batch_size", "gradient", "gradient_clip")


def facts(
    config: TrainConfig,
    result: Trained,
    *,
    rows: int,
    steps: int,
    held_out: Rows | None,
    leaked: str | None,
    final: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return what `training.json` contains besides the metrics of a run.

    Args:
        config: The settings.
        result: The result of the run.
        rows: The number of rows that it was trained on.
        steps: The number of planned steps.
        held_out: The validation rows, if any.
        leaked: A sentence about validation rows that are also trained on.
        final: The accuracies of the saved weights on the validation rows.
    """
    found: dict[str, Any] = {
        "model": redact(str(config.model.name)),
        "rows": rows,
        "steps": result.steps,
        "planned_steps": steps,
        "skipped_steps": result.skipped,
        "settings": {key: getattr(config.training, key) for key in SHOWN},
    }
    if held_out is not None:
        found["validation"] = {
            "rows": int(held_out.usable.sum()),
            "best_step": None if result.best is None else result.best[0],
            "best_loss": None if result.best is None else result.best[1],
            "kept": "best" if config.keep_best else "last",
            "patience": config.patience,
            "stopped": result.stopped,
        }
        if final:
            found["validation"] |= {"metrics": dict(final), "best_by": _by(config)}
        found["leaked"] = leaked
    return found


def _by(config: TrainConfig) -> str:
    return LOSS if config.metrics is None else config.metrics.best_by


def with_final(result: Trained, final: Mapping[str, Mapping[str, Any]]) -> Trained:
    """Return a result whose log has the accuracies of the saved weights, at their step.

    Args:
        result: The result of the run.
        final: The accuracies.
    """
    values = {f"{PREFIX}{name}": one["mean"] for name, one in final.items()}
    entries = [entry | values if entry["step"] == result.kept else entry for entry in result.entries]
    return replace(result, entries=entries)


def best_in_words(result: Trained, config: TrainConfig) -> str:
    """Return one line for the terminal: the best evaluation, and which weights were saved.

    Args:
        result: The result of the run.
        config: The settings of the run.
    """
    assert result.best is not None
    step, loss = result.best
    ended = f"stopped early, after step {result.steps}" if result.stopped else f"{result.steps} steps done"
    whose = f"the saved weights are those of step {result.kept}"
    best = f"lowest loss {loss:.4f}" if _by(config) == LOSS else f"best by {_by(config)} (loss {loss:.4f})"
    return f"validation: {best} after step {step}; {ended}; {whose}"
