"""Reading and checking rows; each has its place in its file and, if it cannot be used, the reason."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from datatools import DataError, DatatoolsError, UsageError, files
from datatools.files import seals
from pipelines.rows.as_jsonl import as_jsonl
from pipelines.rows.encode import Encoder
from pipelines.rows.formats.columns import Columns, columns_of
from pipelines.rows.formats.table import check_columns
from pipelines.rows.gather import Columns as Gathered
from pipelines.rows.index import FileInfo, Pool
from pipelines.rows.input_files import Source, find_sources
from pipelines.rows.job import Job
from pipelines.rows.jsonl import Limits, shown
from pipelines.rows.options import Options
from pipelines.rows.part import Input, Part
from pipelines.rows.ranges import Cut, cut
from pipelines.rows.row import BadRow, Refused
from pipelines.rows.scan import Scan, scan_of
from pipelines.rows.tokens import Tokens
from pipelines.runs.workers import helps

POLICIES = ("error", "skip", "quarantine")


@dataclass(frozen=True)
class Indexed:
    """The rows of some inputs, and what encoding them has shown.

    Attributes:
        pool: The usable rows.
        bad: The rows that could not be read, in order.
        scan: The result of encoding the rows.
        tokens: The tokens that are kept on disk; None without a folder for them.
    """

    pool: Pool
    bad: list[BadRow]
    scan: Scan
    tokens: Tokens | None


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
        One pass, linear in bytes. Memory: one range of a file, and about 100 bytes per row and its id.
    """
    options = Options(source_key, check_columns(columns), detect, preference, limits)
    found = index_rows(paths, options, on_bad_row=on_bad_row, cache=cache, quarantine=quarantine)
    return found.pool, found.bad


def index_rows(
    paths: Sequence[str | os.PathLike[str]],
    options: Options,
    *,
    on_bad_row: str = "error",
    cache: Path,
    quarantine: Path | None = None,
    encoder: Encoder | DatatoolsError | None = None,
    label: str | None = None,
    progress: Callable[[int], AbstractContextManager[Any]] | None = None,
    workers: int = 1,
) -> Indexed:
    """Read, check and encode every row in one pass, part by part; see `read_pool`.

    Args:
        paths: The inputs.
        options: How rows are read.
        on_bad_row: One of `POLICIES`.
        cache: The folder for JSONL copies of tables, and for the index.
        quarantine: The file for bad rows.
        encoder: How rows are encoded; None only reads them. An error is raised if all rows can be read.
        label: The name of the rows; the index of each name is kept in the cache, and used again. None keeps none.
        progress: Makes a bar for a number of lines.
        workers: How many processes read and encode.

    Raises:
        DatatoolsError: As in `read_pool`, and those of the encoder.
    """
    if on_bad_row not in POLICIES:
        raise UsageError(f"on_bad_row is {on_bad_row!r}; expected one of {', '.join(POLICIES)}")
    if on_bad_row == "quarantine" and quarantine is None:
        raise UsageError("on_bad_row is 'quarantine', but no quarantine file was named")
    sources = find_sources(paths)
    if not options.detect:
        _check_files(options.columns, [source.name for source in sources])
    inputs, cuts, infos = [], [], []
    for number, source in enumerate(sources):
        one, pieces, info = _input(source, number, Path(cache), options)
        inputs.append(one)
        cuts.append(pieces)
        infos.append(info)
    folder = None if label is None else Path(cache) / f"index-{re.sub(r'[^A-Za-z0-9]+', '-', label)}"
    job = Job(inputs, [place for pieces in cuts for place in pieces.ranges], options, encoder, folder)
    gathered = Gathered(inputs)
    seen = [_Seen(name=one.name) for one in inputs]
    failure: DatatoolsError | None = encoder if isinstance(encoder, DatatoolsError) else None
    lines = sum(place.lines for place in job.ranges)
    with nullcontext() if progress is None else progress(lines) as bar:
        for place, part in zip(job.ranges, job.all(workers), strict=True):
            gathered.add(place.file, part)
            seen[place.file].add(part)
            failure = failure or part.failure
            if bar is not None:
                bar.advance(place.lines)
    pool = Pool(options, inputs, gathered)
    repeated = pool.ids.make_unique(strict=on_bad_row == "error")
    pool.flags["repeated_id"] += len(repeated)
    if on_bad_row == "quarantine" and quarantine is not None:
        _write_lines(quarantine, [(one.path, entries.copied) for one, entries in zip(inputs, seen, strict=True)])
    if on_bad_row == "error":
        _add_repeated(seen, pool, repeated)
    bad = [row for entries in seen for row in entries.bad]
    for info, entries in zip(infos, seen, strict=True):
        pool.files.append(FileInfo(info.path, info.bytes, info.digest, entries.rows, len(entries.bad), entries.blank))
    if on_bad_row == "error" and bad:
        raise _refusal(bad, len(pool) + len(bad) - len(repeated))
    if not len(pool):
        raise _refusal(bad, len(bad)) if bad else DataError(f"no row in {', '.join(i.path for i in pool.files)}")
    if failure is not None:
        raise failure
    pool.flags = +pool.flags
    scan = scan_of(pool, gathered)
    if folder is None:
        return Indexed(pool, bad, scan, None)
    if not helps():  # a member may have been started with other files, and the leader reads its own
        job.clear()
    for old in Path(cache).glob(f"tokens-{folder.name.removeprefix('index-')}-*.bin"):  # of an older version
        files.remove(old)
    return Indexed(
        pool, bad, scan, Tokens([folder / f"tokens-{name}.arrow" for name in job.names], gathered.sizes, scan)
    )


@dataclass
class _Seen:
    """What the parts of one file have shown besides their rows."""

    name: str
    rows: int = 0
    blank: int = 0

    def __post_init__(self) -> None:
        self.bad: list[BadRow] = []
        self.copied: list[tuple[int, int]] = []
        """Offset and length of the lines that go to the quarantine."""

    def add(self, part: Part) -> None:
        self.rows += len(part.rows)
        self.blank += part.blank
        for line, offset, length, reason, detail, there in part.bad:
            self.bad.append(BadRow(self.name, line, offset, reason, detail))
            if there:
                self.copied.append((offset, length))


def _input(source: Source, number: int, cache: Path, options: Options) -> tuple[Input, Cut, FileInfo]:
    """Return an input as ranges of lines, with its size and digest."""
    path, problems = as_jsonl(source, cache, options.limits)
    columns, _ = columns_of(source.name, options.columns)
    pieces = cut(path, number)
    size, whole = pieces.bytes, pieces.digest
    if source.path is not None and path != source.path:  # describe the input, not its copy
        size, whole = source.size_and_digest()
    if source.path is not None:
        seals.check(source.path, seals.Seal(size, whole))
    return Input(path, source.name, source.stem, columns, problems), pieces, FileInfo(source.name, size, whole, 0)


def _add_repeated(seen: Sequence[_Seen], pool: Pool, repeated: Sequence[tuple[int, int]]) -> None:
    """Make rows whose own id an earlier row has bad rows, each in its place."""
    of_name = {one.name: one for one in seen}
    for row, first in repeated:
        where = f"id {shown(pool.ids[row])} is also at {pool.where(first)}"
        of_name[pool.file(row)].bad.append(pool.bad_row(row, "repeated_id", where))
    for one in seen if repeated else ():
        one.bad.sort(key=lambda bad: bad.line)


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


def _write_lines(path: Path, lines: Sequence[tuple[Path, Sequence[tuple[int, int]]]]) -> None:
    """Copy the bytes of lines into one file, even if they were too long to keep."""
    files.make_folder(path.parent)
    with ExitStack() as stack:
        out = stack.enter_context(open(stack.enter_context(files.atomic_path(path)), "wb"))
        for source, places in lines:
            if not places:
                continue
            with files.open_file(source) as file:
                for offset, length in places:
                    _copy(file, offset, length, out)


def _copy(file: BinaryIO, offset: int, length: int, out: BinaryIO) -> None:
    end = offset + length
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
