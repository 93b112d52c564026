"""The choice of rows, against the specification's worked numbers and plain definitions."""

import math
from collections import Counter
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datatools import DataError, UsageError
from datatools.colm import (
    CORESET_METHODS,
    budgets,
    choose_rows,
    cluster_sources,
    costs_more,
    matching_error,
    not_better,
    plan,
    random_error,
    saved_seconds,
    select_batch,
    small_sources,
    worth_in_rows,
)
from datatools.colm.choice import sparsify
from datatools.colm.quotas import Plan, drawn_budgets
from datatools.subsets.facility_location import distances, facility_location
from datatools.subsets.herding import herding
from datatools.subsets.matching_pursuit import matching_pursuit
from tests.reference import facility_location as reference

POINTS = torch.tensor([[0, 0], [1, 0], [0, 1.5], [5, 5], [6, 5.5], [10, 0.5]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(n=40, d=30, seed=0):
    """Rows with a common direction, as gradients of one batch have."""
    g = generator(seed)
    return torch.randn(n, d, generator=g) + torch.randn(d, generator=g)


# ---------------------------------------------------------------------------------------------------- facility location


@pytest.mark.parametrize("lazy", [False, True])
def test_worked_example_of_the_specification(lazy):
    """spec/colm.md section 6: distances, greedy picks, cluster sizes; greedy, not the optimum."""
    apart = distances(POINTS)
    assert apart[0].tolist() == [0, 1, 1.5, 10, 11.5, 10.5] and apart.max() == 11.5
    similarity = 11.5 - apart
    found = facility_location(similarity, 4, lazy=lazy)
    assert found.indices.tolist() == [1, 4, 5, 2]
    plain = similarity.tolist()
    worth = [reference.value(plain, [1, 4, 5, 2][:k]) for k in (1, 2, 3, 4)]
    assert worth == [36.5, 55.0, 64.0, 66.5]
    sizes = {k: facility_location(similarity, k, lazy=lazy).weights.tolist() for k in (2, 3, 4)}
    assert sizes == {2: [3, 3], 3: [3, 2, 1], 4: [2, 2, 1, 1]}
    assert reference.best(plain, 2) == (0, 4) and reference.best(plain, 3) == (0, 3, 5)


@given(st.integers(2, 9), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_greedy_equals_its_definition(n, seed, lazy, ties):
    """Whole-number distances have many ties: the lower index must win, in both ways."""
    points = torch.randint(0, 3 if ties else 10_000, (n, 2), generator=generator(seed)).double()
    apart = distances(points)
    similarity = apart.max() - apart
    for k in {1, (n + 1) // 2, n}:
        picks = facility_location(similarity, k, lazy=lazy).indices.tolist()
        assert picks == reference.greedy(similarity.tolist(), k)
        best = reference.value(similarity.tolist(), reference.best(similarity.tolist(), k))
        assert reference.value(similarity.tolist(), picks) >= (1 - 1 / 2.718281829) * best


def test_lazy_is_what_large_batches_use_and_gives_the_same_rows():
    similarity = 10 - distances(gradients(600, 5)) / 10
    both = [facility_location(similarity, 60, lazy=lazy).indices.tolist() for lazy in (None, False, True)]
    assert both[0] == both[1] == both[2]


@pytest.mark.filterwarnings("ignore")
def test_submodlib_reaches_the_same_value():
    """The library that the published code uses, where it is installed.

    Its picks differ at ties, which are common: of two rows that one medoid covers, either covers both.
    """
    submodlib = pytest.importorskip("submodlib")
    apart = distances(gradients(100, 8, seed=3))
    similarity = (apart.max() - apart).float()
    function = submodlib.functions.facilityLocation.FacilityLocationFunction(
        n=100, mode="dense", separate_rep=False, sijs=similarity.numpy()
    )
    theirs = [
        i for i, _ in function.maximize(budget=40, optimizer="LazyGreedy", stopIfZeroGain=False, show_progress=False)
    ]
    ours = facility_location(similarity, 40).indices.tolist()
    plain = similarity.double().tolist()
    assert ours[:10] == theirs[:10] and reference.value(plain, ours) == pytest.approx(reference.value(plain, theirs))


def test_facility_location_refuses_what_has_no_answer():
    good = torch.eye(3)
    for similarity, k in ((good, 0), (good, 4), (good[:2], 1), (good * torch.nan, 1)):
        with pytest.raises(ValueError, match="facility_location"):
            facility_location(similarity, k)


# -------------------------------------------------------------------------------------------------- herding and pursuit


def test_herding_starts_nearest_the_mean_and_no_exchange_is_left():
    rows = gradients(20)
    assert herding(rows, 1, exchanges=0).indices.tolist() == [int((rows - rows.mean(0)).norm(dim=1).argmin())]
    found = herding(rows, 7, exchanges=1000).indices.tolist()
    error = float((rows[found].mean(0) - rows.mean(0)).norm())
    for out in found:
        for into in set(range(20)) - set(found):
            other = [i for i in found if i != out] + [into]
            assert float((rows[other].mean(0) - rows.mean(0)).norm()) >= error - 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_herding_matches_the_mean_better_than_random_and_medoids(seed):
    rows = gradients(64, 400, seed)
    made = plan([0] * 64, 32, generator=generator())
    errors = {
        name: matching_error(rows, choose_rows(rows, made, method=name, generator=generator(seed)))
        for name in ("herding", "matching_pursuit", "facility_location")
    }
    chance = random_error(rows, made, generator(seed))
    assert errors["herding"] < 0.8 * chance and errors["matching_pursuit"] < 0.8 * chance
    assert errors["herding"] < errors["facility_location"]


def test_herding_keeps_quotas_and_what_is_kept_and_no_exchange_within_a_source_is_left():
    rows = gradients(20, 9)
    made = plan(SOURCES, 11, {"rare"}, generator=generator())
    found = herding(rows, 11, kept=made.kept, groups=made.groups, exchanges=1000).indices.tolist()
    assert Counter(SOURCES[i] for i in found) == {"rare": 3} | {SOURCES[int(r[0])]: quota for r, quota in made.groups}

    def error(picks):
        return float((rows[picks].mean(0) - rows.mean(0)).norm())

    for out in set(found) - set(made.kept.tolist()):
        for into in (i for i in range(20) if i not in found and SOURCES[i] == SOURCES[out]):
            assert error([i for i in found if i != out] + [into]) >= error(found) - 1e-6
    with pytest.raises(ValueError, match="do not add up to k=12"):
        herding(rows, 12, kept=made.kept, groups=made.groups)


def test_herding_takes_everything_when_everything_fits():
    assert sorted(herding(gradients(9), 9).indices.tolist()) == list(range(9))


def test_matching_pursuit_solves_what_can_be_solved():
    """Orthogonal rows: the k longest, each with weight k / n; and the error only falls with k."""
    rows = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0]))
    found = matching_pursuit(rows, 2)
    assert found.indices.tolist() == [1, 3]
    torch.testing.assert_close(found.weights, torch.full((2,), 2 / 4))
    rows, left = gradients(30, 100), []
    for k in (1, 5, 15, 30):
        found = matching_pursuit(rows, k)
        assert (found.weights >= 0).all()
        left.append(matching_error(rows, found))
    assert left == sorted(left, reverse=True) and left[-1] < 1e-6


def test_top_norm_is_the_largest_with_ties_to_the_lower_row():
    rows = torch.tensor([[1.0], [3.0], [-3.0], [2.0]])
    made = plan([0] * 4, 3, generator=generator())
    assert choose_rows(rows, made, method="top_norm", generator=generator()).indices.tolist() == [1, 2, 3]


# --------------------------------------------------------------------------------------------------- sources and quotas


def test_budgets_of_the_specification():
    assert budgets([40, 25, 20, 8], 29) == [12, 8, 6, 3]
    assert budgets([50, 30, 10, 3], 30) == [16, 10, 3, 1]
    assert budgets([1, 60, 30, 2], 29) == [0, 19, 9, 1]
    assert budgets([], 0) == [] and budgets([0, 0], 0) == [0, 0]
    with pytest.raises(ValueError, match="5 of 4 rows"):
        budgets([1, 3], 5)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.data())
def test_budgets_add_up_and_are_capped(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    found = budgets(sizes, total)
    assert sum(found) == total and all(0 <= b <= size for b, size in zip(found, sizes, strict=True))
    if sum(sizes):
        assert all(abs(b - total * size / sum(sizes)) < 1 for b, size in zip(found, sizes, strict=True))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.data())
def test_drawn_budgets_are_the_shares_on_average(sizes, data):
    """Exactly: the mean over all values of the only number that is drawn, besides the order of equal sizes."""
    whole = sum(sizes)
    total = data.draw(st.integers(0, whole))
    seed = data.draw(st.integers(0, 99))
    found = []
    for mark in range(max(1, whole)):
        with mock.patch.object(torch, "randint", lambda *_, mark=mark, **__: torch.tensor([mark])):
            found.append(drawn_budgets(sizes, total, generator=generator(seed)))
    for each in found:
        assert sum(each) == total and all(0 <= b <= size for b, size in zip(each, sizes, strict=True))
        low = [total * size // max(1, whole) for size in sizes]
        assert all(0 <= b - least <= 1 for b, least in zip(each, low, strict=True))
        made = Plan(torch.zeros(0, dtype=torch.int64), tuple(zip(parts(sizes), each, strict=True)), False)
        taken = torch.cat([rows[:b] for rows, b in made.groups])
        if total:
            assert all(bool(torch.isin(rows, taken).any()) for rows in made.strata()), "every stratum has a row"
        assert sorted(torch.cat([*made.strata(), torch.zeros(0)]).tolist()) == list(range(whole))
    assert [len(found) * total * size for size in sizes] == [whole * sum(each) for each in zip(*found, strict=True)]


def parts(sizes):
    return torch.arange(sum(sizes)).split(sizes)


def test_small_sources_are_those_below_the_average_size():
    assert small_sources({"a": 100, "b": 10, "c": 40}) == {"b", "c"}  # average 50
    assert small_sources({"a": 5, "b": 5}) == set(), "at the average is not below it"
    assert small_sources({"only": 3}) == set()


PLAIN = sorted(name for name, method in CORESET_METHODS.items() if not method.target)
AIM = torch.ones(9)
SOURCES = ["big"] * 12 + ["rare"] * 3 + ["large"] * 5


@pytest.mark.parametrize("method", sorted(CORESET_METHODS))
def test_every_small_row_is_kept_and_the_size_is_right(method):
    rows = gradients(20, 9)
    for keep in (3, 4, 10, 19, 20):
        chosen, made = select_batch(
            rows, SOURCES, keep, small_sources={"rare"}, method=method, generator=generator(1), wanted=AIM
        )
        assert len(chosen) == keep == len(made) and {12, 13, 14} <= set(chosen.indices.tolist())
        counts = Counter(SOURCES[i] for i in chosen.indices.tolist())
        assert [counts["big"], counts["large"]] == [quota for _, quota in made.groups]
        assert abs(counts["big"] - 12 / 17 * (keep - 3)) < 1, "the share, rounded up or down"
        assert not made.overflow


def test_small_sources_that_overflow_are_drawn_by_quotas():
    sources = ["a"] * 8 + ["b"] * 4 + ["c"] * 4
    made = plan(sources, 6, {"a", "b"}, generator=generator(2))
    counts = Counter(sources[i] for i in made.kept.tolist())
    assert made.overflow and counts == {"a": 4, "b": 2} and [quota for _, quota in made.groups] == [0]
    drawn = {tuple(plan(sources, 6, {"a", "b"}, generator=generator(s)).kept.tolist()) for s in range(9)}
    assert len(drawn) > 1, "which of them is drawn, not fixed"


@settings(max_examples=10)
@given(st.permutations(range(20)))
def test_picks_move_with_the_rows(order):
    """Another order of the batch, the same rows: for every method that draws nothing and has no ties."""
    rows = gradients(20, 9)
    for method in sorted(set(CORESET_METHODS) - {"random_in_source", "importance", "opus", "facility_location"}):
        picks = []
        for at in (list(range(20)), list(order)):
            chosen, _ = select_batch(
                rows[at], [SOURCES[i] for i in at], 11, small_sources={"rare"}, method=method, generator=generator(),
                wanted=AIM,
            )  # fmt: skip
            picks.append({at[i] for i in chosen.indices.tolist()})
        assert picks[0] == picks[1], method


def test_a_source_of_one_row_and_a_quota_of_none():
    rows = gradients(6, 4)
    seen = set()
    for seed in range(20):
        chosen, made = select_batch(rows, ["a", "a", "a", "a", "a", "b"], 2, generator=generator(seed))
        quotas = [quota for _, quota in made.groups]
        assert sum(i < 5 for i in chosen.indices.tolist()) == quotas[0]
        seen.add(tuple(quotas))
    assert seen == {(2, 0), (1, 1)}
    chosen, _ = select_batch(rows[:2], ["a", "b"], 2, generator=generator())
    assert chosen.indices.tolist() == [0, 1]


def test_one_group_of_all_large_sources():
    made = plan(SOURCES, 10, {"rare"}, per_source=False, generator=generator())
    assert len(made.groups) == 1 and made.groups[0][1] == 7 and len(made.groups[0][0]) == 17


def test_importance_is_the_absolute_mean():
    """spec/colm.md section 5: columns 0 and 2 of the worked example; ties go to the lower column."""
    u = torch.tensor([
        [0.11389329, -0.00762606, 0.08385516, 0.06604203],
        [0.08385517, 0.01524639, 0.03041306, 0.06098558],
        [0.03805894, 0.00762606, 0.09895324, 0.07108668],
    ])  # fmt: skip
    torch.testing.assert_close(sparsify(u, 2), u[:, [0, 2]])
    assert sparsify(u, None) is u and sparsify(u, 4) is u
    tied = torch.tensor([[1.0, -2.0, 2.0, -2.0]])
    assert sparsify(tied, 2).tolist() == [[-2.0, 2.0]]


def test_distances_by_metric():
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [6.0, 0.0]])
    assert distances(rows, "l1")[0].tolist() == [0, 7, 3]
    assert distances(rows, "l2")[0].tolist() == pytest.approx([0, 5, 3])
    assert distances(rows, "cosine")[0].tolist() == pytest.approx([0, 1, 0])
    with pytest.raises(UsageError, match="unknown metric 'l3'"):
        distances(rows, "l3")


def test_bad_batches_are_refused_with_advice():
    rows = gradients(6, 4)
    with pytest.raises(UsageError, match=r"9 rows of a batch of 6.*--large-batch"):
        select_batch(rows, ["a"] * 6, 9, generator=generator())
    rows[2, 1] = torch.nan
    with pytest.raises(DataError, match=r"features of rows \[2\] of the batch are not finite"):
        select_batch(rows, ["a"] * 6, 3, generator=generator())
    with pytest.raises(UsageError, match="no method is called 'herdin'; did you mean 'herding'"):
        select_batch(rows, ["a"] * 6, 3, method="herdin", generator=generator())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_of_small_sources_count_where_they_are_read(value):
    """Herding aims at the mean of all rows: one that is not finite is named. The other methods never look at it."""
    rows = gradients(20, 9)
    rows[13, 2] = value
    names = [f"a.jsonl:{i + 1}" for i in range(20)]
    made = plan(SOURCES, 11, {"rare"}, generator=generator())
    assert 13 in made.kept.tolist()
    with pytest.raises(DataError, match=r"features of rows a\.jsonl:14 are not finite \(1 rows\)"):
        choose_rows(rows, made, generator=generator(), names=names)
    with pytest.raises(DataError, match=r"features of rows \[13\] of the batch are not finite"):
        select_batch(rows, SOURCES, 11, small_sources={"rare"}, method="herding", generator=generator())
    for method in sorted(set(PLAIN) - {"herding"}):
        chosen = choose_rows(rows, made, method=method, generator=generator())
        assert {12, 13, 14} < set(chosen.indices.tolist()) and chosen.weights.isfinite().all(), method
    rows[3, 0] = value
    for method in PLAIN:
        with pytest.raises(DataError, match=r"rows \[3, 13\]" if method == "herding" else r"rows \[3\]"):
            choose_rows(rows, made, method=method, generator=generator())


def test_clusters_find_groups_of_vectors():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.1], [0.1, 5.0]])
    found = cluster_sources(vectors, 2, seed=1).tolist()
    assert found[0] == found[2] != found[1] == found[3] and found == cluster_sources(vectors, 2, seed=1).tolist()
    with pytest.raises(UsageError, match="clusters=5 for 4 rows"):
        cluster_sources(vectors, 5, seed=1)


# -------------------------------------------------------------------------------------------------------------- monitor


def test_matching_error_is_relative_and_zero_for_all_rows():
    rows = gradients(8, 5)
    made = plan([0] * 8, 8, generator=generator())
    assert matching_error(rows, made.draw(generator())) < 1e-6
    half = plan([0] * 8, 4, generator=generator()).draw(generator(3))
    direct = (rows[half.indices].mean(0) - rows.mean(0)).norm() / rows.mean(0).norm()
    assert matching_error(rows, half) == pytest.approx(float(direct), rel=1e-5)


def entries(ours, chance, steps):
    return [{"step": t, "match_error": ours, "match_error_random": chance} for t in steps]


def test_the_warning_comes_after_a_hundred_steps_that_gave_nothing():
    assert not_better(entries(0.99, 1.0, range(0, 90, 10))) is None, "too early to say"
    assert "0.990 against 1.000" in not_better(entries(0.99, 1.0, range(1, 112, 10)))
    assert not_better(entries(0.9, 1.0, range(1, 112, 10))) is None
    better = entries(1.5, 1.0, range(1, 200, 10)) + entries(0.5, 1.0, range(201, 312, 10))
    assert not_better(better) is None, "only the last hundred count"
    assert not_better([]) is None


def test_a_choice_pays_if_the_rows_it_stands_for_cost_more_than_choosing():
    def entry(spent, error=0.5, train=1.0):
        return {"kept_rows": 16, "drawn_rows": 32, "match_error": error, "match_error_random": 1.0,
                "select_seconds": spent, "train_seconds": train}  # fmt: skip

    assert saved_seconds(entry(0.1)) == pytest.approx(0.6) and saved_seconds(entry(0.1, error=2.0)) < 0
    assert saved_seconds({"match_error": 1.0}) is None
    assert costs_more([entry(9.0), *[entry(0.5)] * 6], advice="x") is None, "the first step is slow, and does not count"
    text = costs_more([entry(0.7)] * 6, advice="do this")
    assert "takes 0.7 s of a step, and the 16 rows that are kept" in text and "as well as 25.6 random rows" in text
    assert text.endswith("which saves 0.6 s of training; do this")
    assert "saves 0 s" in costs_more([entry(0.1, error=2.0)] * 6, advice="x")
    assert costs_more([entry(0.7)] * 3, advice="x") is None, "too early"
    assert costs_more([entry(0.0, error=2.0)] * 6, advice="x") is None, "what costs nothing need not save"
    with_gaps = [entry(0.7, error=math.nan)] * 6
    assert costs_more(with_gaps, advice="x") is not None and worth_in_rows(16, 32, math.nan, 1.0) == 16
