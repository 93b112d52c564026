"""State dicts of torch's optimizers, read as those of the rules here and written from them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.rule import UpdateRule
from optim.settings import CHANGED, TORCH_FLAGS
from optim.torch_states.adamw import ADAMW
from optim.torch_states.counterpart import Counterpart
from optim.torch_states.muon import MUON
from optim.torch_states.nadam import NADAM
from optim.torch_states.sgd import SGD

COUNTERPARTS: dict[str, Counterpart] = {record.name: record for record in (NADAM, ADAMW, MUON, SGD)}
"""Name of a rule -> its counterpart. A group is compared with their keys in this order, and the first match is used."""


def counterpart(saved_group: Mapping[str, Any]) -> Counterpart | None:
    """Return the record of the torch optimizer that wrote a group.

    Args:
        saved_group: The param group.

    Returns:
        The record, or None if no torch optimizer with a counterpart wrote it.
    """
    return next((record for record in COUNTERPARTS.values() if record.keys <= set(saved_group)), None)


def described(saved_group: Mapping[str, Any], rule: UpdateRule) -> dict[str, Any]:
    """Return the description of the rule of a group that torch wrote; what the group does not contain is as in `rule`.

    Args:
        saved_group: The param group.
        rule: The rule of the group that it is loaded into.

    Returns:
        A description as `UpdateRule.describe` returns it.

    Raises:
        ValueError: If an optimizer wrote it that is not the counterpart of `rule`, or that ran with a switch that
            changes the algorithm and does not exist here.
    """
    found = counterpart(saved_group)
    if found is None or found.name != rule.name:
        there = f"torch.optim's {found.called}" if found else f"an optimizer with the settings {sorted(saved_group)}"
        raise ValueError(
            f"load_state_dict: a param group was saved by {there}, but this one runs {rule.name!r}; torch's state "
            f"dicts can be loaded into {', '.join(sorted(COUNTERPARTS))}, each into its own counterpart"
        )
    for flag in ("maximize", "differentiable"):
        if saved_group.get(flag):
            raise ValueError(f"load_state_dict: the saved optimizer ran with {flag}=True, which is not supported here")
    return rule.describe() | found.read(saved_group, rule)


def kept_keys(saved_group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group that torch wrote, without the settings that belong to the rule here.

    Args:
        saved_group: The param group.

    Returns:
        The keys and values to keep.
    """
    found = counterpart(saved_group)
    settings = frozenset[str]().union(*(record.keys for record in COUNTERPARTS.values()))
    gone = settings | {*TORCH_FLAGS, "decoupled_weight_decay", "adjust_lr_fn", "eps"}
    kept = {key: value for key, value in saved_group.items() if key not in gone}
    if found is not None and found.own_decay(saved_group):
        kept["weight_decay"] = 0.0
    return kept


def native(rule: UpdateRule, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a parameter's state that torch wrote, with the entries of the rule.

    In torch, SGD and Muon do not count steps. Their counts are 1 here, which means that there was a first step.

    Args:
        rule: The rule.
        state: The state that torch wrote.

    Returns:
        The state; None if it has nothing to continue with.
    """
    record = COUNTERPARTS.get(rule.name)
    return dict(state) if record is None else record.native(rule, state)


def to_torch_state(optimizer: Any, *, rule: str | None = None) -> dict[str, Any]:
    """Return a state dict for `torch.optim`'s class of the same name: AdamW, SGD, NAdam or Muon.

    Muon's momentum is written in torch's convention (an average, not a sum). torch's Muon always computes in bfloat16.

    Args:
        optimizer: An `Optimizer`, or its state dict. Param groups and parameters keep their order, and torch matches
            them by order: build torch's optimizer with the same number of groups and of parameters in each.
        rule: If the optimizer has groups of several rules (such as `Muon`, which steps other tensors by AdamW), the
            rule whose groups are written, "muon" or "adamw"; parameters are then numbered from 0.

    Returns:
        The state dict, with copies of the tensors.

    Raises:
        ValueError: For a rule or a setting that torch's classes do not have, by name.

    Example:
        >>> from optim import AdamW, to_torch_state
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> theirs = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> theirs.load_state_dict(to_torch_state(optimizer))
    """
    saved = optimizer if isinstance(optimizer, Mapping) else optimizer.state_dict()
    kinds = [group["rule"]["name"] for group in saved["param_groups"]]
    if rule is None and len(set(kinds)) > 1:
        raise ValueError(
            f"to_torch_state: the optimizer has param groups of the rules {', '.join(sorted(set(kinds)))}, which are "
            f"different optimizers in torch; write them separately, with rule={kinds[0]!r} first"
        )
    if rule is not None and rule not in kinds:
        raise ValueError(f"to_torch_state: no param group runs {rule!r}; there are {', '.join(sorted(set(kinds)))}")
    chosen = [group for group in saved["param_groups"] if rule is None or group["rule"]["name"] == rule]
    groups: list[dict[str, Any]] = []
    states: dict[int, dict[str, Any]] = {}
    count = 0
    for group in chosen:
        settings = _torch_settings(group)
        kept = {key: value for key, value in group.items() if key not in ("rule", "params", CHANGED)}
        numbers = list(range(count, count + len(group["params"])))
        groups.append(settings | kept | {"weight_decay": settings["weight_decay"], "params": numbers})
        for number, key in zip(numbers, group["params"], strict=True):
            state = _torch_entries(group["rule"], saved["state"].get(key, {}))
            if state:
                states[number] = state
        count += len(numbers)
    return {"state": states, "param_groups": groups}


def _torch_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that the group has in torch's class."""
    described, decay = group["rule"], group["weight_decay"]
    name = described["name"]
    record = COUNTERPARTS.get(name)
    if record is None:
        raise ValueError(
            f"to_torch_state: torch has no counterpart of {name!r}; it only has those of {', '.join(COUNTERPARTS)}"
        )
    for key, value in record.same.items():
        if described.get(key, value) != value:
            raise ValueError(
                f"to_torch_state: torch's {record.called} has nothing that corresponds to {key} = {described[key]!r} "
                f"of {name!r}"
            )
    said, decay = record.write(described, decay)
    made = record.make([torch.nn.Parameter(torch.zeros(1, 1))])
    return {k: v for k, v in made.param_groups[0].items() if k != "params"} | said | {"weight_decay": decay}


def _torch_entries(rule: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's state with the entries of torch's class."""
    copied = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    return COUNTERPARTS[rule["name"]].entries(rule, copied)
