"""Columns of text that take a few bytes per row, read like lists of strings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray


class Texts(Sequence[str]):
    """A sequence of texts that makes each text when it is asked for; it equals any sequence of the same texts."""

    __hash__ = None  # type: ignore[assignment]

    def one(self, index: int) -> str:
        """Return one text.

        Args:
            index: Its position, from 0 to the number of texts.

        Returns:
            The text.

        """
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.one(i) for i in range(*index.indices(len(self)))]
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"text {index} of {n}")
        return self.one(index % n)

    def __iter__(self) -> Iterator[str]:
        return map(self.one, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        more = ", ..." if len(self) > 5 else ""
        return f"{type(self).__name__}([{', '.join(map(repr, self[:5]))}{more}])"


class Names(Texts):
    """Texts of which few differ, such as sources and statuses: four bytes each.

    Args:
        codes: int32 [n], the position of each text in `names`.
        names: The different texts.
    """

    def __init__(self, codes: NDArray[np.int32], names: Sequence[str]) -> None:
        self.codes, self.names = codes, list(names)

    @classmethod
    def of(cls, texts: Iterable[str]) -> Names:
        """Return the same texts as names.

        Args:
            texts: The texts.

        Returns:
            The same texts.

        """
        if isinstance(texts, Names):
            return texts
        known: dict[str, int] = {}
        codes = np.fromiter((known.setdefault(text, len(known)) for text in texts), np.int32)
        return cls(codes, list(known))

    def __len__(self) -> int:
        return len(self.codes)

    def one(self, index: int) -> str:
        """Return one text, as `Texts.one` says.

        Args:
            index: Its position.

        Returns:
            The text.

        """
        name: str = self.names[self.codes[index]]
        return name

    def where(self, name: str) -> NDArray[np.bool_]:
        """Return which texts equal a name, bool [n].

        Args:
            name: The name.

        Returns:
            bool [n], which are equal.

        """
        found = np.zeros(len(self.codes), np.bool_)
        for code, known in enumerate(self.names):
            if known == name:
                found |= self.codes == code
        return found

    def replaced(self, rows: NDArray[Any] | Sequence[int], name: str) -> Names:
        """Return these texts with others in some places.

        Args:
            rows: The positions, or bool [n].
            name: The text that they get.

        Returns:
            The new texts.

        """
        names = self.names if name in self.names else [*self.names, name]
        codes = self.codes.copy()
        codes[np.asarray(rows)] = names.index(name)
        return Names(codes, names)

    def counts(self, rows: NDArray[Any] | slice = slice(None)) -> dict[str, int]:
        """Return text -> how often it occurs, without those that do not, in the order of `names`.

        Args:
            rows: The positions that count.

        Returns:
            text -> count.

        """
        found = np.bincount(self.codes[rows], minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, found, strict=True) if count}


_NONE = "0" * 32


class Keys(Texts):
    """Content keys, 32 hexadecimal characters each, in 16 bytes; "" for rows that have none.

    Args:
        data: uint8 [n, 16], zeros for "".
    """

    _none = ""  # what 16 zero bytes mean

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data

    @classmethod
    def of(cls, texts: Iterable[str]) -> Self:
        """Return the same keys.

        Args:
            texts: The keys.

        Returns:
            The same texts.

        """
        if isinstance(texts, Keys):
            return texts if isinstance(texts, cls) and type(texts) is cls else cls(texts.data)
        joined = b"".join(bytes.fromhex(text) if text else bytes(16) for text in texts)
        return cls(np.frombuffer(joined, np.uint8).reshape(-1, 16))

    def __len__(self) -> int:
        return len(self.data)

    def one(self, index: int) -> str:
        """Return one key, as `Texts.one` says.

        Args:
            index: Its position.

        Returns:
            The text.

        """
        found: bytes = self.data[index].tobytes()
        return self._none if found == bytes(16) else found.hex()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):
            text = self.data[start : start + 4096].tobytes().hex()
            for at in range(0, len(text), 32):
                key = text[at : at + 32]
                yield self._none if key == _NONE else key

    def halves(self, rows: NDArray[Any] | slice = slice(None)) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Return the first and the last 8 bytes as numbers, which have the order of the texts.

        Args:
            rows: The positions.

        Returns:
            uint64 [n] each.

        """
        pair = np.ascontiguousarray(self.data[rows]).view(">u8").astype(np.uint64)
        return pair[:, 0], pair[:, 1]

    def order(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return positions sorted by key; equal keys keep their order.

        Args:
            rows: int64 [k], the positions to sort; by default all.

        Returns:
            int64, the positions.

        """
        first, last = self.halves(slice(None) if rows is None else rows)
        found = np.lexsort((last, first))
        return found if rows is None else rows[found]

    def some(self, rows: NDArray[np.int64]) -> Self:
        """Return the keys of some rows.

        Args:
            rows: int64 [k], their positions.

        Returns:
            The keys, [k].

        """
        return type(self)(self.data[rows])

    def runs(self, rows: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Return (start, end) of each run of at least two equal keys.

        Args:
            rows: int64 [k], positions in the order of their keys.

        Returns:
            (start, end) of each run, in `rows`.

        """
        first, last = self.halves(rows)
        new = np.flatnonzero((first[1:] != first[:-1]) | (last[1:] != last[:-1])) + 1
        edges = np.concatenate([[0], new, [len(rows)]])
        long = np.flatnonzero(np.diff(edges) > 1)
        return list(zip(edges[long].tolist(), edges[long + 1].tolist(), strict=True))

    def repeated(self) -> NDArray[np.bool_]:
        """Return which keys occur more than once, bool [n]; "" does not count.

        Returns:
            bool [n].

        """
        order = self.order()
        first, last = self.halves(order)
        same = (first[1:] == first[:-1]) & (last[1:] == last[:-1])
        if not self._none:
            same &= (first[1:] | last[1:]) != 0
        found = np.zeros(len(order), np.bool_)
        found[order[1:][same]] = True
        found[order[:-1][same]] = True
        return found

    def among(self, keys: Iterable[str]) -> NDArray[np.bool_]:
        """Return which of these keys are among others, bool [n].

        Args:
            keys: A few keys.

        Returns:
            bool [n].

        """
        wanted = np.unique(Keys.of([key for key in keys if key]).halves()[0])
        found = np.isin(self.halves()[0], wanted)
        exact = set(keys)
        for row in np.flatnonzero(found).tolist():
            found[row] = self.one(row) in exact
        return found


class FullKeys(Keys):
    """Content keys of rows that all have one; zeros are a key like any other.

    Args:
        data: uint8 [n, 16].
    """

    _none = _NONE


class Labels(Texts):
    """`KEY ID` of each row of a pool: by them, rows are told apart and ties are broken, also between equal contents.

    Args:
        keys: The content keys.
        ids: The ids, which are unique.
    """

    distinct = True

    def __init__(self, keys: Keys, ids: Sequence[str]) -> None:
        self._keys, self._ids = keys, ids

    def __len__(self) -> int:
        return len(self._keys)

    def one(self, index: int) -> str:
        """Return one text, as `Texts.one` says.

        Args:
            index: Its position.

        Returns:
            The text.

        """
        return f"{self._keys[index]} {self._ids[index]}"

    def order(self) -> NDArray[np.int64]:
        """Return all positions, sorted by text.

        Returns:
            int64, the positions.

        """
        found = self._keys.order()
        for start, end in self._keys.runs(found):
            found[start:end] = sorted(found[start:end].tolist(), key=self._ids.__getitem__)
        return found
