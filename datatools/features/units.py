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
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from datatools import files
from datatools.features.encodings import ENCODINGS, decode, encode, normalize

STATUSES = ("ok", "empty", "nonfinite")
_ENCODE_ROWS = 1024  # rows encoded at a time: 32 MiB of float32 at dim 8192


class Damaged(Exception):
    """The files of a unit are not what was written; the message says which file and why."""


class View:
    """One unit's payload, mapped into memory.

    Args:
        mapped: the memory map of the file.
        start: offset of the first feature, in bytes.
        n: number of rows.
        dim: feature dimension.
        dtype: a key of `ENCODINGS`.
        status: the numbers of rows that are not "ok", by their status.

    """

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
        # copied, because float32 values after rows of odd length are not aligned
        self.norms = torch.from_numpy(np.frombuffer(mapped[tail : tail + 4 * n], "<f4").copy())
        scale = mapped[tail + 4 * n : tail + 8 * n] if encoding.levels else np.ones(n, dtype="<f4").tobytes()
        self._scale = np.frombuffer(scale, "<f4")
        self.status = ["ok"] * n
        for state, rows in status.items():
            for row in rows:
                self.status[row] = state

    def features(self, rows: slice | NDArray[np.int64]) -> Float[Tensor, "n dim"]:
        """Decode some rows.

        Args:
            rows: which rows of the unit.

        Returns:
            float32 [n, dim], rows of unit length or zero.

        """
        return decode(self._stored[rows], self._scale[rows], self._dtype, self._dim)

    def release(self, rows: slice) -> None:
        """Let the kernel drop the pages of rows that have been read, so that memory use stays constant.

        Args:
            rows: consecutive rows of the unit.

        """
        if hasattr(mmap, "MADV_DONTNEED"):
            begin = (self._start + rows.start * self._stride) // mmap.PAGESIZE * mmap.PAGESIZE
            end = self._start + rows.stop * self._stride  # may pass the end of the file, where madvise stops
            self._mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Close the memory map."""
        del self._stored  # the map cannot be closed while arrays refer to it
        self._mapped.close()


def header(dtype: str, dim: int, n: int) -> bytes:
    """Compose the safetensors header of a unit, padded with spaces so that features start at a multiple of 64 bytes.

    Args:
        dtype: a key of `ENCODINGS`.
        dim: feature dimension.
        n: number of rows.

    Returns:
        The first bytes of the file.

    """
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
    """Compute the size of a payload.

    Args:
        dtype: a key of `ENCODINGS`.
        dim: feature dimension.
        n: number of rows.

    Returns:
        Bytes.

    """
    encoding = ENCODINGS[dtype]
    row = encoding.width(dim) * np.dtype(encoding.element).itemsize + (8 if encoding.levels else 4)
    return len(header(dtype, dim, n)) + n * row


def pieces(features: Float[Tensor, "n dim"], states: list[str], dtype: str) -> Iterator[bytes]:
    """Encode a payload, some rows at a time.

    Args:
        features: floating dtype [n, dim], not normalized.
        states: [n] of `STATUSES`; the "ok" of a row that is zero or not finite is corrected in place.
        dtype: a key of `ENCODINGS`.

    Yields:
        The bytes of the file, in order.

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
    """Compare the size and digest of a payload with those in its sidecar.

    Args:
        path: the payload.
        wanted: its entry in the sidecar, with `bytes` and `xxh3`.

    Raises:
        Damaged: if they differ, or the payload is missing.
        EnvironmentProblem: if it cannot be read.

    """
    try:
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise Damaged(f"{path.name} has {size} bytes instead of {wanted['bytes']}")
        if files.digest_file(path) != wanted["xxh3"]:
            raise Damaged(f"{path.name}: its digest does not match {path.with_suffix('.json').name}")
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise files.explain(error, path, "read") from error


@contextmanager
def mapped(path: Path, n: int, dim: int, dtype: str, status: Mapping[str, Sequence[int]]) -> Iterator[View]:
    """Map the payload at `path` into memory.

    Args:
        path: the payload.
        n: number of rows.
        dim: feature dimension.
        dtype: a key of `ENCODINGS`.
        status: the numbers of rows that are not "ok", by their status.

    Yields:
        The view, which is closed at the end.

    Raises:
        Damaged: if the file is missing, or does not contain such tensors.

    """
    first, size = header(dtype, dim, n), payload_bytes(dtype, dim, n)
    if not path.exists():
        raise Damaged(f"{path.name} is missing")
    with files.open_file(path) as file:
        if os.fstat(file.fileno()).st_size != size or file.read(len(first)) != first:
            raise Damaged(f"{path.name} does not contain the tensors that plan.json describes")
        try:
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise files.explain(error, path, "read") from error
    view = View(memory, len(first), n, dim, dtype, status)
    try:
        yield view
    finally:
        view.close()
