"""Nearest rows and clusters, against brute force."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from datatools import EnvironmentProblem, UsageError, clusters, nearest


def unit(seed, rows, dim):
    return functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def blocks(rows, size=7):
    return lambda: (rows[start : start + size] for start in range(0, len(rows), size))


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 25))
def test_exact_search_is_brute_force(seed, k, rows):
    base, asked = unit(seed, rows, 5), unit(seed + 1, 3, 5)
    found = nearest(blocks(base), asked, k, rows=rows)
    want = (asked @ base.T).sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(found.similarity, want.values[:, :k], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((asked @ base.T).gather(1, found.indices), found.similarity, rtol=1e-5, atol=1e-6)
    assert found.method == "exact" and found.recall == 1.0 and found.indices.shape == (3, min(k, rows))


def test_of_equal_rows_the_first_wins():
    base = torch.ones(6, 2)
    assert nearest(blocks(base, 2), torch.ones(1, 2), 3, rows=6).indices.tolist() == [[0, 1, 2]]


def test_approximate_search_says_what_it_misses():
    pytest.importorskip("faiss")
    centres = unit(0, 30, 16)
    base = functional.normalize(centres.repeat(100, 1) + 0.15 * unit(1, 3000, 16), dim=1)
    asked = base[::10]
    found = nearest(blocks(base, 500), asked, 10, rows=3000, method="approximate", recall=0.9)
    truth = (asked @ base.T).topk(10, dim=1).indices
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.indices.tolist(), truth.tolist(), strict=True)])
    assert found.method == "approximate" and found.recall >= 0.9
    assert recall == pytest.approx(found.recall, abs=0.05)
    whole = nearest(blocks(base, 500), asked, 10, rows=3000, method="approximate", recall=1.0)
    assert whole.recall >= found.recall
    torch.testing.assert_close(
        whole.similarity, (asked @ base.T).topk(10, dim=1).values, rtol=1e-3, atol=1e-3
    ) if whole.recall == 1.0 else None


def test_the_choice_between_them(monkeypatch):
    """Approximate search only where building its lists costs less than exact search."""
    called = []
    monkeypatch.setattr("datatools.features.neighbours._by_lists", lambda *a: called.append(a))
    base = unit(0, 100, 4)
    nearest(blocks(base), base, 1, rows=100)
    monkeypatch.setattr("datatools.features.neighbours.FEW_ROWS", 50)
    nearest(blocks(base), base[:40], 1, rows=100)
    assert not called
    nearest(blocks(base), base[:41], 1, rows=100)
    assert len(called) == 1


def test_clusters_are_those_that_are_there():
    pytest.importorskip("faiss")
    centres = torch.eye(4, 8)
    draw = torch.Generator().manual_seed(0)
    of = torch.randint(4, (200,), generator=draw)
    base = functional.normalize(centres[of] + 0.05 * torch.randn(200, 8, generator=draw), dim=1)
    found = clusters(blocks(base, 64), 4, rows=200, seed=3)
    pairs = set(zip(of.tolist(), found.labels.tolist(), strict=True))
    assert len(pairs) == 4
    # every row is with its nearest centre, by brute force
    assert torch.equal((base @ found.centres.T).argmax(1), found.labels)
    again = clusters(blocks(base, 64), 4, rows=200, seed=3)
    assert torch.equal(again.labels, found.labels)


def test_what_is_refused(monkeypatch):
    base = unit(0, 5, 3)
    with pytest.raises(UsageError, match="at least one"):
        nearest(blocks(base), base, 0, rows=5)
    with pytest.raises(UsageError, match="no method 'fast'"):
        nearest(blocks(base), base, 1, rows=5, method="fast")
    with pytest.raises(UsageError, match="6 clusters of 5 rows"):
        clusters(blocks(base), 6, rows=5)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(EnvironmentProblem, match="pip install faiss-cpu"):
        clusters(blocks(base), 2, rows=5)
