"""Cautious updates: an elementwise rule, restricted to the coordinates whose step agrees with the current gradient."""

from dataclasses import dataclass
from typing import ClassVar

from optim.checks import check_non_negative, check_positive, check_unit_interval
from optim.rule import OfParam, State, UpdateRule
from optim.rules.wrappers.around import Around


@dataclass(frozen=True, kw_only=True)
class Masked(Around):
    """What Cautious and Grams require of the rule inside.

    Args:
        inner: The rule inside.
    """

    def __post_init__(self) -> None:
        called = type(self).__name__
        if not isinstance(self.inner, UpdateRule) or not self.inner.elementwise:
            raise ValueError(f"{called}: inner = {self.inner!r}; it must be an elementwise rule such as AdamWRule()")
        if self.inner.reads:
            raise ValueError(
                f"{called}: inner = {self.inner!r}; its direction contains weight decay or averages, whose signs are "
                "not those of gradients, so it cannot be wrapped"
            )
        if not self.inner.step_is_update:
            raise ValueError(
                f"{called}: inner = {self.inner!r}; it has its own step, which cannot be wrapped; "
                "for stochastic rounding, use optim.set_rounding(optimizer, 'stochastic')"
            )

    @property
    def rounds_itself(self) -> bool:
        """Whether the rule rounds bfloat16 parameters itself: it does not, its step is that of `UpdateRule`."""
        return False

    def init(self, param: OfParam) -> State:
        """Return the inner rule's state."""
        return self.inner.init(param)


@dataclass(frozen=True, kw_only=True)
class Cautious(Masked):
    """Cautious updates: only the coordinates whose step agrees with the current gradient.

        u = d [d g > 0] / max(mean [d g > 0], least)

    Here d is the inner rule's direction, and the mean is over the tensor of N entries, so that the step keeps its size.
    Weight decay is not masked; Muon's `cautious_decay` only masks weight decay.

    Args:
        inner: An elementwise rule whose direction does not contain weight decay, such as AdamW or Lion.
        least: The smallest mean, which bounds the factor.
        xi: Added to the number of coordinates that agree, so that the factor is N / (their number + xi). In the paper
            and in the published Lion xi = 1; in the published AdamW xi = 0.

    Shapes:
        Any. Not elementwise, because of the mean over the tensor.

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
        check_positive("Cautious", least=self.least)
        check_non_negative("Cautious", xi=self.xi)

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, and the inner rule's new state."""
        direction, new = self.inner.update(grad, state, param)
        agrees = (direction * grad.to(direction.dtype) > 0).to(direction.dtype)
        share = (agrees.sum() + self.xi) / max(agrees.numel(), 1)
        return direction * (agrees / share.clamp(min=self.least)), new


@dataclass(frozen=True, kw_only=True)
class Grams(Masked):
    """Grams: the size of the inner rule's step with the sign of the current gradient.

        u = |d| sign(g)

    Args:
        inner: An elementwise rule whose direction does not contain weight decay; AdamW in the paper.

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
