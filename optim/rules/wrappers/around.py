"""What rules around another rule have in common: how they use the rule inside."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class Around(UpdateRule, ABC):
    """A rule around another rule, which has its state; `inside` is that state in the form of the inner rule.

    Args:
        inner: The rule inside.
    """

    inner: UpdateRule

    def inside(self, state: State, param: Tensor) -> State:
        """Return the state in the form of the inner rule; it is the same unless the wrapper stores it differently.

        Args:
            state: The state of the wrapper.
            param: The parameter.

        Returns:
            The state of the inner rule.
        """
        return state

    def decay(self, direction: OfParam, state: State, param: OfParam) -> OfParam:
        """Return what the inner rule's `decay` returns for its state."""
        return self.inner.decay(direction, self.inside(state, param), param)

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """Share what the inner rule shares."""
        self.inner.share(grads, states, group)

    @property
    def shares(self) -> bool:
        """Whether the inner rule shares anything; the wrapper itself does not connect tensors."""
        return self.inner.shares

    @property
    def coupled(self) -> bool:
        """Whether tensors share something under the inner rule."""
        return self.inner.coupled

    @property
    def rounds_itself(self) -> bool:
        """Whether the inner rule, which writes the parameters, can round them stochastically."""
        return self.inner.rounds_itself

    @property
    def reads(self) -> frozenset[str]:
        """What the inner rule reads from its group."""
        return self.inner.reads

    @property
    def averages(self) -> bool:
        """Whether the inner rule averages weights."""
        return self.inner.averages

    def average(self, state: State, param: Tensor) -> Tensor | None:
        """Return the inner rule's averaged weights."""
        return self.inner.average(self.inside(state, param), param)

    def from_average(self, state: State, average: Tensor) -> Tensor:
        """Return the inner rule's weights for that average."""
        return self.inner.from_average(self.inside(state, average), average)
