"""The result of an audit: the table of its arms, and a verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from datatools import t_interval
from pipelines.report.audit_section import FEWEST_RUNS
from pipelines.select import compare
from pipelines.select.arms import BASE, SELECTED, Task
from pipelines.select.bench import Result
from pipelines.settings.audit import AuditConfig
from pipelines.settings.methods import FULL
from pipelines.training.accuracy.measure import Plan

Audit = dict[str, Any]
"""The content of `audit.json`."""


def judge(base: Result, done: Sequence[tuple[Task, Result]], test_rows: int, plan: Plan, config: AuditConfig) -> Audit:
    """Return the content of `audit.json`: all runs, each arm against the selection by each metric, a verdict in words.

    Args:
        base: The model before any training.
        done: The training runs.
        test_rows: How many held-out rows there are.
        plan: What was measured besides the loss.
        config: The settings.
    """
    results = [{"arm": task.arm, "seed": task.seed} | result.said() for task, result in done]
    runs: dict[str, list[Result]] = {}
    for task, result in done:
        runs.setdefault(task.arm, []).append(result)
    found = summarise(base.said() | {"rows": test_rows}, results, config)
    measured = compare.metrics(base, runs, plan)
    found["metrics"] = measured
    if len(measured) > 1 and len(runs) > 1:
        by_loss = found["verdict"].removeprefix("The selection is ")
        parts = [f"By {compare.HELD_OUT}, the selection is {by_loss}", *map(compare.in_words, measured[1:])]
        found |= {"verdict": " ".join(parts), "agreement": compare.agreement(measured)}
    return found


def summarise(base: dict[str, Any], results: list[dict[str, Any]], config: AuditConfig) -> Audit:
    """Return the audit's table (mean held-out loss per arm with its interval over seeds) and a verdict in words.

    Args:
        base: The losses of the untrained model.
        results: The loss, the arm and the seed of each training run.
        config: The settings of the audit.
    """
    by_arm: dict[str, list[float]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], []).append(float(result["loss"]))
    ours = by_arm[SELECTED]
    table = [
        {
            "arm": BASE,
            "mean": base["loss"],
            "low": None,
            "high": None,
            "n": 1,
            "delta_vs_selected": base["loss"] - t_interval(ours)[0],
        }
    ]
    for arm, values in by_arm.items():
        mean, low, high = t_interval(values)
        table.append(
            {
                "arm": arm,
                "mean": mean,
                "low": low,
                "high": high,
                "n": len(values),
                "delta_vs_selected": mean - t_interval(ours)[0],
            }
        )
    return {
        "metric": "held-out loss",
        "test_rows": base["rows"],
        "test_tokens": base["tokens"],
        "rows": results,
        "table": table,
        "verdict": verdict(by_arm),
        "recipe": config.training.model_dump(mode="json"),
    }


def verdict(by_arm: dict[str, list[float]]) -> str:
    """Return one plain sentence with a clause per baseline: better, worse, or not told apart by these seeds.

    Runs with equal seeds are compared. Fewer than three such pairs give no verdict, whatever their interval says.

    Args:
        by_arm: The losses of each arm, in the order of the seeds.
    """
    ours = by_arm[SELECTED]
    said = []
    for arm, theirs in by_arm.items():
        if arm == SELECTED:
            continue
        paired = [b - a for a, b in zip(ours, theirs, strict=False)]
        mean, low, high = t_interval(paired)
        name = "the whole pool in one epoch" if arm == FULL else arm
        word = "below" if mean > 0 else "above"
        if len(paired) < 2 or low is None or high is None:
            said.append(f"{abs(mean):.4f} {word} {name} (one seed: no interval)")
        elif len(paired) < FEWEST_RUNS:
            said.append(f"{abs(mean):.4f} {word} {name} on average ({len(paired)} seeds: too few to tell them apart)")
        elif low > 0:
            said.append(f"better than {name} by {mean:.4f} (95 % {low:.4f} to {high:.4f}, {len(paired)} seeds)")
        elif high < 0:
            said.append(f"WORSE than {name} by {-mean:.4f} (95 % {-high:.4f} to {-low:.4f}, {len(paired)} seeds)")
        else:
            said.append(
                f"not told apart from {name}: {abs(mean):.4f} {word}, 95 % {low:.4f} to {high:.4f}, {len(paired)} seeds"
            )
    return "The selection is " + "; ".join(said) + "." if said else "No baseline was asked for."


def print_table(audit: dict[str, Any], console: Console) -> None:
    """Print the audit on a console of 80 columns.

    Args:
        audit: The content of audit.json.
        console: The console.
    """
    table = Table(
        box=box.SIMPLE_HEAD, title=f"held-out loss, {audit['test_rows']} rows, {audit['test_tokens']:,} tokens"
    )
    table.add_column("trained on")
    for name in ("mean", "95 % interval", "seeds", "minus selected"):
        table.add_column(name, justify="right")
    for arm in sorted(audit["table"], key=lambda a: a["mean"]):
        spread = "" if arm["low"] is None else f"{arm['low']:.4f} to {arm['high']:.4f}"
        delta = "" if arm["arm"] == SELECTED else f"{arm['delta_vs_selected']:+.4f}"
        style = "bold" if arm["arm"] == SELECTED else None
        table.add_row(
            "full (1 epoch)" if arm["arm"] == FULL else arm["arm"],
            f"{arm['mean']:.4f}",
            spread,
            str(arm["n"]),
            delta,
            style=style,
        )
    console.print(table)
    metrics = audit.get("metrics") or []
    if len(metrics) > 1:
        for metric in metrics[1:]:
            console.print(_beside(metrics[0], metric))
    if audit.get("leaked"):
        console.print(f"LEAKED: {audit['leaked']}.", style="bold red", highlight=False, markup=False)
    console.print(audit["verdict"], soft_wrap=False, highlight=False, markup=False)
    for part in ("models", "agreement", "lr_check"):
        if sentence := (audit.get(part) or {}).get("sentence"):
            console.print(sentence, highlight=False, markup=False)
    for part in (audit.get("oracle") or {}).values():
        if isinstance(part, dict):
            console.print(part["sentence"], highlight=False, markup=False)


def _beside(loss: dict[str, Any], metric: dict[str, Any]) -> Table:
    """Loss and one accuracy side by side, the most accurate arm first; differences are in points."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{metric['label']}, {metric['rows']} rows")
    table.add_column("trained on")
    for name in ("loss", "%", "95 %", "minus selected", "95 %", "p"):
        table.add_column(name, justify="right")
    losses = {row["arm"]: row["mean"] for row in loss["table"]}
    pairs = {one["arm"]: one for one in metric["against"]}
    for row in sorted(metric["table"], key=lambda row: -row["mean"]):
        pair = pairs.get(row["arm"])
        table.add_row(
            "full (1 epoch)" if row["arm"] == FULL else row["arm"],
            f"{losses[row['arm']]:.3f}",
            f"{100 * row['mean']:.1f}",
            f"{100 * row['low']:.0f} to {100 * row['high']:.0f}",
            "" if pair is None else f"{100 * pair['difference']:+.1f}",
            "" if pair is None else f"{100 * pair['low']:.1f} to {100 * pair['high']:.1f}",
            "" if pair is None else f"{pair['p']:.2g}",
            style="bold" if row["arm"] == SELECTED else None,
        )
    return table
