"""Features without what all rows share, against a dense projection in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datatools import UsageError, common_directions, influence, influence_paper, without


@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 12), st.integers(0, 10**6))
def test_directions_are_the_mean_and_the_main_ones(n, d, count, seed):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = common_directions(rows, count).double()
    assert len(found) <= min(count, max(0, n - 2), d // 4) + 1
    torch.testing.assert_close(found @ found.T, torch.eye(len(found), dtype=torch.float64), rtol=0, atol=1e-5)
    unit = rows / rows.norm(dim=1, keepdim=True)
    mean = unit.mean(0)
    main = torch.linalg.svd(unit - mean)[2][: len(found) - 1]
    for direction in (mean, *main):
        rest = direction - (direction @ found.T) @ found
        assert rest.norm() < 1e-4 * max(1.0, float(direction.norm()))


def test_influence_without_directions_is_that_of_the_remainders():
    generator = torch.Generator().manual_seed(0)
    train, target = torch.randn(9, 30, generator=generator), torch.randn(4, 30, generator=generator)
    shared = common_directions(train, 3)
    project = torch.eye(30) - shared.T @ shared
    expected = torch.nn.functional.cosine_similarity((train @ project)[:, None], (target @ project)[None], dim=-1)
    found = influence([train], [target], [1.0], remove=[shared])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(influence([train], [target], [1.0], remove=[None]), influence([train], [target], [1.0]))
    means = torch.stack([target[:2].mean(0), target[2:].mean(0)]) @ project
    expected = torch.nn.functional.cosine_similarity((train @ project)[:, None], means[None], dim=-1)
    found = influence_paper([train], [target], [1.0], [0, 0, 1, 1], remove=[shared])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_row_of_common_directions_alone_has_no_similarity():
    shared = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    train = torch.tensor([[2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    found = influence([train], [torch.tensor([[5.0, 1.0, 0.0, 0.0]])], [1.0], remove=[shared])
    assert found.tolist() == [[0.0], [1.0]]


def test_without_rows_there_are_no_directions():
    assert common_directions(torch.zeros(0, 5), 3).shape == (0, 5)
    assert common_directions(torch.zeros(4, 5), 3).shape == (0, 5)
    torch.testing.assert_close(without(torch.ones(2, 5), torch.zeros(0, 5)), torch.ones(2, 5))
    with pytest.raises(UsageError, match="0 or more"):
        common_directions(torch.ones(2, 5), -1)
