"""The curves of `compare_coresets`, read at equal time and at equal tokens, and drawn."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from datatools import files, t_interval
from pipelines.report import charts
from pipelines.texts import number
from tests.conftest import REPOSITORY

PLAIN = ("small", "large")
CONTROL = "random"
PAGE = Path(__file__).with_name("compare_coresets.html")
Run = Mapping[str, Any]
LINE = Markup(
    '<polyline points="{}" fill="none" stroke="{}" stroke-width="2" stroke-dasharray="{}" '
    'vector-effect="non-scaling-stroke"/>'
)
DRAWING = Markup(
    '<svg viewBox="0 0 {} 300" preserveAspectRatio="none" width="100%" height="300" role="img" '
    'aria-label="held-out loss against {}">{}</svg>'
)


def loss_of(point: Mapping[str, Any]) -> float:
    """The mean of the sources' losses: each source counts alike."""
    return statistics.fmean(point["sources"].values())


def at(run: Run, axis: str, where: float) -> float:
    """The loss of a run's curve at a place of its axis, by linear interpolation."""
    points = run["curve"]
    return float(np.interp(where, [p[axis] for p in points], [loss_of(p) for p in points]))


def common_end(runs: Sequence[Run], axis: str) -> float:
    """The last place of the axis that every run has reached."""
    return min(float(run["curve"][-1][axis]) for run in runs)


def compared(runs: Sequence[Run], arm: str, other: str, axis: str, where: float) -> tuple[float, Any, Any] | None:
    """(mean, low, high) of the difference of two arms with equal seeds, as a 95 % interval of Student's t."""
    values = {name: {run["seed"]: at(run, axis, where) for run in runs if run["arm"] == name} for name in (arm, other)}
    both = sorted(values[arm].keys() & values[other].keys())
    return t_interval([values[arm][seed] - values[other][seed] for seed in both]) if both else None


def below(found: tuple[float, Any, Any] | None) -> bool:
    """Whether an interval of differences lies below zero."""
    return found is not None and found[2] is not None and found[2] < 0


def rows_of(runs: Sequence[Run], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row an arm: losses at equal time and at equal tokens, against both plain arms and random rows."""
    ends = {axis: common_end(runs, axis) for axis in ("seconds", "tokens")}
    found = []
    for arm, label in labels.items():
        own = [run for run in runs if run["arm"] == arm]
        if not own:
            continue
        row: dict[str, Any] = {"arm": arm, "label": label}
        for axis, end in ends.items():
            row[f"loss_{axis}"] = number(statistics.fmean(at(run, axis, end) for run in own), 4)
        for other in (*PLAIN, CONTROL):
            gap = None if arm == other else compared(runs, arm, other, "seconds", ends["seconds"])
            row[other] = "" if gap is None else number(gap[0]) + (
                f" ({number(gap[1])} to {number(gap[2])})" if gap[1] is not None else ""
            )  # fmt: skip
            row[f"below_{other}"] = below(gap)
        last = [run["curve"][-1] for run in own]
        row["samples"] = number(statistics.fmean(p["rows"] / max(1e-9, p["seconds"]) for p in last))
        row["steps"] = number(statistics.fmean(p["steps"] for p in last))
        for key in ("match_error", "match_error_random", "select_share"):
            known = [run[key] for run in own if run.get(key) is not None]
            row[key] = number(statistics.fmean(known)) if known and arm not in PLAIN else ""
        row["says"] = next((run["says"] for run in own if run.get("says")), "")
        found.append(row)
    return found


def lead(rows: Sequence[Mapping[str, Any]], end: float) -> str:
    """What the comparison shows, in plain words."""
    chosen = [row for row in rows if row["arm"] not in PLAIN]
    both = [row["label"] for row in chosen if all(row[f"below_{plain}"] for plain in PLAIN)]
    beyond = [row["label"] for row in chosen if row["below_random"]]
    if both:
        text = f"After {number(end)} s, below plain training with small and with large batches: {', '.join(both)}"
    else:
        text = (
            f"After {number(end)} s, no choice is below both kinds of plain training with an interval that excludes 0"
        )
    more = f"below random rows with the same quotas: {', '.join(beyond)}" if beyond else (
        "none is below random rows with the same quotas"
    )  # fmt: skip
    return f"{text}; {more}."


def drawing(runs: Sequence[Run], labels: Mapping[str, str], axis: str) -> dict[str, Any]:
    """One line per arm through the means over seeds, as SVG without text, with its ticks."""
    arms = [arm for arm in labels if any(run["arm"] == arm for run in runs)]
    end = common_end(runs, axis)
    grid = [end * i / 40 for i in range(3, 41)]  # the beginning, which all share, would fill the drawing
    lines = {
        arm: [statistics.fmean(at(run, axis, x) for run in runs if run["arm"] == arm) for x in grid] for arm in arms
    }
    values = [y for line in lines.values() for y in line]
    across, up = charts.Scale(0, end), charts.Scale(min(values), max(values))
    shapes, legend = [], []
    for i, arm in enumerate(arms):
        colour = f"hsl({360 * i // len(arms)} 65% 42%)"
        dash = "0" if arm not in (*PLAIN, CONTROL) else "6 4"
        places = [(across(x), 300 * (1 - up(y) / charts.WIDTH)) for x, y in zip(grid, lines[arm], strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shapes.append(LINE.format(path, colour, dash))
        legend.append((labels[arm], colour))
    svg = DRAWING.format(charts.WIDTH, axis, Markup("").join(shapes))
    return {"svg": svg, "ticks": charts.ticks(across), "marks": charts.ticks(up), "legend": legend, "axis": axis}


def report(runs: Sequence[Run], labels: Mapping[str, str], small: frozenset[str], o: argparse.Namespace) -> None:
    """Write report.html and results.json, and print the table."""
    rows, end = rows_of(runs, labels), common_end(runs, "seconds")
    page = Environment(autoescape=True).from_string(PAGE.read_text())
    html = page.render(
        css=Markup((REPOSITORY / "pipelines/report/templates/report.css").read_text()), rows=rows, lead=lead(rows, end),
        charts=[drawing(runs, labels, axis) for axis in ("seconds", "tokens")], small=sorted(small),
        seeds=len({run["seed"] for run in runs}), o=vars(o), model=Path(o.model).name, end=number(end),
        tokens=number(common_end(runs, "tokens")),
    )  # fmt: skip
    files.write_text(o.out / "report.html", html)
    files.write_json(o.out / "results.json", list(runs))
    heads = ("arm", "loss at equal time", "against small", "against large", "against random", "loss at equal tokens",
             "samples/s", "match error", "of random", "choosing")  # fmt: skip
    keys = ("label", "loss_seconds", "small", "large", CONTROL, "loss_tokens", "samples", "match_error",
            "match_error_random", "select_share")  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(str(row[key]) for key in keys)} |")
    print(f"{lead(rows, end)}\nreport: {o.out / 'report.html'}", flush=True)
