"""`datatools order`: what would another order of training have done?

One folder holds a reference run and what its tasks made of it; each task does what is not done yet.

    record    reference.npz, reference/ (anchors with optimizer states)
    estimate  estimates.json: predicted losses of random orders, of curricula, and of the orders of --set sequences=
    search    search.json, order.npz (for `datatools train --order`), the found orders retrained
    validate  validation.json: estimates against true retrainings
    map       map.json: what the place of a batch does to its own loss and to the held-out loss

Every true retraining is a file of its own in true/, so a killed run loses at most one; an estimator is made once, and
read from surrogates/ afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datatools import DataError, EnvironmentProblem, Order, UsageError, files, order
from datatools.files import sealed
from pipelines.order import setting as order_setting
from pipelines.order.setting import Setting
from pipelines.report import order_page as order_report
from pipelines.rows import preflight
from pipelines.runs.folder import Run, in_scratch
from pipelines.runs.messages import say, warn
from pipelines.runs.progress import Progress, progress
from pipelines.runs.seeds import derive_seed
from pipelines.runs.workers import alone
from pipelines.settings.order import OrderConfig
from pipelines.texts import size
from pipelines.training import cost, optimizers

_TOGETHER = 8  # orders that are scored between two words on progress
_BLIND = 8  # best random orders on a search's shortlist
_RECORDED = 32 << 30  # bytes of a recorded run, at most
HVP_IN_GRADIENTS = 4.0
"""What a Hessian-vector product counts in batch gradients (spec B.2: 2 to 4; the upper end)."""


def run(config: OrderConfig) -> Path:
    """Do `config.task` in `config.out`; returns the folder.

    Raises: UsageError, DataError, EnvironmentProblem, each with what to do.
    """
    alone("datatools order")
    optimizers.check(config.training)
    preflight.contradictions(config)
    with in_scratch(config) as kept, Run(kept.out, kept, "order", overwrite=kept.overwrite) as current:
        setting = order_setting.build(kept, current)
        _announce(setting)
        _check_estimators(setting)
        estimate = _estimate_cost(setting)
        estimate.announce()
        if config.dry_run:
            say("dry run: data and model load; no step was taken and nothing recorded")
            return config.out
        estimate.expect()
        order_report.read(current.folder, again=config.task)
        _TASKS[config.task](setting)
        page = order_report.render(current.folder)
        say(f"report: {page}")
    return config.out


# ----------------------------------------------------------------------------------------------------------------- cost


def _cost_of(name: str, setting: Setting) -> order.Cost:
    """What an estimator will take, before it is made: gradients, products, and the largest block of memory."""
    config, steps, n = setting.config, len(setting.sequence), len(setting.problem.batches)
    numbers = setting.parameters
    held = len(setting.problem.validation)
    a = min(config.pairwise_anchors, config.anchors)
    if name == "pairwise":
        return order.Cost(gradients=a * n + held, hvps=a * n, bytes=8 * n * numbers)
    if name == "reduced" and config.second_moment == "own" and config.sample_rows:
        gradients = config.anchors * n * (1 + setting.problem.share) + steps * setting.problem.share + held
        return order.Cost(gradients=gradients, bytes=8 * config.anchors * n * numbers)
    if name == "reduced" and config.second_moment == "own":
        k = config.dimensions
        return order.Cost(gradients=(config.anchors + 2 * k) * n + held, bytes=4 * (config.anchors + k) * n * numbers)
    if name == "reduced":
        k = min(config.dimensions, a * n + 3)
        return order.Cost(gradients=a * n + held, hvps=k * (a * n + held), bytes=4 * (a * n + k) * numbers)
    if name == "moments":
        return order.Cost(gradients=config.anchors * n + held, bytes=4 * config.anchors * n * numbers)
    if name == "table":
        return order.Cost(gradients=steps * n, bytes=4 * steps * n * (config.table_projection or numbers))
    if name == "groups":
        groups = len(set(setting.sources))
        block = min(setting.sources.count(s) for s in set(setting.sources))
        return order.Cost(gradients=groups * (groups - 1) * 2 * block, bytes=8 * numbers)
    return order.Cost(bytes=0)


def _per_score(name: str, setting: Setting) -> float:
    """Batch-gradient equivalents of one score."""
    steps, held = len(setting.sequence), len(setting.problem.validation)
    if name == "own-moments":
        return steps * (1 + HVP_IN_GRADIENTS) + held / 3
    if name == "reduced" and setting.config.second_moment == "own" and setting.config.sample_rows:
        return steps * setting.problem.share + held / 3
    return 0.0 if _fast(setting, name) else held / 3


def _fast(setting: Setting, name: str) -> bool:
    """Whether a score needs neither the model nor the rule."""
    return name in ("pairwise", "groups") or (name == "reduced" and setting.config.second_moment != "own")


def _announce(setting: Setting) -> None:
    """Gradients, products, bytes and the break-even number of orders, before anything is computed."""
    config, steps = setting.config, len(setting.sequence)
    held = len(setting.problem.validation)
    p = setting.parameters
    say(
        f"{len(setting.problem.batches)} batches of {config.training.batch_size} rows, {steps} steps, {p:,} trained "
        f"parameters, {held} held-out batches; a retraining is {steps} batch gradients"
    )
    for name in _used(config):
        cost, score = _cost_of(name, setting), _per_score(name, setting)
        total = cost.in_gradients(hvp=HVP_IN_GRADIENTS)
        even = order.break_even(total, steps, score)
        orders = f"worth it from {math.ceil(even):,} orders on" if math.isfinite(even) else "never cheaper: an oracle"
        say(
            f"  {name}: {cost.gradients:,.0f} gradients, {cost.hvps:,} Hessian-vector products, {size(cost.bytes)} of "
            f"memory = {total / steps:.1f} retrainings once, {score:.1f} gradients a score; {orders}"
        )
    frozen = [name for name in _used(config) if _is_frozen(name, config)]
    if frozen and config.warmup_steps < steps // 2 and config.training.optimizer == "adamw":
        warn(
            f"{' and '.join(frozen)} freezes Adam's second moment, and a fresh optimizer has none: its ranking may not "
            "hold; use --warmup-steps, or the estimators moments and reduced (second_moment own)"
        )
    if config.task == "validate":
        runs = config.orders + config.calibration + (config.seeds if _has_seeds(config) else 0) + config.references
        say(f"  validation: {runs} true runs, {runs * (steps + config.warmup_steps):,} gradients at most")
    if config.task == "search":
        runs = 2 * config.retrain + 1
        for judge in _used(config)[1:]:
            each = _per_score(judge, setting)
            say(f"  {judge} judges a shortlist and {config.judged:,} more orders, {each:.1f} gradients each")
        say(f"  search: {runs} true runs, {runs * (steps + config.warmup_steps):,} gradients at most")


def _work(setting: Setting) -> dict[str, float]:
    """Batch gradients by the label of their progress: what the task will take, whatever of it is done."""
    config, steps = setting.config, len(setting.sequence)
    held = len(setting.problem.validation)
    run_, work = steps + held / 3, dict[str, float]()
    references = config.references if config.task == "validate" else 1
    for number in range(references):
        work[f"reference run {number + 1}"] = steps + config.warmup_steps
    for name in _used(config):
        for number in range(references):
            work[f"{name} ({number + 1})"] = _cost_of(name, setting).in_gradients(hvp=HVP_IN_GRADIENTS)
    each = {name: _per_score(name, setting) for name in _used(config)}
    if config.task in ("estimate", "validate"):
        for name, score in each.items():
            work[f"{name}: scores"] = score * (config.orders + config.calibration) * references
    if config.task == "validate":
        early = min(8, config.orders)
        work["is there anything to win? orders"] = early * run_
        if _has_seeds(config):
            work["is there anything to win? seeds"] = config.seeds * (run_ + config.warmup_steps)
        work["true retrainings"] = (config.orders - early) * run_
        work["true runs to calibrate with"] = config.calibration * run_
    if config.task == "search":
        names = list(each)
        work[f"search: {config.search}"] = each[names[0]] * config.budget
        work["search: as many random orders"] = each[names[0]] * config.budget
        for judge in names[1:]:
            work[f"search: {judge} judges"] = each[judge] * (config.judged + 2 * _BLIND)
        work["retrain the best, as many random, and the reference"] = (2 * config.retrain + 1) * run_
    if config.task == "map":
        runs = config.map_batches * config.completions * (config.map_positions + 1)
        work["map"] = runs * (run_ if config.map_by == "retraining" else held / 3)
    return work


def _estimate_cost(setting: Setting) -> cost.Estimate:
    """What the task will take, from one timed pass over made-up tokens."""
    config, batches = setting.config, setting.problem.batches
    shapes = [part[1]["input_ids"].shape for batch in batches for part in batch]
    tokens = sum(int(rows) * int(width) for rows, width in shapes) / len(batches)
    found = cost.probe(setting.module, max(2, round(sum(int(width) for _, width in shapes) / len(shapes))))
    one = cost.UPDATE + found.seconds(tokens, len(shapes) / len(batches))
    work = _work(setting)
    anchors = _anchors(setting, every=any(map(_needs_every_step, _used(config))))
    kept = sum(_cost_of(name, setting).bytes for name in _used(config))
    references = config.references if config.task == "validate" else 1
    return cost.Estimate(
        parts={label: gradients * one for label, gradients in work.items() if gradients},
        tokens=round(sum(work.values()) * tokens),
        memory=cost.memory(found, 8 * found.trainable, config.training.micro_tokens) + kept,
        disk=references * anchors * 3 * 4 * setting.parameters + kept,
        based_on=f"{sum(work.values()):,.0f} batch gradients of {one:.3g} s, {found.text()}",
    )


def _used(config: OrderConfig) -> list[str]:
    """The estimators that the task makes: of a search those that search and judge."""
    if config.task == "map":
        return ["moments"] if config.map_by == "moments" else []
    if config.task == "record":
        return []
    return list(config.estimators[:2] if config.task == "search" else config.estimators)


def _is_frozen(name: str, config: OrderConfig) -> bool:
    """Whether an estimator freezes the second moment, and so needs a rule with linear moments."""
    return name == "pairwise" or (name == "reduced" and config.second_moment != "own")


def _check_estimators(setting: Setting) -> None:
    """Refuse what cannot be made or recorded, before hours of true retrainings and not after."""
    config = setting.config
    for name in _used(config):
        if _is_frozen(name, config):
            order.check_linear(setting.recipe)
        if name == "groups" and len(set(setting.sources)) < 2:
            raise UsageError("estimator groups: all batches are of one source; there is nothing to order")
        need = _cost_of(name, setting).bytes
        if name in ("moments", "reduced", "table") and need > order.LIMIT_BYTES:
            raise EnvironmentProblem(
                f"estimator {name} keeps {size(need)} of gradients, more than {size(order.LIMIT_BYTES)}; use adapters "
                "(--lora-rank 8), fewer --batches, or pairwise"
            )
    anchors = _anchors(setting, every=any(map(_needs_every_step, _used(config))))
    if (need := anchors * 3 * 4 * setting.parameters) > _RECORDED:
        raise EnvironmentProblem(
            f"{anchors} anchors of {setting.parameters:,} parameters are {size(need)}; use adapters (--lora-rank 8)"
        )


def _anchors(setting: Setting, *, every: bool) -> int:
    """Of a reference run: one a step, or as many as the settings ask for."""
    steps = len(setting.sequence)
    return steps + 1 if every else min(setting.config.anchors, steps + 1)


def _needs_every_step(name: str) -> bool:
    return name in ("table", "own-moments")


def _is_random(config: OrderConfig) -> bool:
    """Whether anything but the order is random in a run."""
    return config.warmup_steps > 0 or config.lora is not None


def _has_seeds(config: OrderConfig) -> bool:
    return config.seeds >= 2 and _is_random(config)


# -------------------------------------------------------------------------------------------------- reference and truth


def reference(setting: Setting, number: int = 0, *, every: bool = False) -> order.ReferenceRun:
    """The recorded run of a reference order: made, or continued, or read. every: with an anchor a step."""
    steps, anchors = len(setting.sequence), _anchors(setting, every=every)
    sequence = setting.sequence if number == 0 else setting.random_orders("reference", number)[number - 1]
    folder = setting.run.path("reference", f"{number:02d}-{anchors}")
    label = f"reference run {number + 1}"
    if (folder / "meta.json").is_file():
        with suppress(sealed.Damaged):  # `record` meets what is damaged, and makes it again
            found = order.ReferenceRun.load(folder, setting.device)
            found.check_same(setting.facts, "this run's")
            return found
    with setting.run.stage(label), progress(label, steps, "steps") as bar:
        params, states = setting.begin(0)
        done = [0]

        def observe(position: int) -> None:
            bar.advance(position - done[0])
            done[0] = position

        return order.record(
            setting.problem, setting.recipe, sequence, params, states,
            anchors=anchors, folder=folder, facts=setting.facts, observe=observe, damaged=_again,
        )  # fmt: skip


def _again(error: DataError) -> None:
    warn(f"{error}; it is made again")


def _kept(path: Path) -> dict[str, Any] | None:
    """The result in a file; None where there is none, or one that does not hold what was written, which is said."""
    if not path.is_file():
        return None
    try:
        return sealed.read_json(path)
    except sealed.Damaged as error:
        _again(error)
        return None


def _start(setting: Setting) -> order.Anchor:
    """Where the reference run and every true run begin."""
    if setting.start is None:
        setting.start = reference(setting).start
    return setting.start


def true_loss(setting: Setting, sequence: Sequence[int], *, seed: int = 0, label: str = "the reference order") -> float:
    """The held-out loss after training in an order for real; kept in true/, so that it is done once.

    Raises: DataError, with `label`, where training diverges.
    """
    path = setting.kept("true", "", tuple(sequence), seed)
    found = _kept(path)
    if found is not None and found.get("sequence") == list(sequence) and found.get("seed") == seed:
        return float(found["loss"])
    began = time.monotonic()
    if seed == 0:
        params, states = _start(setting).params, _start(setting).states
    else:
        params, fresh = setting.begin(seed)
        states = setting.recipe.init(params) if fresh is None else fresh
    try:
        end, _ = order.train(setting.problem, setting.recipe, sequence, params, states)
        loss: float = setting.problem.held_out_loss(end)
    except order.Diverged:
        loss = math.nan
    if not math.isfinite(loss):
        raise order.Diverged(
            f"training in {label} for real diverges: the loss is not finite. No estimate can be judged by it; lower "
            f"--learning-rate (now {setting.config.training.learning_rate:g}) or set training.gradient_clip, in "
            "another --out"
        )
    files.make_folder(path.parent)
    took = time.monotonic() - began
    sealed.write_json(path, {"sequence": list(sequence), "seed": seed, "loss": loss, "seconds": took})
    return loss


def true_losses(
    setting: Setting, sequences: Sequence[Sequence[int]], label: str, *, seeds: bool = False
) -> list[float]:
    """Of several orders; with seeds, of one order under the seeds 0, 1, ..."""
    found = []
    with setting.run.stage(label), progress(label, len(sequences), "runs") as bar:
        for number, sequence in enumerate(sequences):
            which = f"run {number + 1} of {len(sequences)} ({label})"
            found.append(true_loss(setting, sequence, seed=number if seeds else 0, label=which))
            bar.advance(1, loss=found[-1])
    return found


# ----------------------------------------------------------------------------------------------------------- estimators


def surrogate(setting: Setting, name: str, number: int = 0) -> order.Surrogate:
    """The estimator, made from the reference run of that number; kept in surrogates/, so that it is made once."""
    config = setting.config
    run_ = reference(setting, number, every=_needs_every_step(name))
    options: dict[str, Any] = {}
    if name in ("pairwise", "reduced"):
        options["anchors"] = min(config.pairwise_anchors, len(run_.anchors))
    if name == "reduced":
        options |= {"k": config.dimensions, "second_moment": config.second_moment}
    if name == "groups":
        names = sorted(set(setting.sources))
        options["groups"] = [names.index(source) for source in setting.sources]
    if name == "table" and config.table_projection:
        options |= {"projection": config.table_projection, "seed": config.seed}
    asked = files.digest(repr((run_.digest(), _asked(setting, name))).encode())
    folder = setting.run.path("surrogates", f"{name}-{number:02d}-{asked[:12]}")
    if (folder / "meta.json").is_file():
        try:
            return order.load_surrogate(folder, run_, setting.problem)
        except sealed.Damaged as error:
            _again(error)
    label = f"{name} ({number + 1})"
    work = _cost_of(name, setting).in_gradients(hvp=HVP_IN_GRADIENTS)
    with setting.run.stage(label), _spending(setting.problem, label, math.ceil(work)):
        made = order.precompute(name, run_, setting.problem, **options)
        made.save(folder, run_)
    return made


def _asked(setting: Setting, name: str) -> dict[str, Any]:
    """The settings that an estimator's numbers depend on, in the names of what is kept of it."""
    config, rows = setting.config, min(setting.config.sample_rows, setting.config.training.batch_size)
    known: dict[str, Any] = {"format": order.FORMAT}
    if not _needs_every_step(name) and name != "groups":
        known["recorded"] = config.anchors
    if _is_frozen(name, config):
        known |= {"anchors": config.pairwise_anchors, "products": config.products}
    if name == "reduced":
        own = config.second_moment == "own"
        known |= {"second_moment": config.second_moment, "rows": rows if own else None}
        known["k"] = None if own and rows else config.dimensions
    if name == "table":
        known["projection"] = config.table_projection
    if name == "own-moments":
        known["products"] = config.products
    return known


@contextmanager
def _spending(problem: order.Problem, label: str, total: int) -> Iterator[None]:
    """A bar of what the problem spends inside, in batch gradients."""
    first = problem.cost.in_gradients(hvp=HVP_IN_GRADIENTS)
    with progress(label, total, "batch gradients") as bar:

        def spent() -> None:
            bar.advance(int(problem.cost.in_gradients(hvp=HVP_IN_GRADIENTS) - first) - bar.done)

        problem.spent = spent
        try:
            yield
        finally:
            problem.spent = None


def estimate(
    setting: Setting,
    name: str,
    sequences: Sequence[Sequence[int]],
    number: int = 0,
    *,
    made: order.Surrogate | None = None,
    bar: Progress | None = None,
) -> dict[str, Any]:
    """Scores, trust and cost of an estimator for these orders; kept, and read when it was made for the same.

    A score that is not finite is inf here, null in the files, and not trusted. made, bar: the estimator, and a bar to
    advance, of a caller that asks for a few orders at a time.
    """
    listed = [list(s) for s in sequences]
    path = setting.kept("estimates", f"{name}-{number:02d}-", listed, _asked(setting, name))
    found = _kept(path)
    if found is None:
        files.make_folder(path.parent)
        found = order.finite(_estimated(setting, name, sequences, number, made, bar))
        sealed.write_json(path, found)
    elif bar is not None:
        bar.advance(len(sequences))
    return found | {
        "estimated": [math.inf if loss is None else loss for loss in found["estimated"]],
        "trust": [{key: math.nan if v is None else v for key, v in trust.items()} for trust in found["trust"]],
    }


def _estimated(
    setting: Setting,
    name: str,
    sequences: Sequence[Sequence[int]],
    number: int,
    made: order.Surrogate | None,
    bar: Progress | None,
) -> dict[str, Any]:
    part = made is not None
    made = made or surrogate(setting, name, number)
    ready = time.monotonic()
    before = replace(setting.problem.cost)
    scores = []
    with nullcontext(bar) if bar is not None else progress(f"{name}: scores", len(sequences), "orders") as bar:
        for lo in range(0, len(sequences), _TOGETHER):
            scores += made.scores(sequences[lo : lo + _TOGETHER]).tolist()
            bar.advance(len(sequences[lo : lo + _TOGETHER]))
    took = time.monotonic() - ready
    if _fast(setting, name) and not part:
        took = _time_scores(made, sequences)
    after = setting.problem.cost
    scoring = order.Cost(after.gradients - before.gradients, after.hvps - before.hvps, after.forwards - before.forwards)
    trusts = [made.trust(sequence) for sequence in sequences]  # of what was scored: no pass again
    made_for = round(made.cost.in_gradients(hvp=HVP_IN_GRADIENTS), 9)  # sums of shares, by where a resume began
    result: dict[str, Any] = {
        "estimated": scores,
        "trust": trusts,
        "trusted": [math.isfinite(loss) and order.trusted(t) for loss, t in zip(scores, trusts, strict=True)],
        "gradients": round(made.cost.gradients, 9),
        "hvps": made.cost.hvps,
        "bytes": made.cost.bytes,
        "cost_in_batch_gradients": round(made_for + scoring.in_gradients(hvp=HVP_IN_GRADIENTS), 9),
        "precompute_in_batch_gradients": made_for,
        "seconds_a_score": took / max(1, len(sequences)),
    }
    matrix = getattr(made, "matrix", None)
    if callable(matrix) and not part and bool((costs := matrix()).isfinite().all()):
        result["precedence"] = costs.tolist()
    return result


def _time_scores(made: order.Surrogate, sequences: Sequence[Sequence[int]]) -> float:
    """Seconds for `len(sequences)` scores, measured over 256 at a time."""
    many = [sequences[i % len(sequences)] for i in range(256)]
    start = time.monotonic()
    made.scores(many)
    return (time.monotonic() - start) * len(sequences) / len(many)


def _curricula(setting: Setting) -> dict[str, tuple[int, ...]]:
    """Candidates by length, by loss and gradient norm at the start, by source; and their reverses."""
    params, count = _start(setting).params, len(setting.problem.batches)
    losses = [setting.problem.train_loss(params, b) for b in range(count)]
    norms = []
    with _spending(setting.problem, "curricula: losses and gradient norms", count):
        for b in range(count):
            grads = setting.problem.gradient(params, b)
            norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads.values())))
    values = {"length": setting.lengths, "loss": losses, "gradient norm": norms}
    return {"reference": setting.sequence} | order.curricula(setting.sequence, values, setting.sources)


# ---------------------------------------------------------------------------------------------------------------- tasks


def _record(setting: Setting) -> None:
    run_ = reference(setting)
    loss = setting.problem.held_out_loss(run_.end.params)
    say(f"reference run: held-out loss {setting.problem.held_out_loss(run_.start.params):.4f} -> {loss:.4f}")


def _estimate(setting: Setting) -> None:
    named = _curricula(setting)
    for path in setting.config.sequences:
        given = Order.load(path)
        if given.batches != setting.plan.batches:
            raise DataError(f"order {path}: its batches are not those of this run; estimate orders made from it")
        try:
            sequence = setting.plan.reordered(given.sequence).sequence
        except UsageError as error:
            raise DataError(f"{path}: {error}") from error
        named[path.name if path.name not in named else str(path)] = sequence
    named |= {f"random {i + 1}": s for i, s in enumerate(setting.random_orders("random", setting.config.orders))}
    found = {name: estimate(setting, name, list(named.values())) for name in setting.config.estimators}
    table = [
        {"name": label, "sequence": list(sequence)} | {name: found[name]["estimated"][i] for name in found}
        for i, (label, sequence) in enumerate(named.items())
    ]
    sealed.write_json(setting.run.path("estimates.json"), order.finite({"orders": table, "estimators": found}))
    for name in found:
        if lost := _diverged(found[name]["estimated"]):
            warn(f"{name}: {lost}")
    first = setting.config.estimators[0]
    for row in sorted(table, key=lambda row: row[first])[:8]:
        say(f"  {row[first]:.5f}  {row['name']}")


def _search(setting: Setting) -> None:
    """The first estimator searches. An optimum of an estimate is where its errors help it most, so the second, where
    one is named, judges a shortlist (what was found, the best of as many random orders, and the curricula), and goes on
    from it with `judged` orders of its own.
    """
    config, name = setting.config, setting.config.estimators[0]
    judge = config.estimators[1] if len(config.estimators) > 1 else None
    if not _fast(setting, name) and config.budget > 1000:
        warn(f"{config.budget:,} scores of {name}, each a run of the rule: lower --set budget=, or use pairwise")
    made = surrogate(setting, name)
    shortlist = _curricula(setting)
    with setting.run.stage("search"):
        start = time.monotonic()
        options: dict[str, Any] = {"budget": config.budget, "seed": config.seed, "starts": list(shortlist.values())}
        with progress(f"search: {config.search}", config.budget, "orders") as bar:
            found = order.search(made, config.search, keep=max(1, config.retrain), advance=bar.advance, **options)
        took = time.monotonic() - start
        # others than those that the search itself may have drawn; the reference is scored with them, and left out
        options = {"budget": found.evaluations + 1, "seed": derive_seed(config.seed, "order", "blind")}
        with progress("search: as many random orders", found.evaluations + 1, "orders") as bar:
            blind = order.search(made, "random", keep=_BLIND + 1, advance=bar.advance, **options)
    drawn = [(s, v) for s, v in zip(blind.sequences, blind.scores, strict=True) if s != setting.sequence][:_BLIND]
    best_drawn = drawn[0][1] if drawn else math.nan
    say(
        f"{config.search}: predicted {found.scores[0]:.5f}, the reference {made.score(setting.sequence):.5f}, best of "
        f"{found.evaluations:,} random {best_drawn:.5f} ({found.evaluations / max(took, 1e-9):,.0f} a second)"
    )
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
    proposed = ranked[0]
    indicators = made.trust(proposed["sequence"]) if judge is None else proposed["trust"]
    if not order.trusted(indicators):
        shown = ", ".join(f"{indicator} {value:.2g}" for indicator, value in indicators.items())
        warn(f"the estimate of the proposed order may not hold ({shown}); retrain before you believe it")
    setting.plan.reordered(tuple(proposed["sequence"])).save(setting.run.path("order.npz"))
    distinct = dict.fromkeys(tuple(row["sequence"]) for row in ranked)
    tried = [s for s in distinct if s != setting.sequence][: config.retrain]
    blind_orders = setting.random_orders("random", config.retrain)
    rows += [
        {"name": f"random {i + 1}", "sequence": list(s), "estimated": made.score(s)} for i, s in enumerate(blind_orders)
    ]
    runs = [setting.sequence, *tried, *blind_orders] if config.retrain else []
    true = true_losses(setting, runs, "retrain the best, as many random, and the reference")
    known = {tuple(s): loss for s, loss in zip(runs, true, strict=True)}
    for row in rows:
        row["true"] = known.get(tuple(row["sequence"]))
    sealed.write_json(
        setting.run.path("search.json"),
        order.finite({
            "estimator": name, "judge": judge, "judging": judging, "method": config.search,
            "evaluations": found.evaluations, "seconds": took, "random_best": best_drawn,
            "proposed": proposed["name"], "trust": indicators, "rows": rows,
            "regret": proposed["true"] - min(true) if true else None,
            "batches": [{"source": s, "tokens": n} for s, n in zip(setting.sources, setting.lengths, strict=True)],
        }),
    )  # fmt: skip
    by = f" by {judge}" if judge is not None else ""
    say(
        f"proposed order: {proposed['name']}, predicted{by} {proposed[key]:.5f}: {setting.run.path('order.npz')} "
        "(datatools train --order)"
    )
    if true:
        say(
            f"retrained: proposed {proposed['true']:.5f}, the reference {true[0]:.5f}, best of {len(tried)} candidates "
            f"{min(true[1 : 1 + len(tried)], default=math.nan):.5f}, of {config.retrain} random orders "
            f"{min(true[1 + len(tried) :]):.5f}"
        )
        if proposed["true"] > min(true):
            warn("the proposed order is not the best of those that were retrained; search.json has them")


def _judge(
    setting: Setting, judge: str, shortlist: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the shortlist, and of the best of `judged` orders that go on from it, with the judge's score and
    trust; and how many it scored, at what cost.
    """
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
        {"name": f"refined {i + 1}", "sequence": list(s)} for i, s in enumerate(refined.sequences[:_BLIND])
    ]
    losses = [row["judged"] for row in known.values()]
    if not any(map(math.isfinite, losses)):
        raise DataError(f"{judge}: {_diverged(losses)}; name another second estimator, or only the first")
    if lost := _diverged(losses):
        warn(f"{judge}: {lost}")
    if refined.scores:
        say(
            f"{judge}: best of the shortlist {min(first):.5f}, of {refined.evaluations} orders of its own "
            f"{refined.scores[0]:.5f}"
        )
    return [row | known[tuple(row["sequence"])] for row in rows], spent


def _validate(setting: Setting) -> None:
    config = setting.config
    reference_loss = true_loss(setting, setting.sequence)
    orders = setting.random_orders("random", config.orders)
    early = true_losses(setting, orders[: min(8, len(orders))], "is there anything to win? orders")
    over_seeds = None if _is_random(config) else [reference_loss] * 2
    if _has_seeds(config):
        same = [setting.sequence] * config.seeds
        over_seeds = true_losses(setting, same, "is there anything to win? seeds", seeds=True)
    prize = order.prize(early, over_seeds)
    say(prize.sentence())
    if prize.worth_it is False:
        warn("little to win by ordering: the estimates below rank differences that other random draws would drown")
    true = true_losses(setting, orders, "true retrainings")
    extra = setting.random_orders("calibration", config.calibration)
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
        warn(f"calibrated: leaves out {left}, whose estimates are not all finite")
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
    lost = _diverged(entry["estimated"])
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


def _diverged(estimated: Sequence[float]) -> str:
    """How many estimates are not finite; "" for none."""
    count = sum(not math.isfinite(loss) for loss in estimated)
    if not count:
        return ""
    return (
        f"{count} of {len(estimated)} estimates are not finite and rank as worst: the estimated runs diverge; lower "
        "--learning-rate"
    )


def _map(setting: Setting) -> None:
    config = setting.config
    run_ = reference(setting)
    chosen = list(dict.fromkeys(setting.sequence))
    rng = np.random.default_rng(derive_seed(config.seed, "order", "map"))
    batches = sorted(int(b) for b in rng.choice(chosen, size=min(config.map_batches, len(chosen)), replace=False))
    if config.map_by == "moments":
        made = surrogate(setting, "moments")
        assert hasattr(made, "final")
        final = made.final
    else:

        def final(sequence: Sequence[int | None]) -> order.Params:
            return order.train(setting.problem, setting.recipe, sequence, run_.start.params, run_.start.states)[0]

    runs = len(batches) * config.completions * (config.map_positions + 1)
    say(f"map: {runs} runs of {len(setting.sequence)} steps by {config.map_by}")
    parts = []
    with setting.run.stage("map"), progress("map", runs, "runs") as bar:
        for batch in batches:  # a file a batch: what a kill leaves is used
            asked = (config.map_positions, config.completions, [_asked(setting, name) for name in _used(config)])
            path = setting.kept("maps", f"{config.map_by}-{batch}-", *asked)
            part = _kept(path)
            if part is None:
                found = order.memory_map(
                    setting.sequence, final, setting.problem.train_loss, setting.problem.held_out_loss,
                    batches=[batch], positions=config.map_positions, completions=config.completions,
                    seed=derive_seed(config.seed, "order", "map"), advance=bar.advance,
                )  # fmt: skip
                files.make_folder(path.parent)
                part = {
                    "batch": batch, "source": setting.sources[batch], "positions": list(found.positions),
                    "memory": found.memory[0].tolist(), "held_out": found.held_out[0].tolist(),
                    "spread": found.spread[0].tolist(), "effect": found.position_effect[0].tolist(),
                    "without_memory": float(found.without_memory[0]),
                    "without_held_out": float(found.without_held_out[0]),
                    "counterfactual": float(found.counterfactual[0]),
                }  # fmt: skip
                sealed.write_json(path, part)
            else:
                bar.advance(config.completions * (config.map_positions + 1))
            parts.append(part)
    whole = {"by": config.map_by, "completions": config.completions, "rows": parts}
    sealed.write_json(setting.run.path("map.json"), whole)
    for part in parts:
        late = part["effect"][-1] - part["effect"][0]
        say(
            f"  batch {part['batch']} ({part['source']}): training on it lowers its loss by "
            f"{part['counterfactual']:.4f}; last instead of first: {late:+.4f}"
        )


_TASKS: dict[str, Callable[[Setting], None]] = {
    "record": _record,
    "estimate": _estimate,
    "search": _search,
    "validate": _validate,
    "map": _map,
}

__all__ = ["reference", "run", "true_loss"]
