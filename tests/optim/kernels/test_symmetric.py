"""Products with half of their tiles computed, against torch's; Newton-Schulz by them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim import Muon
from optim.kernels import symmetric
from optim.linalg import newton_schulz
from tests.kernels import counted, nan_outputs, odd_sizes, spread


def drawn(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@odd_sizes
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_any_shape_amid_nan(kernel_device, n, p, q, tall, addend, dtype):
    """Rows with NaN between them, an uninitialised output: the right product, symmetric to the bit."""
    x = drawn(n, p, q, dtype=dtype)
    placed = spread(x.mT.contiguous(), kernel_device).mT if tall else spread(x, kernel_device)
    add = drawn(n, p, p, dtype=dtype, seed=1)
    add = add + add.mT
    with nan_outputs():
        if addend:
            got = symmetric.gram(placed, spread(add, kernel_device), alpha=0.5, beta=-2.0)
        else:
            got = symmetric.gram(placed)
    x64 = x.double()
    want = 0.5 * x64 @ x64.mT - 2.0 * add.double() if addend else x64 @ x64.mT
    assert got.dtype == dtype and got.shape == (n, p, p)
    assert torch.equal(got, got.mT), "mirrored, so equal"
    size = torch.finfo(dtype).eps * (x64.norm(dim=-1).amax() ** 2 + 2 * add.double().abs().amax())
    assert (got.cpu().double() - want).abs().max() <= 2 * size


def test_many_tiles_are_each_computed_once(kernel_device):
    """Numbers of tiles beyond a few, where the row of a tile comes from a square root."""
    x = drawn(1, 190, 8, dtype=torch.float16)
    got = symmetric.gram(x.to(kernel_device))
    torch.testing.assert_close(got.cpu().double(), x.double() @ x.double().mT, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (2, 17, 17)], ids=str)
def test_newton_schulz_takes_it(kernel_device, shape, monkeypatch):
    x = drawn(*shape).to(kernel_device)
    with counted() as launches:
        got = newton_schulz(x, steps=5)
    assert launches == ["_gram_kernel"] * 10, "two products a step"
    exact = newton_schulz(x.cpu().double(), steps=5)
    assert (got.cpu().double() - exact).square().mean().sqrt() <= 0.06 * exact.square().mean().sqrt()


def test_newton_schulz_inside_vmap_takes_it(kernel_device):
    x = drawn(3, 20, 33).to(kernel_device)
    with counted() as launches:
        got = torch.vmap(lambda one: newton_schulz(one, steps=2))(x)
    assert launches == ["_gram_kernel"] * 4, "the batch is one stack"
    exact = newton_schulz(x.cpu().double(), steps=2)
    assert (got.cpu().double() - exact).square().mean().sqrt() <= 0.06 * exact.square().mean().sqrt()


def test_muon_takes_it_for_stacks_of_matrices(kernel_device):
    params = [torch.nn.Parameter(drawn(12, 20, dtype=torch.float32, seed=s).to(kernel_device)) for s in range(3)]
    named = [(f"layers.{i}.mlp.weight", p) for i, p in enumerate(params)]
    optimizer = Muon(named, lr=0.02, ns_dtype="bfloat16")
    for p in params:
        p.grad = torch.ones_like(p) + p.detach()
    with counted() as launches:
        optimizer.step()
    assert launches == ["_gram_kernel"] * 10
    assert all(p.isfinite().all() for p in params)


def test_float32_and_derivatives_are_left_to_torch(kernel_device):
    x = drawn(8, 9).to(kernel_device)
    with counted() as launches:
        newton_schulz(x.float())
        newton_schulz(x.clone().requires_grad_()).sum().backward()
        torch.func.jvp(newton_schulz, (x,), (x,))
    assert launches == []
