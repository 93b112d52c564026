"""The files that a selection writes: the selected rows, two tables and `summary.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datatools import SELECTORS, Selection, files
from pipelines.runs import verdicts
from pipelines.select import mixture, targets
from pipelines.select.columns import score_columns, selected_columns
from pipelines.select.scored import Context, Scored
from pipelines.select.summary import nearest, ranking, summarise
from pipelines.settings import redaction
from pipelines.settings.methods import known

_ROW_GROUP = 1 << 20  # rows


def write(context: Context, scored: Scored, selection: Selection, before: Mapping[str, Any]) -> dict[str, Any]:
    """Write all files of a selection; an audit of the same rows is kept.

    Args:
        context: What was scored.
        scored: The scores.
        selection: The selected rows.
        before: The estimate of the cost.

    Returns:
        The summary.
    """
    current, pool = context.run, context.pool
    chosen = [int(i) for i in selection.indices]
    why = _reasons(context, scored, selection)
    digest = verdicts.digest_of_lines(pool.pool.raw(index) for index in chosen)
    audit = verdicts.kept(current.folder, digest)
    verdicts.set_aside(current.folder, digest)
    with files.atomic_path(current.path(verdicts.SELECTED)) as path, open(path, "wb") as out:
        for index in chosen:
            out.write(pool.pool.raw(index) + b"\n")
    order = ranking(pool, scored)
    parts = (
        score_columns(context, scored, chosen, order, slice(start, start + _ROW_GROUP))
        for start in range(0, len(pool), _ROW_GROUP)
    )
    _write_table(current.path("scores.parquet"), parts)
    _write_table(current.path("selected.parquet"), [selected_columns(context, scored, selection, order, why)])
    current.provenance["selection"] = {
        "method": context.config.method,
        "rows": len(chosen),
        "keys_digest": files.digest("\n".join(pool.keys[i] for i in chosen).encode()),
    }
    summary = summarise(context, scored, selection, order, before)
    weights = mixture.write(current.path(mixture.NAME), context, scored, selection)
    summary |= {"selection": {"digest": digest}, "audit": audit, "mixture": weights}
    summary |= targets.summary(context, selection)
    summary = dict(redaction.hide_all(summary))
    files.write_json(current.path("summary.json"), summary)
    names = ("selected.jsonl", "selected.parquet", "scores.parquet", "summary.json", mixture.NAME)
    current.provenance["outputs"] = {name: files.digest_file(current.path(name)) for name in names}
    return summary


def _reasons(context: Context, scored: Scored, selection: Selection) -> list[str]:
    """Return one sentence per selected row."""
    reasons = []
    record = scored.record or known(context.config.method)
    by_score = SELECTORS[context.config.selector or record.selector].scores
    by_score &= context.config.targets.share == "no"
    for place, index in enumerate(int(i) for i in selection.indices):
        near = nearest(context, scored, index)
        if near is not None and (by_score or selection.why is None):
            reasons.append(f"most similar to target row {near[0].id} ({near[1]:.4f})")
        elif selection.why is not None:
            reasons.append(selection.why[place])
        else:
            reasons.append(f"score {float(scored.scores[index]):.6g}")
    return reasons


def _write_table(path: Path, parts: Iterable[Mapping[str, Any]]) -> None:
    """Write a table, one row group after the other."""
    with files.atomic_path(path) as aside, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for columns in parts:
            table = pa.table(dict(columns))
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(aside, table.schema, compression="zstd"))
            writer.write_table(table)
