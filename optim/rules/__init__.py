"""The table of rules, and making one from plain values."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from optim.optimizer import Optimizer
from optim.rule import UpdateRule
from optim.rules.adamw import AdamW, AdamWRule
from optim.rules.lion import Lion, LionRule
from optim.rules.muon import Muon, MuonRule
from optim.rules.sgd import SGD, SGDRule

RULES: dict[str, type[UpdateRule]] = {
    "adamw": AdamWRule,
    "lion": LionRule,
    "muon": MuonRule,
    "sgd": SGDRule,
}

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "lion": Lion,
    "muon": Muon,
    "sgd": SGD,
}


def rule_from(described: Mapping[str, Any]) -> UpdateRule:
    """The rule of `UpdateRule.describe`'s plain values.

    Raises: ValueError for a name that is not in `RULES`, TypeError for a field that the rule does not have.
    """
    name = described.get("name")
    if name not in RULES:
        raise ValueError(f"no rule is called {name!r}{did_you_mean(str(name), RULES)}")
    known = {f.name for f in fields(RULES[name])}
    values: dict[str, Any] = {}
    for key, value in described.items():
        if key == "name":
            continue
        if key not in known:
            raise TypeError(f"{name}: no setting {key!r}{did_you_mean(key, known)}")
        values[key] = rule_from(value) if isinstance(value, Mapping) else value
    return RULES[name](**values)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown word: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


__all__ = [
    "OPTIMIZERS",
    "RULES",
    "SGD",
    "AdamW",
    "AdamWRule",
    "Lion",
    "LionRule",
    "Muon",
    "MuonRule",
    "SGDRule",
    "did_you_mean",
    "rule_from",
]
