"""Reading saved optimizer states: rules as plain values, states in the rule's dtypes, names without wrappers."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from optim.rule import State, UpdateRule


def saved_rule(saved_group: Mapping[str, Any], rule: UpdateRule) -> dict[str, Any]:
    """The description of a saved group's rule; of a group that `torch.optim` wrote, the fields shared with `rule`.

    Raises: ValueError if torch's optimizer ran with a switch that changes the algorithm and does not exist here.
    """
    if isinstance(saved_group.get("rule"), Mapping):
        return dict(saved_group["rule"])
    for flag in ("maximize", "differentiable"):
        if saved_group.get(flag):
            raise ValueError(f"load_state_dict: the saved optimizer ran with {flag}=True, which is not supported here")
    if not saved_group.get("decoupled_weight_decay", True) and saved_group.get("weight_decay", 0.0) != 0:
        raise ValueError("load_state_dict: the saved Adam put weight decay into the gradient; here it is decoupled")
    return {"name": rule.name} | {f.name: saved_group[f.name] for f in fields(rule) if f.name in saved_group}


def expected_state(rule: UpdateRule, param: Tensor) -> State:
    """The entries, shapes and dtypes of the rule's state for this parameter, without memory (meta tensors)."""
    return rule.init(torch.empty_like(param, device="meta", requires_grad=False))


def check_state(label: str, rule: UpdateRule, param: Tensor, state: Mapping[str, Any]) -> None:
    """ValueError naming the parameter unless the state has the rule's entries in the rule's shapes."""
    expected = expected_state(rule, param)
    if set(state) != set(expected):
        raise ValueError(
            f"state of parameter {label}: entries {sorted(state)}, but {rule.name} keeps {sorted(expected)}; "
            "it was saved by another optimizer or with other settings"
        )
    for key, want in expected.items():
        shape = tuple(state[key].shape) if isinstance(state[key], Tensor) else ()
        if shape != tuple(want.shape):
            raise ValueError(f"state of parameter {label}: {key} has shape {shape}, expected {tuple(want.shape)}")


def loaded_state(rule: UpdateRule, param: Tensor, state: Mapping[str, Any]) -> State:
    """A copy of a saved state in the rule's dtypes: on the parameter's device, but step counts stay on the CPU."""
    loaded: State = {}
    for key, want in expected_state(rule, param).items():
        device = param.device if want.device.type == "meta" else want.device
        loaded[key] = torch.as_tensor(state[key]).detach().to(device=device, dtype=want.dtype, copy=True)
    return loaded


def bare_name(name: str) -> str:
    """The parameter's name without what DDP, FSDP, checkpointing and torch.compile put around modules."""
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")
