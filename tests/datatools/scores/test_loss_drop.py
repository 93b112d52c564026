"""datatools.loss_drop and the choice of a depth by specificity, against worked examples and plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datatools import DataError, UsageError, loss_drop, most_specific, specificity
from datatools.scores.loss_drop import LENGTHS

LOSSES = st.floats(0, 20, width=32) | st.sampled_from([0.0, math.inf, math.nan])


def test_worked_example():
    before, after = torch.tensor([2.0, 4.0, 0.5]), torch.tensor([[1.0, 2.5], [3.0, 4.0], [0.75, 0.0]])
    lengths = torch.tensor([1, 30, 5])
    assert loss_drop(before, after, lengths).tolist() == [[1.0, -0.5], [1.0, 0.0], [-0.25, 0.5]]
    assert loss_drop(before, after, lengths, relative=True).tolist() == [[0.5, -0.25], [0.25, 0.0], [-0.5, 1.0]]
    assert loss_drop(before, after, lengths, how="sum")[:, 0].tolist() == [1.0, 30.0, -1.25]
    assert loss_drop(before, after, lengths, how="capped", cap=10)[:, 0].tolist() == [1.0, 10.0, -1.25]


@given(
    st.lists(st.tuples(LOSSES, LOSSES, st.integers(0, 50)), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(LENGTHS),
)
def test_equals_the_formula_row_by_row(rows, relative, how):
    before, after, lengths = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = loss_drop(before, after[:, None], lengths, relative=relative, how=how, cap=7.5)
    for (first, last, length), got in zip(rows, found[:, 0].tolist(), strict=True):
        if not (math.isfinite(first) and math.isfinite(last)) or length == 0 or (relative and first == 0):
            assert math.isnan(got)
            continue
        want = first - last
        want = want / first if relative else want
        want *= {"mean": 1, "sum": length, "capped": min(length, 7.5)}[how]
        assert got == pytest.approx(want, rel=1e-6) or abs(want) > 3e38


def test_wrong_arguments_are_refused():
    one = torch.ones(1)
    with pytest.raises(UsageError, match="did you mean 'capped'"):
        loss_drop(one, one[:, None], torch.ones(1, dtype=torch.int64), how="caped")
    with pytest.raises(ValueError, match=r"losses before \[1\], after \[2, 1\]"):
        loss_drop(one, torch.ones(2, 1), torch.ones(1, dtype=torch.int64))


def test_specificity_of_known_directions():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    assert specificity(x, 2 * x, y) == 1.0 and specificity(x, y, x) == -1.0 and specificity(x, -x, x) == -2.0
    assert specificity(x, 0 * x, x) == -1.0 and specificity(0 * x, x, y) == 0.0
    assert specificity(x, x + y / 3, y) == pytest.approx(math.sqrt(0.5))


def test_the_choice_is_the_best_mean_and_then_the_smallest():
    cells = {(8, 1e-5): [0.5, 0.1], (2, 5e-5): [0.3, 0.3], (2, 1e-5): [0.2, 0.4], (64, 1e-5): [0.9, -0.9]}
    assert most_specific(cells) == (2, 1e-5)
    assert most_specific({**cells, (64, 5e-5): [0.3, 0.4]}) == (64, 5e-5)
    for broken in ({}, {(1, 1.0): []}, {(1, 1.0): [math.nan]}):
        with pytest.raises(DataError, match="most_specific"):
            most_specific(broken)
