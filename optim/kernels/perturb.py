"""In-place seeded perturbation: p += scale z, where z is drawn inside the kernel and never stored."""

from torch import Tensor

from optim import backend

_BLOCK = 1024


def add_normals_(target: Tensor, scale: float, seed: int, *, start: int = 0) -> None:
    """Add scaled normal numbers in place: target += scale z, in float32 and rounded once.

    z_i is element ``start + i`` of `philox.normals`; with it, ``target + scale z`` is the definition.

    Args:
        target: A tensor that `fits`.
        scale: The factor of z.
        seed: The seed of z, below 2^63.
        start: The index of the first element of z.

    Cost:
        The kernel only reads and writes the target: 8 bytes per float32 element, 4 per bfloat16 element. In float32 it
        is bound by memory, and in bfloat16 by the integer products of Philox (10 rounds for 4 elements).
    """
    n, shift = target.numel(), start % 4  # blocks of random words start at multiples of 4
    programs = -(-(n + shift) // _BLOCK)
    backend.launch(
        _perturb_kernel,
        (programs,),
        target,
        n,
        start - shift,
        shift,
        float(scale),
        seed,
        ALIGNED=shift == 0,
        BLOCK=_BLOCK,
        device=target.device,
    )


def fits(target: Tensor) -> bool:
    """Return whether the kernel supports a tensor.

    Args:
        target: The tensor.

    Returns:
        True if it is contiguous, has 32 or 16 bits, and is on a GPU.
    """
    return backend.use_triton(target) and target.is_contiguous() and target.is_floating_point()


if backend.triton is not None:
    import triton.language as tl

    from optim.kernels.philox import normals_of

    @backend.jit
    def _perturb_kernel(target, n, first, shift, scale, seed: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        z = normals_of(first + begin, seed, tl.full((), 0, tl.int32), BLOCK)
        i = begin + tl.arange(0, BLOCK)
        if not ALIGNED:
            i -= shift
        if ALIGNED and begin + BLOCK <= n:  # without a mask, 16 bytes are read at a time
            p = tl.load(target + i).to(tl.float32)
            tl.store(target + i, (p + scale * z).to(target.dtype.element_ty))
        else:
            mask = (i >= 0) & (i < n)
            p = tl.load(target + i, mask=mask).to(tl.float32)
            tl.store(target + i, (p + scale * z).to(target.dtype.element_ty), mask=mask)
