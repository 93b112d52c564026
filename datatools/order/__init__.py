"""What would another order of training have done? Estimates from one recorded run, without retraining.

    problem = Problem(loss, batches, validation)                # loss(params, batch) -> 0-d
    recipe = Recipe.of(optimizer, rates)                        # any rule that gradients alone replay
    reference = record(problem, recipe, range(T), params)       # anchors with optimizer states
    surrogate = precompute("pairwise", reference, problem)
    surrogate.score(order), surrogate.trust(order)
    search(surrogate, "local", budget=20_000).sequences[0]      # and `refine`, for a judge too expensive to search

| estimator | one-time | a score | what it is |
| --- | --- | --- | --- |
| `pairwise` | a gradient and a product a batch and anchor | T^2 numbers | precedence matrix, momentum kernel |
| `moments` | a gradient a batch and anchor | T steps of the rule | the order's own moments on stored gradients |
| `reduced` | and a few rows' gradient a batch and anchor | T gradients of the rows | and on how those change |
| `reduced`, no rows | and 2 k gradients a batch | T steps of the rule | or how they change along k directions |
| `own-moments` | | T gradients and products | the same on g + H d: an oracle, more expensive than retraining |
| `table` | T gradients a batch | T steps of the rule | the published method, as a baseline |
| `groups` | G (G - 1) short runs | T G | blocks of domains, measured |
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from datatools.errors import UsageError, did_you_mean
from datatools.order.curricula import curricula
from datatools.order.estimators import fut as table
from datatools.order.estimators import groups, moments, pairwise, reduced
from datatools.order.estimators.linear import check_linear
from datatools.order.estimators.surrogate import FORMAT, LIMIT_BYTES, LIMITS, Surrogate, finite, trusted
from datatools.order.memory_map import Map, memory_map
from datatools.order.problem import Cost, Diverged, Loss, Params, Parts, Problem
from datatools.order.recipe import Recipe, States, train
from datatools.order.recorder import Recorder
from datatools.order.reference_run import Anchor, ReferenceRun, record, snapshot
from datatools.order.refine import refine
from datatools.order.search import METHODS as SEARCHES
from datatools.order.search import Found, borda_order, exact_order, search
from datatools.order.validate import Judgement, Prize, break_even, calibrated, judge, prize
from datatools.stats import spearman

ESTIMATORS: dict[str, Callable[..., Surrogate]] = {
    "pairwise": pairwise.precompute,
    "reduced": reduced.precompute,
    "moments": moments.precompute,
    "own-moments": partial(moments.precompute, hessian="exact"),
    "table": table.precompute,
    "groups": groups.precompute,
}
"""Name -> `precompute(reference, problem, **options) -> Surrogate`."""


def precompute(name: str, reference: ReferenceRun, problem: Problem, **options: Any) -> Surrogate:
    """The surrogate of that name. Raises: UsageError for an unknown name, and what the estimator raises."""
    if name not in ESTIMATORS:
        raise UsageError(f"order: no estimator is called {name!r}{did_you_mean(name, ESTIMATORS)}")
    return ESTIMATORS[name](reference, problem, **options)


__all__ = [
    "ESTIMATORS",
    "FORMAT",
    "LIMITS",
    "LIMIT_BYTES",
    "SEARCHES",
    "Anchor",
    "Cost",
    "Diverged",
    "Found",
    "Judgement",
    "Loss",
    "Map",
    "Params",
    "Parts",
    "Prize",
    "Problem",
    "Recipe",
    "Recorder",
    "ReferenceRun",
    "States",
    "Surrogate",
    "borda_order",
    "break_even",
    "calibrated",
    "check_linear",
    "curricula",
    "exact_order",
    "finite",
    "judge",
    "memory_map",
    "precompute",
    "prize",
    "record",
    "refine",
    "search",
    "snapshot",
    "spearman",
    "train",
    "trusted",
]
