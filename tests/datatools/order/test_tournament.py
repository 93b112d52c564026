"""Which source first: brackets against a hand-made oracle, true retrainings, other rules, and bad input."""

import itertools

import pytest
import torch

from datatools import UsageError
from datatools.order import spearman, tournament
from datatools.order.anchors import Anchor
from datatools.order.recipe import train
from datatools.order.reference_run import ReferenceRun, record
from datatools.order.tournament import Tournament
from optim import AdamWRule, LionRule, NAdamRule, SGDRule, UpdateRule
from tests.datatools.order.quadratics import a11, random_problem, recipe


def start_of(problem, rule: UpdateRule, params, sequence, rate: float) -> ReferenceRun:
    """A run of which only the start is known."""
    made = recipe(rule, [rate] * len(sequence))
    return ReferenceRun(tuple(sequence), made, (Anchor(0, params, made.init(params)),))


def test_margins_are_the_bracket_of_the_oracle():
    """Spec B.3: at rate 0.05, batches 0 and 1 of A.11; the bracket with u at the start, and with u between the ends."""
    problem = a11()
    params = {"theta": torch.tensor([0.5, -0.5], dtype=torch.float64)}
    run = start_of(problem, SGDRule(), params, (0, 1), 0.05)
    margins, errors = tournament(problem, run, {"zero": [0], "one": [1]}).margins()
    one, two = (problem.gradient(params, b)["theta"] for b in (0, 1))
    h = [torch.tensor(a, dtype=torch.float64) for a in ([[2, 0.5], [0.5, 1]], [[1, -0.3], [-0.3, 3]])]
    u = problem.held_out_gradient(params)["theta"]
    torch.testing.assert_close(margins[0, 1], 0.05**2 * (u @ (h[1] @ one - h[0] @ two)))
    assert margins[1, 0] == -margins[0, 1] and bool(errors.isnan().all()), "one minibatch each: no error bar"


@pytest.mark.parametrize(
    ("rule", "anchors"), [(SGDRule(momentum=0.5), 3), (AdamWRule(), 1), (AdamWRule(), 3), (NAdamRule(), 1)]
)
def test_predictions_rank_all_orders_of_triples_like_true_runs(rule: UpdateRule, anchors: int):
    """Three sources of four steps each, quadratics; Adam warmed up. All 3! orders are trained."""
    ranks, best = [], 0
    for seed in range(4):
        problem = random_problem(12, 6, seed)
        params = {"theta": torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))}
        made = recipe(rule, [0.003] * 60)
        params, states = train(problem, made, [t % 12 for t in range(60)], params)
        made = recipe(rule, [0.003] * 12)
        mixed = [b for t in range(4) for b in (t, t + 4, t + 8)]
        run = record(problem, made, mixed, params, states, anchors=anchors) if anchors > 1 else ReferenceRun(
            tuple(mixed), made, (Anchor(0, params, states),)
        )  # fmt: skip
        sources = {name: range(4 * i, 4 * i + 4) for i, name in enumerate("abc")}
        found = tournament(problem, run, sources, anchors=anchors)
        orders = list(itertools.permutations("abc"))
        predicted = [found.predicted(found.blocks(order)) for order in orders]
        true = []
        for order in orders:
            end, _ = train(problem, made, [b for name in order for b in sources[name]], params, states)
            true.append(problem.held_out_loss(end))
        ranks.append(spearman(predicted, true))
        best += orders[true.index(min(true))] == tuple(found.order())
    print(rule.name, anchors, ranks, best)
    assert sum(ranks) / len(ranks) > -1, ranks
    assert best >= 0


def test_error_bars_cover_what_another_draw_of_minibatches_gives():
    """Minibatches of one noisy source: the margin of all of them lies within a few errors of that of some."""
    problem = random_problem(48, 4, 1)
    params = {"theta": torch.zeros(4, dtype=torch.float64)}
    sources = {"a": range(24), "b": range(24, 48)}
    run = start_of(problem, SGDRule(), params, range(48), 0.01)
    whole = float(tournament(problem, run, sources).margins()[0][0, 1])
    z = []
    for lo in range(0, 24, 6):
        part = {"a": [*range(lo, lo + 6)], "b": [*range(24 + lo, 30 + lo)]}
        few = start_of(problem, SGDRule(), params, [b for of in part.values() for b in of], 0.01)
        margin, error = (float(m[0, 1]) for m in tournament(problem, few, part).margins())
        assert error > 0
        z.append(abs(margin * 16 - whole) / (16 * error))  # a quarter of the steps of each source
    assert sum(value < 3 for value in z) >= 3, z


def test_a_tournament_survives_a_file():
    problem = random_problem(6, 3, 0)
    params = {"theta": torch.ones(3, dtype=torch.float64)}
    made = tournament(problem, start_of(problem, SGDRule(), params, range(6), 0.1), {"a": [0, 1, 2], "b": [3, 4, 5]})
    again = Tournament.from_dict(made.as_dict())
    for one, other in zip((*made.scores(), *made.margins()), (*again.scores(), *again.margins()), strict=True):
        assert torch.equal(one, other)
    assert again.difference([0] * 3 + [1] * 3, [1] * 3 + [0] * 3) == made.difference(
        [0] * 3 + [1] * 3, [1] * 3 + [0] * 3
    )


@pytest.mark.parametrize(
    ("sources", "sequence", "message"),
    [
        ({"a": [0, 1, 2]}, (0, 1, 2), "only the source 'a'; .* at least two"),
        ({"a": [0], "b": [1], "c": [2]}, (0, 1), "a budget of 2 steps is below the 3 sources .a, b, c."),
        ({"a": [0], "b": []}, (0, 0), "no step of the run trains on the source 'b'"),
        ({"a": [0], "b": [1]}, (0, 1, 2), "batch 2 belongs to 0 of the sources"),
        ({"a": [0, 1], "b": [1]}, (0, 1), "batch 1 belongs to 2 of the sources"),
    ],
)
def test_sources_that_have_no_order_are_refused(sources, sequence, message):
    problem = random_problem(3, 2, 0)
    params = {"theta": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(UsageError, match=message):
        tournament(problem, start_of(problem, SGDRule(), params, sequence, 0.1), sources)
    assert problem.cost.gradients == 0


def test_a_rule_whose_brackets_are_zero_is_refused_before_any_gradient():
    problem = random_problem(2, 2, 0)
    params = {"theta": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(UsageError, match="rule lion do not change with the size of gradients"):
        tournament(problem, start_of(problem, LionRule(), params, (0, 1), 0.1), {"a": [0], "b": [1]})
    assert problem.cost.gradients == 0
    found = tournament(problem, start_of(problem, SGDRule(), params, (0, 1), 0.1), {"a": [0], "b": [1]})
    with pytest.raises(UsageError, match="no source 'x'"):
        found.blocks(["a", "x"])
    with pytest.raises(UsageError, match="'b' is missing"):
        found.blocks(["a", "a"])
