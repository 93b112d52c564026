"""`scores.parquet` in a report: the distribution of scores and answer lengths, and the position of the chosen rows."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datatools import DataError, files
from pipelines.report import charts
from pipelines.report.charts import Scale
from pipelines.texts import count, number, percent, plural, signed, visible

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
COLUMNS = ("_source", "_tokens", "_supervised", "_status", "_score", "_selected")  # without these there is no report
MAX_SOURCES = 24  # the rest is shown as one line
LENGTH_WARNING = 0.5  # |Spearman| of score and answer length above which the reader is warned


@dataclass(frozen=True)
class Scores:
    """`scores.parquet` as arrays over the n rows of the pool; a null score is NaN."""

    score: Floats
    selected: Flags
    eligible: Flags
    tokens: Ints
    supervised: Ints
    source: Ints  # index into `sources`
    sources: tuple[str, ...]
    status: tuple[tuple[str, int], ...]  # status -> rows, most first
    serves: tuple[tuple[str, int], ...]  # subtask -> number of chosen rows with their highest score on it

    @property
    def scored(self) -> Flags:
        """Eligible rows that have a score."""
        return self.eligible & np.isfinite(self.score)


def read_scores(path: Path) -> Scores:
    """Return the table in a file.

    Args:
        path: The file.

    Raises:
        DataError: The file is missing, damaged or without one of COLUMNS.
    """
    try:
        with pq.ParquetFile(files.checked(path)) as file:
            return _scores_of(file, path)
    except FileNotFoundError:
        raise DataError(f"{path}: not found; a report is drawn from the folder of a finished run") from None
    except (OSError, ValueError, pa.ArrowException) as problem:
        raise DataError(f"{path}: cannot be read ({problem}); run the same command again to write it") from None


def _scores_of(file: Any, path: Path) -> Scores:
    names = file.schema_arrow.names
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise DataError(
            f"{path}: has no column {missing[0]!r}; expected {', '.join(COLUMNS)}; run the same command again"
        )
    table = file.read(columns=list(COLUMNS))

    def numbers(name: str, kind: type[np.generic]) -> Any:
        fill = False if kind is np.bool_ else math.nan if kind is np.float64 else 0
        column = table[name].cast({np.bool_: pa.bool_(), np.float64: pa.float64()}.get(kind, pa.int64()))
        return np.asarray(column.fill_null(fill).to_numpy(zero_copy_only=False), dtype=kind)

    source = table["_source"].cast(pa.string()).fill_null("(none)").combine_chunks().dictionary_encode()
    if isinstance(source, pa.ChunkedArray):
        source = source.combine_chunks()
    status = table["_status"].cast(pa.string()).fill_null("unknown")
    counts = {item["values"]: item["counts"] for item in status.value_counts().to_pylist()}
    selected = numbers("_selected", np.bool_)

    # column by column: 57 subtasks of a large pool need not be in memory at once
    best = np.full(int(selected.sum()), -np.inf)
    where = np.full(len(best), -1)
    subtasks = [name for name in names if name.startswith("subtask:")]
    for i, name in enumerate(subtasks):
        column = file.read(columns=[name])[name].cast(pa.float64()).fill_null(math.nan).to_numpy(zero_copy_only=False)
        higher = np.nan_to_num(column[selected], nan=-np.inf) > best
        best[higher], where[higher] = column[selected][higher], i
    serves = np.bincount(where[where >= 0], minlength=len(subtasks)) if subtasks else np.zeros(0, dtype=np.int64)

    return Scores(
        score=numbers("_score", np.float64),
        selected=selected,
        eligible=np.asarray(status.to_numpy() == "ok", dtype=np.bool_),
        tokens=numbers("_tokens", np.int64),
        supervised=numbers("_supervised", np.int64),
        source=np.asarray(source.indices.to_numpy(zero_copy_only=False), dtype=np.int64),
        sources=tuple(source.dictionary.to_pylist()),
        status=tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        serves=tuple((name.removeprefix("subtask:"), int(n)) for name, n in zip(subtasks, serves, strict=True)),
    )


def length_warning(rho: float | None, matched: str | None = None) -> str | None:
    """Return a warning if scores correlate with answer length; None while |Spearman| is at most LENGTH_WARNING.

    Args:
        rho: The rank correlation of score and answer length.
        matched: The audit's reading of random rows with the same lengths ("better" is the selection); None without
            audit.
    """
    if rho is None or abs(rho) <= LENGTH_WARNING:
        return None
    advice = {
        None: "Audit it against random rows of the same lengths before trusting it.",
        "better": "Random rows of the same lengths did worse in the audit, so length does not explain everything.",
    }
    otherwise = "Random rows of the same lengths did not do clearly worse in the audit: length may explain everything."
    kind = "short" if rho < 0 else "long"
    return (
        f"Scores correlate with answer length (Spearman {signed(rho, 2)}): chosen rows tend to have {kind} answers. "
        f"{advice.get(matched, otherwise)}"
    )


def _score_range(values: Floats) -> tuple[float, float]:
    """Return the range to draw: all scores, unless a few outliers, drawn in the outer columns, would compress it."""
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = (float(v) for v in np.quantile(values, (0.002, 0.998)))
    inner = inner_high - inner_low
    if inner > 0 and high - low > 3 * inner:
        low, high = max(low, inner_low - inner / 2), min(high, inner_high + inner / 2)
    return low, high


def distribution(scores: Scores) -> dict[str, Any] | None:
    """Return the histogram of the scores, and a box per source; None if rows have no scores or equal ones.

    Args:
        scores: The scores.
    """
    scored = scores.scored
    values = scores.score[scored]
    chosen = scores.selected[scored]
    if len(values) < 2 or not float(values.max()) > float(values.min()):
        return None
    cut, passed = None, 0
    if chosen.any():
        cut = float(values[chosen].min())
        passed = int((values[~chosen] > cut).sum())
        # a line would mislead if as many better rows were left out as taken (random draws, round robin)
        if passed > int(chosen.sum()):
            cut = None
    low, high = _score_range(values)
    bins = int(np.clip(math.sqrt(len(values)), 12, 64))
    if cut is None or not low < cut <= high:
        edges: Floats = np.linspace(low, high, bins + 1)
    else:  # the cut-off must be the edge of a column, so that all chosen rows are on one side
        step = (high - low) / bins
        columns = np.arange(-math.ceil((cut - low) / step), max(1, math.ceil((high - cut) / step)) + 1)
        edges = np.asarray(cut + step * columns, dtype=np.float64)
    inside = np.clip(values, edges[0], edges[-1])
    rest, picked = (np.histogram(inside[which], edges)[0] for which in (~chosen, chosen))
    scale = Scale(float(edges[0]), float(edges[-1]))
    bars, counts = charts.histogram(
        edges.tolist(),
        rest.tolist(),
        picked.tolist(),
        cut=cut,
        label=f"Histogram of the scores of {plural(len(values), 'eligible row')}, {count(int(chosen.sum()))} chosen",
    )
    least, middle, most = (number(float(v)) for v in (values.min(), np.median(values), values.max()))
    lead = f"{plural(len(values), 'eligible row')} score from {least} to {most}, with median {middle}."
    if cut is not None:
        lead += f" The chosen rows begin at {number(cut)}."
        if passed:
            lead += (
                f" {plural(passed, 'row')} above that line {'was' if passed == 1 else 'were'} skipped (limits per "
                "source, or a rule other than the score alone)."
            )
    return {
        "chart": bars,
        "counts": counts,
        "ticks": charts.ticks(scale, 8),
        "lead": lead,
        "cut": None if cut is None else {"at": scale.percent(cut), "text": number(cut), "left": scale(cut) > 550},
        "clipped": int(((values < edges[0]) | (values > edges[-1])).sum()),
        "sources": _boxes(scores, scored, scale, cut),
        "negative": percent(float((values < 0).mean())) if values.min() < 0 else None,
    }


def _boxes(scores: Scores, scored: Flags, scale: Scale, cut: float | None) -> list[dict[str, Any]]:
    """Return one box per source, the best median first; small sources beyond MAX_SOURCES are combined."""
    code, value, chosen = scores.source[scored], scores.score[scored], scores.selected[scored]
    sizes = np.bincount(code, minlength=len(scores.sources))
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    if len(order) < 2:
        return []
    own = order if len(order) <= MAX_SOURCES else order[: MAX_SOURCES - 1]
    group = np.full(len(scores.sources), len(own))
    group[own] = np.arange(len(own))
    names = [scores.sources[i] for i in own]
    if len(own) < len(order):
        names.append(f"{len(order) - len(own)} smaller sources")
    which = group[code]
    sorting = np.argsort(which, kind="stable")
    ends = np.cumsum(np.bincount(which, minlength=len(names)))
    rows = []
    for name, start, end in zip(names, [0, *ends[:-1]], ends, strict=True):
        index = sorting[start:end]
        p5, q1, q2, q3, p95 = (float(v) for v in np.quantile(value[index], (0.05, 0.25, 0.5, 0.75, 0.95)))
        took = int(chosen[index].sum())
        words = f"{visible(name)}: median {number(q2)}, half of the rows between {number(q1)} and {number(q3)}"
        drawing = charts.box(scale, (p5, q1, q2, q3, p95), cut=cut, label=words)
        rows.append(
            {
                "name": name,
                "chart": drawing,
                "median": q2,
                "chosen": took,
                "of": len(index),
                "share": percent(took / len(index), 0),
            }
        )
    return sorted(rows, key=lambda row: -row["median"])


def _length_bins(longest: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12, 16, 24 ...: half octaves at whole numbers, to just beyond `longest`."""
    edges = [0, 1, 2, 3]
    while edges[-1] <= longest:
        edges.append(2 * edges[-2])
    return edges


def lengths(scores: Scores, rho: float | None) -> dict[str, Any] | None:
    """Return the answer lengths of pool and chosen rows.

    Args:
        scores: The scores.
        rho: The rank correlation of score and length.
    """
    pool, picked = (scores.supervised[which] for which in (scores.eligible, scores.eligible & scores.selected))
    if not len(pool) or not len(picked) or not pool.max():
        return None
    edges = _length_bins(int(pool.max()))
    a, b = (np.histogram(values, edges)[0] / len(values) for values in (pool, picked))
    some = np.flatnonzero(a + b)
    first, last = int(some[0]), int(some[-1])
    names = [
        str(edges[i]) if edges[i + 1] - edges[i] == 1 else f"{edges[i]} to {edges[i + 1] - 1}"
        for i in range(first, last + 1)
    ]
    slots = last + 1 - first
    ticks = [
        charts.Tick(f"{100 * (i + 0.5) / slots:.2f}%", str(edges[first + i]), minor=i % 2 == 1) for i in range(slots)
    ]
    middle, chosen_middle = float(np.median(pool)), float(np.median(picked))
    lead = (
        f"Half of the chosen answers have at most {count(chosen_middle)} supervised tokens; in the pool, the median is "
        f"{count(middle)}."
    )
    strong = abs(rho or 0.0)
    words = ((LENGTH_WARNING, "strong"), (0.3, "moderate"), (0.1, "weak"), (-1.0, "negligible"))
    return {
        "chart": charts.pairs(
            names,
            a[first : last + 1].tolist(),
            b[first : last + 1].tolist(),
            label="Supervised tokens per row, pool and chosen rows",
        ),
        "ticks": ticks,
        "lead": lead,
        "rho": signed(rho, 2) if rho is not None else None,
        "at": Scale(-1, 1).percent(rho) if rho is not None else None,
        "strength": next(word for least, word in words if strong > least),
        "warn": length_warning(rho) is not None,
    }
