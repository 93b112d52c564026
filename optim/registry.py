"""Rules and optimizers by name."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from optim import rules
from optim.block_rates import Blockwise, Ratios
from optim.optimizer import Optimizer
from optim.param_groups import Assign, Assigned, SpareNorms, checked_assign, divide_groups
from optim.rule import UpdateRule
from optim.rules.matrices import MatrixOptimizer
from optim.rules.wrappers.cautious import Cautious, Grams
from optim.rules.wrappers.low_rank import LowRank
from optim.rules.wrappers.quantized import Quantized
from optim.unknown import did_you_mean, instead_of

RULES: dict[str, type[UpdateRule]] = {
    kind.name: kind for kind in vars(rules).values() if isinstance(kind, type) and issubclass(kind, UpdateRule)
}
"""Name -> rule, for every line of `optim.rules`."""

OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: vars(rules)[kind.__name__.removesuffix("Rule")] for name, kind in RULES.items()
}
"""Name -> the optimizer class that runs the rule of that name."""

WRAPPERS: dict[str, type[UpdateRule]] = {kind.name: kind for kind in (Cautious, Grams, LowRank, Quantized)}
"""Wrappers, by name. The rule inside has to be given, so that there is no optimizer class of that name."""


def rule_from(described: Mapping[str, Any]) -> UpdateRule:
    """Return the rule that `UpdateRule.describe` described.

    Args:
        described: The rule's `name` and fields as plain values.

    Returns:
        The rule.

    Raises:
        ValueError: For a name that is not in `RULES`.
        TypeError: For a field that the rule does not have.

    Example:
        >>> from optim import rule_from
        >>> rule_from({"name": "lion", "betas": (0.95, 0.98)})
        LionRule(betas=(0.95, 0.98))
    """
    name = described.get("name")
    kinds = RULES | WRAPPERS
    if name not in kinds:
        raise ValueError(f"no rule is called {name!r}{instead_of(str(name), kinds)}")
    known = {f.name for f in fields(kinds[name])}
    values: dict[str, Any] = {}
    for key, value in described.items():
        if key == "name":
            continue
        if key not in known:
            raise TypeError(f"{name}: no setting {key!r}{did_you_mean(key, known)}")
        values[key] = rule_from(value) if isinstance(value, Mapping) else value
    return kinds[name](**values)


def check_optimizer(name: str) -> None:
    """Check the name of an optimizer.

    Args:
        name: The name.

    Raises:
        ValueError: For a name that no optimizer has. The message suggests a similar name or an equivalent optimizer.

    Example:
        >>> from optim import check_optimizer
        >>> check_optimizer("lino")
        Traceback (most recent call last):
        ValueError: no optimizer is called 'lino'; did you mean 'lion'?
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer is called {name!r}{instead_of(name, OPTIMIZERS)}")


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
    wrapper: str | None = None,
    **hyper: Any,
) -> Optimizer:
    """Return the optimizer of that name.

    Rules for matrices ("muon", "normuon", "conda", ...) step the hidden matrices, and AdamW steps the rest; see
    `MatrixOptimizer`. `group_table` shows which rule steps which parameter. A group that `add_param_group` adds later
    is divided in the same way.

    Args:
        name: A key of `OPTIMIZERS`.
        parameters: `model.named_parameters()`, or the model, of which the parameters that require a gradient are taken.
            The model is the better choice: it has the types of modules in addition to names and shapes; see
            `optim.roles.roles`.
        lr: Learning rate.
        weight_decay: Decoupled weight decay. It is 0 unless given, whatever the default of the class is.
        decay_all: Whether biases and norms have weight decay as well; see `without_decay`.
        block_ratios: "paper", or a mapping from block of a transformer to the factor of its learning rate; see
            `blockwise`.
        blocks: A mapping from part of a name to block of a transformer, for `block_ratios` and "adam_mini" if names do
            not show the block. "adam_mini" also accepts its own `blocks`, see `AdamMini`.
        assign: A mapping from part of a name to settings (`lr`, `weight_decay`, fields of the rule) of the parameters
            whose names contain it; with a rule for matrices also to "matrix" or "adamw". The first part that a name
            contains wins.
        wrapper: "cautious" or "grams", around the rule of an elementwise optimizer; see `Cautious` and `Grams`.
        **hyper: Keywords of the optimizer's class, `OPTIMIZERS[name]`.

    Returns:
        The optimizer, an instance of `OPTIMIZERS[name]`, or of `Optimizer` with a wrapper.

    Raises:
        ValueError: For an unknown name (the message suggests a similar one), values out of range, and parts that no
            name contains.
        TypeError: For an unknown keyword (the message suggests a similar one).

    Example:
        >>> from optim import create
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> optimizer = create("muon", model, lr=0.02, adamw_lr=3e-4, scale="original")
        >>> [(group["rule"].name, group["param_names"]) for group in optimizer.param_groups]
        [('muon', ['0.weight']), ('adamw', ['0.bias', '1.weight', '1.bias'])]
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
            raise TypeError(f"optimizer {name!r} has no blocks; use `blocks` with block_ratios or with 'adam_mini'")
    optimizer = kind(parameters, lr=lr, weight_decay=weight_decay, **hyper)
    if wrapper is not None:
        optimizer = _wrapped(optimizer, wrapper)
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


def _wrapped(optimizer: Optimizer, wrapper: str) -> Optimizer:
    """Return an optimizer over the same groups, whose rules are inside the wrapper of that name."""
    around = {kind.name: kind for kind in (Cautious, Grams)}
    if wrapper not in around:
        raise ValueError(f"no wrapper is called {wrapper!r}{did_you_mean(wrapper, around)}; known: {', '.join(around)}")
    groups = [
        {
            "params": list(zip(group["param_names"], group["params"], strict=True)),
            "rule": around[wrapper](inner=group["rule"]),
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
        }
        for group in optimizer.param_groups
    ]
    rates = {key: optimizer.defaults[key] for key in ("lr", "weight_decay")}
    return Optimizer(groups, around[wrapper](inner=optimizer.defaults["rule"]), **rates)
