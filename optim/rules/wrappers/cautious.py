"""Cautious updates: of any elementwise rule, only the coordinates whose step the present gradient agrees with."""

from dataclasses import dataclass
from typing import ClassVar

from optim.checks import check_non_negative, check_unit_interval
from optim.rule import OfParam, State, UpdateRule
from optim.rules.wrappers.around import Around


@dataclass(frozen=True, kw_only=True)
class Masked(Around):
    """What Cautious and Grams ask of the rule inside."""

    def __post_init__(self) -> None:
        called = type(self).__name__
        if not isinstance(self.inner, UpdateRule) or not self.inner.elementwise:
            raise ValueError(f"{called}: inner = {self.inner!r}; it must be an elementwise rule such as AdamWRule()")
        if self.inner.reads:
            raise ValueError(
                f"{called}: inner = {self.inner!r}; its direction contains weight decay or averages, whose signs are "
                "not those of gradients"
            )
        if not self.inner.step_is_update:
            raise ValueError(
                f"{called}: inner = {self.inner!r}; it has a step of its own; "
                "round with optim.set_rounding(optimizer, 'stochastic') instead"
            )

    @property
    def rounds_itself(self) -> bool:
        """Whether the rule rounds bfloat16 parameters itself: no, its step is that of `UpdateRule`."""
        return False

    def init(self, param: OfParam) -> State:
        """Return the inner rule's state."""
        return self.inner.init(param)


@dataclass(frozen=True, kw_only=True)
class Cautious(Masked):
    """Cautious updates: only the coordinates whose step the present gradient agrees with.

        u = d [d g > 0] / max(mean [d g > 0], least)

    d is the inner rule's direction, and the mean is over the tensor of N entries, so that the step keeps its size.
    Weight decay is not masked; Muon's `cautious_decay` masks the decay and nothing else.

    Args:
        inner: An elementwise rule with the group's weight decay outside its direction, such as AdamW or Lion.
        least: The least mean, which bounds the factor.
        xi: Added to the number of coordinates that agree: the factor is N / (their number + xi), as in the paper and in
            the published Lion (xi = 1); the published AdamW has 0.

    Shapes:
        Any. The mean over the tensor makes it not elementwise.

    State:
        The inner rule's.

    Source:
        Liang et al. 2024, arXiv 2411.16085; kyleliang919/C-Optim.

    Example:
        >>> import torch
        >>> from optim import AdamWRule, Cautious, Optimizer
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Optimizer(model.named_parameters(), Cautious(inner=AdamWRule()), lr=1e-3)
        >>> optimizer.param_groups[0]["rule"].name
        'cautious'
    """

    name: ClassVar[str] = "cautious"
    elementwise: ClassVar[bool] = False

    least: float = 1e-3
    xi: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit_interval("Cautious", least=self.least)
        check_non_negative("Cautious", xi=self.xi)
        if self.least == 0:
            raise ValueError("Cautious: least = 0; it must be above 0 (0 / 0 where no coordinate agrees)")

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, and the inner rule's new state."""
        direction, new = self.inner.update(grad, state, param)
        agrees = (direction * grad.to(direction.dtype) > 0).to(direction.dtype)
        share = (agrees.sum() + self.xi) / max(agrees.numel(), 1)
        return direction * (agrees / share.clamp(min=self.least)), new


@dataclass(frozen=True, kw_only=True)
class Grams(Masked):
    """Grams: the size of the inner rule's step, in the direction of the present gradient.

        u = |d| sign(g)

    Args:
        inner: An elementwise rule with the group's weight decay outside its direction; AdamW in the paper.

    Shapes:
        Elementwise.

    State:
        The inner rule's.

    Source:
        Cao et al. 2024, arXiv 2412.17107; Gunale0926/Grams, which adds epsilon before the bias correction
        (``AdamWRule(eps_before_correction=True)``).

    Example:
        >>> import torch
        >>> from optim import Grams, LionRule, Optimizer
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Optimizer(model.named_parameters(), Grams(inner=LionRule()), lr=1e-4)
        >>> optimizer.param_groups[0]["rule"].name
        'grams'
    """

    name: ClassVar[str] = "grams"

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, and the inner rule's new state."""
        direction, new = self.inner.update(grad, state, param)
        return direction.abs() * grad.to(direction.dtype).sign(), new
