"""`summary.json` in a report and in the terminal: the method, the model, warnings, cost, sources and examples."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.audit_section import Arm
from pipelines.report.scores_section import MAX_SOURCES, length_warning
from pipelines.report.values import Json, finite, listing, mapping, share_of
from pipelines.settings import methods
from pipelines.texts import count, duration, number, percent, plural, size

SEEN_WARNING = 0.95


def method_of(summary: Json) -> tuple[str, str]:
    """Return (name, meaning of one score) of the method.

    Args:
        summary: The content of summary.json.
    """
    name = str(summary.get("method") or "")
    record, said = methods.method(name), mapping(summary.get("formula"))
    title, meaning = (name or "unnamed method", "") if record is None else (record.title, record.meaning)
    return str(said.get("title") or title), str(said.get("meaning") or meaning)


def model_section(summary: Json) -> dict[str, Any] | None:
    """Return the model and the share of its trainable parameters that the scores use; None without a model.

    Args:
        summary: The content of summary.json.
    """
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


def warnings_of(summary: Json, table: Sequence[Arm], rho: float | None) -> list[str]:
    """Return the run's own warnings, then those that follow from the numbers; each once.

    Args:
        summary: The content of summary.json.
        table: The arms of its audit; empty if there is none.
        rho: The rank correlation of score and answer length.
    """
    found = [str(item) for item in summary.get("warnings") or []]
    seen = finite(mapping(summary.get("model")).get("seen_share"))
    if seen is not None and seen < SEEN_WARNING and not any("parameters" in item for item in found):
        found.append(f"The scores use only {percent(seen)} of the trainable parameters; the rest had no influence.")
    matched = next((arm.reading for arm in table if arm.matches_length and not arm.chosen), None)
    if (text := length_warning(rho, matched)) is not None:
        found.append(text)
    return list(dict.fromkeys(found))


def cost_section(summary: Json) -> dict[str, Any] | None:
    """Return estimates and measurements, and the duration of each stage; None if nothing is known.

    Args:
        summary: The content of summary.json.
    """
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
        lead = f"The run took {duration(took)}" + (f" (estimate: {duration(guess)})" if guess else "") + ". "
    if longest is not None:
        lead += f"The longest stage, {longest['name']}, took {longest['share']} of the time."
    return {
        "lines": lines,
        "stages": bars,
        "lead": lead,
        "took": took,
        "guess": guess,
        "bytes": finite(after.get("bytes")),
        "peak": peak,
    }


def stages(items: Sequence[Json]) -> list[dict[str, Any]]:
    """Return stages with their seconds as consecutive bars; stages with equal names are combined.

    Args:
        items: {"name", "seconds"} of each stage.
    """
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


def sources_section(summary: Json, most: int = MAX_SOURCES) -> dict[str, Any] | None:
    """Return the sources before and after the selection, the most chosen first; the rest beyond `most` is one line.

    Args:
        summary: The content of summary.json.
        most: The maximum number of lines.
    """
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
    """Return a sentence: which source gained most, which lost most, and how many have no chosen row."""
    lifts = [(row["chosen"] / all_chosen / (row["pool"] / all_pool), row) for row in rows if row["pool"]]
    if len(lifts) < 2:
        return ""
    (most, gained), (least, lost) = max(lifts, key=lambda x: x[0]), min(lifts, key=lambda x: (x[0], -x[1]["pool"]))
    if most > 1.25:
        text = f"The share of {gained['name']} is {_times(most)[1:]} times that in the pool"
        text += f", that of {lost['name']} {_times(least)[1:]} times." if lost["chosen"] else "."
    else:
        text = "The shares of the sources are about those in the pool."
    none = sum(1 for row in rows if not row["chosen"])
    return text + (f" {plural(none, 'source has', 'sources have')} no chosen row." if none else "")


def _times(lift: float | None) -> str:
    """Return ×13, ×6.7, ×0.15: the share of a source in the selection relative to its share in the pool."""
    if lift is None:
        return ""
    return f"×{lift:.0f}" if lift >= 9.95 else f"×{lift:.1f}" if lift >= 0.995 else f"×{lift:.2f}"


def examples_of(items: object) -> list[dict[str, Any]]:
    """Return rows with their nearest target row, with every field as text.

    Args:
        items: The examples of summary.json.
    """
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
