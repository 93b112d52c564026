"""The report of a run with coresets: whether the choice had an effect, and what it cost.

It is drawn only from `coreset.json` and `metrics.jsonl` of the run's folder; equal inputs give equal bytes.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datatools import DataError, files
from pipelines.report import charts
from pipelines.report import page as report
from pipelines.report.accuracy_section import held_out_accuracies
from pipelines.texts import number, percent, plural, size

PEAK = {
    "gpu": "The tensors of a monitored step, choosing included, used up to {} of GPU memory.",
    "process": "The process used up to {} of memory, choosing included.",
}


def read(folder: Path, name: str = "coreset.json") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (facts, metrics of each step).

    Args:
        folder: The folder of the run.
        name: The file of facts.

    Raises:
        DataError: A file is missing or damaged.
    """
    facts: dict[str, Any] = files.read_json(folder / name)
    path = folder / "metrics.jsonl"
    try:
        entries = [json.loads(line) for line in files.read_bytes(path).splitlines()]
    except ValueError as error:
        raise DataError(f"{path}: damaged: {error}; train again") from error
    if not isinstance(facts, dict) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{folder}: {name} or metrics.jsonl is damaged: it contains values that no run writes")
    return facts, entries


def render(folder: Path, tell: Callable[[str], object] | None = None) -> Path:
    """Draw folder/report.html from coreset.json and metrics.jsonl.

    Args:
        folder: The folder of the run.
        tell: Called with one line for the terminal: the matching error compared with random rows, and the time spent
            choosing.

    Returns:
        The page.

    Raises:
        DataError: A file is missing or damaged.
    """
    facts, entries = read(folder)
    if tell is not None:
        tell(_lead(*_numbers(entries)) + (f"; {_short(facts)}" if facts.get("costs_more") else ""))
    with report.damaged(f"{folder}: coreset.json or metrics.jsonl", "train again"):
        text = report.page("coreset.html", **_parts(facts, entries, *_numbers(entries)))
    return report.write_page(folder, text)


def _short(facts: Mapping[str, Any]) -> str:
    """Return that choosing does not pay, without the advice, which a run has given as a warning."""
    return str(facts["costs_more"]).removeprefix("coreset: ").rpartition("; ")[0]


def _numbers(entries: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], dict[str, float]]:
    """Return the monitored steps, and means over those with finite errors (empty if there are none).

    The share of time is a median, because the first step is always slow.
    """
    seen = [entry for entry in entries if "match_error" in entry]
    if not seen:
        return [], {}
    keys = ("match_error", "match_error_random")
    finite = [entry for entry in seen if all(isinstance(entry[k], float) and math.isfinite(entry[k]) for k in keys)]
    means = {key: statistics.fmean(e[key] for e in finite) for key in keys} if finite else {}
    return seen, means | {"share": statistics.median(_share(e) for e in seen), "finite": len(finite)}


def _share(entry: Mapping[str, Any]) -> float:
    return float(entry["select_seconds"] / max(1e-9, entry["select_seconds"] + entry["train_seconds"]))


def _lead(seen: Sequence[Mapping[str, Any]], means: Mapping[str, float]) -> str:
    if not seen:
        return "coreset: no step was monitored"
    steps, last = len(seen), seen[-1]
    if not means["finite"]:
        said = f"coreset: none of {plural(steps, 'monitored step')} has a finite matching error"
    else:
        said = (
            f"coreset: error of the kept rows' mean gradient {number(means['match_error'])}, of random rows with the "
            f"same quotas {number(means['match_error_random'])}"
        )
        if lost := steps - means["finite"]:
            said += f" (without {plural(lost, 'monitored step')} whose error is not finite)"
    said += f"; choosing took {percent(means['share'])} of a step"
    return said + _nothing_to_choose(seen, int(last["overflows"]), int(last["step"]))


def _nothing_to_choose(seen: Sequence[Mapping[str, Any]], overflows: int, steps: int) -> str:
    """Return why the two errors may be equal although the choice works: there was nothing to choose."""
    if overflows >= steps:
        return (
            "; small sources alone filled every batch, so nothing was chosen: both errors are those of random rows "
            "(keep more rows with --keep, or name the small sources with --set coreset.small=[...])"
        )
    if overflows:
        return f"; small sources alone filled {overflows:,} of {steps:,} batches, whose rows are random"
    if all(entry["match_error"] == entry["match_error_random"] for entry in seen):
        return "; the two are equal in every monitored step: no step had rows to choose from"
    return ""


def _parts(
    facts: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], seen: Sequence[Mapping[str, Any]],
    means: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    settings = facts["settings"]
    across = charts.Scale(1, max(2, entries[-1]["step"]))
    return {
        "lead": _lead(seen, means).removeprefix("coreset: "),
        "warnings": [facts[key] for key in ("warning", "costs_more") if facts.get(key)],
        "settings": settings,
        "method": method_in_words(str(settings["method"])),
        "steps": len(entries),
        "monitored": len(seen),
        "overflows": seen[-1]["overflows"] if seen else 0,
        "peak": _peak(facts, seen),
        "errors": chart(
            across,
            "error of the mean gradient, by step",
            ("chosen", _points(seen, "match_error")),
            ("other", _points(seen, "match_error_random")),
        ),
        "shares": chart(
            across, "share of a step's time spent choosing", ("chosen", [(e["step"], _share(e)) for e in seen])
        ),
        "losses": chart(
            across,
            "training loss, by step",
            ("chosen", [(e["step"], e["loss"]) for e in entries if e["loss"] is not None]),
            ("other", [(e["step"], e["eval_loss"]) for e in entries if e.get("eval_loss") is not None]),
            from_zero=False,
        ),
        "validated": any("eval_loss" in e for e in entries),
        "accuracies": held_out_accuracies(facts.get("validation_metrics")),
        "sources": _sources(facts, seen),
    }


def method_in_words(name: str) -> str:
    """Return which rows a coreset method keeps, from its record; for an unknown method, its name.

    Args:
        name: The name of the method.

    Example:
        >>> method_in_words("random_in_source"), method_in_words("mine")
        ('random rows of each source: the control', "rows chosen by 'mine'")
    """
    from datatools import CORESET_METHODS  # brings torch

    return CORESET_METHODS[name].title if name in CORESET_METHODS else f"rows chosen by {name!r}"


def _points(entries: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the finite values."""
    return [(e["step"], e[key]) for e in entries if isinstance(e[key], float) and math.isfinite(e[key])]


def _peak(facts: Mapping[str, Any], seen: Sequence[Mapping[str, Any]]) -> str | None:
    peaks = [entry["peak_bytes"] for entry in seen if "peak_bytes" in entry]
    return PEAK[facts["memory"]].format(size(max(peaks))) if peaks else None


def chart(
    across: charts.Scale, label: str, *series: tuple[str, Sequence[tuple[float, float]]], from_zero: bool = True
) -> dict[str, Any] | None:
    """Return lines over the steps, with the ticks of both axes; None without a point.

    Args:
        across: The scale of steps.
        label: The description for screen readers.
        from_zero: Whether the y axis begins at 0.
        *series: (class, points) of each line.
    """
    values = [y for _, points in series for _, y in points]
    if not values:
        return None
    low = 0.0 if from_zero else min(values)
    up = charts.Scale(low, max(max(values), low + 1e-9))
    drawing, marks = charts.lines(across, up, series, label=label)
    return {"drawing": drawing, "ticks": charts.ticks(across), "marks": marks}


def _sources(facts: Mapping[str, Any], seen: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per source: its rows, and how many of the drawn rows were kept in monitored steps."""
    drawn: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for entry in seen:
        drawn.update(entry["seen_by_source"])
        kept.update(entry["kept_by_source"])
    total, held = sum(facts["sources"].values()), max(1, kept.total())
    widest = max([rows / total for rows in facts["sources"].values()] + [n / held for n in kept.values()])
    return [
        {
            "name": name,
            "rows": rows,
            "share": percent(rows / total),
            "kept_share": percent(kept[name] / held),
            "rate": percent(kept[name] / drawn[name]) if drawn[name] else "none drawn",
            "small": name in facts["small"],
            "widths": [f"{100 * part / widest:.2f}%" for part in (rows / total, kept[name] / held)],
        }
        for name, rows in sorted(facts["sources"].items(), key=lambda item: (-item[1], item[0]))
    ]
