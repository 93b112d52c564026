"""The report of a training run: the losses of training and of held-out rows, and facts about the steps.

It is drawn only from `training.json` and `metrics.jsonl` of the run's folder; equal inputs give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.report import charts
from pipelines.report import colm_page as coreset_report
from pipelines.report import page as report
from pipelines.report.accuracy_section import held_out_accuracies
from pipelines.report.values import mapping
from pipelines.runs.messages import say
from pipelines.settings.metrics import LOSS
from pipelines.texts import number

FACTS = "training.json"


def render_any(folder: Path) -> Path | None:
    """Draw the page of a training run, with or without a coreset; None for a run of an old version.

    Args:
        folder: The folder of the run.

    Returns:
        The page, or None.
    """
    if (folder / "coreset.json").is_file():
        return coreset_report.render(folder, say)
    return render(folder) if (folder / FACTS).is_file() else None


def render(folder: Path) -> Path:
    """Draw folder/report.html.

    Args:
        folder: The folder of the run.

    Returns:
        The page.

    Raises:
        DataError: A file is missing or damaged.
    """
    known, entries = coreset_report.read(folder, FACTS)
    return report.write_page(folder, report.page("training.html", **_parts(known, entries)))


def _parts(known: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    across = charts.Scale(1, max([2.0, *(x for x, _ in _points(entries, "step"))]))
    loss, held_out = _points(entries, "loss"), _points(entries, "eval_loss")
    validation = known.get("validation") if isinstance(known.get("validation"), Mapping) else None
    return {
        "model": known.get("model"),
        "rows": known.get("rows"),
        "steps": known.get("steps"),
        "lead": _lead(loss, validation),
        "warnings": _warnings(known, validation),
        "validated": bool(held_out),
        "losses": coreset_report.chart(across, "loss by step", ("other", loss), ("chosen", held_out), from_zero=False),
        "more": [
            {"title": title, "part": part, "note": note}
            for title, key, note in (
                ("Gradient norm", "grad_norm", "Norm of the whole gradient, before clipping."),
                ("Learning rate", "learning_rate", "Learning rate of the first param group."),
                ("Tokens per second", "tokens_per_second", "Speed of each step, without evaluations and saving."),
                *_measured(entries, validation),
            )
            if (part := coreset_report.chart(across, f"{title.lower()} by step", ("chosen", _points(entries, key))))
        ],
        "accuracies": held_out_accuracies((validation or {}).get("metrics")),
        "settings": known.get("settings") if isinstance(known.get("settings"), Mapping) else {},
    }


def _measured(entries: Sequence[Mapping[str, Any]], validation: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Return (title, key, note) of each accuracy that was measured more than once."""
    keys = dict.fromkeys(key for entry in entries for key in entry if key.startswith("eval_") and key != "eval_loss")
    labels = mapping((validation or {}).get("metrics"))
    found = []
    for key in keys:
        if len(_points(entries, key)) > 1:
            label = str(mapping(labels.get(key[5:])).get("label") or key[5:])
            found.append((f"{label[:1].upper()}{label[1:]}", key, "Share of validation rows after the step."))
    return found


def _points(entries: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of each entry with a finite value."""
    return [(float(e["step"]), float(e[key])) for e in entries if _finite(e.get("step")) and _finite(e.get(key))]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _lead(loss: Sequence[tuple[float, float]], validation: Mapping[str, Any] | None) -> str:
    said = []
    if loss:
        said.append(f"The training loss went from {number(loss[0][1])} to {number(loss[-1][1])}.")
    if validation is not None and _finite(validation.get("best_loss")):
        by = str(validation.get("best_by") or LOSS)
        best = "The held-out loss was lowest" if by == LOSS else f"By {by}, the model was best"
        said.append(
            f"{best} after step {validation.get('best_step')}: {'' if by == LOSS else 'held-out loss '}"
            f"{number(validation['best_loss'])}; the saved weights are those of "
            + ("that step." if validation.get("kept") == "best" else "the last step.")
        )
        if validation.get("stopped"):
            better = "a lower loss" if by == LOSS else "a better one"
            said.append(f"Training stopped there: {validation.get('patience')} evaluations without {better}.")
    elif validation is None:
        said.append("No held-out loss was measured (--eval-data): a training loss alone cannot show that a "
                    "model improved on anything but these rows.")  # fmt: skip
    return " ".join(said)


def _warnings(known: Mapping[str, Any], validation: Mapping[str, Any] | None) -> list[str]:
    said = []
    if known.get("leaked"):
        said.append(f"{known['leaked']}: their loss is too low.")
    if _finite(known.get("skipped_steps")) and known["skipped_steps"]:
        said.append(f"{known['skipped_steps']} steps were skipped: their loss or gradient was not finite.")
    if validation is not None and not _finite(validation.get("best_loss")):
        said.append("No validation loss was finite; the saved weights are those of the last step.")
    return said
