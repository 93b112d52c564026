"""The table of rules, and making one from plain values."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from os.path import commonprefix
from typing import Any

from optim.distributed.onebit import OneBitAdam, OneBitAdamRule
from optim.optimizer import Optimizer
from optim.rule import UpdateRule
from optim.rules.adabelief import AdaBelief, AdaBeliefRule
from optim.rules.adahessian import AdaHessian, AdaHessianRule
from optim.rules.adam_mini import AdamMini, AdamMiniRule
from optim.rules.adamp import AdamP, AdamPRule
from optim.rules.adamw import AdamW, AdamWRule
from optim.rules.blockwise_adam import BlockwiseAdam, BlockwiseAdamRule
from optim.rules.conda import Conda, CondaRule
from optim.rules.exadam import EXAdam, EXAdamRule
from optim.rules.lion import Lion, LionRule
from optim.rules.matrices import MatrixOptimizer, MatrixRule
from optim.rules.muon import Muon, MuonRule
from optim.rules.nadam import NAdam, NAdamRule
from optim.rules.normuon import NorMuon, NorMuonRule
from optim.rules.root import ROOT, ROOTRule
from optim.rules.scale import SCALE, SCALERule
from optim.rules.sgd import SGD, SGDRule
from optim.rules.sgd_sai import SGDSaI, SGDSaIRule
from optim.rules.sgdp import SGDP, SGDPRule
from optim.rules.sinkgd import SinkGD, SinkGDRule
from optim.rules.sophia_g import SophiaG, SophiaGRule
from optim.rules.sophia_h import SophiaH, SophiaHRule
from optim.rules.spam import SPAM, SPAMRule
from optim.rules.stable_spam import StableSPAM, StableSPAMRule
from optim.rules.swan import SWAN, SWANRule
from optim.wrappers.low_rank import Apollo, ApolloRule, Fira, FiraRule, GaLore, GaLoreRule, LowRank
from optim.wrappers.quantized import (
    AdamW8bit,
    AdamW8bitRule,
    Lion8bit,
    Lion8bitRule,
    Muon8bit,
    Muon8bitRule,
    Quantized,
    StableEmbedding,
    stable_embedding_groups,
)

RULES: dict[str, type[UpdateRule]] = {
    "adabelief": AdaBeliefRule,
    "adahessian": AdaHessianRule,
    "adam_mini": AdamMiniRule,
    "adamp": AdamPRule,
    "adamw": AdamWRule,
    "adamw_8bit": AdamW8bitRule,
    "apollo": ApolloRule,
    "blockwise_adam": BlockwiseAdamRule,
    "conda": CondaRule,
    "exadam": EXAdamRule,
    "fira": FiraRule,
    "galore": GaLoreRule,
    "lion": LionRule,
    "lion_8bit": Lion8bitRule,
    "muon": MuonRule,
    "muon_8bit": Muon8bitRule,
    "nadam": NAdamRule,
    "normuon": NorMuonRule,
    "onebit_adam": OneBitAdamRule,
    "root": ROOTRule,
    "scale": SCALERule,
    "sgd": SGDRule,
    "sgd_sai": SGDSaIRule,
    "sgdp": SGDPRule,
    "sinkgd": SinkGDRule,
    "sophia_g": SophiaGRule,
    "sophia_h": SophiaHRule,
    "spam": SPAMRule,
    "stable_spam": StableSPAMRule,
    "swan": SWANRule,
}

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adabelief": AdaBelief,
    "adahessian": AdaHessian,
    "adam_mini": AdamMini,
    "adamp": AdamP,
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "apollo": Apollo,
    "blockwise_adam": BlockwiseAdam,
    "conda": Conda,
    "exadam": EXAdam,
    "fira": Fira,
    "galore": GaLore,
    "lion": Lion,
    "lion_8bit": Lion8bit,
    "muon": Muon,
    "muon_8bit": Muon8bit,
    "nadam": NAdam,
    "normuon": NorMuon,
    "onebit_adam": OneBitAdam,
    "root": ROOT,
    "scale": SCALE,
    "sgd": SGD,
    "sgd_sai": SGDSaI,
    "sgdp": SGDP,
    "sinkgd": SinkGD,
    "sophia_g": SophiaG,
    "sophia_h": SophiaH,
    "spam": SPAM,
    "stable_spam": StableSPAM,
    "swan": SWAN,
}

WRAPPERS: dict[str, type[UpdateRule]] = {"low_rank": LowRank, "quantized": Quantized}
"""Rules around a rule that has to be given, and so without an optimizer of that name."""


def rule_from(described: Mapping[str, Any]) -> UpdateRule:
    """The rule of `UpdateRule.describe`'s plain values.

    Raises: ValueError for a name that is not in `RULES`, TypeError for a field that the rule does not have.
    """
    name = described.get("name")
    kinds = RULES | WRAPPERS
    if name not in kinds:
        raise ValueError(f"no rule is called {name!r}{_instead_of(str(name), kinds)}")
    known = {f.name for f in fields(kinds[name])}
    values: dict[str, Any] = {}
    for key, value in described.items():
        if key == "name":
            continue
        if key not in known:
            raise TypeError(f"{name}: no setting {key!r}{did_you_mean(key, known)}")
        values[key] = rule_from(value) if isinstance(value, Mapping) else value
    return kinds[name](**values)


_OTHERS = set(  # published algorithms that are not here: such a name is no slip of the pen, however near to another
    """a2grad adabound adaboundw adadelta adafactor adagrad adai adalomo adam adam8bit adamax adamc adamg adamod adams
    adamx adamuon adan adanorm adapnm adashift adasmooth ademamix adopt aggmo aida alice alig amos amsgrad asgd avagrad
    came clion diffgrad dion fadam fromage ftrl gluon grams grokfast kate kfac kron lamb laprop lars lbfgs lomo
    lookahead madgrad mars nadamw nero novograd padam pnm prodigy psgd qhadam qhm radam ranger rmsprop rprop sam sadam
    scion sgdm sgdw shampoo signsgd signum sm3 soap sophia splus stableadamw swats tiger vsgd yogi""".split()
)

_SAME = {  # what another name means in terms of an optimizer that is here
    "adam": "'adamw' without weight decay is Adam; Adam's own weight decay, inside the gradient, is not here",
    "adam8bit": "'adamw_8bit' without weight decay is 8-bit Adam",
    "amsgrad": "'adamw' with amsgrad=True and without weight decay is AMSGrad",
    "nadamw": "'nadam' has decoupled weight decay",
    "sgdm": "'sgd' with momentum=0.9 is SGD with momentum",
    "sgdw": "'sgd' has decoupled weight decay",
    "sophia": "'sophia_g' and 'sophia_h' estimate the curvature in two ways",
    "adamwtorch": "'adamw' is it",
    "adamwtorchfused": "'adamw' is it",
    "adamwbnb8bit": "'adamw_8bit' is it",
    "lion32bit": "'lion' is it",
}


def check_optimizer(name: str) -> None:
    """ValueError for a name that no optimizer has, saying which one is probably meant or does the same."""
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer is called {name!r}{_instead_of(name, OPTIMIZERS)}")


def _instead_of(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown algorithm.

    An algorithm is offered for a slip of its own name alone: another case, underscores, or one letter. What is known to
    be the name of another algorithm is no slip, however near.
    """
    known = sorted(known)
    bare = _letters(word)
    if bare in _SAME:
        return f"; {_SAME[bare]}. Known: {', '.join(known)}"
    same = [name for name in known if _letters(name) == bare]
    near = [name for name in known if _one_slip(_letters(name), bare)]
    near.sort(key=lambda name: (difflib.SequenceMatcher(None, name, word).ratio(), name), reverse=True)
    close = same or ([] if bare in _OTHERS else near)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; known: {', '.join(known)}"


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter is missing, added, replaced, or changes place with the next."""
    a, b = sorted((a, b), key=len)
    start = len(commonprefix([a, b]))
    if len(a) < len(b):
        return a[start:] == b[start + 1 :]
    replaced = a[start + 1 :] == b[start + 1 :]
    return replaced or a[start:] == b[start + 1 : start + 2] + b[start : start + 1] + b[start + 2 :]


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
    "ROOT",
    "RULES",
    "SCALE",
    "SGD",
    "SGDP",
    "SPAM",
    "SWAN",
    "AdaBelief",
    "AdaBeliefRule",
    "AdaHessian",
    "AdaHessianRule",
    "AdamMini",
    "AdamMiniRule",
    "AdamP",
    "AdamPRule",
    "AdamW",
    "AdamW8bit",
    "AdamW8bitRule",
    "AdamWRule",
    "Apollo",
    "ApolloRule",
    "BlockwiseAdam",
    "BlockwiseAdamRule",
    "Conda",
    "CondaRule",
    "EXAdam",
    "EXAdamRule",
    "Fira",
    "FiraRule",
    "GaLore",
    "GaLoreRule",
    "Lion",
    "Lion8bit",
    "Lion8bitRule",
    "LionRule",
    "LowRank",
    "MatrixOptimizer",
    "MatrixRule",
    "Muon",
    "Muon8bit",
    "Muon8bitRule",
    "MuonRule",
    "NAdam",
    "NAdamRule",
    "NorMuon",
    "NorMuonRule",
    "OneBitAdam",
    "OneBitAdamRule",
    "Quantized",
    "ROOTRule",
    "SCALERule",
    "SGDPRule",
    "SGDRule",
    "SGDSaI",
    "SGDSaIRule",
    "SPAMRule",
    "SWANRule",
    "SinkGD",
    "SinkGDRule",
    "SophiaG",
    "SophiaGRule",
    "SophiaH",
    "SophiaHRule",
    "StableEmbedding",
    "StableSPAM",
    "StableSPAMRule",
    "did_you_mean",
    "rule_from",
    "stable_embedding_groups",
]
