"""The rows with the largest features: a baseline."""

from typing import Any

from torch import Tensor

from datatools.selection.candidates import Selection
from datatools.subsets.method import CoresetMethod


def _choose(features: Tensor, k: int, **_: Any) -> Selection:
    return Selection(features.double().norm(dim=1).argsort(descending=True, stable=True)[:k].cpu())


TOP_NORM = CoresetMethod(
    name="top_norm",
    title="the rows of each source with the largest gradients",
    choose=_choose,
    cost="O(n d)",
)
