"""Matrix functions that several rules share: Newton-Schulz and its coefficients, the radial projection."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Polynomial(NamedTuple):
    """An odd polynomial a s + b s^3 + c s^5 a step: the last one is repeated if more steps are asked for."""

    coefficients: tuple[tuple[float, float, float], ...]
    safety: float
    """The input is divided by `safety` times its Frobenius norm."""
    source: str


NEWTON_SCHULZ: dict[str, Polynomial] = {
    "keller_jordan": Polynomial(
        ((3.4445, -4.7750, 2.0315),),
        1.0,
        "KellerJordan/Muon; steep at 0: five steps bring singular values above 0.002 into about [0.68, 1.20], not to 1",
    ),
    "polar_express": Polynomial(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        1.02,
        "Amsel et al. 2025, arXiv 2505.16932, as in microsoft/dion (its default)",
    ),
    "dion": Polynomial(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        1.0,
        "microsoft/dion with use_polar_express=False",
    ),
}


def newton_schulz(
    x: Tensor,
    *,
    coefficients: str | Sequence[tuple[float, float, float]] = "keller_jordan",
    steps: int = 5,
    eps: float = 1e-7,
    form: str = "plain",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., m, n] -> about U V^T of each matrix's x = U S V^T, in x's dtype.

    Each step maps singular values by ``s -> a s + b s^3 + c s^5`` and keeps singular vectors; zero gives zero.

    coefficients: a key of `NEWTON_SCHULZ`, or triples (a, b, c), one a step; the last one is repeated as needed.
    form: "plain" (Keller Jordan, Moonlight, Dion) divides the input by ``safety * |x|_F + eps``; "torch"
    (torch.optim.Muon) by ``max(safety * |x|_F, eps)``, and rounds each sum of products once instead of term by term,
    which shows in bfloat16 only.
    dtype: of the products (bfloat16 in the published codes); None for x's own. In bfloat16, rounding noise in the null
    space of a rank-deficient x is amplified to order 1; use float32 for small or structurally low-rank matrices.
    Cost: ``steps * (4 p^2 q + 2 p^3)`` FLOP a matrix, p = min(m, n), q = max(m, n).
    """
    named = NEWTON_SCHULZ[coefficients] if isinstance(coefficients, str) else Polynomial(tuple(coefficients), 1.0, "")
    y = (x if dtype is None else x.to(dtype)).reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    tall = y.shape[-2] > y.shape[-1]
    if tall:
        y = y.mT  # the products A = Y Y^T are p x p on the wide orientation
    norm: Tensor = named.safety * torch.linalg.matrix_norm(y, keepdim=True)
    y = y / (norm.clamp(min=eps) if form == "torch" else norm + eps)
    for step in range(steps):
        a, b, c = named.coefficients[min(step, len(named.coefficients) - 1)]
        gram = y @ y.mT
        if form == "torch":
            y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        else:
            y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y.mT if tall else y).reshape(x.shape).to(x.dtype)


def remove_radial(
    update: Tensor, grad: Tensor, param: Tensor, *, delta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """`update` without its part along `param` if `grad` is almost orthogonal to `param`; and whether it was, 0-d bool.

    All three [m, ...], seen as m rows of n, and then as one row of m n: at the first of these views in which every row
    has ``|<g, p>| / (max(|g|, eps) max(|p|, eps)) < delta / sqrt(row length)``, rows become ``u - <u, q> q`` with
    ``q = p / (|p| + eps)``. If there is none, or for vectors, scalars and tensors without elements, `update` stays.
    A zero `grad` counts as orthogonal. Weights whose scale does not matter (before a normalisation) have orthogonal
    gradients, but momentum and Adam's denominator do not, and so make such weights grow.

    Source: Heo et al. 2020, arXiv 2006.08217 (projected updates); clovaai/AdamP.
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
    """From inner products of rows: are all cosines below the limit, and how much of p the projection takes off u."""
    norm = pp.sqrt()
    cosine = gp.abs() / (gg.sqrt().clamp(min=eps) * norm.clamp(min=eps))
    return cosine.amax() < limit, up / (norm + eps).square()
