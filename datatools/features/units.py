"""The payload of one unit of a feature store: a safetensors file of `features`, `norms` and, for integers, `scale`."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools import files
from datatools.features.encodings import ENCODINGS, decode, encode, normalize

STATUSES = ("ok", "empty", "nonfinite")
_ENCODE_ROWS = 1024  # rows encoded at a time: 32 MiB of float32 at dim 8192


class Damaged(Exception):
    """A unit's files are not what was written; the text says which file and why."""


class View:
    """One unit's payload, mapped."""

    def __init__(
        self, mapped: mmap.mmap, start: int, n: int, dim: int, dtype: str, status: Mapping[str, Sequence[int]]
    ) -> None:
        encoding = ENCODINGS[dtype]
        self._mapped, self._dim, self._dtype = mapped, dim, dtype
        width = encoding.width(dim)
        itemsize = np.dtype(encoding.element).itemsize
        self._start, self._stride = start, width * itemsize
        self._stored = np.frombuffer(mapped, encoding.element, n * width, start).reshape(n, width)
        tail = start + n * width * itemsize
        # copied: after rows of odd length float32 values are not aligned
        self.norms = torch.from_numpy(np.frombuffer(mapped[tail : tail + 4 * n], "<f4").copy())
        scale = mapped[tail + 4 * n : tail + 8 * n] if encoding.levels else np.ones(n, dtype="<f4").tobytes()
        self._scale = np.frombuffer(scale, "<f4")
        self.status = ["ok"] * n
        for state, rows in status.items():
            for row in rows:
                self.status[row] = state

    def features(self, rows: slice | NDArray[np.int64]) -> Tensor:
        """float32 [rows, dim], unit rows or zeros."""
        return decode(self._stored[rows], self._scale[rows], self._dtype, self._dim)

    def release(self, rows: slice) -> None:
        """Let the kernel drop the pages of rows that were read, so that memory stays flat."""
        if hasattr(mmap, "MADV_DONTNEED"):
            begin = (self._start + rows.start * self._stride) // mmap.PAGESIZE * mmap.PAGESIZE
            end = self._start + rows.stop * self._stride  # a last block that is shorter: madvise stops at the end
            self._mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Release the file."""
        del self._stored  # arrays into the map would keep it from closing
        self._mapped.close()


def header(dtype: str, dim: int, n: int) -> bytes:
    """The safetensors header of a unit; padded with spaces so that the features start at a multiple of 64 bytes."""
    encoding = ENCODINGS[dtype]
    width = encoding.width(dim)
    end = n * width * np.dtype(encoding.element).itemsize
    tensors = {
        "features": {"dtype": encoding.tensor, "shape": [n, width], "data_offsets": [0, end]},
        "norms": {"dtype": "F32", "shape": [n], "data_offsets": [end, end + 4 * n]},
    }
    if encoding.levels:
        tensors["scale"] = {"dtype": "F32", "shape": [n], "data_offsets": [end + 4 * n, end + 8 * n]}
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def payload_bytes(dtype: str, dim: int, n: int) -> int:
    """The size of a payload."""
    encoding = ENCODINGS[dtype]
    row = encoding.width(dim) * np.dtype(encoding.element).itemsize + (8 if encoding.levels else 4)
    return len(header(dtype, dim, n)) + n * row


def pieces(features: Tensor, states: list[str], dtype: str) -> Iterator[bytes]:
    """The bytes of a payload, a part of the rows at a time.

    Args:
        features: [n, dim] of any floating dtype, not normalized.
        states: [n] of `STATUSES`; an "ok" of a row that is zero or not finite is corrected in place.
        dtype: a key of `ENCODINGS`.

    """
    n, dim = features.shape
    norms, scales = np.zeros(n, dtype="<f4"), np.zeros(n, dtype="<f4")
    yield header(dtype, dim, n)
    for start in range(0, n, _ENCODE_ROWS):
        part = slice(start, start + _ENCODE_ROWS)
        rows, norm = normalize(features[part].detach().to("cpu", torch.float32).numpy())
        for i in np.flatnonzero(~(norm > 0) | ~np.isfinite(norm)).tolist():
            if states[start + i] == "ok":
                states[start + i] = "empty" if norm[i] == 0 else "nonfinite"
        bad = np.array([state != "ok" for state in states[part]], dtype=bool)
        rows[bad], norm[bad] = 0, 0
        stored, scales[part] = encode(rows, dtype)
        norms[part] = norm
        yield stored.tobytes()
    yield norms.tobytes()
    if ENCODINGS[dtype].levels:
        yield scales.tobytes()


def check(path: Path, wanted: Mapping[str, Any]) -> None:
    """Compare a whole payload with its size and digest in the sidecar. Raises: Damaged."""
    try:
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise Damaged(f"{path.name} has {size} bytes instead of {wanted['bytes']}")
        if files.digest_file(path) != wanted["xxh3"]:
            raise Damaged(f"{path.name}: its digest does not match {path.with_suffix('.json').name}")
    except FileNotFoundError:
        raise Damaged(f"{path.name} is gone") from None
    except OSError as error:
        raise files.explain(error, path, "read") from error


@contextmanager
def mapped(path: Path, n: int, dim: int, dtype: str, status: Mapping[str, Sequence[int]]) -> Iterator[View]:
    """The payload at `path`, mapped into memory.

    Args:
        path: of the payload.
        n: number of rows.
        dim: number of features.
        dtype: a key of `ENCODINGS`.
        status: rows that are not "ok", by their status.

    Raises:
        Damaged: It is gone, or does not hold such tensors.

    """
    first, size = header(dtype, dim, n), payload_bytes(dtype, dim, n)
    if not path.exists():
        raise Damaged(f"{path.name} is gone")
    with files.open_file(path) as file:
        if os.fstat(file.fileno()).st_size != size or file.read(len(first)) != first:
            raise Damaged(f"{path.name} does not hold the tensors that plan.json describes")
        try:
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise files.explain(error, path, "read") from error
    view = View(memory, len(first), n, dim, dtype, status)
    try:
        yield view
    finally:
        view.close()
