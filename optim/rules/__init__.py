"""The table of rules, and making one from plain values."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from os.path import commonprefix
from typing import Any

from optim.optimizer import Optimizer
from optim.rule import UpdateRule
from optim.rules.adabelief import AdaBelief, AdaBeliefRule
from optim.rules.adahessian import AdaHessian, AdaHessianRule
from optim.rules.adam_mini import AdamMini, AdamMiniRule
from optim.rules.adamp import AdamP, AdamPRule
from optim.rules.adamw import AdamW, AdamWRule
from optim.rules.blockwise_adam import BlockwiseAdam, BlockwiseAdamRule
from optim.rules.exadam import EXAdam, EXAdamRule
from optim.rules.lion import Lion, LionRule
from optim.rules.muon import Muon, MuonRule
from optim.rules.nadam import NAdam, NAdamRule
from optim.rules.sgd import SGD, SGDRule
from optim.rules.sgd_sai import SGDSaI, SGDSaIRule
from optim.rules.sgdp import SGDP, SGDPRule
from optim.rules.sophia_g import SophiaG, SophiaGRule
from optim.rules.sophia_h import SophiaH, SophiaHRule
from optim.rules.spam import SPAM, SPAMRule
from optim.rules.stable_spam import StableSPAM, StableSPAMRule

RULES: dict[str, type[UpdateRule]] = {
    "adabelief": AdaBeliefRule,
    "adahessian": AdaHessianRule,
    "adam_mini": AdamMiniRule,
    "adamp": AdamPRule,
    "adamw": AdamWRule,
    "blockwise_adam": BlockwiseAdamRule,
    "exadam": EXAdamRule,
    "lion": LionRule,
    "muon": MuonRule,
    "nadam": NAdamRule,
    "sgd": SGDRule,
    "sgd_sai": SGDSaIRule,
    "sgdp": SGDPRule,
    "sophia_g": SophiaGRule,
    "sophia_h": SophiaHRule,
    "spam": SPAMRule,
    "stable_spam": StableSPAMRule,
}

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adabelief": AdaBelief,
    "adahessian": AdaHessian,
    "adam_mini": AdamMini,
    "adamp": AdamP,
    "adamw": AdamW,
    "blockwise_adam": BlockwiseAdam,
    "exadam": EXAdam,
    "lion": Lion,
    "muon": Muon,
    "nadam": NAdam,
    "sgd": SGD,
    "sgd_sai": SGDSaI,
    "sgdp": SGDP,
    "sophia_g": SophiaG,
    "sophia_h": SophiaH,
    "spam": SPAM,
    "stable_spam": StableSPAM,
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
    """The end of an error message about an unknown word: the nearest known one in any case, or all of them."""
    by_lower = {name.lower(): name for name in sorted(known)}
    word = word.lower()
    close = difflib.get_close_matches(word, by_lower, n=3)
    if not close:
        return f"; known: {', '.join(by_lower.values())}"

    def nearness(name: str) -> tuple[float, int, str]:  # of "nadam" and "adamw", "adam" more likely means the second
        return difflib.SequenceMatcher(None, name, word).ratio(), len(commonprefix([name, word])), name

    return f"; did you mean {by_lower[max(close, key=nearness)]!r}?"


__all__ = [
    "OPTIMIZERS",
    "RULES",
    "SGD",
    "SGDP",
    "SPAM",
    "AdaBelief",
    "AdaBeliefRule",
    "AdaHessian",
    "AdaHessianRule",
    "AdamMini",
    "AdamMiniRule",
    "AdamP",
    "AdamPRule",
    "AdamW",
    "AdamWRule",
    "BlockwiseAdam",
    "BlockwiseAdamRule",
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
    "SGDSaI",
    "SGDSaIRule",
    "SPAMRule",
    "SophiaG",
    "SophiaGRule",
    "SophiaH",
    "SophiaHRule",
    "StableSPAM",
    "StableSPAMRule",
    "did_you_mean",
    "rule_from",
]
