"""Small charts as inline SVG: only shapes, stretched to any width; all text is HTML.

The letters of a figure that is drawn for a desktop are unreadable on a phone. Here the SVG contains no text, is
stretched (`preserveAspectRatio="none"`), and keeps its stroke widths; axis labels are HTML, positioned by per cent.
Colours are classes of the style sheet, so that light mode, dark mode and print need no second drawing. Text from data
rows enters an SVG only through `Markup.format`, which escapes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipelines.texts import minus, number

WIDTH = 1000.0  # units of every viewBox; a chart fills the available width


@dataclass(frozen=True)
class Scale:
    """Values low..high mapped to 0..WIDTH; values beyond an end are drawn at that end."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        """Return the position of a value, 0..WIDTH.

        Args:
            value: The value.
        """
        if not self.high > self.low:
            return WIDTH / 2
        return WIDTH * min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def percent(self, value: float) -> str:
        """Return the position of a value as a CSS length such as '37.5%'.

        Args:
            value: The value.
        """
        return f"{self(value) / WIDTH * 100:.2f}%"


@dataclass(frozen=True)
class Tick:
    """One label of an axis: its position ('37.5%') and its text; minor labels are omitted on a phone."""

    at: str
    text: str
    minor: bool = False


def nice_step(span: float, count: int) -> float:
    """Return the step 1, 2 or 5 times a power of ten that divides a span into about `count` parts.

    Args:
        span: The span, above 0.
        count: The approximate number of parts.
    """
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    return power * next(step for step in (1.0, 2.0, 5.0, 10.0) if raw <= step * power * (1 + 1e-9))


def ticks(scale: Scale, count: int = 6) -> list[Tick]:
    """Return round values inside a scale, with as many decimals as their step needs.

    Args:
        scale: The scale.
        count: The approximate number of values.
    """
    span = scale.high - scale.low
    if not span > 0:
        return [Tick("50.00%", number(scale.low, 3))]
    step = nice_step(span, count)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    return [
        Tick(scale.percent(i * step), minus(f"{i * step:,.{decimals}f}"), minor=i % 2 == 1)
        for i in range(first, last + 1)
    ]


def _svg(height: float, label: str, *shapes: Markup, kind: str = "") -> Markup:
    head = '<svg class="plot {}" viewBox="0 0 1000 {:g}" preserveAspectRatio="none" style="height:{:g}px" '
    return Markup(head + 'role="img" aria-label="{}">{}</svg>').format(
        kind, height, height, label, Markup("").join(shapes)
    )


def _rect(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        kind, x, y, width, height
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(kind, x1, y1, x2, y2)


def _dot(x: float, y: float, kind: str) -> Markup:
    # a line of length zero with round ends stays a circle when the drawing is stretched
    return Markup('<path class="dot {}" d="M{:.1f} {:.1f}h0"/>').format(kind, x, y)


def histogram(
    edges: Sequence[float],
    rest: Sequence[int],
    chosen: Sequence[int],
    *,
    cut: float | None,
    label: str,
    height: float = 190,
) -> tuple[Markup, list[Tick]]:
    """Return stacked columns: chosen rows at the bottom, the rest above; and the ticks of the counts.

    A column of at least one row is at least 1.5 units high, so that thin tails are visible.

    Args:
        edges: [bins + 1], the edges of the columns.
        rest: [bins], the counts of rows that were not chosen.
        chosen: [bins], the counts of chosen rows.
        cut: The score at which the chosen part begins, or None.
        label: The description for screen readers.
        height: The height of the chart.
    """
    scale = Scale(edges[0], edges[-1])
    top = max(1, max(a + b for a, b in zip(rest, chosen, strict=True)))
    counts = Scale(0, top * 1.04)
    up = [int(i * nice_step(top, 3)) for i in range(1, 5) if nice_step(top, 3) >= 1 and i * nice_step(top, 3) <= top]
    shapes = [
        _line(0, height - height * counts(v) / WIDTH, WIDTH, height - height * counts(v) / WIDTH, "grid") for v in up
    ]
    for i, (a, b) in enumerate(zip(rest, chosen, strict=True)):
        if not a + b:
            continue
        x, width = scale(edges[i]), scale(edges[i + 1]) - scale(edges[i])
        hb = max(1.5, height * counts(b) / WIDTH) if b else 0.0
        ha = max(1.5, height * counts(a) / WIDTH) if a else 0.0
        words = f"{number(edges[i])} to {number(edges[i + 1])}: {a + b:,} rows, {b:,} chosen"
        column = [_rect(x, height - hb - ha, width, ha, "pool")] if a else []
        column += [_rect(x, height - hb, width, hb, "chosen")] if b else []
        shapes.append(Markup("<g><title>{}</title>{}</g>").format(words, Markup("").join(column)))
    if cut is not None:
        shapes.append(_line(scale(cut), 0, scale(cut), height, "cut"))
    return _svg(height, label, *shapes, kind="columns"), [Tick(counts.percent(v), f"{v:,}") for v in up]


def box(
    scale: Scale,
    quantiles: tuple[float, float, float, float, float],
    *,
    cut: float | None,
    label: str,
    height: float = 20,
) -> Markup:
    """Return one box: a line from the 5th to the 95th percentile, a bar between the quartiles, a mark at the median.

    Args:
        scale: The scale.
        quantiles: The five quantiles.
        cut: The score at which the chosen part begins, or None.
        label: The description for screen readers.
        height: The height of the chart.
    """
    p5, q1, median, q3, p95 = (scale(value) for value in quantiles)
    middle = height / 2
    shapes = [
        Markup("<title>{}</title>").format(label),
        _line(p5, middle, p95, middle, "whisker"),
        _rect(q1, middle - 5, max(2.0, q3 - q1), 10, "pool"),
        _line(median, middle - 5, median, middle + 5, "median"),
    ]
    if cut is not None:
        shapes.append(_line(scale(cut), 0, scale(cut), height, "cut"))
    return _svg(height, label, *shapes)


def interval(
    scale: Scale,
    mean: float | None,
    bounds: tuple[float | None, float | None],
    points: Sequence[float],
    *,
    guide: float | None,
    chosen: bool,
    label: str,
    height: float = 44,
) -> Markup:
    """Return one mean with its interval and its single runs.

    Args:
        scale: The scale.
        mean: The mean.
        bounds: The interval.
        points: The single runs.
        guide: The position of a dotted line for comparison, or None.
        chosen: Whether it is the selection.
        label: The description for screen readers.
        height: The height of the chart.
    """
    kind, middle = ("chosen" if chosen else "other"), height / 2
    shapes = [Markup("<title>{}</title>").format(label)]
    if guide is not None:
        shapes.append(_line(scale(guide), 0, scale(guide), height, "guide"))
    low, high = bounds
    if low is not None and high is not None:
        shapes.append(_line(scale(low), middle, scale(high), middle, f"range {kind}"))
    shapes += [_dot(scale(point), middle, f"run {kind}") for point in points[:64]]
    if mean is not None:
        shapes.append(_dot(scale(mean), middle, f"mean {kind}"))
    return _svg(height, label, *shapes)


def pairs(
    names: Sequence[str], pool: Sequence[float], chosen: Sequence[float], *, label: str, height: float = 130
) -> Markup:
    """Return two columns per bin: its share of the pool and its share of the chosen rows.

    Args:
        names: The names of the bins.
        pool: The shares of the pool.
        chosen: The shares of the chosen rows.
        label: The description for screen readers.
        height: The height of the chart.
    """
    top = max([*pool, *chosen, 1e-12]) * 1.04
    slot = WIDTH / max(1, len(names))
    shapes = []
    for i, (name, a, b) in enumerate(zip(names, pool, chosen, strict=True)):
        ha, hb = (max(1.5, height * share / top) if share > 0 else 0.0 for share in (a, b))
        words = f"{name} tokens: {a:.1%} of the pool, {b:.1%} of the chosen rows"
        shapes.append(
            Markup("<g><title>{}</title>{}{}</g>").format(
                words,
                _rect((i + 0.10) * slot, height - ha, 0.4 * slot, ha, "pool"),
                _rect((i + 0.50) * slot, height - hb, 0.4 * slot, hb, "chosen"),
            )
        )
    return _svg(height, label, *shapes, kind="columns")


def lines(
    across: Scale,
    up: Scale,
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    label: str,
    height: float = 150,
) -> tuple[Markup, list[Tick]]:
    """Return lines through points (x, y), and the ticks of the y axis.

    A series of one point is a dot. Points beyond `up` are drawn at its ends.

    Args:
        across: The scale of x.
        up: The scale of y.
        series: (class, points) of each line; the class is `chosen` or `other`.
        label: The description for screen readers.
        height: The height of the chart.
    """
    marks = ticks(up, 3)
    shapes = [_line(0, y, WIDTH, y, "grid") for y in (height * (1 - float(tick.at[:-1]) / 100) for tick in marks)]
    for kind, points in series:
        places = [(across(x), height * (1 - up(y) / WIDTH)) for x, y in points]
        if len(places) == 1:
            shapes.append(_dot(*places[0], f"mean {kind}"))
        elif places:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            shapes.append(Markup('<path class="range {}" d="M{}"/>').format(kind, path))
    return _svg(height, label, *shapes), marks
