"""The task `search`: the first estimator searches, and the second judges the results and continues from them."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from datatools import DataError, order
from datatools.files import sealed
from pipelines.order.estimate import curricula, diverged, estimate, surrogate
from pipelines.order.kept import true_losses
from pipelines.order.setting import BLIND, Setting
from pipelines.runs.messages import say, warn
from pipelines.runs.progress import progress
from pipelines.runs.seeds import derive_seed

_DRAWN = 64  # random orders whose estimates give the spread


def search(setting: Setting) -> None:
    """Run the task `search`: the first estimator searches, and the second, if there is one, judges a shortlist.

    The optimum of an estimate is biased towards its errors. Therefore the second estimator judges a shortlist (the
    found orders, the best of as many random orders, and the curricula), and continues from it with `judged` further
    orders. If the first estimator expects less than `worth` of the best order that it found, the search ends with that
    answer, before the second judges and before anything is retrained, and proposes the reference order.

    Args:
        setting: The setting of the run.
    """
    config, name = setting.config, setting.config.estimators[0]
    judge = config.estimators[1] if len(config.estimators) > 1 else None
    if not order.estimator(name).fast(config) and config.budget > 1000:
        warn(f"{config.budget:,} scores of {name}, each a simulated run: lower --set budget=, or use pairwise")
    made = surrogate(setting, name)
    shortlist = curricula(setting)
    with setting.run.stage("search"):
        start = time.monotonic()
        options: dict[str, Any] = {"budget": config.budget, "seed": config.seed, "starts": list(shortlist.values())}
        with progress(f"search: {config.search}", config.budget, "orders") as bar:
            found = order.search(made, config.search, keep=max(1, config.retrain), advance=bar.advance, **options)
        took = time.monotonic() - start
        # orders that the search itself cannot have drawn; the reference is scored with them and left out
        options = {"budget": found.evaluations + 1, "seed": derive_seed(config.seed, "order", "blind")}
        with progress("search: as many random orders", found.evaluations + 1, "orders") as bar:
            blind = order.search(made, "random", keep=BLIND + 1, advance=bar.advance, **options)
    drawn = [(s, v) for s, v in zip(blind.sequences, blind.scores, strict=True) if s != setting.sequence][:BLIND]
    best_drawn = drawn[0][1] if drawn else math.nan
    by_chance = f"best of {found.evaluations:,} random {best_drawn:.5f}" if drawn else "random ones no other order"
    say(
        f"{config.search}: predicted {found.scores[0]:.5f}, the reference {made.score(setting.sequence):.5f}, "
        f"{by_chance} ({found.evaluations / max(took, 1e-9):,.0f} per second)"
    )
    seen = _outlook(setting, made, found)
    say(seen.sentence())
    retrain = config.retrain if seen.worth_it else 0
    judge = judge if seen.worth_it else None
    shortlist |= {f"found {i + 1}": s for i, s in enumerate(found.sequences)}
    shortlist |= {f"best of random, {i + 1}": s for i, (s, _) in enumerate(drawn)}
    rows: list[dict[str, Any]] = [{"name": label, "sequence": list(s)} for label, s in shortlist.items()]
    key, judging = "estimated", None
    if judge is not None:
        key = "judged"
        rows, judging = _judge(setting, judge, rows)
    for row in rows:
        row["estimated"] = made.score(row["sequence"])
    ranked = sorted(rows, key=lambda row: math.inf if row[key] is None else row[key])
    proposed = ranked[0] if seen.worth_it else next(row for row in rows if row["name"] == "reference")
    indicators = made.trust(proposed["sequence"]) if judge is None else proposed["trust"]
    if not order.trusted(indicators):
        shown = ", ".join(f"{indicator} {value:.2g}" for indicator, value in indicators.items())
        warn(f"the estimate of the proposed order may not hold ({shown}); retrain before you rely on it")
    setting.plan.reordered(tuple(proposed["sequence"])).save(setting.run.path("order.npz"))
    distinct = dict.fromkeys(tuple(row["sequence"]) for row in ranked)
    tried = [s for s in distinct if s != setting.sequence][:retrain]
    blind_orders = setting.random_orders("random", retrain)
    rows += [
        {"name": f"random {i + 1}", "sequence": list(s), "estimated": made.score(s)} for i, s in enumerate(blind_orders)
    ]
    runs = [setting.sequence, *tried, *blind_orders] if retrain else []
    true = true_losses(setting, runs, "retrain the best, as many random, and the reference")
    known = {tuple(s): loss for s, loss in zip(runs, true, strict=True)}
    for row in rows:
        row["true"] = known.get(tuple(row["sequence"]))
    sealed.write_json(
        setting.run.path("search.json"),
        order.finite({
            "estimator": name, "judge": judge, "judging": judging, "method": config.search,
            "evaluations": found.evaluations, "seconds": took, "random_best": best_drawn,
            "proposed": proposed["name"], "trust": indicators, "rows": rows, "outlook": asdict(seen),
            "sentence": seen.sentence(), "worth_it": seen.worth_it,
            "regret": proposed["true"] - min(true) if true else None,
            "batches": [{"source": s, "tokens": n} for s, n in zip(setting.sources, setting.lengths, strict=True)],
        }),
    )  # fmt: skip
    if not seen.worth_it:
        say(f"{setting.run.path('order.npz')} is the reference order; --set worth=0 searches all the same")
        return
    by = f" by {judge}" if judge is not None else ""
    say(
        f"proposed order: {proposed['name']}, predicted{by} {proposed[key]:.5f}: {setting.run.path('order.npz')} "
        "(datatools train --order)"
    )
    if true:
        say(
            f"retrained: proposed {proposed['true']:.5f}, the reference {true[0]:.5f}, best of {len(tried)} candidates "
            f"{min(true[1 : 1 + len(tried)], default=math.nan):.5f}, of {retrain} random orders "
            f"{min(true[1 + len(tried) :]):.5f}"
        )
        if proposed["true"] > min(true):
            warn("the proposed order is not the best of the retrained orders; see search.json")


def _outlook(setting: Setting, made: order.Surrogate, found: order.Found) -> order.Outlook:
    """Return what the first estimator expects of the best order that the search found.

    The score of the best order is biased downwards, so that the answer "nothing to win" is the safer one.
    """
    count = _DRAWN if order.estimator(made.name).fast(setting.config) else BLIND
    drawn = made.scores(setting.random_orders("outlook", count)).numpy()
    ok = order.trusted(made.trust(found.sequences[0]))
    usable = drawn[np.isfinite(drawn)]
    if len(usable) < 2:
        return order.Outlook(math.nan, math.nan, math.inf, setting.config.worth)
    return order.outlook(usable, found.scores[0], worth=setting.config.worth, trusted=ok)


def _judge(
    setting: Setting, judge: str, shortlist: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of the shortlist and of the best further orders, with the judge's scores, trust and cost."""
    known: dict[tuple[int, ...], dict[str, Any]] = {}
    spent = {"orders": 0, "cost_in_batch_gradients": 0.0}  # the cost of scores

    def scores(sequences: list[tuple[int, ...]]) -> list[float]:
        found = estimate(setting, judge, sequences, made=made, bar=bar)
        for sequence, value, trust in zip(sequences, found["estimated"], found["trust"], strict=True):
            known[sequence] = {"judged": value, "trust": trust}
        spent["orders"] += len(sequences)
        spent["cost_in_batch_gradients"] += found["cost_in_batch_gradients"] - found["precompute_in_batch_gradients"]
        return list(found["estimated"])

    made = surrogate(setting, judge)
    given = list(dict.fromkeys(tuple(row["sequence"]) for row in shortlist))
    label, budget = f"search: {judge} judges", setting.config.judged
    with setting.run.stage(label), progress(label, len(given) + budget, "orders") as bar:
        first = scores(given)
        options = {"budget": budget, "seed": derive_seed(setting.config.seed, "order", "refine")}
        refined = order.refine(scores, dict(zip(given, first, strict=True)), setting.sequence, **options)
    rows = shortlist + [
        {"name": f"refined {i + 1}", "sequence": list(s)} for i, s in enumerate(refined.sequences[:BLIND])
    ]
    losses = [row["judged"] for row in known.values()]
    if not any(map(math.isfinite, losses)):
        raise DataError(f"{judge}: {diverged(losses)}; choose another second estimator, or use only the first")
    if lost := diverged(losses):
        warn(f"{judge}: {lost}")
    if refined.scores:
        say(
            f"{judge}: best of the shortlist {min(first):.5f}, of {refined.evaluations} further orders "
            f"{refined.scores[0]:.5f}"
        )
    return [row | known[tuple(row["sequence"])] for row in rows], spent
