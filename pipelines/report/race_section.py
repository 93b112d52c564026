"""The race of candidates (`select --verify`), for the report and the terminal."""

from __future__ import annotations

from typing import Any

from pipelines.report.values import Json, finite, listing, mapping
from pipelines.texts import count, plural, signed

STATES = {"won": "good", "held": "good"}
"""State of a race -> how its verdict is coloured; others are unclear."""

WORDS = {"better": "clearly better", "worse": "clearly worse", "unclear": "unclear", "same": "same rows"}


def race_section(summary: Json) -> dict[str, Any] | None:
    """Return the verdict of a race, and one table per metric; None without a race.

    Args:
        summary: The content of summary.json.
    """
    race = mapping(summary.get("race"))
    if not race:
        return None
    recipe = mapping(race.get("recipe"))
    how = ", ".join(f"{str(name).replace('_', ' ')} {value}" for name, value in recipe.items())
    runs = finite(race.get("runs"))
    return {
        "verdict": str(race.get("verdict") or ""),
        "state": STATES.get(str(race.get("state")), "unclear"),
        "tables": [_table(metric, str(race.get("kept"))) for metric in listing(race.get("metrics"))],
        "recipe": f"{plural(int(runs), 'training run')}: {how}" if runs else "",
    }


def _table(metric: Json, kept: str) -> dict[str, Any]:
    loss = bool(metric.get("lower_is_better"))
    by, digits = (1.0, 4) if loss else (100.0, 1)
    rows = []
    for row in listing(metric.get("table")):
        mean, difference, low, high = (
            None if (value := finite(row.get(key))) is None else by * value
            for key in ("mean", "difference", "low", "high")
        )
        rows.append(
            {
                "label": str(row.get("candidate")),
                "kept": str(row.get("candidate")) == kept,
                "mean": "–" if mean is None else f"{mean:.{digits}f}" + ("" if loss else " %"),
                "difference": "" if difference is None else signed(difference, digits),
                "interval": "" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}",
                "word": WORDS.get(str(row.get("reading")), ""),
                "reading": str(row.get("reading") or ""),
            }
        )
    seed = mapping(metric.get("another_seed"))
    mean, difference = (finite(seed.get(key)) for key in ("mean", "difference"))
    if mean is not None and difference is not None:
        rows.append(
            {
                "label": "another seed",
                "kept": False,
                "mean": f"{by * mean:.{digits}f}" + ("" if loss else " %"),
                "difference": signed(by * difference, digits),
                "interval": "",
                "word": "chance",
                "reading": "",
            }
        )
    return {
        "label": str(metric.get("label") or metric.get("name")),
        "direction": "lower is better" if loss else "higher is better",
        "rows": rows,
        "count": count(finite(metric.get("rows"))),
        "unit": "" if loss else " in points",
        "own": rows[0]["label"] if rows else "",
    }
