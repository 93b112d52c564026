"""AdamW in one pass over memory: all tensors of a param group in one launch."""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from optim import backend
from optim.kernels import philox, tables

_CHUNK = 1024
_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")
SEED = 0x5DEECE66D  # the seed of the rounding bits, an arbitrary number
MASTER = {torch.float32, torch.bfloat16, torch.float16}
"""The dtypes of parameters and gradients that the kernels of steps support."""


Row = tuple[Tensor, Tensor, Tensor, Tensor]
"""Parameter, gradient, m, v."""


class Scalars(NamedTuple):
    """The numbers of one tensor's step: ``u = scale m / (sqrt(shrink v + eps_root) + eps)`` with the updated moments.

    Args:
        scale: The factor of m.
        shrink: The factor of v.
        step: The number of the step, which determines the rounding bits.
    """

    scale: float
    shrink: float
    step: int


def rounding_words(param: Tensor, step: Tensor, *, start: int = 0) -> Tensor:
    """Return the random bits with which a step rounds a bfloat16 parameter.

    They depend only on the step and the position of the element.

    Args:
        param: The parameter, or a piece of one.
        step: The number of the step, a scalar.
        start: The index of the entry at which the piece begins.

    Returns:
        32 random bits per entry, int64 [n].
    """
    return philox.random_words(param.numel(), seed=SEED, stream=int(step), start=start, device=param.device)


def adamw_step(
    rows: Sequence[Row],
    scalars: Sequence[Scalars],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    eps_root: float = 0.0,
    stochastic_rounding: bool = False,
) -> None:
    """Step tensors by AdamW in place, in one launch per combination of dtypes.

        m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
        p <- p - lr (u + weight_decay p),  u = scale m / (sqrt(shrink v + eps_root) + eps)

    The definition is `AdamWRule.step`, which writes the result of `stepped`.

    Args:
        rows: Parameters, gradients and moments that are `fitting`.
        scalars: The numbers of each tensor's step.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the square root.
        eps_root: Added under the square root.
        stochastic_rounding: Whether bfloat16 parameters are rounded by `philox.stochastic_round` with `rounding_words`.

    Cost:
        28 bytes per float32 parameter (reads p, g, m, v; writes p, m, v), 22 with bfloat16 parameters and gradients,
        and no temporaries. Bound by memory.
    """
    pools: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for i, (p, g, _, _) in enumerate(rows):
        pools.setdefault((p.device, p.dtype, g.dtype), []).append(i)
    for (device, p_dtype, g_dtype), index in pools.items():
        pool = [rows[i] for i in index]
        addresses = [list(map(Tensor.data_ptr, row)) for row in pool]
        sizes = [row[0].numel() for row in pool]
        plan = tables.chunks(tuple(sizes), _CHUNK, device)
        table = [[*a, n, scalars[i].step] for a, n, i in zip(addresses, sizes, index, strict=True)]
        torch.autograd.graph.increment_version([t for p, _, m, v in pool for t in (p, m, v)])
        backend.launch(
            _adamw_kernel,
            (len(plan),),
            tables.on_device(table, torch.int64, device),
            tables.on_device([scalars[i][:2] for i in index], torch.float32, device),
            plan,
            *map(float, (lr, weight_decay, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps, eps_root)),
            SEED,
            P=backend.triton_dtype(p_dtype),
            G=backend.triton_dtype(g_dtype),
            ALIGNED=tables.aligned(addresses),
            DECAY=weight_decay != 0,
            STOCHASTIC=stochastic_rounding and p_dtype == torch.bfloat16,
            BLOCK=_CHUNK,
            device=device,
        )


def fitting(rows: Sequence[Row]) -> list[bool]:
    """Return which tensors the kernel supports.

    They must be plain and contiguous on a GPU, so that flat memory has equal coordinates at equal positions, and have
    float32 moments.

    Args:
        rows: Parameters, gradients and moments.

    Returns:
        A boolean per row.
    """
    if len(rows) > 1 and _fit(rows):  # the usual case, without a loop over many rows
        return [True] * len(rows)
    return [_fit([row]) for row in rows]


def _fit(rows: Sequence[Row]) -> bool:
    params, grads, *moments = zip(*rows, strict=True)
    tensors = [t for row in rows for t in row]
    shapes = list(map(_SHAPE, params))
    return (
        backend.use_triton(*tensors)
        and set(map(_DTYPE, params + grads)) <= MASTER
        and all(set(map(_DTYPE, column)) == {torch.float32} for column in moments)
        and all(list(map(_SHAPE, column)) == shapes for column in (grads, *moments))
        and all(map(Tensor.is_contiguous, tensors))
    )


if backend.triton is not None:
    import triton.language as tl

    from optim.kernels.philox import stochastic_bfloat16, words_of

    @backend.jit
    def _adamw_kernel(
        table,
        factors,
        chunks,
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
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        tensor = tl.load(chunks + 2 * program)
        start = tl.multiple_of(tl.load(chunks + 2 * program + 1), BLOCK)
        row = table + 6 * tensor
        p_ptr = tl.load(row).to(tl.pointer_type(P))
        g_ptr = tl.load(row + 1).to(tl.pointer_type(G))
        m_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        v_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
            m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        count = tl.load(row + 4)
        step = tl.load(row + 5)
        scale = tl.load(factors + 2 * tensor)
        shrink = tl.load(factors + 2 * tensor + 1)
        # a mask, even one that is all true, would prevent reads of 16 bytes at a time
        if start + BLOCK <= count:
            _adamw_chunk(
                p_ptr,
                g_ptr,
                m_ptr,
                v_ptr,
                start,
                count,
                step,
                scale,
                shrink,
                lr,
                weight_decay,
                b1,
                w1,
                b2,
                w2,
                eps,
                eps_root,
                seed,
                False,
                DECAY,
                STOCHASTIC,
                BLOCK,
            )
        else:
            _adamw_chunk(
                p_ptr,
                g_ptr,
                m_ptr,
                v_ptr,
                start,
                count,
                step,
                scale,
                shrink,
                lr,
                weight_decay,
                b1,
                w1,
                b2,
                w2,
                eps,
                eps_root,
                seed,
                True,
                DECAY,
                STOCHASTIC,
                BLOCK,
            )

    @backend.jit
    def _adamw_chunk(
        p_ptr,
        g_ptr,
        m_ptr,
        v_ptr,
        start,
        count,
        step,
        scale,
        shrink,
        lr,
        weight_decay,
        b1,
        w1,
        b2,
        w2,
        eps,
        eps_root,
        seed,
        MASKED: tl.constexpr,
        DECAY: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i = start + tl.arange(0, BLOCK)  # int64: a tensor may have more than 2^31 elements
        mask = i < count if MASKED else None
        p = tl.load(p_ptr + i, mask=mask).to(tl.float32)
        g = tl.load(g_ptr + i, mask=mask).to(tl.float32)
        m = tl.load(m_ptr + i, mask=mask)
        v = tl.load(v_ptr + i, mask=mask)
        m = b1 * m + w1 * g
        v = b2 * v + w2 * g * g
        u = scale * m / (tl.sqrt_rn(shrink * v + eps_root) + eps)
        if DECAY:
            u += weight_decay * p
        p -= lr * u
        tl.store(m_ptr + i, m, mask=mask)
        tl.store(v_ptr + i, v, mask=mask)
        if STOCHASTIC:
            tl.store(p_ptr + i, stochastic_bfloat16(p, words_of(start, seed, step, BLOCK)), mask=mask)
        else:
            tl.store(p_ptr + i, p.to(p_ptr.dtype.element_ty), mask=mask)
