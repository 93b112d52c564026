"""Facts of a training run for its report and the terminal."""

from __future__ import annotations

from typing import Any

from pipelines.rows.rows import Rows
from pipelines.runs.redact import redact
from pipelines.settings.train import TrainConfig
from pipelines.training.fit import Trained

SHOWN = ("optimizer", "learning_rate", "schedule", "weight_decay", "epochs", "batch_size", "gradient", "gradient_clip")


def facts(
    config: TrainConfig, result: Trained, *, rows: int, steps: int, held_out: Rows | None, leaked: str | None
) -> dict[str, Any]:
    """Return what `training.json` contains besides the metrics of a run.

    Args:
        config: The settings.
        result: The result of the run.
        rows: The number of rows that it was trained on.
        steps: The number of planned steps.
        held_out: The validation rows, if any.
        leaked: A sentence about validation rows that are also trained on.
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
        found["leaked"] = leaked
    return found


def best_in_words(result: Trained, *, keep: bool) -> str:
    """Return one line for the terminal: the lowest validation loss, and which weights were saved.

    Args:
        result: The result of the run.
        keep: Whether the best weights are kept.
    """
    assert result.best is not None
    step, loss = result.best
    ended = f"stopped early, after step {result.steps}" if result.stopped else f"{result.steps} steps done"
    whose = f"the saved weights are those of step {step if keep else result.steps}"
    return f"validation: lowest loss {loss:.4f} after step {step}; {ended}; {whose}"
