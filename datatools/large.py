"""Matrices with one row per row of a pool: in memory while they are small, beyond that in an unnamed file."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from datatools import files

LARGE = 64 << 20
"""Bytes; larger matrices are kept in a file, and worked on in blocks of this size."""
_maps: dict[int, mmap.mmap] = {}  # address -> the map of a matrix in a file


def table(n: int, m: int, folder: Path | None = None) -> Float32[Tensor, "n m"]:
    """Return a matrix of zeros.

    Args:
        n: The number of rows.
        m: The number of columns.
        folder: A folder on the disk that takes the file, which has no name and vanishes with the matrix; by default,
            and if it cannot be written to, that for temporary files.

    Returns:
        float32 [n, m].

    Raises:
        EnvironmentProblem: The disk has not enough space.

    Example:
        >>> table(2, 3).shape
        torch.Size([2, 3])

    """
    size = 4 * n * m
    if size <= LARGE:
        return torch.zeros(n, m)
    place = writable(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # so that no write can fail later
            else:  # macOS
                os.truncate(file.fileno(), size)
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise files.explain(error, place, "write") from error
    array = np.frombuffer(mapped, np.float32)
    address = array.ctypes.data
    _maps[address] = mapped
    weakref.finalize(array, _maps.pop, address, None)
    return torch.from_numpy(array).reshape(n, m)


def writable(folder: Path | None) -> Path:
    """Return a folder for temporary files: the given one, unless it cannot be written to, as that of a shared run.

    Args:
        folder: The folder; None is the default one.

    Returns:
        The folder.

    Example:
        >>> writable(Path("/a/missing/folder")) == Path(tempfile.gettempdir())
        True

    """
    return folder if folder is not None and os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def blocks(matrix: Float[Tensor, "n m"]) -> Iterator[slice]:
    """Yield consecutive rows in blocks; a small matrix is one block. What was read of a file leaves memory.

    Args:
        matrix: [n, m].

    Yields:
        Rows.

    Example:
        >>> list(blocks(torch.zeros(5, 2)))
        [slice(0, 5, None)]

    """
    n = len(matrix)
    step = n if 4 * matrix.numel() <= LARGE else max(1, LARGE // (4 * matrix.shape[1]))
    for start in range(0, n, max(1, step)):
        yield slice(start, min(n, start + step))
        release(matrix)


def release(matrix: Float[Tensor, "n m"]) -> None:
    """Let the kernel drop the pages of a matrix in a file; they are read again when they are needed.

    Args:
        matrix: A result of `table`.
    """
    mapped = _maps.get(matrix.untyped_storage().data_ptr()) if matrix.numel() else None
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def taken(matrix: Float[Tensor, "n m"], rows: Int64[Tensor, " k"]) -> Float[Tensor, "k m"]:
    """Return some rows of a matrix in another order, as `matrix[rows]`.

    Args:
        matrix: float32 [n, m].
        rows: int64 [k].

    Returns:
        [k, m], in a file if it is large.

    Example:
        >>> taken(torch.tensor([[1.0], [2.0]]), torch.tensor([1])).tolist()
        [[2.0]]

    """
    if 4 * len(rows) * matrix[0:1].numel() <= LARGE:
        return matrix[rows]
    found = table(len(rows), matrix.shape[1])
    for block in blocks(found):
        found[block] = matrix[rows[block]].float()
        release(matrix)
    return found
