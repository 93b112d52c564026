"""Every number of the specification (fut.md A.11, B.3), in float64."""

import itertools

import pytest
import torch

from datatools.order.estimators import fut as table
from datatools.order.estimators import moments, pairwise
from datatools.order.estimators.linear import Linear
from datatools.order.problem import Cost, Problem
from datatools.order.recipe import train
from datatools.order.reference_run import ReferenceRun
from optim import AdamWRule, SGDRule
from tests.datatools.order.quadratics import a11, loss, run

TRUE = {
    (0, 1, 2): 0.7577133858, (0, 2, 1): 0.72115531, (1, 0, 2): 0.75082773,
    (1, 2, 0): 0.75095973, (2, 0, 1): 0.6859947451, (2, 1, 0): 0.72818170,
}  # fmt: skip


def reference() -> tuple[Problem, ReferenceRun]:
    problem = a11()
    return problem, run(problem, AdamWRule(), [0.5, -0.5], [0.1] * 3)


def near(got: object, want: object, digits: float = 1.01e-10) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), rtol=0, atol=digits
    )


def theta(params: dict[str, torch.Tensor]) -> torch.Tensor:
    return params["theta"]


def test_reference_run_is_the_spec_s_and_torch_s() -> None:
    problem, ref = reference()
    want = [(0.5999999992, -0.4000000013), (0.5920161757, -0.3191959685), (0.5394561050, -0.2538636215)]
    for anchor, values in zip(ref.anchors[1:], want, strict=True):
        near(theta(anchor.params), values)
    near(problem.held_out_loss(ref.end.params), 0.7577133858)
    for step, m, v in [
        (1, (-0.125, -0.075), (0.0015625, 0.0005625)),
        (2, (0.0195, -0.8055000004), (0.0033033375, 0.0550263376)),
    ]:
        state = ref.anchors[step].states["theta"]
        near(state["exp_avg"], m)
        near(state["exp_avg_sq"], v)
    p = torch.nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))
    adam = torch.optim.Adam([p], lr=0.1)
    for batch in problem.batches:
        adam.zero_grad()
        loss({"theta": p}, batch).backward()
        adam.step()
    torch.testing.assert_close(theta(ref.end.params), p.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", list(TRUE))
def test_true_losses_of_all_orders(order: tuple[int, ...]) -> None:
    problem, ref = reference()
    near(problem.held_out_loss(train(problem, ref.recipe, order, ref.start.params)[0]), TRUE[order], 5.1e-9)


GAMMA = {
    (0, 0): (-0.9999999920, -0.9999999867), (0, 1): (0.9999999920, -0.9999999987),
    (0, 2): (0.9999999949, -0.9999999778), (1, 0): (-0.9881257956, -0.9881257898),
    (1, 1): (0.0798382354, -0.8080403280), (1, 2): (0.3008892674, -0.9341123557),
    (2, 0): (-0.2478650355, -0.6680342778), (2, 1): (0.4197873792, -0.8930239086),
    (2, 2): (0.5256007064, -0.6533234705),
}  # fmt: skip
SLOPE = {
    (1, 0): (0.0791550390, 0.1319250677), (1, 1): (0.3775238207, -0.0080570517),
    (1, 2): (0.1970586334, 0.3828747776), (2, 0): (0.2529333192, 0.0796198712),
    (2, 1): (0.1778566304, 0.0019024706), (2, 2): (0.0856392217, 0.0820225305),
}  # fmt: skip
BEND = {(1, 0): (0.2969969110, 0.8249914136), (2, 1): (-0.1487306324, 0.0046351815)}


@pytest.mark.parametrize("t, batch", list(GAMMA))
def test_update_terms_and_their_derivatives(t: int, batch: int) -> None:
    problem, ref = reference()
    here = ref.anchors[t]
    state, rule = here.states["theta"], ref.recipe.rules["theta"]
    grad = theta(problem.gradient(here.params, batch))

    def gamma(g: torch.Tensor) -> torch.Tensor:
        return rule.update(g, state, theta(here.params))[0]

    near(gamma(grad), GAMMA[t, batch], 1.01e-9)
    slope, bend = table.taylor(gamma, grad, torch.ones_like(grad))
    if t == 0:
        assert bool((slope.abs() < 1e-7).all()), "the first step of Adam is the sign of the gradient"
    else:
        near(slope, SLOPE[t, batch], 1.01e-9)
    if (t, batch) in BEND:
        near(bend, BEND[t, batch], 1.01e-9)


@pytest.mark.parametrize(
    "make, options, second, third, held_out",
    [
        (table, {"derivative": "none"}, (0.4988125801, -0.3011874232), (0.4568338422, -0.2118850324), 0.6712871618),
        (table, {"derivative": "exact"}, (0.5019787816, -0.2998681726), (0.4617045457, -0.2105819517), 0.6700744369),
        (table, {"derivative": "secant"}, (0.5027703320, -0.3011874232), (0.4671983843, -0.2118954121), 0.6731779343),
        (
            table, {"derivative": "exact", "order": 2},
            (0.4996028064, -0.3002806683), (0.4594401765, -0.2109960012), 0.6703286220,
        ),
        (moments, {"hessian": "none"}, (0.3743529128, -0.3002677163), (0.3248782118, -0.2286822129), 0.6841630586),
        (moments, {"hessian": "exact"}, (0.3889917320, -0.3011745785), (0.3550170328, -0.2287500481), 0.6859947451),
    ],
)  # fmt: skip
def test_estimates_of_order_201(make, options, second, third, held_out) -> None:  # type: ignore[no-untyped-def]
    problem, ref = reference()
    estimate = make.precompute(ref, problem, **options)
    final = estimate.final((2, 0, 1))
    near(theta(final), third, 1.01e-9)
    near(estimate.score((2, 0, 1)), held_out, 1.01e-9)
    # the same after two steps: the run cut to its first two positions, where no later one has a part
    problem, whole = reference()
    short = ReferenceRun((2, 0), run(problem, AdamWRule(), [0.5, -0.5], [0.1] * 2).recipe, whole.anchors[:3])
    near(theta(make.precompute(short, problem, **options).final((2, 0))), second, 1.01e-9)


def test_which_estimators_rank_all_six_orders() -> None:
    problem, ref = reference()
    own = moments.precompute(ref, problem, hessian="none")
    frozen = table.precompute(ref, problem, derivative="exact")
    orders = sorted(TRUE, key=TRUE.__getitem__)
    want = [(2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 1, 2)]
    assert orders == want
    near(own.scores(want), [0.68416, 0.72114, 0.73069, 0.75188, 0.75461, 0.75771], 5.1e-6)
    near(frozen.scores(want), [0.67007, 0.69505, 0.73265, 0.70681, 0.70605, 0.75771], 5.1e-6)


def test_first_order_is_exact_for_sgd_on_quadratics() -> None:
    problem = a11()
    ref = run(problem, SGDRule(), [0.5, -0.5], [0.1] * 3)
    for make, options in ((table, {"derivative": "exact"}), (moments, {"hessian": "exact"})):
        final = make.precompute(ref, problem, **options).final((2, 0, 1))
        near(theta(final), (0.3488325, 0.3516775), 1e-12)
        near(problem.held_out_loss(final), 0.0690437737, 1.01e-9)  # the spec's tenth digit is rounded otherwise
    for t, batch, want in [(1, 0, (-0.655, -0.19)), (2, 1, (0.1858, -2.0811))]:
        steps, _ = train(problem, ref.recipe, (2, 0, 1)[:t], ref.start.params)
        away = {"theta": theta(steps) - theta(ref.anchors[t].params)}
        near(theta(problem.hvp(ref.anchors[t].params, batch, away)), want, 1e-12)


def test_commutator() -> None:
    problem = a11()
    rate = 0.05
    ref = run(problem, SGDRule(), [0.5, -0.5], [rate] * 3)
    ab, ba = (train(problem, ref.recipe, o, ref.start.params)[0] for o in ((0, 1), (1, 0)))
    start = ref.start.params
    bracket = theta(problem.hvp(start, 1, problem.gradient(start, 0))) - theta(
        problem.hvp(start, 0, problem.gradient(start, 1))
    )
    near(theta(ab) - theta(ba), (0.00075, 0.012875), 1e-12)
    near(rate**2 * bracket, (0.00075, 0.012875), 1e-12)
    middle = {"theta": (theta(ab) + theta(ba)) / 2}
    difference = problem.held_out_loss(ab) - problem.held_out_loss(ba)
    near(difference, -0.0172430383)
    near(rate**2 * float(theta(problem.held_out_gradient(middle)) @ bracket), -0.0172430383)


@pytest.mark.parametrize(
    "rate, predicted",
    [
        (0.02, {
            (0, 1, 2): 0.86613166, (0, 2, 1): 0.86505106, (1, 0, 2): 0.86987076,
            (1, 2, 0): 0.86941298, (2, 0, 1): 0.86459328, (2, 1, 0): 0.86833238,
        }),
        (0.1, {
            (0, 2, 1): 0.06844084, (1, 0, 2): 0.10412128, (1, 2, 0): 0.10088405,
            (2, 0, 1): 0.06520361, (2, 1, 0): 0.09291969,
        }),
    ],
)  # fmt: skip
def test_pairwise_sgd(rate: float, predicted: dict[tuple[int, ...], float]) -> None:
    """Anchor at the start, as the spec's oracle has it."""
    problem = a11()
    ref = run(problem, SGDRule(), [0.5, -0.5], [rate] * 3)
    ends = ReferenceRun(ref.sequence, ref.recipe, (ref.start, ref.end))
    made = pairwise.precompute(ends, problem, anchors=None)
    # between two anchors gradients are interpolated; the oracle has one, at the start, and u at the end
    u = theta(problem.held_out_gradient(ref.end.params))
    grads = torch.stack([theta(problem.gradient(ref.start.params, b)) for b in range(3)])
    curved = torch.stack([theta(problem.hvp(ref.start.params, b, {"theta": u})) for b in range(3)])
    if rate == 0.02:
        near(u, (0.1673912140, -1.8248483900))
        want = [[0, 0.0013000059, 0.0003206252], [0.0050391066, 0, 0.0026326332], [-0.0001371531, 0.0015520369, 0]]
        near((rate**2 * grads @ curved.T).fill_diagonal_(0), want)
    moved, carried = Linear(0.0, torch.ones(2), torch.zeros(2), None).filter([rate] * 3)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    position, kernel, segment = pairwise.expansion(
        moved, carried, [0], (grads @ u)[None], (grads @ curved.T)[None], zero, zero, ref.sequence
    )
    by_hand = pairwise.Pairwise(ref.sequence, Cost(), 0.0, position, kernel, (grads @ curved.T)[None], segment)
    shift = problem.held_out_loss(ref.end.params) - by_hand.score((0, 1, 2))
    for order, want in predicted.items():
        near(by_hand.score(order) + shift, want, 2e-8)
    assert made.score((0, 1, 2)) == pytest.approx(problem.held_out_loss(ref.end.params), abs=1e-12)


def test_momentum_kernel() -> None:
    q = torch.tensor([[0, 0.30, -0.20], [0.10, 0, 0.40], [-0.50, 0.25, 0]], dtype=torch.float64)
    first = torch.tensor([[0.2, -0.1, 0.05]], dtype=torch.float64)
    moved, carried = Linear(0.9, torch.ones(1), torch.zeros(1), None).filter([0.1] * 3)
    near(moved[:, -1] / 0.1, (0.271, 0.19, 0.1), 1e-12)  # tails by position: of 201, batch 2, 0, 1
    near([moved[0, 1] / 0.1, moved[0, 2] / 0.1, moved[1, 2] / 0.1], (0.1, 0.19, 0.1), 1e-12)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    position, kernel, segment = pairwise.expansion(moved, carried, [1], first, q[None], zero, zero, (0, 1, 2))
    made = pairwise.Pairwise((0, 1, 2), Cost(), 0.0, position, kernel, q[None], segment)
    want = {
        (0, 1, 2): -0.003961, (0, 2, 1): -0.005326, (1, 0, 2): -0.001515,
        (1, 2, 0): -0.000195, (2, 0, 1): -0.0041725, (2, 1, 0): -0.0014925,
    }  # fmt: skip
    for order in itertools.permutations(range(3)):
        near(made.score(order), want[order], 1e-9)
