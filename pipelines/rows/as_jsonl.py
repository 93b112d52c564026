"""Inputs of every kind as JSONL files on disk.

JSONL files are read in place, unless their folders name columns (`partitions`). Compressed files, JSON arrays, CSV,
Parquet, Arrow, folders of `save_to_disk` and data sets of the hub are first written as JSONL into a cache folder. Every
run writes this cache again, so that an outdated or damaged copy is never read.
"""

import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from datatools import DataError, DatatoolsError, EnvironmentProblem, UsageError, files
from pipelines.rows import in_memory
from pipelines.rows.input_files import HUB, MEMORY, SAVED, Source, saved_files
from pipelines.rows.json_array import is_array, rows_of_array
from pipelines.rows.jsonl import Limits, Malformed, is_blank, read_lines, refuse_other_kinds, shown
from pipelines.rows.partitions import with_partition
from pipelines.rows.tables.arrow import columns_of_arrow, columns_of_parquet, rows_of_arrow, rows_of_parquet
from pipelines.rows.tables.csv import rows_of_csv
from pipelines.rows.tables.values import rows_of_mappings
from pipelines.rows.unpacked import reading, unpacked

TABLES = (".parquet", ".arrow", ".feather", SAVED)
"""Forms that list their columns in a schema, apart from the rows."""


def as_jsonl(source: Source, cache: Path, limits: Limits) -> tuple[Path, dict[int, Malformed]]:
    """Return the JSONL file with the rows of an input, and the rows that could not be written to it.

    Args:
        source: The input.
        cache: The folder for the copy, if one is needed.
        limits: The limits of one input.

    Returns:
        The file, in which row k of the input is line k (counted from 1), and a mapping from such lines to what is
        wrong with the row. The line of a row that could not be written is blank.

    Raises:
        DataError: The input cannot be read, or it exceeds a limit.
        EnvironmentProblem: A data set of the hub cannot be loaded.
    """
    path, kind = source.path, source.form
    if path is not None and source.packing:
        path = _unpack(path, source.packing, _cached(source, cache, kind), limits)
    if kind == ".json" and path is not None and not is_array(path):
        kind = ".jsonl"  # many .json files hold one row per line
    if kind in {".jsonl", ".ndjson"} and not source.partition:
        assert path is not None
        return path, {}
    out = _cached(source, cache, ".jsonl")
    if kind == MEMORY and in_memory.lent(source.name) is None:
        if not out.is_file():
            raise DataError(
                f"{source.name}: these rows were in the memory of the program that made the run, and are not here; "
                "make it again from there, or give files"
            )
        return out, {}
    problems: dict[int, Malformed] = {}
    size = None if source.path is None else source.size()
    with files.atomic_path(out, durable=False) as temporary, open(temporary, "wb") as file:
        written = 0
        rows = _rows(source, path, kind, limits)
        if source.partition:
            rows = with_partition(rows, source.partition, limits)
        for number, row in enumerate(rows, start=1):
            if isinstance(row, Malformed):
                problems[number] = row
                row = b""
            written += len(row) + 1
            if written > limits.unpacked_bytes:
                raise DataError(
                    f"{source.name} contains more than {limits.unpacked_bytes} bytes as JSONL (limit "
                    "unpacked_bytes); if the size is right, write the rows as JSONL yourself"
                )
            if size is not None and written > limits.ratio_from and written > limits.unpacked_ratio * size:
                raise DataError(
                    f"{source.name} contains more than {limits.unpacked_ratio} times its size as JSONL (limit "
                    "unpacked_ratio); if the size is right, write the rows as JSONL yourself"
                )
            file.write(row + b"\n")
    return out, problems


def _cached(source: Source, cache: Path, suffix: str) -> Path:
    files.make_folder(cache)
    name = source.name if source.path is None else os.path.realpath(source.path)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", os.path.basename(source.name)).strip("-")[:40]
    return Path(cache) / f"{slug}-{files.digest(name.encode('utf-8', 'surrogateescape'))[:16]}{suffix}"


def _unpack(path: Path, how: str, out: Path, limits: Limits) -> Path:
    """Decompress a file and check its size and ratio during decompression."""
    import pyarrow

    damaged = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError, pyarrow.ArrowException)
    with files.atomic_path(out, durable=False) as temporary, open(temporary, "wb") as file, reading(path) as raw:
        done = 0
        blocks = unpacked(raw, how)
        while True:
            try:
                block = next(blocks, b"")
            except damaged as error:
                if isinstance(error, OSError) and error.errno:
                    raise files.explain(error, path, "read") from error
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DataError(f"{path} is damaged after {done} unpacked bytes ({first}); create it again") from None
            if not block:
                return out
            done += len(block)
            if done > limits.unpacked_bytes:
                raise DataError(
                    f"{path} unpacks to more than {limits.unpacked_bytes} bytes (limit unpacked_bytes);"
                    " if the size is right, unpack it yourself"
                )
            if done > limits.ratio_from and done > limits.unpacked_ratio * raw.tell():
                raise DataError(
                    f"{path} unpacks to more than {limits.unpacked_ratio} times its size (limit "
                    "unpacked_ratio); if the size is right, unpack it yourself"
                )
            file.write(block)


def _rows(source: Source, path: Path | None, kind: str, limits: Limits) -> Iterator[bytes | Malformed]:
    if kind == MEMORY:
        yield from rows_of_mappings(in_memory.lent(source.name) or ())
    elif path is None:
        yield from rows_of_mappings(_from_hub(source.name))
    elif kind == ".parquet":
        yield from rows_of_parquet(path, source.name, limits)
    elif kind in (".arrow", ".feather", SAVED):
        for part in saved_files(path) if kind == SAVED else [path]:
            yield from rows_of_arrow(part, source.name, limits)
    elif kind in (".jsonl", ".ndjson"):  # blank lines, too, so that numbers of lines stay
        with reading(path) as file:
            for line in read_lines(file, source.name, limits):
                yield _too_long(limits) if line.raw is None else b"" if is_blank(line.raw) else line.raw
    else:
        with reading(path) as file:
            yield from rows_of_stream(file, kind, source.name, limits)


def columns_of_table(source: Source) -> list[str]:
    """Return the columns in the schema of a table.

    Args:
        source: An input whose form is one of `TABLES`.

    Raises:
        DataError: The schema cannot be read.
    """
    assert source.path is not None
    if source.form == ".parquet":
        return columns_of_parquet(source.path, source.name)
    parts = saved_files(source.path) if source.form == SAVED else [source.path]
    if not parts:
        raise DataError(f"{source.name} contains no data file")
    return columns_of_arrow(parts[0], source.name)


def rows_of_stream(file: BinaryIO, form: str, name: str, limits: Limits) -> Iterator[bytes | Malformed]:
    """Yield the rows of an unpacked file as lines of JSON.

    Args:
        file: The file, or its beginning.
        form: .csv, .tsv, .json (one array), or .jsonl.
        name: The name of the file, for messages.
        limits: The limits of one row.

    Raises:
        DataError: The file has another form than its name says, or its header cannot be read.
    """
    if form in (".csv", ".tsv"):
        if file.seekable():
            refuse_other_kinds(file.read(8), name)
            file.seek(0)
        yield from rows_of_csv(file, "\t" if form == ".tsv" else ",", limits)
    elif form == ".json":
        yield from rows_of_array(file, name, limits)
    else:
        for line in read_lines(file, name, limits):
            if line.raw is None:
                yield _too_long(limits)
            elif not is_blank(line.raw):
                yield line.raw


def _too_long(limits: Limits) -> Malformed:
    return Malformed("line_too_long", f"more than {limits.line_bytes} bytes (limit line_bytes)")


def _from_hub(name: str) -> Iterable[Mapping[str, Any]]:
    match = HUB.fullmatch(name.removeprefix("hf:"))
    if match is None:
        raise UsageError(
            f"{shown(name, 200)} is not the name of a data set; expected hf:owner/name[/config][@revision][:split]"
        )
    try:
        import datasets

        rows = datasets.load_dataset(
            match["name"], match["config"], split=match["split"] or "train", revision=match["revision"]
        )
        if isinstance(rows, Mapping):
            raise UsageError(f"{name}: choose one split, as in hf:{match['name']}:train (there are {', '.join(rows)})")
    except DatatoolsError:
        raise
    except Exception as error:  # any error of the hub, the network or the data set's files
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"} else ""
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentProblem(
            f"no file is called {name.removeprefix('hf:')}, and it cannot be loaded from the hub"
            f"{offline}: {first}; check the name, the split and the network"
        ) from error
    yield from rows
