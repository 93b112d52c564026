"""What `summary.json` says about a selection; the report is drawn from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datatools import AGGREGATIONS, Selection
from pipelines.rows.row import Row
from pipelines.rows.rows import Rows
from pipelines.runs.provenance import peak_rss_bytes, versions
from pipelines.runs.redact import command_line
from pipelines.select.scored import Context, Scored, subtask_groups
from pipelines.settings.methods import known
from pipelines.settings.select import SelectConfig

SHOWN_CHARACTERS = 600  # of a row's text, in the summary and the report
EXAMPLES = 10  # the number of best and of worst rows in both


def summarise(
    context: Context, scored: Scored, selection: Selection, order: Ranking, before: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of `summary.json` without the digest of the selection.

    Args:
        context: What was scored.
        scored: The scores.
        selection: The selected rows.
        order: The ranks of pool rows.
        before: The estimate of the cost.
    """
    config, current, pool = context.config, context.run, context.pool
    chosen = [int(i) for i in selection.indices]
    target = context.target
    scored_text = dict(scored.formula)
    stages: list[dict[str, Any]] = [dict(stage) for stage in current.stages]
    names, groups = subtask_groups(target) if target is not None else ([], torch.zeros(0, dtype=torch.int64))
    model: dict[str, Any] = {"name": config.model.name}
    if "model" in known(config.method).needs:
        loaded = context.model().model
        model["parameters"] = sum(p.numel() for p in loaded.parameters())
    return {
        "title": " from ".join(_names(paths) for paths in (config.target, config.train.paths) if paths),
        "command": command_line(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": config.method,
        "formula": {
            "name": scored_text.get("name", config.method),
            "text": scored_text.get("text", ""),
            "notes": _notes(config, scored_text),
            **({} if scored.record is None else {"title": scored.record.title, "meaning": scored.record.meaning}),
        },
        **({"race": dict(scored.race)} if scored.race else {}),
        "model": {**model, **scored.coverage},
        "warnings": _warnings(context, scored, chosen),
        "cost": {
            "before": dict(before),
            "after": {
                "rows": int(pool.usable.sum()),
                "tokens": max(0, round(scored.tokens - before.get("given", 0))),
                "seconds": current.seconds,
                "bytes": scored.feature_bytes,
                "peak_rss_bytes": peak_rss_bytes(),
            },
            "stages": stages,
        },
        "pool": {
            "rows": len(pool),
            "tokens": pool.tokens(),
            "supervised_tokens": int(pool.scan.supervised[pool.usable].sum()),
            "files": [{"path": f.path, "rows": f.rows, "bytes": f.bytes, "digest": f.digest} for f in pool.pool.files],
            "bad": _bad_counts(pool),
            "duplicates": len(pool.twins),
            "flags": {flag: pool.scan.flags[flag] for flag in sorted(pool.scan.flags)},
            "cut_tokens": int(pool.scan.cut.sum()),
            "cut_rows": int((pool.scan.cut > 0).sum()),
        },
        "target": None
        if target is None
        else {
            "rows": int(target.usable.sum()),
            "files": [
                {"path": f.path, "rows": f.rows, "bytes": f.bytes, "digest": f.digest} for f in target.pool.files
            ],
            "subtasks": [{"name": name, "rows": int((groups == i).sum())} for i, name in enumerate(names)],
        },
        "budget": {"asked": config.budget, "rows": len(chosen), "tokens": int(pool.scan.tokens[chosen].sum())},
        "sources": _sources(pool, chosen),
        "best": [_example(context, scored, order, i) for i in order.rows[:EXAMPLES].tolist()],
        "worst": [_example(context, scored, order, i) for i in order.rows[::-1][:EXAMPLES].tolist()],
        "checkpoints": scored.checkpoints,
        "seeds": {"seed": config.seed},
        "versions": versions(),
    }


@dataclass(frozen=True)
class Ranking:
    """The ranks of pool rows by score; rows without a score have none.

    Attributes:
        rows: int64 [k], the rows with a score, best first.
        of: int64 [n], the rank of each row, 1 for the best; 0 for rows without a score.
    """

    rows: NDArray[np.int64]
    of: NDArray[np.int64]


def ranking(pool: Rows, scored: Scored) -> Ranking:
    """Return the ranks of all rows; ties are broken by content, then id.

    Args:
        pool: The pool.
        scored: The scores.
    """
    able = pool.usable & scored.scores.isfinite().numpy()
    able[list(scored.status)] = False
    rows = np.flatnonzero(able)
    rows = rows[np.lexsort((pool.rank[rows], -scored.scores.numpy()[rows]))]
    of = np.zeros(len(pool), np.int64)
    of[rows] = np.arange(1, len(rows) + 1)
    return Ranking(rows, of)


def nearest(context: Context, scored: Scored, index: int) -> tuple[Row, float] | None:
    """Return the target row that is most similar to a pool row, and its similarity; None if there is none.

    Args:
        context: What was scored.
        scored: The scores.
        index: The pool row.
    """
    places, similarity = scored.nearest
    if context.target is None or places[index] < 0:
        return None
    return context.target.pool[int(np.flatnonzero(context.target.usable)[places[index]])], float(similarity[index])


def _notes(config: SelectConfig, formula: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know besides the formula."""
    notes = [f"update: {formula['settings']}"] if "settings" in formula else []
    if config.selector not in (None, known(config.method).selector):
        notes.append(f"selector={config.selector}: this took the rows, and not necessarily those with the best scores")
    if AGGREGATIONS[config.aggregate].places and "target" in known(config.method).needs:
        notes.append(f"aggregate={config.aggregate}: the score is a place in an order, 1 for the first, and no cosine")
    return notes


def _names(paths: Sequence[str]) -> str:
    """Return `gsm8k/dev.jsonl, ...`: the last two parts of the first path."""
    shown = "/".join(Path(paths[0]).parts[-2:])
    return shown if len(paths) == 1 else f"{shown} and {len(paths) - 1} more"


def _example(context: Context, scored: Scored, order: Ranking, index: int) -> dict[str, Any]:
    row = context.pool.pool[index]
    near = nearest(context, scored, index)
    return {
        "rank": int(order.of[index]),
        "score": float(scored.scores[index]),
        "source": row.source,
        "id": row.id,
        "where": context.pool.pool.where(index),
        **row.shown(SHOWN_CHARACTERS),
        "nearest": None
        if near is None
        else {
            "id": near[0].id,
            "similarity": near[1],
            **near[0].shown(SHOWN_CHARACTERS),
        },
    }


def _sources(pool: Rows, chosen: Sequence[int]) -> list[dict[str, Any]]:
    all_rows = pool.pool.sources.counts(pool.usable)
    taken = Counter(pool.pool.sources[i] for i in chosen)
    total = sum(all_rows.values())
    return [
        {
            "source": source,
            "pool_rows": count,
            "selected_rows": taken[source],
            "pool_share": count / total,
            "selected_share": taken[source] / max(1, len(chosen)),
        }
        for source, count in sorted(all_rows.items(), key=lambda item: (-item[1], item[0]))
    ]


def _bad_counts(rows: Rows) -> list[dict[str, Any]]:
    first: dict[str, str] = {}
    for bad in rows.bad:
        first.setdefault(bad.reason, f"{bad.file}:{bad.line}")
    counts = Counter(bad.reason for bad in rows.bad)
    return [{"reason": reason, "count": counts[reason], "example": where} for reason, where in sorted(first.items())]


def _warnings(context: Context, scored: Scored, chosen: Sequence[int]) -> list[str]:
    pool, found = context.pool, list(context.run.warnings)
    share = scored.coverage.get("seen_share", 1.0)
    if share < 0.5:
        found.append(
            f"only {share:.1%} of the trainable parameters are seen; features.method=loop sees all of them, slowly"
        )
    texts = Counter(pool.keys[i] for i in chosen)
    repeated = sum(count - 1 for count in texts.values())
    if repeated:
        found.append(f"{repeated} chosen rows repeat the content of another chosen row; --dedup exact leaves them out")
    dead = Counter(scored.status.values())
    found += [f"{count} rows have status {status} and were not scored" for status, count in sorted(dead.items())]
    if pool.scan.flags.get("control_token_in_text"):
        found.append(
            f"{pool.scan.flags['control_token_in_text']} rows hold the template's control tokens in their text"
        )
    return found
