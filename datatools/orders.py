"""An order of training: which examples stand in which batch, and which batch comes at which step."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datatools import files
from datatools.errors import DataError, UsageError

_FORMAT = 1


@dataclass(frozen=True)
class Order:
    """Batches and their sequence: step t trains on `batches[sequence[t]]`; epochs repeat batches.

    batches: n batches of example ids. sequence: T entries in 0..n-1.
    On disk an `.npz` without pickles: the ids, the size of each batch, the sequence.
    Raises: UsageError for an empty batch or an entry of the sequence that names no batch.
    """

    batches: tuple[tuple[str, ...], ...]
    sequence: tuple[int, ...]

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
        """The same batches in another sequence. Raises: UsageError unless it is a permutation of this one's."""
        check_permutation(sequence, self.sequence)
        return Order(self.batches, tuple(int(b) for b in sequence))

    def save(self, path: files.PathLike) -> None:
        """Write the file, whole or not at all."""
        arrays = {
            "format": np.int64(_FORMAT),
            "ids": np.array([i for batch in self.batches for i in batch], dtype=np.str_),
            "sizes": np.array([len(batch) for batch in self.batches], dtype=np.int64),
            "sequence": np.array(self.sequence, dtype=np.int64),
        }
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:  # as np.savez, but without the time: equal orders, equal bytes
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                    np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
        files.write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: files.PathLike) -> Order:
        """Read what `save` wrote. Raises: DataError when the file is missing, damaged or of another format."""
        raw = files.read_bytes(path)
        try:
            with np.load(io.BytesIO(raw), allow_pickle=False) as saved:
                version, ids, sizes, sequence = (saved[key] for key in ("format", "ids", "sizes", "sequence"))
            if int(version) != _FORMAT:
                raise DataError(f"order {path}: format {int(version)}, this version reads {_FORMAT}")
            if sizes.sum() != len(ids) or sizes.ndim != 1 or sequence.ndim != 1:
                raise ValueError(f"{len(ids)} ids for batches of {int(sizes.sum())}")
            ends = np.cumsum(sizes)
            batches = tuple(
                tuple(str(i) for i in ids[end - size : end]) for size, end in zip(sizes, ends, strict=True)
            )
            return cls(batches, tuple(sequence.tolist()))
        except (ValueError, KeyError, OSError, TypeError, EOFError, UsageError, zipfile.BadZipFile) as error:
            raise DataError(f"order {path}: not an order that datatools wrote ({error}); make it again") from error


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
