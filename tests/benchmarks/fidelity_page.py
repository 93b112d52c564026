"""The table and the picture of `fidelity`: the score against forward passes and against bytes, with Pareto fronts."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datatools import files

STYLE = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;border-bottom:1px solid #8886;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}.front td{font-weight:bold}svg{max-width:100%;height:auto}
"""
DRAWN = (
    "<style>svg{font:12px system-ui,sans-serif}text{fill:#444}.axis{stroke:#999}.dot{fill:#8a94a6}.best{fill:#0f766e}"
    ".front{fill:none;stroke:#0f766e;stroke-width:2}@media(prefers-color-scheme:dark){text{fill:#ccc}}</style>"
)
AXES = {"passes": "forward passes of the row", "bytes": "bytes per row"}
HEAD = ("features", "score", "95 % interval", "agreement", "best tenth", "passes", "bytes")
Row = Mapping[str, Any]


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table."""
    low, high = row["interval"]
    return (
        str(row["name"]), f"{row['score']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['agreement']:.3f}",
        f"{row['top']:.2f}", f"{row['passes']:.1f}", f"{row['bytes']:,}",
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown; names of arms on a front are bold."""
    lines = [f"| {' | '.join(HEAD)} |", f"| --- |{' ---: |' * (len(HEAD) - 1)}"]
    for row in sorted(rows, key=lambda one: -float(one["score"])):
        name, *rest = cells(row)
        shown = f"**{name}**" if any(row[f"best_by_{axis}"] for axis in AXES) else name
        lines.append(f"| {' | '.join([shown, *rest])} |")
    return "\n".join(lines)


def panel(rows: Sequence[Row], axis: str, left: float) -> str:
    """The score of each arm against one kind of cost, on a logarithmic scale, with the front and its names."""
    costs = [math.log(max(0.1, float(row[axis]))) for row in rows]
    scores = [float(row["score"]) for row in rows]
    low, high, bottom, top = min(costs), max(costs), min(0.0, *scores), max(scores)

    def place(cost: float, score: float) -> tuple[float, float]:
        return left + 20 + 380 * (cost - low) / ((high - low) or 1), 300 - 260 * (score - bottom) / (
            (top - bottom) or 1
        )

    parts = [f'<path class="axis" d="M{left + 10} 310H{left + 410}M{left + 10} 310V30" fill="none"/>']
    for cost in (low, (low + high) / 2, high):
        value = math.exp(cost)
        shown, x = f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}", place(cost, 0)[0]
        parts.append(f'<text x="{x:.0f}" y="326" text-anchor="middle">{shown}</text>')
    parts += [
        f'<text x="{left + 6}" y="{place(low, value)[1] + 4:.0f}" text-anchor="end">{value:.2f}</text>'
        for value in (bottom, (bottom + top) / 2, top)
    ]
    parts.append(f'<text x="{left + 210}" y="346" text-anchor="middle">{AXES[axis]}</text>')
    best = sorted((i for i, row in enumerate(rows) if row[f"best_by_{axis}"]), key=lambda i: costs[i])
    line = "L".join("{:.1f} {:.1f}".format(*place(costs[i], scores[i])) for i in best)
    parts.append(f'<path class="front" d="M{line}"/>')
    for i, row in enumerate(rows):
        x, y = place(costs[i], scores[i])
        kind = "best" if i in best else "dot"
        title = html.escape(f"{row['name']}: {scores[i]:.3f}")
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>')
    for number, i in enumerate(best, 1):
        x, y = place(costs[i], scores[i])
        parts.append(f'<text x="{x - 3:.1f}" y="{y - 8:.1f}">{number}</text>')
        parts.append(
            f'<text x="{left + 10}" y="{358 + 16 * number}">{number} {html.escape(str(rows[i]["name"]))}</text>'
        )
    return "".join(parts)


def picture(rows: Sequence[Row]) -> str:
    """Both panels as one SVG."""
    count = max(sum(bool(row[f"best_by_{axis}"]) for row in rows) for axis in AXES)
    height = 380 + 16 * count
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}" width="900" height="{height}" role="img">'
        f"<title>Linear datamodelling score against cost</title>{DRAWN}"
        f'<text x="40" y="18">score; the line is the front that nothing beats</text>'
        f"{panel(rows, 'passes', 30)}{panel(rows, 'bytes', 480)}</svg>"
    )


def write(out: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write report.html, the picture and the table in Markdown."""
    drawn = picture(rows)
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    body = "".join(
        f"<tr{' class=front' if any(row[f'best_by_{axis}'] for axis in AXES) else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>"
        for row in sorted(rows, key=lambda one: -float(one["score"]))
    )  # fmt: skip
    text = (
        f"{facts['model']} ({facts['parameters']:,} parameters), {facts['pool']} rows of the pool, {facts['targets']} "
        f"target rows, {facts['subsets']} random halves, {facts['epochs']} epoch(s) of AdamW at {facts['lr']:g}, "
        f"{facts['checkpoints']} checkpoints of a run on the whole pool. Bold: nothing is cheaper and better."
    )
    files.write_text(out / "report.html", (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Fidelity of features</title><style>{STYLE}</style>"
        "<h1>Which cheaper features say what training does?</h1>"
        f'<p>{html.escape(text)}</p><div class="wide">{drawn}</div>'
        f'<div class="wide"><table><tr>{head}</tr>{body}</table></div></html>'
    ))  # fmt: skip
    files.write_text(out / "fidelity.svg", drawn)
    files.write_text(out / "fidelity.md", table(rows) + "\n")
    print(f"report: {out / 'report.html'}", flush=True)
