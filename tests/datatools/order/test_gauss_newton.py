"""Gauss-Newton products against J^T H J written out."""

import pytest
import torch
from torch.func import hessian, jacrev
from torch.nn import functional

from datatools import UsageError
from datatools.order import Problem, precompute
from datatools.order.problem import Parts
from datatools.order.reference_run import record
from optim import AdamWRule
from tests.datatools.order.quadratics import random_problem, recipe


def logits(params, x):  # type: ignore[no-untyped-def]
    hidden = x @ params["a"]
    return (hidden.tanh() if "b" in params else hidden) @ params.get("b", torch.eye(3, dtype=torch.float64))


def loss(params, batch):  # type: ignore[no-untyped-def]
    x, y = batch
    return functional.cross_entropy(logits(params, x), y)


def world(depth: int):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    params = {"a": normal(4, 3)} | ({"b": normal(3, 3)} if depth == 2 else {})
    batches = [(normal(5, 4), torch.randint(3, (5,), generator=g)) for _ in range(4)]
    problem = Problem(loss, batches, [(normal(5, 4), torch.randint(3, (5,), generator=g))], hvp_method="gauss-newton")
    return problem, params, {name: normal(*p.shape) for name, p in params.items()}


def test_products_are_those_of_the_matrix() -> None:
    problem, params, v = world(2)
    x, y = problem.batches[0]
    found = problem.hvp(params, 0, v)
    jacobian = jacrev(lambda p: logits(p, x).reshape(-1))(params)
    j = torch.cat([jacobian[name].flatten(1) for name in params], 1)
    h = hessian(lambda z: functional.cross_entropy(z.view(5, 3), y))(logits(params, x).reshape(-1))
    flat = torch.cat([v[name].reshape(-1) for name in params])
    want = j.T @ (h @ (j @ flat))
    got = torch.cat([found[name].reshape(-1) for name in params])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert float(flat @ got) > 0
    exact = Problem(loss, problem.batches, problem.validation).hvp(params, 0, v)
    assert not torch.allclose(exact["a"], found["a"], rtol=1e-2), "the model's own curvature is left out"
    halves = Problem(
        lambda p, part: loss(p, part) / 2, [Parts([problem.batches[0]] * 2)], problem.validation,
        hvp_method="gauss-newton",
    )  # fmt: skip
    torch.testing.assert_close(halves.hvp(params, 0, v), found)


def test_a_linear_model_has_no_other_curvature() -> None:
    problem, params, v = world(1)
    exact = Problem(loss, problem.batches, problem.validation)
    torch.testing.assert_close(problem.hvp(params, 1, v), exact.hvp(params, 1, v), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(problem.held_out_hvp(params, v), exact.held_out_hvp(params, v), rtol=1e-10, atol=1e-12)


def test_a_reduced_model_of_gauss_newton_products_is_positive() -> None:
    problem, params, _ = world(2)
    run = record(problem, recipe(AdamWRule(), [0.05] * 4, ("a", "b")), range(4), params, anchors=3)
    made = precompute("reduced", run, problem, second_moment="expected", k=4)
    assert float(torch.linalg.eigvalsh(made.matrices).min()) > -1e-10  # type: ignore[attr-defined]
    assert made.score(run.sequence) == pytest.approx(problem.held_out_loss(run.end.params))
    exact = Problem(loss, problem.batches, problem.validation)
    other = precompute("reduced", run, exact, second_moment="expected", k=4)
    assert other.score([3, 2, 1, 0]) != made.score([3, 2, 1, 0])


def test_a_loss_without_logits_is_refused() -> None:
    quadratic = random_problem(2, 3, 0)
    problem = Problem(quadratic.loss, quadratic.batches, quadratic.validation, hvp_method="gauss-newton")
    theta = {"theta": torch.ones(3, dtype=torch.float64)}
    with pytest.raises(UsageError, match="Gauss-Newton products need a loss computed by"):
        problem.hvp(theta, 0, theta)
