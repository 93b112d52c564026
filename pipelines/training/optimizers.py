"""The optimizer and the learning-rate schedule that a training recipe names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import optim
from datatools import UsageError
from pipelines.settings.parts import TrainingConfig
from pipelines.training import zeroth_order


def head_dim(model: nn.Module) -> int | None:
    """Return the number of rows of a query matrix that form one head; None if the configuration does not state it.

    Args:
        model: The model.
    """
    config = getattr(model, "config", None)
    try:
        stated = getattr(config, "head_dim", None)
    except RuntimeError:  # layers of several sizes, each with a configuration of its own
        return None
    hidden, heads = (getattr(config, key, None) for key in ("hidden_size", "num_attention_heads"))
    found = hidden // heads if stated is None and hidden and heads and hidden % heads == 0 else stated
    return found if isinstance(found, int) else None


def optimizer_of(recipe: TrainingConfig, module: nn.Module) -> optim.Optimizer:
    """Return the optimizer that a recipe names over the trained parameters of a model.

    Norms and biases have no weight decay, as with Trainer (`optim.without_decay`); bfloat16 weights are rounded as the
    recipe says.

    Args:
        recipe: The recipe.
        module: The model.

    Raises:
        UsageError: The optimizer or a hyper-parameter does not exist.
    """
    optimizer = _optimizer(recipe, module, head_dim(module))
    if any(p.dtype == torch.bfloat16 for p in module.parameters() if p.requires_grad):
        optim.set_rounding(optimizer, "nearest" if recipe.rounding == "nearest" else "stochastic")
    return optimizer


def _optimizer(
    recipe: TrainingConfig, parameters: nn.Module | Sequence[tuple[str, Tensor]], head: int | None = None
) -> optim.Optimizer:
    """Return the optimizer of a recipe.

    Args:
        recipe: The recipe.
        parameters: The model, or its named parameters.
        head: `head_dim` of the model, for optimizers whose blocks are heads by default.
    """
    options: dict[str, Any] = dict(recipe.optimizer_options)
    kind = optim.OPTIMIZERS.get(recipe.optimizer)
    by_heads = kind is not None and "head_dim" in inspect.signature(kind).parameters
    if by_heads and head and not {"dim", "n_heads", "head_dim", "blocks"} & set(options):
        options["head_dim"] = head
    try:
        return optim.create(
            recipe.optimizer,
            parameters,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            decay_all=recipe.decay_all or not recipe.weight_decay,
            block_ratios=recipe.block_ratios,
            **options,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"training.optimizer: {error}") from error


def factors(recipe: TrainingConfig, steps: int, optimizer: torch.optim.Optimizer) -> list[Callable[[int], float]]:
    """Return one function per param group: number of past steps -> factor of the next step, from the schedule of T + 1.

    Args:
        recipe: The recipe.
        steps: The number of steps T.
        optimizer: The optimizer.

    Raises:
        UsageError: The schedule or an option does not exist.
    """

    def next_step(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: factor(step + 1)

    try:
        options: dict[str, Any] = dict(recipe.schedule_options)
        if "warmup_steps" in optim.schedule_options(recipe.schedule):
            options.setdefault("warmup_steps", math.ceil(recipe.warmup_ratio * steps))
        found = optim.group_factors(optimizer, recipe.schedule, total_steps=steps + 1, **options)
        return [next_step(factor) for factor in found]
    except (ValueError, TypeError) as error:
        raise UsageError(f"training.schedule: {error}") from error


def held(factor: Callable[[int], float], steps: int) -> Callable[[int], float]:
    """Return a schedule factor that is constant for some steps before it begins.

    Args:
        factor: Step -> factor.
        steps: The number of constant steps.
    """
    return factor if not steps else lambda step: factor(max(step - steps, 0))


def check(recipe: TrainingConfig) -> None:
    """Refuse an optimizer, a hyper-parameter or a schedule that does not exist, before anything is loaded.

    Args:
        recipe: The recipe.

    Raises:
        UsageError: One of them does not exist.
    """
    examples = optim.example_parameters(recipe.block_ratios)
    options = dict(recipe.optimizer_options)
    for key in ("assign", "blocks"):
        if isinstance(options.get(key), Mapping):
            options[key] = {}  # of names that the examples do not have
    optimizer = _optimizer(recipe.model_copy(update={"optimizer_options": options}), examples)
    factors(recipe, 1, optimizer)
    if recipe.gradient == "zo":
        zeroth_order.check(recipe, optimizer, examples)
