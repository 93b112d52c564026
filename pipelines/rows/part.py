"""One part of the row index: a byte range of an input file, parsed, checked, keyed and encoded, as Arrow columns.

A part depends on the bytes of its range, its place in the file, and how rows are read and encoded. It is committed when
its rows file gets its name: `tokens-ID.arrow` is written first, then `rows-ID.arrow`, which ends with its own digest.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from datatools import DataError, DatatoolsError, files
from pipelines.rows.chat.refusals import RowError
from pipelines.rows.encode import Encoder
from pipelines.rows.encoded import IGNORED, Encoded
from pipelines.rows.jsonl import Malformed, is_blank, parse_object, read_lines
from pipelines.rows.normal import content_of, opening_of
from pipelines.rows.options import Options, own_id, source_of, subtask_of
from pipelines.rows.ranges import Range
from pipelines.rows.row import Row

ROWS = pa.schema(
    [
        ("line", pa.int64()),
        ("offset", pa.int64()),
        ("length", pa.uint32()),
        ("digest", pa.uint64()),  # the xxh3-64 of the line
        ("id", pa.string()),  # null where the row has none
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("subtask", pa.string()),
        ("content", pa.binary(16)),  # `normal.content_of`
        ("opening", pa.uint64()),
        ("ok", pa.bool_()),  # whether it has tokens; then key and counts are those of them
        ("key", pa.binary(16)),
        ("tokens", pa.int32()),
        ("supervised", pa.int32()),
        ("cut", pa.int32()),
        ("reason", pa.string()),  # why it has none
        ("detail", pa.string()),
    ]
)
TOKENS = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss", pa.list_(pa.uint8()))])
"""The tokens of the rows, and for each 1 if it has loss, else 0; a row without tokens has empty lists."""
ONE_RUN = {"template_too_slow", "template_too_large"}
"""Reasons that depend on the machine: such a part is for this run only, and the next run makes it again."""
_NO_KEY = bytes(16)
_TOGETHER = 64  # rows whose templates are rendered together


@dataclass(frozen=True, slots=True)
class Input:
    """One input file, as its ranges are read.

    Attributes:
        path: The file with the lines: the input itself, or its JSONL copy.
        name: The input, as it was named.
        stem: From which the ids of rows without one are made, and the source of rows without one.
        columns: Our names of columns -> the data's.
        problems: Line -> what is wrong with a row that could not be copied.
    """

    path: Path
    name: str
    stem: str
    columns: dict[str, str]
    problems: Mapping[int, Malformed] = field(default_factory=dict)


@dataclass
class Part:
    """The rows of one range.

    Attributes:
        rows: The columns of `ROWS`, one entry per row that was read.
        tokens: The columns of `TOKENS`; None without an encoder.
        bad: [line, offset, length, reason, detail, whether its line is in the file] of rows that could not be read.
        blank: The number of blank lines.
        flags: The number of rows with each flag of `Shape`, and new_id and source_from_file.
        encoded: The number of rows with each flag of `Encoded`.
        failure: Why no row could be encoded from some row on; such a part is never written.
    """

    rows: pa.RecordBatch
    tokens: pa.RecordBatch | None
    bad: list[list[Any]] = field(default_factory=list)
    blank: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    encoded: Counter[str] = field(default_factory=Counter)
    failure: DatatoolsError | None = None


def read_part(of: Input, place: Range, options: Options, encoder: Encoder | DatatoolsError | None) -> Part:
    """Parse, check, key and encode the rows of one range.

    Args:
        of: The input file.
        place: The range.
        options: How rows are read.
        encoder: How they are encoded; None only reads them; an error is why they cannot be encoded.

    Raises:
        DataError: The file cannot be read, or has changed since it was cut.
    """
    failure = encoder if isinstance(encoder, DatatoolsError) else None
    encode = encoder if isinstance(encoder, Encoder) else None
    made, waiting = _Builder(), list[Row]()
    digest = xxhash.xxh3_64()
    with files.open_file(of.path, buffering=1 << 20) as file:
        file.seek(place.start)
        lines = read_lines(
            file, of.name, options.limits, digest, start=place.start, end=place.end, number=place.line
        )  # fmt: skip
        for line in lines:
            problem = of.problems.get(line.number)
            if problem is None and line.raw is not None and is_blank(line.raw):
                made.blank += 1
                continue
            try:
                if problem is not None:
                    raise problem
                value = parse_object(line.raw, options.limits)
                shape = options.read(value, of.columns)
            except Malformed as error:
                there = problem is None
                made.bad.append([line.number, line.offset, line.length, error.reason, error.detail, there])
                continue
            assert line.raw is not None
            own, source = own_id(value, of.columns), source_of(value, of.columns, options.source_key)
            row = Row(
                own if own is not None else f"{of.stem}:{line.number}",
                source or of.stem,
                of.name,
                line.number,
                line.raw,
                shape.messages,
                shape.text,
                subtask_of(value, of.columns),
                shape.prompt,
                shape.completion,
                shape.masked,
                shape.flags,
                shape.tools,
                shape.settings,
            )
            made.flags.update(shape.flags)
            made.flags.update({"new_id": own is None, "source_from_file": source is None})
            made.add(row, own, line.offset, line.length)
            waiting.append(row)
            if len(waiting) == _TOGETHER:
                failure = made.encode(waiting, encode if failure is None else None) or failure
    failure = made.encode(waiting, encode if failure is None else None) or failure
    if digest.intdigest() != place.digest:
        raise DataError(f"{of.name} has changed while it was read; do not edit data during a run; start again")
    return made.part(encoder is not None, failure)


class _Builder:
    """The columns of a part while they grow."""

    def __init__(self) -> None:
        self.bad: list[list[Any]] = []
        self.blank = 0
        self.flags: Counter[str] = Counter()
        self.encoded: Counter[str] = Counter()
        self._columns: dict[str, Any] = {name: [] for name in ROWS.names}
        for name, kind in (("line", "q"), ("offset", "q"), ("length", "I"), ("digest", "Q"), ("opening", "Q"),
                           ("tokens", "i"), ("supervised", "i"), ("cut", "i"), ("source", "i")):  # fmt: skip
            self._columns[name] = array(kind)
        self._columns["content"], self._columns["key"] = bytearray(), bytearray()
        self._sources: dict[str, int] = {}
        self._ids, self._loss, self._ends = bytearray(), bytearray(), array("i", [0])

    def add(self, row: Row, own: str | None, offset: int, length: int) -> None:
        columns = self._columns
        columns["line"].append(row.line)
        columns["offset"].append(offset)
        columns["length"].append(length)
        columns["digest"].append(xxhash.xxh3_64_intdigest(row.raw))
        columns["id"].append(own)
        columns["source"].append(self._sources.setdefault(row.source, len(self._sources)))
        columns["subtask"].append(row.subtask)
        columns["content"] += content_of(row)
        columns["opening"].append(opening_of(row))

    def encode(self, rows: list[Row], encoder: Encoder | None) -> DatatoolsError | None:
        """Add the tokens of rows and clear their list; returns why the others cannot be encoded, if so.

        The input is read to its end all the same, because its own faults come first.
        """
        failure: DatatoolsError | None = None
        if encoder is not None:
            try:
                encoder.ahead(rows)
            except DatatoolsError as error:
                failure = error
        for row in rows:
            try:
                self.add_tokens(None if encoder is None or failure is not None else encoder(row))
            except RowError as error:
                self.add_tokens(None, error.reason, error.detail)
            except DatatoolsError as error:
                failure = error
                self.add_tokens(None)
        rows.clear()
        return failure

    def add_tokens(self, encoded: Encoded | None, reason: str | None = None, detail: str | None = None) -> None:
        columns = self._columns
        columns["ok"].append(encoded is not None)
        columns["reason"].append(reason)
        columns["detail"].append(detail)
        counts = (0, 0, 0)
        key = _NO_KEY
        if encoded is not None:
            counts = len(encoded.input_ids), encoded.supervised, encoded.cut
            ids, labels = np.asarray(encoded.input_ids, "<i4"), np.asarray(encoded.labels, "<i4")
            key = xxhash.xxh3_128_digest(ids.tobytes() + labels.tobytes())  # `Encoded.key`
            self._ids += ids.tobytes()
            self._loss += (labels != IGNORED).tobytes()
            self.encoded.update(encoded.flags)
        self._ends.append(len(self._loss))
        columns["key"] += key
        for name, count in zip(("tokens", "supervised", "cut"), counts, strict=True):
            columns[name].append(count)

    def part(self, with_tokens: bool, failure: DatatoolsError | None) -> Part:
        n = len(self._columns["line"])

        def made(name: str, kind: pa.DataType) -> pa.Array:
            values = self._columns[name]
            if name == "source":
                codes = pa.Array.from_buffers(pa.int32(), n, [None, pa.py_buffer(values)])
                return pa.DictionaryArray.from_arrays(codes, pa.array(list(self._sources), pa.string()))
            if isinstance(values, list):
                return pa.array(values, kind)
            return pa.Array.from_buffers(kind, n, [None, pa.py_buffer(values)])

        rows = pa.RecordBatch.from_arrays([made(one.name, one.type) for one in ROWS], schema=ROWS)
        tokens = None
        if with_tokens:
            ends, count = pa.py_buffer(self._ends), len(self._loss)
            flat = [pa.Array.from_buffers(kind, count, [None, pa.py_buffer(values)])
                    for kind, values in ((pa.int32(), self._ids), (pa.uint8(), self._loss))]  # fmt: skip
            lists = [pa.Array.from_buffers(one.type, n, [None, ends], children=[values])
                     for one, values in zip(TOKENS, flat, strict=True)]  # fmt: skip
            tokens = pa.RecordBatch.from_arrays(lists, schema=TOKENS)
        self.flags, self.encoded = +self.flags, +self.encoded  # without zeros
        return Part(rows, tokens, self.bad, self.blank, self.flags, self.encoded, failure)


def write(part: Part, folder: Path, name: str) -> None:
    """Write a part, so that `read` finds it.

    Args:
        part: The part, without a failure.
        folder: The folder of the index.
        name: The identity of the part.

    Raises:
        EnvironmentProblem: The file system reports an error, such as a full disk.
    """
    assert part.tokens is not None and part.failure is None
    size = _write(folder / f"tokens-{name}.arrow", part.tokens)
    facts = {"bad": part.bad, "blank": part.blank, "flags": dict(part.flags), "encoded": dict(part.encoded),
             "token_bytes": size}  # fmt: skip
    rows = part.rows.replace_schema_metadata({"part": json.dumps(facts, sort_keys=True)})
    _write(folder / f"rows-{name}.arrow", rows, sealed=True)


def _write(path: Path, batch: pa.RecordBatch, sealed: bool = False) -> int:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    data = memoryview(sink.getvalue())
    with files.atomic_path(path, durable=False) as aside, open(aside, "wb") as file:
        file.write(data)
        if sealed:
            file.write(xxhash.xxh3_128_digest(data))
    return len(data)


def read(folder: Path, name: str, *, fresh: bool = False) -> Part | None:
    """Return a part without its tokens; None if it is missing or damaged, or if it is of another run only.

    Args:
        folder: The folder of the index.
        name: The identity of the part.
        fresh: Whether this run wrote it.
    """
    try:
        data = (folder / f"rows-{name}.arrow").read_bytes()
    except OSError:
        return None
    body = memoryview(data)[:-16]
    if len(data) < 16 or xxhash.xxh3_128_digest(body) != data[-16:]:
        return None
    with pa.ipc.open_stream(pa.py_buffer(body)) as stream:
        facts = json.loads(stream.schema.metadata[b"part"])
        rows = stream.read_next_batch()
    try:
        size = (folder / f"tokens-{name}.arrow").stat().st_size
    except OSError:
        return None
    if size != facts["token_bytes"]:
        return None
    if not fresh and not ONE_RUN.isdisjoint(rows.column("reason").unique().to_pylist()):
        return None
    flags, encoded = Counter(facts["flags"]), Counter(facts["encoded"])
    return Part(rows, None, facts["bad"], facts["blank"], flags, encoded)


@dataclass(frozen=True, slots=True)
class TokenFile:
    """Where the tokens of a part are in its file: the offsets of the ends of rows, of the ids and of the loss."""

    path: Path
    ends: int
    ids: int
    loss: int

    @classmethod
    def of(cls, path: Path) -> TokenFile | None:
        """Return where the tokens are; None if the file is missing or damaged.

        Args:
            path: The file.
        """
        try:
            with pa.memory_map(str(path)) as whole:
                base = whole.read_buffer().address
                whole.seek(0)
                with pa.ipc.open_stream(whole) as stream:
                    batch = stream.read_next_batch()
                if batch.schema != TOKENS:
                    return None
                ids, loss = batch.columns
                places = ids.buffers()[1], ids.values.buffers()[1], loss.values.buffers()[1]
                ends, first, second = (0 if buffer is None else buffer.address - base for buffer in places)
        except (OSError, pa.ArrowException, StopIteration):
            return None
        return cls(path, ends, first, second)

    def row(self, index: int, count: int) -> tuple[bytes, bytes]:
        """Return the ids (int32) and the loss (one byte each) of a row; less if the file is damaged.

        Args:
            index: The number of the row in the part.
            count: The number of its tokens.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:  # not mapped: a file that is cut would end the process
                start = int.from_bytes(os.pread(file.fileno(), 4, self.ends + 4 * index), "little")
                ids = os.pread(file.fileno(), 4 * count, self.ids + 4 * start)
                return ids, os.pread(file.fileno(), count, self.loss + start)
        except OSError:
            return b"", b""
