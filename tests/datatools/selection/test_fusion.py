"""Fusion of similarities by rank, against ranks counted one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datatools import UsageError, fuse, large


def counted(signal, i, j):
    """The rank of row i in column j as a share: rows below count 1, equal ones 1/2, and itself 1/2 more."""
    column = signal[:, j]
    there = ~column.isnan()
    value = column[i]
    return float(((column[there] < value).sum() + ((column[there] == value).sum() + 1) / 2) / there.sum())


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_fuse_is_the_weighted_mean_of_ranks(n, m, count, seed):
    generator = torch.Generator().manual_seed(seed)
    signals = [torch.randint(0, 5, (n, m), generator=generator).float() for _ in range(count)]
    weights = [float(k + 1) for k in range(count)]
    found = fuse(signals, weights)
    for i in range(n):
        for j in range(m):
            expected = sum(w * counted(s, i, j) for w, s in zip(weights, signals, strict=True)) / sum(weights)
            assert abs(float(found[i, j]) - expected) < 1e-6


def test_fuse_needs_no_common_scale():
    signal = torch.rand(20, 3)
    torch.testing.assert_close(fuse([signal, signal]), fuse([signal * 1000 - 7, signal.exp()]))


def test_fuse_leaves_rows_without_a_value_out():
    found = fuse([torch.tensor([[1.0], [float("nan")], [3.0]]), torch.tensor([[1.0], [2.0], [3.0]])])
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2], 0], torch.tensor([(1 / 2 + 1 / 3) / 2, 1.0]))


@pytest.mark.parametrize(
    ("signals", "weights", "said"),
    [
        ([], None, "no signal"),
        ([torch.rand(2, 2), torch.rand(3, 2)], None, "shapes"),
        ([torch.rand(2, 2)], [0.0], "not all 0"),
        ([torch.rand(2, 2)], [-1.0], "at least 0"),
        ([torch.rand(2, 2)], [1.0, 1.0], "one per signal"),
    ],
)
def test_fuse_refuses(signals, weights, said):
    with pytest.raises(UsageError, match=said):
        fuse(signals, weights)


def test_fuse_of_matrices_in_files_is_the_same(monkeypatch):
    signals = [torch.randn(30, 5).round(decimals=1), torch.randn(30, 5)]
    signals[0][3, 2] = float("nan")
    whole = fuse(signals, [1, 2])
    monkeypatch.setattr(large, "LARGE", 4 * 30 * 2)  # two columns at a time, some rows at a time
    torch.testing.assert_close(fuse(signals, [1, 2]), whole, rtol=0, atol=0, equal_nan=True)
