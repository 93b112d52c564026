"""The smoothness of a loss in the l-infinity and l2 norms: does its geometry favour Adam or gradient descent?

f is C-smooth in the l-infinity norm if |grad f(x) - grad f(y)|_1 <= C |x - y|_inf. C is at most |H|_{1,1}, the sum
of the absolute entries of the Hessian; the corresponding constant of gradient descent is d times the largest
eigenvalue. If |H|_{1,1} / d is small compared with that eigenvalue, the geometry favours Adam. A rotation of the
parameters increases the former and does not change the latter.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from optim import curvature
from optim.checks import check_positive_counts
from optim.curvature.losses import norm_of
from optim.moments import moment_dtype

Product: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]
"""A function v -> H v, where v and H v have one tensor per parameter."""


def hessian(loss_fn: curvature.Parts, params: Sequence[Tensor]) -> Product:
    """Return the Hessian of the loss with respect to all `params` together, as a function from v to H v.

    Args:
        loss_fn: A function that computes the loss, or several functions whose sum is the loss.
        params: The parameters, of any shapes.

    Returns:
        A function from one tensor per parameter to one tensor per parameter, which is zero if the loss does not depend
        on the parameter.

    Example:
        >>> from optim import diagnostics
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> diagnostics.hessian(lambda: (w**2).sum(), [w])([torch.ones(2)])
        [tensor([2., 2.])]
    """

    def product(vectors: Sequence[Tensor]) -> list[Tensor]:
        found = curvature.hvp(loss_fn, params, vectors)
        return [torch.zeros_like(v) if h is None else h for h, v in zip(found, vectors, strict=True)]

    return product


# ---------------------------------------------------------------------------------------------------------- l-infinity


def cauchy(param: Float[Tensor, "*shape"], seed: int) -> Float[Tensor, "*shape"]:
    """Return independent standard Cauchy numbers, drawn from their own generator.

    Args:
        param: The parameter, of any shape.
        seed: The seed.

    Returns:
        A tensor of the parameter's shape, in the moments' dtype.
    """
    made = torch.Generator(param.device).manual_seed(seed)
    return torch.empty(param.shape, dtype=moment_dtype(param), device=param.device).cauchy_(generator=made)


def row_scales(products: Float[Tensor, "probes m"], how: Literal["iqr", "median"] = "iqr") -> Float[Tensor, " m"]:
    """Return the scale of the distribution of each coordinate, [m], from products [K, m] = H c for K Cauchy probes c.

    Entry i of H c has a Cauchy distribution whose scale is |H_i,:|_1 times that of c. The scale is half the
    interquartile range, or the median of the absolute value. Probes with a NaN are dropped.

    Args:
        products: H c, [K, m].
        how: "iqr" or "median".

    Returns:
        The scales, [m].

    Raises:
        ValueError: If all probes have a NaN, and for an unknown estimator.
    """
    sound = products[~products.isnan().any(1)]
    if len(sound) == 0:
        raise ValueError(f"row_scales: each of the {len(products)} probes has a NaN")
    if how == "median":
        return _quantile(sound.abs(), 0.5)
    if how != "iqr":
        raise ValueError(f"row_scales: how = {how!r}; it must be 'iqr' or 'median'")
    return (_quantile(sound, 0.75) - _quantile(sound, 0.25)) / 2


def _quantile(x: Tensor, at: float) -> Tensor:
    """Return the quantile over dimension 0 as torch.quantile does, but of more than 2^24 entries too."""
    ordered = x.sort(0).values
    place = at * (len(x) - 1)
    low = math.floor(place)
    high = min(low + 1, len(x) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


def linf_smoothness(
    product: Product,
    params: Sequence[Tensor],
    *,
    probes: int = 50,
    coordinates: int = 4096,
    rotation: "Rotation | None" = None,
    seed: int = 0,
    advance: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Return the l-infinity smoothness of a loss, by Cauchy probes of its Hessian (`hessian(loss, params)`).

    Args:
        product: A function that multiplies a vector by the Hessian.
        params: The parameters, of any shapes.
        probes: The number of probes.
        coordinates: The largest number of coordinates of each tensor that are kept. They are drawn with equal
            probability and weighted by its inverse, because K probes of all coordinates of a large model would not fit
            into memory.
        rotation: A rotation R that replaces H by R H R^T.
        seed: The seed of probes and coordinates.
        advance: A function that is called after each probe.

    Returns:
        `norm11` = |H|_{1,1} by interquartile ranges, `norm11_median` by medians, `norm11_over_d`, `largest_row_sum` =
        |H|_inf (of the coordinates that were kept; the maximum biases it upwards), `coordinates` kept, and `dimension`
        d.

    Cost:
        One Hessian-vector product per probe, and the memory of `probes` numbers per coordinate and of two vectors.

    Raises:
        ValueError: For counts below 1.

    Source:
        arXiv 2410.08198 and its code (50 probes of standard Cauchy numbers over d).

    Example:
        >>> from optim import diagnostics
        >>> w = torch.ones(3, requires_grad=True)
        >>> found = diagnostics.linf_smoothness(diagnostics.hessian(lambda: (w**2).sum(), [w]), [w], probes=400)
        >>> 1.5 < found["norm11_over_d"] < 2.5  # the Hessian is 2 I
        True
    """
    check_positive_counts("smoothness", probes=probes, coordinates=coordinates)
    d = sum(p.numel() for p in params)
    if d == 0:
        raise ValueError("linf_smoothness: there are no parameters")
    picked = [_picked(p, coordinates, seed, i) for i, p in enumerate(params)]
    kept: list[list[Tensor]] = [[] for _ in params]
    for k in range(probes):
        probe = [cauchy(p, _mix(seed, k, i)).div_(d) for i, p in enumerate(params)]
        if rotation is not None:
            probe = rotation.back(probe)
        found = product([c.to(p.dtype) for c, p in zip(probe, params, strict=True)])
        if rotation is not None:
            found = rotation(found)
        for column, h, places in zip(kept, found, picked, strict=True):
            column.append(h.flatten()[places].cpu())
        if advance is not None:
            advance()
    hows: tuple[Literal["iqr", "median"], ...] = ("iqr", "median")
    sums = dict.fromkeys(hows, 0.0)
    largest = 0.0
    for column, p in zip(kept, params, strict=True):
        products = torch.stack(column)
        if not products.numel():
            continue
        for how in hows:
            scales = row_scales(products, how)
            sums[how] += float(scales.double().mean()) * p.numel()
            largest = max(largest, float(scales.max())) if how == "iqr" else largest
    return {
        "norm11": sums["iqr"] * d, "norm11_median": sums["median"] * d, "norm11_over_d": sums["iqr"],
        "largest_row_sum": largest * d, "coordinates": float(sum(len(x) for x in picked)), "dimension": float(d),
    }  # fmt: skip


def _picked(param: Tensor, most: int, seed: int, index: int) -> Tensor:
    if param.numel() <= most:
        return torch.arange(param.numel(), device=param.device)
    made = torch.Generator().manual_seed(_mix(seed, "coordinates", index))
    drawn = torch.randint(param.numel(), (most,), generator=made)  # with replacement, which needs no permutation
    return drawn.to(param.device)


class Rotation:
    """An orthogonal change of coordinates within each tensor.

    The entries of a tensor are shuffled, and then rotated in small dense blocks. `rotation(x)` is R x and
    `rotation.back(x)` is R^T x, for one tensor per parameter. Nothing is stored: both parts are drawn again from their
    seeds.

    Args:
        seed: The seed of the shuffling and the rotations.
        size: The size of the dense rotations; the remaining entries are only shuffled.

    Example:
        >>> from optim import diagnostics
        >>> rotation, x = diagnostics.Rotation(seed=0, size=2), [torch.arange(4.0)]
        >>> torch.allclose(rotation.back(rotation(x))[0], x[0], atol=1e-6)
        True
    """

    def __init__(self, seed: int = 0, size: int = 64) -> None:
        check_positive_counts("smoothness", size=size)
        self.seed, self.size = seed, size

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return R x.

        Args:
            tensors: x, one tensor per parameter.

        Returns:
            R x, tensors of the same shapes.
        """
        return [self._turned(x.flatten()[self._order(x, i)], i).view(x.shape) for i, x in enumerate(tensors)]

    def back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return R^T x, the inverse of the rotation.

        Args:
            tensors: x, one tensor per parameter.

        Returns:
            R^T x, tensors of the same shapes.
        """
        found = []
        for i, x in enumerate(tensors):
            y = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
            y[self._order(x, i)] = self._turned(x.flatten(), i, back=True)
            found.append(y.view(x.shape))
        return found

    def _order(self, x: Tensor, index: int) -> Tensor:
        made = torch.Generator().manual_seed(_mix(self.seed, "order", index))
        return torch.randperm(x.numel(), generator=made).to(x.device)

    def _turned(self, flat: Tensor, index: int, *, back: bool = False) -> Tensor:
        size = min(self.size, flat.numel())
        if size < 2:
            return flat
        made = torch.Generator().manual_seed(_mix(self.seed, "turn", index))
        q, _ = torch.linalg.qr(torch.randn(size, size, generator=made, dtype=torch.float64))
        q = q.to(flat)
        whole = flat.numel() // size * size
        turned = flat[:whole].view(-1, size) @ (q if back else q.T)
        return torch.cat([turned.flatten(), flat[whole:]])


# ------------------------------------------------------------------------------------------------------------------ l2


def lanczos(
    product: Product, start: Sequence[Tensor], *, steps: int = 50, reorthogonalize: bool = True,
    advance: Callable[[], object] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Return the extreme eigenvalues of a symmetric matrix by the Lanczos method.

    It stops when the norm of the next vector is below 1e-10.

    Args:
        product: A function that multiplies a vector by the matrix.
        start: One tensor per parameter, usually the gradient.
        steps: The largest number of steps.
        reorthogonalize: Whether to orthogonalise against all earlier vectors, which are then all kept and take `steps`
            times the memory of the parameters. Otherwise only three are kept; the extreme eigenvalues are as accurate,
            but copies of them may appear among the others.
        advance: A function that is called after each step.

    Returns:
        `largest`, `smallest`, and the number of `steps`.

    Raises:
        ValueError: For a start of length zero.

    Example:
        >>> from optim import diagnostics
        >>> found = diagnostics.lanczos(lambda v: [torch.tensor([1.0, 5.0]) * v[0]], [torch.ones(2)], steps=2)
        >>> round(found["largest"], 4), round(found["smallest"], 4)
        (5.0, 1.0)
    """
    check_positive_counts("smoothness", steps=steps)
    length = norm_of(start)
    if not 0 < length < math.inf:
        raise ValueError(f"lanczos: the norm of the start is {length}; pass a vector that is finite and not zero")
    now = [x / length for x in start]
    kept, before, beta = [now], None, 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(steps):
        w = [x.clone() for x in product(now)]
        alpha = _dot(w, now)
        _subtract(w, now, alpha)
        if before is not None:
            _subtract(w, before, beta)
        if reorthogonalize:
            for _ in range(2):  # two passes are sufficient
                for old in kept:
                    _subtract(w, old, _dot(w, old))
        diagonal.append(alpha)
        if advance is not None:
            advance()
        beta = norm_of(w)
        if beta < 1e-10 or not math.isfinite(beta) or len(diagonal) == steps:
            break
        beside.append(beta)
        before, now = now, [x / beta for x in w]
        if reorthogonalize:
            kept.append(now)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    matrix += torch.diag(off, 1) + torch.diag(off, -1)
    values = torch.linalg.eigvalsh(matrix) if bool(matrix.isfinite().all()) else torch.full((1,), math.nan)
    return {"largest": float(values[-1]), "smallest": float(values[0]), "steps": float(len(diagonal))}


def frobenius(
    product: Product, params: Sequence[Tensor], *, probes: int = 10, seed: int = 0,
    advance: Callable[[], object] | None = None,
) -> float:  # fmt: skip
    """Return an estimate of |H|_F: the square root of the mean of |H v|^2 over vectors v of random signs.

    Args:
        product: A function that multiplies a vector by H.
        params: The parameters, of any shapes.
        probes: The number of products.
        seed: The seed of the signs.
        advance: A function that is called after each product.

    Returns:
        The estimate.

    Example:
        >>> from optim import diagnostics
        >>> w = torch.ones(4, requires_grad=True)
        >>> round(diagnostics.frobenius(diagnostics.hessian(lambda: (w**2).sum(), [w]), [w]), 4)
        4.0
    """
    check_positive_counts("smoothness", probes=probes)
    total = 0.0
    for k in range(probes):
        signs = [curvature.draw(p, "signs", _mix(seed, "signs", k, i)) for i, p in enumerate(params)]
        total += norm_of(product(signs)) ** 2
        if advance is not None:
            advance()
    return math.sqrt(total / probes)


# -------------------------------------------------------------------------------------------------------------- helpers


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _subtract(a: Sequence[Tensor], b: Sequence[Tensor], times: float) -> None:
    for x, y in zip(a, b, strict=True):
        x.sub_(y, alpha=times)


_mix = curvature.mix
