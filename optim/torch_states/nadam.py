"""torch's NAdam, whose weight decay is either decoupled or added to the gradient."""

from collections.abc import Mapping
from typing import Any

import torch

from optim.rule import UpdateRule
from optim.torch_states.counterpart import Counterpart, Group, coupled

_SETTINGS = ("betas", "eps", "momentum_decay")


def _read(saved_group: Group, rule: UpdateRule) -> dict[str, Any]:
    said = {key: saved_group[key] for key in _SETTINGS}
    return said | {"l2": saved_group["weight_decay"] if coupled(saved_group) else 0.0}


def _write(described: Mapping[str, Any], decay: float) -> tuple[dict[str, Any], float]:
    l2 = described.get("l2", 0.0)
    if l2 and decay:
        raise ValueError(f"to_torch_state: torch's NAdam has either l2 ({l2}) or decoupled decay ({decay}), not both")
    return {key: described[key] for key in _SETTINGS} | {"decoupled_weight_decay": not l2}, l2 or decay


NADAM = Counterpart(
    name="nadam",
    called="NAdam",
    keys=frozenset(_SETTINGS),
    make=torch.optim.NAdam,
    read=_read,
    write=_write,
    own_decay=lambda group: not group.get("decoupled_weight_decay", True),
)
