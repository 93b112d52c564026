"""An order of training: which examples stand in which batch, and which batch comes at which step."""

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

    On disk it is an `.npz` without pickles: the ids, the size of each batch, the sequence, the recipe, and a digest of
    these. It stands with the files because training reads it too, and `datatools.order` loads torch.

    Args:
        batches: n batches of example ids.
        sequence: T entries in 0..n-1.
        recipe: how the run trains that the order was made for, as plain values (JSON); None where it is not known.

    Raises:
        UsageError: for an empty batch, or an entry of the sequence that names no batch.

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
            what = f"batch {empty[0]} holds no example" if empty else "its sequence is empty"
            raise UsageError(f"order: {what}; every step trains on at least one example")
        wrong = [(t, b) for t, b in enumerate(self.sequence) if not 0 <= b < len(self.batches)]
        if wrong:
            raise UsageError(
                f"order: step {wrong[0][0]} names batch {wrong[0][1]}, and there are {len(self.batches)} batches, "
                f"0 to {len(self.batches) - 1}"
            )

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, step: int) -> tuple[str, ...]:
        """The ids of step `step`: random access, so that resuming needs no history."""
        return self.batches[self.sequence[step]]

    def reordered(self, sequence: Sequence[int]) -> Order:
        """The same batches in another sequence.

        Raises:
            UsageError: unless it is a permutation of this one's.

        Example:
            >>> Order((("a",), ("b",)), (0, 1)).reordered([1, 0])[0]
            ('b',)
        """
        check_permutation(sequence, self.sequence)
        return replace(self, sequence=tuple(int(b) for b in sequence))

    def save(self, path: files.PathLike) -> None:
        """Write the file, whole or not at all."""
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
        """Read what `save` wrote, in memory of the order of the file's size.

        Raises:
            DataError: when the file is missing, damaged, edited or of another format.
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
                    raise ValueError("it does not have the digest that it was written with: damaged or edited")
                ids, recipe = _unpacked(saved["ids"]), _unpacked(saved["recipe"])
            if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
                raise ValueError("ids must be a list of texts")
            if not isinstance(recipe, dict | None):
                raise ValueError("its recipe is no mapping")
            if (len(sizes) and (sizes.min() < 0 or sizes.max() > len(ids))) or int(sizes.sum()) != len(ids):
                raise ValueError(f"{len(ids)} ids for batches of other sizes")
            ends = np.cumsum(sizes).tolist()
            batches = tuple(tuple(ids[end - size : end]) for size, end in zip(sizes.tolist(), ends, strict=True))
            return cls(batches, tuple(sequence.tolist()), recipe)
        except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"order {path}: not an order that datatools wrote ({what}); make it again") from error


def _packed(value: Any) -> NDArray[np.uint8]:
    """A plain value as the bytes of its JSON: an array of texts would take the longest one's size for each."""
    return np.frombuffer(json.dumps(value, allow_nan=False).encode(), dtype=np.uint8)


def _unpacked(array: NDArray[Any]) -> Any:
    if array.dtype != np.uint8:
        raise ValueError(f"text is stored as bytes, and here is {array.dtype}")
    return json.loads(array.tobytes())


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    described = [[name, str(array.dtype), list(array.shape)] for name, array in sorted(arrays.items())]
    parts = [json.dumps(described).encode(), *(array.tobytes() for _, array in sorted(arrays.items()))]
    return files.digest(b"".join(parts))


def check_permutation(sequence: Sequence[int], of: Sequence[int]) -> None:
    """Raise UsageError unless `sequence` holds every batch as often as `of` does, saying which is wrong."""
    if len(sequence) != len(of):
        raise UsageError(f"order: {len(sequence)} steps, the reference has {len(of)}; an order is a permutation of it")
    have, want = Counter(int(b) for b in sequence), Counter(int(b) for b in of)
    if have != want:
        batch = min(b for b in have.keys() | want.keys() if have[b] != want[b])
        raise UsageError(
            f"order: batch {batch} comes {have[batch]} times and {want[batch]} times in the reference; an order is a "
            "permutation of it"
        )
