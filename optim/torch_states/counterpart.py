"""The record of a torch optimizer that does the same as a rule here."""

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
    """A torch optimizer and the rule with which its state dicts are exchanged.

    Args:
        name: The rule's key in `optim.RULES`.
        called: The name of torch's class.
        keys: Keys of a param group by which torch's optimizer is recognised.
        make: A function from parameters to torch's optimizer with its defaults.
        read: A function from a group that torch wrote, and the rule, to the rule's settings that the group determines.
            It raises a ValueError for what does not exist here.
        write: A function from the description of a rule, and the weight decay, to the settings of torch's class and its
            weight decay. It raises a ValueError for what does not exist in torch.
        same: Settings that the rule must have for `write`, if it has them at all.
        native: A function from the rule, and a state that torch wrote, to the state with the rule's entries; None if
            the state has nothing to continue with.
        entries: A function from the description of a rule, and a copy of its state, to the state with the entries of
            torch's class.
        settings: Settings of the rule that torch's class always has and that its groups do not contain.
        own_decay: A function from a group to whether its weight decay is a setting of the rule and not of the group
            here.
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
    """Return whether the torch optimizer that wrote a group added its weight decay to the gradient.

    Args:
        saved_group: The param group.

    Returns:
        True if it did.
    """
    decay: float = saved_group.get("weight_decay", 0.0)
    return decay != 0 and not saved_group.get("decoupled_weight_decay", True)


def first_step(buffer: torch.Tensor) -> State:
    """Return the state of a rule with momentum. Torch does not count steps, so the count is 1, as after the first step.

    Args:
        buffer: The momentum, of the parameter's shape.

    Returns:
        The step count and the momentum.
    """
    return {"step": torch.ones(()), "momentum_buffer": buffer}


def without_step(described: Mapping[str, Any], state: State) -> State:
    """Return the state without its step count, which torch's class does not have.

    Args:
        described: The description of the rule.
        state: The state of a parameter.

    Returns:
        The remaining entries.
    """
    return {key: value for key, value in state.items() if key != "step"}
