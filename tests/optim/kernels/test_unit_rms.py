"""Rows and columns of unit root mean square by kernel, against `optim.linalg.unit_rms` in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim import SinkGD, linalg
from optim.kernels import unit_rms
from tests.kernels import assert_rounded, counted, nan_outputs, odd_sizes, poisoned


@odd_sizes
@given(
    st.integers(1, 2),
    st.integers(1, 140),
    st.integers(1, 70),
    st.sampled_from([-1, -2]),
    st.sampled_from([0, 1]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_amid_nan(kernel_device, matrices, m, n, dim, shift, dtype):
    m = m if dim == -2 else m % 8 + 1  # one program a row
    x = torch.randn(matrices, m, n, generator=torch.Generator().manual_seed(m)).to(dtype)
    x[:, m // 2] = 0
    x[..., n // 2] = 0
    placed, check = poisoned(x, kernel_device, shift)
    with nan_outputs():
        got = unit_rms.unit_rms(placed, dim, 1e-8)
    want = linalg.unit_rms(x.double(), dim=dim, eps=1e-8)
    assert got.dtype == dtype
    assert_rounded(got.cpu(), want.float(), rtol=1e-5, atol=1e-6)
    check()


def test_long_rows_in_several_pieces(kernel_device):
    x = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    got = unit_rms.unit_rms(x.to(kernel_device), -1, 1e-8).cpu()
    torch.testing.assert_close(got, linalg.unit_rms(x.double(), dim=-1, eps=1e-8).float(), rtol=1e-5, atol=1e-6)


def test_the_rms_is_at_least_eps(kernel_device):
    x = torch.full((2, 4), 1e-3, device=kernel_device)
    for dim in (-1, -2):
        torch.testing.assert_close(linalg.unit_rms(x, dim=dim, eps=1.0), x)


def test_rules_take_it(kernel_device):
    p = torch.nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(kernel_device))
    optimizer = SinkGD([("layers.0.weight", p)], lr=0.02, rounds=2)
    p.grad = p.detach() * 2
    with counted() as launches:
        optimizer.step()
    assert launches == ["_rows_kernel", "_column_sums_kernel", "_divide_columns_kernel"] * 2


@pytest.mark.parametrize("dim", [0, (-1, -2), -3], ids=str)
def test_other_dimensions_are_left_to_torch(kernel_device, dim):
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    with counted() as launches:
        linalg.unit_rms(x, dim=dim, eps=1e-8)
    assert launches == []
