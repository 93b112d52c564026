"""What a target row means to methods that use target gradients: an answer, a preference, or a reward (`objective`).

ce      every target row is an answer to learn: the gradient of its loss.
dpo     every target row has a chosen and a rejected answer: the gradient of the DPO loss (`datatools.less.preference`).
reward  every target row has an answer and a `reward`: the policy gradient, minus the sum of advantage x gradient of the
        log likelihood. The advantage of a row is its reward minus the mean reward of the rows with the same prompt,
        or, if no other row has its prompt, of all rows of its subtask. As in LESS, the gradient of each row has unit
        length before it is weighted; with `aggregate=paper`, the gradients of the mean log likelihoods per token (as
        in GRPO) are weighted and averaged without normalization.

Source: NICE, ICML 2025 (policy gradients as the target of a selection); ROSE, arXiv 2412.00631 (preferences).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datatools import DataError, UsageError, files
from pipelines.models.load import LoadedModel
from pipelines.rows.prepare import prepare, target_data
from pipelines.rows.rows import Rows
from pipelines.select.scored import Context, subtask_groups
from pipelines.settings.select import SelectConfig

LOSSES = {"ce": "l", "dpo": "DPO loss", "reward": "l"}
"""Objective -> the loss of a target row in formulas."""
ADVANTAGE = "A = reward minus the mean of its prompt or subtask, of mean |A| 1"
"""What weighs target rows with rewards, in formulas."""


def folder(config: SelectConfig, step: int) -> str:
    """Return the name of the store of the target's gradients; rewards use the gradients of answers.

    Args:
        config: The settings.
        step: The step of the checkpoint.
    """
    return f"target-dpo-{step}" if config.objective == "dpo" else f"target-{step}"


def unique(config: SelectConfig, target: Rows) -> dict[str, int]:
    """Return key -> a usable target row with this key, for everything that must be computed once.

    Args:
        config: The settings.
        target: The target.
    """
    if config.objective != "dpo":
        return target.unique()
    return {_pair_key(target, index): index for index in target.longest_first().tolist()}


def keys(config: SelectConfig, target: Rows) -> list[str]:
    """Return the key of each usable target row, as in `unique`.

    Args:
        config: The settings.
        target: The target.
    """
    rows = np.flatnonzero(target.usable).tolist()
    return [_pair_key(target, i) if config.objective == "dpo" else target.keys[i] for i in rows]


def _pair_key(target: Rows, index: int) -> str:
    """Return a key of the chosen answer's tokens and of the row, which contains the rejected answer."""
    return files.digest(target.keys[index].encode() + b"\n" + target.pool.raw(index))


def rejected(context: Context, loaded: LoadedModel) -> Rows:
    """Return the target rows with their rejected answers, each at the position of its row in `context.wanted`.

    Args:
        context: What is scored.
        loaded: The model.

    Raises:
        DataError: A rejected answer cannot be used, or equals the chosen one.
    """
    config, target = context.config, context.wanted
    data = target_data(config.train, config.target, config.target_columns)
    found = prepare(
        data.model_copy(update={"preference": "rejected"}),
        config.model,
        loaded.tokenizer,
        cache=context.run.path("inputs"),
        label="rejected answers of the target",
        limits=loaded.limits,
    )
    for index in np.flatnonzero(target.usable).tolist():
        if found.keys[index] == target.keys[index]:
            raise DataError(
                f"target row {target.pool.where(index)}: has no rejected answer, or the chosen one again; --objective "
                "dpo needs rows with `chosen` and `rejected`"
            )
    return found


def weights(config: SelectConfig, target: Rows) -> Tensor | None:
    """Return the advantage of each usable target row, float32 [m], scaled to mean absolute value 1.

    Args:
        config: The settings.
        target: The target.

    Returns:
        None if the objective has no rewards.

    Raises:
        DataError: A row has no reward, or the rewards do not differ.
    """
    if config.objective != "reward":
        return None
    rows = np.flatnonzero(target.usable).tolist()
    rewards, prompts = [], []
    for index in rows:
        value = target.pool.value(index, "reward")
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise DataError(
                f"target row {target.pool.where(index)}: `reward` is {str(value)[:40]!r}; expected a number "
                "(--target-columns reward=YOURS names another column)"
            )
        rewards.append(float(value))
        row = target.pool[index]
        prompts.append((row.subtask, row.question))
    groups = subtask_groups(target)[1].tolist()
    found = advantages(rewards, prompts, groups)
    scale = float(found.abs().mean())
    if scale < 1e-12:
        raise DataError(
            "the rewards of the target rows do not differ from the mean of their prompt (or subtask), so that they say "
            "nothing; give answers with better and worse rewards"
        )
    return (found / scale).float()


def advantages(rewards: Sequence[float], prompts: Sequence[object], groups: Sequence[int]) -> Tensor:
    """Return each reward minus the mean of its prompt, or of its group if no other row has the prompt; float64 [m].

    Args:
        rewards: The reward of each row.
        prompts: The prompt of each row.
        groups: The group of each row.

    Examples:
        >>> advantages([1.0, 0.0, 5.0, 3.0], ["p", "p", "q", "r"], [0, 0, 0, 0]).tolist()
        [0.5, -0.5, 2.75, 0.75]
    """
    of_prompt: dict[object, list[float]] = defaultdict(list)
    of_group: dict[int, list[float]] = defaultdict(list)
    for reward, prompt, group in zip(rewards, prompts, groups, strict=True):
        of_prompt[prompt].append(reward)
        of_group[group].append(reward)
    base = [
        of_prompt[prompt] if len(of_prompt[prompt]) > 1 else of_group[group]
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    return torch.tensor([r - sum(b) / len(b) for r, b in zip(rewards, base, strict=True)], dtype=torch.float64)


def check(config: SelectConfig, objectives: tuple[str, ...]) -> None:
    """Refuse an objective that the method does not support.

    Args:
        config: The settings.
        objectives: The objectives that the method supports.

    Raises:
        UsageError: The method uses no gradients of target rows, or not for this objective.
    """
    if config.objective not in objectives:
        raise UsageError(
            f"--objective {config.objective} changes which gradient of a target row is taken, and --method "
            f"{config.method} takes none of this kind; use --method less or gist"
        )
