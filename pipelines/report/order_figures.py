"""Figures of the reports of `datatools order`: predicted against true losses, matrices, and orders as strips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from pipelines.report.charts import Scale, Tick, ticks
from pipelines.texts import number

_SIDE = 1000.0


def labels(names: Sequence[str], most: int) -> list[Tick]:
    """Return a label at the middle of every part of an axis; if there are many parts, only some have one.

    Args:
        names: The names of the parts.
        most: The largest number of labels.
    """
    every = math.ceil(len(names) / most)
    return [Tick(f"{100 * (i + 0.5) / len(names):.2f}%", name) for i, name in enumerate(names) if i % every == 0]


def from_below(names: Sequence[str], most: int) -> list[Tick]:
    """Return the labels of rows, the first at the top.

    Args:
        names: The names of the rows.
        most: The largest number of labels.
    """
    return [Tick(f"calc(100% - {one.at})", one.text) for one in labels(names, most)]


def scatter(estimated: Sequence[float], true: Sequence[float]) -> dict[str, Any]:
    """Return predicted against true losses, each relative to its mean and on its own scale, with the line of equality.

    Args:
        estimated: The predicted losses.
        true: The true losses.
    """
    means = [math.fsum(values) / len(values) for values in (estimated, true)]
    x, y = ([value - mean for value in values] for values, mean in zip((estimated, true), means, strict=True))
    wide = Scale(*_range(x))
    tall = Scale(*_range(y))
    dot = Markup('<line class="dot" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{1:.1f}"/>')
    dots = Markup("").join(dot.format(wide(a), _SIDE - tall(b)) for a, b in zip(x, y, strict=True))
    low, high = max(wide.low, tall.low), min(wide.high, tall.high)
    same = Markup('<line class="same" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        wide(low), _SIDE - tall(low), wide(high), _SIDE - tall(high)
    )
    svg = _figure(same + dots, "predicted and true losses of the orders", "square")
    return {
        "svg": svg, "x": _few(ticks(wide, 5)), "y": [Tick(t.at, t.text) for t in ticks(tall, 4)],
        "x_mean": number(means[0], 4), "y_mean": number(means[1], 4),
    }  # fmt: skip


def finite(estimated: Sequence[float | None], true: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the orders with a finite estimate.

    Args:
        estimated: The predicted losses; None is not finite.
        true: The true losses.
    """
    kept = [(e, t) for e, t in zip(estimated, true, strict=True) if e is not None]
    return [e for e, _ in kept], [t for _, t in kept]


def _few(labels: list[Tick]) -> list[Tick]:
    """Return at most four labels, for a narrow figure."""
    return labels if len(labels) <= 4 else [label for label in labels if not label.minor]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 1.0
    return low - pad, high + pad


def heat(
    rows: Sequence[Sequence[float]], label: str, names: Sequence[str], columns: Sequence[str], said: str
) -> Markup:
    """Return a matrix as coloured squares: one colour below zero, another above, deeper for larger values.

    Args:
        rows: The matrix.
        label: The description for screen readers.
        names: The names of the rows.
        columns: The names of the columns.
        said: The format of a square's tooltip: row, column, value.
    """
    largest = max((abs(v) for row in rows for v in row if math.isfinite(v)), default=0.0) or 1.0
    high, wide = _SIDE / len(rows), _SIDE / max(map(len, rows))
    cell = Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.2f}">{}</rect>'
    )
    title = Markup("<title>{}</title>")
    cells = Markup("").join(
        cell.format(
            "below" if v < 0 else "above", j * wide, i * high, wide, high, min(1.0, abs(v) / largest),
            title.format(said.format(names[i], columns[j], number(v, 3))),
        )
        for i, row in enumerate(rows)
        for j, v in enumerate(row)
    )  # fmt: skip
    return _figure(cells, label, "heat")


def strip(sources: Sequence[str], names: Sequence[str]) -> Markup:
    """Return the steps of an order from left to right, coloured by source.

    Args:
        sources: The source of each step.
        names: All sources.
    """
    wide = _SIDE / len(sources)
    cells = Markup("").join(
        Markup('<rect class="s{}" x="{:.1f}" y="0" width="{:.1f}" height="1000"/>').format(
            names.index(source) % 8, t * wide, wide
        )
        for t, source in enumerate(sources)
    )
    return _figure(cells, "sources of the proposed order, step by step", "strip")


def _figure(shapes: Markup, label: str, kind: str) -> Markup:
    return Markup(
        '<svg class="order-{}" viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(kind, label, shapes)
