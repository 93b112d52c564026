"""In-place seeded perturbation: p += scale z, where z is drawn inside the kernel and never stored."""

from torch import Tensor

from optim import backend

_BLOCK = 1024


def add_normals_(target: Tensor, scale: float, seed: int, *, start: int = 0) -> None:
    """target += scale z, in place on a target that `fits`, in float32 and rounded once; seed: below 2^63.

    z_i is element ``start + i`` of `philox.normals`, which with ``target + scale z`` is the definition.
    Reads and writes the target and nothing else: 8 bytes per float32 element, 4 per bfloat16 one. Bound by memory in
    float32, and in bfloat16 by the integer products of Philox (10 rounds for 4 elements).
    """
    n, shift = target.numel(), start % 4  # blocks of random words begin at multiples of 4
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
    """Whether the kernel takes it: contiguous, of 32 or 16 bit, on a GPU."""
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
        if ALIGNED and begin + BLOCK <= n:  # without a mask memory is read 16 bytes at a time
            p = tl.load(target + i).to(tl.float32)
            tl.store(target + i, (p + scale * z).to(target.dtype.element_ty))
        else:
            mask = (i >= 0) & (i < n)
            p = tl.load(target + i, mask=mask).to(tl.float32)
            tl.store(target + i, (p + scale * z).to(target.dtype.element_ty), mask=mask)
