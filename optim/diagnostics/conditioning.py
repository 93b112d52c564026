"""Condition numbers of layers, and TSCNC's penalties on them as losses."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from optim.checks import check_positive

DET_EPS = 1e-5


def condition_numbers(weight: Float[Tensor, "m ..."]) -> dict[str, float]:
    """Return the condition numbers of a matrix.

    Args:
        weight: A tensor [m, n]; more dimensions are flattened to [out, rest]. float64 is computed in float64, and all
            other dtypes in float32.

    Returns:
        `cond2` = s_1 / s_r, `condF` = |W|_F |W^+|_F, `log10_cond2`, `log10_condF`, `largest` s_1 and `smallest` s_r.
        If s_r is below r u s_1, where u is the rounding unit of the dtype, the matrix is treated as singular, and both
        numbers are infinite.

    Raises:
        ValueError: For fewer than two dimensions or no entries.

    Source:
        arXiv 2503.20454.

    Example:
        >>> from optim import diagnostics
        >>> round(diagnostics.condition_numbers(torch.tensor([[4.0, 0.0], [0.0, 2.0]]))["cond2"], 4)
        2.0
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


def condition_penalty(
    weight: Float[Tensor, "m ..."], *, form: Literal["small_side", "code"] = "small_side"
) -> Float[Tensor, ""]:
    """Return logdet(M / n + 1e-5 I)^2, which is zero if the geometric mean of the eigenvalues of M / n is one.

    Here M is the smaller of W W^T and W^T W, and n is the number of columns of W as stored. The penalty bounds the
    volume and not s_1 / s_r: eigenvalues 100 and 0.01 have no penalty. Check `condition_numbers` as well.

    Args:
        weight: W [m, n]; more dimensions are flattened to [out, rest]. It is computed in float32 at least.
        form: "small_side" is as above. "code" is that of the published code, ln(1e-5 + det(W^T W / n))^2; its
            determinant overflows or underflows for more than about 50 columns, and for a wide matrix it is 0, without a
            gradient.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: For an unknown form.

    Source:
        TSCNC, arXiv 2503.20454, and its repository.

    Example:
        >>> from optim import diagnostics
        >>> float(diagnostics.condition_penalty(2**0.5 * torch.eye(2))) < 1e-6
        True
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


def transformed_l1(x: Float[Tensor, "..."], a: float = 1.0) -> Float[Tensor, ""]:
    """Return sum (a + 1) |x| / (a + |x|): the number of non-zeros for a -> 0, and the sum of |x| for a -> infinity.

    Args:
        x: A tensor of any shape.
        a: The parameter a, above 0.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: Unless a is above 0.

    Example:
        >>> from optim import diagnostics
        >>> diagnostics.transformed_l1(torch.tensor([0.0, 1.0, -1.0]))
        tensor(2.)
    """
    check_positive("transformed_l1", a=a)
    size = x.abs()
    return ((a + 1) * size / (a + size)).sum()


_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3


def gate_closed(log_alpha: Float[Tensor, " groups"]) -> Float[Tensor, " groups"]:
    """Return the probability that each hard-concrete gate, with limits -0.1 and 1.1 and temperature 2/3, is closed.

    Args:
        log_alpha: The gates, [groups].

    Returns:
        Probabilities [groups].
    """
    return torch.sigmoid(_TEMPERATURE * math.log(-_LOW / _HIGH) - log_alpha)


def gate_penalty(
    weight: Float[Tensor, "groups ..."],
    log_alpha: Float[Tensor, " groups"],
    *,
    data_size: int,
    strength: float = 1.0,
    precision: float = 1.0,
    a: float = 1.0,
) -> Float[Tensor, ""]:
    """Return strength / data_size times the transformed l1 of the energies of groups of weights that a gate may close.

        E_g = (1 - pi_g) (strength #g + precision |w_g|^2 / 2)

    Here pi_g is `gate_closed`, and #g is the number of weights in the group.

    Args:
        weight: The weights that each gate controls, [groups, ...].
        log_alpha: The gates, [groups].
        data_size: The number of rows in the training set.
        strength: The energy per weight.
        precision: The precision of the weights' prior.
        a: As in `transformed_l1`.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: If the numbers of groups do not match.

    Source:
        TSCNC, arXiv 2503.20454.

    Differs:
        The published code has -E_g instead of |E_g|, and therefore a pole at E_g = a.

    Example:
        >>> from optim import diagnostics
        >>> bool(diagnostics.gate_penalty(torch.ones(2, 3), torch.zeros(2), data_size=100) > 0)
        True
    """
    if log_alpha.shape != weight.shape[:1]:
        raise ValueError(
            f"gate_penalty: log_alpha has shape {tuple(log_alpha.shape)} and weight {tuple(weight.shape)}; "
            "expected one gate per row of weight"
        )
    rows = weight.flatten(1)
    energy = (1 - gate_closed(log_alpha)) * (strength * rows.shape[1] + 0.5 * precision * rows.square().sum(1))
    return strength / data_size * transformed_l1(energy, a)
