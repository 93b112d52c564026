"""What a coreset method is: a function from features to rows, and what others need to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from datatools.selection.candidates import Selection


class Choose(Protocol):
    """The function of a coreset method; it ignores the arguments that mean nothing to it."""

    def __call__(
        self,
        features: Tensor,
        k: int,
        *,
        kept: Tensor,
        groups: Sequence[tuple[Tensor, int]],
        metric: str,
        generator: torch.Generator,
    ) -> Selection:
        """Choose k of the n rows of `features`.

        Args:
            features: Float [n, d], finite.
            k: How many rows; at least 1 and at most n.
            kept: Int64 [m], rows that are part of the k whatever happens; empty for methods of scope "source".
            groups: (rows int64, how many of them to choose), apart from each other; with `kept` they add up to k. For
                methods of scope "source", all rows are one group.
            metric: A name of `METRICS`, for methods that compare rows with each other.
            generator: Of everything random.

        Returns:
            `indices` int64 [k] and `weights` float [k], of which the method's docstring says what they mean.
        """


@dataclass(frozen=True, kw_only=True)
class CoresetMethod:
    """One entry of `datatools.CORESET_METHODS`: a function, and what the trainer, the report and the docs need to know.

    Attributes:
        name: What the setting `coreset.method` calls it.
        title: Which rows are kept, as the report says it after "trained on 8: ".
        choose: The function.
        cost: What a choice costs for n rows with d numbers of which k are kept, beside making the features.
        scope: Whether it sees the whole batch at once, with the rows that are kept anyway ("batch"), or the rows of one
            source at a time ("source").
        features: Whether it reads features at all; if not, none are made.
        rule: What stands between gradients and features where the setting says "auto": "none" or "adam".
        coordinates: Whether it reads the largest coordinates of the features where there are too many, rather than a
            random projection, which keeps inner products but not L1 distances.
        weighted: Whether its rows have weights other than 1, which the loss of each row has to be multiplied by.
        control: Whether it is what others are compared with, and is not warned about for being no better than random.
    """

    name: str
    title: str
    choose: Choose
    cost: str
    scope: Literal["batch", "source"] = "source"
    features: bool = True
    rule: Literal["none", "adam"] = "none"
    coordinates: bool = False
    weighted: bool = False
    control: bool = False
