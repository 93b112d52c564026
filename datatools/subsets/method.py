"""The record of a coreset method: a function from features to rows, and what other parts need to know about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from datatools.selection.candidates import Selection


class Choose(Protocol):
    """Signature of the function of a coreset method, which ignores the arguments that it does not use."""

    def __call__(
        self,
        features: Tensor,
        k: int,
        *,
        kept: Tensor,
        groups: Sequence[tuple[Tensor, int]],
        metric: str,
        generator: torch.Generator,
        wanted: Tensor,
        rate: float,
        memory: Tensor,
    ) -> Selection:
        """Choose k of the n rows of `features`.

        Args:
            features: floating dtype [n, d], finite.
            k: number of rows to choose, between 1 and n.
            kept: int64 [m], rows that are always chosen and count towards k; empty for methods of scope "source".
            groups: (rows, int64; number of them to choose) of disjoint groups; with `kept` the numbers add up to k. For
                methods of scope "source", all rows are one group.
            metric: a name of `METRICS`, for methods that compare rows.
            generator: source of randomness.
            wanted: floating dtype [d], the mean gradient of target rows; zeros for methods that need none.
            rate: the learning rate of the step.
            memory: floating dtype [m, d], features of the last rows that were chosen; m is at most the record's
                `memory`.

        Returns:
            `indices`, int64 [k], and `weights`, floating dtype [k], whose meaning the method's docstring states.

        """


@dataclass(frozen=True, kw_only=True)
class CoresetMethod:
    """One entry of `datatools.CORESET_METHODS`: a function and its description for trainer, report and docs.

    Attributes:
        name: value of the setting `coreset.method`.
        title: which rows are kept, in the words of the report after "trained on 8: ".
        choose: the function.
        cost: cost of a choice of k of n rows with feature dimension d, without computing the features.
        scope: "batch" if it sees the whole batch at once, with the rows that are kept anyway; "source" if it sees the
            rows of one source at a time.
        features: whether it reads features; if not, none are computed.
        reads: the kind of features that it needs in place of gradients, a name of `CORESET_FEATURES`; empty for
            gradients.
        rule: the rule from gradients to features that the setting "auto" means: "none" or "adam".
        coordinates: whether it reads the largest coordinates of features that are too long, instead of a random
            projection, which preserves inner products but not L1 distances.
        weighted: whether its rows have weights other than 1, by which the loss of each row must be multiplied.
        target: whether it needs the gradient of target rows.
        memory: number of rows, chosen lately, whose features it gets.
        control: whether it is the control for other methods, and causes no warning for being no better than random.

    Example:
        >>> def first(features, k, **_):
        ...     return Selection(torch.arange(k))
        >>> method = CoresetMethod(name="first", title="the first rows", choose=first, cost="none", features=False)
        >>> method.choose(torch.zeros(4, 1), 2).indices
        tensor([0, 1])

    """

    name: str
    title: str
    choose: Choose
    cost: str
    scope: Literal["batch", "source"] = "source"
    features: bool = True
    reads: str = ""
    rule: Literal["none", "adam"] = "none"
    coordinates: bool = False
    weighted: bool = False
    target: bool = False
    memory: int = 0
    control: bool = False
