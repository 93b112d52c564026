"""Searches on planted precedence, statistics of a validation, maps of positions, the order file."""

import itertools
import math

import numpy as np
import pytest
import torch

from datatools import DataError, Order, UsageError
from datatools import order as orders
from datatools.order import Cost, Surrogate, curricula, exact_order, judge, memory_map, prize, refine, search
from datatools.order.estimators.pairwise import Pairwise
from datatools.order.refine import promise
from datatools.order.validate import calibrated, hit_rate
from datatools.stats import ranks
from tests.datatools.order.quadratics import random_problem, recipe, run


def planted(steps: int, seed: int) -> tuple[Pairwise, list[int]]:
    """A precedence surrogate whose best order is known: every pair prefers it."""
    g = torch.Generator().manual_seed(seed)
    best = torch.randperm(steps, generator=g).tolist()
    q = torch.zeros(steps, steps, dtype=torch.float64)
    for a, b in itertools.combinations(best, 2):
        q[a, b], q[b, a] = -float(torch.rand((), generator=g)), float(torch.rand((), generator=g))
    kernel = torch.ones(steps, steps, dtype=torch.float64).triu(1)
    zero = torch.zeros(steps, steps, dtype=torch.float64)
    made = Pairwise(tuple(range(steps)), Cost(), 0.0, zero, kernel, q[None], torch.zeros(steps, dtype=torch.int64))
    return made, best


class Opaque(Surrogate):
    """The same scores without the matrix, so that searches cannot look inside."""

    name = "opaque"

    def __init__(self, inner: Pairwise) -> None:
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "sequence", inner.sequence)

    def _scores(self, sequences: torch.Tensor) -> torch.Tensor:
        return self.inner._scores(sequences)  # type: ignore[attr-defined]

    def trust(self, sequence):  # type: ignore[no-untyped-def]
        return {}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hidden", [False, True])
def test_searches_beat_random_with_equal_evaluations(seed: int, hidden: bool) -> None:
    matrix, best = planted(16, seed)
    surrogate = Opaque(matrix) if hidden else matrix
    budget = 3000
    found = {name: search(surrogate, name, budget=budget, seed=seed) for name in ("random", "genetic", "local")}
    for name, result in found.items():
        assert result.evaluations <= budget, name
        assert result.scores == sorted(result.scores)
        assert result.scores[0] == pytest.approx(surrogate.score(result.sequences[0]))
    assert found["random"].evaluations == budget
    assert found["genetic"].scores[0] < found["random"].scores[0]
    assert found["local"].scores[0] < found["random"].scores[0]
    assert list(search(matrix, "local", budget=20_000, seed=seed).sequences[0]) == best


def test_a_search_keeps_the_best_curriculum_it_was_given() -> None:
    matrix, best = planted(12, 0)
    assert list(search(matrix, "random", budget=50, starts=[best]).sequences[0]) == best
    with pytest.raises(UsageError, match="permutation"):
        search(matrix, "random", starts=[[0] * 12])
    with pytest.raises(UsageError, match="did you mean 'genetic'"):
        search(matrix, "genetics")


@pytest.mark.parametrize("seed", range(3))
def test_refining_beats_random_with_equal_evaluations_and_scores_no_order_twice(seed: int) -> None:
    matrix, _ = planted(16, seed)
    drawn = np.random.default_rng(seed).permuted(np.tile(np.arange(16), (8, 1)), axis=1)
    known = {tuple(s): float(v) for s, v in zip(drawn.tolist(), matrix.scores(drawn), strict=True)}
    asked: list[tuple[int, ...]] = []

    def judge_(sequences: list[tuple[int, ...]]) -> list[float]:
        assert len(sequences) <= 8
        asked.extend(sequences)
        return [float("inf") if len(asked) < 12 else v for v in matrix.scores(sequences).tolist()]

    found = refine(judge_, known, range(16), budget=80, seed=seed)
    assert found.evaluations == len(asked) == len(set(asked)) == 80
    assert not set(asked) & known.keys()
    assert found.scores == sorted(found.scores) and math.isinf(found.scores[-1])
    assert found.scores[0] == pytest.approx(matrix.score(found.sequences[0]))
    assert found.scores[0] < search(matrix, "random", budget=88, seed=seed).scores[0]
    again = refine(lambda sequences: matrix.scores(sequences).tolist(), known, range(16), budget=80, seed=seed)
    assert again.scores[0] < min(known.values())
    assert again == refine(
        lambda sequences: matrix.scores(sequences).tolist(), known, range(16), budget=80, seed=seed
    ), "the same seed, the same orders"


def test_promise_is_the_lower_bound_of_a_process_over_rank_correlations() -> None:
    """By hand: K = exp(-3 (1 - Spearman)), mean and variance of the values, a tenth of it as noise."""
    from scipy import stats

    rng = np.random.default_rng(0)
    judged, asked = (rng.permuted(np.tile(np.arange(7), (n, 1)), axis=1) for n in (9, 5))
    values = rng.normal(3.0, 2.0, size=9)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        ranks_ = [[stats.spearmanr(np.argsort(x), np.argsort(y)).statistic for y in b] for x in a]
        return np.exp(-3 * (1 - np.array(ranks_)))

    noisy, between = kernel(judged, judged) + 0.1 * np.eye(9), kernel(asked, judged)
    expected = values.mean() + between @ np.linalg.solve(noisy, values - values.mean())
    deviation = values.std() * np.sqrt(1 - np.einsum("mn,nm->m", between, np.linalg.solve(noisy, between.T)))
    np.testing.assert_allclose(promise(judged, values, asked), expected - deviation, rtol=1e-6)


def test_refining_stops_where_there_is_no_other_order() -> None:
    score = {s: float(i) for i, s in enumerate(itertools.permutations((5, 6, 7)))}
    known = {(7, 6, 5): score[7, 6, 5]}
    found = refine(lambda sequences: [score[s] for s in sequences], known, (5, 6, 7), budget=40)
    assert found.evaluations == 5 and found.sequences[0] == (5, 6, 7)
    repeated = refine(lambda sequences: [float(s[0]) for s in sequences], {(4, 3, 4): 4.0}, (4, 4, 3), budget=9)
    assert repeated.sequences[0] == (3, 4, 4)
    assert refine(lambda sequences: [0.0] * len(sequences), {(0,): 0.0}, (0,), budget=4).sequences == []


def test_dynamic_programming_is_exact() -> None:
    costs = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order, value = exact_order(costs)
    every = {
        p: sum(float(costs[a, b]) for a, b in itertools.combinations(p, 2)) for p in itertools.permutations(range(6))
    }
    assert value == pytest.approx(min(every.values()))
    assert every[tuple(order)] == pytest.approx(value)
    with pytest.raises(UsageError, match="at most 12"):
        exact_order(torch.zeros(13, 13))


def test_curricula_are_permutations_and_what_they_say() -> None:
    made = curricula((0, 1, 2, 3, 0, 1), {"length": [3, 1, 2, 0]}, ["a", "a", "b", "b"])
    assert made["length, rising"] == (3, 1, 1, 2, 0, 0)
    assert made["length, falling"] == (0, 0, 2, 1, 1, 3)
    assert made["sources, one by one"] == (0, 1, 0, 1, 2, 3)
    assert made["sources, interleaved"] == (0, 2, 1, 0, 3, 1)
    assert all(sorted(s) == [0, 0, 1, 1, 2, 3] for s in made.values())


def test_ranks_and_hit_rate_against_scipy() -> None:
    from scipy import stats

    a = np.array([3.0, 1, 1, 5, 2, 2, 2])
    b = np.array([1.0, 2, 0, 4, 4, 3, 5])
    np.testing.assert_allclose(ranks(a), stats.rankdata(a))
    assert orders.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert hit_rate([1, 2, 3], [1, 3, 2]) == pytest.approx(2 / 3)
    assert hit_rate([1, 1], [1, 2]) == 0.5


def test_judge() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=40)
    good = judge(true + 0.1 * rng.normal(size=40) + 7, true, reference=0.0)
    bad = judge(rng.normal(size=40), true, reference=0.0)
    assert good.spearman is not None and good.spearman > 0.95 and good.bias == pytest.approx(7, abs=0.1)
    assert good.spearman_interval is not None
    assert good.spearman_interval[0] <= good.spearman <= good.spearman_interval[1]
    assert bad.spearman_interval is not None and bad.spearman_interval[0] < 0 < bad.spearman_interval[1]
    assert good.regret <= bad.regret and good.regret >= 0
    assert good.conformal is not None and 0.1 < good.conformal < 0.3
    new = rng.normal(size=4000)
    inside = np.abs((new + 0.1 * rng.normal(size=4000)) - new) <= good.conformal
    assert inside.mean() > 0.85, "a new order lies in the interval about nine times of ten"
    same = judge([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], reference=2.0)
    assert same.spearman is None and same.conformal is None and same.regret == 0


def test_searches_go_on_from_a_start_that_diverges_and_take_a_single_batch() -> None:
    """From an order whose estimate is inf every neighbour is better."""
    steps = 5

    class Diverging(Opaque):
        def _scores(self, sequences: torch.Tensor) -> torch.Tensor:
            found = super()._scores(sequences)
            return torch.where((sequences == torch.arange(steps)).all(1), math.inf, found)

    matrix, best = planted(steps, 0)
    made = Diverging(matrix)
    for method in ("local", "genetic", "random", "borda"):
        assert math.isfinite(search(made, method, budget=400).scores[0]), method
    assert list(search(made, "local", budget=3000).sequences[0]) == best
    for method in ("local", "genetic", "random", "borda"):
        assert search(planted(1, 0)[0], method, budget=20).sequences == [(0,)], method


def test_prize() -> None:
    assert prize([1.0, 2.0, 3.0], [1.0, 1.1]).worth_it
    assert not prize([1.0, 1.1, 1.2], [1.0, 1.5]).worth_it
    assert prize([1.0, 2.0], [1.0, 1.0]).ratio is None
    unknown = prize([1.0, 2.0], None)
    assert unknown.worth_it is None and "not measured" in unknown.sentence()


def test_a_mixture_learns_which_estimate_to_follow() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=60)
    estimates = np.stack([rng.normal(size=60), true + 0.2 * rng.normal(size=60)])
    mixed, weights = calibrated(estimates, true, range(10))
    assert abs(weights[1]) > 2 * abs(weights[0])
    found = orders.spearman(mixed[10:], true[10:])
    assert found is not None and found > 0.9


def test_memory_map_on_a_problem_with_an_answer() -> None:
    """SGD on quadratics with a full step to the minimum: a batch is remembered best when it comes last."""
    from optim import SGDRule

    problem = random_problem(5, 3, 0)
    ref = run(problem, SGDRule(), [0.3] * 3, [0.3] * 5)
    calls = []

    def final(sequence):  # type: ignore[no-untyped-def]
        calls.append(list(sequence))
        return orders.train(problem, ref.recipe, sequence, ref.start.params)[0]

    found = memory_map(
        ref.sequence, final, problem.train_loss, problem.held_out_loss, positions=5, completions=4, seed=0,
        row_losses=lambda params, batch: [problem.train_loss(params, batch), float(batch)],
    )  # fmt: skip
    of_rows = torch.stack(found.rows)  # [batches, positions and none, completions, rows]
    torch.testing.assert_close(of_rows[:, :-1, :, 0].mean(2), found.memory)
    torch.testing.assert_close(of_rows[:, -1, :, 0].mean(1), found.without_memory)
    assert of_rows[:, :, :, 1].eq(torch.arange(5.0)[:, None, None]).all()
    assert len(calls) == 5 * 4 * 6
    assert all(sorted(c, key=str) == sorted([0, 1, 2, 3, 4], key=str) for c in calls if None not in c)
    assert all(c.count(None) == 1 and len(c) == 5 and len(set(c)) == 5 for c in calls if None in c)
    effect = found.position_effect.mean(0)
    assert float(effect[-1]) < float(effect[0]), "recency"
    assert bool((found.counterfactual > 0).all()), "training on a batch lowers its loss"


def test_leaving_a_batch_out_leaves_out_all_its_turns() -> None:
    from optim import SGDRule

    problem = random_problem(2, 3, 0)
    ref = run(problem, SGDRule(), [0.3] * 3, [0.3] * 2)
    calls: list[list[int | None]] = []

    def final(sequence):  # type: ignore[no-untyped-def]
        calls.append(list(sequence))
        return ref.start.params

    memory_map((0, 1, 0, 1), final, problem.train_loss, problem.held_out_loss, batches=[0], positions=2, completions=3)
    without = [c for c in calls if None in c]
    assert len(without) == 3 and all(sorted(c, key=str) == [1, 1, None, None] for c in without)


def test_groups_are_measured_and_ranked() -> None:
    from optim import AdamWRule

    problem = random_problem(6, 4, 0)
    ref = run(problem, AdamWRule(), [0.3] * 4, [0.05] * 6)
    made = orders.precompute("groups", ref, problem, groups=[0, 0, 1, 1, 2, 2])
    assert made.score(ref.sequence) == pytest.approx(problem.held_out_loss(ref.end.params))
    blocks = {p: tuple(b for g in p for b in (2 * g, 2 * g + 1)) for p in itertools.permutations(range(3))}
    scores = {p: made.score(s) for p, s in blocks.items()}
    assert made.best() == blocks[min(scores, key=scores.__getitem__)]  # type: ignore[attr-defined]
    assert made.trust(blocks[0, 1, 2])["mixing"] == 0
    assert made.trust((0, 2, 4, 1, 3, 5))["mixing"] == 1
    assert orders.trusted(made.trust(blocks[2, 0, 1])) and not orders.trusted(made.trust((0, 2, 4, 1, 3, 5)))
    assert made.cost.gradients == 6 * 4
    with pytest.raises(UsageError, match="one per batch"):
        orders.precompute("groups", ref, problem, groups=[0] * 6)


def test_scoring_speed_counts_orders() -> None:
    made, _ = planted(64, 0)
    drawn = np.random.default_rng(0).permuted(np.tile(np.arange(64), (300, 1)), axis=1)
    scores = made.scores(drawn)
    by_hand = [
        sum(float(made.precedence[0, s[a], s[b]]) for a, b in itertools.combinations(range(64), 2)) for s in drawn[:3]
    ]
    torch.testing.assert_close(scores[:3], torch.tensor(by_hand, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_order_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    order = Order((("a", "b:1"), ("ü",), ("c", "d", "e")), (2, 0, 1, 0))
    order.save(tmp_path / "order.npz")
    assert Order.load(tmp_path / "order.npz") == order
    assert order[1] == ("a", "b:1") and len(order) == 4
    assert order.reordered([0, 0, 1, 2])[3] == ("c", "d", "e")
    with pytest.raises(UsageError, match="permutation"):
        order.reordered([0, 1, 1, 2])
    with pytest.raises(UsageError, match="step 0 refers to batch 3"):
        Order((("a",),), (3,))
    with pytest.raises(UsageError, match="batch 1 has no rows"):
        Order((("a",), ()), (0,))
    (tmp_path / "bad.npz").write_bytes((tmp_path / "order.npz").read_bytes()[:-40])
    (tmp_path / "text.npz").write_text("no order")
    for name in ("bad.npz", "text.npz", "missing.npz"):
        with pytest.raises(DataError):
            Order.load(tmp_path / name)


def test_unknown_estimator() -> None:
    problem = random_problem(3, 2, 0)
    ref = run(problem, __import__("optim").AdamWRule(), [0.3] * 2, [0.05] * 3)
    with pytest.raises(UsageError, match="did you mean 'pairwise'"):
        orders.precompute("pairwize", ref, problem)
    assert recipe(ref.recipe.rules["theta"], [0.1]).rates == (0.1,)
