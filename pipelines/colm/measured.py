"""What a monitored step measured of its choices: errors of the mean gradient, and rows by source."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from datatools import Selection, kept_by_source

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
