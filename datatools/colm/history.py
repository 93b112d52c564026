"""The optimizer rule that turns gradients into features, with a state of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.errors import UsageError, did_you_mean
from optim import AdamWRule, SGDRule, State, UpdateMap, UpdateRule

_NAME = "features"


class History:
    """The state of an optimizer rule for features, and the directions in which it would move for each row's gradient.

    The state advances to the mean of the new states of the chosen rows, as in CoLM's code: its second moment is the
    mean of squared per-sample gradients, not the squared mean as in training.

    Args:
        rule: an elementwise rule.
        shape: shape of one row's gradient.

    Attributes:
        rule: the rule.
        param: zeros of `shape`, float32, which stand for the parameter.
        state: the state of the rule.

    Raises:
        UsageError: if the rule is not elementwise.

    Source:
        CoLM, arXiv 2407.19580, section 4.2, and its code (bias correction is applied when the state is used).

    Example:
        >>> history = History(feature_rule("adam", default="none"), shape=(2,))
        >>> history.advance(torch.ones(3, 2))
        >>> history.directions(torch.ones(1, 2))
        tensor([[1., 1.]])

    """

    def __init__(self, rule: UpdateRule, shape: Sequence[int]) -> None:
        if not rule.elementwise:
            raise UsageError(f"coreset: {rule.describe()} is not an elementwise rule; use adam or none")
        self.rule, self.param = rule, torch.zeros(tuple(shape))
        self.state: State = rule.init(self.param)

    @property
    def plain(self) -> bool:
        """Whether directions are the gradients themselves, so that there is no state."""
        return self.rule == SGDRule()

    def directions(self, grads: Float[Tensor, " n *shape"]) -> Float[Tensor, " n *shape"]:
        """Compute the direction for each row's gradient; the state does not change.

        Args:
            grads: floating dtype [n, *shape].

        Returns:
            [n, *shape].

        """
        if self.plain:
            return grads
        self._to(grads.device)
        return UpdateMap({_NAME: self.rule}, {_NAME: self.state}, {_NAME: self.param}).per_sample({_NAME: grads})[_NAME]

    def advance(self, grads: Float[Tensor, " n *shape"]) -> None:
        """Advance the state to the mean of the states that each row's gradient would lead to.

        Args:
            grads: floating dtype [n, *shape]; nothing changes for n = 0.

        """
        if self.plain or len(grads) == 0:
            return
        self._to(grads.device)
        after = self.rule.update(grads, self.state, self.param)[1]
        self.state = {k: v.mean(0) if v.ndim > self.state[k].ndim else v for k, v in after.items()}

    def _to(self, device: torch.device) -> None:
        self.param = self.param.to(device)
        self.state = {k: v if v.ndim == 0 else v.to(device) for k, v in self.state.items()}


def feature_rule(rule: str | UpdateRule, default: str) -> UpdateRule:
    """Look up the rule for features.

    Args:
        rule: "adam", "none", "auto" (which is `default`), or a rule, which is returned unchanged.
        default: meaning of "auto".

    Returns:
        The rule.

    Raises:
        UsageError: if the name is unknown.

    """
    if isinstance(rule, UpdateRule):
        return rule
    if rule == "auto":
        rule = default
    known = {"adam": AdamWRule(), "none": SGDRule()}
    if rule not in known:
        raise UsageError(f"coreset: rule={rule!r} does not exist{did_you_mean(rule, ('auto', *known))}")
    return known[rule]
