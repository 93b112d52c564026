"""Products against dense Hessians, and estimates of diagonals that are unbiased."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.utils.checkpoint import checkpoint

from optim import curvature
from tests.optim.curvature.losses import classifier
from tests.optim.harness import assert_same, parameters, randn, snapshot

# ------------------------------------------------------------------------------------------------------------ products


def problem(dtype: torch.dtype = torch.float64):
    """Two parameters, a smooth loss, and its dense Hessian in (a, b) flattened."""
    a, b = Parameter(randn((3, 2), 1, dtype)), Parameter(randn((2,), 2, dtype))
    x = randn((5, 3), 3, dtype)

    def loss_of(a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(x @ a + b).square().mean() + 0.1 * (a[0] * b).sum() ** 2

    with torch.no_grad():
        blocks = torch.autograd.functional.hessian(loss_of, (a.detach(), b.detach()))
    dense = torch.cat([torch.cat([blocks[i][j].reshape(n, -1) for j in range(2)], 1) for i, n in enumerate((6, 2))])
    return [a, b], lambda: loss_of(a, b), dense


def flat(tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_products_equal_the_dense_hessian(method):
    params, loss, dense = problem()
    vectors = [randn(tuple(p.shape), 7 + i) for i, p in enumerate(params)]
    start = snapshot(params)
    got = curvature.hvp(loss, params, vectors, method=method)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if method == "exact" else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(flat(got), dense @ flat(vectors), **tolerance)
    assert_same(params, start, "parameters come back bit for bit:")
    parts = curvature.hvp([lambda: 0.25 * loss(), lambda: 0.75 * loss()], params, vectors, method=method)
    torch.testing.assert_close(flat(parts), dense @ flat(vectors), **tolerance)


def test_products_in_float32_by_differences():
    params, loss, dense = problem(torch.float32)
    vectors = [randn(tuple(p.shape), 7 + i, torch.float32) for i, p in enumerate(params)]
    got = flat(curvature.hvp(loss, params, vectors, method="difference"))
    torch.testing.assert_close(got, dense @ flat(vectors), rtol=1e-2, atol=1e-3)


def test_what_the_loss_does_not_curve():
    """Zero where the loss is linear in a parameter, None where it does not reach one."""
    a, b, c = parameters([(3,), (2,), (4,)])
    vectors = [torch.ones_like(p) for p in (a, b, c)]
    product = curvature.hvp(lambda: (2 * a).sum() + c.square().sum(), [a, b, c], vectors)
    assert torch.equal(product[0], torch.zeros_like(a)) and product[1] is None
    assert torch.equal(product[2], 2 * vectors[2])


class Once(torch.autograd.Function):
    """x^3 with a first derivative only, as a fused kernel has."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def test_kernels_without_a_second_derivative_take_differences_and_say_so():
    p, v = Parameter(randn((4,), 1)), randn((4,), 2)
    x = p.detach()
    words = "does not depend on any parameter"
    losses = (  # for both torch itself would give zeros
        (lambda: Once.apply(p).sum(), 6 * x * v),
        (lambda: Once.apply(p).square().sum(), 30 * x**4 * v),
    )
    for loss, want in losses:
        with pytest.warns(RuntimeWarning, match=f"{words}.*finite differences"):
            (got,) = curvature.hvp(loss, [p], [v])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
        with pytest.raises(RuntimeError, match=words):
            curvature.hvp(loss, [p], [v], method="exact")
    low = Parameter(p.detach().bfloat16())
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="16-bit"):
        curvature.hvp(lambda: Once.apply(low).sum(), [low], [v.bfloat16()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_has_products(dtype):
    """scaled_dot_product_attention takes its math kernel inside, for its fused one has no second derivative."""
    q = Parameter(randn((1, 2, 5, 8), 1, dtype))
    k, v = randn((1, 2, 5, 8), 2, dtype), randn((1, 2, 5, 8), 3, dtype)

    def loss() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).float().square().sum()

    with pytest.raises(RuntimeError, match="not implemented"):
        (grad,) = torch.autograd.grad(loss(), [q], create_graph=True)
        torch.autograd.grad(grad, [q], torch.ones_like(grad))
    u = randn((1, 2, 5, 8), 4, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (got,) = curvature.hvp(loss, [q], [u])

    def plain(q: Tensor) -> Tensor:
        scores = (q @ k.double().mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        return (scores.softmax(-1) @ v.double()).square().sum()

    _, want = torch.autograd.functional.hvp(plain, q.detach().double(), u.double())
    rough = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, **rough)


# ----------------------------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("kind", ["normal", "signs"])
def test_hutchinson_is_unbiased(kind):
    """The mean of many estimates is the diagonal; with random signs, one estimate of a diagonal Hessian is exact."""
    params, loss, dense = problem()
    total, count = torch.zeros(8).double(), 600
    for seed in range(count):
        probes = [curvature.draw(p, kind, 10 * seed + i) for i, p in enumerate(params)]
        total += flat(curvature.hutchinson(loss, params, probes))
    spread = (dense.square().sum(1) * 2 / count).sqrt()
    assert ((total / count - dense.diagonal()).abs() < 5 * spread).all()
    p, scale = Parameter(randn((6,), 1)), randn((6,), 2)
    if kind == "signs":
        (exact,) = curvature.hutchinson(lambda: (scale * p**2).sum(), [p], [curvature.draw(p, kind, 3)])
        torch.testing.assert_close(exact, 2 * scale)


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_gauss_newton_bartlett_is_unbiased(reduction):
    """The mean of many estimates is the diagonal, over the five terms that count."""
    w, loss, diagonal = classifier(reduction)
    estimates = torch.stack([curvature.gauss_newton(loss, [w], seed=seed)[0] for seed in range(800)])
    assert (estimates >= 0).all()
    error = (estimates.mean(0) - diagonal).abs()
    assert (error < 5 * estimates.std(0) / len(estimates) ** 0.5).all()
    assert len({float(e.sum()) for e in estimates[:20]}) > 10  # labels are drawn anew


def test_gauss_newton_draws_where_labels_are_shares_and_over_other_layouts():
    """Soft targets, and logits [b, classes, positions], give the estimate of the same rows in one list."""
    w, x = Parameter(randn((3, 2), 1)), randn((4, 5, 2), 2)

    def rows() -> Tensor:
        return functional.cross_entropy((x @ w.T).reshape(20, 3), torch.zeros(20).long())

    def positions() -> Tensor:
        return functional.cross_entropy((x @ w.T).mT, torch.zeros(4, 5).long())

    def shares() -> Tensor:
        return functional.cross_entropy((x @ w.T).reshape(20, 3), torch.full((20, 3), 1 / 3).double())

    a, b, c = (curvature.gauss_newton(f, [w], seed=5)[0] for f in (rows, positions, shares))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, c)


def test_gauss_newton_over_parts_is_that_of_their_sum():
    """B counts the terms of all micro-batches, and the gradient is squared after they are summed."""
    w, x = Parameter(randn((3, 2), 1)), 50 * randn((6, 2), 2)  # saturated: the model draws the labels it is sure of
    w.data *= 50

    def part(rows: slice) -> Tensor:
        logits = x[rows] @ w.T
        return functional.cross_entropy(logits + 0.01 * w.sum(), logits.argmin(1), reduction="sum") / 6

    (whole,) = curvature.gauss_newton(lambda: part(slice(None)), [w], seed=1)
    (parts,) = curvature.gauss_newton([lambda: part(slice(0, 2)), lambda: part(slice(2, 6))], [w], seed=1)
    torch.testing.assert_close(whole, parts)


def test_losses_that_do_not_serve_are_refused():
    w, loss, _ = classifier()
    with pytest.raises(ValueError, match="does not call torch.nn.functional.cross_entropy"):
        curvature.gauss_newton(lambda: w.square().sum(), [w], seed=0)
    unsuitable = ((lambda: w, r"shape \(3, 2\)"), (lambda: loss().detach(), r"shape \(\)"), (lambda: 1.0, "float"))
    for bad, words in unsuitable:
        with pytest.raises(ValueError, match=words):
            curvature.hvp(bad, [w], [w.detach()])
    with pytest.raises(ValueError, match="method = 'exakt'"):
        curvature.hvp(loss, [w], [w.detach()], method="exakt")


def test_parameters_that_checkpointing_hides_are_refused():
    """With use_reentrant=True, `torch.autograd.grad` gives them no gradient and does not say so."""
    inner, outer = torch.nn.Linear(3, 3).double(), torch.nn.Linear(3, 2).double()
    params = [*inner.parameters(), *outer.parameters()]
    x, y = randn((5, 3), 1, torch.float64).requires_grad_(), torch.tensor([0, 1, 1, 0, 1])

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outer(checkpoint(inner, x, use_reentrant=True).tanh()), y)

    ones = [torch.ones_like(p) for p in params]
    for ask in (
        lambda: curvature.hvp(loss, params, ones),
        lambda: curvature.hvp(loss, params, ones, method="difference"),
        lambda: curvature.gauss_newton(loss, params, seed=0),
        lambda: curvature.gauss_newton_product(loss, params, ones),
    ):
        with pytest.raises(ValueError, match="use_reentrant=False"):
            ask()
