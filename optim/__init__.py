"""Optimizers as functions: rules, the one `Optimizer` that runs them, and the map from gradients to updates.

    optimizer = create("adamw", model.named_parameters(), lr=3e-4, betas=(0.9, 0.95))
    directions = UpdateMap.of(optimizer).per_sample(grads)  # name -> [batch, *shape]; no state is touched

Imports torch and nothing of the other packages. The table of optimizers is in README.md.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from optim import curvature, diagnostics, fused
from optim.optimizer import Optimizer, Params
from optim.param_groups import (
    PAPER_RATIOS,
    Assign,
    Assigned,
    Blockwise,
    Ratios,
    SpareNorms,
    blockwise,
    checked_assign,
    divide_groups,
    example_parameters,
    group_table,
    split_matrices,
    without_decay,
)
from optim.roles import block_of, is_matrix
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
    MatrixOptimizer,
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
    check_optimizer,
    did_you_mean,
    rule_from,
    stable_embedding_groups,
)
from optim.saved import bare_name
from optim.schedules import SCHEDULES, group_factors, schedule, schedule_options
from optim.torch_states import to_torch_state
from optim.update_map import Grads, UpdateMap


def create(
    name: str,
    parameters: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    decay_all: bool = True,
    block_ratios: Ratios | None = None,
    blocks: str | int | Mapping[str, str | int] | None = None,
    assign: Assign | None = None,
    **hyper: Any,
) -> Optimizer:
    """The optimizer of that name; hyper are the keywords of its class, `OPTIMIZERS[name]`.

    parameters: `model.named_parameters()`, or the model, of which those that require a gradient are taken. The model
    tells more: types of modules beside names and shapes; see `optim.roles.roles`.
    Rules for matrices ("muon", "normuon", "conda", ...) get the hidden matrices and AdamW the rest; see
    `MatrixOptimizer`, and `group_table` for what went where.
    weight_decay: none unless given, whatever the class's own default is.
    decay_all: without it biases and norms have no weight decay; see `without_decay`.
    block_ratios: "paper" or block -> ratio multiplies every group's rates by block of a transformer; see `blockwise`.
    blocks: part of a name -> block of a transformer, for `block_ratios` and "adam_mini" where names do not tell; the
    latter takes its own as well, see `AdamMini`.
    assign: part of a name -> settings of the parameters that hold it (`lr`, `weight_decay`, fields of the rule); with a
    rule for matrices also "matrix" or "adamw". The first part that a name holds wins.
    A group that `add_param_group` adds later is divided in the same way.
    Raises: ValueError for an unknown name, TypeError for an unknown keyword (both say what was probably meant),
    ValueError for values out of range and for parts that no name holds.
    """
    check_optimizer(name)
    kind = OPTIMIZERS[name]
    classes = [cls for cls in kind.__mro__ if issubclass(cls, Optimizer) and cls is not Optimizer]
    known = {key for cls in classes for key in inspect.signature(cls).parameters}
    known -= {"params", "parameters", "named_parameters", "fields", "options", "rule", "kinds"}
    known -= {"adamw_wrapper", "adamw_lr_missing"}
    known |= RULES[name]().settings()
    for key in hyper:
        if key not in known:
            raise TypeError(f"optimizer {name!r} has no setting {key!r}{did_you_mean(key, known)}")
    if not isinstance(parameters, nn.Module):
        parameters = list(parameters)
    if issubclass(kind, MatrixOptimizer):
        hyper["assign"] = assign
    if blocks is not None:
        if "blocks" in known:
            hyper["blocks"] = blocks
        elif block_ratios is None or not isinstance(blocks, Mapping):
            raise TypeError(f"optimizer {name!r} has no blocks; `blocks` goes with block_ratios, or with 'adam_mini'")
    optimizer = kind(parameters, lr=lr, weight_decay=weight_decay, **hyper)
    names = [name for group in optimizer.param_groups for name in group.get("param_names", [])]
    if assign is not None and not issubclass(kind, MatrixOptimizer):
        settings = optimizer.defaults["rule"].settings() | {"lr", "weight_decay"}
        divide_groups(optimizer, Assigned(checked_assign(kind.__name__, assign, settings, {}, names)))
    if block_ratios is not None:
        by_block = {part: str(block) for part, block in blocks.items()} if isinstance(blocks, Mapping) else None
        divide_groups(optimizer, Blockwise(block_ratios, by_block, names))
    if not decay_all:
        divide_groups(optimizer, SpareNorms(parameters if isinstance(parameters, nn.Module) else None))
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
    "bare_name",
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
    "spare_decay",
    "split_matrices",
    "stable_embedding_groups",
    "to_torch_state",
    "without_decay",
]
