"""`--verify`: the candidates of a method race on held-back target rows, and the winner's scores select.

The target rows are cut into two halves. Each candidate selects from one half alone, a model is trained on its rows,
and the loss (and accuracy) of each row of the other half is measured, and the other way round: every target row is
judged once, by models that were selected without it. The method's own candidate is trained with a second seed, too:
what that changes is chance. Then the candidate that is kept selects from all target rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import numpy as np
from numpy.typing import NDArray

from datatools import Budget, UsageError
from pipelines.rows.rows import Rows
from pipelines.runs import following
from pipelines.runs.messages import say, warn
from pipelines.runs.seeds import derive_seed
from pipelines.select import targets
from pipelines.select.bench import Bench, Result, prepare
from pipelines.select.choose import choose
from pipelines.select.prices import Prices
from pipelines.select.scored import Context, Scored, candidates
from pipelines.select.scorer import scorer
from pipelines.select.winner import Measurements, decide, refused
from pipelines.settings.metrics import CODE, HARNESS, OPTIONS
from pipelines.texts import plural
from pipelines.training.accuracy import measure
from pipelines.training.accuracy.questions import Question

FEWEST = 4
"""The minimum number of different target rows: with fewer, half of them say too little to choose from."""

HELD_BACK = "held back"
"""The status of target rows that the selection of a half does not see."""


AGAIN = "another seed"
"""What the second training of the method's own candidate is called, from which the chance of training is known."""


@dataclass(frozen=True)
class Half:
    """One half of the target rows, on which selections from the other half are judged.

    Attributes:
        number: 1 or 2.
        context: What candidates are scored from: the target without this half.
        bench: Where models are trained, and measured on this half.
    """

    number: int
    context: Context
    bench: Bench


class Race:
    """The race of one selection.

    Attributes:
        context: What is scored.
        names: The names of the candidates, the method's own first.
        refusal: Why there is no race; "" if there is one.
    """

    def __init__(self, context: Context) -> None:
        """Cut the target into halves, and decide what is measured on them.

        Args:
            context: What is scored.

        Raises:
            UsageError: A metric cannot be measured on target rows.
            DataError: No target row offers what a metric needs.
        """
        self.context, config = context, context.config
        if tasks := [name for name in config.metrics.names if name.startswith(HARNESS)]:
            raise UsageError(
                f"--metric {tasks[0]}: --verify measures on target rows, and a task of lm-eval has rows of its own; "
                "name another metric, or none"
            )
        self.names = list(scorer(config.method).candidates())
        self.refusal = _refusal(context, self.names[0])

    @cached_property
    def halves(self) -> list[Half]:
        """Both halves."""
        context, config = self.context, self.context.config
        loaded, target = context.model(), context.wanted
        plan = measure.plan(config.metrics, target, [], loaded.tokenizer, loaded.limits)
        for sentence in plan.said:
            say(f"verify: {sentence}")
        found = []
        first = halves(target, targets.named(target)[1].tolist(), config.seed)
        for number, held in enumerate((first, ~first), start=1):
            seen, judged = _only(target, ~held), _only(target, held)
            bench = Bench(config.lora, context.run.path("race"), loaded, context.pool, judged, _on(plan, judged))
            found.append(Half(number, replace(context, target=seen), bench))
        return found

    @property
    def runs(self) -> int:
        """The most training runs that there can be."""
        return len(self.halves) * (len(self.names) + 1)

    def prices(self) -> tuple[Prices, Prices] | None:
        """Return the cost of all training runs and measurements, and of those that are missing; None without a race.

        Which rows will be trained on is not known yet: they count as rows of mean length. Candidates with the same rows
        share their training, so that this is the most that a race can cost.
        """
        if self.refusal:
            return None
        context, config = self.context, self.context.config
        pool = context.pool
        mean = pool.tokens() / max(1, int(pool.usable.sum()))
        budget = Budget.parse(config.budget).resolve(candidates(pool))
        rows = budget.rows if budget.rows is not None else ceil((budget.tokens or 0) / max(1.0, mean))
        whole = Prices(self.halves[0].bench, config.training)
        finished: list[str] = []
        for half in self.halves:
            labels = [_label(name, half) for name in (*self.names, AGAIN)]
            for label in labels:
                whole.trained(label, config.training, [round(mean)] * rows)
                whole.measured(label, half.bench)
            kept = half.bench.home.iterdir() if half.bench.home.is_dir() else ()
            finished += labels[: sum(half.bench.is_measured(folder) for folder in kept)]
        return whole, whole.without(finished)

    def run(self, own: Scored) -> Scored:
        """Run the race, and return the scores of the candidate that is kept, from all target rows.

        Args:
            own: The method's own scores, from all target rows.
        """
        functions = scorer(self.context.config.method)
        table = functions.candidates()
        if self.refusal:
            warn(f"--verify: {self.refusal}")
            return replace(own, race=refused(self.names, self.refusal))
        chosen: dict[str, list[list[int]]] = {}
        for half in self.halves:
            shared = functions.shared(half.context)
            for name, one in table.items():
                if (found := one.score(shared)) is not None:
                    rows = choose(half.context, replace(found, record=one.record)).indices.tolist()
                    # in an order of content, so that candidates with the same rows share their training
                    rows.sort(key=lambda i: (self.context.pool.keys[i], i))
                    chosen.setdefault(name, []).append(rows)
        chosen = {name: rows for name, rows in chosen.items() if len(rows) == len(self.halves)}
        self._prepare(chosen)
        following.leave()
        results = {name: [self._trained(name, *pair) for pair in zip(self.halves, rows, strict=True)]
                   for name, rows in chosen.items()}  # fmt: skip
        again = [self._trained(AGAIN, *pair, 1) for pair in zip(self.halves, chosen[self.names[0]], strict=True)]
        told = decide(_measurements(results, again, self.halves), chosen, self.context.config.training)
        say(f"verify: {told['verdict']}")
        kept = told["kept"]
        final = table[kept].score(functions.shared(self.context))
        assert final is not None  # it was scored for each half
        record = None if kept == self.names[0] else table[kept].record
        return replace(final, record=record, tokens=final.tokens + self._tokens(results, chosen), race=told)

    def _prepare(self, chosen: Mapping[str, Sequence[list[int]]]) -> None:
        """Share the training runs with the other members of a team."""
        config = self.context.config
        runs = [(name, rows, 0) for name, rows in chosen.items()] + [(AGAIN, chosen[self.names[0]], 1)]
        wanted = [
            half.bench.wanted(rows, config.training, config.seed + more, _label(name, half))
            for name, both, more in runs
            for half, rows in zip(self.halves, both, strict=True)
        ]
        prepare(self.halves[0].bench.home, wanted, "race")

    def _trained(self, name: str, half: Half, rows: list[int], more: int = 0) -> Result:
        config = self.context.config
        return half.bench.run(rows, config.training, config.seed + more, _label(name, half))

    def _tokens(self, results: Mapping[str, Sequence[Result]], chosen: Mapping[str, Sequence[list[int]]]) -> int:
        """Return the tokens of training and measuring; the same rows count once."""
        trained = {tuple(rows): result.trained_tokens
                   for name in chosen for rows, result in zip(chosen[name], results[name], strict=True)}  # fmt: skip
        own = chosen[self.names[0]]
        found = sum(trained.values()) + sum(trained[rows] for rows in set(map(tuple, own)))
        for place, half in enumerate(self.halves):
            measured = half.bench.test.tokens() + sum(tokens for tokens, _ in half.bench.plan.work().values())
            found += measured * (1 + len({tuple(rows[place]) for rows in chosen.values()}))
        return found


def _label(name: str, half: Half) -> str:
    return f"verify: {name}, half {half.number}"


def halves(target: Rows, groups: Sequence[int], seed: int) -> NDArray[np.bool_]:
    """Return which target rows are in the first half: bool [rows]; others are in the second, or not usable.

    Rows of equal content stay together. Each group is cut in two, and the halves are about equally large.

    Args:
        target: The target rows.
        groups: The group of each usable row: its target, or its subtask.
        seed: The seed.
    """
    of_key: dict[str, int] = {}
    for row, group in zip(np.flatnonzero(target.usable).tolist(), groups, strict=True):
        of_key.setdefault(target.keys[row], group)
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "verify", "halves")))
    ordered = sorted(of_key)
    shuffled = [ordered[i] for i in generator.permutation(len(ordered))]
    dealt = sorted(shuffled, key=lambda key: of_key[key])  # stable: shuffled within each group
    first = set(dealt[::2])
    return np.asarray([key in first for key in target.keys]) & target.usable


def _refusal(context: Context, own: str) -> str:
    """Return why target rows are too few for a race; "" if they are not."""
    target, config = context.wanted, context.config
    names, groups = targets.named(target)
    rows = np.flatnonzero(target.usable).tolist()
    count = len({target.keys[row] for row in rows})
    kept = f"{own} is kept without one"
    if count < FEWEST:
        return f"the target has {plural(count, 'different row')}, and a race needs {FEWEST}: {kept}"
    if config.targets.share == "no":
        return ""
    for place, name in enumerate(names):
        mine = {target.keys[row] for row, group in zip(rows, groups.tolist(), strict=True) if group == place}
        if len(mine) < 2:
            return f"target {name} has a single row, and each half of a race needs one: {kept}"
    return ""


def _only(target: Rows, wanted: NDArray[np.bool_]) -> Rows:
    """Return target rows of which only some are usable."""
    return replace(target, status=target.status.replaced(target.usable & ~wanted, HELD_BACK))


def _on(plan: measure.Plan, rows: Rows) -> measure.Plan:
    """Return a plan for some of its rows, with the same options, rules and metrics."""
    usable = rows.usable
    asked = [one for one in plan.asked if usable[one.index]]
    needs: dict[str, Callable[[Question], object]] = {OPTIONS: lambda one: one.options, CODE: lambda one: one.tests}
    there = [name for name in plan.metrics if any(needs.get(name, bool)(one) for one in asked)]
    return replace(plan, metrics=tuple(there), rows=rows, asked=asked)


def _measurements(
    results: Mapping[str, Sequence[Result]], again: Sequence[Result], both: Sequence[Half]
) -> list[Measurements]:
    """Return what was measured by each metric, the loss first: rows of both halves, one after another."""
    first = next(iter(results.values()))
    counts = np.concatenate([one.counts for one in first])
    lengths = [len(one.counts) for one in first]

    def losses(found: Sequence[Result]) -> NDArray[np.float64]:
        means: NDArray[np.float64] = np.concatenate([one.sums for one in found]) / counts
        return means

    def right(found: Sequence[Result], metric: str) -> NDArray[np.float64]:
        return np.concatenate([one.measured[metric].values if metric in one.measured else [] for one in found])

    by_name = {name: losses(found) for name, found in results.items()}
    half_of = np.repeat([0, 1], lengths)
    made = [Measurements("loss", "held-back loss", True, by_name, losses(again), counts, half_of)]
    for metric in dict.fromkeys(name for half in both for name in half.bench.plan.metrics):
        values = {name: right(found, metric) for name, found in results.items()}
        lengths = [len(one.measured[metric].values) if metric in one.measured else 0 for one in first]
        label = both[0].bench.plan.label(metric)
        ones, half_of = np.ones(sum(lengths)), np.repeat([0, 1], lengths)
        made.append(Measurements(metric, label, False, values, right(again, metric), ones, half_of))
    return made
