"""The rows of the batches of `datatools order`: drawn with the seed, of one source each or mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from datatools import UsageError, did_you_mean, order
from pipelines.rows.rows import Rows
from pipelines.runs.messages import say, warn
from pipelines.runs.seeds import derive_seed
from pipelines.settings.order import OrderConfig


def draw(
    config: OrderConfig, rows: Rows, held: Rows | None, names: Sequence[str]
) -> tuple[list[list[int]], list[int], list[int]]:
    """Return (batches of rows, held-out rows, remaining rows).

    Args:
        config: The settings.
        rows: The rows.
        held: The held-out rows; None takes some of the rows.
        names: The source of each row.

    Raises:
        UsageError: The rows do not give the batches; or, for a plan, there is no order of their sources.
    """
    usable = np.flatnonzero(rows.usable)
    rng = np.random.default_rng(derive_seed(config.seed, "order", "rows"))
    drawn = rng.permutation(usable).tolist()
    size_, wanted = config.training.batch_size, config.batches
    if held is not None:
        held_rows = np.flatnonzero(held.usable).tolist()
    else:
        count = max(1, min(config.held_out, len(drawn) // 4))
        held_rows, drawn = sorted(drawn[:count]), drawn[count:]
    drawn = _of_sources(config, drawn, names)
    if config.task == "plan":
        _check_plan(config, drawn, names)
    batches: list[list[int]] = []
    if config.grouping != "mixed":
        left: dict[str, list[int]] = {}
        for row in drawn:
            left.setdefault(names[row], []).append(row)
        turns = sorted(left)
        while len(batches) < wanted and any(len(left[name]) >= size_ for name in turns):
            for name in turns:
                if len(left[name]) >= size_ and len(batches) < wanted:
                    batches.append([left[name].pop() for _ in range(size_)])
        batches = [batches[i] for i in rng.permutation(len(batches))]
    if config.grouping == "mixed" or (config.grouping == "auto" and len(batches) < wanted):
        if config.grouping == "auto":
            if by_source := one_source_each(config):
                raise UsageError(
                    f"{by_source}: sources give only {len(batches)} of {wanted} batches of one source; "
                    "use fewer or smaller batches"
                )
            say(f"sources give only {len(batches)} of {wanted} batches of one source each; batches have mixed rows")
        batches = [drawn[size_ * i : size_ * (i + 1)] for i in range(wanted)]
        batches = [batch for batch in batches if len(batch) == size_]
    if len(batches) < wanted:
        raise UsageError(
            f"--batches {wanted}: the data gives {len(batches)} batches of {size_} rows"
            f"{' of one source' if config.grouping == 'source' else ''}"
            f"{f' besides {len(held_rows)} held-out rows' if held is None else ''}; use fewer or smaller batches"
        )
    taken = {row for batch in batches for row in batch}
    return batches, held_rows, [row for row in drawn if row not in taken]


def warm_up(config: OrderConfig, spare: list[int], batches: list[list[int]]) -> NDArray[np.int64]:
    """Return the rows of the warm-up batches [steps, batch size], from the remaining rows or else the run's own.

    Args:
        config: The settings.
        spare: The remaining rows.
        batches: The rows of each batch.
    """
    width, steps = config.training.batch_size, config.warmup_steps
    if not steps:
        return np.zeros((0, width), dtype=np.int64)
    pool = spare or [row for batch in batches for row in batch]
    if not spare:
        warn(
            "no row is left for the warm-up, which trains on the run's own rows; use fewer batches or --warmup-steps 0"
        )
    elif width * steps > 4 * len(spare):
        warn(
            f"the warm-up trains {width * steps / len(spare):.0f} times on each of the {len(spare)} remaining rows, "
            "so the run starts from a model that has memorised them; use fewer batches or fewer --warmup-steps"
        )
    rng = np.random.default_rng(derive_seed(config.seed, "order", "warm-up"))
    return np.stack([rng.choice(pool, width, replace=len(pool) < width) for _ in range(steps)])


def longest_answers(rows: Rows, batch: Sequence[int], count: int) -> list[int]:
    """Return the rows with most supervised tokens, which have the largest weight in a batch's mean over tokens.

    Args:
        rows: The rows.
        batch: The rows of the batch.
        count: The number of rows to return.
    """
    return sorted(batch, key=lambda row: (-sum(label != -100 for label in rows.item(row)[1]), row))[:count]


def tokens(rows: Rows, batches: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens of some batches.

    Args:
        rows: The rows.
        batches: The rows of each batch.
    """
    return sum(len(rows.item(row)[0]) for batch in batches for row in batch)


def source_of(names: Sequence[str], batch: Sequence[int]) -> str:
    """Return the source of most rows of a batch.

    Args:
        names: The source of each row.
        batch: The rows of the batch.
    """
    mine = [names[row] for row in batch]
    return max(dict.fromkeys(mine), key=mine.count)


def one_source_each(config: OrderConfig) -> str:
    """Return what needs batches of one source each; "" if nothing does.

    Args:
        config: The settings.
    """
    if config.task == "plan":
        return "a plan"
    found = [name for name in config.estimators if order.estimator(name).by_source]
    return f"estimator {found[0]}" if found else ""


def _of_sources(config: OrderConfig, drawn: list[int], names: Sequence[str]) -> list[int]:
    """Return the rows of the sources that the settings name."""
    if config.sources is None:
        return drawn
    known = sorted({names[row] for row in drawn})
    for name in config.sources:
        if name not in known:
            raise UsageError(f"--sources: no usable row has the source {name!r}{did_you_mean(name, known)}")
    return [row for row in drawn if names[row] in config.sources]


def _check_plan(config: OrderConfig, drawn: list[int], names: Sequence[str]) -> None:
    """Refuse a plan without two sources or with fewer batches than sources; name sources that are too small."""
    width, counts = config.training.batch_size, Counter(names[row] for row in drawn)
    large = sorted(name for name, count in counts.items() if count >= width)
    small = sorted(name for name, count in counts.items() if count < width)
    if len(large) < 2:
        why = f"; {', '.join(small[:8])} have fewer rows than a batch of {width}" if small else ""
        one = f"only the source {large[0]!r} has" if large else "no source has"
        raise UsageError(
            f"plan: {one} enough rows for a batch, but an order needs two sources{why}. Use a smaller --batch-size, "
            "name the column of the source (--source-key), or make sources of the rows with --set clusters=4"
        )
    if config.batches < len(large):
        raise UsageError(
            f"plan: --batches {config.batches} is below the number of sources ({len(large)}: {', '.join(large[:8])}"
            f"{', ...' if len(large) > 8 else ''}); every source needs a batch. Use --batches {len(large)} or more, or "
            "fewer --sources"
        )
    if small:
        warn(
            f"plan: leaves out {', '.join(small[:8])}{', ...' if len(small) > 8 else ''}: fewer rows than a batch of "
            f"{width}"
        )
