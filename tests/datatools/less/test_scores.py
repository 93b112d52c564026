"""datatools.less.influence against the worked examples of LESS, brute force, and its own promises."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datatools import (
    AGGREGATIONS,
    DataError,
    GradientFeatures,
    UsageError,
    aggregate,
    influence,
    influence_paper,
    subtask_means,
    subtask_targets,
)

# two checkpoints, four training rows, two subtasks of two target rows, three dimensions; weights 0.75 and 0.25
T1 = torch.tensor([[3.0, 4, 0], [0, 0, 2], [1, 1, 1], [-1, 2, 2]])
T2 = torch.tensor([[1.0, 0, 0], [0, 3, 4], [2, 2, 1], [0, -1, 0]])
V1 = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 5], [0, 3, 4]])
V2 = torch.tensor([[0.0, 2, 0], [1, 1, 0], [0, 0, 1], [0, 4, 3]])
WEIGHTS = [3e-5, 1e-5]
GROUPS = [0, 0, 1, 1]
SIMILARITY = torch.tensor(
    [
        [0.45, 0.7767767, 0, 0.36],
        [0.15, 0.10606602, 0.95, 0.84],
        [0.59967937, 0.66871496, 0.51634604, 0.78955112],
        [-0.5, 0.3232233, 0.5, 0.5],
    ]
)
KEYS = [f"{i:032x}" for i in range(1000)]


def close(a, b):
    torch.testing.assert_close(a, torch.as_tensor(b), rtol=0, atol=2e-7)


# ---------------------------------------------------------------- worked examples


def test_projection_example_as_matrix_identity():
    """x R and y R of the worked example of the projection; the cosine is taken after it."""
    r = torch.tensor([[1.0, -1], [1, 1], [-1, 1], [-1, -1]])
    x, y = torch.tensor([1.0, 2, -1, 0.5]), torch.tensor([0.5, -1, 2, 1])
    close(x @ r, [3.5, -0.5])
    close(y @ r, [-3.5, -0.5])
    assert float(x @ y) == -3 and float((x @ r) @ (y @ r)) / 2 == -6
    close(influence([x[None]], [y[None]], [1.0]), [[-0.48]])
    close(influence([(x @ r)[None]], [(y @ r)[None]], [1.0]), [[-0.96]])


def test_similarity_example():
    close(influence([T1, T2], [V1, V2], WEIGHTS), SIMILARITY)


def test_code_example():
    close(
        subtask_means(SIMILARITY, GROUPS),
        [[0.61338835, 0.18], [0.12803301, 0.895], [0.63419717, 0.65294858], [-0.08838835, 0.5]],
    )
    scores = aggregate(SIMILARITY, GROUPS, "less")
    close(scores, [0.61338835, 0.895, 0.65294858, 0.5])
    assert scores.argsort(descending=True).tolist() == [1, 2, 0, 3]


def test_paper_example():
    """Mean of the raw gradients of a subtask, then one cosine."""
    similarity = influence_paper([T1, T2], [V1, V2], WEIGHTS, GROUPS)
    assert similarity.shape == (4, 2)
    close(aggregate(similarity, [0, 1], "paper"), [0.82151906, 0.95899985, 0.82319095, 0.45567884])


def test_mean_of_unit_gradients_example():
    """The third variant; it ranks the rows differently."""
    units = [subtask_targets(v / v.norm(dim=1, keepdim=True), None, GROUPS) for v in (V1, V2)]
    scores = aggregate(influence([T1, T2], units, WEIGHTS), [0, 1], "paper")
    close(scores, [0.83813298, 0.95747995, 0.83013293, 0.52065213])
    assert scores.argsort(descending=True).tolist() == [1, 0, 2, 3]


def test_published_checkpoint_weights_are_normalised():
    """With orthogonal checkpoints each cosine shows its weight."""
    weights = [1.6877e-05, 1.2859e-05, 7.7030e-06, 2.5616e-06]
    train = [torch.eye(4)[[i]] for i in range(4)]
    target = [torch.eye(4)] * 4
    torch.testing.assert_close(
        influence(train, target, weights)[0], torch.tensor([0.421919, 0.321470, 0.192572, 0.064039]), rtol=0, atol=6e-7
    )


def test_stores_and_tensors_agree(tmp_path):
    """Through stores of one bit to 32 bits: blocks, units, other rows and another order make no difference."""
    stores = []
    for name, x in (("t1", T1), ("t2", T2), ("v1", V1), ("v2", V2)):
        store = GradientFeatures.create_or_open(
            tmp_path / name, meta={}, dim=3, dtype="float32", keys=KEYS[:5], rows_per_unit=2
        )
        padded = torch.cat([x, torch.ones(1, 3)])
        for unit in store.missing_units():
            store.write_unit(unit, padded[2 * unit : 2 * unit + 2])
        stores.append(store)
    order = [KEYS[i] for i in (2, 0, 3, 0)]  # a copy of a row has its key
    blocks = [s.iter_blocks(1) for s in stores[:2]]
    targets = [torch.cat([b.features for b in s.iter_blocks()])[:4] for s in stores[2:]]
    close(influence(blocks, targets, WEIGHTS, keys=order), SIMILARITY[[2, 0, 3, 0]])
    close(influence(stores[:2], targets, WEIGHTS)[:4], SIMILARITY)
    raw = [[(b.keys, b.features, b.norms, b.status) for b in s.iter_blocks()] for s in stores[2:]]
    close(
        influence_paper(stores[:2], raw, WEIGHTS, [0, 0, 1, 1, 2])[:4, :2],
        influence_paper([T1, T2], [V1, V2], WEIGHTS, GROUPS),
    )
    with pytest.raises(DataError, match="checkpoint 0 lacks features of 1 rows .the first: .*run the extraction again"):
        influence(stores[:2], targets, WEIGHTS, keys=[KEYS[0], KEYS[9]])


# ---------------------------------------------------------------- aggregations


@pytest.mark.parametrize("how", ["less", "mean", "max"])
def test_unequal_subtasks_equal_the_definition(how):
    s = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    groups = [4, 1, 1, 7, 4, 4, 4, 1, 1]  # not contiguous, not sorted, of sizes 4, 4 and 1
    means = torch.stack([s[:, [j for j, g in enumerate(groups) if g == name]].mean(1) for name in (1, 4, 7)], 1)
    want = {"less": means.amax(1), "mean": means.mean(1), "max": s.amax(1)}[how]
    torch.testing.assert_close(aggregate(s, groups, how), want)


def naive_round_robin(s, keys):
    left, order = set(range(len(s))), []
    for j in itertools.cycle(range(s.shape[1])):
        if not left:
            return order
        order.append(min(left, key=lambda i, j=j: (-s[i, j], keys[i])))
        left.remove(order[-1])


def naive_bids(s, groups, keys):
    z = np.zeros_like(s)
    for j in range(s.shape[1]):
        if s[:, j].std() > 1e-12:
            z[:, j] = (s[:, j] - s[:, j].mean()) / s[:, j].std()
    names = sorted(set(groups))
    means = np.stack([z[:, [j for j, g in enumerate(groups) if g == name]].mean(1) for name in names], 1)
    left, order, served = set(range(len(s))), [], np.zeros(len(names))
    while left:
        g = int(served.argmin())
        order.append(min(left, key=lambda i, g=g: (-means[i, g], keys[i])))
        left.remove(order[-1])
        served += means[order[-1]]
    return order


@pytest.mark.parametrize("seed", range(5))
def test_orders_equal_brute_force(seed):
    g = np.random.default_rng(seed)
    n, m = int(g.integers(1, 60)), int(g.integers(1, 7))
    s, groups = g.standard_normal((n, m)), g.integers(0, 3, m).tolist()
    keys = [KEYS[i] for i in g.permutation(n)]
    order = aggregate(torch.tensor(s), groups, "bids", keys=keys).argsort(descending=True, stable=True)
    assert order.tolist() == naive_bids(s, groups, keys)
    s = s.round(1)  # many ties
    order = aggregate(torch.tensor(s), groups, "round_robin", keys=keys).argsort(descending=True, stable=True)
    assert order.tolist() == naive_round_robin(s.astype(np.float32), keys)


def test_bids_serves_the_subtask_that_plain_scores_forget():
    """Subtask 0 has large influence everywhere, so "less" takes only its rows; normalised, both get their turn."""
    s = torch.zeros(20, 2)
    s[:10, 0] = torch.linspace(0.9, 0.5, 10)
    s[10:, 1] = torch.linspace(0.09, 0.05, 10)
    assert aggregate(s, [0, 1], "less").topk(6).indices.max() < 10
    assert (aggregate(s, [0, 1], "bids").topk(6).indices < 10).sum() == 3
    assert aggregate(s, [0, 1], "round_robin").topk(4).indices.tolist() == [0, 10, 1, 11]


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_the_order_of_rows_never_matters(how):
    """N5: ties and duplicates included; scores move with their rows."""
    g = torch.Generator().manual_seed(1)
    s = torch.randint(-2, 3, (40, 4), generator=g).float() / 4
    keys = KEYS[:40]
    scores = aggregate(s, [0, 1, 2, 3], how, keys=keys)
    for seed in range(5):
        p = torch.randperm(40, generator=g.manual_seed(seed))
        assert torch.equal(aggregate(s[p], [0, 1, 2, 3], how, keys=[keys[i] for i in p]), scores[p])


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_few_rows_and_identical_rows(how, n):
    """N7: no rows, one row, all alike: finite scores, one a row."""
    for s in (torch.zeros(n, 3), torch.full((n, 3), 0.1), torch.randn(n, 3, generator=torch.Generator())):
        scores = aggregate(s, [0, 1, 2], how)
        assert scores.shape == (n,) and scores.dtype == torch.float32 and scores.isfinite().all()


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_ineligible_rows_take_no_part(how):
    s = torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
    eligible = torch.arange(12) % 3 != 0
    poisoned = s.clone()
    poisoned[~eligible] = torch.nan
    scores = aggregate(poisoned, [0, 1, 2], how, eligible=eligible)
    assert scores[~eligible].isnan().all()
    assert torch.equal(scores[eligible], aggregate(s[eligible], [0, 1, 2], how))
    with pytest.raises(DataError, match=f"aggregation '{how}': 4 rows are not finite: {KEYS[0]}, {KEYS[3]}"):
        aggregate(poisoned, [0, 1, 2], how, keys=KEYS[:12])


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 1000), st.sampled_from(sorted(AGGREGATIONS)))
def test_orders_are_complete_and_values_bounded(n, m, seed, how):
    s = torch.rand(n, m, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    scores = aggregate(s, list(range(m)), how)
    if how in ("round_robin", "bids"):
        torch.testing.assert_close(scores.sort(descending=True).values, 1 - torch.arange(n) / n)
    else:
        assert (scores <= s.amax(1) + 1e-6).all() and (scores >= s.amin(1) - 1e-6).all()


def test_wrong_arguments():
    with pytest.raises(UsageError, match="unknown aggregation 'round-robin'; did you mean 'round_robin'"):
        aggregate(SIMILARITY, GROUPS, "round-robin")
    with pytest.raises(UsageError, match="'paper' averages the target's gradients before the cosine"):
        aggregate(SIMILARITY, GROUPS, "paper")
    for s, groups, keys in ((SIMILARITY, [0, 1], None), (SIMILARITY, GROUPS, KEYS[:3]), (torch.zeros(3, 0), [], None)):
        with pytest.raises(ValueError, match="aggregate"):
            aggregate(s, groups, keys=keys)


# ---------------------------------------------------------------- influence: rows that have no direction


def test_zero_rows_score_zero_not_nan():
    """N4."""
    close(influence([torch.tensor([[0.0, 0], [1, 0]])], [torch.tensor([[1.0, 0]])], [1.0]), [[0.0], [1.0]])


def test_rows_that_are_not_ok_get_zeros_whatever_they_hold():
    """N1."""
    blocks = [
        (KEYS[:2], torch.tensor([[torch.nan, 1], [1, 0]]), torch.zeros(2), ["nonfinite", "ok"]),
        (KEYS[2:4], torch.tensor([[0.0, 2], [5, 5]]), torch.zeros(2), ["ok", "empty"]),
    ]
    close(influence([blocks], [torch.eye(2)], [2.0]), [[0, 0], [1.0, 0], [0, 1.0], [0, 0]])


@pytest.mark.parametrize(
    ("train", "target", "weights", "error", "text"),
    [
        (
            [torch.tensor([[1.0, torch.nan]])],
            [torch.eye(2)],
            [1.0],
            DataError,
            "train features: 1 rows are not finite: 0;",
        ),
        (
            [torch.eye(2)],
            [torch.tensor([[1.0, 0], [torch.inf, 0]])],
            [1.0],
            DataError,
            "target features: 1 rows .*: 1;",
        ),
        ([torch.eye(2)], [torch.tensor([[1.0, 0], [0, 0]])], [1.0], DataError, "1 target rows have no gradient"),
        ([torch.eye(2)], [torch.zeros(0, 2)], [1.0], DataError, "no target rows"),
        ([torch.eye(2)], [torch.eye(3)], [1.0], DataError, r"train \(dim 2\) and target \(dim 3\)"),
        ([torch.eye(2)] * 2, [torch.eye(2), torch.eye(2)[:1]], [1.0, 1.0], DataError, "checkpoint 1 has 1 target rows"),
        (
            [torch.eye(2), torch.eye(2)[:1]],
            [torch.eye(2)] * 2,
            [1.0, 1.0],
            DataError,
            "checkpoint 1 lacks features of 1",
        ),
        ([torch.eye(2)], [torch.eye(2)], [0.0], UsageError, "not all 0"),
        ([torch.eye(2)], [torch.eye(2)], [-1.0], UsageError, "mean learning rates"),
        ([torch.eye(2)], [torch.eye(2)], [torch.nan], UsageError, "mean learning rates"),
        ([torch.eye(2)], [torch.eye(2)], [1.0, 2.0], ValueError, "one of each for every checkpoint"),
        ([], [], [], ValueError, "one of each for every checkpoint"),
    ],
)
def test_influence_refuses(train, target, weights, error, text):
    with pytest.raises(error, match=text):
        influence(train, target, weights)


def test_no_rows():
    assert influence([torch.zeros(0, 2)], [torch.eye(2)], [1.0]).shape == (0, 2)


def test_a_planted_copy_of_a_target_row_wins():
    """Spec 11 (5): rows of noise, one of them close to a target gradient."""
    g = torch.Generator().manual_seed(0)
    train, target = torch.randn(500, 64, generator=g), torch.randn(6, 64, generator=g)
    train[123] = target[4] * 1e-3
    for how in ("less", "max", "round_robin", "bids"):
        scores = aggregate(influence([train], [target], [1.0]), range(6), how)
        assert (scores > scores[123]).sum() < 5, how
