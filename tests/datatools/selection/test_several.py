"""Several targets that share one selection."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datatools import Candidates, DataError, UsageError, several

SCORES = torch.tensor([[9.0, 0.0], [8.0, 7.0], [7.0, 1.0], [0.0, 5.0], [1.0, 4.0]])
POOL = Candidates(keys=["a", "b", "c", "d", "e"], sources=["x", "x", "y", "y", "y"], tokens=[1, 2, 3, 4, 5])


def test_union_takes_turns_and_says_for_whom():
    found = several("union", SCORES, ["one", "two"], POOL, 4)
    assert found.indices.tolist() == [0, 1, 2, 3]
    assert found.why == [
        "taken for target one, score 9",
        "taken for target two, score 7",
        "taken for target one, score 7",
        "taken for target two, score 5",
    ]


def test_maxmin_gives_the_turn_to_the_target_that_is_served_worst():
    # row 1 serves both: whoever takes it, the other is served too
    found = several("maxmin", SCORES, ["one", "two"], POOL, 3)
    standard = (SCORES - SCORES.mean(0)) / SCORES.std(0, correction=0)
    has, left, order = torch.zeros(2), set(range(5)), []
    for _ in range(3):
        target = int(has.argmin())
        row = max(left, key=lambda i: (float(SCORES[i, target]), -i))
        order.append(row)
        left.remove(row)
        has += standard[row]
    assert found.indices.tolist() == order


def test_budgets_of_their_own():
    found = several("union", SCORES, ["one", "two"], POOL, 1, budgets={"one": "20%", "two": 3})
    assert found.indices.tolist() == [0, 1, 3, 4]
    assert [why.split(",")[0].removeprefix("taken for target ") for why in found.why] == ["one", "two", "two", "two"]


def test_budgets_in_tokens_and_caps_hold():
    assert several("union", SCORES, ["one", "two"], POOL, "4 tokens").indices.tolist() == [0, 1]
    assert several("union", SCORES, ["one", "two"], POOL, 2, max_per_source=1).indices.tolist() == [0, 2]


def test_rows_that_may_not_be_chosen_are_not():
    pool = Candidates(keys=list("abcde"), eligible=[False, True, True, True, False])
    scores = SCORES.clone()
    scores[0] = torch.nan
    assert sorted(several("union", scores, ["one", "two"], pool, 3).indices.tolist()) == [1, 2, 3]
    with pytest.raises(DataError):
        several("union", scores, ["one", "two"], POOL, 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"how": "uinon"}, "did you mean 'union'"),
        ({"budgets": {"three": 1}}, "no target 'three'"),
        ({"budgets": {"one": 1}}, "target 'two' has none"),
        ({"budgets": {"one": 3, "two": 3}}, "6 rows together, and 5 may be selected"),
        ({"budgets": {"one": "5 tokens", "two": 3}}, "in tokens"),
        ({"budgets": {"one": 1, "two": 1}, "max_per_source": 1}, "leave one of them out"),
    ],
)
def test_what_is_refused(options, text):
    with pytest.raises(UsageError, match=text):
        several(options.pop("how", "union"), SCORES, ["one", "two"], POOL, 2, **options)


@given(st.integers(0, 10_000), st.integers(1, 3), st.sampled_from(["union", "maxmin"]))
def test_the_order_of_the_rows_changes_nothing(seed, targets, how):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (8, targets), generator=draw).float()
    names, keys = [f"t{i}" for i in range(targets)], [f"key {i}" for i in range(8)]
    first = several(how, scores, names, Candidates(keys=keys), 5)
    order = torch.randperm(8, generator=draw)
    other = several(how, scores[order], names, Candidates(keys=[keys[i] for i in order]), 5)
    assert [keys[i] for i in first.indices] == [keys[order[i]] for i in other.indices]


def test_maxmin_serves_the_worst_target_no_worse_than_turns_on_average():
    """Over 60 draws, and never better than the best set of all."""
    least = {"union": 0.0, "maxmin": 0.0, "best": 0.0}
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        scores = torch.randn(9, 3, generator=draw)
        scores[:, 2] = scores[:, 0] + 0.1 * scores[:, 2]  # two targets want the same rows
        standard = (scores - scores.mean(0)) / scores.std(0, correction=0)
        pool = Candidates(keys=[f"{i}" for i in range(9)])
        best = max(float(standard[list(rows)].sum(0).min()) for rows in itertools.combinations(range(9), 4))
        for how in ("union", "maxmin"):
            got = float(standard[several(how, scores, ["a", "b", "c"], pool, 4).indices].sum(0).min())
            assert got <= best + 1e-4
            least[how] += got
        least["best"] += best
    assert least["maxmin"] > least["union"]
