"""Param groups in which the settings of the rule are read and written by their own names, as in `torch.optim`."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import torch

from optim.rule import UpdateRule

CHANGED = "changed"
"""Key of a group: the settings that were written to it after it was made, which a state dict carries with it."""

_OWN = frozenset({"params", "param_names", "rule", "lr", "weight_decay", CHANGED})
"""Keys of the group itself."""

_LABELS = frozenset({"block", "lr_ratio"})
"""Keys with which `optim.param_groups` makes groups: labels, also where a rule has such a setting."""

TORCH_FLAGS = {  # refused, with advice
    "maximize": "minimise the negated loss instead",
    "foreach": "parameters are always grouped where the rule can",
    "fused": "rules choose their fast path themselves",
    "capturable": "step counts live on the CPU here",
    "differentiable": "differentiate UpdateRule.update instead",
}


class ParamGroup(dict[str, Any]):
    """A param group: `params`, `rule`, `lr`, `weight_decay`, and the settings of the rule as if they were keys too.

    ``group["momentum"]`` is the rule's setting of that name. ``group["momentum"] = 0.9`` replaces ``group["rule"]`` by
    the rule with the new value, which the rule checks, so that it takes effect from the next step on. The rule remains
    the only place of a setting: iterating over the group does not show settings.

    If a scheduler cycles `momentum` (torch's `OneCycleLR` and `CyclicLR`, which leave `base_momentum` in the group) and
    the rule has `betas` instead, `momentum` is the first of them, as in torch's own Adam.

    Raises:
        ValueError: For a value that the rule refuses, and for the name of a hyper-parameter (of any rule, or of an
            optimizer of torch) that this rule does not have; other keys are the user's own and are kept.
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
        if key in _OWN or not isinstance(rule, UpdateRule):
            dict.__setitem__(self, key, value)
        elif key in rule.settings():
            dict.__setitem__(self, "rule", rule.with_settings(**{key: _plain(value)}))
        elif key == "momentum" and "betas" in rule.settings():
            dict.__setitem__(self, key, value)  # whether a scheduler cycles it shows later
            if dict.__contains__(self, "base_momentum"):
                self.settle()
        else:
            _check_key(rule, key, value)
            if key not in TORCH_FLAGS:
                dict.__setitem__(self, key, value)

    def settle(self) -> UpdateRule:
        """Return the rule that the next step runs with.

        Raises:
            ValueError: If `momentum` was written to a group whose rule has none and no scheduler cycles it.
        """
        rule = self._rule()
        if dict.__contains__(self, "momentum"):
            if not dict.__contains__(self, "base_momentum"):
                dict.pop(self, "momentum")
                raise ValueError(
                    f"param group: the rule {rule.name!r} has no 'momentum', so writing it to this group has no "
                    "effect; write it to the groups that have it (`if \"momentum\" in group`), and here 'betas'"
                )
            first = dict.pop(self, "momentum")
            self["betas"] = (first, *rule.setting("betas")[1:])
        settled: UpdateRule = self._rule()
        return settled


def changed_settings(group: Mapping[str, Any]) -> set[str]:
    """Return the settings of a group, in use or saved, that were written after its creation."""
    by_scheduler = {"betas", "momentum"} if "base_momentum" in group and "rule" not in group else set()
    return set(group.get(CHANGED, ())) | by_scheduler


def described_setting(described: Mapping[str, Any], key: str) -> Any:
    """Return the setting of that name from a rule's plain values, of the rule itself or of one inside it.

    Raises:
        KeyError: If there is none.
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
    """A number out of a tensor or an array of one element, also inside a list or tuple; lists become tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    one = not isinstance(value, bool | int | float | str) and getattr(value, "ndim", None) is not None
    return value.item() if one and getattr(value, "size", None) is not None and _size(value) == 1 else value


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else int(value.size)


def _check_key(rule: UpdateRule, key: str, value: Any) -> None:
    """ValueError for a key that somebody would expect to steer the step, and that this rule does not read."""
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
            f"param group: {key!r} is no setting of the rule {rule.name!r}, so {key} = {value!r} would have no effect; "
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
    """What rules here and optimizers of torch call their settings; computed again when there are more rules."""
    names = {field.name for rule in _rules() for field in fields(rule)}
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            names |= set(inspect.signature(kind).parameters)
    return frozenset(names | {"beta", "beta1", "beta2", "epsilon"} - _OWN - {"self", "defaults"})
