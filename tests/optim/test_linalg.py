"""Newton-Schulz against singular values: theory says what each step does to them."""

import pytest
import torch

from optim.linalg import NEWTON_SCHULZ, newton_schulz
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
