"""Which keys belong to which unit of a feature store.

The keys are in files of their own, and the plan names each file, the size of its units and a digest:

    keys-DIGEST.bin    16 bytes per key, in the order of the rows; then 16 bytes per unit, the digest of its keys

DIGEST is that of the digests of the units, so that every byte is covered, and what is opened of a store does not depend
on how many rows it has. Stores of format 1 list all keys in plan.json.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datatools import files
from datatools.compact import FullKeys
from datatools.errors import DataError
from datatools.features.keys import Places

KEY_BYTES = 16
_CHUNK = 1 << 16  # keys that are compared at a time
_FEW = 64  # this many times more rows than wanted keys are searched without an index


class Ranges:
    """The units of a store of format 2: consecutive rows of files of keys.

    Args:
        folder: folder of the store.
        parts: the entries of the plan, `{"rows": ..., "rows_per_unit": ..., "digest": ...}`; digest names the file.

    Raises:
        DataError: if a file is missing or damaged.

    """

    def __init__(self, folder: Path, parts: Sequence[Mapping[str, Any]]) -> None:
        self._files = [_KeyFile(folder, **part) for part in parts]
        self._first_unit = [0]
        for file in self._files:
            self._first_unit.append(self._first_unit[-1] + file.units)

    def __len__(self) -> int:
        """Return the number of units."""
        return self._first_unit[-1]

    def _of(self, unit: int) -> tuple[_KeyFile, int]:
        file = bisect_right(self._first_unit, unit) - 1
        if not 0 <= unit < len(self):
            raise IndexError(f"unit {unit} of {len(self)}")
        return self._files[file], unit - self._first_unit[file]

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(file.rows for file in self._files)

    def rows(self, unit: int) -> int:
        """Return the number of rows of a unit.

        Args:
            unit: number of the unit.

        Returns:
            The number.

        """
        file, place = self._of(unit)
        return file.rows_of(place)

    def keys(self, unit: int) -> FullKeys:
        """Return the keys of a unit, compared with their digest.

        Args:
            unit: number of the unit.

        Returns:
            The keys, in the order of the rows.

        Raises:
            DataError: if they are damaged.

        """
        file, place = self._of(unit)
        return file.keys(place)

    def mark(self, unit: int) -> str:
        """Return what the sidecar of a unit says of its keys: their digest.

        Args:
            unit: number of the unit.

        Returns:
            32 hexadecimal characters.

        """
        file, place = self._of(unit)
        return str(file.digests[place].tobytes().hex())


class Listed:
    """The units of a store of format 1, whose plan lists all keys.

    Args:
        units: the keys of each unit, joined by spaces.

    """

    def __init__(self, units: Sequence[str]) -> None:
        self._units = units

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self._units)

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(map(self.rows, range(len(self))))

    def rows(self, unit: int) -> int:
        """Return the number of rows of a unit.

        Args:
            unit: number of the unit.

        Returns:
            The number.

        """
        return (len(self._units[unit]) + 1) // 33  # 32 characters and a space

    def keys(self, unit: int) -> FullKeys:
        """Return the keys of a unit.

        Args:
            unit: number of the unit.

        Returns:
            The keys, in the order of the rows.

        """
        return FullKeys.of(self._units[unit].split())

    def mark(self, unit: int) -> str:
        """Return what the sidecar of a unit says of its keys: all of them.

        Args:
            unit: number of the unit.

        Returns:
            The keys, joined by spaces.

        """
        return self._units[unit]


Units = Ranges | Listed


class _KeyFile:
    """One file of keys."""

    def __init__(self, folder: Path, rows: int, rows_per_unit: int, digest: str) -> None:
        self.path = folder / _name(digest)
        self.rows, self.step, self.units = rows, rows_per_unit, -(-rows // rows_per_unit)
        try:
            size = self.path.stat().st_size
        except OSError:
            size = -1
        if size != KEY_BYTES * (self.rows + self.units):
            raise self._damaged(f"it has {size} bytes" if size >= 0 else "it is missing")
        found = self._read(KEY_BYTES * self.rows, KEY_BYTES * self.units)
        if files.digest(found) != digest:
            raise self._damaged("its digest does not match")
        self.digests: NDArray[np.uint8] = np.frombuffer(found, np.uint8).reshape(-1, KEY_BYTES)

    def rows_of(self, unit: int) -> int:
        return min(self.step, self.rows - unit * self.step)

    def keys(self, unit: int) -> FullKeys:
        found = self._read(KEY_BYTES * unit * self.step, KEY_BYTES * self.rows_of(unit))
        if files.digest(found) != self.digests[unit].tobytes().hex():
            raise self._damaged(f"the digest of unit {unit} does not match")
        return FullKeys(np.frombuffer(found, np.uint8).reshape(-1, KEY_BYTES))

    def _read(self, start: int, size: int) -> bytes:
        with files.open_file(self.path) as file:
            try:
                pieces = []
                while size and (piece := os.pread(file.fileno(), min(size, 1 << 30), start)):
                    pieces.append(piece)
                    start, size = start + len(piece), size - len(piece)
                return b"".join(pieces)
            except OSError as error:
                raise files.explain(error, self.path, "read") from error

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self.path} is damaged: {why}; remove the folder and extract the features again")


def _name(digest: str) -> str:
    return f"keys-{digest}.bin"


def write(folder: Path, keys: FullKeys, rows_per_unit: int) -> dict[str, Any]:
    """Write a file of keys.

    Args:
        folder: folder of the store.
        keys: the keys.
        rows_per_unit: rows per unit.

    Returns:
        The entry of the plan.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    """
    cuts = [slice(start, start + rows_per_unit) for start in range(0, len(keys), rows_per_unit)]
    digests = b"".join(bytes.fromhex(files.digest(keys.data[cut].tobytes())) for cut in cuts)
    digest = files.digest(digests)
    pieces = chain((keys.data[cut].tobytes() for cut in cuts), [digests])
    files.write_pieces(folder / _name(digest), pieces, seal=False)
    return {"rows": len(keys), "rows_per_unit": rows_per_unit, "digest": digest}


def chunks(units: Units) -> Iterator[tuple[int, FullKeys]]:
    """Iterate over all keys.

    Args:
        units: the units.

    Yields:
        The number of the first row, and the keys of some units.

    """
    start, at, held = 0, 0, list[NDArray[np.uint8]]()
    for unit in range(len(units)):
        held.append(units.keys(unit).data)
        at += len(held[-1])
        if at - start >= _CHUNK or unit == len(units) - 1:
            yield start, FullKeys(np.concatenate(held))
            start, held = at, []


def absent(units: Units, keys: FullKeys) -> NDArray[np.bool_]:
    """Find out which keys are in no unit.

    Args:
        units: the units.
        keys: n keys, each once.

    Returns:
        bool [n].

    """
    found = np.ones(len(keys), np.bool_)
    if units.count and len(keys):
        places = Places(keys)
        for _, some in chunks(units):
            found[places.find(some)[1].numpy()] = False
    return found


class Index:
    """Where keys are in the units. Memory: 24 bytes per row of the store, unless few keys are asked for.

    Args:
        units: the units.

    """

    def __init__(self, units: Units) -> None:
        self._units = units
        self._starts = np.cumsum([0, *(units.rows(unit) for unit in range(len(units)))])

    @cached_property
    def _places(self) -> Places:
        whole = np.empty((self._units.count, KEY_BYTES), np.uint8)
        for start, some in chunks(self._units):
            whole[start : start + len(some)] = some.data
        return Places(FullKeys(whole))

    def find(self, keys: FullKeys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find n keys, which may repeat.

        Args:
            keys: the keys.

        Returns:
            The unit of each key, -1 if it is in none, and its row there, int64 [n].

        """
        at = np.full(len(keys), -1, np.int64)
        if "_places" in self.__dict__ or len(keys) * _FEW > self._units.count:
            source, place = self._places.find(keys)
            at[source.numpy()] = place.numpy()
        elif len(keys):
            wanted = Places(keys)
            for start, some in chunks(self._units):
                source, place = wanted.find(some)
                at[place.numpy()] = start + source.numpy()
        unit = np.searchsorted(self._starts, at, side="right") - 1
        return unit, at - self._starts[unit]
