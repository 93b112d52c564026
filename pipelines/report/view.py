"""What a report says: a run's `summary.json` and `scores.parquet` turned into the words and charts of each section.

No text is escaped here (but inside charts); the template and the terminal do that to everything they print. Parts that
a method does not have come out as None. Every field of the summary may be absent or null.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datatools import DataError, files, spearman
from pipelines.report import charts
from pipelines.report.charts import Scale
from pipelines.texts import count, duration, number, percent, plural, signed, size, visible

Json = Mapping[str, Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

COLUMNS = ("_source", "_tokens", "_supervised", "_status", "_score", "_selected")  # without these there is no report
MAX_SOURCES = 24  # the rest is shown as one line
MAX_SUBTASKS = 60
LENGTH_WARNING = 0.5  # |Spearman| of score and answer length from which the reader is warned
SEEN_WARNING = 0.95
FEWEST_RUNS = 3
"""Pairs of runs of equal seed from which an interval over seeds may call an arm better or worse."""

# method -> (its name, what one score means). Signs as in LESS: higher is better, and rank 1 is the highest.
METHODS = {
    "less": (
        "LESS",
        "The score is a cosine between the update that a row would cause and the gradient of the target rows, averaged "
        "over the checkpoints by their weight and, in its best subtask, over the target rows. Above zero: to first "
        "order, training on the row lowers the loss on the target; below zero: it raises it.",
    ),
    "random": (
        "Random rows",
        "Rows drawn at random, every one with the same chance: the baseline that a method has to beat.",
    ),
    "random-length": (
        "Length-matched random rows",
        "Rows drawn at random so that their answers are as long as those of the target: what choosing by length alone "
        "would bring.",
    ),
    "tfidf": (
        "Text similarity (TF-IDF)",
        "The score is a cosine between word counts (TF-IDF) of the row and of the target rows: how alike the texts "
        "are; no model takes part.",
    ),
    "rds": (
        "Hidden-state similarity (RDS)",
        "The score is a cosine between the model's hidden states on the row and on the target rows: how alike the "
        "model finds them; no gradient takes part.",
    ),
    "loss": (
        "Model loss",
        "The score is the model's own mean loss on the row's answer: the rows that it finds hardest come first; the "
        "target rows take no part.",
    ),
}
LABELS = {
    "selected": "this selection",
    "random": "random",
    "random-length": "random, same lengths",
    "tfidf": "text similarity",
    "bm25": "BM25",
    "rds": "hidden states (RDS)",
    "loss": "model loss",
    "full": "whole pool, 1 epoch",
    "untrained": "no training",
}
WITH = {
    "random": "random rows",
    "random-length": "random rows of the same lengths",
    "tfidf": "rows picked by text similarity",
    "rds": "rows picked by hidden states",
    "bm25": "rows picked by BM25",
}
BASE_ARM = "untrained"  # the model before any training: a landmark, not a rival
RANDOM_ARMS = ("random", "random-length")
SIMILARITY_ARMS = ("tfidf", "bm25", "rds", "embedding")
UNAUDITED = "nothing here shows yet that these rows beat random ones"
STATUS = {
    "ok": "eligible",
    "duplicate": "copy of another row",
    "empty": "gradient is zero",
    "nonfinite": "loss or gradient not finite",
    "bad": "unusable",
    "too_long": "too long",
    "no_supervised_token": "no answer token left to learn from",
}


# ------------------------------------------------------------------------------------------------------------ the audit


@dataclass(frozen=True)
class Arm:
    """One arm of the audit beside this selection. Losses: lower is better; `delta` = its mean minus the selection's."""

    name: str
    label: str
    chosen: bool
    mean: float | None
    low: float | None
    high: float | None
    n: int
    delta: float | None
    reading: str  # "better" (the selection is), "worse", "unclear", "" for the selection itself and the untrained model
    runs: tuple[float, ...]

    @property
    def text(self) -> str:
        """The mean."""
        return "–" if self.mean is None else f"{self.mean:.4f}"

    @property
    def between(self) -> str:
        """The interval, if there is one."""
        return "" if self.low is None or self.high is None else f"{self.low:.4f} to {self.high:.4f}"

    @property
    def difference(self) -> str:
        """`delta`, but for the selection itself."""
        return "" if self.chosen else signed(self.delta)

    @property
    def few(self) -> bool:
        """Whether it has too few runs for a verdict."""
        return self.n < FEWEST_RUNS

    @property
    def word(self) -> str:
        """What the reading means."""
        few = "one run" if self.n < 2 else f"{self.n} runs" if self.few else "unclear"
        return {"unclear": few}.get(self.reading, self.reading)


def arms(audit: Json, method: str) -> list[Arm]:
    """The audit's table, the selection first, each other arm read against it.

    The selection beats an arm when the 95 % interval of the difference excludes zero: over at least three seeds that
    both ran, by Student's t. Without single runs (of both, at least three) the two stated intervals must lie apart;
    else the case is unclear.
    """
    table = listing(audit.get("table"))
    runs: dict[str, dict[Any, float]] = {}
    for row in listing(audit.get("rows")):
        loss = finite(row.get("loss"))
        if loss is not None:
            runs.setdefault(str(row.get("arm")), {})[row.get("seed")] = loss
    names = [str(row.get("arm")) for row in table]
    ours = next((name for name in ("selected", method) if name in names), None)
    us = table[names.index(ours)] if ours is not None else {}
    our_runs = runs.get(ours, {}) if ours is not None else {}
    our_mean, *our_interval = (finite(us.get(key)) for key in ("mean", "low", "high"))
    result = []
    for row, name in zip(table, names, strict=True):
        mean, low, high = (finite(row.get(key)) for key in ("mean", "low", "high"))
        losses = runs.get(name, {})
        paired = [loss - our_runs[seed] for seed, loss in losses.items() if seed in our_runs]
        result.append(
            Arm(
                name=name,
                label=LABELS["selected"] if name == ours else LABELS.get(name, name),
                chosen=name == ours,
                mean=mean,
                low=low,
                high=high,
                n=_runs(row, losses),
                delta=finite(row.get("delta_vs_selected")) if mean is None or our_mean is None else mean - our_mean,
                reading=""
                if name in (ours, BASE_ARM)
                else _reading(paired, (low, high), our_interval, runs=min(_runs(row, losses), _runs(us, our_runs))),
                runs=tuple(losses.values()),
            )
        )
    return sorted(result, key=lambda arm: (not arm.chosen, math.inf if arm.mean is None else arm.mean))


def _runs(row: Json, losses: Mapping[Any, float]) -> int:
    return int(finite(row.get("n")) or len(losses))


def _reading(
    paired: Sequence[float], theirs: Sequence[float | None], ours: Sequence[float | None], *, runs: int
) -> str:
    if len(paired) >= FEWEST_RUNS:
        from datatools import t_interval

        _, least, most = t_interval(list(paired))
        if least is not None and most is not None:
            return "better" if least > 0 else "worse" if most < 0 else "unclear"
    (low, high), (our_low, our_high) = theirs, ours
    if paired or runs < FEWEST_RUNS or low is None or high is None or our_low is None or our_high is None:
        return "unclear"
    return "better" if our_high < low else "worse" if our_low > high else "unclear"


def verdict(table: Sequence[Arm], audit: Json) -> tuple[str, str]:
    """(state, sentence): did the selection beat random choice, and text similarity? The audit's own sentence wins.

    state: "good" (beats every random arm), "bad" (worse than one), "unclear" (neither), "none" (nothing to beat).
    """
    random, similar = _named(table, RANDOM_ARMS), _named(table, SIMILARITY_ARMS)
    said = str(audit.get("verdict") or "")
    if not random and not similar:
        return "none", said
    readings = {arm.reading for arm in random or similar}
    state = "bad" if "worse" in readings else "good" if readings == {"better"} else "unclear"
    return state, said or _compared([*random, *similar])


def _named(table: Sequence[Arm], names: Sequence[str]) -> list[Arm]:
    return sorted((arm for arm in table if arm.name in names and not arm.chosen), key=lambda arm: names.index(arm.name))


def _compared(table: Sequence[Arm]) -> str:
    """'Held-out loss is 0.0503 lower than with random rows; there is no clear difference from ... (0.0057 lower).'"""
    clear, unclear = [], []
    for arm in table:
        by = "" if arm.delta is None else f"{abs(arm.delta):.4f} {'lower' if arm.delta >= 0 else 'higher'}"
        with_ = WITH.get(arm.name, arm.label)
        if arm.reading == "unclear":
            unclear.append(f"{with_} ({by})" if by else with_)
        else:
            clear.append(f"{by or ('lower' if arm.reading == 'better' else 'higher')} than with {with_}")
    parts = []
    if clear:
        parts.append("held-out loss is " + ", ".join(clear))
    if unclear:
        parts.append("there is no clear difference from " + ", ".join(unclear))
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Scores:
    """`scores.parquet` as arrays over the n rows of the pool; a score that is null is NaN."""

    score: Floats
    selected: Flags
    eligible: Flags
    tokens: Ints
    supervised: Ints
    source: Ints  # index into `sources`
    sources: tuple[str, ...]
    status: tuple[tuple[str, int], ...]  # status -> rows, most first
    serves: tuple[tuple[str, int], ...]  # subtask -> chosen rows that score highest on it

    @property
    def scored(self) -> Flags:
        """Eligible rows that have a score."""
        return self.eligible & np.isfinite(self.score)


def read_summary(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises: DataError."""
    value = files.read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}; run the same command again")
    return value


def read_scores(path: Path) -> Scores:
    """The table in `path`. Raises: DataError if it is missing, damaged or without one of COLUMNS."""
    try:
        with pq.ParquetFile(files.checked(path)) as file:
            return _scores_of(file, path)
    except FileNotFoundError:
        raise DataError(f"{path}: not found; a report is drawn from the folder of a finished run") from None
    except (OSError, ValueError, pa.ArrowException) as problem:
        raise DataError(f"{path}: cannot be read ({problem}); run the same command again to write it anew") from None


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


# ------------------------------------------------------------------------------------------------------------- sections


def finite(value: object) -> float | None:
    """A number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: object) -> Json:
    """A JSON object, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def listing(value: object) -> list[Json]:
    """The objects of a JSON array, or none."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def share_of(part: float | None, whole: float | None) -> float | None:
    """part / whole, where both are known."""
    return part / whole if part is not None and whole else None


def method_of(summary: Json) -> tuple[str, str]:
    """(name, what one score means)."""
    name = str(summary.get("method") or "")
    return METHODS.get(name, (name or "unnamed method", ""))


def warnings_of(summary: Json, rho: float | None) -> list[str]:
    """The run's own warnings, then those that follow from the numbers; each once."""
    found = [str(item) for item in summary.get("warnings") or []]
    seen = finite(mapping(summary.get("model")).get("seen_share"))
    if seen is not None and seen < SEEN_WARNING and not any("parameters" in item for item in found):
        found.append(f"The scores see only {percent(seen)} of the trainable parameters; the rest had no say.")
    table = arms(mapping(summary.get("audit")), str(summary.get("method")))
    matched = next((arm.reading for arm in table if arm.name == "random-length" and not arm.chosen), None)
    if (text := length_warning(rho, matched)) is not None:
        found.append(text)
    return list(dict.fromkeys(found))


def length_warning(rho: float | None, matched: str | None = None) -> str | None:
    """What to say when scores go with answer length; None while |Spearman| is at most LENGTH_WARNING.

    matched: how the audit reads random rows of the same lengths ("better" is the selection), None without an audit.
    """
    if rho is None or abs(rho) <= LENGTH_WARNING:
        return None
    advice = {
        None: "Audit it against random rows of the same lengths before trusting it.",
        "better": "Random rows of the same lengths did worse in the audit, so length is not all of it.",
    }
    otherwise = (
        "Random rows of the same lengths did not do clearly worse in the audit: length may be all there is to it."
    )
    kind = "short" if rho < 0 else "long"
    return (
        f"Scores go with answer length (Spearman {signed(rho, 2)}): chosen rows tend to have {kind} answers. "
        f"{advice.get(matched, otherwise)}"
    )


def _date(iso: str) -> str:
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = " UTC" if when.tzinfo is not None and not when.utcoffset() else ""
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def _chosen(summary: Json, scores: Scores) -> dict[str, Any]:
    pool, budget = mapping(summary.get("pool")), mapping(summary.get("budget"))
    rows, of = int(scores.selected.sum()), finite(pool.get("rows")) or len(scores.selected)
    tokens = int(scores.tokens[scores.selected].sum())
    all_tokens = finite(pool.get("tokens")) or int(scores.tokens.sum())
    share = share_of(rows, of)
    return {
        "rows": rows,
        "of": int(of),
        "share": share,
        "width": f"{max(0.4, 100 * (share or 0)):.2f}%",
        "tokens": tokens,
        "token_share": share_of(tokens, all_tokens),
        "asked": budget.get("asked"),
    }


def _trust(summary: Json, table: Sequence[Arm]) -> dict[str, str]:
    """The shortest honest answer to: may I believe this?"""
    if not table:
        if str(summary.get("method")) in RANDOM_ARMS:
            return {"state": "none", "big": "A baseline", "text": "Not audited: made to be compared with."}
        return {"state": "none", "big": "Not audited", "text": f"{UNAUDITED[0].upper()}{UNAUDITED[1:]}."}
    if leak(mapping(summary.get("audit"))):
        return {"state": "bad", "big": "Test rows leaked", "text": "They were in the pool or the target."}
    state, _ = verdict(table, {})
    random, similar = _named(table, RANDOM_ARMS), _named(table, SIMILARITY_ARMS)
    against = "random choice" if random else "text similarity"
    big = {
        "good": f"Beats {against}",
        "bad": f"Worse than {against}",
        "unclear": f"Not clearly better than {against}",
        "none": "Audited",
    }[state]
    rivals = random or similar
    if state == "unclear" and rivals and max(arm.n for arm in rivals) < FEWEST_RUNS:
        big = f"Too few runs to compare with {against}"
    words = {"better": "Better than", "worse": "Worse than", "unclear": "No clear difference from"}
    text = " ".join(f"{words[arm.reading]} {arm.label}." for arm in similar) if random else ""
    fewest = min((arm.n for arm in table if arm.name not in (BASE_ARM, "full")), default=1)
    return {"state": state, "big": big, "text": f"{text} {plural(fewest, 'run')} an arm.".strip()}


def leak(audit: Json) -> str | None:
    """Where test rows were seen before, in a sentence; None if nowhere."""
    said = audit.get("leaked")
    return f"Leaked: {said}. The losses below prove nothing." if said else None


def _audit(summary: Json, table: Sequence[Arm]) -> dict[str, Any] | None:
    if not table:
        return None
    audit = mapping(summary.get("audit"))
    rivals = [arm for arm in table if arm.name != BASE_ARM] or table
    values = [value for arm in rivals for value in (arm.mean, arm.low, arm.high, *arm.runs) if value is not None]
    if not values:
        return None
    low, high = min(values), max(values)
    landmarks = [arm.mean for arm in table if arm.name == BASE_ARM and arm.mean is not None]
    if all(low - (high - low) <= mean <= high + (high - low) for mean in landmarks):
        low, high = min([low, *landmarks]), max([high, *landmarks])  # else it would squeeze what matters: not drawn
    room = (high - low) * 0.06 or abs(low) * 0.01 or 1.0
    scale = Scale(low - room, high + room)
    guide = next((arm.mean for arm in table if arm.chosen), None)
    words = {"better": "selection better", "worse": "selection worse", "unclear": "no clear difference", "": ""}
    rows = []
    for arm in table:
        off = arm.mean is not None and not scale.low <= arm.mean <= scale.high
        rows.append(
            {
                "arm": arm,
                "word": f"{plural(arm.n, 'run')} only" if arm.few and arm.reading == "unclear" else words[arm.reading],
                "off": "beyond the scale" if off else "",
                "chart": ""
                if off
                else charts.interval(
                    scale,
                    arm.mean,
                    (arm.low, arm.high),
                    arm.runs,
                    guide=guide,
                    chosen=arm.chosen,
                    label=f"{visible(arm.label)}: {arm.text}",
                ),
            }
        )
    state, sentence = verdict(table, audit)
    return {
        "metric": str(audit.get("metric") or "held-out loss"),
        "state": state,
        "leak": leak(audit),
        "sentence": sentence,
        "rows": rows,
        "ticks": charts.ticks(scale, 6),
        "paired": any(len(arm.runs) >= FEWEST_RUNS for arm in rivals),
    }


def stages(items: Sequence[Json]) -> list[dict[str, Any]]:
    """Stages with their seconds as bars one after the other; those of one name are one."""
    seconds: dict[str, float] = {}
    for item in items:
        name = str(item.get("name"))
        seconds[name] = seconds.get(name, 0.0) + max(0.0, finite(item.get("seconds")) or 0.0)
    total, start, bars = sum(seconds.values()), 0.0, []
    for name, took in seconds.items():
        width = 100 * took / total if total else 0.0
        bars.append(
            {
                "name": name,
                "seconds": took,
                "time": duration(took),
                "left": f"{min(start, 99.6):.2f}%",
                "width": f"{max(0.4, width):.2f}%",
                "share": percent(share_of(took, total), 0),
            }
        )
        start += width
    return bars


def audit_page(audit: Json) -> dict[str, Any]:
    """Everything that the page of an audit prints."""
    table = arms(audit, "selected")
    return {
        "title": "Does training on the selection help?",
        "trust": _trust({"audit": audit}, table),
        "audit": _audit({"audit": audit}, table),
        "test_rows": finite(audit.get("test_rows")),
        "test_tokens": finite(audit.get("test_tokens")),
        "recipe": [(str(name), str(value)) for name, value in mapping(audit.get("recipe")).items()],
        "selection": str(audit.get("selection") or ""),
    }


def cost_section(summary: Json) -> dict[str, Any] | None:
    """Estimate beside measurement, and how long each stage took; None if nothing is known."""
    cost = mapping(summary.get("cost"))
    before, after = mapping(cost.get("before")), mapping(cost.get("after"))
    kinds = (
        ("Time", "seconds", duration),
        ("Disk", "bytes", size),
        ("Rows", "rows", count),
        ("Tokens", "tokens", count),
    )
    lines = []
    for label, key, text in kinds:
        a, b = finite(before.get(key)), finite(after.get(key))
        if a is not None or b is not None:
            ratio = b / a if a and b is not None else None
            lines.append((label, text(a), text(b), _times(ratio)))
    peak = finite(after.get("peak_rss_bytes"))
    if peak is not None:
        lines.append(("Peak memory", "–", size(peak), ""))
    bars = stages(listing(cost.get("stages")))
    if not lines and not bars:
        return None
    took, guess = finite(after.get("seconds")), finite(before.get("seconds"))
    total = sum(bar["seconds"] for bar in bars)
    longest = max(bars, key=lambda bar: bar["seconds"]) if total else None
    lead = ""
    if took is not None:
        lead = f"It took {duration(took)}" + (f" where {duration(guess)} were estimated" if guess else "") + ". "
    if longest is not None:
        lead += f"The longest stage, {longest['name']}, was {longest['share']} of the time."
    return {
        "lines": lines,
        "stages": bars,
        "lead": lead,
        "took": took,
        "guess": guess,
        "bytes": finite(after.get("bytes")),
        "peak": peak,
    }


def _score_range(values: Floats) -> tuple[float, float]:
    """The range to draw: all, unless a few far rows would squeeze the rest; those then stand in the outer columns."""
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = (float(v) for v in np.quantile(values, (0.002, 0.998)))
    inner = inner_high - inner_low
    if inner > 0 and high - low > 3 * inner:
        low, high = max(low, inner_low - inner / 2), min(high, inner_high + inner / 2)
    return low, high


def _distribution(scores: Scores) -> dict[str, Any] | None:
    scored = scores.scored
    values = scores.score[scored]
    chosen = scores.selected[scored]
    if len(values) < 2 or not float(values.max()) > float(values.min()):
        return None
    cut, passed = None, 0
    if chosen.any():
        cut = float(values[chosen].min())
        passed = int((values[~chosen] > cut).sum())
        # a line where as many better rows were left out as taken would tell a false story (random draws, round robin)
        if passed > int(chosen.sum()):
            cut = None
    low, high = _score_range(values)
    bins = int(np.clip(math.sqrt(len(values)), 12, 64))
    if cut is None or not low < cut <= high:
        edges: Floats = np.linspace(low, high, bins + 1)
    else:  # the cut-off is the edge of a column, or its column would show chosen rows on the wrong side
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
    lead = f"{plural(len(values), 'eligible row')} score from {least} to {most}, in the middle {middle}."
    if cut is not None:
        lead += f" The chosen ones begin at {number(cut)}."
        if passed:
            lead += (
                f" {plural(passed, 'row')} above that line {'was' if passed == 1 else 'were'} passed over (limits per "
                "source, or another rule than the score alone)."
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
    """One box a source, the best median first; small sources beyond MAX_SOURCES are drawn together."""
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
    """1, 2, 3, 4, 6, 8, 12, 16, 24 ...: half octaves at whole numbers, to just beyond `longest`."""
    edges = [0, 1, 2, 3]
    while edges[-1] <= longest:
        edges.append(2 * edges[-2])
    return edges


def _lengths(scores: Scores, rho: float | None) -> dict[str, Any] | None:
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
        f"Half of the chosen answers have at most {count(chosen_middle)} supervised tokens; in the pool it is "
        f"{count(middle)}."
    )
    strong = abs(rho or 0.0)
    words = ((LENGTH_WARNING, "strong"), (0.3, "moderate"), (0.1, "weak"), (-1.0, "next to none"))
    return {
        "chart": charts.pairs(
            names,
            a[first : last + 1].tolist(),
            b[first : last + 1].tolist(),
            label="Supervised tokens a row, pool and chosen rows",
        ),
        "ticks": ticks,
        "lead": lead,
        "rho": signed(rho, 2) if rho is not None else None,
        "at": Scale(-1, 1).percent(rho) if rho is not None else None,
        "strength": next(word for least, word in words if strong > least),
        "warn": length_warning(rho) is not None,
    }


def _times(lift: float | None) -> str:
    """×13, ×6.7, ×0.15: how many times its share of the pool a source has in the selection."""
    if lift is None:
        return ""
    return f"×{lift:.0f}" if lift >= 9.95 else f"×{lift:.1f}" if lift >= 0.995 else f"×{lift:.2f}"


def sources_section(summary: Json, most: int = MAX_SOURCES) -> dict[str, Any] | None:
    """Sources before and after, the most chosen first; beyond `most` lines the rest is one line."""
    rows: list[dict[str, Any]] = []
    for item in listing(summary.get("sources")):
        pool, chosen = finite(item.get("pool_rows")) or 0.0, finite(item.get("selected_rows")) or 0.0
        rows.append({"name": str(item.get("source")), "pool": pool, "chosen": chosen})
    rows = [row for row in rows if row["pool"] or row["chosen"]]
    if not rows:
        return None
    all_pool, all_chosen = sum(row["pool"] for row in rows) or 1.0, sum(row["chosen"] for row in rows) or 1.0
    rows.sort(key=lambda row: (-row["chosen"], -row["pool"], row["name"]))
    if len(rows) > most:
        tail, rows = rows[most - 1 :], rows[: most - 1]
        rows.append(
            {
                "name": f"{len(tail)} more sources",
                "pool": sum(row["pool"] for row in tail),
                "chosen": sum(row["chosen"] for row in tail),
            }
        )
    widest = max(max(row["pool"] / all_pool, row["chosen"] / all_chosen) for row in rows)
    lines = []
    for row in rows:
        a, b = row["pool"] / all_pool, row["chosen"] / all_chosen
        lift = b / a if a else None
        side = "" if lift is None else "over" if lift > 1.25 else "under" if lift < 0.8 else "even"
        lines.append(
            {
                "name": row["name"],
                "pool": count(row["pool"]),
                "chosen": count(row["chosen"]),
                "pool_share": percent(a),
                "chosen_share": percent(b),
                "side": side,
                "a": f"{100 * a / widest:.2f}%",
                "b": f"{100 * b / widest:.2f}%",
                "lift_text": _times(lift) if row["chosen"] else "none chosen",
            }
        )
    return {"rows": lines, "lead": _shift(rows, all_pool, all_chosen)}


def _shift(rows: Sequence[Mapping[str, Any]], all_pool: float, all_chosen: float) -> str:
    """In words: which source gained most, which lost most, how many got nothing."""
    lifts = [(row["chosen"] / all_chosen / (row["pool"] / all_pool), row) for row in rows if row["pool"]]
    if len(lifts) < 2:
        return ""
    (most, gained), (least, lost) = max(lifts, key=lambda x: x[0]), min(lifts, key=lambda x: (x[0], -x[1]["pool"]))
    if most > 1.25:
        text = f"{gained['name']} has {_times(most)[1:]} times the share that it has in the pool"
        text += f", {lost['name']} {_times(least)[1:]} times." if lost["chosen"] else "."
    else:
        text = "The sources keep about the shares that they have in the pool."
    none = sum(1 for row in rows if not row["chosen"])
    return text + (f" {plural(none, 'source has', 'sources have')} no chosen row." if none else "")


def examples_of(items: object) -> list[dict[str, Any]]:
    """Rows beside their nearest target row, every field a string."""
    result = []
    for item in listing(items):
        near = mapping(item.get("nearest"))
        result.append(
            {
                "rank": count(finite(item.get("rank"))),
                "score": number(finite(item.get("score"))),
                "source": str(item.get("source") or ""),
                "id": str(item.get("id") or ""),
                "where": str(item.get("where") or ""),
                "prompt": str(item.get("prompt") or ""),
                "answer": str(item.get("answer") or ""),
                "nearest": {
                    "id": str(near.get("id") or ""),
                    "similarity": number(finite(near.get("similarity"))),
                    "prompt": str(near.get("prompt") or ""),
                    "answer": str(near.get("answer") or ""),
                }
                if near
                else None,
            }
        )
    return result


def _target(summary: Json, scores: Scores) -> dict[str, Any] | None:
    target = mapping(summary.get("target"))
    serves = dict(scores.serves)
    names = {*serves, *(str(item.get("name")) for item in listing(target.get("subtasks")))}
    if not names or not sum(serves.values()):
        return None
    top = max(serves.values())
    rows: list[dict[str, Any]] = [
        {"name": name, "chosen": serves.get(name, 0), "width": f"{100 * serves.get(name, 0) / top:.2f}%"}
        for name in sorted(names, key=lambda name: (-serves.get(name, 0), name))
    ]
    unserved = [row["name"] for row in rows if not row["chosen"]]
    served = [row for row in rows if row["chosen"]]
    if len(rows) == 1:
        lead = f"The target is one task, {rows[0]['name']}; all chosen rows serve it."
    elif unserved:
        are = "is" if len(unserved) == 1 else "are"
        lead = f"{len(unserved)} of the {len(rows)} subtasks {are} served by no chosen row."
    else:
        most, least = rows[0], rows[-1]
        lead = (
            f"Each of the {len(rows)} subtasks has rows chosen for it: most {most['name']} ({count(most['chosen'])}), "
            f"fewest {least['name']} ({count(least['chosen'])})."
        )
    return {
        "rows": served[:MAX_SUBTASKS],
        "more": len(served[MAX_SUBTASKS:]),
        "unserved": unserved,
        "lead": lead,
        "subtasks": len(rows),
        "total": finite(target.get("rows")),
    }


def _quality(summary: Json, scores: Scores) -> dict[str, Any]:
    pool = mapping(summary.get("pool"))
    bad = [
        (str(item.get("reason")), finite(item.get("count")) or 0.0, str(item.get("example") or ""))
        for item in listing(pool.get("bad"))
    ]
    duplicates, cut_rows, cut_tokens = (
        finite(pool.get(key)) or 0.0 for key in ("duplicates", "cut_rows", "cut_tokens")
    )
    unread = sum(n for _, n, _ in bad)
    left_out = [(STATUS.get(name, name), n) for name, n in scores.status if name != "ok"]
    parts = []
    if unread:
        parts.append(f"{plural(unread, 'row')} could not be used as {'it was' if unread == 1 else 'they were'}")
    if duplicates:
        parts.append(f"{plural(duplicates, 'row')} {'repeats' if duplicates == 1 else 'repeat'} another")
    if cut_rows:
        parts.append(f"{plural(cut_rows, 'row')} lost {plural(cut_tokens, 'token')} to the length limit")
    lead = "; ".join(parts) + "." if parts else "No row was unreadable, none repeated another, and none was cut."
    total = len(scores.selected)
    steps = [("rows read", total), ("eligible", int(scores.eligible.sum())), ("chosen", int(scores.selected.sum()))]
    return {
        "lead": lead,
        "bad": sorted(bad, key=lambda item: (-item[1], item[0])),
        "left_out": left_out,
        "steps": [{"name": name, "rows": n, "width": f"{max(0.4, 100 * n / max(1, total)):.2f}%"} for name, n in steps],
    }


def _provenance(summary: Json) -> dict[str, Any]:
    found = [
        {
            "role": role,
            "path": str(item.get("path")),
            "rows": count(finite(item.get("rows"))),
            "bytes": size(finite(item.get("bytes"))),
            "digest": str(item.get("digest") or ""),
        }
        for role in ("pool", "target")
        for item in listing(mapping(summary.get(role)).get("files"))
    ]
    weights = [finite(item.get("weight")) for item in listing(summary.get("checkpoints"))]
    total = sum(weight for weight in weights if weight is not None and weight > 0)
    checkpoints = [
        {
            "path": str(item.get("path")),
            "step": count(finite(item.get("step"))),
            "lr": number(finite(item.get("mean_lr"))),
            "weight": percent(share_of(weight, total)),
        }
        for item, weight in zip(listing(summary.get("checkpoints")), weights, strict=True)
    ]
    seeds, versions = (
        [(str(key), str(value)) for key, value in mapping(summary.get(name)).items()] for name in ("seeds", "versions")
    )
    verb = re.match(r"datatools ([a-z][a-z-]*)( |$)", str(summary.get("command") or ""))
    return {
        "files": found,
        "checkpoints": checkpoints,
        "seeds": seeds,
        "versions": versions,
        "command": str(summary.get("command") or ""),
        "repeat": f"datatools {verb[1] if verb else 'select'} DIR/run.yaml",
    }


def model_section(summary: Json) -> dict[str, Any] | None:
    """The model and the share of its trainable parameters that the scores see; None if no model took part."""
    model = mapping(summary.get("model"))
    if not model.get("name"):
        return None
    name, seen = str(model["name"]), finite(model.get("seen_share"))
    return {
        "name": name.rstrip("/").rpartition("/")[2] if name.startswith(("/", "./", "../", "~")) else name,
        "parameters": finite(model.get("parameters")),
        "trainable": finite(model.get("trainable")),
        "seen": seen,
        "low": seen is not None and seen < SEEN_WARNING,
        "unseen": [str(name) for name in model.get("unseen") or []],
    }


def build(summary: Json, scores: Scores) -> dict[str, Any]:
    """Everything that the template prints."""
    scored = scores.scored
    rho = None
    if scored.sum() > 2:
        rho = spearman(scores.score[scored], scores.supervised[scored].astype(np.float64))
    method, meaning = method_of(summary)
    formula = mapping(summary.get("formula"))
    table = arms(mapping(summary.get("audit")), str(summary.get("method")))
    best, worst = examples_of(summary.get("best")), examples_of(summary.get("worst"))
    view: dict[str, Any] = {
        "title": str(summary.get("title") or "Selection"),
        "created": _date(str(summary.get("created") or "")),
        "method": method,
        "meaning": meaning or str(formula.get("text") or ""),
        "formula": {
            "name": str(formula.get("name") or "") if formula.get("name") != summary.get("method") else "",
            "text": str(formula.get("text") or ""),
            "notes": [str(note) for note in formula.get("notes") or []],
        },
        "model": model_section(summary),
        "warnings": warnings_of(summary, rho),
        "chosen": _chosen(summary, scores),
        "trust": _trust(summary, table),
        "audit": _audit(summary, table),
        "cost": cost_section(summary),
        "distribution": _distribution(scores),
        "lengths": _lengths(scores, rho),
        "sources": sources_section(summary),
        "examples": [(name, rows) for name, rows in (("Best rows", best), ("Worst rows", worst)) if rows],
        "target": _target(summary, scores),
        "quality": _quality(summary, scores),
        "provenance": _provenance(summary),
    }
    sections = (
        ("audit", "Audit"),
        ("cost", "Cost"),
        ("distribution", "Scores"),
        ("lengths", "Length"),
        ("sources", "Sources"),
        ("target", "Target"),
        ("examples", "Rows"),
        ("quality", "Data"),
        ("provenance", "Provenance"),
    )
    view["nav"] = [(key, word) for key, word in sections if view[key]]
    return view
