"""Who wins a race of candidates: paired differences on the same held-back rows, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datatools import compare
from pipelines.settings.parts import TrainingConfig
from pipelines.texts import plural

RECIPE = "optimizer", "learning_rate", "epochs", "batch_size"
"""The settings of the training runs that reports show."""


@dataclass(frozen=True)
class Measurements:
    """One metric of all candidates on the same rows.

    Attributes:
        name: The metric.
        label: The name in tables.
        lower: Whether lower is better.
        values: Candidate -> float64 [n], one value per row; the method's own candidate first.
        again: float64 [n], of the method's own candidate, trained with another seed.
        weights: float64 [n], the weight of each row in the mean.
        half: int64 [n], the half that each row belongs to: 0 or 1.
    """

    name: str
    label: str
    lower: bool
    values: Mapping[str, NDArray[np.float64]]
    again: NDArray[np.float64]
    weights: NDArray[np.float64]
    half: NDArray[np.int64]

    def by_half(self, values: NDArray[np.float64]) -> list[float]:
        """Return the mean difference from the method's own candidate in each half.

        Args:
            values: float64 [n].
        """
        differences = values - next(iter(self.values.values()))
        parts = [self.half == half for half in (0, 1)]
        return [float(np.average(differences[at], weights=self.weights[at])) if at.any() else 0.0 for at in parts]

    @property
    def noise(self) -> float:
        """The largest difference, over the halves, that another seed makes on the same rows."""
        return max(map(abs, self.by_half(self.again)))


def decide(
    measured: Sequence[Measurements], chosen: Mapping[str, Sequence[Sequence[int]]], recipe: TrainingConfig
) -> dict[str, Any]:
    """Return who is kept and why, for `summary.json`.

    A candidate beats the method's own where its accuracy is clearly higher, or, with no clear difference in accuracy,
    its loss clearly lower. Without such a candidate, the method's own is kept. A difference is clear where its 95 %
    interval over rows excludes 0 and, in both halves, it points to the same side and is larger than what another seed
    makes in either. Were seeds all that differs, two candidates would pass this by chance in one race of twelve.

    Args:
        measured: The metrics, the loss first.
        chosen: Candidate -> the rows that it chose for each half.
        recipe: How the models were trained.
    """
    loss = measured[0]
    own, *rivals = loss.values
    same = {name: next(one for one in chosen if chosen[one] == chosen[name]) for name in chosen}
    tables = [_table(one, same) for one in measured]
    kept, out = own, set[str]()
    for table in (*tables[1:], tables[0]):
        reading = {row["candidate"]: row["reading"] for row in table["table"][1:]}
        out |= {name for name in rivals if reading[name] == "worse"}
        better = [name for name in rivals if reading[name] == "better" and name not in out]
        if better:
            sign = 1 if table["lower_is_better"] else -1
            mean = {row["candidate"]: sign * row["mean"] for row in table["table"]}
            kept = min(better, key=lambda name: mean[name])
            decided = table
            break
    else:
        decided = tables[0]
    state = "won" if kept != own else "held" if rivals and out == set(rivals) else "unclear"
    return {
        "kept": kept,
        "state": state,
        "verdict": _verdict(kept, own, state, decided, tables, out, same),
        "rows": len(loss.weights),
        "runs": len({tuple(half) for rows in chosen.values() for half in rows}) + len(set(map(tuple, chosen[own]))),
        "metrics": tables,
        "recipe": {name: getattr(recipe, name) for name in RECIPE},
    }


def refused(names: Sequence[str], why: str) -> dict[str, Any]:
    """Return what `summary.json` says where there was no race.

    Args:
        names: The candidates, the method's own first.
        why: Why not.
    """
    return {"kept": names[0], "state": "refused", "verdict": f"{why}.", "rows": 0, "runs": 0, "metrics": []}


def interval(difference: float, low: float, high: float, rows: int) -> tuple[float, float]:
    """Return a bootstrap interval as wide as few rows need.

    Resamples of few rows vary less than the rows do, and their tails are too thin: the interval is stretched around the
    difference by sqrt(n / (n - 1)) times the quantile of Student's t, relative to that of the normal distribution.

    Args:
        difference: The mean difference.
        low: The lower end of the bootstrap interval.
        high: The upper end.
        rows: The number of rows.

    Example:
        >>> [round(end, 2) for end in interval(1.0, 0.0, 2.0, 5)]
        [-0.58, 2.58]
        >>> [round(end, 2) for end in interval(1.0, 0.0, 2.0, 1000)]
        [-0.0, 2.0]
    """
    from scipy.special import ndtri, stdtrit

    if rows < 2:
        return -math.inf, math.inf
    by = math.sqrt(rows / (rows - 1)) * float(stdtrit(rows - 1, 0.975) / ndtri(0.975))
    return difference - by * (difference - low), difference + by * (high - difference)


def _table(one: Measurements, same: Mapping[str, str]) -> dict[str, Any]:
    """Return a metric of all candidates, each beside the method's own."""
    own, *_ = one.values
    rows = []
    for name, values in one.values.items():
        row: dict[str, Any] = {"candidate": name, "mean": float(np.average(values, weights=one.weights))}
        if name != own:
            pair = compare(one.values[own][None], values[None], one.weights)
            low, high = interval(pair.difference, pair.low, pair.high, len(values))
            row |= {"difference": pair.difference, "low": low, "high": high}
            row["reading"] = "same" if same[name] == own else _reading(one, one.by_half(values), low, high)
        rows.append(row)
    again = float(np.average(one.again, weights=one.weights))
    return {
        "name": one.name,
        "label": one.label,
        "lower_is_better": one.lower,
        "rows": len(one.weights),
        "table": rows,
        "another_seed": {"mean": again, "difference": again - rows[0]["mean"], "most": one.noise},
    }


def _reading(one: Measurements, by_half: Sequence[float], low: float, high: float) -> str:
    """Return better, worse or unclear, as `decide` describes."""
    side = 1 if low > 0 else -1
    if low <= 0 <= high or min(side * difference for difference in by_half) <= one.noise:
        return "unclear"
    return "better" if (side > 0) != one.lower else "worse"


def _verdict(
    kept: str,
    own: str,
    state: str,
    decided: Mapping[str, Any],
    tables: Sequence[Mapping[str, Any]],
    out: set[str],
    same: Mapping[str, str],
) -> str:
    rows = plural(tables[0]["rows"], "held-back target row")
    rivals = [name for name in same if name != own]
    if state == "won":
        return f"{_upper(kept)} wins: on {rows}, {_beside(decided, kept)} than with {own}. It selects."
    if not rivals or all(same[name] == own for name in rivals):
        return f"Cannot tell: every candidate chose the same rows. {_upper(own)} is kept."
    worst = [f"with {name}, {_beside(_where_worse(tables, name), name)}" for name in rivals if name in out]
    if state == "held":
        return f"{_upper(own)} wins: on {rows}, {'; '.join(worst)}. It selects."
    unsure = [f"with {name}, {_beside(tables[0], name)}" for name in rivals if name not in out and same[name] != own]
    alike = [name for name in rivals if same[name] == own]
    said = [*unsure, *(f"{name} chose the same rows" for name in alike)]
    noise = f"; another seed changes it by up to {tables[0]['another_seed']['most']:.4f}" if unsure else ""
    tail = f" Clearly worse: {'; '.join(worst)}." if worst else ""
    return f"Cannot tell: on {rows}, {'; '.join(said)}{noise}.{tail} {_upper(own)} is kept."


def _where_worse(tables: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """Return the metric by which a candidate is clearly worse, accuracies first."""
    for table in (*tables[1:], tables[0]):
        if any(row["candidate"] == name and row["reading"] == "worse" for row in table["table"][1:]):
            return table
    return tables[0]


def _beside(table: Mapping[str, Any], name: str) -> str:
    """Return `held-back loss is 0.0981 lower (95 % 0.0502 to 0.1441)`."""
    row = next(row for row in table["table"] if row["candidate"] == name)
    by, unit, digits = (1, "", 4) if table["lower_is_better"] else (100, " points", 1)
    difference, low, high = (by * row[key] for key in ("difference", "low", "high"))
    side = "higher" if difference >= 0 else "lower"
    if difference < 0:
        difference, low, high = -difference, -high, -low
    return f"{table['label']} is {difference:.{digits}f}{unit} {side} (95 % {low:.{digits}f} to {high:.{digits}f})"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
