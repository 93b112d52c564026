"""What is known about an optimizer of `torch.optim` that does what a rule here does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from optim.rule import UpdateRule

Group = Mapping[str, Any]
State = dict[str, Any]


def _same(rule: UpdateRule, state: Mapping[str, Any]) -> State | None:
    return dict(state)


def _copied(described: Mapping[str, Any], state: State) -> State:
    return state


@dataclass(frozen=True, kw_only=True)
class Counterpart:
    """An optimizer of torch and the rule with which its state dicts are exchanged.

    Args:
        name: The rule's key in `optim.RULES`.
        called: What torch calls it.
        keys: Keys of a param group by which torch's optimizer is told.
        make: Parameters -> torch's optimizer with its defaults.
        read: (a group that torch wrote, the rule) -> what it says about the rule's settings, besides those that the
            rule has anyway. Raises a ValueError for what does not exist here.
        write: (the description of a rule, weight decay) -> (settings of torch's class, weight decay there). Raises a
            ValueError for what does not exist there.
        same: Settings that the rule must have for `write`, if it has them at all.
        native: (rule, state that torch wrote) -> the state in the rule's entries; None if it holds nothing to continue
            with.
        entries: (the description of a rule, a copy of its state) -> the state in the entries of torch's class.
        settings: Settings of the rule that torch's class always has and its groups do not say.
        own_decay: Whether the decay that a group says is in the rule's settings, and so not the group's here.
    """

    name: str
    called: str
    keys: frozenset[str]
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    read: Callable[[Group, UpdateRule], dict[str, Any]]
    write: Callable[[Mapping[str, Any], float], tuple[dict[str, Any], float]]
    same: Mapping[str, Any] = field(default_factory=dict)
    native: Callable[[UpdateRule, Mapping[str, Any]], State | None] = _same
    entries: Callable[[Mapping[str, Any], State], State] = _copied
    settings: Mapping[str, Any] = field(default_factory=dict)
    own_decay: Callable[[Group], bool] = lambda group: False


def coupled(saved_group: Group) -> bool:
    """Return whether the optimizer of torch that wrote this group added its weight decay to the gradient."""
    decay: float = saved_group.get("weight_decay", 0.0)
    return decay != 0 and not saved_group.get("decoupled_weight_decay", True)


def first_step(buffer: torch.Tensor) -> State:
    """Return the state of a rule with momentum; torch counts no steps, so the count begins at 1, after a first one."""
    return {"step": torch.ones(()), "momentum_buffer": buffer}


def without_step(described: Mapping[str, Any], state: State) -> State:
    """Return the state without its count of steps, which torch's class does not have."""
    return {key: value for key, value in state.items() if key != "step"}
