"""Duplicate rows: which rows to leave out, and which kept row each of them repeats."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from datatools import UsageError
from datatools.compact import Keys
from pipelines.rows.index import Pool
from pipelines.rows.normal import beginning_of_test, beginnings_of_other
from pipelines.rows.row import Row
from pipelines.rows.scan import Scan

HOW = ("none", "exact", "near")

_SHINGLE = 5  # characters
_PERMUTATIONS = 128
_ANSWER_PERMUTATIONS = 64
_SEED = 1
_CHECKED = 16  # candidates compared in full; they are ordered by estimate, whose standard error is 0.04
_SLACK = 0.15  # candidates whose estimate is that far below the threshold are skipped
_CHUNK = 4096  # shingles hashed at once; limits memory for long rows


class Progress(Protocol):
    """An object that shows the progress of a job."""

    def advance(self, n: int = 1, /) -> object:
        """Count more rows as finished.

        Args:
            n: The number of rows.
        """


class Duplicates(NamedTuple):
    """The result of `dedup`.

    Attributes:
        keep: bool [n], the rows to keep.
        twins: A row that is left out -> the kept row that it repeats.
    """

    keep: NDArray[np.bool_]
    twins: dict[int, int]


def dedup(
    pool: Pool, scan: Scan, how: str = "none", threshold: float = 0.8, progress: Progress | None = None
) -> Duplicates:
    """Find the rows to keep, and for each row that is left out the kept row that it repeats.

    "exact": The turns are equal after Unicode normalisation (NFKC) and with each run of white space as one space;
    letter case matters. Rows with the same tokens and labels are equal too (they differ only after the cut).

    "near": In addition, rows are duplicates if they share at least `threshold` of their 5-character pieces (Jaccard
    similarity of the texts without white space and letter case), both in the row as a whole and in its answer. One
    question with two answers is therefore no duplicate. Candidates come from seeded MinHash and locality-sensitive
    hashing, and each candidate is then compared exactly, so that no row is dropped because of an estimate. A pair at
    the threshold is missed in at most 5 % of cases, and closer pairs less often.

    Among rows that repeat each other, the one with the smallest (key, source, id) is kept, so that the order of rows
    and files does not change the choice. File and line decide only if keys and ids are equal. Rows that could not be
    encoded (`scan.ok`) are neither dropped nor the twin of another row.

    Args:
        pool: The rows.
        scan: The result of encoding them.
        how: One of `HOW`.
        threshold: The shared part of two rows from which they are near-duplicates.
        progress: Advanced by one per row.

    Raises:
        UsageError: `how` is unknown, or the threshold is not between 0.2 and 1.

    Cost:
        Linear. "near" takes about 4 kB of memory per row and half a millisecond for a row of 400 characters.

    Source:
        Broder 1997 (MinHash); the package datasketch.
    """
    if how not in HOW:
        raise UsageError(f"dedup is {how!r}; expected one of {', '.join(HOW)}")
    if not 0.2 <= threshold <= 1:
        raise UsageError(f"the threshold of near-duplicates is {threshold}; expected a share from 0.2 to 1")
    keep = np.ones(len(pool), dtype=bool)
    twins: dict[int, int] = {}
    if how == "none":
        return Duplicates(keep, twins)
    near = _Near(pool, threshold) if how == "near" else None
    order = _by_key(pool, scan, np.flatnonzero(scan.ok) if near is not None else _repeated(scan))
    seen: dict[str, int] = {}
    for i in order:
        names = scan.content[i], scan.keys[i]
        twin = next((seen[name] for name in names if name in seen), None)
        if twin is None and near is not None:
            marks = near.marks(pool[i])
            twin = near.find(marks)
            if twin is None:
                near.add(i, marks)
        if twin is not None:
            keep[i] = False
            twins[i] = twin
        for name in names:
            seen.setdefault(name, i if twin is None else twin)
        if progress is not None:
            progress.advance(1)
    return Duplicates(keep, twins)


def _repeated(scan: Scan) -> NDArray[np.int64]:
    """Return the rows whose text or tokens another row has."""
    return np.flatnonzero(scan.ok & (scan.keys.repeated() | Keys(scan.content.data * scan.ok[:, None]).repeated()))


def _by_key(pool: Pool, scan: Scan, rows: NDArray[np.int64]) -> list[int]:
    """Return rows in the order of (key, source, id, file, line)."""
    found: list[int] = scan.keys.order(rows).tolist()
    for start, end in scan.keys.runs(np.asarray(found, np.int64)):
        found[start:end] = sorted(
            found[start:end], key=lambda i: (pool.sources[i], pool.ids[i], pool.file(i), pool.line(i))
        )
    return found


def overlaps(
    pool: Pool, scan: Scan, other: Pool, other_scan: Scan, how: str = "exact", threshold: float = 0.8,
    among: Iterable[int] | None = None,
) -> dict[int, int]:  # fmt: skip
    """Find the rows of a pool that repeat a row of another pool, as defined by `dedup`.

    Beyond that, a row also repeats the beginning of a longer conversation, and a conversation with another system
    prompt (for answers of fewer than 20 characters: with a system prompt where the other has none), because a model
    that has seen either has seen the answer.

    Args:
        pool: The rows to check.
        scan: The result of encoding them.
        other: The other rows.
        other_scan: The result of encoding the other rows.
        how: One of `HOW`.
        threshold: The shared part of two rows from which they are near-duplicates.
        among: The other rows to compare with; by default all that could be encoded.

    Returns:
        Row -> the row of `other` that it repeats.

    Cost:
        Linear in both pools; see `dedup` for "near".
    """
    near = _Near(other, threshold) if how == "near" else None
    mine = {i: pool[i] for i in np.flatnonzero(scan.ok).tolist()}
    names = {i: (scan.content[i], scan.keys[i], *beginning_of_test(row)) for i, row in mine.items()}
    wanted = {name for found in names.values() for name in found}
    seen: dict[str, int] = {}
    compared = np.flatnonzero(other_scan.ok) if among is None else np.asarray(list(among), np.int64)
    # a row that repeats another, or its beginning, has the same first turn; equal tokens may come of other texts
    alike = np.isin(other_scan.opening, scan.opening[scan.ok]) | other_scan.keys.among(scan.keys[i] for i in mine)
    for i in (compared if near is not None else compared[alike[compared]]).tolist():
        row = other[i]
        for name in (other_scan.content[i], other_scan.keys[i], *beginnings_of_other(row)):
            if name in wanted:
                seen.setdefault(name, i)
        if near is not None:
            near.add(i, near.marks(row))
    found: dict[int, int] = {}
    for i, row in mine.items():
        twin = next((seen[name] for name in names[i] if name in seen), None)
        if twin is None and near is not None:
            twin = near.find(near.marks(row))
        if twin is not None:
            found[i] = twin
    return found


class _Marks(NamedTuple):
    """The pieces of a row and of its answer, and their MinHash sketches."""

    whole: NDArray[np.uint64]
    answer: NDArray[np.uint64]
    sketch: Any
    of_answer: Any


class _Near:
    """The rows that have been kept so far, searchable by similarity."""

    def __init__(self, pool: Pool, threshold: float) -> None:
        from datasketch import MinHashLSH

        self._pool = pool
        self._threshold = threshold
        self._index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(threshold))
        self._rows: list[int] = []
        self._whole = np.empty((1024, _PERMUTATIONS), np.uint64)  # rows beyond len(self._rows) are spare
        self._answer = np.empty((1024, _ANSWER_PERMUTATIONS), np.uint64)

    def marks(self, row: Row) -> _Marks:
        """Return the features by which rows are compared."""
        whole, answer = _shingles(row.question + row.answer), _shingles(row.answer)
        return _Marks(whole, answer, _sketch(whole, _PERMUTATIONS), _sketch(answer, _ANSWER_PERMUTATIONS).hashvalues)

    def find(self, marks: _Marks) -> int | None:
        """Return the kept row that a row with these marks repeats."""
        places = np.asarray(sorted(self._index.query(marks.sketch)), dtype=np.int64)
        if not len(places):
            return None
        likeness = (self._whole[places] == marks.sketch.hashvalues).mean(1)
        of_answers = (self._answer[places] == marks.of_answer).mean(1)
        likely = np.minimum(likeness, of_answers + _SLACK) >= self._threshold - _SLACK
        places, likeness = places[likely], likeness[likely]
        for place in places[np.argsort(-likeness, kind="stable")[:_CHECKED]]:
            kept = self._rows[int(place)]
            other = self._pool[kept]
            if (
                _jaccard(marks.whole, _shingles(other.question + other.answer)) >= self._threshold
                and _jaccard(marks.answer, _shingles(other.answer)) >= self._threshold
            ):
                return kept
        return None

    def add(self, i: int, marks: _Marks) -> None:
        """Keep row `i`."""
        place = len(self._rows)
        if place == len(self._whole):
            self._whole = np.concatenate([self._whole, np.empty_like(self._whole)])
            self._answer = np.concatenate([self._answer, np.empty_like(self._answer)])
        self._rows.append(i)
        self._whole[place], self._answer[place] = marks.sketch.hashvalues, marks.of_answer
        self._index.insert(place, marks.sketch)


def _bands(threshold: float) -> tuple[int, int]:
    """Return (bands, rows per band): the most selective choice that misses at most 5 % of pairs at the threshold.

    A pair of similarity s shares a band with probability 1 - (1 - s^rows)^bands.
    """
    widths = [
        rows for rows in range(1, _PERMUTATIONS // 2 + 1) if (1 - threshold**rows) ** (_PERMUTATIONS // rows) <= 0.05
    ]
    rows = max(widths)
    return _PERMUTATIONS // rows, rows


def _shingles(text: str) -> NDArray[np.uint64]:
    """Return the set of 5-character pieces of `text`, without white space and letter case, as sorted 64-bit hashes."""
    squeezed = re.sub(r"\s+", "", unicodedata.normalize("NFKC", text).casefold())
    codes = np.frombuffer(squeezed.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    width = min(_SHINGLE, len(codes))
    hashes = np.zeros(len(codes) - width + 1, np.uint64)
    for k in range(width):  # a polynomial in an odd base, modulo 2^64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[k : k + len(hashes)]
    hashes = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return np.unique(hashes ^ (hashes >> np.uint64(32)))


def _sketch(hashes: NDArray[np.uint64], permutations: int) -> Any:
    from datasketch import MinHash

    sketch = MinHash(num_perm=permutations, seed=_SEED, hashfunc=int)
    values = (hashes >> np.uint64(32)).tolist()  # MinHash permutes 32-bit values
    for start in range(0, len(values), _CHUNK):
        sketch.update_batch(values[start : start + _CHUNK])
    return sketch


def _jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
