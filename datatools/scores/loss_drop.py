"""How far the loss of each row falls when a model is adapted to a target."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from datatools.errors import UsageError, did_you_mean

LENGTHS = ("mean", "sum", "capped")
"""What a drop of the mean loss is multiplied with: nothing, the answer's length, or its length up to a cap."""


def loss_drop(
    before: Float[Tensor, " n"],
    after: Float[Tensor, "n a"],
    lengths: Int64[Tensor, " n"],
    *,
    relative: bool = False,
    how: str = "mean",
    cap: float = float("inf"),
) -> Float32[Tensor, "n a"]:
    """The fall of each row's loss along each adaptation, higher is better.

        drop = (l_0 - l_T) f(length),  or  (l_0 - l_T) / l_0 f(length)  if `relative`
        f = 1 (mean), length (sum), min(length, cap) (capped)

    Args:
        before: [n], l_0: the mean loss over the answer of each row, any floating dtype.
        after: [n, a], l_T: the same after each of a adaptations.
        lengths: int64 [n], the tokens of each answer.
        relative: Divide by l_0, so that rows of low and of high loss can be compared.
        how: A name of `LENGTHS`. The mean favours short answers, of which one token may carry the whole drop; the sum
            favours long ones.
        cap: The length from which `capped` stays constant, such as the mean length of the target's answers.

    Returns:
        float32 [n, a]; NaN where a loss is not finite, where the answer has no token, and, if `relative`, where l_0 is
        0 and there is nothing to gain.

    Raises:
        UsageError: `how` is not a name of `LENGTHS`.
        ValueError: The shapes do not fit each other.

    Source:
        Raw drop: ToV, arXiv 2510.00386. Relative drop: TACS, arXiv 2605.09404, which takes l_0 after the first step of
        the adaptation. Differs: l_0 is the loss of the model before the adaptation, which all targets share; sum and
        cap are of this project.

    Example:
        >>> before, after = torch.tensor([2.0, 4.0]), torch.tensor([[1.5], [3.0]])
        >>> loss_drop(before, after, torch.tensor([1, 30])).flatten().tolist()
        [0.5, 1.0]
        >>> loss_drop(before, after, torch.tensor([1, 30]), relative=True, how="capped", cap=10.0).flatten().tolist()
        [0.25, 2.5]

    """
    if how not in LENGTHS:
        raise UsageError(f"loss_drop: there is no way {how!r} to weigh lengths{did_you_mean(how, LENGTHS)}")
    if before.shape != after.shape[:1] or lengths.shape != before.shape:
        raise ValueError(
            f"loss_drop: losses before {list(before.shape)}, after {list(after.shape)} and lengths "
            f"{list(lengths.shape)}; expected [n], [n, a] and [n]"
        )
    first = before.double()[:, None]
    drop = first - after.double()
    if relative:
        drop = torch.where(first > 0, drop / first, float("nan"))
    length = lengths.double()[:, None]
    factor = {"mean": torch.ones_like(length), "sum": length, "capped": length.clamp_max(cap)}[how]
    found = torch.where(length > 0, drop * factor, float("nan"))
    return torch.where(found.isfinite(), found, float("nan")).float()
