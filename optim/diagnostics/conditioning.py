"""Condition numbers of layers, and the penalties that TSCNC puts on them, as losses."""

import math
from typing import Literal

import torch
from torch import Tensor

DET_EPS = 1e-5


def condition_numbers(weight: Tensor) -> dict[str, float]:
    """`cond2` = s_1 / s_r, `condF` = |W|_F |W^+|_F, `log10_cond2`, `log10_condF`, `largest` s_1 and `smallest` s_r.

    weight: [m, n]; more dimensions are flattened to [out, rest]. Below r u s_1, with u the dtype's unit of rounding,
    the matrix counts as singular and both numbers as infinite. In float64 for float64, otherwise in float32.
    Source: arXiv 2503.20454. Raises: ValueError for less than two dimensions or no entries.
    """
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"condition_numbers: shape {tuple(weight.shape)}; expected a matrix with entries")
    flat = weight.detach().flatten(1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    if not bool(flat.isfinite().all()):
        return dict.fromkeys(("cond2", "condF", "log10_cond2", "log10_condF", "largest", "smallest"), math.nan)
    s = torch.linalg.svdvals(flat)
    largest, smallest = float(s[0]), float(s[-1])
    if smallest <= len(s) * torch.finfo(s.dtype).eps * largest:
        cond2 = cond_f = math.inf
    else:
        cond2 = largest / smallest
        scaled = s.double() / s[0].double()
        cond_f = math.sqrt(float(scaled.square().sum()) * float(scaled.reciprocal().square().sum()))
    return {
        "cond2": cond2, "condF": cond_f, "log10_cond2": math.log10(cond2), "log10_condF": math.log10(cond_f),
        "largest": largest, "smallest": smallest,
    }  # fmt: skip


def condition_penalty(weight: Tensor, *, form: Literal["small_side", "code"] = "small_side") -> Tensor:
    """A loss that is zero where the geometric mean of the eigenvalues of M / n is one: logdet(M / n + 1e-5 I)^2.

    M is the smaller of W W^T and W^T W, n the columns of W as stored (more dimensions are flattened to [out, rest]).
    It bounds the volume and not s_1 / s_r: eigenvalues 100 and 0.01 cost nothing. Look at `condition_numbers` too.
    Differs: the published code has ln(1e-5 + det(W^T W / n))^2, `form="code"`: its determinant leaves the range of
    floats past some 50 columns, and is 0, without a gradient, where the matrix is wide.
    Source: TSCNC, arXiv 2503.20454, and its repository. Float32 at least.
    """
    w = weight.flatten(1)
    w = w if w.dtype == torch.float64 else w.float()
    n = w.shape[1]
    if form == "code":
        determinant: Tensor = torch.linalg.det(w.T @ w / n)
        return torch.log(DET_EPS + determinant).square()
    if form != "small_side":
        raise ValueError(f"condition_penalty: form = {form!r}; it must be 'small_side' or 'code'")
    gram = (w @ w.T if len(w) <= n else w.T @ w) / n
    damped = gram + DET_EPS * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    volume: Tensor = torch.linalg.slogdet(damped).logabsdet
    return volume.square()


def transformed_l1(x: Tensor, a: float = 1.0) -> Tensor:
    """sum (a + 1) |x| / (a + |x|): the count of non-zeros for a -> 0, the sum of |x| for a -> infinity.

    Raises: ValueError unless a is above 0.
    """
    if not 0 < a < math.inf:
        raise ValueError(f"transformed_l1: a = {a!r}; it must be a finite number above 0")
    size = x.abs()
    return ((a + 1) * size / (a + size)).sum()


_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3


def gate_closed(log_alpha: Tensor) -> Tensor:
    """The probability that each hard-concrete gate is closed: limits -0.1 and 1.1, temperature 2/3."""
    return torch.sigmoid(_TEMPERATURE * math.log(-_LOW / _HIGH) - log_alpha)


def gate_penalty(
    weight: Tensor, log_alpha: Tensor, *, data_size: int, strength: float = 1.0, precision: float = 1.0, a: float = 1.0
) -> Tensor:
    """strength / data_size times the transformed l1 of the energies of groups of weights that a gate may close.

    E_g = (1 - pi_g) (strength #g + precision |w_g|^2 / 2), with pi_g = `gate_closed` and #g the weights of the group.
    weight [groups, ...]: the weights behind each gate; log_alpha [groups]; data_size: rows of the training set.
    Differs: the published code has -E_g in the place of |E_g|, and with it a pole at E_g = a.
    Source: TSCNC, arXiv 2503.20454. Raises: ValueError where groups do not match.
    """
    if log_alpha.shape != weight.shape[:1]:
        raise ValueError(
            f"gate_penalty: log_alpha has shape {tuple(log_alpha.shape)} and weight {tuple(weight.shape)}; "
            "expected one gate a row"
        )
    rows = weight.flatten(1)
    energy = (1 - gate_closed(log_alpha)) * (strength * rows.shape[1] + 0.5 * precision * rows.square().sum(1))
    return strength / data_size * transformed_l1(energy, a)
