"""Parts of the reports of `datatools order` about sources and curricula."""

from __future__ import annotations

import math
from typing import Any

from pipelines.report.order_figures import from_below, heat, labels, strip
from pipelines.texts import number


def plan_view(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the page shows of a plan: the sources in order, their margins, and the orders that were compared.

    Args:
        found: The content of plan.json; None if there is none.
    """
    if found is None:
        return None
    place = {name: i for i, name in enumerate(found["names"])}
    order = [place[name] for name in found["order"]]
    values = [[found["margins"][i][j] for j in order] for i in order]
    names = list(found["order"])
    largest = max((abs(found["scores"][i]) + 2 * (found["errors"][i] or 0.0) for i in order), default=0.0) or 1.0
    return {
        "order": names,
        "sentence": found["sentence"],
        "worth_it": found["worth_it"],
        "mixed": found["proposed"] == "sources mixed",
        "clear_pairs": found["clear"],
        "pairs": found["pairs"],
        "cost": number(found["cost_in_batch_gradients"] / found["retraining_in_batch_gradients"], 3),
        "anchors": len(found["anchors"]),
        "rows": [
            {
                "name": found["names"][i],
                "score": number(found["scores"][i], 2),
                "error": number(found["errors"][i], 1) if found["errors"][i] is not None else "",
                "steps": found["steps"][i],
                "batches": found["replicates"][i],
                **_bar(found["scores"][i], found["errors"][i], largest),
            }
            for i in order
        ],
        "svg": heat(values, "cost of a source before another", names, names, "{} before {}: {}"),
        "largest": number(max(abs(v) for row in values for v in row), 2),
        "columns": labels(names, 6),
        "names": from_below(names, 24),
        "orders": [
            {
                "name": row["name"],
                "sources": ", ".join(row["sources"]) if row["sources"] else "as in the reference run",
                "estimated": number(row["estimated"], 5),
                "true": number(row["true"], 5) if row.get("true") is not None else "",
            }
            for row in found["rows"]
        ],
    }


def _bar(score: float, error: float | None, largest: float) -> dict[str, str]:
    """Return the ends of a bar from zero to a score, and of the interval of two errors, in percent of the width."""
    places = {"from": min(score, 0.0), "to": max(score, 0.0)}
    places |= {"low": score - 2 * (error or 0.0), "high": score + 2 * (error or 0.0)}
    found = {key: 50 + 50 * value / largest for key, value in places.items()}
    return {
        "left": f"{found['from']:.1f}%",
        "width": f"{found['to'] - found['from']:.1f}%",
        "low": f"{found['low']:.1f}%",
        "span": f"{found['high'] - found['low']:.1f}%",
    }


def curricula_view(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the page shows of curricula: the orders from the best, and the proposed one as a strip.

    Args:
        found: The content of curricula.json; None if there is none.
    """
    if found is None:
        return None
    key = found["by"]
    rows = sorted(
        found["rows"], key=lambda row: [math.inf if row.get(k) is None else row[k] for k in (key, "estimated")]
    )
    best = next(row for row in rows if row["name"] == found["proposed"])
    sources = [found["batches"][b]["source"] for b in best["sequence"]]
    names = list(dict.fromkeys(sources))
    values = [row[key] for row in rows if row.get(key) is not None]
    low, high = min(values), max(values)
    return {
        "sentence": found["sentence"],
        "proposed": best["name"],
        "value": number(best.get(key), 5),
        "by": "after real training" if key == "true" else f"by {found['estimator']}",
        "random_mean": number(found["random_mean"], 5) if found["random_mean"] is not None else "",
        "random_best": number(found["random_best"], 5) if found["random_best"] is not None else "",
        "estimator": found["estimator"],
        "trained": key == "true",
        "strip": strip(sources, names),
        "names": [{"name": name, "kind": f"s{i % 8}"} for i, name in enumerate(names)],
        "rows": [
            {
                "name": row["name"],
                "estimated": number(row.get("estimated"), 5),
                "true": number(row["true"], 5) if row.get("true") is not None else "",
                "drawn": row["name"].startswith("random ") or row["name"] == "reference",
                "width": f"{100 * (row[key] - low) / (high - low or 1.0):.1f}%" if row.get(key) is not None else "",
            }
            for row in rows
        ],
    }
