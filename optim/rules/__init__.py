"""The table of rules, and making one from plain values."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from optim.optimizer import Optimizer
from optim.rule import UpdateRule
from optim.rules.adabelief import AdaBelief, AdaBeliefRule
from optim.rules.adamp import AdamP, AdamPRule
from optim.rules.adamw import AdamW, AdamWRule
from optim.rules.exadam import EXAdam, EXAdamRule
from optim.rules.lion import Lion, LionRule
from optim.rules.muon import Muon, MuonRule
from optim.rules.nadam import NAdam, NAdamRule
from optim.rules.sgd import SGD, SGDRule
from optim.rules.sgdp import SGDP, SGDPRule

RULES: dict[str, type[UpdateRule]] = {
    "adabelief": AdaBeliefRule,
    "adamp": AdamPRule,
    "adamw": AdamWRule,
    "exadam": EXAdamRule,
    "lion": LionRule,
    "muon": MuonRule,
    "nadam": NAdamRule,
    "sgd": SGDRule,
    "sgdp": SGDPRule,
}

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adabelief": AdaBelief,
    "adamp": AdamP,
    "adamw": AdamW,
    "exadam": EXAdam,
    "lion": Lion,
    "muon": Muon,
    "nadam": NAdam,
    "sgd": SGD,
    "sgdp": SGDP,
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
    "SGDP",
    "AdaBelief",
    "AdaBeliefRule",
    "AdamP",
    "AdamPRule",
    "AdamW",
    "AdamWRule",
    "EXAdam",
    "EXAdamRule",
    "Lion",
    "LionRule",
    "Muon",
    "MuonRule",
    "NAdam",
    "NAdamRule",
    "SGDPRule",
    "SGDRule",
    "did_you_mean",
    "rule_from",
]
