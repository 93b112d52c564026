"""State dicts of `torch.optim`'s optimizers, read as those of the rules here and written from them."""

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
"""Rule -> its counterpart, in the order in which a group is compared with their keys: the first that fits it is it."""


def counterpart(saved_group: Mapping[str, Any]) -> Counterpart | None:
    """Return the record of the optimizer of torch that wrote this group, or None."""
    return next((record for record in COUNTERPARTS.values() if record.keys <= set(saved_group)), None)


def described(saved_group: Mapping[str, Any], rule: UpdateRule) -> dict[str, Any]:
    """Return the description of the rule of a group that torch wrote; what it does not say is as in `rule`.

    Raises:
        ValueError: If an optimizer wrote it that is no counterpart of `rule`, or that ran with a switch that changes
            the algorithm and does not exist here.
    """
    found = counterpart(saved_group)
    if found is None or found.name != rule.name:
        there = f"torch.optim's {found.called}" if found else f"an optimizer with the settings {sorted(saved_group)}"
        raise ValueError(
            f"load_state_dict: a param group was saved by {there}, and this one runs {rule.name!r}; "
            f"torch's state dicts load into {', '.join(sorted(COUNTERPARTS))}, each into its own counterpart"
        )
    for flag in ("maximize", "differentiable"):
        if saved_group.get(flag):
            raise ValueError(f"load_state_dict: the saved optimizer ran with {flag}=True, which is not supported here")
    return rule.describe() | found.read(saved_group, rule)


def kept_keys(saved_group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group that torch wrote without the settings that the rule has here."""
    found = counterpart(saved_group)
    settings = frozenset[str]().union(*(record.keys for record in COUNTERPARTS.values()))
    gone = settings | {*TORCH_FLAGS, "decoupled_weight_decay", "adjust_lr_fn", "eps"}
    kept = {key: value for key, value in saved_group.items() if key not in gone}
    if found is not None and found.own_decay(saved_group):
        kept["weight_decay"] = 0.0
    return kept


def native(rule: UpdateRule, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a parameter's state that torch wrote in the entries of `rule`; None if it holds nothing to continue with.

    Neither SGD nor Muon counts steps in torch: their counts begin at 1 here, which means that there was a first step.
    """
    record = COUNTERPARTS.get(rule.name)
    return dict(state) if record is None else record.native(rule, state)


def to_torch_state(optimizer: Any, *, rule: str | None = None) -> dict[str, Any]:
    """Return a state dict for `torch.optim`'s class of the same name: AdamW, SGD, NAdam or Muon.

    Muon's momentum is written in torch's convention (an average, not a sum). torch's Muon always computes in bfloat16.

    Args:
        optimizer: An `Optimizer`, or its state dict. Param groups and parameters keep its order, and torch matches by
            order: build torch's optimizer with equally many groups of equally many parameters.
        rule: Of an optimizer with groups of several rules (`Muon`, whose other tensors are AdamW's), the one whose
            groups are wanted, "muon" or "adamw"; parameters are then numbered from 0.

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
            f"several optimizers in torch; write one after the other: rule={kinds[0]!r}"
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
    """The keys of the group in torch's class."""
    described, decay = group["rule"], group["weight_decay"]
    name = described["name"]
    record = COUNTERPARTS.get(name)
    if record is None:
        raise ValueError(
            f"to_torch_state: torch has no counterpart of {name!r}; it has those of {', '.join(COUNTERPARTS)}"
        )
    for key, value in record.same.items():
        if described.get(key, value) != value:
            raise ValueError(
                f"to_torch_state: torch's {record.called} has nothing like {key} = {described[key]!r} of {name!r}"
            )
    said, decay = record.write(described, decay)
    made = record.make([torch.nn.Parameter(torch.zeros(1, 1))])
    return {k: v for k, v in made.param_groups[0].items() if k != "params"} | said | {"weight_decay": decay}


def _torch_entries(rule: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state in the entries of torch's class."""
    copied = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    return COUNTERPARTS[rule["name"]].entries(rule, copied)
