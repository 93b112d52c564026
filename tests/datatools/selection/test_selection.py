"""Selections, candidates, budgets and selectors: defined answers or typed errors, the same ones every time."""

import os
import random as stdlib_random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datatools import SELECTORS, Budget, Candidates, DataError, Selection, UsageError, aggregate, select
from datatools.selection.candidates import require_finite

REPOSITORY = Path(__file__).resolve().parents[3]


def candidates(n=100, **columns):
    defaults = {
        "keys": [f"{i * 7919 % 10007:05d}" for i in range(n)],
        "scores": torch.arange(n) % 10 / 10,
        "sources": ["abc"[i % 3] for i in range(n)],
        "tokens": np.arange(n, dtype=np.int32) % 17 + 1,
        "supervised": [i % 13 + 1 for i in range(n)],
        "similarity": torch.stack([torch.arange(n) * k % 11 / 11 for k in (1, 3, 4)], 1),
        "groups": [0, 1, 1],
    }
    return Candidates(**{**defaults, **columns})


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("5%", 5),
        ("100%", 100),
        ("1.5 %", 1),
        ("0.01e2%", None),
        ("500", None),
        ("50", 50),
        (" 7 rows ", 7),
        ("1 row", 1),
        ("1_0", 10),
        ("0.05k", 50),
        (12, 12),
        ("29%", 29),
        ("0.5%", None),
    ],
)
def test_row_budgets(text, want):
    if want is None:
        with pytest.raises(UsageError):
            Budget.parse(text).resolve(candidates())
    else:
        assert Budget.parse(text).resolve(candidates()).rows == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("20000 tokens", 20_000),
        ("2M tokens", 2_000_000),
        ("1.5k tokens", 1500),
        ("3b Tokens", 3_000_000_000),
        ("1 token", 1),
        ("1_000tokens", 1000),
    ],
)
def test_token_budgets(text, want):
    assert Budget.parse(text).tokens == want


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("0.05", "ambiguous.*'5%' for a share"),
        ("1.0", "ambiguous.*'100%'"),
        ("500.0", "ambiguous.*'500' for a number"),
        (0.25, "ambiguous.*'25%'"),
        ("0", "selects nothing"),
        ("0 tokens", "selects nothing"),
        ("-5", "write a share"),
        ("0%", "out of range"),
        ("101%", "at most 100%"),
        ("5% tokens", "write a share"),
        ("5k%", "write a share"),
        ("", "write a share"),
        ("many", "write a share"),
        ("1e3", "write a share"),
        ("nan%", "write a share"),
        ("٣", "write a share"),
        ("9" * 5000, "write a share"),
        ("1,000", "write a share"),
        (True, "write a share"),
    ],
)
def test_budgets_that_make_no_sense(text, advice):
    with pytest.raises(UsageError, match=advice):
        Budget.parse(text)


def test_share_counts_the_pool_but_never_more_than_is_eligible():
    """k = floor(p n + 1e-9): 0.29 * 100 is 28.999... in binary."""
    half = candidates(eligible=torch.arange(100) < 50)
    assert Budget.parse("29%").resolve(candidates()).rows == 29
    assert Budget.parse("10%").resolve(half).rows == 10
    assert Budget.parse("100%").resolve(half).rows == 50


@pytest.mark.parametrize(
    ("text", "columns", "advice"),
    [
        ("101", {}, "exceeds the 100 eligible of 100 rows; ask for at most 100"),
        ("51", {"eligible": torch.arange(100) < 50}, "at most 50"),
        ("1", {"eligible": [False] * 100}, "none of the 100"),
        ("1M tokens", {}, "exceeds the 885 tokens"),
        ("5 tokens", {"tokens": [9] * 100}, "the shortest has 9 tokens"),
        ("5 tokens", {"tokens": None}, "which are missing"),
        ("0.9%", {}, "less than one row"),
    ],
)
def test_budgets_that_the_pool_cannot_fill(text, columns, advice):
    for name in SELECTORS:
        with pytest.raises(UsageError, match=advice):
            select(name, candidates(**columns), text, reference=Selection(torch.tensor([3])))


# ---------------------------------------------------------------- values


def test_selection_defaults_and_checks():
    chosen = Selection(torch.tensor([3, 1]))
    assert torch.equal(chosen.weights, torch.ones(2)) and len(chosen) == 2 and chosen.scores is None
    assert len(Selection(torch.zeros(0, dtype=torch.int64))) == 0
    for wrong in (
        {"indices": torch.tensor([1.0])},
        {"indices": torch.tensor([1, 1])},
        {"indices": torch.tensor([1]), "weights": torch.ones(2)},
        {"indices": torch.tensor([1]), "why": []},
        {"indices": torch.tensor([[1]])},
    ):
        with pytest.raises(ValueError, match="Selection"):
            Selection(**wrong)


def test_candidates_check_their_columns():
    with pytest.raises(ValueError, match="100 keys but 3 tokens"):
        candidates(tokens=[1, 2, 3])
    with pytest.raises(ValueError, match="one dimension"):
        candidates(scores=torch.zeros(100, 1))
    scores = torch.zeros(100)
    scores[[4, 7]] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(DataError, match="2 rows are not finite: 01655, 05398"):
        candidates(scores=scores)
    able = torch.ones(100, dtype=torch.bool)
    able[[4, 7]] = False
    assert not set(select("top_k", candidates(scores=scores, eligible=able), "98").indices.tolist()) & {4, 7}


def test_one_number_that_is_not_finite_spoils_its_row():
    values = torch.zeros(8, 3)
    values[2, 1], values[5, 0], values[6, 2] = torch.nan, torch.inf, -torch.inf
    keys = list("abcdefgh")
    with pytest.raises(DataError, match="features: 3 rows are not finite: c, f, g; mark these rows"):
        require_finite(values, keys, "features")
    with pytest.raises(DataError, match="1 rows are not finite: f;"):
        require_finite(values, keys, "features", where=torch.arange(8) == 5)
    require_finite(values, keys, "features", where=torch.tensor([i not in (2, 5, 6) for i in range(8)]))
    with pytest.raises(DataError, match="x: 7 rows are not finite: b, c, d, e, f and 2 more;"):
        require_finite(torch.tensor([0.0] + 7 * [torch.nan]), keys, "x")


# ---------------------------------------------------------------- selectors


def test_top_k_orders_by_score_then_key():
    pool = candidates()
    chosen = select("top_k", pool, "25")
    want = sorted(range(100), key=lambda i: (-(i % 10), pool.keys[i]))[:25]
    assert chosen.indices.tolist() == want and torch.equal(chosen.scores, pool.scores)
    assert chosen.why[0] == "score 0.9, rank 1 of 100" and chosen.why[24] == "score 0.7, rank 25 of 100"


def test_unknown_selector_and_missing_columns():
    with pytest.raises(UsageError, match=r"unknown selector 'topk'; did you mean 'top_k'\?"):
        select("topk", candidates(), "5")
    with pytest.raises(UsageError, match="top_k needs scores"):
        select("top_k", candidates(scores=None), "5")
    with pytest.raises(UsageError, match="needs a reference"):
        select("random_length", candidates(), "5")
    with pytest.raises(UsageError, match="supervised token counts"):
        select("random_length", candidates(supervised=None), "5", reference=Selection(torch.tensor([1])))
    with pytest.raises(UsageError, match="contains row 100 of a pool of 100"):
        select("random_length", candidates(), "5", reference=Selection(torch.tensor([100])))


@pytest.mark.parametrize("name", ["round_robin", "bids"])
def test_turns_are_the_same_as_a_selector_and_as_an_aggregation(name):
    """The selector takes the rows that have the highest scores of the aggregation, in the same order."""
    similarity = torch.rand(100, 6, generator=torch.Generator().manual_seed(0))
    groups, able = torch.tensor([0, 0, 1, 2, 2, 2]), torch.arange(100) % 9 > 0
    similarity[~able] = torch.nan
    pool = candidates(similarity=similarity, groups=groups, eligible=able)
    scores = aggregate(similarity, groups, name, keys=pool.keys, eligible=able).nan_to_num(0.0)
    for budget in ("1", "30", "88", "150 tokens"):
        for cap in (None, 0.4):
            chosen = select(name, pool, budget, max_per_source=None if budget != "30" else cap)
            want = select(
                "top_k",
                candidates(scores=scores, eligible=able),
                budget,
                max_per_source=None if budget != "30" else cap,
            )
            assert chosen.indices.tolist() == want.indices.tolist()
    assert chosen.why[0].startswith("taken in turn 1 of 88, similarity at most 0.9")
    with pytest.raises(UsageError, match=f"{name} needs the similarity of candidates to target rows"):
        select(name, candidates(similarity=None), "5")


@pytest.mark.parametrize(
    ("columns", "error", "said"),
    [
        ({"similarity": torch.zeros(99, 2)}, ValueError, r"100 keys but a similarity of shape \[99, 2\]"),
        ({"similarity": torch.zeros(100, 0)}, ValueError, "one column per target row"),
        ({"similarity": torch.zeros(100)}, ValueError, "one column per target row"),
        ({"groups": [0, 1]}, ValueError, "3 target rows but 2 groups"),
        ({"similarity": torch.full((100, 3), torch.nan)}, DataError, "similarity: 100 rows are not finite"),
    ],
)
def test_a_similarity_has_a_row_per_key_and_a_column_per_target_row(columns, error, said):
    with pytest.raises(error, match=said):
        candidates(**columns)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("cap", [None, 0.34, 12])
@pytest.mark.parametrize("budget", ["30", "250 tokens"])
def test_the_order_of_rows_never_changes_the_set(name, cap, budget):
    """N5: shuffled files, ties everywhere; copies of a row share its key and cannot be told apart."""
    pool = candidates()
    reference = select("top_k", pool, "20")

    def chosen(order):
        shuffled = Candidates(
            keys=[pool.keys[i] for i in order],
            scores=pool.scores[order],
            tokens=pool.tokens[order],
            sources=[pool.sources[i] for i in order],
            supervised=pool.supervised[order],
            similarity=pool.similarity[order],
            groups=pool.groups,
        )
        place = {row: i for i, row in enumerate(order)}
        at = torch.tensor([place[i] for i in reference.indices.tolist()])
        got = select(name, shuffled, budget, seed=3, max_per_source=cap, reference=Selection(at)).indices.tolist()
        return [order[i] for i in got]

    want = chosen(list(range(100)))
    for seed in range(5):
        order = list(range(100))
        stdlib_random.Random(seed).shuffle(order)
        assert chosen(order) == want


def test_the_process_does_not_matter():
    """R6: another hash seed, another process, a used global generator."""
    script = """
import random, torch
random.random(); torch.rand(3)
from datatools import SELECTORS, Candidates, Selection, select
keys, alike = [str(i) for i in range(50)], [[i % 7, i % 3] for i in range(50)]
pool = Candidates(keys=keys, scores=[i % 5 for i in range(50)], supervised=list(range(50)), similarity=alike)
for name in SELECTORS:
    print(name, select(name, pool, "10", seed=7, reference=Selection(torch.arange(5))).indices.tolist())"""
    said = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1 and len(said.pop().splitlines()) == len(SELECTORS)


def test_random_is_uniform_seeded_and_nested():
    pool = Candidates(keys=[str(i) for i in range(60)])
    small, large = (set(select("random", pool, k, seed=5).indices.tolist()) for k in (10, 30))
    assert small < large and select("random", pool, 30, seed=6).indices.tolist() != large
    counts = Counter(i for seed in range(600) for i in select("random", pool, 10, seed=seed).indices.tolist())
    expected = 600 * 10 / 60
    chi2 = sum((counts[i] - expected) ** 2 / expected for i in range(60)) / (1 - 10 / 60)
    assert chi2 < 98.3  # 59 degrees of freedom, p = 0.001


def test_random_takes_copies_of_a_row_independently():
    pool = Candidates(keys=["a", "a", "b", "c"])
    both = sum(set(select("random", pool, 2, seed=seed).indices.tolist()) == {0, 1} for seed in range(600))
    assert 60 < both < 140  # one pair of six: 100 of 600


def test_random_length_matches_the_reference():
    g = np.random.default_rng(0)
    lengths = np.concatenate([g.integers(1, 40, 4000), g.integers(200, 400, 1000)])
    pool = Candidates(keys=[str(i) for i in range(5000)], supervised=lengths)
    reference = Selection(torch.from_numpy(np.flatnonzero(lengths > 100)[:150]))
    reference = Selection(torch.cat([reference.indices, torch.arange(50)]))
    chosen = select("random_length", pool, 200, reference=reference, seed=1)
    assert len(chosen) == 200 and len(set(chosen.indices.tolist()) & set(reference.indices.tolist())) < 60
    got, want = (np.sort(lengths[s.indices.numpy()]) for s in (chosen, reference))
    grid = np.unique(lengths)
    distance = np.abs(np.searchsorted(got, grid, side="right") - np.searchsorted(want, grid, side="right")).max() / 200
    assert distance <= 0.05 and abs(got.mean() / want.mean() - 1) < 0.03  # Kolmogorov-Smirnov: one bin at most
    plain = lengths[select("random", pool, 200, seed=1).indices.numpy()]
    assert plain.mean() < 0.6 * want.mean()
    doubled = lengths[select("random_length", pool, 400, reference=reference).indices.numpy()]
    assert abs(doubled.mean() / want.mean() - 1) < 0.05


def test_random_length_goes_on_when_a_length_runs_out():
    pool = Candidates(keys=[str(i) for i in range(100)], supervised=[50] * 10 + list(range(90)))
    reference = Selection(torch.arange(10))
    chosen = select("random_length", pool, 40, reference=reference)
    lengths = pool.supervised[chosen.indices].tolist()
    assert sorted(lengths[:11]) == [50] * 11  # all rows of that length, then the nearest
    assert sorted(abs(length - 50) for length in lengths[11:]) == [(i + 2) // 2 for i in range(29)]


# ---------------------------------------------------------------- caps and tokens


def test_source_caps():
    pool = candidates(sources=["big"] * 80 + ["small"] * 20)
    chosen = select("top_k", pool, "20", max_per_source=0.5).indices.tolist()
    assert Counter(pool.sources[i] for i in chosen) == {"big": 10, "small": 10}
    order = sorted(range(100), key=lambda i: (-(i % 10), pool.keys[i]))
    assert chosen == [i for i in order if i in chosen]  # still in the order of scores
    best_big = [i for i in order if i < 80][:10]
    assert set(best_big) < set(chosen)
    assert select("top_k", pool, "20", max_per_source="50%").indices.tolist() == chosen
    assert select("top_k", pool, "20", max_per_source=10).indices.tolist() == chosen
    assert len(select("top_k", pool, "20", max_per_source="100%")) == 20


@pytest.mark.parametrize(
    ("cap", "budget", "most"),
    [
        (0.29, 100, 29),
        ("29%", 100, 29),  # 0.29 * 100 is 28.999... in binary
        (0.58, 50, 29),
        ("58%", 50, 29),
        (0.07, 100, 7),
        ("7 %", 100, 7),
        (0.5, 25, 12),
        (0.35, 10, 3),
        (0.35, 20, 7),
        (0.999, 10, 9),
        (0.1, 19, 1),  # rounded down, never up
    ],
)
def test_a_share_as_a_cap_is_rounded_down(cap, budget, most):
    """floor(share * budget + 1e-9) rows of each source, neither more nor fewer."""
    pool = candidates(
        n=2000, sources=["first"] * 1000 + [f"s{i}" for i in range(1000)], scores=torch.arange(2000, 0, -1)
    )
    chosen = select("top_k", pool, budget, max_per_source=cap).indices.tolist()
    assert chosen[:most] == list(range(most)) and chosen[most:] == list(range(1000, 1000 + budget - most))


@pytest.mark.parametrize(
    ("cap", "budget", "taken"),
    [
        (0.29, 100, [0, 1]),  # 29 tokens a source
        (0.28, 100, [0]),
        ("29 %", 100, [0, 1]),
        (0.5, 59, [0, 1]),
        (0.5, 57, [0]),
    ],
)
def test_a_share_of_a_token_budget_is_rounded_down(cap, budget, taken):
    pool = Candidates(keys=list("abcde"), scores=[5, 4, 3, 2, 1], tokens=[20, 9, 9, 15, 50], sources=list("xxxyz"))
    chosen = select("top_k", pool, f"{budget} tokens", max_per_source=cap).indices.tolist()
    assert [row for row in chosen if row < 2] == taken


def test_caps_count_rows_of_a_source_among_those_that_may_be_chosen():
    """A row that may not be chosen does not use up its source's room; sources of one row each never hit a cap."""
    pool = candidates(
        n=10,
        sources=["a"] * 6 + ["b"] * 4,
        scores=torch.arange(10, 0, -1),
        eligible=[False, False, True, True, True, True, True, True, True, True],
    )
    assert select("top_k", pool, 4, max_per_source=2).indices.tolist() == [2, 3, 6, 7]
    alone = candidates(n=10, sources=[str(i) for i in range(10)], scores=torch.arange(10, 0, -1))
    assert select("top_k", alone, 10, max_per_source=1).indices.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("cap", "advice"),
    [
        (0, "write a share"),
        (-1, "write a share"),
        (1.5, "write a share"),
        ("many", "write a share"),
        ("120%", "write a share"),
        (np.nan, "write"),
        (0.01, "less than one"),
        (5, "only 15 rows of 3 sources"),
        (0.1, "only 6 rows of 3 sources in a budget of 20 rows"),
    ],
)
def test_caps_that_make_no_sense(cap, advice):
    with pytest.raises(UsageError, match=advice):
        select("top_k", candidates(), "20", max_per_source=cap)


def test_token_budgets_skip_what_does_not_fit():
    pool = Candidates(keys=list("abcdef"), scores=[6, 5, 4, 3, 2, 1], tokens=[50, 60, 30, 30, 10, 10])
    assert select("top_k", pool, "100 tokens").indices.tolist() == [0, 2, 4, 5]  # b no longer fits, nor d
    assert select("top_k", pool, "55 tokens").indices.tolist() == [0]
    assert select("top_k", pool, "190 tokens").indices.tolist() == list(range(6))
    pool = Candidates(keys=list("abc"), scores=[3, 2, 1], tokens=[50, 60, 70], sources=["x", "x", "y"])
    assert select("top_k", pool, "170 tokens", max_per_source=0.5).indices.tolist() == [0, 2]  # 85 tokens of x
    assert select("top_k", pool, "170 tokens", max_per_source=1).indices.tolist() == [0, 2]
    with pytest.raises(UsageError, match="only 0 rows"):
        select("top_k", pool, "90 tokens", max_per_source=0.5)


COLUMN = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 20), st.sampled_from("abc"), st.booleans()), max_size=25)


@given(
    rows=COLUMN,
    name=st.sampled_from(sorted(SELECTORS)),
    amount=st.integers(0, 60),
    unit=st.sampled_from(["", "%", " tokens"]),
    cap=st.sampled_from([None, 1, 2, 5, 0.2, 0.5, 0.9]),
    seed=st.integers(0, 3),
)
def test_defined_answer_or_typed_error(rows, name, amount, unit, cap, seed):
    """N7: any pool, budget and cap; k above n, k = 0, no rows, one row, ties, sources that run out."""
    n = len(rows)
    pool = Candidates(
        keys=[f"{(i * 31) % 101}" for i in range(n)],
        scores=[r[0] for r in rows],
        tokens=[r[1] for r in rows],
        supervised=[r[1] for r in rows],
        sources=[r[2] for r in rows],
        eligible=[r[3] for r in rows],
        similarity=torch.tensor([[r[0], r[1]] for r in rows]).reshape(n, 2),
    )
    reference = Selection(torch.arange(min(n, 4)))
    try:
        chosen = select(name, pool, f"{amount}{unit}", seed=seed, max_per_source=cap, reference=reference)
    except UsageError as error:
        assert len(str(error)) > 20
        return
    picked = chosen.indices.tolist()
    assert picked and all(rows[i][3] for i in picked) and len(set(picked)) == len(picked) == len(chosen.why)
    sizes = Counter()
    for i in picked:
        sizes[rows[i][2]] += max(rows[i][1], 1) if unit == " tokens" else 1
    if unit == "%":
        assert len(picked) == min(int(amount * n / 100 + 1e-9), sum(r[3] for r in rows))
    elif not unit:
        assert len(picked) == amount
    else:
        assert sum(sizes.values()) <= amount
    total = amount if unit else len(picked)
    if isinstance(cap, float) and unit != "%":
        assert max(sizes.values()) <= cap * total + 1e-9
    elif isinstance(cap, int):
        assert max(Counter(rows[i][2] for i in picked).values()) <= cap
    if name == "top_k":
        assert picked == sorted(picked, key=lambda i: (-rows[i][0], pool.keys[i]))
        if cap is None and unit != " tokens":
            left_out = [i for i in range(n) if rows[i][3] and i not in picked]
            assert all(rows[i][0] <= rows[picked[-1]][0] for i in left_out)


@pytest.mark.parametrize("bad, said", [(5, "finite: a, b, c, d, e; mark"), (7, "a, b, c, d, e and 2 more; mark")])
def test_the_first_rows_that_are_not_finite_are_named_and_the_others_counted(bad, said):
    values = torch.full((9,), torch.nan).index_fill(0, torch.arange(bad, 9), 1.0)
    with pytest.raises(DataError, match=said):
        require_finite(values, list("abcdefghi"), "scores")
