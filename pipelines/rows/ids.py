"""The ids of a pool: unique, kept as bytes, and made where rows have none."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from datatools.compact import Texts


@dataclass(frozen=True, slots=True)
class Piece:
    """The ids of one part.

    Attributes:
        stem: From which the id of a row without one is made: `<stem>:<line>`.
        lines: int64 [n], the line of each row.
        ends: int32 [n + 1], where each id begins in `texts`.
        texts: The ids in UTF-8.
        none: bool [n], the rows without an id; None if all have one.
    """

    stem: str
    lines: NDArray[np.int64]
    ends: NDArray[np.int32]
    texts: bytes
    none: NDArray[np.bool_] | None

    @classmethod
    def of(cls, stem: str, lines: NDArray[np.int64], ids: pa.StringArray) -> Piece:
        """Copy the ids of a part out of its columns.

        Args:
            stem: The stem of the file.
            lines: int64 [n], the line of each row.
            ids: The column.
        """
        n = len(ids)
        _, ends, texts = ids.buffers()
        places = (
            np.zeros(1, np.int32) if ends is None or not n else np.frombuffer(ends, np.int32, n + 1, 4 * ids.offset)
        )
        none = np.asarray(ids.is_null()) if ids.null_count else None
        found = b"" if texts is None else memoryview(texts)[int(places[0]) : int(places[-1])].tobytes()
        return cls(stem, lines, places - places[0], found, none)

    def own(self, index: int) -> bool:
        """Return whether a row has an id of its own.

        Args:
            index: The number of the row in the part.
        """
        return self.none is None or not self.none[index]

    def raw(self, index: int) -> bytes:
        """Return the id of a row in UTF-8.

        Args:
            index: The number of the row in the part.
        """
        if self.none is not None and self.none[index]:
            return f"{self.stem}:{self.lines[index]}".encode()
        return self.texts[self.ends[index] : self.ends[index + 1]]


@dataclass
class Ids(Texts):
    """The ids of a pool.

    Attributes:
        pieces: Those of each part, in order.
        others: Row -> the id that it got because its own is that of an earlier row.
    """

    pieces: list[Piece]
    others: dict[int, str] = field(default_factory=dict)

    __hash__ = None
    __eq__ = Texts.__eq__

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *(len(piece.lines) for piece in self.pieces)]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def place(self, index: int) -> tuple[int, int]:
        """Return the part of a row, and its number there.

        Args:
            index: The number of the row in the pool.
        """
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]

    def one(self, index: int) -> str:
        """Return one text, as `Texts.one` says.

        Args:
            index: Its position.
        """
        if self.others and index in self.others:
            return self.others[index]
        part, row = self.place(index)
        return self.pieces[part].raw(row).decode()

    def __iter__(self) -> Iterator[str]:
        for start, piece in zip(self._starts, self.pieces, strict=False):
            for row in range(len(piece.lines)):
                yield self.others.get(start + row) or piece.raw(row).decode()

    def own(self, index: int) -> bool:
        """Return whether a row has an id of its own.

        Args:
            index: The number of the row in the pool.
        """
        part, row = self.place(index)
        return self.pieces[part].own(row)

    def arrow(self, start: int, end: int) -> pa.Array:
        """Return the ids of consecutive rows as an Arrow array.

        Args:
            start: The first row.
            end: The row after the last.
        """
        return pa.array([self.one(i) for i in range(start, end)], pa.string())

    def make_unique(self, strict: bool = False) -> list[tuple[int, int]]:
        """Give each row whose id an earlier row has a new one, with `#2`, `#3`, ... appended.

        Args:
            strict: Whether ids of their own that are repeated stay as they are, for a message.

        Returns:
            (row, the earlier row) for each row whose own id an earlier row has, ascending.

        Cost:
            One digest per row, sorted; 16 bytes of memory per row meanwhile.
        """
        digest = xxhash.xxh3_64_intdigest
        digests = np.fromiter(
            (digest(piece.raw(row)) for piece in self.pieces for row in range(len(piece.lines))), np.uint64, len(self)
        )
        order = np.argsort(digests, kind="stable")
        ranked = digests[order]
        same = ranked[1:] == ranked[:-1]
        shared = np.zeros(len(order), np.bool_)
        shared[1:] |= same
        shared[:-1] |= same
        waiting = np.sort(order[shared]).tolist()  # rows whose id another one has, as a heap
        first: dict[str, int] = {}  # the rows that have taken these ids
        counts: dict[str, int] = {}
        repeated: list[tuple[int, int]] = []

        def holder(identity: str) -> int | None:
            """The first row that has this id of its own."""
            code = np.uint64(digest(identity.encode()))
            at = int(np.searchsorted(ranked, code))
            while at < len(ranked) and ranked[at] == code:
                part, row = self.place(int(order[at]))
                if self.pieces[part].raw(row) == identity.encode():
                    return int(order[at])
                at += 1
            return None

        while waiting:
            index = heapq.heappop(waiting)
            while waiting and waiting[0] == index:  # it shares its id, and gave way to an earlier row as well
                heapq.heappop(waiting)
            part, row = self.place(index)
            identity = self.pieces[part].raw(row).decode()
            if identity in first:
                if self.own(index):
                    repeated.append((index, first[identity]))
                    if strict:
                        continue
                count = counts.get(identity, 1) + 1
                while (new := f"{identity}#{count}") in first or ((at := holder(new)) is not None and at < index):
                    count += 1
                counts[identity] = count
                if at is not None:  # a later row, which has to give way
                    heapq.heappush(waiting, at)
                self.others[index] = identity = new
            first[identity] = index
        return repeated
