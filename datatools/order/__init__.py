"""Estimate the result of training in another order from one recorded run, without retraining.

    problem = Problem(loss, batches, validation)                # loss(params, batch) -> 0-d
    recipe = Recipe.of(optimizer, rates)                        # any rule that can be replayed from gradients alone
    reference = record(problem, recipe, range(T), params)       # anchors with optimizer states
    surrogate = precompute("pairwise", reference, problem)
    surrogate.score(order), surrogate.trust(order)
    search(surrogate, "local", budget=20_000).sequences[0]      # or `refine`, for a judge too expensive to search

>>> from datatools.order.example import example_run
>>> problem, reference = example_run()
>>> surrogate = precompute("moments", reference, problem)
>>> surrogate.score((3, 2, 1, 0)) != surrogate.score((0, 1, 2, 3))
True

`datatools ls estimators` lists the estimators and their costs.
"""

from datatools.order.anchors import Anchor, snapshot
from datatools.order.curricula import curricula
from datatools.order.estimators import ESTIMATORS, estimator, limits, load_surrogate, precompute, trusted
from datatools.order.estimators.linear import check_linear
from datatools.order.estimators.question import Question
from datatools.order.estimators.surrogate import FORMAT, LIMIT_BYTES, Surrogate, finite
from datatools.order.memory_map import Map, memory_map
from datatools.order.outlook import Outlook, outlook
from datatools.order.problem import HVP_IN_GRADIENTS, Cost, Diverged, Loss, Params, Parts, Problem
from datatools.order.recipe import Recipe, States, train
from datatools.order.recorder import Recorder
from datatools.order.reference_run import ReferenceRun, record
from datatools.order.refine import refine
from datatools.order.sampler import OrderSampler
from datatools.order.search import SEARCHES, Found, borda_order, exact_order, search
from datatools.order.shapes import SHAPES, Form, arrange
from datatools.order.tournament import Tournament, tournament
from datatools.order.validate import Judgement, Prize, break_even, calibrated, judge, prize
from datatools.stats import spearman

__all__ = [
    "ESTIMATORS",
    "FORMAT",
    "HVP_IN_GRADIENTS",
    "LIMIT_BYTES",
    "SEARCHES",
    "SHAPES",
    "Anchor",
    "Cost",
    "Diverged",
    "Form",
    "Found",
    "Judgement",
    "Loss",
    "Map",
    "OrderSampler",
    "Outlook",
    "Params",
    "Parts",
    "Prize",
    "Problem",
    "Question",
    "Recipe",
    "Recorder",
    "ReferenceRun",
    "States",
    "Surrogate",
    "Tournament",
    "arrange",
    "borda_order",
    "break_even",
    "calibrated",
    "check_linear",
    "curricula",
    "estimator",
    "exact_order",
    "finite",
    "judge",
    "limits",
    "load_surrogate",
    "memory_map",
    "outlook",
    "precompute",
    "prize",
    "record",
    "refine",
    "search",
    "snapshot",
    "spearman",
    "tournament",
    "train",
    "trusted",
]
