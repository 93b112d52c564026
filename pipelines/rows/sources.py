"""Inputs that are named on the command line, turned into JSONL files on disk.

JSONL is read where it lies. Compressed files, JSON arrays, CSV, Parquet, Arrow, folders of `save_to_disk` and data sets
of the hub are written as JSONL into a cache folder first; the cache is made anew by every run, so a stale or damaged
copy is never read.
"""

import bz2
import glob
import gzip
import json
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from datatools import DataError, DatatoolsError, EnvironmentProblem, UsageError, files
from pipelines.rows.jsonl import Limits, Malformed, shown
from pipelines.rows.tables import rows_of_arrow, rows_of_csv, rows_of_mappings, rows_of_parquet

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
"""File types that are read."""

PACKED = (".gz", ".zst", ".xz", ".bz2")
"""Compressions that are read, behind a file type (.jsonl.zst)."""

SAVED = ".saved"
"""The kind of a folder that `datasets.Dataset.save_to_disk` wrote."""

_UNREAD = re.compile(
    r"\.(zip|7z|rar|tar|tgz|tar\.\w+|lz4|lzma|br|sz|snappy|z|xlsx?|ods|sqlite3?|db|pkl|pickle|pt|npz|"
    r"npy|h5|hdf5|avro|orc|msgpack|docx?|pdf)$",
    re.IGNORECASE,
)

_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>.+))?")
_BLOCK = 1 << 20
_XZ_MEMORY = 1 << 30  # bytes that unpacking may take; files made by xz -9 take 65 MiB

# a JSON text in tokens that matter for finding where an element of an array ends
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]|[^"\[\]{},]++', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Source:
    """One input: `name` as shown, `path` on disk (None: on the hub), `kind` one of `SUFFIXES` (with one of `PACKED`),
    `SAVED` or "hub".
    """

    name: str
    path: Path | None
    kind: str

    @property
    def stem(self) -> str:
        """The last part of its name without what says its type: what its rows are named after."""
        name = os.path.basename(self.name.rstrip("/"))
        packed = "|".join(re.escape(suffix) for suffix in PACKED)
        return re.sub(rf"(\.[A-Za-z]+)?({packed})?$", "", name) or "data"

    def size(self) -> int:
        """Bytes of the file, or of the files of a folder."""
        assert self.path is not None
        return sum(part.stat().st_size for part in (_saved_files(self.path) if self.kind == SAVED else [self.path]))

    def size_and_digest(self) -> tuple[int, str]:
        """Bytes and xxh3-128 of the file; of a folder, of the digests of its files."""
        assert self.path is not None
        if self.kind != SAVED:
            return self.size(), files.digest_file(self.path)
        digests = " ".join(files.digest_file(part) for part in _saved_files(self.path))
        return self.size(), files.digest(digests.encode())


def find_sources(paths: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """The files that `paths` name, folders and patterns (*.jsonl) opened (sorted, hidden files left out), in order.

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
        if not _is_text(source.name):  # reports, tables of scores and ids of rows name files, and are UTF-8
            raise DataError(f"the name of {shown(source.name, 200)} is not UTF-8; rename it")
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
    packed = next((suffix for suffix in PACKED if kind.endswith(suffix)), None)
    if path is not None and packed:
        kind = kind.removesuffix(packed)
        path = _unpack(path, packed, _cached(source, cache, kind), limits)
    if kind == ".json" and path is not None and not _is_array(path):
        kind = ".jsonl"  # many .json files hold a row a line
    if kind in {".jsonl", ".ndjson"}:
        assert path is not None
        return path, {}
    out = _cached(source, cache, ".jsonl")
    problems: dict[int, Malformed] = {}
    size = None if source.path is None else source.size()
    with files.atomic_path(out, durable=False) as temporary, open(temporary, "wb") as file:
        written = 0
        for number, row in enumerate(_rows(source, path, kind, limits), start=1):
            if isinstance(row, Malformed):
                problems[number] = row
                row = b""
            written += len(row) + 1
            if written > limits.unpacked_bytes:
                raise DataError(
                    f"{source.name} holds more than {limits.unpacked_bytes} bytes as JSONL (limit "
                    "unpacked_bytes); write it as JSONL yourself if that is right"
                )
            if size is not None and written > limits.ratio_from and written > limits.unpacked_ratio * size:
                raise DataError(
                    f"{source.name} holds more than {limits.unpacked_ratio} times its size as JSONL (limit "
                    "unpacked_ratio); write it as JSONL yourself if that is right"
                )
            file.write(row + b"\n")
    return out, problems


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _expand(given: str) -> list[Source]:
    if given.startswith("hf:"):
        return [Source(given, None, "hub")]
    path = Path(given)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        if missing and glob.has_magic(given):
            return _matching(given)
        if missing and _HUB.fullmatch(given) and "/" in given and not given.startswith(".") and not _kind(given):
            return [Source(f"hf:{given}", None, "hub")]
        advice = "check the path; a data set of the hub is named hf:owner/name" if missing else "check the path"
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot read {shown(given, 200)}: {reason}; {advice}") from None
    if stat.S_ISDIR(mode):
        inside = [Source(str(file), file, kind) for file, kind in _walk(path)]
        if not inside:
            raise DataError(f"the folder {given} holds no data file ({_known()})")
        return inside if inside[0].path != path else [Source(given, path, SAVED)]
    if not stat.S_ISREG(mode):
        raise DataError(f"cannot read {given}: it is not a file")
    kind = _kind(given)
    if kind is None and (other := _UNREAD.search(given)):
        raise DataError(
            f"cannot read {shown(given, 200)}: {other.group()} is not read; unpack or convert it ({_known()})"
        )
    return [Source(given, path, kind or ".jsonl")]


def _known() -> str:
    return f"read are {', '.join(SUFFIXES)}, also with {', '.join(PACKED)}"


def _matching(pattern: str) -> list[Source]:
    """The files that a pattern names, as if each were named; those of no known type only where there are no others."""
    found = sorted(glob.glob(pattern, recursive=True))
    named = [name for name in found if os.path.isdir(name) or _kind(name) or _UNREAD.search(name)]
    if not found:
        raise DataError(f"no file matches {shown(pattern, 200)}; check the path")
    if "**" in pattern:
        named = [name for name in named if not os.path.isdir(name)]  # what is in them matches by itself
    return [source for name in named or found for source in _expand(name)]


def _walk(folder: Path) -> list[tuple[Path, str]]:
    """The data files under `folder`, and the folders of `save_to_disk`, with their kinds."""
    found: list[tuple[Path, str]] = []
    for root, folders, names in os.walk(folder):
        here = Path(root)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if "dataset_dict.json" in names:
            splits = sorted(name for name in folders if (here / name / "state.json").is_file())
            if len(splits) != 1:
                raise DataError(
                    f"{here} holds {len(splits)} splits ({', '.join(splits)}); name one, as in "
                    f"{here / (splits[0] if splits else 'train')}"
                )
            found.append((here if here == folder else here / splits[0], SAVED))
            folders.clear()
        elif "state.json" in names and "dataset_info.json" in names:
            found.append((here, SAVED))
            folders.clear()
        else:
            found += [(here / name, kind) for name in names if not name.startswith(".") and (kind := _kind(name))]
    return sorted(
        ((file, kind) for file, kind in found if kind == SAVED or file.is_file()),
        key=lambda item: item[0].relative_to(folder).as_posix(),
    )


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder of `save_to_disk`, in the order of their rows."""
    if (folder / "dataset_dict.json").is_file():
        folder = next(inner.parent for inner in sorted(folder.glob("*/state.json")))
    try:
        state = json.loads(files.read_bytes(folder / "state.json", limit=1 << 20))
        names = [entry["filename"] for entry in state["_data_files"]]
        assert all(isinstance(name, str) and os.path.basename(name) == name for name in names)
    except (DataError, OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise DataError(
            f"{folder}: state.json does not say which files the data set has; save it again (save_to_disk)"
        ) from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{folder}: {missing[0]} is missing; copy the folder again")
    return [folder / name for name in names]


def _kind(name: str) -> str | None:
    lowered = name.lower()
    return next((s + packed for s in SUFFIXES for packed in ("", *PACKED) if lowered.endswith(s + packed)), None)


def _cached(source: Source, cache: Path, suffix: str) -> Path:
    files.make_folder(cache)
    name = source.name if source.path is None else os.path.realpath(source.path)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", os.path.basename(source.name)).strip("-")[:40]
    return Path(cache) / f"{slug}-{files.digest(name.encode('utf-8', 'surrogateescape'))[:16]}{suffix}"


def _unpack(path: Path, how: str, out: Path, limits: Limits) -> Path:
    """Decompress a file, watching size and ratio as it goes."""
    import pyarrow

    damaged = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError, pyarrow.ArrowException)
    with files.atomic_path(out, durable=False) as temporary, open(temporary, "wb") as file, _reading(path) as raw:
        done = 0
        blocks = _unpacked(raw, how)
        while True:
            try:
                block = next(blocks, b"")
            except damaged as error:
                if isinstance(error, OSError) and error.errno:
                    raise files.explain(error, path, "read") from error
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DataError(f"{path} is damaged after {done} unpacked bytes ({first}); make it again") from None
            if not block:
                return out
            done += len(block)
            if done > limits.unpacked_bytes:
                raise DataError(
                    f"{path} unpacks to more than {limits.unpacked_bytes} bytes (limit unpacked_bytes);"
                    " unpack it yourself if that is right"
                )
            if done > limits.ratio_from and done > limits.unpacked_ratio * raw.tell():
                raise DataError(
                    f"{path} unpacks to more than {limits.unpacked_ratio} times its size (limit "
                    "unpacked_ratio); unpack it yourself if that is right"
                )
            file.write(block)


def _unpacked(raw: BinaryIO, how: str) -> Iterator[bytes]:
    """The content of a compressed file in blocks, none of them empty."""
    if how == ".bz2":
        yield from _members(raw, bz2.BZ2Decompressor)
    elif how == ".xz":
        yield from _members(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY))
    else:
        if how == ".gz":
            unpacked: Any = gzip.GzipFile(fileobj=raw)
        else:
            import pyarrow

            unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        while block := unpacked.read(_BLOCK):
            yield block


def _members(raw: BinaryIO, start: Callable[[], Any]) -> Iterator[bytes]:
    """What a bzip2 or xz file holds, which may be several one behind another. Python's own readers of files take what
    cannot be read behind the first for the end of it.
    """
    member, fresh = start(), True
    while block := raw.read(_BLOCK):
        while block:
            if member.eof:
                block = block.lstrip(b"\0")  # xz may be padded
                if not block:
                    break
                member, fresh = start(), True
            if out := member.decompress(block, _BLOCK):
                yield out
            while not member.eof and not member.needs_input:
                if out := member.decompress(b"", _BLOCK):
                    yield out
            fresh = False
            block = member.unused_data if member.eof else b""
    if not member.eof and not fresh:
        raise EOFError("the file ends inside its compressed data")


def _reading(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise files.explain(error, path, "read") from error


def _rows(source: Source, path: Path | None, kind: str, limits: Limits) -> Iterator[bytes | Malformed]:
    if path is None:
        yield from rows_of_mappings(_from_hub(source.name))
    elif kind == ".parquet":
        yield from rows_of_parquet(path, source.name, limits)
    elif kind in (".arrow", ".feather", SAVED):
        for part in _saved_files(path) if kind == SAVED else [path]:
            yield from rows_of_arrow(part, source.name, limits)
    elif kind == ".json":
        with _reading(path) as file:
            yield from _from_array(file, source.name, limits)
    else:
        with _reading(path) as file:
            yield from rows_of_csv(file, "\t" if kind == ".tsv" else ",", limits)


def _from_hub(name: str) -> Iterable[Mapping[str, Any]]:
    match = _HUB.fullmatch(name.removeprefix("hf:"))
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
    except Exception as error:  # whatever the hub, the network or the data set's files do
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"} else ""
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentProblem(
            f"no file is called {name.removeprefix('hf:')}, and it cannot be loaded from the hub"
            f"{offline}: {first}; check the name, the split and the network"
        ) from error
    yield from rows


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
                    raise DataError(
                        f"{name}: a string is longer than {limits.line_bytes} bytes (limit line_bytes); a "
                        "quotation mark may be missing; write the rows as JSONL, one a line"
                    )
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
            element = buffer[start : at - 1].strip()
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
