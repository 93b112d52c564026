"""Preparing rows: they are read, checked, encoded and deduplicated. Every pipeline starts here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datatools import DataError, DatatoolsError, files
from pipelines.models.limits import ModelLimits
from pipelines.rows.dedup import dedup
from pipelines.rows.encode import Encoder
from pipelines.rows.formats.table import check_columns
from pipelines.rows.jsonl import Limits
from pipelines.rows.options import Options
from pipelines.rows.read import index_rows
from pipelines.rows.row import BadRow, Refused
from pipelines.rows.rows import Rows
from pipelines.runs.messages import warn
from pipelines.runs.progress import progress
from pipelines.runs.redact import redact
from pipelines.settings.base import Columns
from pipelines.settings.parts import DataConfig, ModelConfig, TargetData

_LEFT_OUT = {
    "reasoning_dropped": "the chat template omits reasoning (often that of all turns except the last)",
    "call_text_dropped": "the chat template omits the text of a turn next to its tool calls",
    "tools_dropped": "the chat template omits the definitions of tools",
    "system_dropped": "the chat template omits the system turn",
    "row_weight_ignored": "a weight of the row (such as the columns weight or train) is ignored",
    "media_dropped": "pictures, sound or video in a column beside the text are ignored",
}
"""Flags of rows that are kept although their tokens omit a part of them -> the text of the warning."""
_OF_TARGET = "Correct them or remove them from the file; target rows are never left out automatically"


def prepare(
    data: DataConfig,
    model: ModelConfig,
    tokenizer: Any,
    *,
    cache: Path,
    label: str,
    folder: Path | None = None,
    limits: ModelLimits = ModelLimits(),
    workers: int = 1,
) -> Rows:
    """Read, encode and deduplicate rows. Bad rows are written to `folder`/bad_rows.jsonl.

    Args:
        data: Where the rows are, and how they are read.
        model: How they are encoded.
        tokenizer: The tokenizer of the model.
        cache: The folder for JSONL copies of inputs and for the tokens of the rows.
        label: The name of the rows in messages.
        folder: The folder for bad_rows.jsonl and quarantine.jsonl; None writes neither.
        limits: The limits of the model. Rows are compared with them here, before anything is computed.
        workers: How many processes read and encode; the result does not depend on it.

    Raises:
        Refused: A row is bad and the policy is "error"; the message names file, line and reason.
        DataError: No row is left.
    """
    quarantine = folder / "quarantine.jsonl" if folder is not None and data.on_bad_row == "quarantine" else None
    policy = data.on_bad_row if quarantine is not None or data.on_bad_row != "quarantine" else "skip"
    detect = isinstance(data, TargetData) and data.borrowed
    encoder = _encoder(model, tokenizer, limits)
    try:
        options = Options(data.source_key, check_columns(data.columns), detect, data.preference, Limits())
        found = index_rows(
            data.paths,
            options,
            on_bad_row=policy,
            cache=cache,
            quarantine=quarantine,
            encoder=encoder,
            label=label,
            progress=lambda lines: progress(f"reading {label}", lines),
            workers=workers,
        )
    except Refused as error:
        if isinstance(data, TargetData):
            raise Refused(error.what, error.rows, _OF_TARGET) from error
        if folder is not None:  # the message shows the first few; the file has all
            _write_bad(folder, error.rows)
        raise
    pool, scanned = found.pool, found.scan
    fatal = [row for row in scanned.bad if row.reason != "too_long" or model.on_long != "skip"]
    if fatal and data.on_bad_row == "error":
        if folder is not None:
            _write_bad(folder, fatal)
        shown = "; ".join(str(row) for row in fatal[:5])
        raise Refused(
            f"{label}: {len(fatal)} of {len(pool)} rows cannot be used: {shown}",
            fatal,
            _OF_TARGET
            if isinstance(data, TargetData)
            else "Correct them, or continue without them: --on-bad-row skip (or quarantine)",
        )
    assert isinstance(encoder, Encoder)
    rows = Rows(pool, scanned, encoder, [*found.bad, *scanned.bad], scanned.status, kept=found.tokens)
    if data.dedup != "none":
        duplicates = dedup(pool, scanned, how=data.dedup, threshold=data.near_threshold)
        rows.twins = duplicates.twins
        rows.status = rows.status.replaced(~duplicates.keep, "duplicate")
    if not rows.usable.any():
        first = f", such as {rows.bad[0]}" if rows.bad else ""
        raise DataError(f"{label}: no usable row in {', '.join(map(str, data.paths))} ({len(rows.bad)} bad{first})")
    _compare(rows, limits, model.max_length, label)
    for flag, what in _LEFT_OUT.items():
        if count := scanned.flags[flag] + pool.flags[flag]:
            warn(f"{label}: in {count} of {len(pool)} rows, {what}; the rest of each row is used")
    if count := pool.flags["unwanted_answer"]:
        warn(
            f"{label}: in {count} of {len(pool)} rows, the column label is false; in unpaired preferences (KTO), it "
            "marks answers that are not wanted. These rows are used like all others; remove them if they are such"
        )
    if rows.bad:
        where = f"; see {folder / 'bad_rows.jsonl'}" if folder is not None else ""
        warn(f"{label}: {len(rows.bad)} bad rows were left out{where}")
    if folder is not None and rows.bad:
        _write_bad(folder, rows.bad)
    if quarantine is not None and scanned.bad:
        there = files.read_bytes(quarantine) if quarantine.exists() else b""
        unencoded = np.flatnonzero(~scanned.ok).tolist()
        files.write_bytes(quarantine, there + b"".join(pool.raw(index) + b"\n" for index in unencoded))
    return rows


def _encoder(model: ModelConfig, tokenizer: Any, limits: ModelLimits) -> Encoder | DatatoolsError:
    """Return the encoder, or why there is none: faults of the rows come first."""
    try:
        return Encoder(tokenizer, chat=model.chat, max_length=model.max_length, on_long=model.on_long, limits=limits)
    except DatatoolsError as error:
        return error


def _compare(rows: Rows, limits: ModelLimits, asked: int | None, label: str) -> None:
    """Warn about rows that were cut to the positions of the model, and about rows beyond its training length."""
    positions = limits.positions
    if positions is None:
        return
    cut = int((rows.scan.cut > 0).sum())
    if cut and asked != rows.encoder.max_length:
        warn(f"{label}: {cut} of {len(rows)} rows were cut to {positions} tokens, the number of positions of the model")
    beyond = int((rows.scan.tokens > positions).sum())
    if beyond:
        warn(
            f"{label}: {beyond} of {len(rows)} rows are longer than the {positions} tokens that the model was trained "
            f"for; --max-length {positions} cuts them"
        )


def _write_bad(folder: Path, bad: Sequence[BadRow]) -> None:
    """Write `bad_rows.jsonl`: file, line, byte offset, reason and detail of each row that cannot be used."""
    names = {name: redact(name) for name in {b.file for b in bad}}  # redaction is slow, and there are few files
    lines = (
        {"file": names[b.file], "line": b.line, "byte_offset": b.byte_offset, "reason": b.reason, "detail": b.detail}
        for b in bad
    )
    files.write_text(folder / "bad_rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def target_data(pool: DataConfig, paths: Sequence[str], columns: Columns | None = None) -> TargetData:
    """Return how target rows are read: like the pool, but with their own columns, and every row must be usable.

    Args:
        pool: How the pool is read.
        paths: Where the target rows are.
        columns: The columns of the target rows; by default those of the pool are tried.
    """
    shared = pool.model_dump(include=set(DataConfig.model_fields))
    mine = {"paths": list(paths), "on_bad_row": "error", "dedup": "none", "borrowed": columns is None}
    return TargetData(**shared | mine | ({} if columns is None else {"columns": columns}))
