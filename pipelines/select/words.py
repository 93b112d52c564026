"""The words in the rows of a pool and of its target, counted block by block, for methods that use no model.

Words are known by 64-bit digests, and what a block of rows holds is spooled to an unnamed file, so that memory grows
with the number of different words, not with that of rows: 12 bytes for each.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import regex
import xxhash
from numpy.typing import NDArray

from datatools import DataError, files, large
from pipelines.rows.rows import Rows

_ASCII = re.compile(r"\w+").findall
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_LETTER = r"[\p{L}\p{N}_]"
_INSIDE = rf"[{_LETTER}\p{{M}}\u200c\u200d]"  # the last two join letters in Persian and in Indic scripts
_RUNS = regex.compile(rf"(?V1)((?:{_UNSPACED}\p{{M}}*)+)|([{_LETTER}--{_UNSPACED}][{_INSIDE}--{_UNSPACED}]*)").findall
_MARKED = regex.compile(r"(?V1)\P{M}\p{M}*").findall  # a letter and its marks
_ROWS = 512  # per block
_KNOWN = 100_000  # words whose digests are remembered
_PENDING = 1 << 20  # terms that are counted at once
_RECORD = np.dtype([("row", "<u2"), ("term", "<u8"), ("count", "<i4")])


@dataclass(frozen=True)
class Block:
    """The terms of consecutive rows, sorted by row: which occur in a row, and how often.

    Attributes:
        start: The position of the first row among the usable ones.
        lengths: int64 [b], the number of words of each row.
        row: uint16 [z], which row of the block.
        term: uint64 [z], the digest of the word or of the pair of words.
        count: int32 [z].
        first: int32 [z], where the term occurs first: the greater, the later in a row.
    """

    start: int
    lengths: NDArray[np.int64]
    row: NDArray[np.uint16]
    term: NDArray[np.uint64]
    count: NDArray[np.int32]
    first: NDArray[np.int32]


class _Digests(dict[str, int]):
    def __missing__(self, word: str) -> int:
        if len(self) >= _KNOWN:
            self.clear()
        self[word] = found = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return found


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case.

    A word is a run of letters with their marks, digits and underscores, of any length, after Unicode normalisation
    (NFKC). Chinese, Japanese, Thai, Lao, Khmer and Burmese have no spaces between words: there, each pair of
    neighbouring letters is a word, as usual in retrieval.

    Args:
        text: The text.

    Examples:
        >>> words_of("Das Café in 東京都"), words_of("हिन्दी में")
        (['das', 'café', 'in', '東京', '京都'], ['हिन्दी', 'में'])
    """
    if text.isascii():
        return _ASCII(text.lower())
    found: list[str] = []
    for unspaced, spaced in _RUNS(unicodedata.normalize("NFKC", text).lower()):
        letters = _MARKED(unspaced)
        found += [spaced] if spaced else letters if len(letters) < 2 else map("".join, itertools.pairwise(letters))
    return found


def _pairs(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the digests of pairs of words."""
    mixed = (first * np.uint64(0x9E3779B97F4A7C15)) ^ ((second << np.uint64(31)) | (second >> np.uint64(33)))
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return mixed ^ (mixed >> np.uint64(32))


def _block(start: int, texts: Sequence[str], digests: _Digests, pairs: bool) -> Block:
    found = [[digests[word] for word in words_of(text)] for text in texts]
    lengths = np.fromiter(map(len, found), np.int64, len(found))
    term = np.fromiter((digest for words in found for digest in words), np.uint64, int(lengths.sum()))
    row = np.repeat(np.arange(len(found), dtype=np.uint16), lengths)
    if pairs:
        inside = row[1:] == row[:-1]
        term = np.concatenate([term, _pairs(term[:-1], term[1:])[inside]])
        row = np.concatenate([row, row[1:][inside]])
    order = np.lexsort((term, row))
    row, term = row[order], term[order]
    new = np.ones(len(row), np.bool_)
    new[1:] = (row[1:] != row[:-1]) | (term[1:] != term[:-1])
    places = np.flatnonzero(new)
    count = np.diff(np.append(places, len(row))).astype(np.int32)
    return Block(start, lengths, row[places], term[places], count, order[places].astype(np.int32))


def blocks_of(rows: Rows, pairs: bool) -> Iterator[Block]:
    """Count the words of the usable rows.

    Args:
        rows: The rows; each is one text, prompt and answer.
        pairs: Whether pairs of neighbouring words count too.
    """
    usable, digests = np.flatnonzero(rows.usable), _Digests()
    for start in range(0, len(usable), _ROWS):
        texts = [rows.pool[row].whole for row in usable[start : start + _ROWS].tolist()]
        yield _block(start, texts, digests, pairs)


class Frequencies:
    """In how many rows each term occurs."""

    def __init__(self) -> None:
        self.terms, self.counts = np.zeros(0, np.uint64), np.zeros(0, np.int32)
        self._waiting: list[NDArray[np.uint64]] = []
        self._size = 0

    def add(self, terms: NDArray[np.uint64]) -> None:
        """Count the terms of some rows.

        Args:
            terms: uint64 [z], each once for every row that it occurs in.
        """
        self._waiting.append(terms)
        self._size += len(terms)
        if self._size > max(_PENDING, len(self.terms) // 2):
            self.settle()

    def settle(self) -> None:
        """Merge what has been added; `of` answers from what is merged."""
        new, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *self._waiting]), return_counts=True)
        self._waiting, self._size = [], 0
        at = np.searchsorted(self.terms, new)
        known = at < len(self.terms)
        known[known] = self.terms[at[known]] == new[known]
        self.counts[at[known]] += counts[known].astype(np.int32)
        self.terms = np.insert(self.terms, at[~known], new[~known])
        self.counts = np.insert(self.counts, at[~known], counts[~known].astype(np.int32))

    def of(self, terms: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Return in how many rows terms occur, int32 [z].

        Args:
            terms: Terms that have been added and merged.
        """
        return self.counts[np.searchsorted(self.terms, terms)]


class Vocabulary:
    """The terms of the target, in the order in which they first occur in the pool, then in the target.

    Products add in this order, which is that of scikit-learn's vectorizers, so that the last bits are theirs too.

    Args:
        target: The target.
        pairs: Whether pairs of neighbouring words count too.
    """

    def __init__(self, target: Rows, pairs: bool) -> None:
        digests, known = _Digests(), dict[str, int]()
        for row in np.flatnonzero(target.usable).tolist():
            words = words_of(target.pool[row].whole)
            known.update((word, digests[word]) for word in words)
            if pairs:
                codes = np.asarray([digests[word] for word in words], np.uint64)
                both = _pairs(codes[:-1], codes[1:]).tolist()
                known.update(zip(map(" ".join, itertools.pairwise(words)), both, strict=True))
        self._terms = np.unique(np.asarray(list(known.values()), np.uint64))
        self._place = np.arange(len(self._terms))
        self._row = np.full(len(self._terms), np.iinfo(np.int64).max)  # that first has the term
        self._first = np.zeros(len(self._terms), np.int64)

    def __len__(self) -> int:
        return len(self._terms)

    def _find(self, terms: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the position of each term, and whether the target has it."""
        at = np.searchsorted(self._terms, terms)
        there = at < len(self._terms)
        there[there] = self._terms[at[there]] == terms[there]
        return at, there

    def see(self, block: Block, start: int) -> None:
        """Note which terms occur for the first time.

        Args:
            block: The next block.
            start: The number of rows before it.
        """
        at, there = self._find(block.term)
        terms, places = np.unique(at[there], return_index=True)  # the first place of each: blocks are sorted by row
        new = self._row[terms] == np.iinfo(np.int64).max
        terms, places = terms[new], np.flatnonzero(there)[places[new]]
        self._row[terms], self._first[terms] = block.row[places].astype(np.int64) + start, block.first[places]

    def settle(self) -> None:
        """Put the terms in order, when all blocks have been seen."""
        self._place[np.lexsort((self._first, self._row))] = np.arange(len(self._terms))

    def rows_with(self, frequencies: Frequencies) -> NDArray[np.int64]:
        """Return in how many rows of the pool each term occurs, int64 [terms].

        Args:
            frequencies: Those of the pool.
        """
        at = np.searchsorted(frequencies.terms, self._terms)
        there = at < len(frequencies.terms)
        there[there] = frequencies.terms[at[there]] == self._terms[there]
        found = np.zeros(len(self._terms), np.int64)
        found[self._place[there]] = frequencies.counts[at[there]]
        return found

    def matrix(self, block: Block, values: NDArray[Any]) -> Any:
        """Return the terms of a block that the target has, as a sparse matrix [b, terms].

        Args:
            block: The block.
            values: [z], the value of each of its terms.
        """
        from scipy.sparse import csr_matrix

        at, there = self._find(block.term)
        row, column, data = block.row[there], self._place[at[there]], values[there]
        order = np.lexsort((column, row))
        starts = np.searchsorted(row[order], np.arange(len(block.lengths) + 1))
        return csr_matrix((data[order], column[order], starts), (len(block.lengths), len(self._terms)))


class Counted:
    """The words of a pool and of its target, counted once and read again block by block.

    Args:
        pool: The pool.
        target: The target.
        method: The method to name in an error.
        pairs: Whether pairs of neighbouring words count too.
        every: Whether all terms of the pool matter, and not only those that the target has.

    Attributes:
        vocabulary: The terms of the target.
        target: The usable rows of the target.
        frequencies: In how many rows of the pool each term occurs.
        lengths: int64 [n], the number of words of each usable row of the pool.

    Raises:
        DataError: No row contains a word.
    """

    def __init__(self, pool: Rows, target: Rows, method: str, *, pairs: bool, every: bool) -> None:
        self.vocabulary = Vocabulary(target, pairs)
        self.target = list(blocks_of(target, pairs))
        self.frequencies = Frequencies()
        self._sizes: list[int] = []
        self._close = ExitStack()
        folder = large.writable(None if pool.kept is None else pool.kept.folder)
        self._spool: IO[bytes] = self._close.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        try:
            self._count(pool, pairs, every, folder)
        except BaseException:
            self._close.close()
            raise
        if not self.lengths.any() and not len(self.vocabulary):
            self._close.close()
            raise DataError(f"--method {method}: no row of the pool or the target holds a word; use another method")

    def _count(self, pool: Rows, pairs: bool, every: bool, folder: Path) -> None:
        lengths = [np.zeros(0, np.int64)]
        for block in blocks_of(pool, pairs):
            self.vocabulary.see(block, block.start)
            kept = block if every else self._of_target(block)
            self.frequencies.add(kept.term)
            records = np.empty(len(kept.row), _RECORD)
            records["row"], records["term"], records["count"] = kept.row, kept.term, kept.count
            try:
                self._spool.write(records.tobytes())
            except OSError as error:
                raise files.explain(error, folder, "write") from error
            self._sizes.append(len(records))
            lengths.append(block.lengths)
        self.frequencies.settle()
        self.lengths = np.concatenate(lengths)
        for block in self.target:
            self.vocabulary.see(block, len(self.lengths) + block.start)
        self.vocabulary.settle()

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self._close.close()

    def _of_target(self, block: Block) -> Block:
        there = self.vocabulary.matrix(block, np.arange(1, len(block.term) + 1))
        places = np.sort(there.data) - 1
        return Block(block.start, block.lengths, block.row[places], block.term[places], block.count[places],
                     block.first[places])  # fmt: skip

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks of the pool again."""
        self._spool.seek(0)
        for number, size in enumerate(self._sizes):
            start = number * _ROWS
            records = np.frombuffer(self._spool.read(size * _RECORD.itemsize), _RECORD)
            lengths = self.lengths[start : start + _ROWS]
            row, term, count = (np.ascontiguousarray(records[name]) for name in ("row", "term", "count"))
            yield Block(start, lengths, row, term, count, np.zeros(0, np.int32))


def asked_of(block: Block, places: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Return which rows of a block are asked for, as positions in the block.

    Args:
        block: The block.
        places: Positions among the usable rows of the pool, ascending; None for all of them.
    """
    n = len(block.lengths)
    if places is None:
        return np.arange(n)
    first, last = np.searchsorted(places, [block.start, block.start + n])
    return places[first:last] - block.start
