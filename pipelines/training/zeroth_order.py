"""`gradient: zo`: the source of zeroth-order gradients for the settings of a training run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import optim
from datatools import DataError, UsageError
from optim.zeroth_order import NotFinite, ZerothOrder
from pipelines.runs.messages import warn
from pipelines.runs.seeds import derive_seed
from pipelines.settings.parts import TrainingConfig

_LAYER = re.compile(r"^(?P<layer>(?:.*\.)?(?:layers?|h|blocks?)\.(?P<number>\d+))(?P<part>\.[^.]+)?")


def source_of(recipe: TrainingConfig, module: nn.Module, *, seed: int) -> ZerothOrder:
    """Return the source over the trained parameters of a model.

    Args:
        recipe: The recipe.
        module: The model.
        seed: The seed of the run.

    Raises:
        UsageError: A setting is wrong.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    narrow = [name for name, p in named if p.dtype.itemsize < 4]
    if narrow and recipe.zo.restore == "inplace" and recipe.zo.estimator != "forward":
        warn(
            f"training.zo: {narrow[0]} and others have 16 bits, so moving weights forth and back leaves an error "
            "that may exceed a small step; use --set training.zo.restore=copy, or --set model.dtype=float32"
        )
    return _source(recipe, named, module, seed)


def _source(recipe: TrainingConfig, named: Sequence[tuple[str, Tensor]], module: nn.Module, seed: int) -> ZerothOrder:
    settings = recipe.zo.model_dump(exclude={"blocks", "first_order_layers"})
    names = [name for name, _ in named]
    deep = after_layer(names, recipe.zo.first_order_layers)
    try:
        return ZerothOrder(
            named,
            module=module,
            blocks=block_by(recipe.zo.blocks),
            first_order=deep.__contains__ if deep else None,
            seed=derive_seed(seed, "zeroth order"),
            **settings,
        )
    except ValueError as error:
        raise UsageError(f"training.zo: {error}") from error


def check(recipe: TrainingConfig, optimizer: optim.Optimizer, named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse settings that exclude each other, and optimizers that need more than an estimate.

    Args:
        recipe: The recipe.
        optimizer: The optimizer.
        named: Parameters by name.

    Raises:
        UsageError: A setting or the optimizer cannot be used.
    """
    for group in optimizer.param_groups:
        if isinstance(group["rule"], optim.curvature.CurvatureRule):
            raise UsageError(
                f"training.optimizer {recipe.optimizer}: needs the curvature of the loss, and so back-propagation; for "
                "gradient zo choose another, such as sgd or adamw"
            )
    settings = recipe.zo.model_copy(update={"first_order_layers": 0, "sparse_by": "layer"})  # these look at a model
    if recipe.zo.conserve and recipe.zo.first_order_layers:
        raise UsageError("training.zo: conserve compares zeroth-order steps; set first_order_layers to 0")
    try:
        _source(recipe.model_copy(update={"zo": settings}), list(named), nn.Module(), 0).check(optimizer)
    except ValueError as error:
        raise UsageError(f"training.zo: {error}") from error


def step(
    source: ZerothOrder,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Callable[[], Tensor]],
    *,
    taken: int,
    rows: Sequence[int],
) -> tuple[float, dict[str, Any]]:
    """Step the optimizer on the sum of `parts`.

    Args:
        source: The source of gradients.
        optimizer: The optimizer.
        parts: Functions whose losses sum to the loss of the step.
        taken: The number of earlier steps.
        rows: The numbers of the rows, for messages.

    Returns:
        The loss at the first evaluated point, and the facts that replay the step.

    Raises:
        NotFinite: The loss or gradient is not finite.
        DataError: The source refuses the step for another reason.
    """
    source.taken = taken
    try:
        loss = source.step(optimizer, parts)
    except NotFinite:
        raise
    except ValueError as error:
        raise DataError(f"training: {error}; rows {rows[:5]}") from error
    done = source.last
    assert done is not None
    return loss, {
        "step": taken + 1, "seeds": done.seeds, "projected_grad": done.projected_grad, "kept": done.kept,
    }  # fmt: skip


def block_by(how: str) -> Callable[[str], str] | None:
    """Return a function from a parameter name to its block: its transformer layer or a part of it, else its module.

    Args:
        how: "none", "layer" or "module".

    Returns:
        The function; None for "none".
    """
    if how == "none":
        return None

    def block(name: str) -> str:
        match = _LAYER.match(name)
        if match is None:
            return name.rpartition(".")[0]
        return match["layer"] + ((match["part"] or "") if how == "module" else "")

    return block


def after_layer(names: Sequence[str], layers: int) -> set[str]:
    """Return the parameters of the last layers and of everything after them.

    Args:
        names: The parameters in the model's order.
        layers: The number of last layers.

    Raises:
        UsageError: There are not enough layers.
    """
    if not layers:
        return set()
    numbers = [int(match["number"]) if (match := _LAYER.match(name)) else None for name in names]
    present = sorted({n for n in numbers if n is not None})
    if layers >= len(present):
        raise UsageError(
            f"training.zo.first_order_layers is {layers}; of the model's {len(present)} trained layers, at least one "
            "must remain for zeroth order (for all layers, use gradient backprop)"
        )
    first = present[-layers]
    last = max(i for i, n in enumerate(numbers) if n is not None)
    placed = enumerate(zip(names, numbers, strict=True))
    return {name for i, (name, n) in placed if (i > last if n is None else n >= first)}
