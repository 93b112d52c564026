"""Products that give symmetric matrices: half of the tiles are computed and mirrored, for Newton-Schulz."""

from typing import Any

import torch
from torch import Tensor

from optim import backend


def gram(x: Tensor, add: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Return alpha x x^T + beta add for stacks of matrices, summed in float32 and rounded once.

    The definition is ``torch.baddbmm(add, x, x.mT, beta=beta, alpha=alpha)``.

    Args:
        x: Matrices [n, p, q] that `fits`.
        add: Symmetric matrices [n, p, p] of x's dtype, or None; their upper triangle of tiles is not read.
        alpha: The factor of the product.
        beta: The factor of `add`.

    Returns:
        Matrices [n, p, p] of x's dtype.

    Cost:
        p^2 q FLOP plus the width of a tile, where a general product needs 2 p^2 q. In 16 bits about 2 (p q + p^2)
        bytes. Bound by the tensor cores for p above about 700, and by memory and the launch for smaller p.
    """
    if 1 not in x.stride()[1:]:
        x = x.contiguous()
    n, p, q = x.shape
    out = torch.empty(n, p, p, dtype=x.dtype, device=x.device)
    block, depth, warps = (128, 64, 8) if p > 64 else (64, 64, 4) if p > 16 else (16, 32, 1)
    if backend.interpreted:
        block, depth = 16, 32
    tiles = -(-p // block)
    half = tiles * (tiles + 1) // 2
    addend = out if add is None else add
    backend.launch(
        _gram_kernel,
        (half * n,),
        x,
        addend,
        out,
        p,
        q,
        half,
        *x.stride(),
        *addend.stride(),
        float(alpha),
        float(beta),
        ADD=add is not None,
        WIDE=backend.interpreted,
        BLOCK=block,
        DEPTH=depth,
        device=x.device,
        num_warps=warps,
        num_stages=3,
    )
    return out


@torch.library.custom_op("optim::gram_polynomial", mutates_args=())
def polynomial(x: Tensor, b: float, c: float) -> Tensor:
    """Return b A + c A A with A = x x^T, the inner part of a Newton-Schulz step.

    Because A is symmetric, A A = A A^T is such a product too. Under `torch.vmap` (steps of stacked matrices, directions
    of individual gradients) the batch becomes part of the stack.

    Args:
        x: Matrices [n, p, q] that `fits`.
        b: The factor of A.
        c: The factor of A A.

    Returns:
        Matrices [n, p, p] of x's dtype.
    """
    a = gram(x)
    return gram(a, a, alpha=c, beta=b)


@polynomial.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, b: float, c: float) -> tuple[Tensor, int]:
    assert in_dims[0] is not None
    stacks = x.movedim(in_dims[0], 0)
    return polynomial(stacks.flatten(0, 1), b, c).unflatten(0, stacks.shape[:2]), 0


def fits(x: Tensor) -> bool:
    """Return whether the kernel supports a tensor, also inside `torch.vmap`.

    In float32 the library's product is used, because without tensor cores computing half of the tiles does not halve
    the time.

    Args:
        x: The tensor.

    Returns:
        True for a stack of matrices in 16 bits on a GPU.
    """
    return x.ndim == 3 and x.dtype in (torch.bfloat16, torch.float16) and backend.use_triton(backend.unbatched(x))


if backend.triton is not None:
    import triton.language as tl

    @backend.jit
    def _gram_kernel(
        x,
        add,
        out,
        p,
        q,
        half,
        stride_n,
        stride_p,
        stride_q,
        add_n,
        add_p,
        add_q,
        alpha,
        beta,
        ADD: tl.constexpr,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        # tile k of the lower triangle is in row i = floor((sqrt(8 k + 1) - 1) / 2); the root may be off by one
        k = tl.program_id(0) % half
        i = ((tl.sqrt(8.0 * k + 1.0) - 1.0) / 2.0).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > k, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= k, i + 1, i)
        j = k - i * (i + 1) // 2
        matrix = (tl.program_id(0) // half).to(tl.int64)
        rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
        inner = tl.arange(0, DEPTH)
        left = x + matrix * stride_n + rows[:, None].to(tl.int64) * stride_p
        right = x + matrix * stride_n + columns[None, :].to(tl.int64) * stride_p
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(0, q, DEPTH):
            at = (start + inner).to(tl.int64)
            a = tl.load(left + at[None, :] * stride_q, mask=(rows < p)[:, None] & (at < q)[None, :], other=0.0)
            b = tl.load(right + at[:, None] * stride_q, mask=(at < q)[:, None] & (columns < p)[None, :], other=0.0)
            if WIDE:  # the interpreter would multiply the bit patterns of bfloat16
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total)
        total *= alpha
        inside = (rows < p)[:, None] & (columns < p)[None, :]
        here = rows[:, None].to(tl.int64)
        if ADD:
            given = tl.load(add + matrix * add_n + here * add_p + columns[None, :] * add_q, mask=inside, other=0.0)
            total += beta * given.to(tl.float32)
        value = total.to(out.dtype.element_ty)
        corner = out + matrix * p * p
        tl.store(corner + here * p + columns[None, :], value, mask=inside)
        if i != j:
            there = columns[:, None].to(tl.int64)
            tl.store(corner + there * p + rows[None, :], tl.trans(value), mask=tl.trans(inside))
