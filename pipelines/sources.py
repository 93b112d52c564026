"""Inputs that are named on the command line, turned into JSONL files on disk.

JSONL is read where it lies. Compressed files, JSON arrays, CSV, Parquet and data sets of the hub are written as JSONL
into a cache folder first; the cache is made anew by every run, so a stale or damaged copy is never read.
"""

import csv
import gzip
import io
import json
import math
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from datatools import DataError, DatatoolsError, EnvironmentProblem, UsageError, files
from pipelines.jsonl import Limits, Malformed, shown

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""File types that are read, each also with .gz (but .parquet, which is compressed inside)."""

_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>.+))?")
_RATIO_FROM = 64 << 20  # bytes out; small files may pack as they like
_BLOCK = 1 << 20

# a JSON text in tokens that matter for finding where an element of an array ends
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]|[^"\[\]{},]++', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Source:
    """One input: `name` as shown, `path` on disk (None: on the hub), `kind` one of `SUFFIXES` (with .gz) or "hub"."""

    name: str
    path: Path | None
    kind: str


def find_sources(paths: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """The files that `paths` name, folders opened (sorted, hidden files left out), in the order given.

    A path that does not exist and looks like `owner/name` is a data set of the hub; `hf:owner/name[/config][@revision]
    [:split]` always is. Raises: UsageError if nothing is named or a file is named twice, DataError if one is missing.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not paths:
        raise UsageError("no data was named; give at least one file, folder or data set")
    found: list[Source] = []
    for given in paths:
        found += _expand(os.fspath(given))
    seen: dict[str, str] = {}
    for source in found:
        key = source.name if source.path is None else os.path.realpath(source.path)
        if key in seen:
            raise UsageError(f"{source.name} is named twice (also as {seen[key]}); every row would be there twice")
        seen[key] = source.name
    return found


def as_jsonl(source: Source, cache: Path, limits: Limits) -> tuple[Path, dict[int, Malformed]]:
    """The JSONL file that holds the rows of `source`, and what is wrong with rows that could not be written to it.

    Row k of the source is line k (1-based) of the file; a row in the second result is a blank line.
    """
    path, kind = source.path, source.kind
    if path is not None and kind.endswith(".gz"):
        kind = kind.removesuffix(".gz")
        path = _unpack(path, _cached(source, cache, kind), limits)
    if kind == ".json" and path is not None and not _is_array(path):
        kind = ".jsonl"  # many .json files hold a row a line
    if kind in {".jsonl", ".ndjson"}:
        assert path is not None
        return path, {}
    out = _cached(source, cache, ".jsonl")
    problems: dict[int, Malformed] = {}
    with files.atomic_path(out, durable=False) as temporary, open(temporary, "wb") as file:
        for number, row in enumerate(_rows(source, path, kind, limits), start=1):
            if isinstance(row, Malformed):
                problems[number] = row
                file.write(b"\n")
            else:
                file.write(row + b"\n")
    return out, problems


def _expand(given: str) -> list[Source]:
    if given.startswith("hf:"):
        return [Source(given, None, "hub")]
    path = Path(given)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        if missing and _HUB.fullmatch(given) and "/" in given and not given.startswith(".") and not _kind(given):
            return [Source(f"hf:{given}", None, "hub")]
        advice = "check the path; a data set of the hub is named hf:owner/name" if missing else "check the path"
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot read {shown(given, 200)}: {reason}; {advice}") from None
    if stat.S_ISDIR(mode):
        inside = [Source(str(file), file, kind) for file in _walk(path) if (kind := _kind(file.name))]
        if not inside:
            raise DataError(f"the folder {given} holds no data file ({', '.join(SUFFIXES)}, also .gz)")
        return inside
    if not stat.S_ISREG(mode):
        raise DataError(f"cannot read {given}: it is not a file")
    return [Source(given, path, _kind(given) or ".jsonl")]


def _walk(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(folder).as_posix())


def _kind(name: str) -> str | None:
    lowered = name.lower()
    return next((s + gz for s in SUFFIXES for gz in ("", ".gz") if lowered.endswith(s + gz)), None)


def _cached(source: Source, cache: Path, suffix: str) -> Path:
    files.make_folder(cache)
    name = source.name if source.path is None else os.path.realpath(source.path)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", os.path.basename(source.name)).strip("-")[:40]
    return Path(cache) / f"{slug}-{files.digest(name.encode('utf-8', 'surrogateescape'))[:16]}{suffix}"


def _unpack(path: Path, out: Path, limits: Limits) -> Path:
    """Decompress a gzip file, watching size and ratio as it goes."""
    with files.atomic_path(out, durable=False) as temporary, open(temporary, "wb") as file:
        with _reading(path) as raw, gzip.GzipFile(fileobj=raw) as unpacked:
            done = 0
            while True:
                try:
                    block = unpacked.read(_BLOCK)
                except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                    raise DataError(f"{path} is damaged after {done} unpacked bytes ({error}); make it again") from None
                if not block:
                    return out
                done += len(block)
                if done > limits.unpacked_bytes:
                    raise DataError(f"{path} unpacks to more than {limits.unpacked_bytes} bytes (limit unpacked_bytes);"
                                    " unpack it yourself if that is right")
                if done > _RATIO_FROM and done > limits.unpacked_ratio * raw.tell():
                    raise DataError(f"{path} unpacks to more than {limits.unpacked_ratio} times its size (limit "
                                    "unpacked_ratio); unpack it yourself if that is right")
                file.write(block)


def _reading(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise files.explain(error, path, "read") from error


def _rows(source: Source, path: Path | None, kind: str, limits: Limits) -> Iterator[bytes | Malformed]:
    if path is None:
        yield from map(_dumps, _from_hub(source.name))
    elif kind == ".parquet":
        yield from map(_dumps, _from_parquet(path, source.name))
    elif kind == ".json":
        with _reading(path) as file:
            yield from _from_array(file, source.name, limits)
    else:
        with io.TextIOWrapper(_reading(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            for row in _from_csv(text, "\t" if kind == ".tsv" else ",", limits):
                yield row if isinstance(row, Malformed) else _dumps(row)


def _from_hub(name: str) -> Iterable[Mapping[str, Any]]:
    match = _HUB.fullmatch(name.removeprefix("hf:"))
    if match is None:
        raise UsageError(f"{shown(name, 200)} is not the name of a data set; expected "
                         "hf:owner/name[/config][@revision][:split]")
    try:
        import datasets

        rows = datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train",
                                     revision=match["revision"])
        if isinstance(rows, Mapping):
            raise UsageError(f"{name}: choose one split, as in hf:{match['name']}:train (there are {', '.join(rows)})")
    except DatatoolsError:
        raise
    except Exception as error:  # whatever the hub, the network or the data set's files do
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"} else ""
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentProblem(f"no file is called {name.removeprefix('hf:')}, and it cannot be loaded from the hub"
                                 f"{offline}: {first}; check the name, the split and the network") from error
    yield from rows


def _from_parquet(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {name} as Parquet: {str(error).splitlines()[0]}") from error


def _from_csv(file: TextIO, delimiter: str, limits: Limits) -> Iterator[Mapping[str, Any] | Malformed]:
    csv.field_size_limit(min(max(csv.field_size_limit(), limits.line_bytes), sys.maxsize))  # one limit for the process
    rows = csv.reader(file, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise DataError(f"the header of the table cannot be read: {error}") from error
            yield Malformed("invalid_csv", f"{error}, near line {rows.line_num} of the file")
            continue
        if header is None:
            if len(set(row)) != len(row) or not row:
                raise DataError(f"the header of the table names a column twice or none at all: {shown(str(row), 120)}")
            header = row
        elif row and len(row) != len(header):
            yield Malformed("invalid_csv", f"{len(row)} fields where the header has {len(header)}, "
                                           f"near line {rows.line_num} of the file")
        elif row:
            yield dict(zip(header, row, strict=True))


def _is_array(path: Path) -> bool:
    with _reading(path) as file:
        head = file.read(4096)
        return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _from_array(file: BinaryIO, name: str, limits: Limits) -> Iterator[bytes | Malformed]:
    """The bytes of each element of a JSON array, on one line; an element is only looked into as far as its brackets.

    A file that is an array of rows is a list of lines with commas between: what is wrong inside an element is found
    by the reader of lines, with its number.
    """
    buffer = file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()
    at = start = 1  # behind the "["
    depth, too_long, more = 0, False, True
    while True:
        match = _TOKEN.match(buffer, at)
        if match is None or match.end() == len(buffer) and more:  # the token may go on
            if more:
                if len(buffer) - at > limits.line_bytes + _BLOCK:
                    raise DataError(f"{name}: a string is longer than {limits.line_bytes} bytes (limit line_bytes); a "
                                    "quotation mark may be missing; write the rows as JSONL, one a line")
                if at - start > limits.line_bytes:
                    too_long, start = True, at
                block = file.read(_BLOCK)
                more = bool(block)
                buffer = buffer[start:] + block
                at, start = at - start, 0
                continue
            rest = buffer[start:].strip()
            yield Malformed("truncated_json", "the file ends inside the array" + (", in this row" if rest else ""))
            return
        at = match.end()
        token = match.group()
        ends = token == b"]"
        if depth == 0 and (token == b"," or ends):
            element = buffer[start:at - 1].strip()
            if b"\n" in element:
                if any(b"\n" in string.group() for string in _STRING.finditer(element)):
                    element = b'"'  # a raw line end inside a string: let the reader of lines refuse it
                element = element.replace(b"\n", b" ")
            if too_long or len(element) > limits.line_bytes:
                yield Malformed("line_too_long", f"more than {limits.line_bytes} bytes (limit line_bytes)")
            elif element or token == b",":
                yield element or Malformed("invalid_json", "nothing between two commas")
            start, too_long = at, False
            if ends:
                if (rest := buffer[at:].strip()) or (rest := file.read(_BLOCK).strip()):
                    yield Malformed("extra_data", f"after the end of the array: {shown(rest[:30].decode('latin-1'))}")
                return
        elif token in (b"[", b"{"):
            depth += 1
        elif token in (b"]", b"}"):
            depth = max(0, depth - 1)


def _dumps(row: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(row), allow_nan=False).encode("ascii")


def _plain(value: Any) -> Any:
    """Table values as JSON: times as ISO text, NaN (a table's missing number) and what JSON cannot hold as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return None

