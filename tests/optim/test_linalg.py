"""Newton-Schulz against singular values: theory says what each step does to them; and the radial projection."""

import pytest
import torch

from optim.linalg import NEWTON_SCHULZ, newton_schulz, remove_radial
from tests.optim.harness import randn
from tests.reference.muon import orthogonalised


@pytest.mark.parametrize("form", ["plain", "torch"])
@pytest.mark.parametrize("coefficients", sorted(NEWTON_SCHULZ))
@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 7), (1, 5), (5, 1), (1, 1), (0, 3), (3, 0)])
def test_acts_on_singular_values_alone(shape, coefficients, form):
    x = randn(shape, 1)
    want = orthogonalised(x.numpy(), coefficients, form=form)
    torch.testing.assert_close(
        newton_schulz(x, coefficients=coefficients, form=form), torch.as_tensor(want), rtol=1e-8, atol=1e-10
    )


def test_more_steps_than_triples_repeat_the_last():
    triples = ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))
    x = randn((3, 3), 2)
    want = torch.as_tensor(orthogonalised(x.numpy(), triples, steps=30))
    got = newton_schulz(x, coefficients=triples, steps=30)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(got @ got.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)  # this one converges


def test_keller_jordan_band():
    """Singular values above 0.002 of the norm come near 1, but not to it."""
    u, _, vt = torch.linalg.svd(randn((40, 40), 3))
    x = u @ torch.diag(torch.logspace(0, -2.5, 40, dtype=torch.float64)) @ vt
    s = torch.linalg.svdvals(newton_schulz(x))
    assert 0.5 < float(s.min()) and float(s.max()) < 1.25


@pytest.mark.parametrize("form", ["plain", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_zero_gives_zero(dtype, form):
    assert torch.equal(newton_schulz(torch.zeros(3, 5), dtype=dtype, form=form), torch.zeros(3, 5))


@pytest.mark.parametrize("form", ["plain", "torch"])
@pytest.mark.parametrize("batch", [(4,), (2, 3), (0,)])
def test_batch_equals_separate_calls(batch, form):
    x = randn((*batch, 5, 3), 4)
    x = x * torch.logspace(-3, 3, len(x), dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))  # a norm for each matrix
    got = newton_schulz(x, form=form)
    assert got.shape == x.shape
    for index in torch.cartesian_prod(*[torch.arange(n) for n in batch]).view(-1, len(batch)):
        at = tuple(index.tolist())
        torch.testing.assert_close(got[at], newton_schulz(x[at], form=form), rtol=1e-9, atol=1e-11)


def test_bfloat16_is_near_float64_on_full_rank_matrices():
    x = randn((16, 16), 5, torch.float32) + 8 * torch.eye(16)
    low, high = newton_schulz(x, dtype=torch.bfloat16), newton_schulz(x, dtype=torch.float64)
    assert low.dtype == high.dtype == torch.float32
    assert float((low - high).norm() / high.norm()) < 0.05


def test_remove_radial_by_rows_then_whole_then_not_at_all():
    param = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    update = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    rows_orthogonal = torch.tensor([[-4.0, 3.0, 7.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    whole_orthogonal = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, -12.5]], dtype=torch.float64)  # <g, p> = 25 - 25

    tangent, removed = remove_radial(update, rows_orthogonal, param, delta=0.1, eps=0.0)
    assert removed and torch.allclose((tangent * param).sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    tangent, removed = remove_radial(update, whole_orthogonal, param, delta=0.1, eps=0.0)
    assert removed and abs((tangent * param).sum()) < 1e-12 and (tangent * param).sum(1).abs().min() > 1
    for delta, grad in ((0.0, rows_orthogonal), (0.1, param)):
        tangent, removed = remove_radial(update, grad, param, delta=delta, eps=1e-8)
        assert not removed and torch.equal(tangent, update)
    for shape in ((), (3,), (0, 3), (2, 0)):
        u = torch.ones(shape)
        tangent, removed = remove_radial(u, torch.zeros(shape), u, delta=1.0, eps=1e-8)
        assert not removed and torch.equal(tangent, u)


def test_remove_radial_threshold_falls_with_the_row_length():
    param = torch.zeros(1, 4, dtype=torch.float64)
    param[0, 0] = 1.0
    for cosine, delta, expected in ((0.24, 0.5, True), (0.26, 0.5, False)):  # the limit is delta / sqrt(4)
        grad = torch.tensor([[cosine, (1 - cosine**2) ** 0.5, 0.0, 0.0]], dtype=torch.float64)
        _, removed = remove_radial(torch.ones_like(param), grad, param, delta=delta, eps=0.0)
        assert bool(removed) is expected
