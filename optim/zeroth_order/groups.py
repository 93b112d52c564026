"""What a source may do with the param groups of an optimizer."""

from collections.abc import Mapping
from typing import Any

from optim.rule import UpdateRule
from optim.rules.sgd import SGDRule


def is_plain(group: Mapping[str, Any]) -> bool:
    """Return whether the group's step is just p - lr (g + weight_decay p), so that no gradient tensor is needed.

    Args:
        group: The param group.

    Returns:
        True for SGD without momentum.
    """
    rule = group.get("rule")
    return isinstance(rule, SGDRule) and rule.momentum == 0 and "rounding" not in group


def is_separate(group: Mapping[str, Any]) -> bool:
    """Return whether the group's tensors may be stepped one after another.

    Args:
        group: The param group.

    Returns:
        True for rules of this package that do not share anything.
    """
    rule = group.get("rule")
    return isinstance(rule, UpdateRule) and not rule.shares
