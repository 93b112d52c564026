"""Hessian-vector products."""

import re
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from optim.checks import check_choice
from optim.curvature.losses import Loss, Parts, add, norm_of, parts_of, private, refuse_sharded, scalar

_ONCE_ONLY = re.compile(r"not implemented|double backward|differentiate twice")
"""What torch's errors contain if an operation has no second derivative: kernels, torch.compile, once_differentiable."""


def hvp(
    loss_fn: Parts, params: Sequence[Tensor], vectors: Sequence[Tensor], *, method: str = "auto"
) -> list[Tensor | None]:
    """Return H v for each parameter, where H is the Hessian of the loss with respect to all `params` together.

    Args:
        loss_fn: A function that computes the loss, or several functions whose sum is the loss.
        params: The parameters, of any shapes.
        vectors: v, one tensor per parameter, of its shape.
        method: "exact" differentiates the gradient, with torch's math kernel for attention, because the fused kernels
            have no second derivative. "difference" is (g(p + d v) - g(p - d v)) / 2d, which works with any kernel, but
            has half the digits; parameters are changed and restored bit for bit. "auto" uses "difference" if an
            operation of the loss has no second derivative. (A custom `autograd.Function` with a once-differentiable
            backward does not report this: torch treats that part as linear, which is only noticed if no part of the
            gradient depends on a parameter.)

    Returns:
        One tensor per parameter, of its shape and in the moments' dtype; None if the loss does not depend on it.

    Cost:
        About three gradients, and the memory of a graph of the gradient; "difference" needs two gradients and a copy.

    Raises:
        ValueError: For an unsuitable loss, and for a difference with 16-bit parameters, which would be rounded away.
        RuntimeError: With "exact", if an operation of the loss has no second derivative.
        TypeError: For sharded parameters.

    Example:
        >>> from optim import curvature
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> curvature.hvp(lambda: (w**3).sum(), [w], [torch.ones(2)])
        [tensor([ 6., 12.])]
    """
    check_choice("curvature.hvp", ("auto", "exact", "difference"), method=method)
    refuse_sharded(params)
    with private(params):
        if method != "difference":
            try:
                return _exact(parts_of(loss_fn), params, vectors)
            except RuntimeError as error:
                if method == "exact" or not _ONCE_ONLY.search(str(error)):
                    raise
                warnings.warn(
                    f"curvature: the loss has no second derivative ({str(error).splitlines()[0]}); using finite "
                    "differences",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return _difference(parts_of(loss_fn), params, vectors)


def _exact(parts: Sequence[Loss], params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor | None]:
    total: list[Tensor | None] = [None] * len(params)
    for part in parts:
        with sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(scalar(part()), list(params), create_graph=True, allow_unused=True)
        used = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None and g.requires_grad]
        products: Sequence[Tensor | None] = [None] * len(params)
        if used:
            products = torch.autograd.grad([g for g, _ in used], list(params), [v for _, v in used], allow_unused=True)
        if all(h is None for h in products):  # zeros are correct for a linear loss, but not for kernels without a graph
            raise RuntimeError("second derivative not implemented: the gradient does not depend on any parameter")
        pairs = zip(grads, products, strict=True)
        add(total, [torch.zeros_like(g) if h is None and g is not None else h for g, h in pairs])
    return total


def _difference(parts: Sequence[Loss], params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor | None]:
    if any(p.dtype.itemsize < 4 for p in params):
        raise ValueError(
            "curvature: a finite difference with 16-bit parameters would be rounded away; use float32 parameters, or "
            "kernels with second derivatives (attn_implementation='sdpa' or 'eager', no torch.compile)"
        )
    size, length = norm_of(params), norm_of(vectors)
    relative = 1e-5 if all(p.dtype == torch.float64 for p in params) else 1e-3
    delta = relative * (size or 1.0) / (length or 1.0)
    kept = [p.detach().clone() for p in params]
    sides: list[list[Tensor | None]] = []
    try:
        for sign in (1, -1):
            with torch.no_grad():
                for p, start, v in zip(params, kept, vectors, strict=True):
                    p.copy_(start + sign * delta * v)
            total: list[Tensor | None] = [None] * len(params)
            with private(params):  # the same dropout on both sides
                for part in parts:
                    add(total, torch.autograd.grad(scalar(part()), list(params), allow_unused=True))
            sides.append(total)
    finally:
        with torch.no_grad():
            for p, start in zip(params, kept, strict=True):
                p.copy_(start)
    return [None if a is None or b is None else (a - b) / (2 * delta) for a, b in zip(*sides, strict=True)]
