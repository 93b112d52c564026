"""Hutchinson's estimate of the Hessian's diagonal."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.curvature.hvp import hvp
from optim.curvature.losses import (
    Parts,
    mean_over_ranks,
)
from optim.rule import moment_dtype


def hutchinson(loss_fn: Parts, params: Sequence[Tensor], probes: Sequence[Tensor]) -> list[Tensor | None]:
    """z (H z) for each parameter: for independent z with mean 0 and variance 1, the Hessian's diagonal in expectation.

    One product with all parameters at once. Averaged over the ranks of `torch.distributed`, where a rank whose loss
    does not depend on a parameter counts as zero. None where no rank's does.
    """
    products = hvp(loss_fn, params, probes)
    return mean_over_ranks([None if h is None else z * h for z, h in zip(probes, products, strict=True)], params)


def draw(param: Tensor, probe: str, seed: int) -> Tensor:
    """A probe of the parameter's shape and dtype from a generator of its own: "normal" or "signs"."""
    generator = torch.Generator(param.device).manual_seed(seed)
    drawn = torch.empty(param.shape, dtype=moment_dtype(param), device=param.device)
    if probe == "normal":
        drawn.normal_(generator=generator)
    else:
        drawn.random_(0, 2, generator=generator).mul_(2).sub_(1)
    return drawn.to(param.dtype)
