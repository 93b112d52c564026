"""The arms of an audit compared on the same held-out rows, by loss and by accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datatools import bootstrap_mean, compare, spearman
from pipelines.report.audit_section import FEWEST_RUNS
from pipelines.select.arms import BASE, SELECTED
from pipelines.select.bench import Result
from pipelines.settings.methods import FULL
from pipelines.texts import plural
from pipelines.training.accuracy.measure import Plan

HELD_OUT = "held-out loss"
Runs = Mapping[str, Sequence[Result]]
"""Arm -> its runs, by seed."""


def metrics(base: Result, runs: Runs, plan: Plan) -> list[dict[str, Any]]:
    """Compare all arms by each metric, the loss first: means with intervals, and every arm against the selection.

    Args:
        base: the model before any training.
        runs: the arms, the selection among them.
        plan: what was measured.
    """
    everything = {BASE: [base], **runs}
    weights = base.counts
    found = [
        _metric(
            "loss",
            HELD_OUT,
            {arm: np.stack([one.sums / weights for one in results]) for arm, results in everything.items()},
            weights,
            lower=True,
        )
    ]
    for name in plan.metrics:
        values = {arm: np.stack([one.measured[name].values for one in results]) for arm, results in everything.items()}
        one = _metric(name, plan.label(name), values, None, lower=False)
        for row in one["table"]:
            more = [result.measured[name].more for result in everything[row["arm"]]]
            row |= {key: float(np.mean([each[key] for each in more])) for key in more[0]}
        found.append(one)
    return found


def _metric(
    name: str,
    label: str,
    values: Mapping[str, NDArray[np.float64]],
    weights: NDArray[np.float64] | None,
    *,
    lower: bool,
) -> dict[str, Any]:
    """One metric over all arms; `values` float64 [seeds, rows] of each."""
    table, against = [], []
    for arm, own in values.items():
        mean, low, high = bootstrap_mean(own, weights)
        table.append({"arm": arm, "mean": mean, "low": low, "high": high, "n": len(own)})
        if arm in (SELECTED, BASE):
            continue
        pair = compare(values[SELECTED], own, weights)
        seeds = min(len(own), len(values[SELECTED]))
        higher, smaller = pair.low > 0, pair.high < 0  # what they are, beside the selection
        clear = "unclear" if seeds < FEWEST_RUNS or not (higher or smaller) else ""
        reading = clear or ("better" if higher == lower else "worse")
        against.append(
            {
                "arm": arm,
                "difference": pair.difference,
                "low": pair.low,
                "high": pair.high,
                "p": pair.p,
                "sign_p": pair.sign_p,
                "rows_higher": pair.better,
                "rows_lower": pair.worse,
                "seeds": seeds,
                "reading": reading,
            }
        )
    rows = next(iter(values.values())).shape[1]
    return {"name": name, "label": label, "lower_is_better": lower, "rows": rows, "table": table, "against": against}


def in_words(metric: Mapping[str, Any]) -> str:
    """Return the verdict by one accuracy: `By option accuracy, the selection is better than random by 3.2 points`.

    Args:
        metric: The accuracy, as `metrics` returns it.
    """
    said = []
    for one in metric["against"]:
        name = "the whole pool in one epoch" if one["arm"] == FULL else one["arm"]
        points, low, high = -100 * one["difference"], -100 * one["high"], -100 * one["low"]
        seeds = plural(one["seeds"], "seed")
        facts = f"95 % {low:.1f} to {high:.1f} over rows and seeds, p = {one['p']:.2g}, {seeds}"
        side = "above" if points > 0 else "below"
        if one["seeds"] < FEWEST_RUNS:
            few = "one seed" if one["seeds"] == 1 else f"{seeds}"
            said.append(f"{abs(points):.1f} points {side} {name} ({few}: too few to tell them apart)")
        elif one["reading"] == "better":
            said.append(f"better than {name} by {points:.1f} points ({facts})")
        elif one["reading"] == "worse":
            said.append(f"WORSE than {name} by {-points:.1f} points ({facts})")
        else:
            said.append(f"not told apart from {name}: {abs(points):.1f} points {side}, {facts}")
    return f"By {metric['label']}, the selection is " + "; ".join(said) + "."


def order(metric: Mapping[str, Any]) -> list[str]:
    """Return the trained arms from best to worst, without the whole pool.

    Args:
        metric: A metric, as `metrics` returns it.
    """
    rows = [row for row in metric["table"] if row["arm"] not in (BASE, FULL)]
    sign = 1 if metric["lower_is_better"] else -1
    return [row["arm"] for row in sorted(rows, key=lambda row: sign * row["mean"])]


def agreement(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return whether loss and accuracy name the same best arm; None where there is nothing to compare.

    Args:
        found: What `metrics` returned.
    """
    if len(found) < 2 or len(order(found[0])) < 2:
        return None
    loss, *others = found
    best, said, same = order(loss)[0], [], True
    for metric in others:
        mean = {row["arm"]: row["mean"] for row in metric["table"]}
        top = order(metric)[0]
        if mean[best] >= mean[top]:
            said.append(f"{metric['label']} and {loss['label']} agree: {best} is the best arm by both")
            continue
        same = False
        rank = _correlation(loss, metric)
        said.append(
            f"{metric['label']} and {loss['label']} DISAGREE about the best arm: by loss it is {best}, by "
            f"{metric['label']} {top} ({100 * mean[top]:.1f} % against {100 * mean[best]:.1f} % for {best}"
            + (f"; rank correlation of the arms {rank:.2f})" if rank is not None else ")")
        )
    text = "; ".join(said)
    return {"agree": same, "sentence": f"{text[:1].upper()}{text[1:]}."}


def _correlation(a: Mapping[str, Any], b: Mapping[str, Any]) -> float | None:
    """The rank correlation of the arms between two metrics, 1 where both rank them alike; None below three arms."""
    signs = [1 if metric["lower_is_better"] else -1 for metric in (a, b)]
    means = [{row["arm"]: sign * row["mean"] for row in m["table"]} for m, sign in zip((a, b), signs, strict=True)]
    arms = order(a)
    return spearman(*[[each[arm] for arm in arms] for each in means]) if len(arms) > 2 else None


def held(rate: float, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say whether the ranking of the arms held at a quarter of the learning rate.

    Args:
        rate: the learning rate of the audit.
        before: the metrics at that rate.
        after: the metrics at a quarter of it.
    """
    said, kept = [], True
    for one, two in zip(before, after, strict=True):
        ours, theirs = order(one), order(two)
        if ours == theirs:
            said.append(f"by {one['label']} the ranking held ({', '.join(ours)})")
            continue
        kept = False
        rank = _correlation(one, two)
        best = (
            f"the best arm is {theirs[0]} instead of {ours[0]}" if ours[0] != theirs[0] else f"{ours[0]} stays the best"
        )
        said.append(
            f"by {one['label']} the ranking did NOT hold: {', '.join(theirs)} instead of {', '.join(ours)}; {best}"
            + (f"; rank correlation {rank:.2f}" if rank is not None else "")
        )
    words = {"better": "better", "worse": "WORSE", "unclear": "not told apart"}
    for one, two in zip(before, after, strict=True):
        was = {each["arm"]: each["reading"] for each in one["against"]}
        for each in two["against"]:
            old, new = was.get(each["arm"]), each["reading"]
            if old is not None and {old, new} == {"better", "worse"}:
                said.append(f"against {each['arm']} the selection is {words[new]} and was {words[old]}")
    text = f"at a quarter of the learning rate ({rate / 4:g} instead of {rate:g}), " + "; ".join(said)
    return {"learning_rate": rate / 4, "held": kept, "metrics": list(after), "sentence": f"A{text[1:]}."}
