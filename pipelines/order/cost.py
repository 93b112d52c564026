"""The cost of `datatools order`, reported before anything is computed; what costs too much is refused."""

from __future__ import annotations

import math

from datatools import EnvironmentProblem, order
from optim import AdamWRule
from pipelines.order.setting import BLIND, Setting
from pipelines.runs.messages import say, warn
from pipelines.settings.order import OrderConfig
from pipelines.texts import size
from pipelines.training import cost

RECORDED = 32 << 30  # maximum bytes of a recorded run
PLAN = "plan: brackets between sources"
RETRAINED = "plan: the planned order, its reverse, sources mixed, and random orders of sources"


def announce(setting: Setting) -> None:
    """Print gradients, products, bytes and the break-even number of orders before anything is computed.

    Args:
        setting: The setting of the run.
    """
    config, steps = setting.config, len(setting.sequence)
    held = len(setting.problem.validation)
    p = setting.parameters
    say(
        f"{len(setting.problem.batches)} batches of {config.training.batch_size} rows, {steps} steps, {p:,} trained "
        f"parameters, {held} held-out batches; a retraining costs {steps} batch gradients"
    )
    question = setting.question
    for name in used(config):
        record = order.estimator(name)
        once, score = record.expected(question), record.per_score(question)
        total = once.in_gradients(hvp=order.HVP_IN_GRADIENTS)
        even = order.break_even(total, steps, score)
        orders = f"pays off from {math.ceil(even):,} orders" if math.isfinite(even) else "never cheaper than retraining"
        say(
            f"  {name}: {once.gradients:,.0f} gradients, {once.hvps:,} Hessian-vector products, {size(once.bytes)} of "
            f"memory = {total / steps:.1f} retrainings once, {score:.1f} gradients per score; {orders}"
        )
    frozen = [name for name in used(config) if order.estimator(name).freezes(config)]
    if (
        frozen
        and config.warmup_steps < steps // 2
        and all(isinstance(rule, AdamWRule) for rule in setting.recipe.rules.values())
    ):
        warn(
            f"{' and '.join(frozen)} freezes Adam's second moment, but a new optimizer has none: the ranking may not "
            "hold; use --warmup-steps, or the estimators moments and reduced (second_moment own)"
        )
    if config.task == "plan":
        whole = cost_of_plan(setting)
        say(
            f"  {len(sources_of(setting))} sources: {whole.gradients:,.0f} gradients, {whole.hvps:,} Hessian-vector "
            f"products = {whole.in_gradients(hvp=order.HVP_IN_GRADIENTS) / steps:.1f} retrainings; "
            f"{3 + config.retrain if config.retrain else 0} true runs if an order can matter"
        )
    if config.task == "validate":
        runs = config.orders + config.calibration + (config.seeds if has_seeds(config) else 0) + config.references
        say(f"  validation: {runs} true runs, {runs * (steps + config.warmup_steps):,} gradients at most")
    if config.task == "curricula":
        most = len(config.scores) * len(config.shapes) + 1
        runs = (most if config.train_all else config.retrain + 1) + config.retrain
        say(f"  curricula: {most} orders at most; {runs} true runs, {runs * (steps + config.warmup_steps):,} gradients")
    if config.task == "search":
        runs = 2 * config.retrain + 1
        for judge in used(config)[1:]:
            each = order.estimator(judge).per_score(question)
            say(f"  {judge} judges a shortlist and {config.judged:,} more orders, {each:.1f} gradients each")
        say(f"  search: {runs} true runs, {runs * (steps + config.warmup_steps):,} gradients at most")


def _work(setting: Setting) -> dict[str, float]:
    """Return the batch gradients of the whole task, by the label of their progress."""
    config, steps = setting.config, len(setting.sequence)
    held = len(setting.problem.validation)
    run_, work = steps + held / 3, dict[str, float]()
    references = config.references if config.task == "validate" else 1
    if config.task == "plan":
        references = int(anchors_of_plan(setting) > 1 or config.retrain > 0)
        work[PLAN] = cost_of_plan(setting).in_gradients(hvp=order.HVP_IN_GRADIENTS) + config.warmup_steps
        work[RETRAINED] = (3 + config.retrain) * run_ if config.retrain else 0.0
    for number in range(references):
        work[f"reference run {number + 1}"] = steps + config.warmup_steps
    for name in used(config):
        for number in range(references):
            once = order.estimator(name).expected(setting.question)
            work[f"{name} ({number + 1})"] = once.in_gradients(hvp=order.HVP_IN_GRADIENTS)
    each = {name: order.estimator(name).per_score(setting.question) for name in used(config)}
    if config.task in ("estimate", "validate"):
        for name, score in each.items():
            work[f"{name}: scores"] = score * (config.orders + config.calibration) * references
    if config.task == "validate":
        early = min(8, config.orders)
        work["is there anything to win? orders"] = early * run_
        if has_seeds(config):
            work["is there anything to win? seeds"] = config.seeds * (run_ + config.warmup_steps)
        work["true retrainings"] = (config.orders - early) * run_
        work["true runs to calibrate with"] = config.calibration * run_
    if config.task == "search":
        names = list(each)
        work[f"search: {config.search}"] = each[names[0]] * config.budget
        work["search: as many random orders"] = each[names[0]] * config.budget
        for judge in names[1:]:
            work[f"search: {judge} judges"] = each[judge] * (config.judged + 2 * BLIND)
        work["retrain the best, as many random, and the reference"] = (2 * config.retrain + 1) * run_
    if config.task == "curricula":
        most = len(config.scores) * len(config.shapes) + 1
        for name, score in each.items():
            work[f"{name}: scores"] = score * (most + config.retrain + (64 if score == 0 else max(2, config.retrain)))
        runs = (most if config.train_all else config.retrain + 1) + config.retrain
        work["curricula: scores"] = 4.0 * len(setting.problem.batches)
        work["curricula: retrained"] = runs * run_
    if config.task == "map":
        batches = min(config.map_batches, len(set(setting.sequence)))
        runs = batches * config.completions * (positions_of(setting) + 1)
        work["map"] = runs * (run_ if config.map_by == "retraining" else held / 3)
    return work


def estimate_cost(setting: Setting) -> cost.Estimate:
    """Return the expected cost of the task, from one timed pass over synthetic tokens.

    Args:
        setting: The setting of the run.
    """
    config, batches = setting.config, setting.problem.batches
    shapes = [part[1]["input_ids"].shape for batch in batches for part in batch]
    tokens = sum(int(rows) * int(width) for rows, width in shapes) / len(batches)
    found = cost.probe(setting.module, max(2, round(sum(int(width) for _, width in shapes) / len(shapes))))
    one = cost.UPDATE + found.seconds(tokens, len(shapes) / len(batches))
    work = _work(setting)
    anchors = most_anchors(setting)
    kept = sum(order.estimator(name).expected(setting.question).bytes for name in used(config))
    references = config.references if config.task == "validate" else 1
    return cost.Estimate(
        parts={label: gradients * one for label, gradients in work.items() if gradients},
        tokens=round(sum(work.values()) * tokens),
        memory=cost.memory(found, 8 * found.trainable, config.training.micro_tokens) + kept,
        disk=references * anchors * 3 * 4 * setting.parameters + kept,
        based_on=f"{sum(work.values()):,.0f} batch gradients of {one:.3g} s, {found.text()}",
    )


def positions_of(setting: Setting) -> int:
    """Return the number of positions of a map, which is at most the number of steps.

    Args:
        setting: The setting of the run.
    """
    return min(setting.config.map_positions, len(setting.sequence))


def used(config: OrderConfig) -> list[str]:
    """Return the estimators that the task uses; for a search, those that search and judge.

    Args:
        config: The settings.
    """
    if config.task == "map":
        return [] if config.map_by == "retraining" else [config.map_by]
    if config.task in ("record", "plan"):
        return []
    if config.task == "curricula":
        return [] if config.train_all else list(config.estimators[:1])
    return list(config.estimators[:2] if config.task == "search" else config.estimators)


def check_estimators(setting: Setting) -> None:
    """Refuse estimators that cannot be computed or recorded, before any true retraining.

    Args:
        setting: The setting of the run.

    Raises:
        EnvironmentProblem: Something is too large.
        UsageError: An estimator cannot be used with these settings.
    """
    config = setting.config
    for name in used(config):
        record = order.estimator(name)
        record.check(setting.question)
        need = record.expected(setting.question).bytes
        if record.keeps_gradients and need > order.LIMIT_BYTES:
            raise EnvironmentProblem(
                f"estimator {name} keeps {size(need)} of gradients, more than {size(order.LIMIT_BYTES)}; use adapters "
                "(--lora-rank 8), fewer --batches, or pairwise"
            )
    anchors = most_anchors(setting)
    if (need := anchors * 3 * 4 * setting.parameters) > RECORDED:
        raise EnvironmentProblem(
            f"{anchors} anchors of {setting.parameters:,} parameters are {size(need)}; use adapters (--lora-rank 8)"
        )


def most_anchors(setting: Setting) -> int:
    """Return the largest number of anchors that an estimator of the task needs.

    Args:
        setting: The setting of the run.
    """
    return anchors_of(setting, every=any(order.estimator(name).every_step for name in used(setting.config)))


def anchors_of(setting: Setting, *, every: bool) -> int:
    """Return the number of anchors of a reference run.

    Args:
        setting: The setting of the run.
        every: Whether there is an anchor at every step.
    """
    steps = len(setting.sequence)
    return steps + 1 if every else min(setting.config.anchors, steps + 1)


def is_random(config: OrderConfig) -> bool:
    """Return whether a run has random choices other than the order.

    Args:
        config: The settings.
    """
    return config.warmup_steps > 0 or config.lora is not None


def has_seeds(config: OrderConfig) -> bool:
    """Return whether the spread over seeds is measured.

    Args:
        config: The settings.
    """
    return config.seeds >= 2 and is_random(config)


def sources_of(setting: Setting) -> dict[str, list[int]]:
    """Return the batches of each source.

    Args:
        setting: The setting of the run.
    """
    found: dict[str, list[int]] = {name: [] for name in sorted(set(setting.sources))}
    for batch, name in enumerate(setting.sources):
        found[name].append(batch)
    return found


def anchors_of_plan(setting: Setting) -> int:
    """Return the number of points at which sources are compared.

    Args:
        setting: The setting of the run.
    """
    return min(setting.config.plan_anchors, setting.config.anchors, len(setting.sequence) + 1)


def cost_of_plan(setting: Setting) -> order.Cost:
    """Return the expected cost of the brackets, without that of a recorded run and of retraining.

    Args:
        setting: The setting of the run.
    """
    count = sum(min(len(batches), setting.config.replicates) for batches in sources_of(setting).values())
    anchors = anchors_of_plan(setting)
    return order.Cost(
        gradients=anchors * count + len(setting.problem.validation),
        hvps=anchors * count,
        bytes=12 * count * setting.parameters,
    )
