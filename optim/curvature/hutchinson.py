"""Hutchinson's estimate of the Hessian's diagonal."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from optim.curvature.hvp import hvp
from optim.curvature.losses import (
    Parts,
    mean_over_ranks,
)
from optim.moments import moment_dtype


def hutchinson(loss_fn: Parts, params: Sequence[Tensor], probes: Sequence[Tensor]) -> list[Tensor | None]:
    """Return z (H z) for each parameter, whose expectation is the diagonal of the Hessian.

    The entries of z must be independent with mean 0 and variance 1. One product covers all parameters at once. It is
    averaged over the ranks of `torch.distributed`; a rank whose loss does not depend on a parameter contributes zero.

    Args:
        loss_fn: A function that computes the loss, or several functions whose sum is the loss.
        params: The parameters, of any shapes.
        probes: z, one tensor per parameter, of its shape and dtype.

    Returns:
        One tensor per parameter, of its shape; None if no rank's loss depends on it.

    Example:
        >>> from optim import curvature
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> curvature.hutchinson(lambda: (w**3).sum(), [w], [torch.tensor([1.0, -1.0])])
        [tensor([ 6., 12.])]
    """
    products = hvp(loss_fn, params, probes)
    return mean_over_ranks([None if h is None else z * h for z, h in zip(probes, products, strict=True)], params)


def draw(param: Float[Tensor, "*shape"], probe: str, seed: int) -> Float[Tensor, "*shape"]:
    """Draw a probe of the parameter's shape and dtype from its own generator.

    Args:
        param: The parameter, of any shape.
        probe: "normal" or "signs".
        seed: The seed.

    Returns:
        A tensor of the parameter's shape and dtype.

    Example:
        >>> from optim import curvature
        >>> curvature.draw(torch.empty(4), "signs", seed=0).abs()
        tensor([1., 1., 1., 1.])
    """
    generator = torch.Generator(param.device).manual_seed(seed)
    drawn = torch.empty(param.shape, dtype=moment_dtype(param), device=param.device)
    if probe == "normal":
        drawn.normal_(generator=generator)
    else:
        drawn.random_(0, 2, generator=generator).mul_(2).sub_(1)
    return drawn.to(param.dtype)
