"""torch's SGD, whose weight decay is added to the gradient."""

from collections.abc import Mapping
from typing import Any

import torch

from optim.rule import UpdateRule
from optim.torch_states.counterpart import Counterpart, Group, State, first_step, without_step

_SETTINGS = ("momentum", "dampening", "nesterov")


def _coupled(saved_group: Group) -> bool:
    """Return whether weight decay is part of the momentum; without momentum it is the same as decoupled decay."""
    return bool(saved_group.get("weight_decay", 0.0) != 0 and saved_group["momentum"] != 0)


def _read(saved_group: Group, rule: UpdateRule) -> dict[str, Any]:
    said = {key: saved_group[key] for key in _SETTINGS}
    return said | {"l2": saved_group["weight_decay"] if _coupled(saved_group) else 0.0}


def _write(described: Mapping[str, Any], decay: float) -> tuple[dict[str, Any], float]:
    said, l2 = {key: described[key] for key in _SETTINGS}, described.get("l2", 0.0)
    if decay and (said["momentum"] or l2):
        raise ValueError(
            f"to_torch_state: torch's SGD adds weight decay to the gradient and therefore to the momentum (`l2` here), "
            f"but here the groups' weight_decay ({decay}) is decoupled; set it to 0 first"
        )
    return said, l2 or decay


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
    own_decay=_coupled,
)
