"""Newton-Schulz and whitening against singular values, on which theory says what they do; norms."""

import math

import pytest
import torch

from optim.linalg import (
    NEWTON_SCHULZ,
    NORMS,
    multi_normalised,
    newton_schulz,
    polar,
    unit_rms,
    whiten,
)
from tests.optim import golden
from tests.optim.harness import randn
from tests.reference.muon import orthogonalised
from tests.reference.sinkgd import normalised
from tests.reference.swan import whitened


@pytest.mark.parametrize("form", ["plain", "torch"])
@pytest.mark.parametrize("coefficients", sorted(NEWTON_SCHULZ))
@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 7), (1, 5), (5, 1), (1, 1), (0, 3), (3, 0)])
def test_acts_on_singular_values_alone(shape, coefficients, form):
    x = randn(shape, 1)
    want = orthogonalised(x.numpy(), coefficients, form=form)
    torch.testing.assert_close(
        newton_schulz(x, coefficients=coefficients, form=form),
        torch.as_tensor(want),
        rtol=1e-8,
        atol=1e-10,
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


@pytest.mark.parametrize(
    ("coefficients", "steps", "lowest", "error"),
    [("polar_express_8", 8, 1e-3, 0.01), ("deepseek_v4", 10, 1e-3, 0.1), ("cans", 5, 1e-2, 0.3)],
)
def test_published_schedules_converge(coefficients, steps, lowest, error):
    """All singular values above the lowest come to 1, with the error that the schedule allows."""
    u, _, vt = torch.linalg.svd(randn((40, 40), 3))
    sizes = torch.logspace(0, math.log10(lowest), 40, dtype=torch.float64)
    x = u @ torch.diag(sizes / sizes.norm()) @ vt
    s = torch.linalg.svdvals(newton_schulz(x, coefficients=coefficients, steps=steps))
    assert float((s - 1).abs().max()) < error


@pytest.mark.parametrize("form", ["plain", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_zero_gives_zero(dtype, form):
    assert torch.equal(newton_schulz(torch.zeros(3, 5), dtype=dtype, form=form), torch.zeros(3, 5))


TINY_AND_HUGE = {
    torch.float32: (-110, 100),
    torch.float64: (-1000, 1000),
    torch.bfloat16: (-110, 100),
    torch.float16: (-8, 12),
}
"""Dtype -> exponents of 2 that keep a matrix of ordinary numbers normal in it."""


@pytest.mark.parametrize("form", ["plain", "torch"])
@pytest.mark.parametrize("products", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", TINY_AND_HUGE, ids=str)
def test_the_scale_of_a_matrix_does_not_matter(dtype, products, form):
    """Tiny gradients stay orthogonal and huge ones do not overflow: powers of two change no bit of the result."""
    x = randn((12, 30), 5).to(dtype)
    want = newton_schulz(x, dtype=products, form=form, eps=0.0 if form == "torch" else 1e-7)
    s = torch.linalg.svdvals(want.double())
    assert 0.6 < float(s.min()) and float(s.max()) < 1.3
    for exponent in (*TINY_AND_HUGE[dtype], -40, 40):
        scaled = (x.double() * 2.0**exponent).to(dtype)
        if not torch.equal(scaled.double(), x.double() * 2.0**exponent):
            continue  # beyond this dtype
        got = newton_schulz(scaled, dtype=products, form=form)
        if exponent > 0:
            torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(got, newton_schulz(x, dtype=products, form="torch")), exponent


def test_eps_is_the_published_one_down_to_a_norm_of_eps_and_then_fades():
    """At a norm of eps x / (|x| + eps) is half of the unit matrix; at a tenth of eps it is a unit matrix."""
    x = randn((6, 9), 6)
    x = x / torch.linalg.matrix_norm(x)
    one = ((1.0, 0.0, 0.0),)  # a polynomial that changes nothing
    for norm, want in (
        (1.0, 1 / 1.01),
        (0.1, 1 / 1.1),
        (0.01, 0.5),
        (0.0055, 0.0055 / (0.0055 + 0.005)),
        (0.001, 1.0),
        (1e-30, 1.0),
    ):
        got = newton_schulz(norm * x, coefficients=one, eps=0.01)
        torch.testing.assert_close(got, want * x, rtol=1e-12, atol=1e-15)
    for norm in (1.0, 0.01, 0.001, 1e-300):
        torch.testing.assert_close(newton_schulz(norm * x, coefficients=one, eps=0.01, form="torch"), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_does_not_depend_on_the_scale_either(dtype):
    x = randn((5, 8), 7).to(dtype)
    want = whiten(x, steps=14, beta=0.5)
    for exponent in (-100, -60, 60, 100):
        torch.testing.assert_close(whiten(x * 2.0**exponent, steps=14, beta=0.5), want, rtol=1e-6, atol=1e-6)


def test_tiny_gradients_have_derivatives():
    """Order estimation differentiates through steps; a zero matrix is no reason for NaN."""
    for x in (1e-20 * randn((3, 5), 8), torch.zeros(3, 5, dtype=torch.float64)):
        _, moved = torch.func.jvp(newton_schulz, (x,), (randn((3, 5), 9),))
        assert moved.isfinite().all()


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


@pytest.mark.parametrize("coefficients", sorted(NEWTON_SCHULZ))
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.float64, 2e-13)])
def test_steps_on_one_gram_matrix_are_exact_down_to_the_smallest_singular_values(dtype, most, coefficients):
    """Wide and tall matrices of singular values from 1 to 1e-4; all five steps on one Gram matrix would fail."""
    m, n = 48, 130
    u, v = (torch.linalg.qr(randn((side, m), i))[0] for i, side in enumerate((m, n)))
    x = (u * torch.logspace(0, -4, m, dtype=torch.float64)) @ v.T
    want = torch.as_tensor(orthogonalised(x.numpy(), coefficients))
    for matrix, wanted in ((x, want), (x.mT, want.mT)):
        got = newton_schulz(matrix.to(dtype), coefficients=coefficients)
        assert float((got - wanted).norm() / wanted.norm()) < most


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 7), (1, 5), (5, 1)])
def test_whitening_acts_on_singular_values_alone(shape):
    x = randn(shape, 6)
    for steps, beta in ((0, 0.5), (3, 0.5), (8, 0.8)):
        want = torch.as_tensor(whitened(x.numpy(), steps, beta))
        torch.testing.assert_close(whiten(x, steps=steps, beta=beta), want, rtol=1e-8, atol=1e-10)
    assert torch.equal(whiten(torch.zeros(shape), steps=10, beta=0.8), torch.zeros(shape))
    batch = torch.stack([x, 100 * x])
    torch.testing.assert_close(whiten(batch, steps=8, beta=0.8)[1], whiten(x, steps=8, beta=0.8))


def test_polar_leaves_out_what_is_rounding():
    """A rank-one matrix has a polar factor of rank one; zero has none; and it is what many Newton-Schulz steps give."""
    x = randn((4, 1), 7) @ randn((1, 3), 8)
    torch.testing.assert_close(polar(x), x / torch.linalg.matrix_norm(x), rtol=1e-10, atol=1e-12)
    assert torch.equal(polar(torch.zeros(2, 3)), torch.zeros(2, 3)) and polar(torch.zeros(0, 3)).shape == (0, 3)
    full = randn((5, 5), 9)
    slow = newton_schulz(full, coefficients=((2.0, -1.5, 0.5),), steps=60)
    torch.testing.assert_close(polar(full), slow, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_norms(norm):
    """Each is its reference, and of Frobenius norm sqrt(m n); zero rows, columns and matrices stay."""
    for shape in ((3, 5), (5, 3), (4, 4), (1, 3), (3, 1)):
        x = randn(shape, 10)
        got = NORMS[norm](x)
        torch.testing.assert_close(got, torch.as_tensor(normalised(x.numpy(), norm)), rtol=1e-9, atol=1e-11)
        assert float(got.square().sum()) == pytest.approx(shape[0] * shape[1])
    x = randn((4, 3), 11)
    x[2], x[:, 1] = 0, 0
    got = NORMS[norm](x)
    assert got.isfinite().all() and not got[2].any() and got[:, 1].abs().max() < 1e-12
    assert not NORMS[norm](torch.zeros(2, 3)).any()


def test_golden_normalisers(golden_dir, record_property):
    """The shared numbers of SWAN's normalisation and whitening, SinkGD's rounds, and row and polar in turns."""
    cases = golden.of_kind(golden_dir, "swan/sinkgd/mngd functions")
    for case in cases:
        record_property("golden", case.id)
        hold_normalisers(golden.arrays(case.folder / case.entry["file"]))
    if not cases:
        pytest.skip(f"no case of these functions in {golden_dir}")


def hold_normalisers(stored):
    held = 0
    for key, array in stored.items():
        what, name = key.split("/")
        if what == "in":
            continue
        x, rows = (torch.as_tensor(stored[f"{k}/{name}"]) for k in ("in", "gradnorm_centered"))
        close = {"rtol": 1e-7, "atol": 1e-9}
        if what == "gradnorm_centered":
            got = unit_rms(x - x.mean(-1, keepdim=True), dim=-1, eps=1e-8)
        elif what == "gradnorm_rms":
            got = unit_rms(x, dim=-1, eps=1e-8)
        elif what.startswith("sinkhorn_L"):
            got = multi_normalised(x, norms=("row", "column"), rounds=int(what[-1]))
        elif what == "mngd_row_polar_L3":
            got = multi_normalised(x, norms=("row", "spectral"), rounds=3)
        elif what == "whiten_exact":
            got = polar(rows)
        else:
            steps, beta = what.removeprefix("whiten_k").split("_b")
            got = whiten(rows, steps=int(steps), beta=float(beta))
        torch.testing.assert_close(got, torch.as_tensor(array), **close, msg=lambda m, key=key: f"{key}: {m}")
        held += 1
    assert held
