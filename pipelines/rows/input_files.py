"""The inputs that the command line names: files, folders, patterns, and data sets of the hub."""

import glob
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from datatools import DataError, UsageError, files
from pipelines.rows.in_memory import PREFIX
from pipelines.rows.jsonl import shown
from pipelines.rows.partitions import Partition, partitions

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
"""The supported file types."""
PACKED = (".gz", ".zst", ".xz", ".bz2")
"""The supported compressions, after a file type (.jsonl.zst)."""
MEMORY = "memory"
"""The kind of rows that a caller holds in memory (`in_memory`)."""
SAVED = ".saved"
"""The kind of a folder written by `datasets.Dataset.save_to_disk`."""
_UNREAD = re.compile(
    r"\.(zip|7z|rar|tar|tgz|tar\.\w+|lz4|lzma|br|sz|snappy|z|xlsx?|ods|sqlite3?|db|pkl|pickle|pt|npz|"
    r"npy|h5|hdf5|avro|orc|msgpack|docx?|pdf)$",
    re.IGNORECASE,
)
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>.+))?")


@dataclass(frozen=True, slots=True)
class Source:
    """One input.

    Attributes:
        name: The name as shown.
        path: The path on disk; None for a data set of the hub.
        kind: One of `SUFFIXES` (perhaps with one of `PACKED`), `SAVED` or "hub".
        partition: The columns that the folders above it name (`lang=en`).
    """

    name: str
    path: Path | None
    kind: str
    partition: Partition = ()

    @property
    def packing(self) -> str | None:
        """The compression, one of `PACKED`; None if there is none."""
        return next((suffix for suffix in PACKED if self.kind.endswith(suffix)), None)

    @property
    def form(self) -> str:
        """The kind without the compression."""
        return self.kind.removesuffix(self.packing or "")

    @property
    def stem(self) -> str:
        """The last part of the name without the file type, from which row ids are made."""
        if self.kind == MEMORY:
            return self.name.removeprefix(PREFIX)
        name = os.path.basename((urlsplit(self.name).path if _URL.match(self.name) else self.name).rstrip("/"))
        packed = "|".join(re.escape(suffix) for suffix in PACKED)
        return re.sub(rf"(\.[A-Za-z]+)?({packed})?$", "", name) or "data"

    def size(self) -> int:
        """Return the bytes of the file, or of the files of a folder."""
        assert self.path is not None
        return sum(part.stat().st_size for part in (saved_files(self.path) if self.kind == SAVED else [self.path]))

    def size_and_digest(self) -> tuple[int, str]:
        """Return the bytes and the xxh3-128 of a file; for a folder, the digest of the digests of its files."""
        assert self.path is not None
        if self.kind != SAVED:
            return self.size(), files.digest_file(self.path)
        digests = " ".join(files.digest_file(part) for part in saved_files(self.path))
        return self.size(), files.digest(digests.encode())


def find_sources(paths: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Return the inputs that paths name, with folders and patterns (*.jsonl) expanded and sorted, without hidden files.

    A path that does not exist and looks like `owner/name` is a data set of the hub. A name like
    `hf:owner/name[/config][@revision][:split]` always is.

    Args:
        paths: The names.

    Returns:
        The inputs, in order.

    Raises:
        UsageError: No input is named, or a file is named twice.
        DataError: A file is missing.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not paths:
        raise UsageError("no data was named; give at least one file, folder or data set")
    found: list[Source] = []
    for given in paths:
        found += _with_partitions(_expand(os.fspath(given)), os.fspath(given))
    seen: dict[str, str] = {}
    for source in found:
        if not _is_text(source.name):  # reports, tables and row ids name files in UTF-8
            raise DataError(f"the name of {shown(source.name, 200)} is not UTF-8; rename it")
        key = source.name if source.path is None else os.path.realpath(source.path)
        if key in seen:
            raise UsageError(f"{source.name} is named twice (also as {seen[key]}); every row would occur twice")
        seen[key] = source.name
    return found


def _with_partitions(sources: list[Source], given: str) -> list[Source]:
    """Return the inputs that one name stands for with the columns that their folders name."""
    paths = [source.path for source in sources if source.path is not None]
    if not any("=" in str(path.parent) for path in paths):
        return sources
    top = Path(given)
    while glob.has_magic(str(top)) and not top.exists():
        top = top.parent
    found = partitions(paths, top)
    return [replace(source, partition=columns) for source, columns in zip(sources, found, strict=True)]


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _expand(given: str) -> list[Source]:
    if given.startswith("hf:") and not given.startswith("hf://"):
        return [Source(given, None, "hub")]
    if given.startswith(PREFIX):
        return [Source(given, None, MEMORY)]
    if _URL.match(given):
        return _remote(given)
    path = Path(given)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        if missing and glob.has_magic(given):
            return _matching(given)
        if missing and HUB.fullmatch(given) and "/" in given and not given.startswith(".") and not _kind(given):
            return [Source(f"hf:{given}", None, "hub")]
        advice = "check the path; a data set of the hub is named hf:owner/name" if missing else "check the path"
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot read {shown(given, 200)}: {reason}; {advice}") from None
    if stat.S_ISDIR(mode):
        inside = [Source(str(file), file, kind) for file, kind in _walk(path)]
        if not inside:
            raise DataError(f"the folder {given} contains no data file ({_known()})")
        return inside if inside[0].path != path else [Source(given, path, SAVED)]
    if not stat.S_ISREG(mode):
        raise DataError(f"cannot read {given}: it is not a file")
    kind = _kind(given)
    if kind is None and (other := _UNREAD.search(given)):
        raise DataError(
            f"cannot read {shown(given, 200)}: {other.group()} is not supported; unpack or convert it ({_known()})"
        )
    return [Source(given, path, kind or ".jsonl")]


def _remote(given: str) -> list[Source]:
    """Return the files that a URL names, copied to this machine."""
    hub = re.match(r"(?:hf://|https?://huggingface\.co/)datasets/([\w.-]+/[\w.-]+)", given)
    if hub is not None:
        raise UsageError(f"{shown(given, 200)}: a URL; this data set of the hub is named hf:{hub[1]}")
    if given.startswith("file://"):
        raise UsageError(f"{shown(given, 200)}: a URL; give the path itself")
    from pipelines.rows.remote import copies

    copied = copies(given, lambda name: _kind(name) is not None)
    found = [(name, path, _kind(urlsplit(name).path)) for name, path in copied]
    for name, _, kind in found:
        if kind is None and (other := _UNREAD.search(urlsplit(name).path)):
            raise DataError(
                f"cannot read {shown(name, 200)}: {other.group()} is not supported; unpack or convert it ({_known()})"
            )
    return [Source(name, path, kind or ".jsonl") for name, path, kind in found]


def _known() -> str:
    return f"supported are {', '.join(SUFFIXES)}, also with {', '.join(PACKED)}"


def _matching(pattern: str) -> list[Source]:
    """Return the files that match a pattern; files of unknown type only if there are no others."""
    found = sorted(glob.glob(pattern, recursive=True))
    named = [name for name in found if os.path.isdir(name) or _kind(name) or _UNREAD.search(name)]
    if not found:
        raise DataError(f"no file matches {shown(pattern, 200)}; check the path")
    if "**" in pattern:
        named = [name for name in named if not os.path.isdir(name)]  # their files match by themselves
    return [source for name in named or found for source in _expand(name)]


def _walk(folder: Path) -> list[tuple[Path, str]]:
    """Return the data files in `folder` and the folders of `save_to_disk`, with their kinds.

    Links to folders are followed; a folder that several ways lead to is visited once.

    Raises:
        DataError: A folder contains several splits, or a link to a file that is missing.
    """
    found: list[tuple[Path, str]] = []
    top = os.path.realpath(folder)
    seen = {top}
    for name, folders, names in os.walk(folder, followlinks=True):
        here = Path(name)
        folders[:] = _unseen(here, folders, seen, top)
        if "dataset_dict.json" in names:
            splits = sorted(name for name in folders if (here / name / "state.json").is_file())
            if len(splits) != 1:
                raise DataError(
                    f"{here} contains {len(splits)} splits ({', '.join(splits)}); name one, as in "
                    f"{here / (splits[0] if splits else 'train')}"
                )
            found.append((here if here == folder else here / splits[0], SAVED))
            folders.clear()
        elif "state.json" in names and "dataset_info.json" in names:
            found.append((here, SAVED))
            folders.clear()
        else:
            found += [(here / name, kind) for name in names if not name.startswith(".") and (kind := _kind(name))]
    if lost := next((file for file, _ in found if file.is_symlink() and not file.exists()), None):
        raise DataError(
            f"{lost} is a link to {os.readlink(lost)}, which is missing; restore that file, or remove the link"
        )
    return sorted(
        ((file, kind) for file, kind in found if kind == SAVED or file.is_file()),
        key=lambda item: item[0].relative_to(folder).as_posix(),
    )


def _unseen(here: Path, names: list[str], seen: set[str], top: str) -> list[str]:
    """Return the folders in `here` that no other way has led to, which are added to `seen`; links come last.

    A link to a folder that contains `top`, the real path of the folder that is searched, is left out.
    """
    found = []
    for name in sorted(names, key=lambda name: ((here / name).is_symlink(), name)):
        real = os.path.realpath(here / name)
        if not name.startswith(".") and real not in seen and os.path.commonpath([real, top]) != real:
            seen.add(real)
            found.append(name)
    return found


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a folder of `save_to_disk`, in the order of their rows.

    Args:
        folder: The folder.

    Raises:
        DataError: The folder is incomplete or damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        folder = next(inner.parent for inner in sorted(folder.glob("*/state.json")))
    try:
        state = json.loads(files.read_bytes(folder / "state.json", limit=1 << 20))
        names = [entry["filename"] for entry in state["_data_files"]]
        assert all(isinstance(name, str) and os.path.basename(name) == name for name in names)
    except (DataError, OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise DataError(
            f"{folder}: state.json does not list the files of the data set; save it again (save_to_disk)"
        ) from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{folder}: {missing[0]} is missing; copy the folder again")
    return [folder / name for name in names]


def _kind(name: str) -> str | None:
    lowered = name.lower()
    return next((s + packed for s in SUFFIXES for packed in ("", *PACKED) if lowered.endswith(s + packed)), None)
