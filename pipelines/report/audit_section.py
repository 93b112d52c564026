"""The audit in a report: the selection compared with each arm, and a verdict in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report import charts
from pipelines.report.accuracy_section import accuracy_section, beside, oracle_section, sentences
from pipelines.report.charts import Scale
from pipelines.report.values import Json, finite, listing, mapping
from pipelines.settings.methods import FULL, SCORERS, known, method
from pipelines.texts import plural, signed, visible

FEWEST_RUNS = 3
"""The minimum number of pairs of runs with equal seeds for calling an arm better or worse."""
LABELS = {
    "selected": "this selection",
    FULL: "whole pool, 1 epoch",
    "untrained": "no training",
}
"""The labels of arms that are not methods."""
BASE_ARM = "untrained"  # the model before any training, shown for orientation only
UNAUDITED = "no result shows yet that these rows are better than random rows"


@dataclass(frozen=True)
class Arm:
    """One arm of the audit. Lower losses are better; `delta` is its mean minus that of the selection."""

    name: str
    label: str
    chosen: bool
    mean: float | None
    low: float | None
    high: float | None
    n: int
    delta: float | None
    reading: str  # of the selection: "better", "worse", "unclear"; "" for the selection itself and the untrained model
    runs: tuple[float, ...]

    @property
    def matches_length(self) -> bool:
        """Whether it is the control for answer length."""
        record = method(self.name)
        return record is not None and record.matches_length

    @property
    def text(self) -> str:
        """The mean as text."""
        return "–" if self.mean is None else f"{self.mean:.4f}"

    @property
    def between(self) -> str:
        """The interval as text; empty if there is none."""
        return "" if self.low is None or self.high is None else f"{self.low:.4f} to {self.high:.4f}"

    @property
    def difference(self) -> str:
        """`delta` as text; empty for the selection itself."""
        return "" if self.chosen else signed(self.delta)

    @property
    def few(self) -> bool:
        """Whether it has too few runs for a verdict."""
        return self.n < FEWEST_RUNS

    @property
    def word(self) -> str:
        """The reading as a word."""
        few = "one run" if self.n < 2 else f"{self.n} runs" if self.few else "unclear"
        return {"unclear": few}.get(self.reading, self.reading)


def arms(audit: Json, chosen_by: str) -> list[Arm]:
    """Return the arms of an audit, the selection first, each other arm compared with it.

    The selection is better than an arm if the 95 % interval of the difference excludes zero: over at least three seeds
    that both ran, by Student's t. Without single runs (at least three of both), the two stated intervals must not
    overlap; otherwise the result is unclear.

    Args:
        audit: The content of audit.json.
        chosen_by: The method of the selection.
    """
    table = listing(audit.get("table"))
    runs: dict[str, dict[Any, float]] = {}
    for row in listing(audit.get("rows")):
        loss = finite(row.get("loss"))
        if loss is not None:
            runs.setdefault(str(row.get("arm")), {})[row.get("seed")] = loss
    names = [str(row.get("arm")) for row in table]
    ours = next((name for name in ("selected", chosen_by) if name in names), None)
    us = table[names.index(ours)] if ours is not None else {}
    our_runs = runs.get(ours, {}) if ours is not None else {}
    our_mean, *our_interval = (finite(us.get(key)) for key in ("mean", "low", "high"))
    result = []
    for row, name in zip(table, names, strict=True):
        mean, low, high = (finite(row.get(key)) for key in ("mean", "low", "high"))
        losses = runs.get(name, {})
        paired = [loss - our_runs[seed] for seed, loss in losses.items() if seed in our_runs]
        result.append(
            Arm(
                name=name,
                label=LABELS["selected"] if name == ours else _label(name),
                chosen=name == ours,
                mean=mean,
                low=low,
                high=high,
                n=_runs(row, losses),
                delta=finite(row.get("delta_vs_selected")) if mean is None or our_mean is None else mean - our_mean,
                reading=""
                if name in (ours, BASE_ARM)
                else _reading(paired, (low, high), our_interval, runs=min(_runs(row, losses), _runs(us, our_runs))),
                runs=tuple(losses.values()),
            )
        )
    return sorted(result, key=lambda arm: (not arm.chosen, math.inf if arm.mean is None else arm.mean))


def _runs(row: Json, losses: Mapping[Any, float]) -> int:
    return int(finite(row.get("n")) or len(losses))


def _reading(
    paired: Sequence[float], theirs: Sequence[float | None], ours: Sequence[float | None], *, runs: int
) -> str:
    if len(paired) >= FEWEST_RUNS:
        from datatools import t_interval

        _, least, most = t_interval(list(paired))
        if least is not None and most is not None:
            return "better" if least > 0 else "worse" if most < 0 else "unclear"
    (low, high), (our_low, our_high) = theirs, ours
    if paired or runs < FEWEST_RUNS or low is None or high is None or our_low is None or our_high is None:
        return "unclear"
    return "better" if our_high < low else "worse" if our_low > high else "unclear"


def verdict(table: Sequence[Arm], audit: Json) -> tuple[str, str]:
    """Return (state, sentence): whether the selection is better than random choice and text similarity.

    The audit's own sentence takes precedence.

    Args:
        table: The arms.
        audit: The content of audit.json.

    Returns:
        The state is "good" (better than every random arm), "bad" (worse than one), "unclear" (neither), or "none" (no
        arm to compare with).
    """
    random, similar = _of_kind(table, "baseline"), _of_kind(table, "similarity")
    said = str(audit.get("verdict") or "")
    if not random and not similar:
        return "none", said
    readings = {arm.reading for arm in random or similar}
    state = "bad" if "worse" in readings else "good" if readings == {"better"} else "unclear"
    return state, said or _compared([*random, *similar])


def _of_kind(table: Sequence[Arm], kind: str) -> list[Arm]:
    """Return the arms that are methods of a kind, in the order of the table of methods."""
    names = [name for name in SCORERS if known(name).kind == kind]
    return sorted((arm for arm in table if arm.name in names and not arm.chosen), key=lambda arm: names.index(arm.name))


def _label(name: str) -> str:
    record = method(name)
    return record.label if record is not None else LABELS.get(name, name)


def is_baseline(name: str) -> bool:
    """Return whether a selection by a method is random and made only for comparison.

    Args:
        name: The name of the method.
    """
    record = method(name)
    return record is not None and record.kind == "baseline"


def _compared(table: Sequence[Arm]) -> str:
    """Return a sentence: 'Held-out loss is 0.0503 lower than with random rows; there is no clear difference from ..'"""
    clear, unclear = [], []
    for arm in table:
        by = "" if arm.delta is None else f"{abs(arm.delta):.4f} {'lower' if arm.delta >= 0 else 'higher'}"
        with_ = known(arm.name).rows or arm.label
        if arm.reading == "unclear":
            unclear.append(f"{with_} ({by})" if by else with_)
        else:
            clear.append(f"{by or ('lower' if arm.reading == 'better' else 'higher')} than with {with_}")
    parts = []
    if clear:
        parts.append("held-out loss is " + ", ".join(clear))
    if unclear:
        parts.append("there is no clear difference from " + ", ".join(unclear))
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def trust(summary: Json, table: Sequence[Arm]) -> dict[str, str]:
    """Return a short answer to the question whether the selection can be trusted.

    Args:
        summary: The content of summary.json.
        table: The arms.

    Returns:
        {"state", "big", "text"}.
    """
    if not table:
        if is_baseline(str(summary.get("method"))):
            return {"state": "none", "big": "A baseline", "text": "Not audited: it serves only for comparison."}
        return {"state": "none", "big": "Not audited", "text": f"{UNAUDITED[0].upper()}{UNAUDITED[1:]}."}
    if leak(mapping(summary.get("audit"))):
        return {"state": "bad", "big": "Test rows leaked", "text": "They were in the pool or the target."}
    state, _ = verdict(table, {})
    random, similar = _of_kind(table, "baseline"), _of_kind(table, "similarity")
    against = "random choice" if random else "text similarity"
    big = {
        "good": f"Beats {against}",
        "bad": f"Worse than {against}",
        "unclear": f"Not clearly better than {against}",
        "none": "Audited",
    }[state]
    rivals = random or similar
    if state == "unclear" and rivals and max(arm.n for arm in rivals) < FEWEST_RUNS:
        big = f"Too few runs to compare with {against}"
    words = {"better": "Better than", "worse": "Worse than", "unclear": "No clear difference from"}
    text = " ".join(f"{words[arm.reading]} {arm.label}." for arm in similar) if random else ""
    for label, other in beside(mapping(summary.get("audit")), "baseline" if random else "similarity").items():
        if {state, other} == {"good", "bad"}:
            state, big = "unclear", f"Loss and {label} disagree"
        elif state == "good" and other == "good":
            text = f"Also by {label}. {text}"
        elif state == "good":
            text = f"By {label} no clear difference from {against}. {text}"
        elif other == "good":
            text = f"By {label} it beats {against}. {text}"
        elif other == "bad":
            state, text = "bad", f"By {label} worse than {against}. {text}"
    fewest = min((arm.n for arm in table if arm.name not in (BASE_ARM, FULL)), default=1)
    return {"state": state, "big": big, "text": f"{text} {plural(fewest, 'run')} per arm.".strip()}


def leak(audit: Json) -> str | None:
    """Return a sentence about test rows that were seen before; None if there are none.

    Args:
        audit: The content of audit.json.
    """
    said = audit.get("leaked")
    return f"Leaked: {said}. The losses below prove nothing." if said else None


def audit_section(summary: Json, table: Sequence[Arm]) -> dict[str, Any] | None:
    """Return the table of arms with a chart per arm, and the verdict; None without an audit.

    Args:
        summary: The content of summary.json.
        table: The arms.
    """
    if not table:
        return None
    audit = mapping(summary.get("audit"))
    rivals = [arm for arm in table if arm.name != BASE_ARM] or table
    values = [value for arm in rivals for value in (arm.mean, arm.low, arm.high, *arm.runs) if value is not None]
    if not values:
        return None
    low, high = min(values), max(values)
    landmarks = [arm.mean for arm in table if arm.name == BASE_ARM and arm.mean is not None]
    if all(low - (high - low) <= mean <= high + (high - low) for mean in landmarks):
        low, high = min([low, *landmarks]), max([high, *landmarks])  # not drawn if it would compress the others
    room = (high - low) * 0.06 or abs(low) * 0.01 or 1.0
    scale = Scale(low - room, high + room)
    guide = next((arm.mean for arm in table if arm.chosen), None)
    words = {"better": "selection better", "worse": "selection worse", "unclear": "no clear difference", "": ""}
    rows = []
    for arm in table:
        off = arm.mean is not None and not scale.low <= arm.mean <= scale.high
        rows.append(
            {
                "arm": arm,
                "word": f"{plural(arm.n, 'run')} only" if arm.few and arm.reading == "unclear" else words[arm.reading],
                "off": "beyond the scale" if off else "",
                "chart": ""
                if off
                else charts.interval(
                    scale,
                    arm.mean,
                    (arm.low, arm.high),
                    arm.runs,
                    guide=guide,
                    chosen=arm.chosen,
                    label=f"{visible(arm.label)}: {arm.text}",
                ),
            }
        )
    state, sentence = verdict(table, audit)
    return {
        "metric": str(audit.get("metric") or "held-out loss"),
        "state": state,
        "leak": leak(audit),
        "sentence": sentence,
        "rows": rows,
        "ticks": charts.ticks(scale, 6),
        "paired": any(len(arm.runs) >= FEWEST_RUNS for arm in rivals),
        "said": sentences(audit),
        "accuracies": accuracy_section(audit, lambda name: LABELS.get(name, _label(name))),
        "oracle": oracle_section(audit),
    }
