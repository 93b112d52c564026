"""How evenly a matrix uses its directions: spectra of weights and updates, by the role of the matrix."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from optim.saved import bare_name

Role = Literal["q", "k", "v", "o", "ffn_in", "ffn_gate", "ffn_out"]

ROLE_GROUPS: Mapping[str, tuple[str, ...]] = {
    "qk": ("q", "k"),
    "vo": ("v", "o"),
    "ffn": ("ffn_in", "ffn_gate", "ffn_out"),
}
"""The groups over which arXiv 2509.26030 averages."""


def spectrum(matrix: Float[Tensor, "m ..."], *, top: Sequence[int] = (1, 3, 10)) -> dict[str, float]:
    """Return how isotropic the singular values s_1 >= ... >= s_r of a matrix are, with r = min(m, n).

    Args:
        matrix: A tensor [m, n]; more dimensions are flattened to [m, rest]. float64 is computed in float64, and all
            other dtypes in float32.
        top: The numbers K of `topK`.

    Returns:
        With energies q_i = s_i^2 / sum s^2: `svd_entropy_normalized` = -sum q ln q / ln r (1 if isotropic, 0 for rank
        one; 1 if r = 1), `effective_rank` = exp(-sum q ln q) (r if isotropic, 1 for rank one), `effective_rank_roy`,
        the same for s_i / sum s (the older definition, which gives another number), `topK` = sum of the K largest q,
        `q75_q25` = quantile(s^2, 0.75) / quantile(s^2, 0.25) with linear interpolation, `stable_rank` = sum s^2 /
        s_1^2, `participation` = 1 / sum q^2, `cond` = s_1 / s_r, and `sigma_ratio` = s_r / s_1. All are NaN if the
        matrix is zero or not finite; ratios may be infinite.

    Cost:
        One `svdvals`.

    Raises:
        ValueError: For a tensor with fewer than two dimensions or without entries.

    Source:
        arXiv 2509.26030 section 4.2.

    Example:
        >>> from optim import diagnostics
        >>> round(diagnostics.spectrum(torch.eye(4))["effective_rank"], 4)
        4.0
    """
    if matrix.ndim < 2 or matrix.numel() == 0:
        raise ValueError(f"spectrum: a tensor of shape {tuple(matrix.shape)} has no singular values; expected a matrix")
    names = ["svd_entropy_normalized", "effective_rank", "effective_rank_roy", *(f"top{k}" for k in top), "q75_q25",
             "stable_rank", "participation", "cond", "sigma_ratio"]  # fmt: skip
    flat = matrix.detach().flatten(1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    if not bool(flat.isfinite().all()) or not bool(flat.any()):
        return dict.fromkeys(names, math.nan)
    s = torch.linalg.svdvals(flat).double()
    s = s / s[0]  # otherwise squares of tiny values would be zero
    r, energy = len(s), s.square()
    q = energy / energy.sum()
    entropy = float(-torch.special.xlogy(q, q).sum())
    share = s / s.sum()
    ends = torch.quantile(energy, torch.tensor([0.25, 0.75], dtype=s.dtype, device=s.device)).tolist()
    values = [
        entropy / math.log(r) if r > 1 else 1.0,
        math.exp(entropy),
        math.exp(float(-torch.special.xlogy(share, share).sum())),
        *(float(q[:k].sum()) for k in top),
        _ratio(ends[1], ends[0]),
        float(energy.sum()),
        1 / float(q.square().sum()),
        _ratio(1.0, float(s[-1])),
        float(s[-1]),
    ]
    return dict(zip(names, values, strict=True))


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.inf


_PATTERNS: tuple[tuple[str, str], ...] = (
    ("q", r"^(w?q|q_(proj|attn|lin)|query)$"),
    ("k", r"^(w?k|k_(proj|attn|lin)|key)$"),
    ("v", r"^(w?v|v_(proj|attn|lin)|value)$"),
    ("ffn_gate", r"^(gate_proj|w1_gate|gate)$"),
    ("ffn_in", r"^(up_proj|c_fc|fc1|fc_in|lin1|dense_h_to_4h|w1|w3|intermediate)$"),
    ("ffn_out", r"^(down_proj|fc2|fc_out|lin2|dense_4h_to_h|w2)$"),
    ("o", r"^(w?o|o_proj|out_proj|out_lin)$"),
)
_QKV = re.compile(r"^(c_attn|qkv(_proj)?|w_?qkv|query_key_value|in_proj(_weight)?)$")


def roles(
    name: str, weight: Tensor, *, heads: int | None = None, kv_heads: int | None = None
) -> list[tuple[Role, Tensor]]:
    """Return the matrices of a transformer that a parameter contains, each with its role.

    Query, key and value in one matrix are split, and so are gate and input of a feed-forward layer: by rows in the
    order q, k, v with `heads` and `kv_heads` (Phi-3), by columns (GPT-2's `c_attn`, whose weights are [in, out]), or
    head by head (GPT-NeoX's `query_key_value`).

    Args:
        name: The name of the parameter.
        weight: The parameter, of any shape.
        heads: The number of query heads of the model.
        kv_heads: The number of key and value heads of the model.

    Returns:
        Pairs of role and matrix; empty if the parameter contains none.

    Raises:
        ValueError: For a fused matrix whose heads are not given or do not divide it.

    Example:
        >>> from optim import diagnostics
        >>> [role for role, _ in diagnostics.roles("layers.0.self_attn.q_proj.weight", torch.empty(4, 4))]
        ['q']
    """
    if weight.ndim != 2:
        return []
    parts = bare_name(name).lower().split(".")
    if parts[-1] not in ("weight", "in_proj_weight") or "norm" in name.lower() or "embed" in name.lower():
        return []
    owner = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    in_attention = any("attn" in p or "attention" in p for p in parts)
    if owner == "gate_up_proj":
        gate, up = weight.chunk(2)
        return [("ffn_gate", gate), ("ffn_in", up)]
    if _QKV.match(owner):
        return _split(name, owner, weight, heads, kv_heads)
    for role, pattern in _PATTERNS:
        if re.match(pattern, owner):
            return [(role, weight)]  # type: ignore[list-item]
    if owner in ("c_proj", "dense", "proj"):
        if in_attention:
            return [("o", weight)]
        return [("ffn_in" if "intermediate" in parts else "ffn_out", weight)] if owner != "proj" else []
    return []


def _split(name: str, owner: str, weight: Tensor, heads: int | None, kv_heads: int | None) -> list[tuple[Role, Tensor]]:
    columns = owner == "c_attn"
    w = weight.T if columns else weight  # [q, k and v, in]
    if owner == "query_key_value" and heads:
        if len(w) % (3 * heads):
            raise ValueError(f"roles: {name!r} has {len(w)} rows, which cannot be divided into 3 x {heads} heads")
        grouped = w.reshape(heads, 3, -1, w.shape[1])
        found = [grouped[:, i].flatten(0, 1) for i in range(3)]
    elif heads and kv_heads and heads != kv_heads:
        if len(w) % (heads + 2 * kv_heads):
            raise ValueError(
                f"roles: {name!r} has {len(w)} rows, which cannot be divided into {heads} query heads and 2 x "
                f"{kv_heads} other heads"
            )
        size = len(w) // (heads + 2 * kv_heads)
        found = list(torch.split(w, [heads * size, kv_heads * size, kv_heads * size]))
    elif owner == "query_key_value":
        raise ValueError(f"roles: {name!r} contains query, key and value head by head; pass heads=")
    else:
        if len(w) % 3:
            raise ValueError(f"roles: {name!r} has {len(w)} rows, not a multiple of 3; pass heads= and kv_heads=")
        found = list(w.chunk(3))
    q, k, v = ((part.T if columns else part) for part in found)
    return [("q", q), ("k", k), ("v", v)]


def by_role(measured: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the mean, spread and count of each metric, by role or group of roles.

    The groups are `ROLE_GROUPS`. A matrix for which a metric is not finite is omitted from that metric's mean.

    Args:
        measured: (role, its metrics) of every matrix.

    Returns:
        A mapping from role or group to metric to `mean`, `spread` (over the matrices) and `count`.

    Example:
        >>> from optim import diagnostics
        >>> diagnostics.by_role([("Q", {"cond": 2.0}), ("Q", {"cond": 4.0})])["Q"]["cond"]["mean"]
        3.0
    """
    rows = list(measured)
    found: dict[str, dict[str, dict[str, float]]] = {}
    present = list(dict.fromkeys(role for role, _ in rows))
    for label, members in [*((role, (role,)) for role in present), *ROLE_GROUPS.items()]:
        chosen = [metrics for role, metrics in rows if role in members]
        if not chosen:
            continue
        found[label] = {}
        for metric in chosen[0]:
            values = [metrics[metric] for metrics in chosen if math.isfinite(metrics[metric])]
            found[label][metric] = {
                "mean": fmean(values) if values else math.nan,
                "spread": pstdev(values) if values else math.nan,
                "count": len(values),
            }
    return found
