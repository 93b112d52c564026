"""AdamW with 8-bit moments in one pass over memory: decode, update, encode; all tensors in one launch."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from optim import backend
from optim.kernels import tables
from optim.kernels.adamw import MASTER, SEED, Scalars

Row = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""A parameter, its gradient, the codes and scales of m, and the codes and scales of v."""

_CHUNK = 1024


def adamw_8bit_step(
    rows: Sequence[Row],
    scalars: Sequence[Scalars],
    *,
    books: tuple[Tensor, Tensor],
    block_size: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    eps_root: float = 0.0,
    stochastic_rounding: bool = False,
    floor: bool = True,
) -> None:
    """Step tensors by AdamW with 8-bit moments in place, in one launch per combination of dtypes.

    The definition is `Quantized` around `AdamWRule` with dynamic codes: a moment is m = book[code] scale, where the
    scale is the largest magnitude of `block_size` consecutive entries, and it is encoded by the nearest code. A number
    halfway between two values of the book has the lower code. The parameter is updated with the moments before they are
    encoded.

    Args:
        rows: Tensors that `fits`.
        scalars: The numbers of each tensor's step.
        books: The signed dynamic book for m and the unsigned one for v, float32 [256] each. Their form gives a first
            guess of a code, and their limits decide.
        block_size: The number of consecutive entries that share a scale.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the square root.
        eps_root: Added under the square root.
        stochastic_rounding: Whether bfloat16 parameters are rounded stochastically, as in `adamw_step`.
        floor: Whether a positive second moment never has the code of zero.

    Cost:
        16.1 bytes per float32 parameter (reads p, g and both codes; writes p and both codes), 10.1 in bfloat16. Bound
        by memory; in bfloat16 also by six table look-ups per parameter.
    """
    pools: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for i, (p, g, *_) in enumerate(rows):
        pools.setdefault((p.device, p.dtype, g.dtype), []).append(i)
    size = max(_CHUNK, block_size)
    for (device, p_dtype, g_dtype), index in pools.items():
        pool = [rows[i] for i in index]
        addresses = [list(map(Tensor.data_ptr, row)) for row in pool]
        sizes = [row[0].numel() for row in pool]
        plan = tables.chunks(tuple(sizes), size, device)
        table = [[*a, n, scalars[i].step] for a, n, i in zip(addresses, sizes, index, strict=True)]
        torch.autograd.graph.increment_version([t for p, _, *state in pool for t in (p, *state)])
        backend.launch(
            _adamw_8bit_kernel,
            (len(plan),),
            tables.on_device(table, torch.int64, device),
            tables.on_device([scalars[i][:2] for i in index], torch.float32, device),
            plan,
            *_device_books(*books, device),
            *map(float, (lr, weight_decay, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps, eps_root)),
            SEED,
            P=backend.triton_dtype(p_dtype),
            G=backend.triton_dtype(g_dtype),
            ALIGNED=tables.aligned(addresses),
            DECAY=weight_decay != 0,
            STOCHASTIC=stochastic_rounding and p_dtype == torch.bfloat16,
            FLOOR=floor,
            BLOCKS=size // block_size,
            SIZE=block_size,
            device=device,
        )


def fits(row: Row, block_size: int) -> bool:
    """Return whether the kernel supports these tensors.

    Args:
        row: A parameter, its gradient, and the codes and scales of its moments.
        block_size: The number of consecutive entries that share a scale.

    Returns:
        True if they are contiguous, codes are uint8, and the block size is a power of 2 from 16 to 4096.
    """
    p, g, m, m_scales, v, v_scales = row
    return (
        backend.use_triton(*row)
        and 16 <= block_size <= 4096
        and block_size & (block_size - 1) == 0
        and p.dtype in MASTER
        and g.dtype in MASTER
        and m.dtype == v.dtype == torch.uint8
        and m_scales.dtype == v_scales.dtype == torch.float32
        and p.shape == g.shape == m.shape == v.shape
        and m_scales.shape == v_scales.shape == (-(-p.numel() // block_size),)
        and all(t.is_contiguous() for t in row)
    )


@lru_cache(maxsize=8)
def _device_books(m_book: Tensor, v_book: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the values and limits (halfway between values, in float32) of both books."""
    m_limits, v_limits = ((book[:-1] + book[1:]) / 2 for book in (m_book, v_book))
    return m_book.to(device), m_limits.to(device), v_book.to(device), v_limits.to(device)


if backend.triton is not None:
    import triton.language as tl

    from optim.kernels.philox import stochastic_bfloat16, words_of

    @backend.jit
    def _encode(
        x,
        limits,
        codes_ptr,
        scales_ptr,
        at,
        mask,
        block,
        exists,
        SIGNED: tl.constexpr,
        FLOOR: tl.constexpr,
        BLOCKS: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        """Write the codes and scales of x [BLOCKS, SIZE]; outside the tensor x is 0."""
        largest = tl.max(tl.abs(x), axis=1)
        y = tl.div_rn(x, tl.broadcast_to(tl.where(largest > 0, largest, 1.0)[:, None], (BLOCKS, SIZE)))
        # a guess by the book's form, seven decades of 1, 2, 4... (unsigned: 2, 4, 8...) values, off by at most one
        size = tl.maximum(tl.abs(y), 1e-9)
        decade = tl.minimum(tl.maximum(tl.floor(tl.log2(size) * 0.3010299956639812) + 7.0, 0.0), 6.0)
        count = (1 if SIGNED else 2) << decade.to(tl.int32)
        share = (size * tl.exp2((6.0 - decade) * 3.321928094887362) - 0.1) * (1 / 0.9)
        rank = tl.maximum(count + tl.floor(share * count.to(tl.float32)).to(tl.int32) - (0 if SIGNED else 1), 0)
        code = 127 + tl.where(y < 0, -rank, rank) if SIGNED else rank
        code = tl.minimum(tl.maximum(code, 0), 255)
        # the exact code is the number of limits below y
        lower = tl.load(limits + tl.maximum(code - 1, 0))
        code = tl.where((code > 0) & (y <= lower), code - 1, code)
        upper = tl.load(limits + tl.minimum(code, 254))
        code = tl.where((code < 255) & (y > upper), code + 1, code)
        if FLOOR:
            code = tl.maximum(code, (y > 0).to(tl.int32))
        tl.store(codes_ptr + at, code.to(tl.uint8), mask=mask)
        tl.store(scales_ptr + block, largest, mask=exists)

    @backend.jit
    def _adamw_8bit_kernel(
        table,
        factors,
        chunks,
        m_book,
        m_limits,
        v_book,
        v_limits,
        lr,
        weight_decay,
        b1,
        w1,
        b2,
        w2,
        eps,
        eps_root,
        seed,
        P: tl.constexpr,
        G: tl.constexpr,
        ALIGNED: tl.constexpr,
        DECAY: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        FLOOR: tl.constexpr,
        BLOCKS: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        tensor = tl.load(chunks + 2 * program)
        start = tl.multiple_of(tl.load(chunks + 2 * program + 1), BLOCKS * SIZE)
        row = table + 8 * tensor
        p_ptr = tl.load(row).to(tl.pointer_type(P))
        g_ptr = tl.load(row + 1).to(tl.pointer_type(G))
        m_ptr = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
        ms_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        v_ptr = tl.load(row + 4).to(tl.pointer_type(tl.uint8))
        vs_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
            m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        count = tl.load(row + 6)
        step = tl.load(row + 7)
        scale = tl.load(factors + 2 * tensor)
        shrink = tl.load(factors + 2 * tensor + 1)
        # a mask, even one that is all true, would prevent reads of 16 bytes at a time
        if start + BLOCKS * SIZE <= count:
            _adamw_8bit_chunk(
                p_ptr,
                g_ptr,
                m_ptr,
                ms_ptr,
                v_ptr,
                vs_ptr,
                start,
                count,
                scale,
                shrink,
                m_book,
                m_limits,
                v_book,
                v_limits,
                lr,
                weight_decay,
                b1,
                w1,
                b2,
                w2,
                eps,
                eps_root,
                seed,
                step,
                False,
                DECAY,
                STOCHASTIC,
                FLOOR,
                BLOCKS,
                SIZE,
            )
        else:
            _adamw_8bit_chunk(
                p_ptr,
                g_ptr,
                m_ptr,
                ms_ptr,
                v_ptr,
                vs_ptr,
                start,
                count,
                scale,
                shrink,
                m_book,
                m_limits,
                v_book,
                v_limits,
                lr,
                weight_decay,
                b1,
                w1,
                b2,
                w2,
                eps,
                eps_root,
                seed,
                step,
                True,
                DECAY,
                STOCHASTIC,
                FLOOR,
                BLOCKS,
                SIZE,
            )

    @backend.jit
    def _adamw_8bit_chunk(
        p_ptr,
        g_ptr,
        m_ptr,
        ms_ptr,
        v_ptr,
        vs_ptr,
        start,
        count,
        scale,
        shrink,
        m_book,
        m_limits,
        v_book,
        v_limits,
        lr,
        weight_decay,
        b1,
        w1,
        b2,
        w2,
        eps,
        eps_root,
        seed,
        step,
        MASKED: tl.constexpr,
        DECAY: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        FLOOR: tl.constexpr,
        BLOCKS: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        block = start // SIZE + tl.arange(0, BLOCKS)
        at = start + (tl.arange(0, BLOCKS) * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]  # int64
        mask = at < count if MASKED else None
        exists = block * SIZE < count if MASKED else None
        blank = 0 if MASKED else None
        p = tl.load(p_ptr + at, mask=mask).to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask).to(tl.float32)
        m = tl.load(m_book + tl.load(m_ptr + at, mask=mask, other=blank).to(tl.int32))
        v = tl.load(v_book + tl.load(v_ptr + at, mask=mask, other=blank).to(tl.int32))
        m = b1 * (m * tl.load(ms_ptr + block, mask=exists)[:, None]) + w1 * g
        v = b2 * (v * tl.load(vs_ptr + block, mask=exists)[:, None]) + w2 * g * g
        u = scale * m / (tl.sqrt_rn(shrink * v + eps_root) + eps)
        if DECAY:
            u += weight_decay * p
        p -= lr * u
        if STOCHASTIC:
            words = tl.reshape(words_of(start, seed, step, BLOCKS * SIZE), (BLOCKS, SIZE))
            tl.store(p_ptr + at, stochastic_bfloat16(p, words), mask=mask)
        else:
            tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=mask)
        if MASKED:  # memory after the tensor must not determine the scale of its last block
            m, v = tl.where(mask, m, 0.0), tl.where(mask, v, 0.0)
        _encode(m, m_limits, m_ptr, ms_ptr, at, mask, block, exists, True, False, BLOCKS, SIZE)
        _encode(v, v_limits, v_ptr, vs_ptr, at, mask, block, exists, False, FLOOR, BLOCKS, SIZE)
