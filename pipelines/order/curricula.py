"""The task `curricula`: batches arranged by scores in shapes, estimated or trained, and compared with random orders."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from datatools import order
from datatools.files import sealed
from pipelines.order.estimate import diverged, estimate
from pipelines.order.kept import true_losses
from pipelines.order.scores import measured
from pipelines.order.setting import Setting
from pipelines.runs.messages import say, warn

_DRAWN = 64  # random orders whose estimates give the spread


def run_curricula(setting: Setting) -> None:
    """Run the task `curricula`: estimate each curriculum, or train all of them, and report what is better than random.

    The estimate is that of the first estimator; the best curricula by it are retrained, with as many random orders.
    Nothing is retrained if the estimates say that no order is worth it.

    Args:
        setting: The setting of the run.
    """
    config = setting.config
    named = made_curricula(setting)
    say(f"curricula: {len(named)} different orders of {len(setting.sequence)} steps")
    rows: list[dict[str, Any]] = [{"name": name, "sequence": list(s)} for name, s in named.items()]
    blind = setting.random_orders("random", config.retrain)
    seen = None if config.train_all else _estimated(setting, rows)
    tried = sorted(rows, key=lambda row: _loss(row, "estimated", 0.0))
    if seen is not None:
        tried = tried[: config.retrain] if seen.worth_it else []
    rows += [{"name": f"random {i + 1}", "sequence": list(s)} for i, s in enumerate(blind)]
    if seen is not None:
        _score(setting, rows[len(named) :])
    reference = next(row for row in rows if tuple(row["sequence"]) == setting.sequence)
    if tried and (config.retrain or config.train_all):
        runs = [row for row in rows if row in tried or row is reference or row["name"].startswith("random ")]
        found = true_losses(setting, [row["sequence"] for row in runs], "curricula: retrained")
        for row, loss in zip(runs, found, strict=True):
            row["true"] = loss
    key = "true" if "true" in reference else "estimated"
    best = min((row for row in rows[: len(named)] if key in row), key=lambda row: _loss(row, key))
    proposed = best if seen is None or seen.worth_it else reference
    setting.plan.reordered(tuple(proposed["sequence"])).save(setting.run.path("order.npz"))
    drawn = [row[key] for row in rows[len(named) :] if math.isfinite(row.get(key, math.nan))]
    sealed.write_json(
        setting.run.path("curricula.json"),
        order.finite({
            "estimator": None if config.train_all else config.estimators[0], "rows": rows, "proposed": proposed["name"],
            "by": key, "random_mean": float(np.mean(drawn)) if drawn else None,
            "random_best": float(min(drawn)) if drawn else None,
            "outlook": asdict(seen) if seen else None, "sentence": seen.sentence() if seen else "",
            "form": asdict(form_of(setting)),
            "batches": [{"source": s, "tokens": n} for s, n in zip(setting.sources, setting.lengths, strict=True)],
        }),
    )  # fmt: skip
    _say_result(setting, proposed, key, drawn, seen)


def _loss(row: dict[str, Any], key: str, missing: float = math.inf) -> float:
    """Return a loss to sort by: infinite for an order that diverged, because NaN has no place in an order."""
    value = float(row.get(key, missing))
    return math.inf if math.isnan(value) else value


def made_curricula(setting: Setting) -> dict[str, tuple[int, ...]]:
    """Return the reference order and every score in every shape, by name; orders that occur twice are named once.

    Args:
        setting: The setting of the run.
    """
    config = setting.config
    named = {"reference": setting.sequence}
    for score, values in measured(setting, config.scores).items():
        for shape in config.shapes:
            places = order.arrange(
                [values[batch] for batch in setting.sequence], shape, form=form_of(setting), seed=config.seed
            )
            sequence = tuple(setting.sequence[place] for place in places)
            if sequence not in named.values():
                named[f"{score}, {shape}"] = sequence
    return named


def form_of(setting: Setting) -> order.Form:
    """Return the numbers of the shapes.

    Args:
        setting: The setting of the run.
    """
    config = setting.config
    return order.Form(config.layers, config.sections, config.ratio, config.window)


def _estimated(setting: Setting, rows: list[dict[str, Any]]) -> order.Outlook:
    """Add estimates to the rows, and return what they expect of ordering."""
    config, name = setting.config, setting.config.estimators[0]
    found = _score(setting, rows)
    count = _DRAWN if order.estimator(name).fast(config) else max(2, config.retrain)
    drawn = estimate(setting, name, setting.random_orders("outlook", count))["estimated"]
    best = min(range(len(rows)), key=lambda i: rows[i]["estimated"])
    seen = order.outlook(drawn, rows[best]["estimated"], worth=config.worth, trusted=found["trusted"][best])
    say(seen.sentence())
    if lost := diverged(found["estimated"]):
        warn(f"{name}: {lost}")
    return seen


def _score(setting: Setting, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {}
    found = estimate(setting, setting.config.estimators[0], [row["sequence"] for row in rows])
    for row, value in zip(rows, found["estimated"], strict=True):
        row["estimated"] = value
    return found


def _say_result(
    setting: Setting, proposed: dict[str, Any], key: str, drawn: list[float], seen: order.Outlook | None
) -> None:
    path = setting.run.path("order.npz")
    if seen is not None and not seen.worth_it:
        say(f"{path} is the reference order; nothing was retrained (--set worth=0 goes on all the same)")
        return
    against = f", random orders {np.mean(drawn):.5f} on average, best {min(drawn):.5f}" if drawn else ""
    what = "retrained" if key == "true" else "estimated"
    say(f"best curriculum, {what}: {proposed['name']} {proposed[key]:.5f}{against}")
    say(f"order: {path} (datatools train --order)")
    if drawn and math.isfinite(proposed[key]) and proposed[key] >= min(drawn):
        warn(f"no curriculum is better than the best of {len(drawn)} random orders")
