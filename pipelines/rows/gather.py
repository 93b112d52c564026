"""The columns of all parts of an index, gathered in memory: about 100 bytes per row and its id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from datatools.compact import Keys, Names
from pipelines.rows.ids import Ids, Piece
from pipelines.rows.part import Input, Part

NUMBERS = {
    "line": np.int64,
    "offset": np.int64,
    "length": np.uint32,
    "digest": np.uint64,
    "opening": np.uint64,
    "tokens": np.int32,
    "supervised": np.int32,
    "cut": np.int32,
}
"""Columns of numbers, and their types."""


class Columns:
    """The columns of parts, which are added in order; a part is not kept.

    Args:
        inputs: The input files.
    """

    def __init__(self, inputs: Sequence[Input]) -> None:
        self.flags: Counter[str] = Counter()
        self.encoded: Counter[str] = Counter()
        self.faults: list[tuple[int, str, str]] = []
        """(row, reason, detail) of the rows that could not be encoded."""
        self.sizes: list[int] = []
        """The number of rows of each part."""
        self._inputs = inputs
        self._found: dict[str, list[NDArray[Any]]] = {name: [] for name in (*NUMBERS, "file", "source", "ok")}
        self._keys: dict[str, list[NDArray[np.uint8]]] = {"key": [], "content": []}
        self._sources: dict[str, int] = {}
        self._pieces: list[Piece] = []
        self._rows = 0

    def add(self, file: int, part: Part) -> None:
        """Add a part.

        Args:
            file: The number of its input file.
            part: The part.
        """
        rows, n = part.rows, len(part.rows)
        for name in NUMBERS:
            self._found[name].append(rows.column(name).to_numpy().copy())
        self._found["file"].append(np.full(n, file, np.int32))
        self._found["ok"].append(np.array(rows.column("ok").to_numpy(zero_copy_only=False), np.bool_))
        source = rows.column("source")
        mine = [self._sources.setdefault(name, len(self._sources)) for name in source.dictionary.to_pylist()]
        self._found["source"].append(np.asarray(mine, np.int32)[source.indices.to_numpy()])
        for name, found in self._keys.items():
            column = rows.column(name)
            found.append(np.frombuffer(column.buffers()[1], np.uint8, 16 * n, 16 * column.offset).copy())
        self._pieces.append(Piece.of(self._inputs[file].stem, self._found["line"][-1], rows.column("id")))
        if part.tokens is not None or part.rows.column("reason").null_count < n:
            failed = rows.filter(pc.invert(rows.column("ok")))
            places = np.flatnonzero(~self._found["ok"][-1]) + self._rows
            self.faults += zip(places.tolist(), failed.column("reason").to_pylist(),
                               failed.column("detail").to_pylist(), strict=True)  # fmt: skip
        self.flags.update(part.flags)
        self.encoded.update(part.encoded)
        self.sizes.append(n)
        self._rows += n

    def __len__(self) -> int:
        return self._rows

    def numbers(self, name: str) -> NDArray[Any]:
        """Return one of `NUMBERS`, or ok, for all rows.

        Args:
            name: The name of the column.
        """
        dtype = NUMBERS.get(name, np.bool_)
        return np.concatenate([np.zeros(0, dtype), *self._found.pop(name)]).astype(dtype, copy=False)

    def files(self) -> Names:
        """Return the input of each row, as it was named."""
        codes = np.concatenate([np.zeros(0, np.int32), *self._found.pop("file")])
        return Names(codes, [one.name for one in self._inputs])

    def sources(self) -> Names:
        """Return the source of each row."""
        return Names(np.concatenate([np.zeros(0, np.int32), *self._found.pop("source")]), list(self._sources))

    def keys(self, name: str) -> Keys:
        """Return a column of 16 bytes per row.

        Args:
            name: key or content.
        """
        return Keys(np.concatenate([np.zeros(0, np.uint8), *self._keys.pop(name)]).reshape(-1, 16))

    def ids(self) -> Ids:
        """Return the id of each row, which need not be unique yet."""
        return Ids(self._pieces)
