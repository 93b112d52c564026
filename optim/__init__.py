"""Optimizers as functions: rules, the one `Optimizer` that runs them, and the map from gradients to updates.

    optimizer = create("adamw", model.named_parameters(), lr=3e-4, betas=(0.9, 0.95))
    directions = UpdateMap.of(optimizer).per_sample(grads)  # name -> [batch, *shape]; no state is touched

Imports torch and nothing of the other packages. The table of optimizers is in README.md.
"""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from optim import curvature, diagnostics, fused
from optim.optimizer import Optimizer, Params
from optim.param_groups import (
    PAPER_RATIOS,
    Ratios,
    block_of,
    blockwise,
    divide_groups,
    example_parameters,
    group_table,
    is_matrix,
    split_matrices,
)
from optim.rounding import Arrived, set_rounding
from optim.rule import State, UpdateRule
from optim.rules import (
    OPTIMIZERS,
    ROOT,
    RULES,
    SCALE,
    SGD,
    SGDP,
    SPAM,
    SWAN,
    AdaBelief,
    AdaBeliefRule,
    AdaHessian,
    AdaHessianRule,
    AdamMini,
    AdamMiniRule,
    AdamP,
    AdamPRule,
    AdamW,
    AdamW8bit,
    AdamW8bitRule,
    AdamWRule,
    Apollo,
    ApolloRule,
    BlockwiseAdam,
    BlockwiseAdamRule,
    Conda,
    CondaRule,
    EXAdam,
    EXAdamRule,
    Fira,
    FiraRule,
    GaLore,
    GaLoreRule,
    Lion,
    Lion8bit,
    Lion8bitRule,
    LionRule,
    LowRank,
    Muon,
    Muon8bit,
    Muon8bitRule,
    MuonRule,
    NAdam,
    NAdamRule,
    NorMuon,
    NorMuonRule,
    OneBitAdam,
    OneBitAdamRule,
    Quantized,
    ROOTRule,
    SCALERule,
    SGDPRule,
    SGDRule,
    SGDSaI,
    SGDSaIRule,
    SinkGD,
    SinkGDRule,
    SophiaG,
    SophiaGRule,
    SophiaH,
    SophiaHRule,
    SPAMRule,
    StableEmbedding,
    StableSPAM,
    StableSPAMRule,
    SWANRule,
    did_you_mean,
    rule_from,
    stable_embedding_groups,
)
from optim.schedules import SCHEDULES, group_factors, schedule, schedule_options
from optim.update_map import Grads, UpdateMap


def create(
    name: str,
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    block_ratios: Ratios | None = None,
    **hyper: Any,
) -> Optimizer:
    """The optimizer of that name; hyper are the keywords of its class, `OPTIMIZERS[name]`.

    Rules for matrices ("muon", "normuon", "conda", ...) get the hidden matrices, by name and shape, and AdamW the rest;
    see `MatrixOptimizer`, and `group_table` for what went where.
    weight_decay: none unless given, whatever the class's own default is.
    block_ratios: "paper" or block -> ratio multiplies every group's rates by block of a transformer; see `blockwise`.
    Raises: ValueError for an unknown name, TypeError for an unknown keyword (both say what was probably meant),
    ValueError for values out of range.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer is called {name!r}{did_you_mean(name, OPTIMIZERS)}")
    classes = [cls for cls in OPTIMIZERS[name].__mro__ if issubclass(cls, Optimizer) and cls is not Optimizer]
    known = {key for cls in classes for key in inspect.signature(cls).parameters}
    known -= {"params", "named_parameters", "fields", "options", "rule", "place"}
    known |= RULES[name]().settings()
    for key in hyper:
        if key not in known:
            raise TypeError(f"optimizer {name!r} has no setting {key!r}{did_you_mean(key, known)}")
    optimizer = OPTIMIZERS[name](named_parameters, lr=lr, weight_decay=weight_decay, **hyper)
    if block_ratios is not None:
        divide_groups(optimizer, lambda named, rate: blockwise(named, lr=rate, ratios=block_ratios))
    return optimizer


__all__ = [
    "OPTIMIZERS",
    "PAPER_RATIOS",
    "ROOT",
    "RULES",
    "SCALE",
    "SCHEDULES",
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
    "Arrived",
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
    "Grads",
    "Lion",
    "Lion8bit",
    "Lion8bitRule",
    "LionRule",
    "LowRank",
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
    "Optimizer",
    "Params",
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
    "State",
    "UpdateMap",
    "UpdateRule",
    "block_of",
    "blockwise",
    "create",
    "curvature",
    "diagnostics",
    "divide_groups",
    "example_parameters",
    "fused",
    "group_factors",
    "group_table",
    "is_matrix",
    "rule_from",
    "schedule",
    "schedule_options",
    "set_rounding",
    "split_matrices",
    "stable_embedding_groups",
]
