"""Fused matrices that a rule for matrices steps as separate ones, and those that it steps whole."""

from collections.abc import Mapping
from typing import Any

import torch

from optim.roles import Role
from optim.roles.fused import looks_fused
from optim.rule import UpdateRule

_FIELDS = ("split_sizes", "split_groups", "num_heads")


def divides(rule: UpdateRule) -> str:
    """Return into which matrices a rule, or the rule inside it, can divide a tensor: "any", "equal" ones or "none".

    Args:
        rule: The rule.

    Returns:
        `MatrixRule.divides`, or "none" for a rule that does not divide tensors.
    """
    found = (getattr(one, "divides", None) for one in (rule, getattr(rule, "inner", None)))
    return next((form for form in found if form is not None), "none")


def divided(rule: UpdateRule, role: Role, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a matrix rule with which it steps the parts of a fused matrix as separate ones.

    Args:
        rule: The rule, with the settings that all matrices have.
        role: The role of the parameter.
        given: The settings of this parameter.

    Returns:
        The fields; none if the matrix is not fused, if the rule cannot divide it, or if the settings divide it already.
    """
    form = divides(rule)
    if not role.parts or form == "none" or any(key in given for key in _FIELDS):
        return {}
    if rule.setting("split_sizes") is not None or rule.setting("num_heads") is not None:
        return {}
    if form == "any":
        return dict(role.parts)
    equal = len(set(role.parts["split_sizes"])) == 1 and "split_groups" not in role.parts
    return {"num_heads": len(role.parts["split_sizes"])} if equal else {}


def fused_note(optimizer: torch.optim.Optimizer) -> str:
    """Return a sentence about the fused matrices of an optimizer, for the log of a run.

    Args:
        optimizer: The optimizer, with named parameters.

    Returns:
        The sentence; empty if no rule for matrices steps a fused one.

    Example:
        >>> from optim import create, fused_note
        >>> model = torch.nn.ModuleDict({"qkv_proj": torch.nn.Linear(8, 24), "o_proj": torch.nn.Linear(8, 8)})
        >>> print(fused_note(create("muon", model, lr=1e-3)))
        1 fused matrix is stepped as separate ones (qkv_proj.weight); split_fused=False steps it whole
    """
    split: list[str] = []
    whole: list[str] = []
    for group in optimizer.param_groups:
        rule = group.get("rule")
        if not isinstance(rule, UpdateRule) or "split_sizes" not in rule.settings():
            continue
        apart = rule.setting("split_sizes") is not None or rule.setting("num_heads") is not None
        for name in group.get("param_names", ()):
            if looks_fused(name):
                (split if apart else whole).append(name)
    said = []
    if split:
        said.append(_counted(split, "stepped as separate ones") + f"; split_fused=False steps {_them(split)} whole")
    if whole:
        said.append(
            _counted(whole, "stepped whole")
            + ", because its parts are not known, differ in size, or split_fused is off"
        )
    return "; ".join(said)


def _counted(names: list[str], what: str) -> str:
    more = ", ..." if len(names) > 1 else ""
    return f"{len(names)} fused {'matrix is' if len(names) == 1 else 'matrices are'} {what} ({names[0]}{more})"


def _them(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"
