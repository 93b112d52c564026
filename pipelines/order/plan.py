"""The task `plan`: which source should come first, from brackets between sources instead of retraining."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from datatools import files, order
from datatools.files import sealed
from pipelines.order.cost import PLAN, RETRAINED, anchors_of_plan, cost_of_plan, sources_of
from pipelines.order.estimate import spending
from pipelines.order.kept import kept, reference, true_losses
from pipelines.order.setting import Setting
from pipelines.runs.messages import say, warn
from pipelines.runs.seeds import derive_seed

_DRAWN = 256  # random orders of the sources whose estimates give the spread


def plan(setting: Setting) -> None:
    """Run the task `plan`: sort sources by their brackets, and retrain in a few orders of them to check the plan.

    Nothing is retrained if the estimates say that no order of the sources is worth it.

    Args:
        setting: The setting of the run.
    """
    config = setting.config
    made = _tournament(setting)
    chosen = made.order()
    scores, errors = made.scores()
    margins, margin_errors = made.margins()
    say(f"plan: {' -> '.join(chosen)}")
    for name in chosen:
        i = made.names.index(name)
        say(f"  {name}: being early costs {float(scores[i]):+.2g}{_error(float(errors[i]))}, {made.steps[i]} steps")
    clear, pairs = _clear(margins.tolist(), margin_errors.tolist())
    drawn = _random_orders(made.names, config.seed, _DRAWN)
    estimated = [made.predicted(made.blocks(one)) for one in drawn]
    best = made.predicted(made.blocks(chosen))
    error = made.difference(made.blocks(chosen), made.blocks(chosen[::-1]))[1] / 2
    seen = order.outlook(estimated, best, worth=config.worth, error=error)
    say(seen.sentence())
    mixed = made.predicted(made.raw.sequence)
    rows: list[dict[str, Any]] = [
        {"name": "the plan", "sources": chosen, "estimated": best},
        {"name": "the plan, reversed", "sources": chosen[::-1]},
        {"name": "sources mixed", "sources": None, "estimated": mixed},
    ]
    if seen.worth_it:
        asked = [one for one in drawn if one not in (chosen, chosen[::-1])][: config.retrain]
        rows += [{"name": f"random {i + 1}", "sources": one} for i, one in enumerate(asked)]
    for row in rows:
        row["estimated"] = made.predicted(_labels(made, row["sources"]))
        row["sequence"] = list(_sequence(setting, row["sources"]))
    if seen.worth_it and config.retrain:
        for row, loss in zip(rows, true_losses(setting, [row["sequence"] for row in rows], RETRAINED), strict=True):
            row["true"] = loss
    proposed = _proposed(rows, seen.worth_it)
    setting.plan.reordered(proposed["sequence"]).save(setting.run.path("order.npz"))
    result: dict[str, Any] = {
        "names": list(made.names), "steps": list(made.steps), "order": chosen, "scores": scores.tolist(),
        "errors": errors.tolist(), "margins": margins.tolist(), "margin_errors": margin_errors.tolist(),
        "clear": clear, "pairs": pairs, "outlook": asdict(seen), "sentence": seen.sentence(),
        "worth_it": seen.worth_it, "rows": rows, "proposed": proposed["name"], "anchors": made.raw.positions,
        "replicates": [made.raw.owner.count(i) for i in range(len(made.names))],
        "cost_in_batch_gradients": made.cost.in_gradients(hvp=order.HVP_IN_GRADIENTS),
        "retraining_in_batch_gradients": len(setting.sequence),
    }  # fmt: skip
    sealed.write_json(setting.run.path("plan.json"), order.finite(result))
    _say_result(setting, result, proposed)


def _proposed(rows: list[dict[str, Any]], worth_it: bool) -> dict[str, Any]:
    """Return the row of the plan or of mixed sources: the lower true loss, or the lower estimate if none was retrained.

    Mixed sources are proposed where no order of the sources is worth it.
    """
    plan, mixed = rows[0], rows[2]
    key = "true" if "true" in plan else "estimated"
    return mixed if not worth_it or mixed[key] < plan[key] else plan


def _say_result(setting: Setting, result: dict[str, Any], proposed: dict[str, Any]) -> None:
    clear, pairs = result["clear"], result["pairs"]
    cost = result["cost_in_batch_gradients"] / result["retraining_in_batch_gradients"]
    bars = "" if clear is None else f"{clear} of {pairs} pairs of sources differ by more than two errors; "
    say(f"{bars}the comparison cost {cost:.1f} retrainings")
    if not result["worth_it"]:
        say(f"{setting.run.path('order.npz')} keeps the sources mixed; --set worth=0 goes on all the same")
        return
    plan_, reverse, mixed, *others = result["rows"]
    key = "true" if "true" in plan_ else "estimated"
    if key == "true":
        drawn = [row["true"] for row in others]
        random = f", of {len(drawn)} random orders {np.mean(drawn):.5f} on average" if drawn else ""
        say(
            f"retrained: the plan {plan_['true']:.5f}, its reverse {reverse['true']:.5f}, sources mixed "
            f"{mixed['true']:.5f}{random}"
        )
    if proposed is mixed:
        warn(
            f"one source after the other ends at {plan_[key]:.5f} even in the planned order, sources mixed at "
            f"{mixed[key]:.5f} ({'retrained' if key == 'true' else 'estimated'}): mixing is better here, and "
            "order.npz keeps the sources mixed"
        )
    elif key == "true" and (better := [row for row in (reverse, *others) if row["true"] < plan_["true"]]):
        best = min(better, key=lambda row: float(row["true"]))
        warn(
            f"the plan is not the best of the retrained orders of sources: {best['name']} ends at {best['true']:.5f} "
            f"({', '.join(best['sources'])})"
        )
    say(f"order: {setting.run.path('order.npz')} ({proposed['name']}; datatools train --order)")


def _tournament(setting: Setting) -> order.Tournament:
    """Return the brackets, which are computed once and kept in plans/."""
    config = setting.config
    path = setting.kept("plans", "plan-", config.replicates, anchors_of_plan(setting), config.products)
    found = kept(path)
    if found is not None:
        return order.Tournament.from_dict(found)
    if anchors_of_plan(setting) > 1:
        run_ = reference(setting)
    else:
        if setting.start is None:
            params, states = setting.begin(0)
            setting.start = order.Anchor(0, params, setting.recipe.init(params) if states is None else states)
        run_ = order.ReferenceRun(setting.sequence, setting.recipe, (setting.start,))
    expected = cost_of_plan(setting).in_gradients(hvp=order.HVP_IN_GRADIENTS)
    with setting.run.stage(PLAN), spending(setting.problem, PLAN, math.ceil(expected)):
        made = order.tournament(
            setting.problem,
            run_,
            sources_of(setting),
            replicates=config.replicates,
            anchors=anchors_of_plan(setting),
        )
    files.make_folder(path.parent)
    sealed.write_json(path, made.as_dict())
    return made


def _labels(made: order.Tournament, names: list[str] | None) -> list[int]:
    return list(made.raw.sequence) if names is None else made.blocks(names)


def _sequence(setting: Setting, names: list[str] | None) -> tuple[int, ...]:
    """Return the batches of the run with the sources one after the other, or as they are."""
    if names is None:
        return setting.sequence
    return tuple(batch for name in names for batch in setting.sequence if setting.sources[batch] == name)


def _random_orders(names: tuple[str, ...], seed: int, count: int) -> list[list[str]]:
    """Return distinct orders of the sources: all of them if there are few, else random ones."""
    rng = np.random.default_rng(derive_seed(seed, "order", "plan"))
    if math.factorial(min(len(names), 10)) <= count:
        every = [list(one) for one in itertools.permutations(names)]
        return [every[i] for i in rng.permutation(len(every))]
    return [[names[i] for i in rng.permutation(len(names))] for _ in range(count)]


def _clear(margins: list[list[float]], errors: list[list[float]]) -> tuple[int | None, int]:
    """Return (pairs whose margin is beyond two errors, None without error bars; pairs)."""
    pairs = [(margins[i][j], errors[i][j]) for i in range(len(margins)) for j in range(i)]
    if any(math.isnan(error) for _, error in pairs):
        return None, len(pairs)
    return sum(abs(margin) > 2 * error for margin, error in pairs), len(pairs)


def _error(value: float) -> str:
    return "" if math.isnan(value) else f" ± {value:.1g}"
