"""Triton kernel of the sparse Johnson-Lindenstrauss transform of gradients or of Adam's directions.

Hashes are computed in registers.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from optim import backend

_BLOCK = 512


class Adam(NamedTuple):
    """Parameters of AdamW's direction for a gradient g: ``scale m' / (sqrt(shrink v' + eps_root) + eps)``, with
    m' = b1 m + (1 - b1) g and v' = b2 v + (1 - b2) g^2.

    Attributes:
        exp_avg: first moment m, float32 [*shape].
        exp_avg_sq: second moment v, float32 [*shape].
        betas: b1 and b2.
        scale: bias correction of m'.
        shrink: bias correction of v'.
        eps: added to the root.
        eps_root: added under the root.

    """

    exp_avg: Float32[Tensor, "*shape"]
    exp_avg_sq: Float32[Tensor, "*shape"]
    betas: tuple[float, float]
    scale: float
    shrink: float
    eps: float
    eps_root: float


def fits(out: Float[Tensor, "b dim"], grad: Shaped[Tensor, " b *shape"], adam: Adam | None = None) -> bool:
    """Return whether the kernel supports these tensors.

    They must be contiguous and on a GPU, and torch must not be set to deterministic algorithms: sums by atomic
    additions have no fixed order, as in torch's `index_add_` on a GPU.

    Args:
        out: features, float32 [b, dim].
        grad: gradients, any floating dtype [b, *shape].
        adam: moments of the parameter, float32 [*shape], if directions are wanted.

    Returns:
        Whether `add_sjlt` may be called.

    """
    moments = () if adam is None else (adam.exp_avg, adam.exp_avg_sq)
    return (
        backend.use_triton(out, grad, *moments)
        and not torch.are_deterministic_algorithms_enabled()
        and out.dtype == torch.float32
        and grad.is_floating_point()
        and all(t.dtype == torch.float32 and t.shape == grad.shape[1:] for t in moments)
        and all(t.is_contiguous() for t in (out, grad, *moments))
    )


def add_sjlt(
    out: Float32[Tensor, "b dim"], grad: Float[Tensor, " b *shape"], key: int, adam: Adam | None = None
) -> None:
    """Add the signed bucket sums of gradients, or of Adam's directions for these gradients, to `out`.

    The definition is `SJLT.accumulate` of `AdamWRule.update`, coordinate by coordinate with `projectors.base.bits`. The
    kernel reads each gradient once (and the moments once for all b rows) and adds it once to memory; hashes, signs and
    directions are not stored. Its speed is limited by the additions: one per coordinate and row, at random addresses.

    Args:
        out: float32 [b, dim], changed in place.
        grad: any floating dtype [b, *shape].
        key: result of `projectors.base.key`.
        adam: None projects the gradients themselves.

    """
    b, dim = out.shape
    n = grad[0].numel() if b else 0
    moments = (grad, grad) if adam is None else (adam.exp_avg, adam.exp_avg_sq)
    b1, b2 = (0.0, 0.0) if adam is None else adam.betas
    rest = (1.0, 1.0, 0.0, 0.0) if adam is None else adam[3:]
    backend.launch(
        _sjlt_kernel,
        (-(-n // _BLOCK),),
        out,
        grad,
        *moments,
        key,
        b,
        n,
        dim,
        *map(float, (b1, 1 - b1, b2, 1 - b2, *rest)),
        ADAM=adam is not None,
        POWER=dim & (dim - 1) == 0,
        BLOCK=_BLOCK,
        device=out.device,
    )


if backend.triton is not None:
    import triton.language as tl

    @backend.jit
    def _bits(counter, key):
        """`projectors.base.bits`: splitmix64 in int64, whose right shifts copy the sign."""
        z = (counter + 1) * -7046029254386353131 + key
        z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
        z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
        return z ^ ((z >> 31) & 0x1FFFFFFFF)

    @backend.jit
    def _sjlt_kernel(
        out,
        grad,
        exp_avg,
        exp_avg_sq,
        key: tl.int64,
        rows,
        n,
        dim,
        b1,
        w1,
        b2,
        w2,
        scale,
        shrink,
        eps,
        eps_root,
        ADAM: tl.constexpr,
        POWER: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        z = _bits(i, key)
        sign = 1.0 - 2.0 * (z & 1).to(tl.float32)
        bucket = (z >> 1) & 0x3FFFFFFFFFFFFFFF
        if POWER:
            bucket = bucket & (dim - 1)
        else:
            bucket = bucket % dim
        if ADAM:
            m = b1 * tl.load(exp_avg + i, mask=inside, other=0.0)
            v = b2 * tl.load(exp_avg_sq + i, mask=inside, other=1.0)
        for r in range(rows):
            row = tl.full((), r, tl.int64)
            g = tl.load(grad + row * n + i, mask=inside, other=0.0).to(tl.float32)
            if ADAM:
                g = scale * (m + w1 * g) / (tl.sqrt_rn(shrink * (v + w2 * g * g) + eps_root) + eps)
            tl.atomic_add(out + row * dim + bucket, sign * g, mask=inside, sem="relaxed")
