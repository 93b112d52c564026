"""The smoothness of a loss along a path of parameters, from gradients alone."""

import math
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from optim.curvature.losses import norm_of


def path_smoothness(
    points: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]], *, block: Callable[[str], str] | None = None
) -> dict[str, float]:
    """Return the smoothness along a path: the largest value over its steps.

    No Hessian is computed, and only two points are held at a time. Steps that do not change any parameter are ignored.

    Args:
        points: (parameters, gradients of one fixed batch), each by name.
        block: A function from parameter name to block; every tensor is its own block by default.

    Returns:
        `linf` = |dg|_1 / |dx|_inf, `l2` = |dg|_2 / |dx|_2, and `blockwise`, which uses l2 inside a block and l-infinity
        across blocks: sum_b |dg_b|_2 sqrt(#b) divided by max_b |dx_b|_2 / sqrt(#b). It equals `linf` if every block is
        one entry, and d times `l2` if there is one block. The values are NaN if no step changes a parameter.

    Example:
        >>> from optim import diagnostics
        >>> points = [({"w": torch.tensor([x])}, {"w": torch.tensor([3.0 * x])}) for x in (1.0, 2.0)]
        >>> diagnostics.path_smoothness(points)["l2"]
        3.0
    """
    found = {"linf": math.nan, "l2": math.nan, "blockwise": math.nan}
    before: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
    for params, grads in points:
        now = ({n: p.detach().clone() for n, p in params.items()}, {n: g.detach().clone() for n, g in grads.items()})
        if before is not None:
            moved = {n: (p - before[0][n]).double() for n, p in now[0].items()}
            turned = {n: (g - before[1][n]).double() for n, g in now[1].items()}
            for key, value in _ratios(moved, turned, block or (lambda name: name)).items():
                found[key] = value if math.isnan(found[key]) else max(found[key], value)
        before = now
    return found


def _ratios(moved: Mapping[str, Tensor], turned: Mapping[str, Tensor], block: Callable[[str], str]) -> dict[str, float]:
    furthest = max((float(x.abs().max()) for x in moved.values() if x.numel()), default=0.0)
    if furthest == 0:
        return {}
    blocks: dict[str, list[str]] = {}
    for name in moved:
        blocks.setdefault(block(name), []).append(name)
    above, below = 0.0, 0.0
    for names in blocks.values():
        size = math.sqrt(sum(moved[n].numel() for n in names))
        above += norm_of([turned[n] for n in names]) * size
        below = max(below, norm_of([moved[n] for n in names]) / size) if size else below
    return {
        "linf": sum(float(g.abs().sum()) for g in turned.values()) / furthest,
        "l2": norm_of(list(turned.values())) / norm_of(list(moved.values())),
        "blockwise": above / below,
    }
