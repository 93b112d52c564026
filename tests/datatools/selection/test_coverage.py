"""The selector `coverage`: greedy and exact in every step, and near the best set of its size."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datatools import coverage_order, select
from datatools.errors import UsageError
from datatools.selection.candidates import Candidates

values = st.lists(st.lists(st.integers(-4, 4), min_size=2, max_size=2), min_size=1, max_size=9)


def value(rows):
    """What the chosen rows are worth together."""
    return float(np.sqrt(np.maximum(np.asarray(rows, float), 0).sum(0)).sum()) if len(rows) else 0.0


@given(values)
def test_each_step_takes_the_largest_gain(rows):
    order = coverage_order(torch.tensor(rows, dtype=torch.float32)).tolist()
    assert sorted(order) == list(range(len(rows)))
    taken: list[list[int]] = []
    for place, row in enumerate(order):
        gains = {other: value([*taken, rows[other]]) - value(taken) for other in order[place:]}
        best = max(gains.values())
        assert gains[row] >= best - 1e-9
        if best <= 1e-12:  # nothing is gained by any row that is left
            left = [sum(rows[other]) for other in order[place:]]
            assert left == sorted(left, reverse=True)
            break
        taken.append(rows[row])


@given(values, st.integers(1, 4))
def test_its_value_is_near_the_largest(rows, k):
    k = min(k, len(rows))
    order = coverage_order(torch.tensor(rows, dtype=torch.float32)).tolist()
    best = max(value([rows[i] for i in chosen]) for chosen in combinations(range(len(rows)), k))
    assert value([rows[i] for i in order[:k]]) >= (1 - 1 / np.e) * best - 1e-9


def test_equal_rows_are_taken_in_the_order_of_their_keys():
    same = Candidates(keys=["c", "a", "b"], similarity=[[0.5, 0.2]] * 3)
    assert select("coverage", same, 2).indices.tolist() == [1, 2]


def test_a_row_for_many_targets_comes_first_and_a_served_target_counts_less():
    similarity = torch.tensor([[0.9, 0.0, 0.0], [0.4, 0.4, 0.4], [0.8, 0.0, 0.0], [0.0, 0.6, 0.0]])
    assert coverage_order(similarity).tolist() == [1, 0, 3, 2]


def test_without_similarities_it_says_what_is_missing():
    with pytest.raises(UsageError, match="coverage needs the similarity of candidates to target rows"):
        select("coverage", Candidates(keys=["a"], scores=[1.0]), 1)
