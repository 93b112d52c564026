"""Rows or columns scaled to unit root mean square: the inner step of SinkGD and SCALE."""

import torch
from jaxtyping import Float
from torch import Tensor

from optim import backend

_TILE = 64


def unit_rms(x: Float[Tensor, "*k m n"], dim: int, eps: float) -> Float[Tensor, "*k m n"]:
    """Return x / max(rms, eps) for matrices that `fits`, with the rms of each row or column in float32.

    The definition is `optim.linalg.unit_rms`. For rows there is one program per row, which reads it twice (the second
    time from the cache) and writes it once. For columns, one kernel sums the squares of tiles of 64 rows, and another
    one divides, so that entries are read twice and written once.

    Args:
        x: Matrices [..., m, n] of 32 or 16 bits.
        dim: -1 for rows, -2 for columns.
        eps: The smallest divisor.

    Returns:
        A tensor of x's shape and dtype.

    Cost:
        In float32 8 bytes per entry for rows, and 12 for columns. Bound by memory.
    """
    m, n = x.shape[-2:]
    y, matrices = torch.empty_like(x), x.numel() // (m * n)
    if dim == -1:
        block = min(4096, max(16, backend.triton.next_power_of_2(n)))
        backend.launch(_rows_kernel, (matrices * m,), x, y, n, float(eps), BLOCK=block, device=x.device)
        return y
    tiles = -(-m // _TILE)
    sums = torch.empty(matrices, tiles, n, device=x.device)
    grid = (-(-n // _TILE), tiles, matrices)
    backend.launch(_column_sums_kernel, grid, x, sums, m, n, tiles, TILE=_TILE, BLOCK=_TILE, device=x.device)
    scales = (sums.sum(1) / m).sqrt_().clamp_(min=eps)  # [matrices, n], small compared with [m, n]
    backend.launch(_divide_columns_kernel, grid, x, scales, y, m, n, TILE=_TILE, BLOCK=_TILE, device=x.device)
    return y


def fits(x: Tensor, dim: int) -> bool:
    """Return whether the kernel supports a tensor.

    Args:
        x: The tensor.
        dim: The dimension along which it is normalised.

    Returns:
        True for rows or columns of contiguous matrices of 32 or 16 bits on a GPU.
    """
    return (
        dim in (-1, -2)
        and backend.use_triton(x)
        and x.ndim >= 2
        and x.is_floating_point()
        and x.is_contiguous()
        and 0 < x.numel()
        and x.numel() // x.shape[-1] < 1 << 31
        and (dim == -1 or (x.shape[-2] < _TILE << 16 and x.numel() // (x.shape[-1] * x.shape[-2]) < 1 << 16))
    )


if backend.triton is not None:
    import triton.language as tl

    @backend.jit
    def _rows_kernel(x, y, n, eps, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * n  # int64: a stack may have more than 2^31 entries
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, n, BLOCK):
            j = start + tl.arange(0, BLOCK)
            value = tl.load(x + row + j, mask=j < n, other=0.0).to(tl.float32)
            total += value * value
        rms = tl.maximum(tl.sqrt_rn(tl.sum(total) / n), eps)
        for start in range(0, n, BLOCK):
            j = start + tl.arange(0, BLOCK)
            value = tl.load(x + row + j, mask=j < n, other=0.0).to(tl.float32)
            tl.store(y + row + j, (value / rms).to(y.dtype.element_ty), mask=j < n)

    @backend.jit
    def _tile(m, n, TILE: tl.constexpr, BLOCK: tl.constexpr):
        """Return the offsets of this program's tile, which of them are inside the matrix, and its columns."""
        i = tl.program_id(1) * TILE + tl.arange(0, TILE)
        j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = tl.program_id(2).to(tl.int64) * m * n + i[:, None].to(tl.int64) * n + j[None, :]
        return at, (i < m)[:, None] & (j < n)[None, :], j

    @backend.jit
    def _column_sums_kernel(x, sums, m, n, tiles, TILE: tl.constexpr, BLOCK: tl.constexpr):
        at, inside, j = _tile(m, n, TILE, BLOCK)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        line = (tl.program_id(2).to(tl.int64) * tiles + tl.program_id(1)) * n
        tl.store(sums + line + j, tl.sum(value * value, axis=0), mask=j < n)

    @backend.jit
    def _divide_columns_kernel(x, scales, y, m, n, TILE: tl.constexpr, BLOCK: tl.constexpr):
        at, inside, j = _tile(m, n, TILE, BLOCK)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + tl.program_id(2).to(tl.int64) * n + j, mask=j < n, other=1.0)
        tl.store(y + at, (value / scale[None, :]).to(y.dtype.element_ty), mask=inside)
