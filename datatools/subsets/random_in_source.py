"""Random rows of each source: the control that every other method has to beat."""

from typing import Any

import torch
from torch import Tensor

from datatools.selection.candidates import Selection
from datatools.subsets.method import CoresetMethod


def _choose(features: Tensor, k: int, *, generator: torch.Generator, **_: Any) -> Selection:
    return Selection(torch.randperm(len(features), generator=generator)[:k])


RANDOM_IN_SOURCE = CoresetMethod(
    name="random_in_source",
    title="random rows of each source: the control",
    choose=_choose,
    cost="nothing",
    features=False,
    control=True,
)
