"""Accuracy in the report of an audit: beside the loss, with what disagrees, the other learning rate and the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.report.values import Json, finite, listing, mapping
from pipelines.settings.methods import known, method
from pipelines.texts import signed

WORDS = {"better": "selection better", "worse": "selection worse", "unclear": "no clear difference"}


def accuracy_section(audit: Json, label: Callable[[str], str]) -> list[dict[str, Any]]:
    """Per accuracy: a table with the loss of each arm beside it, the most accurate arm first.

    Args:
        audit: the content of audit.json.
        label: what an arm is called.
    """
    metrics = listing(audit.get("metrics"))
    if not metrics:
        return []
    losses = {str(row.get("arm")): finite(row.get("mean")) for row in listing(metrics[0].get("table"))}
    return [_table(metric, losses, label) for metric in metrics[1:]]


def _table(metric: Json, losses: Mapping[str, float | None], label: Callable[[str], str]) -> dict[str, Any]:
    pairs = {str(one.get("arm")): one for one in listing(metric.get("against"))}
    rows = []
    order = dict[str, float]()
    for row in listing(metric.get("table")):
        name = str(row.get("arm"))
        pair = pairs.get(name, {})
        mean = finite(row.get("mean"))
        order[label(name)] = 1.0 if mean is None else -mean
        rows.append(
            {
                "chosen": name == "selected",
                "label": label(name),
                "loss": _number(losses.get(name), 4),
                "accuracy": _percent(mean),
                "between": _between(row, 100, 1),
                "difference": "" if not pair else signed(_times(finite(pair.get("difference")), 100), 1),
                "interval": _between(pair, 100, 1),
                "p": _small(finite(pair.get("p"))),
                "probability": _number(finite(row.get("probability")), 3),
                "reading": str(pair.get("reading") or ""),
                "word": WORDS.get(str(pair.get("reading")), ""),
            }
        )
    rows.sort(key=lambda row: order[str(row["label"])])
    return {
        "label": str(metric.get("label") or metric.get("name")),
        "count": finite(metric.get("rows")),
        "rows": rows,
        "probability": any(row["probability"] for row in rows),
    }


def held_out_accuracies(metrics: object) -> list[dict[str, str]]:
    """Return one line per accuracy of a trained model: what it is, in percent, its interval, and its rows.

    Args:
        metrics: name -> mean, low, high, rows and label, as a training run writes them.
    """
    found = []
    for name, value in mapping(metrics).items():
        one = mapping(value)
        if (mean := finite(one.get("mean"))) is not None:
            label, rows = str(one.get("label") or name), finite(one.get("rows"))
            share = {"label": label, "mean": _percent(mean), "between": _between(one, 100, 1)}
            found.append(share | {"rows": "" if rows is None else f"{rows:.0f}"})
    return found


def beside(audit: Json, kind: str) -> dict[str, str]:
    """Of each accuracy, how the selection did against the arms of a kind: label -> "good", "bad" or "unclear".

    Args:
        audit: the content of audit.json.
        kind: a kind of method (`Method.kind`).
    """
    found = {}
    for metric in listing(audit.get("metrics"))[1:]:
        readings = {
            str(one.get("reading"))
            for one in listing(metric.get("against"))
            if (name := str(one.get("arm"))) and method(name) is not None and known(name).kind == kind
        }
        if readings:
            state = "bad" if "worse" in readings else "good" if readings == {"better"} else "unclear"
            found[str(metric.get("label") or metric.get("name"))] = state
    return found


def sentences(audit: Json) -> list[dict[str, str]]:
    """Return whether another model selected, what disagrees, and whether the ranking held at another learning rate.

    Args:
        audit: the content of audit.json.
    """
    found = []
    for name, good in (("models", ""), ("agreement", "agree"), ("lr_check", "held")):
        part = mapping(audit.get(name))
        if part.get("sentence"):
            found.append({"state": "good" if part.get(good) else "unclear", "text": str(part["sentence"])})
    return found


def oracle_section(audit: Json) -> dict[str, Any] | None:
    """Return the counterfactual checks; None without them.

    Args:
        audit: the content of audit.json.
    """
    oracle = mapping(audit.get("oracle"))
    if not oracle:
        return None
    drops = [
        {
            "label": str(row.get("label")),
            "rows": finite(row.get("rows")),
            "loss": _number(finite(row.get("mean")), 4),
            "difference": signed(finite(row.get("difference"))),
            "interval": _between(row, 1, 4),
        }
        for row in listing(mapping(oracle.get("drop")).get("table"))
    ]
    noise = [
        {
            "label": str(row.get("label") or row.get("method")),
            "auc": _number(finite(row.get("auc")), 3),
            "precision": _percent(finite(row.get("precision"))),
        }
        for row in listing(mapping(oracle.get("noise")).get("table"))
    ]
    exact = [
        {
            "label": str(row.get("label") or row.get("method")),
            "spearman": _number(finite(row.get("spearman")), 3),
            "interval": _between(row, 1, 2),
        }
        for row in listing(mapping(oracle.get("exact")).get("table"))
    ]
    said = [str(mapping(oracle.get(name)).get("sentence") or "") for name in ("drop", "noise", "exact")]
    return {"drops": drops, "noise": noise, "retrained": exact, "sentences": [text for text in said if text]}


def _times(value: float | None, by: float) -> float | None:
    return None if value is None else value * by


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _between(row: Json, by: float, digits: int) -> str:
    low, high = finite(row.get("low")), finite(row.get("high"))
    return "" if low is None or high is None else f"{by * low:.{digits}f} to {by * high:.{digits}f}"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
