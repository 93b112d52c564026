"""The same matrix on every tiling, and inner products as theory says."""

import pytest
import torch

from datatools import PROJECTORS
from datatools.projectors import rademacher as rademacher_module
from datatools.projectors import sjlt as sjlt_module
from datatools.projectors.base import bits, key
from optim import AdamW, UpdateMap

SHAPES = {"a": torch.Size((6, 5)), "b": torch.Size((300,)), "c": torch.Size((40, 50))}
RANDOM = ["sjlt", "rademacher"]


def grads(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, *shape, generator=generator) for name, shape in SHAPES.items()}


def flat(g: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten(1) for t in g.values()], 1)


def test_bits_are_splitmix64():
    """Reference values of Vigna's splitmix64.c, seed 1234567."""
    first = bits(torch.arange(5), 1234567)
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [int(v) % 2**64 for v in first] == want


@pytest.mark.parametrize("name", PROJECTORS)
def test_project_is_linear_and_a_sum_over_parameters(name):
    p = PROJECTORS[name].of(SHAPES, 64, 3)
    x, y = grads(4, 1), grads(4, 2)
    whole = p.project(x)
    assert whole.shape == (4, p.dim) and whole.dtype == torch.float32
    torch.testing.assert_close(sum(p.block(n, g) for n, g in x.items()), whole, rtol=1e-5, atol=1e-4)
    both = p.project({n: 2 * x[n] - y[n] for n in x})
    torch.testing.assert_close(both, 2 * whole - p.project(y), rtol=1e-4, atol=1e-3)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(p.project({n: g[order] for n, g in x.items()}), whole[order])


@pytest.mark.parametrize("name", RANDOM)
def test_the_matrix_does_not_depend_on_tiling_or_neighbours(name, monkeypatch):
    x = grads(3)
    whole = PROJECTORS[name](dim=96, seed=5).project(x)
    monkeypatch.setattr(sjlt_module, "_TILE", 7)
    monkeypatch.setattr(rademacher_module, "_TILE_BYTES", 4 * 96 * 11)
    p = PROJECTORS[name](dim=96, seed=5)
    torch.testing.assert_close(p.project(x), whole, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(p.block("b", x["b"]), PROJECTORS[name](dim=96, seed=5).project({"b": x["b"]}))
    assert not torch.allclose(PROJECTORS[name](dim=96, seed=6).project(x), whole)
    assert not torch.allclose(p.block("c", x["b"]), p.block("b", x["b"]))


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("dim", [100, 256])
def test_inner_products_are_unbiased_with_the_known_variance(name, dim):
    """Over seeds: the mean within 4 standard errors of the exact product, the variance within a quarter of theory."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 900, generator=generator)
    products = []
    for seed in range(400):
        p = PROJECTORS[name](dim=dim, seed=seed)
        products.append(float((p.block("w", x) * p.block("w", y)).sum()))
    got = torch.tensor(products, dtype=torch.float64)
    exact = float((x * y).sum())
    cross = float(x.square().sum() * y.square().sum()) + exact**2 - 2 * float((x.square() * y.square()).sum())
    variance = cross / dim
    assert abs(got.mean() - exact) < 4 * (variance / len(got)) ** 0.5
    assert 0.75 < got.var() / variance < 1.25


def test_identity_keeps_every_inner_product():
    x, y = grads(2, 1), grads(2, 2)
    p = PROJECTORS["identity"].of(SHAPES, 1, 0)
    torch.testing.assert_close(p.project(x) @ p.project(y).T, flat(x) @ flat(y).T)


def test_rademacher_has_only_signs_and_both_about_equally():
    p = PROJECTORS["rademacher"](dim=70, seed=1)
    signs = p.signs(key(1, "w", (500,)), 0, 500, torch.device("cpu"))
    assert signs.shape == (500, 70) and set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / (500 * 70) ** 0.5


def test_spec_worked_example_of_bucket_sums():
    """spec/less.md section 5: buckets [0,1,0,1], signs [+,-,-,+] send [1, 2, -1, 0.5] to [2, -1.5]."""
    out = torch.zeros(1, 2)
    x = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    out.index_add_(1, torch.tensor([0, 1, 0, 1]), x * torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert out.tolist() == [[2.0, -1.5]]


def test_values_never_change():
    """The same numbers in every release: a store made last year must still be comparable."""
    x = torch.arange(1.0, 9.0)[None]
    assert PROJECTORS["sjlt"](dim=4, seed=0).block("w", x).tolist() == FROZEN["sjlt"]
    got = PROJECTORS["rademacher"](dim=4, seed=0).block("w", x)
    torch.testing.assert_close(got, torch.tensor(FROZEN["rademacher"]))


FROZEN = {"sjlt": [[-7.0, -12.0, -1.0, -4.0]], "rademacher": [[-12.0, -2.0, 5.0, -10.0]]}


@pytest.mark.parametrize("name", PROJECTORS)
def test_dim_must_be_positive(name):
    with pytest.raises(ValueError, match="dim=0"):
        PROJECTORS[name](dim=0)


def test_the_fused_kernel_of_sjlt_gets_what_makes_adamws_direction(monkeypatch):
    """The kernel itself needs a GPU (tests/datatools/kernels); here its definition stands in for it."""
    params = {"w": torch.nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))}
    optimizer = AdamW(params.items(), lr=1e-3)
    for _ in range(2):
        params["w"].square().sum().backward()
        optimizer.step()
    updates, sjlt = UpdateMap.of(optimizer), PROJECTORS["sjlt"](dim=16, seed=2)
    grad, want, got = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1)), *torch.zeros(2, 3, 16)
    sjlt.accumulate_updates(want, updates, "w", grad)
    calls = []

    def definition(out, grad, stem, adam):
        calls.append(stem)
        b1, b2 = adam.betas
        m, v = b1 * adam.exp_avg + (1 - b1) * grad, b2 * adam.exp_avg_sq + (1 - b2) * grad * grad
        with monkeypatch.context() as plain:
            plain.setattr(sjlt_module, "fits", lambda *_: False)
            sjlt.accumulate(out, "w", adam.scale * m / ((adam.shrink * v + adam.eps_root).sqrt() + adam.eps))

    monkeypatch.setattr(sjlt_module, "fits", lambda *_: True)
    monkeypatch.setattr(sjlt_module, "add_sjlt", definition)
    sjlt.accumulate_updates(got, updates, "w", grad)
    torch.testing.assert_close(got, want)
    assert calls == [key(2, "w", (6, 5))]
