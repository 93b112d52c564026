"""`report.html` of a selection: `summary.json` and `scores.parquet` as the text and charts of each section.

Except inside charts, no text is escaped here; the template escapes everything it prints. Parts that a method does not
have are None. Every field of the summary may be absent or null.
"""

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from datatools import spearman
from pipelines.report.audit_section import arms, audit_section, trust
from pipelines.report.page import SHOWN_EXAMPLES, damaged, page, write_page
from pipelines.report.race_section import race_section
from pipelines.report.scores_section import Scores, distribution, lengths, read_scores
from pipelines.report.summary import cost_section, examples_of, method_of, model_section, sources_section, warnings_of
from pipelines.report.values import Json, finite, listing, mapping, read_summary, share_of
from pipelines.runs import verdicts
from pipelines.texts import count, number, percent, plural, size

MAX_SUBTASKS = 60
STATUS = {
    "ok": "eligible",
    "duplicate": "copy of another row",
    "empty": "gradient is zero",
    "nonfinite": "loss or gradient not finite",
    "bad": "unusable",
    "too_long": "too long",
    "no_supervised_token": "no supervised token left",
}


def render(folder: Path) -> Path:
    """Draw folder/report.html from folder/summary.json and folder/scores.parquet.

    The page is one file without script or network, in light and dark mode. Equal inputs give equal bytes. Parts that a
    method does not have (scores of a random draw, a missing audit) are omitted.

    Args:
        folder: The folder of the run.

    Returns:
        The page.

    Raises:
        DataError: A file is missing, damaged or without a required column.
        EnvironmentProblem: The report cannot be written.
    """
    folder = Path(folder)
    summary = read_summary(folder / "summary.json")
    scores = read_scores(folder / "scores.parquet")
    with damaged(folder / "summary.json", "run the same command again to write it"):
        parts = build(verdicts.checked(folder, summary), scores)
        text = page("report.html", **parts, shown=SHOWN_EXAMPLES)
    return write_page(folder, text)


def build(summary: Json, scores: Scores) -> dict[str, Any]:
    """Return everything that the template prints.

    Args:
        summary: The content of summary.json.
        scores: The scores.
    """
    scored = scores.scored
    rho = None
    if scored.sum() > 2:
        rho = spearman(scores.score[scored], scores.supervised[scored].astype(np.float64))
    method, meaning = method_of(summary)
    formula = mapping(summary.get("formula"))
    table = arms(mapping(summary.get("audit")), str(summary.get("method")))
    best, worst = examples_of(summary.get("best")), examples_of(summary.get("worst"))
    view: dict[str, Any] = {
        "title": str(summary.get("title") or "Selection"),
        "created": _date(str(summary.get("created") or "")),
        "method": method,
        "meaning": meaning or str(formula.get("text") or ""),
        "formula": {
            "name": str(formula.get("name") or "") if formula.get("name") != summary.get("method") else "",
            "text": str(formula.get("text") or ""),
            "notes": [str(note) for note in formula.get("notes") or []],
        },
        "model": model_section(summary),
        "warnings": warnings_of(summary, table, rho),
        "chosen": _chosen(summary, scores),
        "trust": trust(summary, table),
        "audit": audit_section(summary, table),
        "race": race_section(summary),
        "cost": cost_section(summary),
        "distribution": distribution(scores),
        "lengths": lengths(scores, rho),
        "sources": sources_section(summary),
        "examples": [(name, rows) for name, rows in (("Best rows", best), ("Worst rows", worst)) if rows],
        "target": _target(summary, scores),
        "quality": _quality(summary, scores),
        "provenance": _provenance(summary),
    }
    sections = (
        ("audit", "Audit"),
        ("race", "Race"),
        ("cost", "Cost"),
        ("distribution", "Scores"),
        ("lengths", "Length"),
        ("sources", "Sources"),
        ("target", "Target"),
        ("examples", "Rows"),
        ("quality", "Data"),
        ("provenance", "Provenance"),
    )
    view["nav"] = [(key, word) for key, word in sections if view[key]]
    return view


def _date(iso: str) -> str:
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = " UTC" if when.tzinfo is not None and not when.utcoffset() else ""
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def _chosen(summary: Json, scores: Scores) -> dict[str, Any]:
    pool, budget = mapping(summary.get("pool")), mapping(summary.get("budget"))
    rows, of = int(scores.selected.sum()), finite(pool.get("rows")) or len(scores.selected)
    tokens = int(scores.tokens[scores.selected].sum())
    all_tokens = finite(pool.get("tokens")) or int(scores.tokens.sum())
    share = share_of(rows, of)
    return {
        "rows": rows,
        "of": int(of),
        "share": share,
        "width": f"{max(0.4, 100 * (share or 0)):.2f}%",
        "tokens": tokens,
        "token_share": share_of(tokens, all_tokens),
        "asked": budget.get("asked"),
    }


def _target(summary: Json, scores: Scores) -> dict[str, Any] | None:
    target = mapping(summary.get("target"))
    serves = dict(scores.serves)
    names = {*serves, *(str(item.get("name")) for item in listing(target.get("subtasks")))}
    if not names or not sum(serves.values()):
        return None
    top = max(serves.values())
    rows: list[dict[str, Any]] = [
        {"name": name, "chosen": serves.get(name, 0), "width": f"{100 * serves.get(name, 0) / top:.2f}%"}
        for name in sorted(names, key=lambda name: (-serves.get(name, 0), name))
    ]
    unserved = [row["name"] for row in rows if not row["chosen"]]
    served = [row for row in rows if row["chosen"]]
    if len(rows) == 1:
        lead = f"The target is one task, {rows[0]['name']}; all chosen rows serve it."
    elif unserved:
        are = "is" if len(unserved) == 1 else "are"
        lead = f"{len(unserved)} of the {len(rows)} subtasks {are} served by no chosen row."
    else:
        most, least = rows[0], rows[-1]
        lead = (
            f"Each of the {len(rows)} subtasks has rows chosen for it: most {most['name']} ({count(most['chosen'])}), "
            f"fewest {least['name']} ({count(least['chosen'])})."
        )
    return {
        "rows": served[:MAX_SUBTASKS],
        "more": len(served[MAX_SUBTASKS:]),
        "unserved": unserved,
        "lead": lead,
        "subtasks": len(rows),
        "total": finite(target.get("rows")),
    }


def _quality(summary: Json, scores: Scores) -> dict[str, Any]:
    pool = mapping(summary.get("pool"))
    bad = [
        (str(item.get("reason")), finite(item.get("count")) or 0.0, str(item.get("example") or ""))
        for item in listing(pool.get("bad"))
    ]
    duplicates, cut_rows, cut_tokens = (
        finite(pool.get(key)) or 0.0 for key in ("duplicates", "cut_rows", "cut_tokens")
    )
    unread = sum(n for _, n, _ in bad)
    left_out = [(STATUS.get(name, name), n) for name, n in scores.status if name != "ok"]
    parts = []
    if unread:
        parts.append(f"{plural(unread, 'row')} could not be used")
    if duplicates:
        parts.append(f"{plural(duplicates, 'row')} {'repeats' if duplicates == 1 else 'repeat'} another")
    if cut_rows:
        parts.append(f"{plural(cut_rows, 'row')} lost {plural(cut_tokens, 'token')} to the length limit")
    lead = "; ".join(parts) + "." if parts else "No row was unreadable, none repeated another, and none was cut."
    total = len(scores.selected)
    steps = [("rows read", total), ("eligible", int(scores.eligible.sum())), ("chosen", int(scores.selected.sum()))]
    return {
        "lead": lead,
        "bad": sorted(bad, key=lambda item: (-item[1], item[0])),
        "left_out": left_out,
        "steps": [{"name": name, "rows": n, "width": f"{max(0.4, 100 * n / max(1, total)):.2f}%"} for name, n in steps],
    }


def _provenance(summary: Json) -> dict[str, Any]:
    found = [
        {
            "role": role,
            "path": str(item.get("path")),
            "rows": count(finite(item.get("rows"))),
            "bytes": size(finite(item.get("bytes"))),
            "digest": str(item.get("digest") or ""),
        }
        for role in ("pool", "target")
        for item in listing(mapping(summary.get(role)).get("files"))
    ]
    weights = [finite(item.get("weight")) for item in listing(summary.get("checkpoints"))]
    total = sum(weight for weight in weights if weight is not None and weight > 0)
    checkpoints = [
        {
            "path": str(item.get("path")),
            "step": count(finite(item.get("step"))),
            "lr": number(finite(item.get("mean_lr"))),
            "weight": percent(share_of(weight, total)),
        }
        for item, weight in zip(listing(summary.get("checkpoints")), weights, strict=True)
    ]
    seeds, versions = (
        [(str(key), str(value)) for key, value in mapping(summary.get(name)).items()] for name in ("seeds", "versions")
    )
    verb = re.match(r"datatools ([a-z][a-z-]*)( |$)", str(summary.get("command") or ""))
    return {
        "files": found,
        "checkpoints": checkpoints,
        "seeds": seeds,
        "versions": versions,
        "command": str(summary.get("command") or ""),
        "repeat": f"datatools {verb[1] if verb else 'select'} DIR/run.yaml",
    }
