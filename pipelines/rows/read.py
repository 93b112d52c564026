"""Reading and checking rows; each has its place in its file and, if it cannot be used, the reason."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from datatools import DataError, UsageError, files
from datatools.files import seals
from pipelines.rows.as_jsonl import as_jsonl
from pipelines.rows.formats.columns import Columns, columns_of
from pipelines.rows.formats.shape import Shape
from pipelines.rows.formats.table import check_columns
from pipelines.rows.index import FileInfo, Options, Pool
from pipelines.rows.input_files import Source, find_sources
from pipelines.rows.jsonl import Limits, Line, Malformed, is_blank, parse_object, read_lines, shown
from pipelines.rows.row import BadRow, Refused

POLICIES = ("error", "skip", "quarantine")


def read_pool(
    paths: Sequence[str | os.PathLike[str]],
    *,
    on_bad_row: str = "error",
    source_key: str = "dataset",
    cache: Path,
    quarantine: Path | None = None,
    columns: Columns | None = None,
    detect: bool = False,
    preference: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> tuple[Pool, list[BadRow]]:
    """Read and check every row of files, folders, and data sets of the hub (`input_files.find_sources`).

    Rows with a repeated id get a new one, unless `on_bad_row` is "error". Blank lines are ignored and counted.

    Args:
        paths: The inputs.
        on_bad_row: "error" refuses the whole input if a row is bad or an id occurs twice. "skip" leaves bad rows out.
            "quarantine" also copies their lines, byte for byte, to the file `quarantine`.
        source_key: The column that names a row's source.
        cache: The folder for JSONL copies of tables.
        quarantine: The file for bad rows.
        columns: Our names (`formats.COLUMNS`) -> the data's, also per file (`formats.Columns`).
        detect: Whether to detect the format of a row that does not have these columns.
        preference: "chosen" reads rows with a chosen and a rejected answer as the chosen one.
        limits: The limits of one input.

    Returns:
        The usable rows, and the bad ones.

    Raises:
        UsageError: The policy is unknown.
        Refused: A row is bad under the policy "error", or no row is usable.
        DataError: A file cannot be read, or there is no row.
        EnvironmentProblem: A data set of the hub cannot be loaded.

    Cost:
        One pass, linear in bytes. Memory: one line, about 40 bytes per row, and the ids.
    """
    if on_bad_row not in POLICIES:
        raise UsageError(f"on_bad_row is {on_bad_row!r}; expected one of {', '.join(POLICIES)}")
    if on_bad_row == "quarantine" and quarantine is None:
        raise UsageError("on_bad_row is 'quarantine', but no quarantine file was named")
    options = Options(source_key, check_columns(columns), detect, preference, limits)
    pool, bad = Pool(options), list[BadRow]()
    ids = _Ids(strict=on_bad_row == "error")
    with ExitStack() as stack:
        rejected: BinaryIO | None = None
        if on_bad_row == "quarantine" and quarantine is not None:
            files.make_folder(Path(quarantine).parent)
            rejected = stack.enter_context(open(stack.enter_context(files.atomic_path(quarantine)), "wb"))
        sources = find_sources(paths)
        if not detect:
            _check_files(options.columns, [source.name for source in sources])
        for source in sources:
            _read_source(source, Path(cache), pool, bad, ids, rejected)
    if on_bad_row == "error" and bad:
        raise _refusal(bad, len(pool) + len(bad))
    if not len(pool):
        raise _refusal(bad, len(bad)) if bad else DataError(f"no row in {', '.join(i.path for i in pool.files)}")
    return pool, bad


def _read_source(
    source: Source, cache: Path, pool: Pool, bad: list[BadRow], ids: "_Ids", rejected: BinaryIO | None
) -> None:
    path, problems = as_jsonl(source, cache, pool._options.limits)
    columns, _ = columns_of(source.name, pool._options.columns)
    pool._paths.append(path)
    pool._names.append(source.name)
    pool._columns.append(columns)
    stem = source.stem
    sources: dict[str, str] = {}  # one object per name
    before, bad_before, blank = len(pool), len(bad), 0
    digest = xxhash.xxh3_128()
    with files.open_file(path, buffering=1 << 20) as file:
        for line in read_lines(file, source.name, pool._options.limits, digest):
            problem = problems.get(line.number)
            if problem is None and line.raw is not None and is_blank(line.raw):
                blank += 1
                continue
            try:
                if problem is not None:
                    raise problem
                value = parse_object(line.raw, pool._options.limits)
                shape = pool._options.read(value, columns)
                name = _source(value, columns, pool._options.source_key)
                own = _own_id(value, columns)
                identity = ids.take(
                    own if own is not None else f"{stem}:{line.number}", own is not None, source.name, line.number
                )
            except Malformed as error:
                bad.append(BadRow(source.name, line.number, line.offset, error.reason, error.detail))
                if rejected is not None and problem is None:
                    _copy_line(file, line, rejected)
                continue
            flags = _row_flags(shape, own, identity, name)
            pool._add(line, identity, sources.setdefault(name or stem, name or stem), flags)
        size = file.tell()
    whole = digest.hexdigest()
    if source.path is not None and path != source.path:  # describe the input, not its copy
        size, whole = source.size_and_digest()
    if source.path is not None:
        seals.check(source.path, seals.Seal(size, whole))
    pool.files.append(FileInfo(source.name, size, whole, len(pool) - before, len(bad) - bad_before, blank))


class _Ids:
    """The ids so far. If strict, a repeated id of a row is Malformed; otherwise it gets `#2`, `#3`, ... appended."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._first: dict[str, tuple[str, int]] = {}
        self._repeats: dict[str, int] = {}

    def take(self, identity: str, own: bool, file: str, line: int) -> str:
        if identity in self._first:
            if own and self._strict:
                where = "{}:{}".format(*self._first[identity])
                raise Malformed("repeated_id", f"id {shown(identity)} is also at {where}")
            count = self._repeats.get(identity, 1) + 1
            while f"{identity}#{count}" in self._first:
                count += 1
            self._repeats[identity] = count
            identity = f"{identity}#{count}"
        self._first[identity] = (file, line)
        return identity


def _check_files(columns: Mapping[str, str | dict[str, str]], names: Sequence[str]) -> None:
    """Refuse columns for a file that is not an input, because of a mistake in its name other columns would be used."""
    unused = {name for name, own in columns.items() if isinstance(own, dict)}
    unused -= {columns_of(name, columns)[1] or "" for name in names}
    if unused:
        known = ", ".join(shown(name, 200) for name in names[:5])
        raise UsageError(
            f"columns: {shown(min(unused), 200)} is not one of the input files ({known}"
            f"{', ...' if len(names) > 5 else ''})"
        )


def _own_id(value: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    found = value.get(columns.get("id", "id"))
    if isinstance(found, str):
        return found if found.strip() else None
    return str(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def _source(value: Mapping[str, Any], columns: Mapping[str, str], source_key: str) -> str | None:
    for key in (columns.get("source"), source_key, "source"):
        found = value.get(key) if key is not None else None
        if isinstance(found, int | float) and not isinstance(found, bool):
            return str(found)
        if isinstance(found, str) and found.strip():
            return found.strip()
    return None


def _row_flags(shape: Shape, own: str | None, identity: str, source: str | None) -> tuple[str, ...]:
    flags = list(shape.flags)
    if own is None:
        flags.append("new_id")
    elif own != identity:
        flags.append("repeated_id")
    if source is None:
        flags.append("source_from_file")
    return tuple(flags)


def _copy_line(file: BinaryIO, line: Line, out: BinaryIO) -> None:
    """Copy the bytes of a line, even if it was too long to keep."""
    if line.raw is not None:
        out.write(line.raw + b"\n")
        return
    offset, end = line.offset, line.offset + line.length
    while offset < end:
        piece = os.pread(file.fileno(), min(1 << 20, end - offset), offset)
        if not piece:
            break
        out.write(piece)
        offset += len(piece)
    out.write(b"\n")


def _refusal(bad: list[BadRow], total: int) -> Refused:
    counts = Counter(row.reason for row in bad)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common(8))
    first = "; ".join(map(str, bad[:5]))
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    return Refused(
        f"{len(bad)} of {total} rows cannot be used ({reasons}): {first}{more}",
        bad,
        "Correct them, or continue without them: --on-bad-row skip (or quarantine, which copies them to a file)",
    )
