"""The task `validate`: estimates compared with true retrainings."""

from __future__ import annotations

from typing import Any

import numpy as np

from datatools import order
from datatools.files import sealed
from pipelines.order.cost import has_seeds, is_random
from pipelines.order.estimate import diverged, estimate
from pipelines.order.kept import prepare, true_loss, true_losses
from pipelines.order.setting import Setting
from pipelines.report import order_page as order_report
from pipelines.runs import following
from pipelines.runs.messages import say, warn
from pipelines.runs.seeds import derive_seed


def validate(setting: Setting) -> None:
    """Run the task `validate`: measure whether the order matters, and how well each estimate ranks orders.

    Args:
        setting: The setting of the run.
    """
    config = setting.config
    orders = setting.random_orders("random", config.orders)
    extra = setting.random_orders("calibration", config.calibration)
    seeds = range(config.seeds) if has_seeds(config) else range(1)
    prepare(setting, [*((setting.sequence, seed) for seed in seeds), *((one, 0) for one in [*orders, *extra])])
    following.leave()
    reference_loss = true_loss(setting, setting.sequence)
    early = true_losses(setting, orders[: min(8, len(orders))], "is there anything to win? orders")
    over_seeds = None if is_random(config) else [reference_loss] * 2
    if has_seeds(config):
        same = [setting.sequence] * config.seeds
        over_seeds = true_losses(setting, same, "is there anything to win? seeds", seeds=True)
    prize = order.prize(early, over_seeds)
    say(prize.sentence())
    if prize.worth_it is False:
        warn("the order has little effect: the estimates below rank differences smaller than those between seeds")
    true = true_losses(setting, orders, "true retrainings")
    fitted = true_losses(setting, extra, "true runs to calibrate with") if extra else []
    known: dict[str, Any] = {}
    table: dict[str, list[float]] = {}
    for name in config.estimators:
        found = estimate(setting, name, [*orders, *extra])
        table[name] = found["estimated"]
        entry = _entry(found["estimated"][: len(orders)], true, reference_loss, found, config.seed)
        others = []
        for number in range(1, config.references):
            again = estimate(setting, name, orders, number)
            others.append(again["estimated"])
            entry.setdefault("references", []).append(
                {
                    "spearman": order.spearman(again["estimated"], true),
                    "agreement": order.spearman(again["estimated"], found["estimated"][: len(orders)]),
                }
            )
        known[name] = entry
        if others:
            mean = np.mean([found["estimated"][: len(orders)], *others], axis=0).tolist()
            total = found | {"cost_in_batch_gradients": found["cost_in_batch_gradients"] * config.references}
            known[f"{name}, mean of {config.references} references"] = _entry(
                mean, true, reference_loss, total | {"trust": [], "trusted": []}, config.seed
            )
        if "precedence" in found:
            entry["precedence"] = found["precedence"]
    usable = [name for name in config.estimators if np.isfinite(table[name]).all()]
    if fitted and len(usable) < len(config.estimators):
        left = ", ".join(sorted(set(config.estimators) - set(usable)))
        warn(f"calibrated: excludes {left}, whose estimates are not all finite")
    if fitted and usable:
        mixed, weights = order.calibrated(
            np.array([table[name] for name in usable]), [*true, *fitted],
            range(len(orders), len(orders) + len(extra)),
        )  # fmt: skip
        cost = sum(known[name]["cost_in_batch_gradients"] for name in usable)
        cost += len(extra) * len(setting.sequence)
        known["calibrated"] = _entry(
            mixed[: len(orders)].tolist(), true, reference_loss, {"cost_in_batch_gradients": cost}, config.seed
        ) | {"weights": dict(zip(usable, weights, strict=True)), "true_runs": len(extra)}
    result = {
        "format": 1,
        "reference": {"sequence": list(setting.sequence), "loss": reference_loss},
        "anything_to_win": {
            "over_orders": prize.over_orders, "over_seeds": prize.over_seeds, "ratio": prize.ratio,
            "worth_it": prize.worth_it, "sentence": prize.sentence(),
        },
        "orders": [{"sequence": list(s), "true": t} for s, t in zip(orders, true, strict=True)],
        "estimators": known,
        "retraining_in_batch_gradients": len(setting.sequence),
        "batches": [{"source": s, "tokens": n} for s, n in zip(setting.sources, setting.lengths, strict=True)],
    }  # fmt: skip
    sealed.write_json(setting.run.path("validation.json"), order.finite(result))
    for label, entry in known.items():
        say(_sentence(label, entry))


def _entry(
    estimated: list[float], true: list[float], reference_loss: float, found: dict[str, Any], seed: int
) -> dict[str, Any]:
    judged = order.judge(estimated, true, reference=reference_loss, seed=derive_seed(seed, "bootstrap"))
    kept = {k: v for k, v in found.items() if k not in ("estimated", "precedence")}
    return judged.as_dict() | kept | {"true": true, "estimated": estimated}


def _sentence(name: str, entry: dict[str, Any]) -> str:
    lost = diverged(entry["estimated"])
    if entry["spearman"] is None:
        return f"  {name}: {lost or 'its estimates do not vary'}"
    interval = entry["spearman_interval"]
    between = "no interval" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    if (few := len(entry["true"])) < order_report.FEWEST_ORDERS:
        between += f"; of {few} orders, too few for a verdict"
    doubt = [ok for ok in entry.get("trusted", []) if not ok]
    note = f"; not to be trusted for {len(doubt)} of {len(entry['trusted'])}" if doubt else ""
    if others := [one["spearman"] for one in entry.get("references", []) if one["spearman"] is not None]:
        note = f"; from other references {', '.join(f'{value:.3f}' for value in others)}{note}"
    return (
        f"  {name}: Spearman {entry['spearman']:.3f} ({between}), regret {entry['regret']:.4g} (random "
        f"{entry['regret_random']:.4g}), {entry['cost_in_batch_gradients']:,.0f} batch gradients{note}"
        f"{'; ' if lost else ''}{lost}"
    )
