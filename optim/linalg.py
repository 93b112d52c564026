"""Matrix functions that rules share: Newton-Schulz and its coefficients, whitening, and norms."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from optim.kernels import symmetric
from optim.kernels import unit_rms as unit_rms_kernel


class Polynomial(NamedTuple):
    """An odd polynomial a s + b s^3 + c s^5 per step; if more steps are requested, the last one is repeated.

    Args:
        coefficients: A triple (a, b, c) per step.
        safety: The input is divided by `safety` times its Frobenius norm.
        source: Where the coefficients come from.

    Example:
        >>> from optim.linalg import NEWTON_SCHULZ
        >>> NEWTON_SCHULZ["keller_jordan"].coefficients
        ((3.4445, -4.775, 2.0315),)
    """

    coefficients: tuple[tuple[float, float, float], ...]
    safety: float
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
    "polar_express_8": Polynomial(
        (
            *(
                (a / 1.01, b / 1.01**3, c / 1.01**5)
                for a, b, c in (
                    (8.28721201814563, -23.595886519098837, 17.300387312530933),
                    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                )
            ),
            (1.875, -1.25, 0.375),
        ),
        1.01,
        "Amsel et al. 2025, arXiv 2505.16932, algorithm 1; eight steps bring singular values above 0.001 to 1",
    ),
    "cans": Polynomial(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        1.0,
        "Grishina et al. 2025, arXiv 2506.10935, as in NVIDIA-NeMo/Emerging-Optimizers",
    ),
    "deepseek_v4": Polynomial(
        ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2,
        1.0,
        "DeepSeek-V4 2026, as in NVIDIA-NeMo/Emerging-Optimizers; a hybrid of eight steep steps and two that converge",
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
    x: Float[Tensor, "*k m n"],
    *,
    coefficients: str | Sequence[tuple[float, float, float]] = "keller_jordan",
    steps: int = 5,
    eps: float = 1e-7,
    form: str = "plain",
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*k m n"]:
    """Return an approximation of U V^T for each matrix x = U S V^T, in x's dtype.

    Each step maps singular values by ``s -> a s + b s^3 + c s^5`` and preserves singular vectors; zero gives zero.

    The published codes shrink x, and therefore the result, if its norm is below eps. Here the input is divided by its
    norm alone if the norm is below a tenth of eps (below eps with "torch"), and in between the share of eps decreases
    linearly. The result therefore does not depend on the scale of x, from the smallest to the largest normal number of
    its dtype, whatever the range of `dtype` is. Each sum is computed as part of a matrix product and rounded once, as
    in torch; the other codes round it term by term, which in 16 bits is slower and has twice the error.

    Args:
        x: Matrices [..., m, n] of a floating-point dtype.
        coefficients: A key of `NEWTON_SCHULZ`, or triples (a, b, c), one per step; the last one is repeated as needed.
        steps: The number of steps.
        eps: See `form`.
        form: "plain" (Keller Jordan, Moonlight, Dion) divides the input by ``safety * |x|_F + eps``, and "torch"
            (torch.optim.Muon) by ``max(safety * |x|_F, eps)``.
        dtype: The dtype of the products (bfloat16 in the published codes); None for that of x. In bfloat16, rounding
            noise in the null space of a rank-deficient x is amplified to order 1; use float32 for small or structurally
            low-rank matrices. Single rows and columns are multiplied in float32 at least, because their steps act on
            one number, whose errors do not average out.

    Returns:
        A tensor of x's shape and dtype.

    Cost:
        ``steps * (4 p^2 q + 2 p^3)`` FLOP per matrix, with p = min(m, n) and q = max(m, n). If q is at least 2 p, and
        in 32 bits or more, three steps at a time only use their Gram matrix: ``8 p^2 q + 28 p^3`` for five steps.

    Example:
        >>> from optim.linalg import newton_schulz
        >>> x = newton_schulz(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), coefficients="polar_express", steps=8)
        >>> torch.allclose(x, torch.eye(2), atol=0.1)
        True
    """
    named = NEWTON_SCHULZ[coefficients] if isinstance(coefficients, str) else Polynomial(tuple(coefficients), 1.0, "")
    dtype = x.dtype if dtype is None else dtype
    if min(x.shape[-2:]) < 2:
        dtype = torch.promote_types(dtype, torch.float32)
    y = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    factor = _power_of_two(y)
    y = (y * factor).to(dtype)
    tall = y.shape[-2] > y.shape[-1]
    if tall:
        y = y.mT  # the products A = Y Y^T are p x p on the wide orientation
    norm: Tensor = named.safety * torch.linalg.matrix_norm(y, keepdim=True)
    y = y / _divisor(norm, 0.0 if form == "torch" else eps, factor)
    triples = [named.coefficients[min(step, len(named.coefficients) - 1)] for step in range(steps)]
    at_once = _GRAM_STEPS if y.dtype.itemsize >= 4 and y.shape[-1] >= 2 * y.shape[-2] else 1
    for start in range(0, steps, at_once):
        y = _newton_schulz_steps(y, *triples[start : start + at_once])
    return (y.mT if tall else y).reshape(x.shape).to(x.dtype)


def _power_of_two(x: Tensor) -> Tensor:
    """Return [..., 1, 1] for matrices x [..., m, n]: the power of two that scales the largest entry of each to [1, 2).

    This scaling does not round. Without it, norms of entries above 1e19 overflow and those of entries below 1e-23
    vanish, and in float16 entries above 65504 overflow.
    """
    if x.numel() == 0:
        return x.new_ones(*x.shape[:-2], 1, 1)
    largest = torch.linalg.vector_norm(x.detach(), math.inf, dim=(-2, -1), keepdim=True)
    limit = math.frexp(torch.finfo(x.dtype).max)[1] - 2
    return torch.exp2(-torch.floor(torch.log2(torch.where(largest > 0, largest, 1))).clamp(-limit, limit))


def _divisor(norm: Tensor, eps: float, factor: Tensor) -> Tensor:
    """Return norm + eps in units of 1 / factor, with eps scaled as `newton_schulz` describes; 1 where norm is 0."""
    if eps == 0:
        return torch.where(norm > 0, norm, 1)
    eps_here = eps * factor.to(torch.promote_types(norm.dtype, torch.float32))  # may be infinite
    share = ((norm / eps_here - 0.1) / 0.9).clamp(0, 1)
    return torch.where(norm > 0, norm + torch.where(share > 0, eps_here * share, 0).to(norm.dtype), 1)


_GRAM_STEPS = 3
"""The number of steps on one Gram matrix, in 32 bits or more. The rounding errors of a Gram matrix are relative to the
largest singular value, and each step amplifies them like the smallest singular values. In bfloat16, two steps on one
Gram matrix leave singular values of up to 1.3, single steps leave 1.14, and three steps can diverge."""


def _newton_schulz_steps(y: Tensor, first: tuple[float, float, float], *rest: tuple[float, float, float]) -> Tensor:
    """Return stacks y [k, p, q] after one step per (a, b, c): (total I + moved) y, where both only depend on y y^T."""
    a, b, c = first
    if not rest and symmetric.fits(y):
        return torch.baddbmm(y, symmetric.polynomial(y, b, c), y, beta=a)
    gram = torch.bmm(y, y.mT)  # `@` would copy the transpose
    inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    total, moved = a, inner
    for next_a, b, c in rest:
        half = torch.baddbmm(gram, inner, gram, beta=a)  # gram <- (a I + inner) gram (a I + inner); the factors commute
        gram = torch.baddbmm(half, half, inner, beta=a)
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        a, moved = next_a, torch.baddbmm(next_a * moved + total * inner, inner, moved)
        total *= a
    return torch.baddbmm(y, moved, y, beta=total)


def polar(x: Float[Tensor, "*k m n"]) -> Float[Tensor, "*k m n"]:
    """Return U V^T for each matrix x = U S V^T, restricted to the singular values that are not rounding errors.

    These are the ones above ``max(m, n) eps`` times the largest; zero gives zero. The function computes an SVD, which
    takes about 20 p^2 q FLOP per matrix.

    Args:
        x: Matrices [..., m, n] of dtype float32 or float64.

    Returns:
        A tensor of x's shape and dtype.

    Example:
        >>> from optim.linalg import polar
        >>> torch.allclose(polar(torch.tensor([[0.0, -2.0], [5.0, 0.0]])), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        True
    """
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    if s.shape[-1] == 0:
        return torch.zeros_like(x)
    limit = max(x.shape[-2:]) * torch.finfo(x.dtype).eps * s[..., :1]
    found: Tensor = (u * (s > limit)[..., None, :].to(x.dtype)) @ vt
    return found


def whiten(x: Float[Tensor, "*k m n"], *, steps: int, beta: float) -> Float[Tensor, "*k m n"]:
    """Return approximately U V^T for each matrix x = U S V^T, times a factor that the caller has to normalise.

    The coupled iteration ``T = 3 I - Z Y; Y <- beta Y T; Z <- beta T Z`` runs from ``Y = X X^T, Z = I`` on the smaller
    side, with ``X = x / |x|_F``, and the result is ``Z X``. Zero gives zero.

    Args:
        x: Matrices [..., m, n] of dtype float32 or float64.
        steps: The number of steps.
        beta: 0.5 converges to U V^T (in about 14 steps). 0.8 is faster and ends with singular values anywhere in about
            [0.56, 1.60]. Small changes of x change them, so use float32.

    Returns:
        A tensor of x's shape and dtype.

    Cost:
        ``4 p^2 q + 6 steps p^3`` FLOP per matrix, with p = min(m, n) and q = max(m, n).

    Source:
        Ma et al. 2024, arXiv 2412.13148.

    Differs:
        The division by the Frobenius norm is our reading; without it the iteration would diverge.

    Example:
        >>> from optim.linalg import whiten
        >>> x = whiten(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), steps=20, beta=0.5)
        >>> torch.allclose(x / x[0, 0], torch.eye(2), atol=1e-3)
        True
    """
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    factor = _power_of_two(wide)
    wide = wide * factor
    wide = wide / _divisor(torch.linalg.matrix_norm(wide, keepdim=True), 1e-12, factor)
    identity = torch.eye(wide.shape[-2], dtype=x.dtype, device=x.device)
    y, z = wide @ wide.mT, identity.expand(*wide.shape[:-1], wide.shape[-2])
    for _ in range(steps):
        t = 3 * identity - z @ y
        y, z = beta * (y @ t), beta * (t @ z)
    white: Tensor = z @ wide
    return white.mT if tall else white


def unit_rms(x: Float[Tensor, "*shape"], *, dim: int | tuple[int, ...], eps: float) -> Float[Tensor, "*shape"]:
    """Return x divided by its root mean square along `dim`, or by eps where that is larger; zero stays zero.

    Args:
        x: A tensor of any shape and a floating-point dtype.
        dim: The dimension or dimensions.
        eps: The smallest divisor.

    Returns:
        A tensor of x's shape and dtype.

    Example:
        >>> from optim.linalg import unit_rms
        >>> unit_rms(torch.tensor([[3.0, -3.0], [0.0, 0.0]]), dim=-1, eps=1e-8)
        tensor([[ 1., -1.],
                [ 0.,  0.]])
    """
    if isinstance(dim, int) and unit_rms_kernel.fits(x, dim):
        return unit_rms_kernel.unit_rms(x, dim, eps)
    return x / (x.square().mean(dim, keepdim=True) + _TINY).sqrt().clamp(min=eps)


_TINY = 1e-37
"""Added under a square root, so that a zero row has a derivative. It is below every square that passes a clamp of
1e-8."""


def row_normalised(x: Float[Tensor, "*k m n"]) -> Float[Tensor, "*k m n"]:
    """Return x with each row on the sphere of radius sqrt(n); a zero row stays zero.

    Args:
        x: Matrices [..., m, n] of a floating-point dtype.

    Returns:
        A tensor of x's shape and dtype.

    Example:
        >>> from optim.linalg import row_normalised
        >>> row_normalised(torch.tensor([[5.0, -5.0]]))
        tensor([[ 1., -1.]])
    """
    return unit_rms(x, dim=-1, eps=1e-8 / max(x.shape[-1], 1) ** 0.5)


def column_normalised(x: Float[Tensor, "*k m n"]) -> Float[Tensor, "*k m n"]:
    """Return x with each column on the sphere of radius sqrt(m); a zero column stays zero.

    Args:
        x: Matrices [..., m, n] of a floating-point dtype.

    Returns:
        A tensor of x's shape and dtype.

    Example:
        >>> from optim.linalg import column_normalised
        >>> column_normalised(torch.tensor([[5.0], [-5.0]]))
        tensor([[ 1.],
                [-1.]])
    """
    return unit_rms(x, dim=-2, eps=1e-8 / max(x.shape[-2], 1) ** 0.5)


def spectrally_normalised(x: Float[Tensor, "*k m n"]) -> Float[Tensor, "*k m n"]:
    """Return ``sqrt(max(m, n)) U V^T`` for each matrix x = U S V^T.

    For a matrix of full rank its Frobenius norm is sqrt(m n), like that of the other normalisations.

    Args:
        x: Matrices [..., m, n] of dtype float32 or float64.

    Returns:
        A tensor of x's shape and dtype.

    Example:
        >>> from optim.linalg import spectrally_normalised
        >>> round(float(spectrally_normalised(torch.tensor([[2.0, 0.0], [0.0, 7.0]])).norm()), 4)
        2.0
    """
    return math.sqrt(max(x.shape[-2:])) * polar(x)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "row": row_normalised,
    "column": column_normalised,
    "spectral": spectrally_normalised,
    "sign": torch.sign,
}
"""Name of a norm -> a function that maps x to the point on the norm's sphere with the largest inner product with x,
scaled to a Frobenius norm of sqrt(m n)."""


def multi_normalised(x: Float[Tensor, "*k m n"], *, norms: Sequence[str], rounds: int) -> Float[Tensor, "*k m n"]:
    """Return x after `rounds` rounds of normalisation by each of the `norms`, in their order.

    ("row", "column") is Sinkhorn's iteration on squares, and one round of ("row", "spectral") is SWAN without centring.
    Divisors are l2 norms of at least 1e-8.

    Args:
        x: Matrices [..., m, n] of dtype float32 or float64.
        norms: Keys of `NORMS`.
        rounds: The number of rounds.

    Returns:
        A tensor of x's shape and dtype.

    Source:
        Scetbon et al. 2025, arXiv 2502.06742 (MNGD).

    Example:
        >>> from optim.linalg import multi_normalised
        >>> x = multi_normalised(torch.rand(4, 4), norms=("row", "column"), rounds=20)
        >>> torch.allclose(x.square().sum(1), torch.full((4,), 4.0), atol=1e-2)
        True
    """
    for _ in range(rounds):
        for norm in norms:
            x = NORMS[norm](x)
    return x
