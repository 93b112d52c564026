"""The pairwise estimator as it is used: after a warm-up, with AdamW, a schedule, and anchors along the run."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from datatools.errors import UsageError
from datatools.order import search
from datatools.order.estimators import pairwise
from datatools.order.estimators.layout import Layout
from datatools.order.problem import Problem
from datatools.order.recipe import States, train
from datatools.order.reference_run import ReferenceRun, record
from optim import AdamWRule, SGDRule
from tests.datatools.order.quadratics import loss, random_problem, recipe

SIZE = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
"""|gradient| of each coordinate, in every batch of `linear`: the second moment of a warmed-up Adam never changes."""
SIGNS = torch.tensor([[1, 1, 1, -1], [1, -1, 1, 1], [-1, 1, 1, 1], [1, 1, -1, -1], [-1, -1, 1, 1]], dtype=torch.float64)
RATES = [0.1, 0.2, 0.3, 0.05, 0.15]
WARM = 3
START = {"theta": torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)}


def bent(steps: int, seed: int) -> Problem:
    """Quadratic batches, and a held-out loss without curvature: what is left of the error is of the estimate alone."""

    def either(params: dict[str, Tensor], data: object) -> Tensor:
        return along(params, data) if isinstance(data, Tensor) else loss(params, data)  # type: ignore[arg-type]

    return Problem(either, random_problem(steps, 4, seed).batches, linear().validation)


def along(params: dict[str, Tensor], slope: Tensor) -> Tensor:
    theta = params["theta"]
    return theta @ slope + 0.0 * (theta @ theta)  # a second derivative that is there, and zero


def linear() -> Problem:
    """Losses without curvature."""
    return Problem(along, list(SIGNS * SIZE), [torch.tensor([1.0, -0.5, 2.0, 0.7], dtype=torch.float64)])


def warmed(rule: AdamWRule, moment: Tensor) -> States:
    """The state after `WARM` steps on gradients of these sizes, with a first moment of its own."""
    correction = 1 - rule.betas[1] ** WARM if rule.bias_correction else 1.0
    step = torch.tensor(float(WARM))
    return {"theta": {"step": step, "exp_avg": moment, "exp_avg_sq": SIZE.square() * correction}}


MOMENT = torch.tensor([0.4, -1.0, 0.3, 0.1], dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"anchors": 1}, {"second_moment": "anchor"}], ids=str)
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "uncorrected"])
def test_all_orders_are_right_where_the_second_moment_stands_still(options: dict, correct: bool) -> None:
    """Bias correction after a warm-up, momentum of its own, a schedule: exact, for losses without curvature."""
    rule = AdamWRule(betas=(0.8, 0.9), eps=1e-3, bias_correction=correct)
    problem, states = linear(), warmed(rule, MOMENT)
    if not correct:  # its second moment is the squares themselves only when nothing is corrected
        states["theta"]["exp_avg_sq"] = SIZE.square()
    ref = record(problem, recipe(rule, RATES), range(5), START, states, anchors=6)
    made = pairwise.precompute(ref, problem, **options)
    orders = list(itertools.permutations(range(5)))
    true = [problem.held_out_loss(train(problem, ref.recipe, o, START, states)[0]) for o in orders]
    spread = float(torch.tensor(true).std())
    assert spread > 1e-3, "orders differ: the rates and the momentum belong to positions"
    wrong = made.scores(orders) - torch.tensor(true, dtype=torch.float64)
    assert float(wrong.abs().max()) < 1e-9 * spread
    assert made.replay < 1e-9, "what the carried moment has moved is counted too"
    trust = made.trust(orders[7])
    assert trust["second_order"] < 1e-12
    assert trust["fresh"] == 5 / (5 + WARM), "with and without correction"


@pytest.mark.parametrize("anchors", [None, 1, 3], ids=["all anchors", "one anchor", "three anchors"])
def test_carried_momentum_and_bias_correction_with_curvature(anchors: int | None) -> None:
    """The error over the spread falls with the rate. A large eps: the second moment, which is frozen, hardly counts."""
    problem = bent(6, 2)
    rule = AdamWRule(betas=(0.8, 0.9), eps=3e5)
    start = {"theta": torch.full((4,), 0.3, dtype=torch.float64)}
    squares = torch.full((4,), 0.002, dtype=torch.float64)
    state = {"step": torch.tensor(2.0), "exp_avg": 10 * MOMENT, "exp_avg_sq": squares}
    orders = [torch.randperm(6, generator=torch.Generator().manual_seed(s)).tolist() for s in range(12)]
    errors = {}
    for rate in (1.0, 0.5):
        rates = [3e5 * 0.01 * rate * (1 + 0.2 * t) for t in range(6)]
        ref = record(problem, recipe(rule, rates), range(6), start, {"theta": state}, anchors=7)
        true = torch.tensor(
            [problem.held_out_loss(train(problem, ref.recipe, o, start, {"theta": state})[0]) for o in orders]
        )
        made = pairwise.precompute(ref, problem, anchors=anchors)
        errors[rate] = float((made.scores(orders) - true).abs().max() / true.std())
    if anchors == 3:  # the reference's way is taken to be straight between two anchors: of first order
        assert errors[0.5] < 0.04 and errors[0.5] < 0.6 * errors[1.0], errors
    else:
        assert errors[0.5] < 0.01 and errors[0.5] < 0.4 * errors[1.0], errors


def test_sgd_goes_on_with_its_momentum_buffer() -> None:
    """A buffer is the sum of past gradients, not their mean: what it moves is the buffer itself at the first step."""
    problem = bent(4, 5)
    start = {"theta": torch.full((4,), 0.3, dtype=torch.float64)}
    states = {"theta": {"momentum_buffer": 20 * MOMENT, "step": torch.tensor(2.0)}}
    rule = SGDRule(momentum=0.7)
    states["theta"] = {key: states["theta"][key] for key in rule.init(start["theta"])}
    orders = [list(o) for o in itertools.permutations(range(4))]
    errors = {}
    for rate in (0.02, 0.01):
        ref = record(problem, recipe(rule, [rate, 2 * rate, rate, rate]), range(4), start, states, anchors=5)
        true = torch.tensor([problem.held_out_loss(train(problem, ref.recipe, o, start, states)[0]) for o in orders])
        for anchors in (1, None):
            made = pairwise.precompute(ref, problem, anchors=anchors)
            errors[rate, anchors] = float((made.scores(orders) - true).abs().max() / true.std())
    for anchors in (1, None):
        assert errors[0.01, anchors] < 0.05 and errors[0.01, anchors] < 0.7 * errors[0.02, anchors], errors


def by_hand(steps: int, segments: int = 1) -> pairwise.Pairwise:
    """Positions that count linearly, one kernel for all pairs: all that `matrix` says of neighbours is exact."""
    g = torch.Generator().manual_seed(3)
    slopes, level = (torch.randn(steps, dtype=torch.float64, generator=g) for _ in range(2))
    position = level + torch.arange(steps, dtype=torch.float64)[:, None] * slopes
    kernel = torch.full((steps, steps), 0.3, dtype=torch.float64).triu(1)
    precedence = torch.randn(1, steps, steps, dtype=torch.float64, generator=g).expand(segments, -1, -1)
    segment = torch.arange(steps) * segments // steps
    return pairwise.Pairwise(tuple(range(steps)), pairwise.Cost(), 0.0, position, kernel, precedence, segment)


def test_positions_with_a_rate_of_zero_move_nothing() -> None:
    """A schedule may begin or end at 0: the last batch then leaves no trace, and no estimate is NaN."""
    problem, states = linear(), warmed(AdamWRule(betas=(0.8, 0.9), eps=1e-3), MOMENT)
    rates = [0.1, 0.2, 0.1, 0.1, 0.0]
    ref = record(problem, recipe(AdamWRule(betas=(0.8, 0.9), eps=1e-3), rates), range(5), START, states, anchors=6)
    made = pairwise.precompute(ref, problem)
    assert made.replay < 1e-9
    true, _ = train(problem, ref.recipe, [4, 3, 2, 1, 0], START, states)
    assert made.score([4, 3, 2, 1, 0]) == pytest.approx(problem.held_out_loss(true), abs=1e-12)


@pytest.mark.parametrize("segments", [1, 2])
def test_matrix_is_what_an_exchange_of_neighbours_costs(segments: int) -> None:
    """Precedence and drift: i directly before j, against j directly before i, wherever the two stand."""
    made = by_hand(5, segments)
    matrix = made.matrix()
    assert torch.equal(matrix, -matrix.T)
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        for place in range(4):
            i, j = order[place : place + 2]
            exchanged = [*order[:place], j, i, *order[place + 2 :]]
            difference = made.score(order) - made.score(exchanged)
            assert float(matrix[i, j]) == pytest.approx(difference, abs=1e-6)  # pairs are added in float32
    drift = replace(made, precedence=torch.zeros_like(made.precedence))
    assert float(drift.matrix().abs().max()) > 0.1, "batches whose place matters by itself"
    assert search(drift, "local", budget=500).scores[0] == pytest.approx(
        min(drift.score(o) for o in itertools.permutations(range(5))), abs=1e-9
    )


def test_matrix_of_one_batch_and_of_a_kernel_that_fades() -> None:
    alone = by_hand(1).matrix()
    assert alone.shape == (1, 1) and float(alone) == 0
    two = by_hand(2)
    assert float(two.matrix()[0, 1]) == pytest.approx(two.score([0, 1]) - two.score([1, 0]), abs=1e-6)
    made = by_hand(3)
    kernel = torch.tensor([[0, 0.6, 0.3], [0, 0, 0.9], [0, 0, 0]], dtype=torch.float64)
    q = made.precedence[0]
    found = replace(made, kernel=kernel, position=torch.zeros(3, 3, dtype=torch.float64)).matrix()
    torch.testing.assert_close(found, 0.6 * (q - q.T), msg="the mean of the kernel over the three pairs")


def test_the_second_moment_that_is_expected() -> None:
    """b2^T of the start's and the rest of the mean square, as often as batches come, corrected as at the end."""
    problem = random_problem(2, 3, 1)
    rule = AdamWRule(betas=(0.9, 0.5))
    start = {"theta": torch.zeros(3, dtype=torch.float64)}
    v = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    states = {"theta": {"step": torch.tensor(2.0), "exp_avg": torch.zeros(3, dtype=torch.float64), "exp_avg_sq": v}}
    grads = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    mean = torch.tensor([(2 * 1 + 9) / 3, 4.0, (2 * 9 + 1) / 3], dtype=torch.float64)
    for correct, factor in ((True, 1 - 0.5**5), (False, 1.0)):
        made = recipe(replace(rule, bias_correction=correct), [0.1] * 3)
        ref = record(problem, made, [0, 1, 0], start, states, anchors=2)
        found = pairwise.expected_second_moment(ref, Layout.of(start), grads)
        torch.testing.assert_close(found, (0.125 * v + 0.875 * mean) / factor)
    plain = record(problem, recipe(SGDRule(), [0.1] * 2), [0, 1], start, anchors=2)
    assert pairwise.expected_second_moment(plain, Layout.of(start), grads) is None


def test_anchors_are_spread_over_the_run() -> None:
    problem = random_problem(8, 3, 1)
    start = {"theta": torch.zeros(3, dtype=torch.float64)}
    ref = record(problem, recipe(SGDRule(), [0.01] * 8), range(8), start, anchors=9)

    def positions(anchors: int | None) -> list[int]:
        return [anchor.position for anchor in pairwise.used_anchors(ref, anchors)]

    assert positions(None) == positions(9) == list(range(9))
    assert [positions(k) for k in (1, 2, 3, 5)] == [[4], [0, 8], [0, 4, 8], [0, 2, 4, 6, 8]]
    for wrong in (0, 10):
        with pytest.raises(UsageError, match=f"{wrong} anchors of a reference run that recorded 9"):
            pairwise.used_anchors(ref, wrong)


def test_what_it_cost_is_counted() -> None:
    problem = random_problem(5, 4, 0)
    start = {"theta": torch.zeros(4, dtype=torch.float64)}
    ref = record(problem, recipe(SGDRule(), [0.01] * 5), range(5), start, anchors=3)
    before = (problem.cost.gradients, problem.cost.hvps)
    made = pairwise.precompute(ref, problem)
    assert (made.cost.gradients, made.cost.hvps) == (5 * 3 + 1, 5 * 3)
    assert (problem.cost.gradients - before[0], problem.cost.hvps - before[1]) == (16, 15)
    assert made.cost.bytes == 2 * 5 * 4 * 8


def test_a_held_out_gradient_of_two_parameters_is_laid_out_as_the_weights_are() -> None:
    """The same run with its numbers in two tensors, in an order that is not theirs by name."""
    problem = random_problem(4, 4, 7)
    whole = {"theta": torch.tensor([0.3, 0.1, -0.2, 0.4], dtype=torch.float64)}
    parts = {"b": whole["theta"][:1].clone(), "a": whole["theta"][1:].clone()}
    rule = AdamWRule(eps=1e-3)
    one = record(problem, recipe(rule, [0.05] * 4), range(4), whole, anchors=5)
    two = record(problem, recipe(rule, [0.05] * 4, ("b", "a")), range(4), parts, anchors=5)
    assert isinstance(two, ReferenceRun)
    orders = list(itertools.permutations(range(4)))
    torch.testing.assert_close(
        pairwise.precompute(two, Problem(loss, problem.batches, problem.validation)).scores(orders),
        pairwise.precompute(one, problem).scores(orders),
    )
