"""Param groups in which the settings of the rule can be read and written by their names, as in `torch.optim`."""

import difflib
import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import torch

from optim.rule import UpdateRule

CHANGED = "changed"
"""Key of a group that lists the settings that were written to it after its creation; it is saved in state dicts."""

_OWN = frozenset({"params", "param_names", "rule", "lr", "weight_decay", CHANGED})
"""Keys that belong to the group itself."""

_LABELS = frozenset({"block", "lr_ratio"})
"""Keys that `optim.param_groups` gives to groups. They are labels, even if a rule has a setting of the same name."""

TORCH_FLAGS = {  # refused, with advice
    "maximize": "minimise the negated loss instead",
    "foreach": "parameters are always grouped if the rule supports it",
    "fused": "each rule chooses its fast path itself",
    "capturable": "step counts are on the CPU here",
    "differentiable": "differentiate UpdateRule.update instead",
}


def checked(key: str, value: Any) -> Any:
    """Return a learning rate or a weight decay as a step takes it, after checking it.

    Args:
        key: "lr" or "weight_decay", for the message.
        value: A number, also of NumPy, or for a learning rate a tensor with one element.

    Returns:
        The number, as one of Python if it was one of NumPy.

    Raises:
        ValueError: Unless it is one finite number of at least 0. Anything else would end in weights that are not
            finite, or in training that goes uphill.
    """
    if isinstance(value, torch.Tensor) and key == "lr":
        if value.numel() != 1:
            raise ValueError(f"lr is a tensor with {value.numel()} elements; it must be one number")
    elif not isinstance(value, torch.Tensor):
        value = _plain(value)
    number = isinstance(value, int | float) or (isinstance(value, torch.Tensor) and key == "lr")
    if isinstance(value, bool) or not number or not 0 <= float(value) < math.inf:
        raise ValueError(f"{key} = {value!r}; it must be a finite number of at least 0")
    return value


class ParamGroup(dict[str, Any]):
    """A param group: `params`, `rule`, `lr`, `weight_decay`, and the settings of the rule as if they were keys.

    ``group["momentum"]`` is the rule's setting of that name. ``group["momentum"] = 0.9`` replaces ``group["rule"]`` by
    the rule with the new value, which the rule checks and which takes effect from the next step on. Settings are only
    stored in the rule, so that iterating over the group does not show them.

    If a scheduler cycles `momentum` (torch's `OneCycleLR` and `CyclicLR`, which add `base_momentum` to the group) and
    the rule has `betas` instead, `momentum` is the first of them, as in torch's own Adam.

    Args:
        group: The keys and values.

    Raises:
        ValueError: For a value that the rule refuses, and for the name of a hyper-parameter (of any rule, or of a torch
            optimizer) that this rule does not have. Other keys are the user's own and are kept.
    """

    settled: UpdateRule | None = None
    """The rule that the last step ran with."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        super().__init__(group)
        if isinstance(self._rule(), UpdateRule):
            for key in [key for key in self if key not in _OWN | _LABELS]:
                value = dict.pop(self, key)
                self._store(key, value)

    def _rule(self) -> Any:
        return dict.get(self, "rule")

    def _has(self, key: str) -> bool:
        rule = self._rule()
        return key not in _OWN and isinstance(rule, UpdateRule) and key in rule.settings()

    def __missing__(self, key: str) -> Any:
        if self._has(key):
            return self._rule().setting(key)
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and self._has(key))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key as a dict does, settings included."""
        return self[key] if key in self else default  # noqa: SIM401, this is that `get`

    def __setitem__(self, key: str, value: Any) -> None:
        if self._has(key) and _plain(value) != self._rule().setting(key):
            dict.__setitem__(self, CHANGED, sorted({*dict.get(self, CHANGED, ()), key}))
        self._store(key, value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, setting it first if it is missing, as a dict does."""
        if key not in self:
            self[key] = default
        return self.get(key, default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several keys as a dict does."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> "ParamGroup":  # type: ignore[override, misc]
        self.update(other)
        return self

    def copy(self) -> "ParamGroup":
        """Return another group with the same tensors."""
        return ParamGroup(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return ParamGroup, (dict(self),)

    def _store(self, key: str, value: Any) -> None:
        rule = self._rule()
        if key in ("lr", "weight_decay"):
            dict.__setitem__(self, key, checked(key, value))
        elif key in _OWN or not isinstance(rule, UpdateRule):
            dict.__setitem__(self, key, value)
        elif key in rule.settings():
            dict.__setitem__(self, "rule", rule.with_settings(**{key: _plain(value)}))
        elif key == "momentum" and "betas" in rule.settings():
            dict.__setitem__(self, key, value)  # `settle` sees if a scheduler cycles it
            if dict.__contains__(self, "base_momentum"):
                self.settle()
        else:
            _check_key(rule, key, value)
            if key not in TORCH_FLAGS:
                dict.__setitem__(self, key, value)

    def settle(self) -> UpdateRule:
        """Return the rule that the next step runs with.

        Returns:
            The rule, with a momentum that a scheduler wrote as the first of its betas.

        Raises:
            ValueError: If `momentum` was written to a group whose rule has none and no scheduler cycles it.
        """
        rule = self._rule()
        if dict.__contains__(self, "momentum"):
            if not dict.__contains__(self, "base_momentum"):
                dict.pop(self, "momentum")
                raise ValueError(
                    f"param group: the rule {rule.name!r} has no 'momentum', so writing it to this group has no "
                    "effect; write it to the groups that have it (`if \"momentum\" in group`), and set 'betas' here"
                )
            first = dict.pop(self, "momentum")
            self["betas"] = (first, *rule.setting("betas")[1:])
        settled: UpdateRule = self._rule()
        return settled


def changed_settings(group: Mapping[str, Any]) -> set[str]:
    """Return the settings of a group that were written after its creation.

    Args:
        group: A param group, in use or saved.

    Returns:
        The names of the settings.
    """
    by_scheduler = {"betas", "momentum"} if "base_momentum" in group and "rule" not in group else set()
    return set(group.get(CHANGED, ())) | by_scheduler


def described_setting(described: Mapping[str, Any], key: str) -> Any:
    """Return a setting from a rule's plain values, of the rule itself or of a rule inside it.

    Args:
        described: What `UpdateRule.describe` returned.
        key: The name of the setting.

    Returns:
        The value.

    Raises:
        KeyError: If there is none of that name.
    """
    if key in described:
        return described[key]
    for value in described.values():
        if isinstance(value, Mapping):
            try:
                return described_setting(value, key)
            except KeyError:
                continue
    raise KeyError(key)


def _plain(value: Any) -> Any:
    """Return tensors and arrays with one element as numbers, also inside lists and tuples; lists become tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    one = not isinstance(value, bool | int | float | str) and getattr(value, "ndim", None) is not None
    return value.item() if one and getattr(value, "size", None) is not None and _size(value) == 1 else value


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else int(value.size)


def _check_key(rule: UpdateRule, key: str, value: Any) -> None:
    """Raise a ValueError for a key that looks like a hyper-parameter but that this rule does not read."""
    if key in _LABELS:
        return
    if key in TORCH_FLAGS:
        if value:
            raise ValueError(f"param group: {key} is not supported; {TORCH_FLAGS[key]}")
        return
    settings = rule.settings()
    known = ", ".join(sorted(settings)) or "none"
    if key in _hyper_parameters(_count_rules()):
        raise ValueError(
            f"param group: the rule {rule.name!r} has no setting {key!r}, so {key} = {value!r} would have no effect; "
            f"its settings: {known}"
        )
    close = difflib.get_close_matches(key, settings, n=1, cutoff=0.85)
    if close:
        raise ValueError(
            f"param group: {key!r} is not a setting of the rule {rule.name!r}, so {key} = {value!r} would have no "
            "effect; "
            f"did you mean {close[0]!r}? Its settings: {known}"
        )


def _rules(parent: type[UpdateRule] = UpdateRule) -> Iterable[type[UpdateRule]]:
    for rule in parent.__subclasses__():
        yield rule
        yield from _rules(rule)


def _count_rules() -> int:
    return sum(1 for _ in _rules())


@cache
def _hyper_parameters(_: int) -> frozenset[str]:
    """Return all names of settings of rules here and of torch's optimizers; the number of rules is the cache key."""
    names = {field.name for rule in _rules() for field in fields(rule)}
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            names |= set(inspect.signature(kind).parameters)
    return frozenset(names | {"beta", "beta1", "beta2", "epsilon"} - _OWN - {"self", "defaults"})
