"""The projection of updates that keeps the norm of weights, for AdamP and SGDP."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optim.sharding import largest


def remove_radial(
    update: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    param: Float[Tensor, "*shape"],
    *,
    delta: float,
    eps: float,
) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, ""]]:
    """Remove the part of `update` along `param` if `grad` is almost orthogonal to `param`.

    The tensors [m, ...] are treated as m rows of length n, and then as one row of length m n. In the first of these
    views in which every row has ``|<g, p>| / (max(|g|, eps) max(|p|, eps)) < delta / sqrt(row length)``, rows become
    ``u - <u, q> q`` with ``q = p / (|p| + eps)``. If there is no such view, and for vectors, scalars and tensors
    without elements, `update` is unchanged. A zero `grad` counts as orthogonal. Weights whose scale has no effect
    (before a normalisation) have gradients orthogonal to them, but updates with momentum or Adam's denominator are not
    orthogonal, and therefore let such weights grow.

    Args:
        update: u, a tensor [m, ...].
        grad: g, of the same shape.
        param: p, of the same shape.
        delta: The threshold.
        eps: The smallest norm.

    Returns:
        The update, and whether something was removed, as a 0-d bool tensor.

    Source:
        Heo et al. 2020, arXiv 2006.08217 (projected updates); clovaai/AdamP.

    Example:
        >>> from optim.radial import remove_radial
        >>> p, g = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> remove_radial(torch.tensor([[2.0, 3.0]]), g, p, delta=0.1, eps=1e-8)
        (tensor([[0., 3.]]), tensor(True))
    """
    if param.ndim < 2 or param.numel() == 0:
        return update, torch.zeros((), dtype=torch.bool, device=param.device)
    rows, length = param.shape[0], math.prod(param.shape[1:])
    u, g, p = (x.reshape(rows, length) for x in (update, grad, param))
    products = [(a * b).sum(1, keepdim=True) for a, b in ((g, p), (g, g), (p, p), (u, p))]
    by_rows, row_shares = _radial(*products, limit=delta / math.sqrt(length), eps=eps)
    whole, share = _radial(*(x.sum(0, keepdim=True) for x in products), limit=delta / math.sqrt(rows * length), eps=eps)
    along = torch.where(by_rows, row_shares, torch.where(whole, share, 0))
    return (u - along * p).reshape(update.shape), by_rows | whole


def _radial(gp: Tensor, gg: Tensor, pp: Tensor, up: Tensor, *, limit: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return, from inner products of rows, if all cosines are below the limit, and the multiple of p to subtract."""
    norm = pp.sqrt()
    cosine = gp.abs() / (gg.sqrt().clamp(min=eps) * norm.clamp(min=eps))
    return largest(cosine) < limit, up / (norm + eps).square()
