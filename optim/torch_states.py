"""State dicts of `torch.optim`'s AdamW, SGD, NAdam and Muon, read as those of the rules here and written from them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.linalg import NEWTON_SCHULZ
from optim.rule import UpdateRule
from optim.settings import CHANGED, TORCH_FLAGS, described_setting

_KEYS = {  # looked at in this order: the first that a group has all keys of
    "nadam": {"betas", "eps", "momentum_decay"},
    "adamw": {"betas", "eps", "amsgrad"},
    "muon": {"momentum", "ns_steps", "ns_coefficients"},
    "sgd": {"momentum", "dampening", "nesterov"},
}
"""Rule -> keys of a param group by which torch's optimizer of that name is told."""

_CALLED = {"nadam": "NAdam", "adamw": "AdamW (or Adam)", "muon": "Muon", "sgd": "SGD"}
_SCALES = {"original": "original", "match_rms_adamw": "match_rms_adamw", None: "original"}


def rule_name(saved_group: Mapping[str, Any]) -> str | None:
    """Return the name of the rule that does what the optimizer of torch did that wrote this group, or None."""
    return next((name for name, keys in _KEYS.items() if keys <= set(saved_group)), None)


def described(saved_group: Mapping[str, Any], rule: UpdateRule) -> dict[str, Any]:
    """Return the description of the rule of a group that torch wrote; what it does not say is as in `rule`.

    Raises:
        ValueError: If an optimizer wrote it that is no counterpart of `rule`, or that ran with a switch that changes
            the algorithm and does not exist here.
    """
    found = rule_name(saved_group)
    if found != rule.name:
        there = f"torch.optim's {_CALLED[found]}" if found else f"an optimizer with the settings {sorted(saved_group)}"
        raise ValueError(
            f"load_state_dict: a param group was saved by {there}, and this one runs {rule.name!r}; "
            f"torch's state dicts load into {', '.join(sorted(_KEYS))}, each into its own counterpart"
        )
    for flag in ("maximize", "differentiable"):
        if saved_group.get(flag):
            raise ValueError(f"load_state_dict: the saved optimizer ran with {flag}=True, which is not supported here")
    decay = saved_group.get("weight_decay", 0.0)
    coupled = decay != 0 and not saved_group.get("decoupled_weight_decay", True)
    said: dict[str, Any]
    if found == "muon":
        triples = (tuple(saved_group["ns_coefficients"]),)
        own = rule.setting("ns_coefficients")
        same = isinstance(own, str) and NEWTON_SCHULZ[own].coefficients == triples and NEWTON_SCHULZ[own].safety == 1
        said = {
            "momentum": saved_group["momentum"],
            "nesterov": saved_group["nesterov"],
            "ns_steps": saved_group["ns_steps"],
            "ns_coefficients": own if same else triples,
            "scale": _SCALES[saved_group.get("adjust_lr_fn")],
        }
    elif found == "sgd":
        said = {key: saved_group[key] for key in ("momentum", "dampening", "nesterov")}
        if decay != 0 and said["momentum"] != 0:
            raise ValueError(
                f"load_state_dict: the saved SGD put its weight decay ({decay}) into the gradient and so into the "
                "momentum; here it is decoupled. Load it with weight_decay 0 in the saved group, and set it after that"
            )
    elif found == "nadam":
        said = {key: saved_group[key] for key in ("betas", "eps", "momentum_decay")}
        said["l2"] = decay if coupled else 0.0
    else:
        said = {key: saved_group[key] for key in ("betas", "eps", "amsgrad")}
        if coupled:
            raise ValueError("load_state_dict: the saved Adam put weight decay into the gradient; here it is decoupled")
    return rule.describe() | said


def kept_keys(saved_group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group that torch wrote without the settings that the rule has here."""
    name = rule_name(saved_group)
    gone = set().union(*_KEYS.values()) | {*TORCH_FLAGS, "decoupled_weight_decay", "adjust_lr_fn", "eps"}
    kept = {key: value for key, value in saved_group.items() if key not in gone}
    if name == "nadam" and not saved_group.get("decoupled_weight_decay", True):
        kept["weight_decay"] = 0.0  # `l2` of the rule
    return kept


def native(rule: UpdateRule, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a parameter's state that torch wrote in the entries of `rule`; None if it holds nothing to continue with.

    Neither SGD nor Muon counts steps in torch: their counts begin at 1 here, which means that there was a first step.
    """
    if rule.name not in ("sgd", "muon"):
        return dict(state)
    buffer = state.get("momentum_buffer")
    if buffer is None or (rule.name == "sgd" and rule.setting("momentum") == 0):
        return None
    if rule.name == "muon" and rule.setting("momentum_form") == "heavy_ball":
        buffer = buffer / (1 - rule.setting("momentum"))
    return {"step": torch.ones(()), "momentum_buffer": buffer}


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
    if name not in _KEYS:
        raise ValueError(f"to_torch_state: torch has no counterpart of {name!r}; it has those of {', '.join(_KEYS)}")

    def need(**wanted: Any) -> None:
        for key, value in wanted.items():
            if described.get(key, value) != value:
                raise ValueError(
                    f"to_torch_state: torch's {_CALLED[name]} has nothing like {key} = {described[key]!r} of {name!r}"
                )

    one = [torch.nn.Parameter(torch.zeros(1, 1))]
    made: Any
    if name == "adamw":
        need(eps_root=0.0, bias_correction=True, eps_before_correction=False, stochastic_rounding=False)
        made = torch.optim.AdamW(one)
        said = {key: described[key] for key in ("betas", "eps", "amsgrad")}
    elif name == "nadam":
        made = torch.optim.NAdam(one)
        said = {key: described[key] for key in ("betas", "eps", "momentum_decay")}
        l2 = described.get("l2", 0.0)
        if l2 and decay:
            raise ValueError(f"to_torch_state: torch's NAdam has l2 ({l2}) or decoupled decay ({decay}), not both")
        said["decoupled_weight_decay"] = not l2
        decay = l2 or decay
    elif name == "sgd":
        made = torch.optim.SGD(one)
        said = {key: described[key] for key in ("momentum", "dampening", "nesterov")}
        if decay and said["momentum"]:
            raise ValueError(
                f"to_torch_state: torch's SGD puts weight decay ({decay}) into the momentum, here it is decoupled; set "
                "the groups' weight_decay to 0 first"
            )
    else:
        need(
            cautious_decay=False, conv_scale="matrix", batched=False, transposed=False, split_sizes=None, num_heads=None
        )
        if described["scale"] not in _SCALES:
            raise ValueError(f"to_torch_state: torch's Muon has no scale {described['scale']!r}")
        made = torch.optim.Muon(one)
        coefficients = described["ns_coefficients"]
        table = NEWTON_SCHULZ[coefficients] if isinstance(coefficients, str) else None
        triples = table.coefficients if table else coefficients
        if len(triples) != 1 or (table and table.safety != 1):
            raise ValueError(f"to_torch_state: torch's Muon has one polynomial, not ns_coefficients = {coefficients!r}")
        said = {
            "momentum": described["momentum"],
            "nesterov": described["nesterov"],
            "ns_steps": described["ns_steps"],
            "ns_coefficients": tuple(triples[0]),
            "eps": described["ns_eps"],
            "adjust_lr_fn": described["scale"],
        }
    return {k: v for k, v in made.param_groups[0].items() if k != "params"} | said | {"weight_decay": decay}


def _torch_entries(rule: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state in the entries of torch's class."""
    copied = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    if rule["name"] in ("sgd", "muon"):
        copied.pop("step", None)
    if rule["name"] == "muon" and copied and described_setting(rule, "momentum_form") == "heavy_ball":
        copied["momentum_buffer"] *= 1 - described_setting(rule, "momentum")
    return copied
