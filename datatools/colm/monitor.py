"""Monitor of the choice: how far the mean gradient of the chosen rows is from that of the whole batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.colm.quotas import Plan
from datatools.selection.candidates import Selection

DRAWS = 16
STEPS, RATIO = 100, 0.98


def matching_error(features: Float[Tensor, "n d"], chosen: Selection) -> float:
    """Compute || mean_S w g - mean g || / || mean g || for plain gradients g and chosen rows S with weights w.

    Args:
        features: the gradients, floating dtype [n, d].
        chosen: the chosen rows.

    Returns:
        The relative error: 0 for all rows, nan for 0 / 0.

    Example:
        >>> matching_error(torch.eye(2), Selection(torch.tensor([0, 1])))
        0.0

    """
    rows = features.double()
    weights = chosen.weights.double().to(rows.device)
    mean = rows.mean(0)
    return float(((weights @ rows[chosen.indices]) / len(chosen) - mean).norm() / mean.norm())


def random_error(
    features: Float[Tensor, "n d"], plan: Plan, generator: torch.Generator, *, draws: int = DRAWS
) -> float:
    """Compute the mean `matching_error` of random choices with the plan's kept rows and quotas.

    Args:
        features: the gradients, floating dtype [n, d].
        plan: the plan of the choice.
        generator: source of randomness.
        draws: number of random choices.

    Returns:
        The mean relative error.

    Example:
        >>> from datatools.colm import plan
        >>> made = plan(["web", "web"], 1, generator=torch.Generator())
        >>> round(random_error(torch.eye(2), made, torch.Generator()), 3)
        1.0

    """
    features = features.double()  # converted once instead of for each draw
    return sum(matching_error(features, plan.draw(generator)) for _ in range(draws)) / draws


def not_better(entries: Sequence[Mapping[str, Any]], *, steps: int = STEPS, ratio: float = RATIO) -> str | None:
    """Compose a warning if choosing was no better than random over the last `steps` steps.

    Args:
        entries: monitored values, oldest first, each with `step`, `match_error` and `match_error_random`.
        steps: number of recent steps to average over; there is no warning before this number of steps has passed.
        ratio: the choice counts as better if its error is below `ratio` times the error of random rows.

    Returns:
        The warning, or None.

    Example:
        >>> entries = [{"step": t, "match_error": 0.5, "match_error_random": 1.0} for t in range(100)]
        >>> not_better(entries) is None
        True

    """
    if not entries or entries[-1]["step"] - entries[0]["step"] + 1 < steps:
        return None
    recent = [e for e in entries if e["step"] > entries[-1]["step"] - steps]
    ours, chance = (sum(e[key] for e in recent) / len(recent) for key in ("match_error", "match_error_random"))
    if not ours >= ratio * chance:
        return None
    return (
        f"coreset: over the last {steps} steps the chosen rows match the large batch's gradient no better than random "
        f"rows of the same sources (error {ours:.3f} against {chance:.3f}); choosing costs time here without benefit"
    )
