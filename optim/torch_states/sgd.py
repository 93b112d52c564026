"""torch's SGD, whose weight decay is added to the gradient."""

from collections.abc import Mapping
from typing import Any

import torch

from optim.rule import UpdateRule
from optim.torch_states.counterpart import Counterpart, Group, State, first_step, without_step

_SETTINGS = ("momentum", "dampening", "nesterov")


def _read(saved_group: Group, rule: UpdateRule) -> dict[str, Any]:
    said, decay = {key: saved_group[key] for key in _SETTINGS}, saved_group.get("weight_decay", 0.0)
    if decay != 0 and said["momentum"] != 0:
        raise ValueError(
            f"load_state_dict: the saved SGD added its weight decay ({decay}) to the gradient and therefore to the "
            "momentum, but here it is decoupled; load it with weight_decay 0 in the saved group, and set it afterwards"
        )
    return said


def _write(described: Mapping[str, Any], decay: float) -> tuple[dict[str, Any], float]:
    said = {key: described[key] for key in _SETTINGS}
    if decay and said["momentum"]:
        raise ValueError(
            f"to_torch_state: torch's SGD adds weight decay ({decay}) to the momentum, but here it is decoupled; set "
            "the groups' weight_decay to 0 first"
        )
    return said, decay


def _native(rule: UpdateRule, state: Mapping[str, Any]) -> State | None:
    buffer = state.get("momentum_buffer")
    return None if buffer is None or rule.setting("momentum") == 0 else first_step(buffer)


SGD = Counterpart(
    name="sgd",
    called="SGD",
    keys=frozenset(_SETTINGS),
    make=torch.optim.SGD,
    read=_read,
    write=_write,
    native=_native,
    entries=without_step,
)
