"""The estimator `span`: replay in the span of the gradients of four true runs."""

import pytest
import torch

from datatools import UsageError
from datatools.order import load_surrogate, precompute, spearman
from datatools.order.estimators.span import RUNS, designs
from datatools.order.estimators.surrogate import random_orders
from datatools.order.recipe import train
from datatools.order.reference_run import record
from optim import AdamWRule, LionRule
from tests.datatools.order.quadratics import random_problem, recipe


def setting(seed: int, rule=None, rate: float = 0.02):
    """Twelve quadratic batches, after a warm-up."""
    problem, rule = random_problem(12, 6, seed), rule or AdamWRule()
    params = {"theta": torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))}
    params, states = train(problem, recipe(rule, [rate] * 120), [t % 12 for t in range(120)], params)
    made = recipe(rule, [rate] * 12)
    return problem, made, record(problem, made, range(12), params, states)


def test_it_ranks_orders_for_the_cost_of_four_runs(tmp_path):
    ranks = []
    for seed in range(3):
        problem, made, run = setting(seed)
        before = problem.cost.gradients
        surrogate = precompute("span", run, problem)
        assert problem.cost.gradients - before == surrogate.cost.gradients == RUNS * (12 + 1)
        orders = random_orders(range(12), 24, seed)
        spent = (problem.cost.gradients, problem.cost.forwards)
        estimated = surrogate.scores(orders)
        assert spent == (problem.cost.gradients, problem.cost.forwards), "a score takes no pass of the model"
        true = [problem.held_out_loss(train(problem, made, o, run.start.params, run.start.states)[0]) for o in orders]
        ranks.append(spearman(estimated, true))
        trusts = [surrogate.trust(order)["spread"] for order in orders]
        assert all(value >= 0 for value in trusts)
    assert sum(ranks) / len(ranks) > 0.8, ranks
    surrogate.save(tmp_path, run)
    assert torch.equal(load_surrogate(tmp_path, run, problem).scores(orders), estimated)


def test_designs_spread_every_batch_and_bad_runs_are_refused():
    assert designs([0, 1, 2, 3]) == [[0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1], [1, 0, 3, 2]]
    problem, _, run = setting(0, LionRule())
    before = problem.cost.gradients
    with pytest.raises(UsageError, match="trained with lion. Use the estimator 'moments'"):
        precompute("span", run, problem)
    assert problem.cost.gradients == before
