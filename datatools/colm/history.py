"""What stands between gradients and features: an optimizer rule with a state of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datatools.errors import UsageError, did_you_mean
from optim import AdamWRule, SGDRule, State, UpdateMap, UpdateRule

_NAME = "features"


class History:
    """An optimizer's state of its own for features, and the directions that it would take of each row's gradient.

    The state moves on by the mean of the chosen rows' new states, as in CoLM's code: its second moment is the mean of
    squares of per-example gradients, not the square of the mean as in training.
    Source: CoLM, arXiv 2407.19580, section 4.2, and its code (bias correction is applied when the state is used).
    """

    def __init__(self, rule: UpdateRule, shape: Sequence[int]) -> None:
        if not rule.elementwise:
            raise UsageError(f"coreset: {rule.describe()} is not an elementwise rule; use adam, or none")
        self.rule, self.param = rule, torch.zeros(tuple(shape))
        self.state: State = rule.init(self.param)

    @property
    def plain(self) -> bool:
        """Whether directions are the gradients themselves: nothing to keep."""
        return self.rule == SGDRule()

    def directions(self, grads: Tensor) -> Tensor:
        """[n, *shape] -> [n, *shape]."""
        if self.plain:
            return grads
        self._to(grads.device)
        return UpdateMap({_NAME: self.rule}, {_NAME: self.state}, {_NAME: self.param}).per_sample({_NAME: grads})[_NAME]

    def advance(self, grads: Tensor) -> None:
        """Take the mean of the states that the rows of `grads` [n, *shape] would each lead to."""
        if self.plain or len(grads) == 0:
            return
        self._to(grads.device)
        after = self.rule.update(grads, self.state, self.param)[1]
        self.state = {k: v.mean(0) if v.ndim > self.state[k].ndim else v for k, v in after.items()}

    def _to(self, device: torch.device) -> None:
        self.param = self.param.to(device)
        self.state = {k: v if v.ndim == 0 else v.to(device) for k, v in self.state.items()}


def feature_rule(rule: str | UpdateRule, default: str) -> UpdateRule:
    """The rule called `rule`, "adam" or "none"; "auto" is `default`. Raises: UsageError for another name."""
    if isinstance(rule, UpdateRule):
        return rule
    if rule == "auto":
        rule = default
    known = {"adam": AdamWRule(), "none": SGDRule()}
    if rule not in known:
        raise UsageError(f"coreset: rule={rule!r} does not exist{did_you_mean(rule, ('auto', *known))}")
    return known[rule]
