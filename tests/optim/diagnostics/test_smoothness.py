"""Smoothness in two norms: the estimators against exact Hessians."""

import math

import numpy as np
import pytest
import torch

from optim.diagnostics import Rotation, frobenius, hessian, lanczos, linf_smoothness, path_smoothness
from optim.diagnostics.smoothness import row_scales


def quadratic(d=30, seed=0):
    """(x, H, loss) of x^T H x / 2 in two tensors."""
    made = torch.Generator().manual_seed(seed)
    h = torch.randn(d, d, generator=made, dtype=torch.float64) / d**0.5
    h = h + h.T + torch.diag(torch.linspace(0, 4, d, dtype=torch.float64))
    params = [torch.randn(shape, generator=made, dtype=torch.float64).requires_grad_() for shape in ((4, 5), (d - 20,))]

    def loss():
        x = torch.cat([p.flatten() for p in params])
        return 0.5 * x @ h @ x

    return params, h, loss


def h_times(h, v):
    """H v of two tensors with 20 and 10 entries, flat."""
    return (h @ torch.cat([x.flatten() for x in v])).split([20, 10])


@pytest.mark.golden
def test_against_golden(reference):
    """The estimates from the recorded probes, of the Hessian and of the rotated one; and the exact numbers beside."""
    stored = reference("linf")
    h, probes, q = (torch.tensor(stored[k]) for k in ("H", "cauchy_over_d", "Q"))
    d = len(h)
    for name, matrix in (("plain", h), ("rotated", q @ h @ q.T)):
        products = probes @ matrix
        if not np.isclose(matrix.abs().sum(), stored[f"norm11_exact/{name}"]):
            products = probes @ (q.T @ h @ q)
        scales = row_scales(products)
        assert d * float(scales.sum()) == pytest.approx(float(stored[f"norm11_iqr_estimate/{name}"]), rel=1e-9)
        assert d * float(scales.max()) == pytest.approx(float(stored[f"max_row_sum_iqr/{name}"]), rel=1e-9)
        median = d * float(row_scales(products, "median").sum())
        assert median == pytest.approx(float(stored[f"norm11_median_estimate/{name}"]), rel=1e-9)
        assert median == pytest.approx(float(stored[f"norm11_exact/{name}"]), rel=0.15)
        top = lanczos(lambda v, m=matrix: [m @ v[0]], [torch.ones(d, dtype=torch.float64)])
        assert top["largest"] == pytest.approx(float(stored[f"spectral_norm/{name}"]), rel=1e-9)


def test_probes_estimate_the_norm_of_a_real_loss():
    """Through Hessian-vector products, 400 probes: within a tenth; a rotation raises it and leaves the l2 norm."""
    params, h, loss = quadratic()
    product = hessian(loss, params)
    found = linf_smoothness(product, params, probes=400)
    assert found["norm11"] == pytest.approx(float(h.abs().sum()), rel=0.1)
    assert found["norm11_median"] == pytest.approx(float(h.abs().sum()), rel=0.1)
    assert found["largest_row_sum"] == pytest.approx(float(h.abs().sum(1).max()), rel=0.3)
    assert found["dimension"] == 30 and found["norm11_over_d"] == found["norm11"] / 30
    diagonal = torch.diag(torch.linspace(0, 4, 30, dtype=torch.float64))

    def plain(v):
        return [x.view(p.shape) for x, p in zip(h_times(diagonal, v), params, strict=True)]

    turn = Rotation(seed=1)

    def turned(v):
        return turn(plain(turn.back(v)))

    straight = linf_smoothness(plain, params, probes=200)["norm11"]
    rotated = linf_smoothness(plain, params, probes=200, rotation=turn)["norm11"]
    assert straight == pytest.approx(60, rel=0.1) and rotated > 1.5 * straight
    start = [torch.ones_like(p) for p in params]
    assert lanczos(turned, start)["largest"] == pytest.approx(4) == lanczos(plain, start)["largest"]


def test_sampled_coordinates_estimate_the_same_sum():
    """The mean over draws of a third of the coordinates is near the exact norm, as that over all of them is."""
    params, h, _ = quadratic()

    def product(v):
        return [x.view(p.shape) for x, p in zip(h_times(h, v), params, strict=True)]

    for coordinates, looked_at in ((5, 10.0), (1000, 30.0)):
        parts = [linf_smoothness(product, params, probes=60, coordinates=coordinates, seed=s) for s in range(40)]
        assert {p["coordinates"] for p in parts} == {looked_at}
        assert np.mean([p["norm11"] for p in parts]) == pytest.approx(float(h.abs().sum()), rel=0.1)


def test_quantiles_are_numpys_and_bad_probes_are_dropped():
    x = torch.randn(23, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = (np.quantile(x, 0.75, axis=0) - np.quantile(x, 0.25, axis=0)) / 2
    np.testing.assert_allclose(row_scales(x), want, rtol=1e-12)
    spoiled = torch.cat([x, torch.full((2, 40), math.nan, dtype=torch.float64)])
    torch.testing.assert_close(row_scales(spoiled), row_scales(x))
    with pytest.raises(ValueError, match="each of the 2 probes"):
        row_scales(spoiled[-2:])
    with pytest.raises(ValueError, match="how = 'mean'"):
        row_scales(x, "mean")


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_lanczos_finds_both_ends(reorthogonalize):
    params, h, loss = quadratic()
    values = torch.linalg.eigvalsh(h)
    grads = torch.autograd.grad(loss(), params)
    found = lanczos(hessian(loss, params), grads, steps=30, reorthogonalize=reorthogonalize)
    assert found["largest"] == pytest.approx(float(values[-1]), rel=1e-8)
    assert found["smallest"] == pytest.approx(float(values[0]), rel=1e-8)


def test_lanczos_stops_in_an_invariant_subspace():
    eye = [torch.ones(5)]
    assert lanczos(lambda v: [3 * v[0]], eye) == {"largest": pytest.approx(3), "smallest": pytest.approx(3), "steps": 1}
    with pytest.raises(ValueError, match=r"start is 0\.0"):
        lanczos(lambda v: list(v), [torch.zeros(3)])


def test_frobenius_and_what_is_left_alone():
    params, h, loss = quadratic()
    before, values = torch.get_rng_state(), [p.detach().clone() for p in params]
    assert frobenius(hessian(loss, params), params, probes=200) == pytest.approx(float(h.norm()), rel=0.05)
    linf_smoothness(hessian(loss, params), params, probes=2)
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in params)
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))


def test_rotations_are_orthogonal():
    turn = Rotation(seed=3, size=8)
    tensors = [torch.randn(5, 7, dtype=torch.float64), torch.randn((), dtype=torch.float64), torch.randn(3)]
    for x, back, there in zip(tensors, turn.back(turn(tensors)), turn(tensors), strict=True):
        torch.testing.assert_close(back, x)
        assert float(there.norm()) == pytest.approx(float(x.norm())) and there.shape == x.shape
    assert not torch.allclose(turn(tensors)[0], tensors[0])


def test_path_forms_agree_at_their_limits():
    """Blocks of one entry: the l-infinity form; one block: d times the l2 form. And the largest step counts."""
    made = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 6, generator=made, dtype=torch.float64) for _ in range(2))
    entries = [({str(i): a[i] for i in range(6)}, {str(i): b[i] for i in range(6)}) for a, b in zip(x, g, strict=True)]
    found = path_smoothness(entries)
    dx, dg = x.diff(dim=0), g.diff(dim=0)
    want = float((dg.abs().sum(1) / dx.abs().amax(1)).max())
    assert found["linf"] == pytest.approx(want) and found["blockwise"] == pytest.approx(want)
    assert found["l2"] == pytest.approx(float((dg.norm(dim=1) / dx.norm(dim=1)).max()))
    whole = path_smoothness(entries, block=lambda name: "all")
    assert whole["blockwise"] == pytest.approx(6 * found["l2"])
    assert math.isnan(path_smoothness(entries[:1])["linf"]) and math.isnan(path_smoothness([entries[0]] * 2)["l2"])


@pytest.mark.parametrize("settings", [{"probes": 0}, {"coordinates": 0}, {"probes": 1.5}])
def test_refusals(settings):
    params, _, loss = quadratic()
    with pytest.raises(ValueError, match="an integer of at least 1"):
        linf_smoothness(hessian(loss, params), params, **settings)
    with pytest.raises(ValueError, match="no parameters"):
        linf_smoothness(hessian(loss, params), [])
