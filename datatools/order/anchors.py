"""Anchors of a run: copies of parameters and optimizer states at some of its steps, in memory and in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from datatools.errors import DataError, UsageError
from datatools.files import sealed
from datatools.order.problem import Params
from datatools.order.recipe import Recipe, States
from optim import Optimizer, UpdateMap


@dataclass(frozen=True)
class Anchor:
    """Parameters and optimizer states before the step at `position`, or after the last step if `position` is T.

    Attributes:
        position: 0..T.
        params: name -> [*shape], floating dtype.
        states: name -> state of the rule.

    Example:
        >>> Anchor(0, {"w": torch.zeros(2)}, {}).position
        0

    """

    position: int
    params: Params
    states: States


def anchor_path(folder: Path, position: int) -> Path:
    """Return the path of an anchor.

    Args:
        folder: folder of the run.
        position: position of the anchor.

    Returns:
        The path.

    """
    return folder / f"anchor-{position:05d}.safetensors"


def save_anchor(folder: Path, anchor: Anchor) -> None:
    """Write one anchor, whole or not at all.

    Args:
        folder: folder of the run.
        anchor: the anchor.

    """
    tensors = {f"param/{name}": p for name, p in anchor.params.items()}
    for name, state in anchor.states.items():
        tensors |= {f"state/{name}/{key}": value for key, value in state.items()}
    sealed.write_tensors(anchor_path(folder, anchor.position), tensors)


def load_anchor(folder: Path, position: int, recipe: Recipe, device: torch.device | str = "cpu") -> Anchor:
    """Read one anchor.

    Args:
        folder: folder of the run.
        position: position of the anchor.
        recipe: the recipe of the run.
        device: device of the parameters; states are put where the rule creates them.

    Returns:
        The anchor.

    Raises:
        DataError: if it is missing or damaged, or lacks parameters or states of the recipe.

    """
    path = anchor_path(folder, position)
    tensors = sealed.read_tensors(path)
    params = {name: tensors[f"param/{name}"].to(device) for name in recipe.rules if f"param/{name}" in tensors}
    missing = [name for name in recipe.rules if name not in params]
    states: States = {}
    for name, rule in recipe.rules.items():
        if name in params:
            keys = rule.init(params[name])
            at = {k: f"state/{name}/{k}" for k in keys}
            states[name] = {k: tensors[at[k]].to(fresh.device) for k, fresh in keys.items() if at[k] in tensors}
            missing += [f"{name}/{key}" for key in keys if key not in states[name]]
    if missing:
        raise DataError(
            f"{path} lacks {missing[0]!r} (and {len(missing) - 1} more): a reference run needs the parameters and the "
            "optimizer states of every anchor; record it again"
        )
    return Anchor(position, params, states)


def anchor_positions(steps: int, anchors: int) -> list[int]:
    """Spread positions evenly over 0..steps, including both ends.

    Args:
        steps: steps of the run.
        anchors: number of positions.

    Returns:
        The positions, ascending.

    Raises:
        UsageError: unless 2 <= anchors <= steps + 1.

    """
    if not 2 <= anchors <= steps + 1:
        raise UsageError(f"order: {anchors} anchors for {steps} steps; expected 2 to {steps + 1}")
    return sorted({round(i * steps / (anchors - 1)) for i in range(anchors)})


def snapshot(optimizer: Optimizer, position: int) -> Anchor:
    """Copy parameters and optimizer states of a run that trains in place, such as a `Trainer`.

    Args:
        optimizer: the optimizer, created from named parameters.
        position: position of the next step.

    Returns:
        The anchor.

    Example:
        >>> from optim import AdamW
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> snapshot(AdamW([("weight", weight)], lr=0.1), position=0).params
        {'weight': tensor([0., 0.])}

    """
    found = UpdateMap.of(optimizer)
    return Anchor(position, dict(found.params), {name: dict(state) for name, state in found.states.items()})
