"""torch's Muon, which orthogonalises with a single polynomial and whose momentum is an average."""

from collections.abc import Mapping
from typing import Any

import torch

from optim.linalg import NEWTON_SCHULZ
from optim.rule import UpdateRule
from optim.settings import described_setting
from optim.torch_states.counterpart import Counterpart, Group, State, first_step, without_step

CONVENTION: dict[str, Any] = {"momentum_form": "ema", "scale": "original", "ns_form": "torch"}
"""The settings of the rule that correspond to torch's code."""

_SCALES = {"original": "original", "match_rms_adamw": "match_rms_adamw", None: "original"}


def _read(saved_group: Group, rule: UpdateRule) -> dict[str, Any]:
    triples = (tuple(saved_group["ns_coefficients"]),)
    own = rule.setting("ns_coefficients")
    same = isinstance(own, str) and NEWTON_SCHULZ[own].coefficients == triples and NEWTON_SCHULZ[own].safety == 1
    return {
        "momentum": saved_group["momentum"],
        "nesterov": saved_group["nesterov"],
        "ns_steps": saved_group["ns_steps"],
        "ns_coefficients": own if same else triples,
        "scale": _SCALES[saved_group.get("adjust_lr_fn")],
    }


def _write(described: Mapping[str, Any], decay: float) -> tuple[dict[str, Any], float]:
    if described["scale"] not in _SCALES:
        raise ValueError(f"to_torch_state: torch's Muon has no scale {described['scale']!r}")
    coefficients = described["ns_coefficients"]
    table = NEWTON_SCHULZ[coefficients] if isinstance(coefficients, str) else None
    triples = table.coefficients if table else coefficients
    if len(triples) != 1 or (table and table.safety != 1):
        raise ValueError(
            f"to_torch_state: torch's Muon has a single polynomial and cannot have ns_coefficients = {coefficients!r}"
        )
    said = {
        "momentum": described["momentum"],
        "nesterov": described["nesterov"],
        "ns_steps": described["ns_steps"],
        "ns_coefficients": tuple(triples[0]),
        "eps": described["ns_eps"],
        "adjust_lr_fn": described["scale"],
    }
    return said, decay


def _native(rule: UpdateRule, state: Mapping[str, Any]) -> State | None:
    buffer = state.get("momentum_buffer")
    if buffer is None:
        return None
    return first_step(buffer / (1 - rule.setting("momentum")) if _sums(rule.setting("momentum_form")) else buffer)


def _entries(described: Mapping[str, Any], state: State) -> State:
    if state and _sums(described_setting(described, "momentum_form")):
        state["momentum_buffer"] *= 1 - described_setting(described, "momentum")
    return without_step(described, state)


def _sums(form: str) -> bool:
    """Return whether the momentum is a sum here, where torch's is an average."""
    return form == "heavy_ball"


MUON = Counterpart(
    name="muon",
    called="Muon",
    keys=frozenset({"momentum", "ns_steps", "ns_coefficients"}),
    make=torch.optim.Muon,
    read=_read,
    write=_write,
    same={
        "cautious_decay": False,
        "conv_scale": "matrix",
        "batched": False,
        "transposed": False,
        "split_sizes": None,
        "num_heads": None,
    },
    native=_native,
    entries=_entries,
    settings=CONVENTION,
)
