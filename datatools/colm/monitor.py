"""Monitor of the choice: how far the mean gradient of the chosen rows is from that of the whole batch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.colm.quotas import Plan
from datatools.selection.candidates import Selection

DRAWS = 16
STEPS, RATIO = 100, 0.98
LEAST = 5


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


def worth_in_rows(keep: int, large: int, error: float, error_random: float) -> float:
    """Return how many random rows would match the large batch's gradient as well as the chosen ones.

    The squared error of k random rows of n is proportional to 1/k - 1/n, so that k' random rows have the error of the
    choice where 1/k' - 1/n = (error / error_random)^2 (1/k - 1/n).

    Args:
        keep: chosen rows k.
        large: rows of the large batch n.
        error: the matching error of the choice.
        error_random: that of k random rows.

    Returns:
        k', between 0 and n; k where the errors are not finite.

    Example:
        >>> worth_in_rows(16, 32, 1.0, 1.0), worth_in_rows(16, 32, 0.5, 1.0), worth_in_rows(16, 32, 0.0, 1.0)
        (16.0, 25.6, 32.0)

    """
    ratio = error / error_random if error_random > 0 else math.nan
    if not math.isfinite(ratio):
        return float(keep)
    return 1 / (ratio**2 * (1 / keep - 1 / large) + 1 / large)


def saved_seconds(entry: Mapping[str, Any]) -> float | None:
    """Return the training time that a choice saves in a step: that of the further random rows that it stands for.

    Args:
        entry: monitored values, with `kept_rows`, `drawn_rows`, both errors and `train_seconds`.

    Returns:
        Seconds; negative where the choice is worse than random rows; None where values are missing.

    Example:
        >>> saved_seconds({"kept_rows": 8}) is None
        True

    """
    keys = ("kept_rows", "drawn_rows", "match_error", "match_error_random", "train_seconds")
    if not all(isinstance(entry.get(key), int | float) for key in keys):
        return None
    keep, large, error, chance, seconds = (entry[key] for key in keys)
    return float(seconds * (worth_in_rows(keep, large, error, chance) / keep - 1))


def costs_more(entries: Sequence[Mapping[str, Any]], *, advice: str, least: int = LEAST) -> str | None:
    """Compose a warning if choosing takes more time than it saves.

    A choice saves the time of training on more random rows to the same error of the mean gradient (`worth_in_rows`). It
    costs what a step spends on choosing, without measuring. Medians over the monitored steps but the first, which is
    always slow, are compared.

    Args:
        entries: monitored values, oldest first, each with `kept_rows`, `drawn_rows`, `match_error`,
            `match_error_random`, `select_seconds` and `train_seconds`.
        advice: what to do about it.
        least: number of monitored steps below which nothing is said.

    Returns:
        The warning, or None.

    Example:
        >>> entry = {"kept_rows": 16, "drawn_rows": 32, "match_error": 0.9, "match_error_random": 1.0}
        >>> entry |= {"select_seconds": 0.5, "train_seconds": 1.0}
        >>> costs_more([entry] * 9, advice="train on plain batches")[:49]
        'coreset: this choice costs more than it saves: ch'

    """
    known = [entry for entry in entries[1:] if saved_seconds(entry) is not None and "select_seconds" in entry]
    if len(known) < least - 1:
        return None
    saved = statistics.median(saved_seconds(entry) or 0.0 for entry in known)
    spent = statistics.median(entry["select_seconds"] for entry in known)
    if spent <= max(saved, 0.0) or not spent > 0:
        return None
    keep = statistics.median(entry["kept_rows"] for entry in known)
    worth = statistics.median(
        worth_in_rows(e["kept_rows"], e["drawn_rows"], e["match_error"], e["match_error_random"]) for e in known
    )
    gain = max(saved, 0.0)
    return (
        f"coreset: this choice costs more than it saves: choosing takes {spent:.3g} s of a step, and the {keep:g} rows "
        f"that are kept represent the large batch as well as {worth:.1f} random rows, which saves {gain:.3g} s "
        f"of training; {advice}"
    )
