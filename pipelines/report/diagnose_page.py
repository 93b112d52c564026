"""The page of a diagnosis: `diagnose.json` as text, tables and one picture per check."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datatools import DataError, files
from pipelines.report import charts
from pipelines.report import page as report
from pipelines.report.charts import Scale
from pipelines.settings import names
from pipelines.texts import count, number, plural

Json = Mapping[str, Any]

ROLE_NAMES = {
    "q": "query", "k": "key", "v": "value", "o": "attention output", "ffn_in": "feed-forward in",
    "ffn_gate": "feed-forward gate", "ffn_out": "feed-forward out", "embedding": "embedding", "head": "head",
    "qk": "query and key", "vo": "value and output", "ffn": "feed-forward", "norm": "norms", "other": "the rest",
}  # fmt: skip


def render(folder: Path) -> Path:
    """Draw folder/report.html from folder/diagnose.json.

    Args:
        folder: The folder of the run.

    Returns:
        The page.

    Raises:
        DataError: The file is missing or damaged.
        EnvironmentProblem: The report cannot be written.
    """
    summary = files.read_json(folder / "diagnose.json", limit=256_000_000)
    try:
        parts = build(summary)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder / 'diagnose.json'} is damaged ({error!r}); run the diagnosis again") from error
    return report.write_page(folder, report.page("diagnose.html", **parts))


def build(summary: Json) -> dict[str, Any]:
    """Return the parts of the page.

    Args:
        summary: The content of diagnose.json.
    """
    checks = summary["checks"]
    data = summary["data"]
    sections: dict[str, Callable[[Json], dict[str, Any]]] = {
        "sharpness": _sharpness, "spectrum": _spectrum, "smoothness": _smoothness, "conditioning": _conditioning,
        "double-descent": _double_descent,
    }  # fmt: skip
    found = [
        {"key": key, **(sections[key](check) if key in sections else _numbers(key, check))}
        for key, check in checks.items()
    ]
    return {
        "title": f"Diagnosis of {Path(summary['model']).name}",
        "created": str(summary["created"])[:10],
        "lead": f"{plural(data['rows'], 'row')} of {count(data['of'])}, {count(data['tokens'])} tokens"
        + (f", adapter {summary['adapter']}" if summary.get("adapter") else "")
        + f", seed {summary['seed']}.",
        "paths": list(data["paths"]),
        "sections": found,
        "versions": [(k, v) for k, v in summary["versions"].items() if v],
    }


def value(text: Any) -> float:
    """Return a number of `diagnose.json`, in which non-finite numbers are texts.

    Args:
        text: The number or text.
    """
    return float(text)


def shown(x: Any) -> str:
    """Return a number as text with 3 digits, or a word if it is not finite.

    Args:
        x: The number or text.
    """
    number_ = value(x)
    return "infinite" if math.isinf(number_) else number(number_)


# ------------------------------------------------------------------------------------------------------------- sections


def _numbers(key: str, found: Json) -> dict[str, Any]:
    """Return the section of a check without its own picture: the numbers that it found."""
    texts = ("nan", "inf", "-inf")
    numbers = {name: found[name] for name in found if isinstance(found[name], int | float) or found[name] in texts}
    title = key.replace("-", " ").capitalize()
    first = next(iter(numbers), "")
    return {
        "title": title,
        "short": (shown(numbers[first]) if first else "–", first),
        "lead": f"{title}: {plural(len(numbers), 'number')}.",
        "head": ["Quantity", "Value"],
        "rows": [[name, shown(number_)] for name, number_ in numbers.items()],
        "note": "",
    }


def _sharpness(found: Json) -> dict[str, Any]:
    blocks = sorted(found["blocks"].items(), key=lambda item: -value(item[1]["sharpness"]))
    widths = _log_widths([value(b["sharpness"]) for _, b in blocks])
    top, low = blocks[0], blocks[-1]
    lead = f"The loss is sharpest in {_role(top[0])}"
    if len(blocks) > 1 and value(low[1]["sharpness"]) > 0:
        times = value(top[1]["sharpness"]) / value(low[1]["sharpness"])
        lead += f", {number(times)} times as sharp as in {_role(low[0])}"
    return {
        "title": "Sharpness of blocks", "short": (_role(top[0]), "the sharpest block"), "lead": f"{lead}.",
        "bars": [
            {"name": _role(block), "width": width, "value": shown(b["sharpness"])}
            for (block, b), width in zip(blocks, widths, strict=True)
        ],
        "head": ["Block", "Sharpness", "Parameters", "Ratio"],
        "rows": [
            [_role(block), shown(b["sharpness"]), count(b["parameters"]), shown(found["ratios"].get(block, math.nan))]
            for block, b in blocks
        ],
        "note": "Mean of the Gauss-Newton matrix's diagonal over a block, with labels sampled from the model itself "
        "(arXiv 2502.19002); bars on a logarithmic scale. Trained models have Emb << QK < FFN < VO << Norm. Ratio: a "
        "suggested learning rate of the block relative to the sharpest block; the rule is ours, not the paper's.",
    }  # fmt: skip


def _spectrum(found: Json) -> dict[str, Any]:
    kinds = list(found["roles"])
    scale = Scale(0.0, 1.0)
    single: dict[tuple[str, str], list[float]] = {}
    for entry in found["matrices"]:
        entropy = value(entry["svd_entropy_normalized"])
        if math.isfinite(entropy):
            single.setdefault((entry["of"], entry["role"]), []).append(entropy)
    roles = [r for r in found["roles"]["weights"] if r not in ("qk", "vo", "ffn")]
    rows = []
    for role in roles:
        for kind in kinds:
            metrics = found["roles"][kind].get(role)
            if metrics is None:
                continue
            entropy = metrics["svd_entropy_normalized"]
            mean, spread = value(entropy["mean"]), value(entropy["spread"])
            finite = math.isfinite(mean)
            label = f"{_role(role)}, {_kind(kind)}: normalised entropy {number(mean)}"
            chart = charts.interval(
                scale, mean if finite else None, (mean - spread, mean + spread) if finite else (None, None),
                single.get((kind, role), []), guide=None, chosen=kind != "weights", label=label, height=22,
            )  # fmt: skip
            columns = ("svd_entropy_normalized", "effective_rank", "top10", "q75_q25")
            cells = [shown(metrics[key]["mean"]) for key in columns]
            rows.append({"group": _role(role) if kind == kinds[0] else "", "name": _kind(kind), "chart": chart,
                         "cells": cells})  # fmt: skip
    means = {k: _mean_over_roles(found["roles"][k], roles) for k in kinds}
    best = max((k for k in kinds if k != "weights"), key=lambda k: means[k], default=None)
    weights = number(means["weights"])
    lead = f"Weights have a mean normalised entropy of {weights} (1: all directions are equal; 0: only one)."
    if not roles:
        lead = "No parameter name of this model shows its role, so no spectrum was computed."
    elif best is not None:
        lead += f" Of the updates, {_kind(best)} is the most uniform, with {number(means[best])}."
    return {
        "title": "Spectra of weights and updates",
        "short": (weights, "entropy of the weights' spectra"), "lead": lead, "charted": rows,
        "ticks": charts.ticks(scale, 5), "axis": "entropy of the spectrum, relative to its maximum",
        "head": ["", "", "Entropy", "Effective rank", "Top 10", "q75 / q25"],
        "note": "Large dot: mean over the layers; line: their spread; small dots: single matrices. Updates: those of "
        "the optimizer's first step for the gradient of these rows. Effective rank: number of directions with energy; "
        "top 10: share of the energy in the ten largest; q75 / q25: of squared singular values (arXiv 2509.26030).",
    }  # fmt: skip


def _mean_over_roles(of: Json, roles: Sequence[str]) -> float:
    values = [value(of[r]["svd_entropy_normalized"]["mean"]) for r in roles if r in of]
    values = [v for v in values if math.isfinite(v)]
    return math.fsum(values) / len(values) if values else math.nan


def _smoothness(found: Json) -> dict[str, Any]:
    plain, top = found["plain"], value(found["lanczos"]["largest"])
    d = value(plain["dimension"])
    entries = [("|H| entries, sum over d", value(plain["norm11_over_d"]))]
    if "rotated" in found:
        entries.append(("the same, coordinates rotated", value(found["rotated"]["norm11_over_d"])))
    entries += [
        ("largest eigenvalue", top),
        ("largest row sum", value(plain["largest_row_sum"])),
        ("root mean square eigenvalue", value(found["frobenius"]) / math.sqrt(d)),
    ]
    widths = _log_widths([v for _, v in entries])
    ratio = value(plain["norm11_over_d"]) / top if top > 0 else math.nan
    lead = (
        f"The entries of the Hessian sum to {number(ratio)} times d times its largest eigenvalue: the cost of Adam's "
        "geometry relative to that of gradient descent"
    )
    if "rotated" in found and value(plain["norm11_over_d"]) > 0:
        times = value(found["rotated"]["norm11_over_d"]) / value(plain["norm11_over_d"])
        lead += f"; in rotated coordinates it is {number(times)} times as much"
    return {
        "title": "Smoothness, l-infinity compared with l2",
        "short": (number(ratio), "|H| summed over d, by the top eigenvalue"),
        "lead": f"{lead}.",
        "bars": [{"name": n, "width": w, "value": shown(v)} for (n, v), w in zip(entries, widths, strict=True)],
        "head": ["Quantity", "Value"],
        "rows": [
            ["parameters d", count(d)],
            ["probed coordinates", count(value(plain["coordinates"]))],
            ["sum of |H| by interquartile ranges", shown(plain["norm11"])],
            ["sum of |H| by medians", shown(plain["norm11_median"])],
            ["Frobenius norm of H", shown(found["frobenius"])],
            ["smallest eigenvalue", shown(found["lanczos"]["smallest"])],
            ["Lanczos steps", count(value(found["lanczos"]["steps"]))],
        ],
        "note": "Cauchy probes of Hessian-vector products (arXiv 2410.08198); bars on a logarithmic scale. The largest "
        "row sum is over the probed coordinates and biased upwards. Rotated: entries of each tensor shuffled and "
        "rotated; a larger value shows that the model's coordinates suit a coordinate-wise method.",
    }  # fmt: skip


def _conditioning(found: Json) -> dict[str, Any]:
    by_role: dict[str, list[Json]] = {}
    for entry in found["matrices"]:
        by_role.setdefault(entry["role"], []).append(entry)
    finite = {
        role: [v for e in entries if math.isfinite(v := value(e["log10_cond2"]))] for role, entries in by_role.items()
    }
    every = [v for values in finite.values() for v in values]
    scale = Scale(0.0, max([*every, 1.0]) * 1.05)
    rows = []
    for role, entries in by_role.items():
        values = finite[role]
        mean = math.fsum(values) / len(values) if values else None
        chart = charts.interval(
            scale, mean, (min(values), max(values)) if values else (None, None), values, guide=None, chosen=True,
            label=f"{_role(role)}: log10 of the condition number", height=22,
        )  # fmt: skip
        penalties = [value(e["penalty"]) for e in entries]
        cells = [number(mean), number(max(values)) if values else "–", count(len(entries) - len(values)),
                 shown(math.fsum(penalties) / len(penalties))]  # fmt: skip
        rows.append({"group": _role(role), "name": plural(len(entries), "matrix", "matrices"), "chart": chart,
                     "cells": cells})  # fmt: skip
    singular = len(found["matrices"]) - len(every)
    worst = max(found["matrices"], key=lambda e: v if math.isfinite(v := value(e["log10_cond2"])) else -1.0)
    lead = f"The worst conditioned matrix is {worst['name']}, with a condition number of {shown(worst['cond2'])}"
    lead += f"; {plural(singular, 'matrix is', 'matrices are')} singular." if singular else "; none is singular."
    return {
        "title": "Condition numbers", "short": (shown(worst["cond2"]), "the largest condition number"), "lead": lead,
        "charted": rows, "ticks": charts.ticks(scale, 5), "axis": "log10 of s_1 / s_r",
        "head": ["", "", "Mean log10", "Largest", "Singular", "TSCNC penalty"],
        "note": "Dots are matrices; the line shows their range. The penalty is logdet(M / n + 1e-5 I)^2 of the smaller "
        "Gram matrix M: it bounds the volume, not the condition number (arXiv 2503.20454).",
    }  # fmt: skip


def _double_descent(found: Json) -> dict[str, Any]:
    widths, steps, threshold = found["widths"], found["steps"], found["threshold"]
    raw = found["closed"]["raw"]
    across = Scale(math.log2(widths[0]), math.log2(widths[-1]))
    named = [(f"{count(t)} steps", [row[i] for row in raw["gd_test_mse"]]) for i, t in enumerate(steps)]
    named.append(("the minimum", raw["min_norm_test_mse"]))
    top = max(max(values) for _, values in named)
    series = [
        (f"l{i}", [(math.log2(w), v) for w, v in zip(widths, values, strict=True)])
        for i, (_, values) in enumerate(named)
    ]
    up = Scale(0.0, 1.05 * top)
    drawing, marks = charts.lines(across, up, series, label="test error against the number of features", height=220)
    at = widths.index(threshold)
    closed = [
        (f"gradient descent, {count(t)} steps", raw["gd_train_mse"][at][i], raw["gd_test_mse"][at][i])
        for i, t in enumerate(steps)
    ]
    arms = [
        (f"{name}, {count(a['steps'])} steps at {number(a['lr'])}", value(a["train_mse"]), value(a["test_mse"]))
        for name, a in found["arms"].items()
    ]
    points = [*((p, "other") for p in closed), *((p, "chosen") for p in arms)]
    logs = [math.log10(max(train, 1e-12)) for (_, train, _), _ in points]
    low = Scale(math.floor(min(logs)), math.ceil(max(logs)))
    errors = [math.log10(test) for (_, _, test), _ in points]
    high = Scale(min(errors) - 0.05, max(errors) + 0.05)
    dots, heights = charts.lines(
        low, high, [(kind, [(x, y)]) for x, y, (_, kind) in zip(logs, errors, points, strict=True)],
        label="test error at the threshold against the training loss reached", height=180,
    )  # fmt: skip
    best, first = raw["min_norm_test_mse"][at], raw["gd_test_mse"][at][0]
    return {
        "title": "Double descent and conditioning",
        "short": (number(best / first), "times the error of 100 steps at the minimum"),
        "lead": f"At {threshold} features, as many as rows, the minimum has a test error of {number(best)} and "
        f"{count(steps[0])} steps of gradient descent {number(first)}; the condition number is "
        f"{number(raw['condition_number'][at])}.",
        "plots": [
            {"drawing": drawing, "marks": marks, "unit": "features (logarithmic); test error upwards",
             "ticks": [charts.Tick(across.percent(math.log2(w)), count(w), minor=w in (36, 44, 50, 10))
                       for w in widths if w not in (36, 44)],
             "legend": [(f"l{i}", name) for i, (name, _) in enumerate(named)]},
            {"drawing": dots, "marks": heights, "ticks": charts.ticks(low, 6),
             "unit": "log10 of the training error reached at the threshold; that of the test error upwards",
             "legend": [("other", "gradient descent, closed form"), ("chosen", "optimizers")]},
        ],
        "head": ["At the threshold", "Training error", "Test error"],
        "rows": [[n, number(train), number(test)] for (n, train, test), _ in points],
        "note": "Random-feature regression, independent of the model: 40 rows, 10 inputs, noise 0.5; all except the "
        "optimizers in closed form (after arXiv 2312.03951). If the claim holds, the dots lie on one curve.",
    }  # fmt: skip


def _role(role: str) -> str:
    return ROLE_NAMES.get(role, role)


def _kind(kind: str) -> str:
    """What a spectrum is of, in words: the weights, or the first update of an optimizer."""
    return kind if kind == "weights" else f"{names.title(kind)}'s update"


def _log_widths(values: Sequence[float]) -> list[str]:
    """Return CSS lengths of bars on a logarithmic scale: the longest has full width, the shortest a tenth of it."""
    logs = [math.log10(v) if 0 < v < math.inf else None for v in values]
    present = [x for x in logs if x is not None]
    if not present:
        return ["0%"] * len(values)
    low, high = min(present), max(present)
    spread = high - low
    return ["0%" if x is None else f"{10 + 90 * ((x - low) / spread if spread > 0 else 1):.1f}%" for x in logs]
