"""Averaged weights, which `train()` and `eval()` of an optimizer swap, for rules that average (Schedule-Free)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

AVERAGED = "averaged"
"""Key of a param group whose parameters currently hold the averages; it is saved in state dicts."""


class AveragedWeights:
    """The part of `Optimizer` that swaps weights; it has no effect under rules that do not average.

    `eval()` writes the averages into the parameters, and `train()` writes back the weights at which gradients are
    computed. Both may be called at any time and any number of times; transformers.Trainer calls them automatically. The
    weights are kept while the averages are in place, so that an evaluation does not change a run by a single bit. If
    the optimizer was restored from a `state_dict` that was saved in between, `train()` computes the weights from the
    averages instead.

    Attributes:
        param_groups: The param groups of the optimizer.
        state: The state of each parameter.
    """

    param_groups: list[dict[str, Any]]
    state: Any

    def eval(self) -> None:
        """Write the averaged weights into the parameters, if the rule averages weights."""
        for group, param, state in self._averaging():
            average = None if group.get(AVERAGED) else group["rule"].average(state, param.detach())
            if average is not None:
                _kept(self)[param] = param.detach().clone()
                param.data.copy_(average)
        self._mark(True)

    def train(self) -> None:
        """Write the weights at which gradients are computed back into the parameters."""
        for group, param, state in self._averaging():
            if group.get(AVERAGED):
                kept = _kept(self).pop(param, None)
                param.data.copy_(group["rule"].from_average(state, param.detach()) if kept is None else kept)
        _kept(self).clear()
        self._mark(False)

    def check_training(self) -> None:
        """Check that the parameters do not hold averages.

        Raises:
            RuntimeError: If they hold averages, because a step would start from the wrong weights.
        """
        if any(group.get(AVERAGED) for group in self.param_groups):
            raise RuntimeError("the parameters are averages since eval(); call train() of the optimizer before a step")

    def _averaging(self) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Tensor]]]:
        for group in self.param_groups:
            if group["rule"].averages:
                for param in group["params"]:
                    if self.state.get(param):
                        yield group, param, self.state[param]

    def _mark(self, averaged: bool) -> None:
        for group in self.param_groups:
            if averaged and group["rule"].averages:
                group[AVERAGED] = True
            else:
                group.pop(AVERAGED, None)


def _kept(optimizer: AveragedWeights) -> dict[Tensor, Tensor]:
    """Return the weights of the parameters that now hold averages; torch neither copies nor pickles them."""
    kept: dict[Tensor, Tensor] = optimizer.__dict__.setdefault("_weights", {})
    return kept


@contextmanager
def averages_in_place(optimizer: Any) -> Iterator[None]:
    """Return a context in which the parameters hold the averages, if the optimizer has any; any package's will do.

    Args:
        optimizer: An optimizer. If it has no `train` and `eval`, nothing happens.

    Yields:
        None.

    Example:
        >>> import torch
        >>> from optim import ScheduleFreeSGD, averages_in_place
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = ScheduleFreeSGD([weight], lr=0.5, momentum=0.5)
        >>> for _ in range(2):
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        >>> with averages_in_place(optimizer):
        ...     print(weight.item())
        0.25
        >>> weight.item()
        0.125
    """
    swap = callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
    if swap:
        optimizer.eval()
    try:
        yield
    finally:
        if swap:
            optimizer.train()
