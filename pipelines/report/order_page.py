"""`report.html` of `datatools order`: predictions, true losses, and the proposed order.

It is drawn only from the JSON files of a run folder, so that it can be drawn again; one file, no script, no network.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from datatools import DataError
from datatools.files import sealed
from pipelines.report.order_figures import finite, from_below, heat, labels, scatter, strip
from pipelines.report.order_sections import curricula_view, plan_view
from pipelines.report.page import damaged, page, write_page
from pipelines.texts import minus, number

PARTS = {
    "plan": "plan",
    "curricula": "curricula",
    "validation": "validate",
    "search": "search",
    "estimates": "estimate",
    "map": "map",
}
"""The name of a result -> the task that writes it."""
FEWEST_ORDERS = 10
"""With fewer true runs, a rank correlation is no headline: of 5 orders, one in 60 rankings is perfect by chance."""
_EXAMPLES = 8  # rows that are listed as memorised, and as forgotten
_CELLS = 64  # of a picture of precedence, in a row


def render(folder: Path) -> Path:
    """Draw folder/report.html from the results of its tasks; missing parts are omitted.

    Args:
        folder: The folder of the run.

    Returns:
        The page.

    Raises:
        DataError: A file is damaged.
        EnvironmentProblem: The report cannot be written.
    """
    found = read(folder)
    parts: dict[str, Any] = {}
    precedence = None
    for part, view in VIEWS.items():
        with damaged(folder / f"{part}.json", f"run `datatools order {PARTS[part]}` again to write it"):
            parts[part] = view(found.get(part))
            if precedence is None and part in ("validation", "estimates"):
                precedence = _precedence(found.get(part))
    names = " or ".join(f"{part}.json" for part, shown in parts.items() if shown)
    with damaged(f"{folder}: {names}", "run `datatools order` with its task again to write it"):
        text = page("order.html", **parts, heat=precedence)
    return write_page(folder, text)


def read(folder: Path, *, again: str = "") -> dict[str, dict[str, Any]]:
    """Return the results in a folder, by name, without that of a task that will write it again.

    Args:
        folder: The folder of the run.
        again: The task.

    Raises:
        DataError: A result is damaged.
    """
    found = {}
    for part, task in PARTS.items():
        path = folder / f"{part}.json"
        if task != again and path.is_file():
            try:
                found[part] = sealed.read_json(path)
            except sealed.Damaged as error:
                raise DataError(f"{error}; write it again with `datatools order {task} --out {folder}`") from error
    return found


def _validation(found: dict[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    rows = []
    for name, entry in found["estimators"].items():
        interval = entry["spearman_interval"]
        rows.append(
            {
                "name": name,
                "spearman": number(entry["spearman"], 3),
                "interval": "" if interval is None else minus(f"{interval[0]:.3f} to {interval[1]:.3f}"),
                "hit": number(entry["hit_rate"], 3),
                "regret": number(entry["regret"], 4),
                "mae": number(entry["mae_relative"], 3),
                "conformal": number(entry["conformal"], 4),
                "cost": number(entry["cost_in_batch_gradients"] / found["retraining_in_batch_gradients"], 3),
                "speed": _speed(entry.get("seconds_a_score")),
                "doubts": sum(not ok for ok in entry.get("trusted", [])),
                "of": len(entry.get("trusted", [])),
                "references": ", ".join(number(r["spearman"], 3) for r in entry.get("references", [])),
            }
        )
    best = max(rows, key=lambda row: found["estimators"][row["name"]]["spearman"] or -2.0)
    return {
        "rows": rows,
        "references": any(row["references"] for row in rows),
        "headline": _headline(found["estimators"], best["name"], len(found["orders"])),
        "few": len(found["orders"]) < FEWEST_ORDERS,
        "orders": len(found["orders"]),
        "sentence": found["anything_to_win"]["sentence"],
        "worth_it": found["anything_to_win"]["worth_it"],
        "random_regret": number(next(iter(found["estimators"].values()))["regret_random"], 4),
        "charts": [
            {"name": name, "lost": entry["estimated"].count(None)} | scatter(*finite(entry["estimated"], entry["true"]))
            for name, entry in found["estimators"].items()
            if any(value is not None for value in entry["estimated"])
        ],
    }


def _headline(estimators: dict[str, Any], best: str, orders: int) -> str:
    """Return what the true runs show: a rank correlation only if there are enough runs and its interval excludes 0."""
    if orders < FEWEST_ORDERS:
        return f"{orders} orders are too few to judge how well an estimator ranks them"
    entry = estimators[best]
    if entry["spearman"] is None or entry["spearman_interval"] is None:
        return "No estimator ranks the orders: the estimates do not vary, or are not finite"
    low, high = entry["spearman_interval"]
    figure = minus(f"{number(entry['spearman'], 3)} ({low:.3f} to {high:.3f})")
    among = f", the best of {len(estimators)} estimators" if len(estimators) > 1 else ""
    if low <= 0:
        return f"No estimator reliably ranks the {orders} orders: {best}{among}, has Spearman {figure}"
    return f"{best} ranks {orders} orders with Spearman {figure}{among}"


def _last(estimated: float | None) -> float:
    return math.inf if estimated is None else estimated


def _speed(seconds: float | None) -> str:
    return "" if not seconds else f"{1 / seconds:,.0f}" if seconds < 1 else f"{1 / seconds:.2g}"


def _search(found: dict[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    key = "judged" if found.get("judge") else "estimated"
    rows = sorted(found["rows"], key=lambda row: (_last(row.get(key)), _last(row["estimated"])))
    best = next(row for row in rows if row["name"] == found.get("proposed", "found 1"))
    names = list(dict.fromkeys(found["batches"][b]["source"] for b in best["sequence"]))
    return {
        "rows": [
            {
                "name": r["name"],
                "estimated": number(r["estimated"], 5),
                "judged": number(r.get("judged"), 5),
                "true": number(r["true"], 5),
            }
            for r in rows
        ],
        "proposed": best["name"],
        "nothing": found.get("sentence", "") if found.get("worth_it") is False else "",
        "judge": found.get("judge"),
        "judged": (found.get("judging") or {}).get("orders"),
        "method": found["method"],
        "estimator": found["estimator"],
        "evaluations": found["evaluations"],
        "random_best": number(found["random_best"], 5),
        "estimated": number(best[key], 5),
        "true": number(best["true"], 5) if best["true"] is not None else "",
        "reference": number(next(row for row in rows if row["name"] == "reference")["true"], 5),
        "strip": strip([found["batches"][b]["source"] for b in best["sequence"]], names),
        "names": [{"name": name, "kind": f"s{i % 8}"} for i, name in enumerate(names)],
        "steps": [
            {
                "step": t + 1,
                "batch": b,
                "source": found["batches"][b]["source"],
                "tokens": number(found["batches"][b]["tokens"], 3),
            }
            for t, b in enumerate(best["sequence"])
        ],
        "trust": [{"name": k, "value": number(v, 3)} for k, v in found["trust"].items()],
    }


def _estimates(found: dict[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    names = list(found["estimators"])
    rows = sorted(found["orders"], key=lambda row: _last(row[names[0]]))
    return {"names": names, "rows": [{"name": r["name"], "values": [number(r[n], 5) for n in names]} for r in rows]}


def _map(found: dict[str, Any] | None) -> dict[str, Any] | None:
    if found is None or not found["rows"]:
        return None
    effects = [row["effect"] for row in found["rows"]]
    held = [[value - sum(row["held_out"]) / len(row["held_out"]) for value in row["held_out"]] for row in found["rows"]]
    columns = [f"step {p + 1}" for p in found["rows"][0]["positions"]]
    names = [f"batch {row['batch']}" for row in found["rows"]]
    return {
        "by": found["by"],
        "completions": found["completions"],
        "figures": [
            {
                "name": name,
                "largest": number(max(abs(v) for row in values for v in row), 3),
                "svg": heat(values, f"effect of the position of a batch on {name}", names, columns, "{} at {}: {}"),
            }
            for name, values in (("its own loss", effects), ("the held-out loss", held))
        ],
        "columns": labels(columns, 5),
        "names": from_below(names, 8),
        "rows": [
            {
                "batch": r["batch"],
                "source": r["source"],
                "counterfactual": number(r["counterfactual"], 4),
                "late": number(r["effect"][-1] - r["effect"][0], 4),
            }
            for r in found["rows"]
        ],
        "examples": _examples(found["rows"]),
    }


def _examples(parts: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the rows that were memorised and forgotten most, by id; none for a map of an older version."""
    rows = [row | {"batch": part["batch"]} for part in parts for row in part.get("rows", [])]
    chosen = [sorted(rows, key=lambda row: -row[key])[:_EXAMPLES] for key in ("memorised", "forgotten")]
    shown = sorted({row["id"]: row for row in [*chosen[0], *chosen[1]]}.values(), key=lambda row: -row["memorised"])

    def said(row: dict[str, Any], key: str) -> str:
        error = row[f"{key}_error"]
        return number(row[key], 4) + (f" ± {number(error, 1)}" if error is not None else "")

    return [
        {
            "id": row["id"],
            "batch": str(row["batch"]),
            "memorised": said(row, "memorised"),
            "forgotten": said(row, "forgotten"),
        }
        for row in shown
    ]


def _precedence(found: dict[str, Any] | None) -> dict[str, Any] | None:
    for name, entry in (found or {}).get("estimators", {}).items():
        if entry.get("precedence"):
            matrix = entry["precedence"]
            sources = [batch["source"] for batch in (found or {}).get("batches", [])]
            names = [f"batch {i} ({sources[i]})" if sources else f"batch {i}" for i in range(len(matrix))]
            order = sorted(range(len(matrix)), key=lambda i: sum(matrix[i]))
            ranked = [names[i] for i in order]
            cuts = [len(order) * i // min(len(order), _CELLS) for i in range(min(len(order), _CELLS) + 1)]
            spans = list(pairwise(cuts))  # many batches share rows of the picture, which show their mean
            short = [f"batch {order[lo]}" for lo, _ in spans]
            said = [ranked[lo] + (f" and {hi - lo - 1} more" if hi - lo > 1 else "") for lo, hi in spans]
            costs = np.asarray(matrix)[order][:, order]
            shown = [[float(costs[a:b, c:d].mean()) for c, d in spans] for a, b in spans]
            return {
                "name": name,
                "svg": heat(shown, "cost of a batch before another", said, said, "{} before {}: {}"),
                "first": ranked[: min(3, len(order) // 2)],
                "last": ranked[-min(3, len(order) // 2) :],
                "largest": number(max(abs(v) for row in shown for v in row), 3),
                "columns": labels(short, 6),
                "names": from_below(short, 12),
            }
    return None


VIEWS = {
    "plan": plan_view,
    "curricula": curricula_view,
    "validation": _validation,
    "search": _search,
    "estimates": _estimates,
    "map": _map,
}
"""The name of a result -> the function that returns its part of the page; None if there is none."""
