"""Matrices in a file and lazy queues give what matrices in memory and whole sorts give."""

import numpy as np
import pytest
import torch

from datatools import AGGREGATIONS, Candidates, aggregate, large, select
from datatools.selection.turns import Queue


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(large, "LARGE", 4096)


def test_a_matrix_in_a_file(small, tmp_path):
    found = large.table(700, 3, tmp_path)
    values = torch.randn(700, 3)
    for rows in large.blocks(found):
        assert rows.stop - rows.start <= 4096 // 12
        found[rows] = values[rows]
    large.release(found)
    assert torch.equal(found, values) and not list(tmp_path.iterdir())
    order = torch.randperm(700)
    assert torch.equal(large.taken(found, order), values[order])
    assert large.table(700, 3, tmp_path / "not writable").shape == (700, 3)


@pytest.mark.parametrize("levels", [2, 10**6])
def test_a_queue_equals_a_whole_sort(levels):
    draw = np.random.default_rng(levels)
    values = draw.integers(0, levels, 500).astype(np.float32)
    used = draw.random(500) < 0.3
    order = [row for row in np.argsort(-values, kind="stable").tolist() if not used[row]]
    queue, taken = Queue(values, first=3), []
    while len(taken) < len(order):
        taken.append(queue.take(used))
        if len(taken) == 100:  # others take rows as well
            other = order[150:200]
            used[other] = True
            order = [row for row in order if row not in other]
    assert taken == order


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_aggregations_of_a_large_matrix(how, monkeypatch):
    torch.manual_seed(0)
    similarity, keys = torch.randn(900, 4).round(decimals=1), [f"{i * 7919 % 1009:04d}" for i in range(900)]
    groups, eligible = [0, 1, 2, 3] if how == "paper" else [0, 0, 1, 2], torch.arange(900) % 7 != 0
    want = aggregate(similarity, groups, how, keys=keys, eligible=eligible)
    pool = Candidates(keys=keys, similarity=similarity, groups=groups, eligible=eligible)
    chosen = {name: select(name, pool, 40).indices.tolist() for name in ("round_robin", "bids")}
    monkeypatch.setattr(large, "LARGE", 4096)
    found = aggregate(similarity, groups, how, keys=keys, eligible=eligible)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6, equal_nan=True)
    assert {name: select(name, pool, 40).indices.tolist() for name in ("round_robin", "bids")} == chosen
