"""torch's AdamW, and its Adam if that has no weight decay."""

from collections.abc import Mapping
from typing import Any

import torch

from optim.rule import UpdateRule
from optim.torch_states.counterpart import Counterpart, Group, coupled

_SETTINGS = ("betas", "eps", "amsgrad")


def _read(saved_group: Group, rule: UpdateRule) -> dict[str, Any]:
    if coupled(saved_group):
        raise ValueError(
            "load_state_dict: the saved Adam added weight decay to the gradient, but here it is decoupled; load it "
            "with weight_decay 0 in the saved group, and set it afterwards"
        )
    return {key: saved_group[key] for key in _SETTINGS}


def _write(described: Mapping[str, Any], decay: float) -> tuple[dict[str, Any], float]:
    return {key: described[key] for key in _SETTINGS}, decay


ADAMW = Counterpart(
    name="adamw",
    called="AdamW (or Adam)",
    keys=frozenset(_SETTINGS),
    make=torch.optim.AdamW,
    read=_read,
    write=_write,
    same={"eps_root": 0.0, "bias_correction": True, "eps_before_correction": False, "stochastic_rounding": False},
)
