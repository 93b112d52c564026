"""What a source may do with the param groups of an optimizer."""

from collections.abc import Mapping
from typing import Any

from optim.rule import UpdateRule
from optim.rules.sgd import SGDRule


def is_plain(group: Mapping[str, Any]) -> bool:
    """Whether the group's step is p - lr (g + weight_decay p) and nothing else: then no gradient tensor is made."""
    rule = group.get("rule")
    return isinstance(rule, SGDRule) and rule.momentum == 0 and "rounding" not in group


def is_separate(group: Mapping[str, Any]) -> bool:
    """Whether the group's tensors may be stepped one after another: rules of this suite that share nothing."""
    rule = group.get("rule")
    return isinstance(rule, UpdateRule) and not rule.shares
