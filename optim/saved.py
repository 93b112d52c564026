"""Reading saved optimizer states: rules from plain values, states in the rule's dtypes, names without wrappers."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim import torch_states
from optim.rule import State, UpdateRule
from optim.settings import ParamGroup, changed_settings, described_setting
from optim.sharding import is_sharded


def saved_rule(saved_group: Mapping[str, Any], rule: UpdateRule) -> dict[str, Any]:
    """Return the description of a saved group's rule; a group that `torch.optim` wrote is described in terms of `rule`.

    Args:
        saved_group: A param group of a state dict.
        rule: The rule of the group that it is loaded into.

    Returns:
        A description as `UpdateRule.describe` returns it.

    Raises:
        ValueError: If a torch optimizer wrote it that is not the counterpart of `rule`, or that ran with a switch that
            changes the algorithm and does not exist here.
    """
    if isinstance(saved_group.get("rule"), Mapping):
        return dict(saved_group["rule"])
    return torch_states.described(saved_group, rule)


def check_splits(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a state whose fused matrices were stepped whole by an optimizer that steps their parts, or the reverse.

    Both have their parameters in other groups, so that their order would be blamed.

    Args:
        groups: The param groups that are loaded into.
        saved_groups: Those of the state dict.

    Raises:
        ValueError: One of them splits matrices, and the other does not.
    """
    here = any(_splits(group["rule"].describe()) for group in groups)
    there = any(_splits(group.get("rule")) for group in saved_groups)
    if here != there and any("rule" in group for group in saved_groups):
        forms = ("whole", "as separate ones")
        raise ValueError(
            "load_state_dict: the saved optimizer stepped fused matrices (query, key and value in one) "
            f"{forms[there]}, and this one steps them {forms[here]}; build it with split_fused={there}"
        )


def _splits(description: Any) -> bool:
    """Return whether the description of a rule, or of one inside it, names the parts of matrices."""
    if not isinstance(description, Mapping):
        return False
    return bool(description.get("split_sizes")) or any(map(_splits, description.values()))


def adopted_rule(group: Mapping[str, Any], saved_group: Mapping[str, Any]) -> UpdateRule:
    """Return the group's rule with the saved values of all settings that were written to either group.

    Args:
        group: The param group that is loaded into.
        saved_group: The param group of the state dict.

    Returns:
        The rule.

    Raises:
        ValueError: As in `saved_rule`.
    """
    rule: UpdateRule = group["rule"]
    described = saved_rule(saved_group, rule)
    if described.get("name") != rule.name:
        return rule
    values: dict[str, Any] = {}
    for key in (changed_settings(group) | changed_settings(saved_group)) & rule.settings():
        try:
            values[key] = described_setting(described, key)
        except KeyError:  # the saved optimizer does not have it
            continue
    return rule.with_settings(**values)


def kept_keys(saved_group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a loaded group keeps of a saved one: everything except the settings of torch's optimizers.

    Here, the rule holds those settings. A weight decay that torch adds to the gradient, and that the rule has as its
    `l2`, does not belong to the group.

    Args:
        saved_group: A param group of a state dict.

    Returns:
        The keys and values to keep.
    """
    if isinstance(saved_group.get("rule"), Mapping):
        return dict(saved_group)
    return torch_states.kept_keys(saved_group)


def native_state(
    rule: UpdateRule, saved_group: Mapping[str, Any], state: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Return a saved state with the rule's entries.

    Args:
        rule: The rule.
        saved_group: The param group of the state dict.
        state: The saved state of a parameter.

    Returns:
        The state; None if torch did not save anything that the rule would continue with.
    """
    if isinstance(saved_group.get("rule"), Mapping):
        return state
    return torch_states.native(rule, state)


def expected_state(rule: UpdateRule, param: Tensor) -> State:
    """Return the entries, shapes and dtypes of the rule's state for a parameter.

    Args:
        rule: The rule.
        param: The parameter.

    Returns:
        The state as tensors on the meta device, which use no memory.
    """
    return rule.init(torch.empty_like(param, device="meta", requires_grad=False))


def settle_states(index: int, group: ParamGroup, states: MutableMapping[Tensor, State]) -> None:
    """Adapt the states to a group's current rule if its settings were changed since the last step.

    Args:
        index: The number of the group, for the message.
        group: The param group.
        states: The state of each parameter.

    Raises:
        ValueError: If a setting was changed that determines how the states are stored.
    """
    rule = group.settle()
    before, group.settled = group.settled, rule
    if before is None or before is rule:
        return
    for param in group["params"]:
        state = states.get(param)
        if not state:
            continue
        want = expected_state(rule, param)
        kept = {key: value for key, value in state.items() if key in want}
        if before.state_settings() != rule.state_settings() or any(
            (value.shape, value.dtype) != (want[key].shape, want[key].dtype) for key, value in kept.items()
        ):
            group.settled = group["rule"] = before
            changes = ", ".join(rule.differences(before.describe()))
            raise ValueError(
                f"param group {index}: a setting that determines how states start or are stored cannot be changed "
                f"after the first step ({changes}, the last step's value); build a new optimizer"
            )
        if set(want) - set(kept):  # SGD's buffer, at its first momentum above 0
            state.update({key: value for key, value in rule.init(param).items() if key not in kept})
        for key in set(state) - set(want):
            del state[key]


def check_state(label: str, rule: UpdateRule, param: Tensor, state: Mapping[str, Any]) -> None:
    """Check that a saved state has the rule's entries in the rule's shapes.

    Args:
        label: The parameter's name for the message.
        rule: The rule.
        param: The parameter.
        state: The saved state.

    Raises:
        ValueError: If it does not.
    """
    expected = expected_state(rule, param)
    if set(state) != set(expected):
        raise ValueError(
            f"state of parameter {label}: entries {sorted(state)}, but {rule.name} keeps {sorted(expected)}; "
            "it was saved by another optimizer or with other settings"
        )
    for key, want in expected.items():
        shape = tuple(state[key].shape) if isinstance(state[key], Tensor) else ()
        if shape == (1,) and not want.shape:
            continue  # a count that a capturable optimizer kept
        if shape != tuple(want.shape):
            raise ValueError(f"state of parameter {label}: {key} has shape {shape}, expected {tuple(want.shape)}")


def loaded_state(rule: UpdateRule, param: Tensor, state: Mapping[str, Any], *, on: torch.device | None = None) -> State:
    """Return a copy of a saved state in the rule's dtypes, on the parameter's device; step counts stay on the CPU.

    Entries are distributed over ranks as the rule distributes its own. In a *full* state dict, torch shards only
    entries of the parameter's shape; second moments of rows or blocks are whole.

    Args:
        rule: The rule.
        param: The parameter.
        state: The saved state.
        on: The device, if it is not the parameter's.

    Returns:
        The state.
    """
    loaded: State = {}
    for key, want in expected_state(rule, param).items():
        device = (on or param.device) if want.device.type == "meta" else want.device
        value = torch.as_tensor(state[key]).detach()
        value = _laid_out(value.to(device=device, dtype=want.dtype, copy=True), want)
        loaded[key] = value if want.shape else value.reshape(())
    return loaded


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole or sharded tensor with the shards of `like`."""
    if is_sharded(value) and not is_sharded(like):
        whole: Tensor = value.full_tensor()  # type: ignore[attr-defined]
        return whole
    if not is_sharded(like):
        return value
    placements, mesh = like.placements, like.device_mesh  # type: ignore[attr-defined]
    if is_sharded(value):
        same = value.placements == placements  # type: ignore[attr-defined]
        moved: Tensor = value if same else value.redistribute(placements=placements)  # type: ignore[attr-defined]
        return moved
    from torch.distributed.tensor import distribute_tensor

    # every rank has the whole tensor, so nothing is sent
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def bare_name(name: str) -> str:
    """Return the parameter's name without what DDP, FSDP, checkpointing and torch.compile add to module names.

    Args:
        name: The name.

    Returns:
        The name in the unwrapped model.

    Example:
        >>> from optim import bare_name
        >>> bare_name("module._orig_mod.layers.0.weight")
        'layers.0.weight'
    """
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")
