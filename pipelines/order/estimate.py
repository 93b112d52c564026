"""Estimates of other orders: the estimators, which are computed once and kept, and the task `estimate`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from datatools import DataError, Order, UsageError, files, order
from datatools.files import sealed
from pipelines.order.kept import again, kept, reference, start
from pipelines.order.setting import Setting
from pipelines.runs.messages import say, warn
from pipelines.runs.progress import Progress, progress

_TOGETHER = 8  # orders that are scored between two progress reports


def surrogate(setting: Setting, name: str, number: int = 0) -> order.Surrogate:
    """Return an estimator made from a reference run; it is kept in surrogates/ and computed only once.

    Args:
        setting: The setting of the run.
        name: The name of the estimator.
        number: The number of the reference run.
    """
    record = order.estimator(name)
    run_ = reference(setting, number, every=record.every_step)
    asked = files.digest(repr((run_.digest(), depends_on(setting, name))).encode())
    folder = setting.run.path("surrogates", f"{name}-{number:02d}-{asked[:12]}")
    if (folder / "meta.json").is_file():
        try:
            return order.load_surrogate(folder, run_, setting.problem)
        except sealed.Damaged as error:
            again(error)
    label = f"{name} ({number + 1})"
    work = record.expected(setting.question).in_gradients(hvp=order.HVP_IN_GRADIENTS)
    with setting.run.stage(label), spending(setting.problem, label, math.ceil(work)):
        made = order.precompute(name, run_, setting.problem, **record.options(setting.question))
        made.save(folder, run_)
    return made


def depends_on(setting: Setting, name: str) -> dict[str, Any]:
    """Return the settings on which an estimator's numbers depend, for the names of its files.

    Args:
        setting: The setting of the run.
        name: The name of the estimator.
    """
    return {"format": order.FORMAT} | order.estimator(name).depends_on(setting.question)


@contextmanager
def spending(problem: order.Problem, label: str, total: int) -> Iterator[None]:
    """Show a bar of the batch gradients that a problem spends inside the `with` block.

    Args:
        problem: The problem.
        label: The label of the bar.
        total: The expected number of batch gradients.
    """
    first = problem.cost.in_gradients(hvp=order.HVP_IN_GRADIENTS)
    with progress(label, total, "batch gradients") as bar:

        def spent() -> None:
            bar.advance(int(problem.cost.in_gradients(hvp=order.HVP_IN_GRADIENTS) - first) - bar.done)

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
    """Return scores, trust and cost of an estimator for some orders; they are kept and read again for the same orders.

    A score that is not finite is inf here, null in the files, and not trusted.

    Args:
        setting: The setting of the run.
        name: The name of the estimator.
        sequences: The orders.
        number: The number of the reference run.
        made: The estimator, from a caller that scores a few orders at a time.
        bar: The bar of such a caller.
    """
    listed = [list(s) for s in sequences]
    path = setting.kept("estimates", f"{name}-{number:02d}-", listed, depends_on(setting, name))
    found = kept(path)
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
    if order.estimator(name).fast(setting.config) and not part:
        took = _time_scores(made, sequences)
    after = setting.problem.cost
    scoring = order.Cost(after.gradients - before.gradients, after.hvps - before.hvps, after.forwards - before.forwards)
    trusts = [made.trust(sequence) for sequence in sequences]  # for scored orders this needs no further pass
    made_for = round(
        made.cost.in_gradients(hvp=order.HVP_IN_GRADIENTS), 9
    )  # rounding removes differences from where a resume began
    result: dict[str, Any] = {
        "estimated": scores,
        "trust": trusts,
        "trusted": [math.isfinite(loss) and order.trusted(t) for loss, t in zip(scores, trusts, strict=True)],
        "gradients": round(made.cost.gradients, 9),
        "hvps": made.cost.hvps,
        "bytes": made.cost.bytes,
        "cost_in_batch_gradients": round(made_for + scoring.in_gradients(hvp=order.HVP_IN_GRADIENTS), 9),
        "precompute_in_batch_gradients": made_for,
        "seconds_a_score": took / max(1, len(sequences)),
    }
    if not part and (costs := made.matrix()) is not None and bool(costs.isfinite().all()):
        result["precedence"] = costs.tolist()
    return result


def _time_scores(made: order.Surrogate, sequences: Sequence[Sequence[int]]) -> float:
    """Return the seconds of `len(sequences)` scores, measured over 256 at a time."""
    many = [sequences[i % len(sequences)] for i in range(256)]
    start = time.monotonic()
    made.scores(many)
    return (time.monotonic() - start) * len(sequences) / len(many)


def curricula(setting: Setting) -> dict[str, tuple[int, ...]]:
    """Return candidate orders by length, by loss and gradient norm at the start, by source, and their reverses.

    Args:
        setting: The setting of the run.
    """
    params, count = start(setting).params, len(setting.problem.batches)
    losses = [setting.problem.train_loss(params, b) for b in range(count)]
    norms = []
    with spending(setting.problem, "curricula: losses and gradient norms", count):
        for b in range(count):
            grads = setting.problem.gradient(params, b)
            norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads.values())))
    values = {"length": setting.lengths, "loss": losses, "gradient norm": norms}
    return {"reference": setting.sequence} | order.curricula(setting.sequence, values, setting.sources)


def estimate_orders(setting: Setting) -> None:
    """Run the task `estimate`: score curricula, the orders of --set sequences=, and random orders with every estimator.

    Args:
        setting: The setting of the run.

    Raises:
        DataError: An order file does not fit this run.
    """
    named = curricula(setting)
    for path in setting.config.sequences:
        given = Order.load(path)
        if given.batches != setting.plan.batches:
            raise DataError(
                f"order {path}: its batches differ from those of this run; estimate orders that were made from this run"
            )
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
        if lost := diverged(found[name]["estimated"]):
            warn(f"{name}: {lost}")
    first = setting.config.estimators[0]
    for row in sorted(table, key=lambda row: row[first])[:8]:
        say(f"  {row[first]:.5f}  {row['name']}")


def diverged(estimated: Sequence[float]) -> str:
    """Return a sentence about estimates that are not finite; "" if there are none.

    Args:
        estimated: The estimated losses.
    """
    count = sum(not math.isfinite(loss) for loss in estimated)
    if not count:
        return ""
    return (
        f"{count} of {len(estimated)} estimates are not finite and rank last: the estimated runs diverge; lower "
        "--learning-rate"
    )
