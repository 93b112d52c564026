"""Does the choice do anything? How far the mean gradient of the chosen rows is from that of the whole batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from datatools.colm.quotas import Plan
from datatools.selection.candidates import Selection

DRAWS = 16
STEPS, RATIO = 100, 0.98


def matching_error(features: Tensor, chosen: Selection) -> float:
    """|| mean_S w g - mean g || / || mean g || of plain gradients g [n, d]; 0 for all rows, NaN for 0 / 0."""
    rows = features.double()
    weights = chosen.weights.double().to(rows.device)
    mean = rows.mean(0)
    return float(((weights @ rows[chosen.indices]) / len(chosen) - mean).norm() / mean.norm())


def random_error(features: Tensor, plan: Plan, generator: torch.Generator, *, draws: int = DRAWS) -> float:
    """The mean `matching_error` of `draws` random choices with the plan's kept rows and quotas."""
    features = features.double()  # once, and not for each draw
    return sum(matching_error(features, plan.draw(generator)) for _ in range(draws)) / draws


def not_better(entries: Sequence[Mapping[str, Any]], *, steps: int = STEPS, ratio: float = RATIO) -> str | None:
    """A warning when choosing was not better than random over the last `steps` steps; None otherwise.

    entries: what was monitored, oldest first, each with `step`, `match_error` and `match_error_random`. Nothing is said
    before `steps` steps have passed.
    """
    if not entries or entries[-1]["step"] - entries[0]["step"] + 1 < steps:
        return None
    recent = [e for e in entries if e["step"] > entries[-1]["step"] - steps]
    ours, chance = (sum(e[key] for e in recent) / len(recent) for key in ("match_error", "match_error_random"))
    if not ours >= ratio * chance:
        return None
    return (
        f"coreset: over the last {steps} steps the chosen rows match the large batch's gradient no better than random "
        f"rows of the same sources (error {ours:.3f} against {chance:.3f}); choosing costs time here and gives nothing"
    )
