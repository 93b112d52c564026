"""An order of training: which rows each batch contains, and which batch each step trains on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datatools import files
from datatools.errors import DataError, UsageError
from datatools.files.arrays import read_npz, write_npz

_FORMAT = 2  # 1 had no recipe and no digest
_LIMIT = 1 << 28  # bytes of a file


@dataclass(frozen=True)
class Order:
    """Batches and their sequence: step t trains on `batches[sequence[t]]`; epochs repeat batches.

    On disk it is an `.npz` file without pickles: the ids, the size of each batch, the sequence, the recipe, and a
    digest of these. This class is part of `datatools.files` because training reads it too, and `datatools.order` would
    load torch.

    Args:
        batches: n batches of row ids.
        sequence: T batch numbers in 0..n-1, one per step.
        recipe: training settings of the run that the order was made for, as plain values (JSON); None if unknown.

    Raises:
        UsageError: if a batch is empty, or an entry of the sequence refers to no batch.

    Example:
        >>> order = Order((("a", "b"), ("c",)), (1, 0))
        >>> len(order), order[0]
        (2, ('c',))

    """

    batches: tuple[tuple[str, ...], ...]
    sequence: tuple[int, ...]
    recipe: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        empty = [number for number, batch in enumerate(self.batches) if not batch]
        if empty or not self.sequence:
            what = f"batch {empty[0]} has no rows" if empty else "its sequence is empty"
            raise UsageError(f"order: {what}; every step trains on at least one row")
        wrong = [(t, b) for t, b in enumerate(self.sequence) if not 0 <= b < len(self.batches)]
        if wrong:
            raise UsageError(
                f"order: step {wrong[0][0]} refers to batch {wrong[0][1]}, but there are {len(self.batches)} batches, "
                f"0 to {len(self.batches) - 1}"
            )

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, step: int) -> tuple[str, ...]:
        """Return the row ids of step `step`. Access is random, so that resuming needs no history."""
        return self.batches[self.sequence[step]]

    def reordered(self, sequence: Sequence[int]) -> Order:
        """Return the same batches in another sequence.

        Args:
            sequence: a permutation of this order's sequence.

        Returns:
            The new order, with the same recipe.

        Raises:
            UsageError: if `sequence` is not a permutation of this order's sequence.

        Example:
            >>> Order((("a",), ("b",)), (0, 1)).reordered([1, 0])[0]
            ('b',)

        """
        check_permutation(sequence, self.sequence)
        return replace(self, sequence=tuple(int(b) for b in sequence))

    def save(self, path: files.PathLike) -> None:
        """Write the order to a file, whole or not at all.

        Args:
            path: file to write, usually `*.npz`.

        Raises:
            EnvironmentProblem: if the file system reports an error, such as a full disk.

        """
        arrays: dict[str, NDArray[Any]] = {
            "format": np.asarray(_FORMAT, np.int64),
            "ids": _packed([i for batch in self.batches for i in batch]),
            "sizes": np.array([len(batch) for batch in self.batches], dtype=np.int64),
            "sequence": np.array(self.sequence, dtype=np.int64),
            "recipe": _packed(self.recipe),
        }
        files.write_bytes(path, write_npz(arrays | {"digest": _packed(_digest(arrays))}))

    @classmethod
    def load(cls, path: files.PathLike) -> Order:
        """Read a file that `save` wrote, using memory proportional to its size.

        Args:
            path: file to read.

        Returns:
            The order.

        Raises:
            DataError: if the file is missing, damaged, edited, or has another format (a ValueError inside becomes one).

        """
        raw = files.read_bytes(path, limit=_LIMIT)
        try:
            saved = read_npz(raw)
            version = int(saved["format"])
            if version not in (1, _FORMAT):
                raise DataError(f"order {path}: format {version}, this version reads {_FORMAT}")
            sizes, sequence = saved["sizes"], saved["sequence"]
            if sizes.ndim != 1 or sequence.ndim != 1 or sizes.dtype.kind not in "iu" or sequence.dtype.kind not in "iu":
                raise ValueError("sizes and sequence must be lists of whole numbers")
            recipe = None
            if version == 1:
                ids = saved["ids"].tolist()
            else:
                digest = _unpacked(saved.pop("digest"))
                if digest != _digest(saved):
                    raise ValueError("its digest does not match: it was damaged or edited")
                ids, recipe = _unpacked(saved["ids"]), _unpacked(saved["recipe"])
            if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
                raise ValueError("ids must be a list of strings")
            if not isinstance(recipe, dict | None):
                raise ValueError("its recipe is not a mapping")
            if (len(sizes) and (sizes.min() < 0 or sizes.max() > len(ids))) or int(sizes.sum()) != len(ids):
                raise ValueError(f"{len(ids)} ids do not match the sizes of its batches")
            ends = np.cumsum(sizes).tolist()
            batches = tuple(tuple(ids[end - size : end]) for size, end in zip(sizes.tolist(), ends, strict=True))
            return cls(batches, tuple(sequence.tolist()), recipe)
        except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"order {path}: not an order that datatools wrote ({what}); create it again") from error


def _packed(value: Any) -> NDArray[np.uint8]:
    """Encode a plain value as JSON bytes: an array of strings would use the longest one's size for each."""
    return np.frombuffer(json.dumps(value, allow_nan=False).encode(), dtype=np.uint8)


def _unpacked(array: NDArray[Any]) -> Any:
    if array.dtype != np.uint8:
        raise ValueError(f"text must be stored as bytes (uint8), not as {array.dtype}")
    return json.loads(array.tobytes())


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    described = [[name, str(array.dtype), list(array.shape)] for name, array in sorted(arrays.items())]
    parts = [json.dumps(described).encode(), *(array.tobytes() for _, array in sorted(arrays.items()))]
    return files.digest(b"".join(parts))


def check_permutation(sequence: Sequence[int], of: Sequence[int]) -> None:
    """Check that `sequence` contains every batch as often as `of` does.

    Args:
        sequence: batch numbers.
        of: the reference sequence.

    Raises:
        UsageError: if it does not; the message names the first batch that differs.

    """
    if len(sequence) != len(of):
        raise UsageError(f"order: {len(sequence)} steps, the reference has {len(of)}; an order is a permutation of it")
    have, want = Counter(int(b) for b in sequence), Counter(int(b) for b in of)
    if have != want:
        batch = min(b for b in have.keys() | want.keys() if have[b] != want[b])
        raise UsageError(
            f"order: batch {batch} appears {have[batch]} times, but {want[batch]} times in the reference; an order is "
            "a permutation of it"
        )
