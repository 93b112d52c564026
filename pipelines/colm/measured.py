"""What a monitored step measured of its choices: errors of the mean gradient, and rows by source."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from datatools import CORESET_FEATURES, CORESET_METHODS, Selection, kept_by_source
from pipelines.settings.train import CoresetConfig

Watched = Sequence[tuple[Any, Sequence[Hashable], Selection]]


def errors(watched: Watched) -> dict[str, Any]:
    """Return the mean errors over the micro-batches of a step.

    Args:
        watched: The choice, its sources and rows, for each micro-batch.
    """
    return {
        "match_error": math.fsum(last.match_error for last, _, _ in watched) / len(watched),
        "match_error_random": math.fsum(last.match_error_random for last, _, _ in watched) / len(watched),
    }


def rows_by_source(watched: Watched) -> dict[str, Any]:
    """Return the rows of each source in the micro-batches of a step, and how many of them were kept.

    Args:
        watched: The choice, its sources and rows, for each micro-batch.
    """
    kept: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for _, sources, chosen in watched:
        kept.update(kept_by_source(sources, chosen))
        seen.update(map(str, sources))
    return {"kept_by_source": dict(sorted(kept.items())), "seen_by_source": dict(sorted(seen.items()))}


def advice(settings: CoresetConfig) -> str:
    """Return what to do about a choice that costs more than it saves.

    Args:
        settings: The settings of coresets.
    """
    control = next(name for name, method in CORESET_METHODS.items() if method.control)
    plain = f"choose at random (--coreset-method {control}), which costs nothing, or train on plain batches"
    if CORESET_FEATURES[settings.features].free:
        return plain
    return f"choose without a pass (--coreset-features stored or stale), or {plain}"


def of_all_processes(accelerator: Any, numbers: list[int], features: Tensor) -> tuple[list[int], Tensor]:
    """Return what all processes have collected of their rows.

    Args:
        accelerator: accelerate's.
        numbers: The numbers of the rows of this process.
        features: Their features, float32 [n, d].
    """
    mine = torch.cat([torch.tensor(numbers, dtype=torch.float64)[:, None].to(features.device), features.double()], 1)
    whole = accelerator.gather(accelerator.pad_across_processes(mine, dim=0, pad_index=math.nan))
    whole = whole[whole[:, 0].isfinite()]
    return [int(number) for number in whole[:, 0].tolist()], whole[:, 1:].float()
