"""Optimizers as functions: rules, the one `Optimizer` that runs them, and the map from gradients to updates.

    optimizer = create("adamw", model.named_parameters(), lr=3e-4, betas=(0.9, 0.95))
    directions = UpdateMap.of(optimizer).per_sample(grads)  # name -> [batch, *shape]; no state is touched

Imports torch and nothing of the other packages. The table of optimizers is in README.md.
"""

import inspect
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import Tensor

from optim import curvature, fused
from optim.optimizer import Optimizer, Params
from optim.param_groups import (
    PAPER_RATIOS,
    Ratios,
    block_of,
    blockwise,
    divide_groups,
    example_parameters,
    is_matrix,
    split_matrices,
)
from optim.rule import State, UpdateRule
from optim.rules import (
    OPTIMIZERS,
    RULES,
    SGD,
    SGDP,
    SPAM,
    AdaBelief,
    AdaBeliefRule,
    AdaHessian,
    AdaHessianRule,
    AdamMini,
    AdamMiniRule,
    AdamP,
    AdamPRule,
    AdamW,
    AdamWRule,
    BlockwiseAdam,
    BlockwiseAdamRule,
    EXAdam,
    EXAdamRule,
    Lion,
    LionRule,
    Muon,
    MuonRule,
    NAdam,
    NAdamRule,
    SGDPRule,
    SGDRule,
    SGDSaI,
    SGDSaIRule,
    SophiaG,
    SophiaGRule,
    SophiaH,
    SophiaHRule,
    SPAMRule,
    StableSPAM,
    StableSPAMRule,
    did_you_mean,
    rule_from,
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

    "muon" splits the parameters by name and shape into matrices and the rest, which AdamW steps; see `Muon`.
    weight_decay: none unless given, whatever the class's own default is.
    block_ratios: "paper" or block -> ratio multiplies every group's rates by block of a transformer; see `blockwise`.
    Raises: ValueError for an unknown name, TypeError for an unknown keyword (both say what was probably meant),
    ValueError for values out of range.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer is called {name!r}{did_you_mean(name, OPTIMIZERS)}")
    known = set(inspect.signature(OPTIMIZERS[name]).parameters) - {"params", "named_parameters", "fields"}
    known |= {f.name for f in fields(RULES[name])}
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
    "RULES",
    "SCHEDULES",
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
    "Grads",
    "Lion",
    "LionRule",
    "Muon",
    "MuonRule",
    "NAdam",
    "NAdamRule",
    "Optimizer",
    "Params",
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
    "State",
    "UpdateMap",
    "UpdateRule",
    "block_of",
    "blockwise",
    "create",
    "curvature",
    "divide_groups",
    "example_parameters",
    "fused",
    "group_factors",
    "is_matrix",
    "rule_from",
    "schedule",
    "schedule_options",
    "split_matrices",
]
