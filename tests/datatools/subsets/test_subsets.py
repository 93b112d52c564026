"""UDS, GREATS, PartitionSel and OPUS, against their definitions."""

import pytest
import torch

from datatools import UsageError
from datatools.colm import select_batch
from datatools.subsets.greats import greats
from datatools.subsets.opus import opus
from datatools.subsets.partition_sel import partition_sel
from datatools.subsets.uds import uds

NONE = torch.zeros(0, dtype=torch.int64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_and_aim(n=12, d=6, seed=0):
    g = generator(seed)
    return torch.randn(n, d, generator=g), torch.randn(d, generator=g)


@pytest.mark.parametrize("seed", range(5))
def test_greats_is_greedy_in_the_fall_of_a_quadratic_loss(seed):
    """The target loss is 1/2 |theta|^2 - <v, theta>, whose Hessian is the identity: each pick is checked by its value.

    Its gradient at 0 is -v; a step along -g of a descent is theta -= rate g, so that rows count with the sign of v.
    """
    rows, aim = rows_and_aim(seed=seed)
    rate = 0.3

    def loss(picks):  # its gradient at 0 is `aim`, its Hessian the identity
        theta = -rate * rows[picks].sum(0)
        return float(aim @ theta + theta @ theta / 2)

    found = greats(rows, 5, aim, rate=rate).indices.tolist()
    for k, pick in enumerate(found):
        before = found[:k]
        # the definition leaves out the row's own curvature, rate^2 / 2 |g|^2, as the code does
        falls = {
            i: loss(before) - loss([*before, i]) + rate**2 / 2 * float(rows[i] @ rows[i])
            for i in set(range(12)) - set(before)
        }
        assert falls[pick] == pytest.approx(max(falls.values()), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_partition_sel_solves_its_weights_and_keeps_its_budgets(seed):
    """Conditions of Karush, Kuhn and Tucker on the support."""
    rows, aim = rows_and_aim(seed=seed)
    groups = [(torch.arange(1, 7), 2), (torch.arange(7, 12), 1)]
    found = partition_sel(rows, 4, aim, kept=torch.tensor([0]), groups=groups)
    picks, weights = found.indices.tolist(), found.weights.double()
    assert picks[0] == 0 and sum(1 <= i < 7 for i in picks) == 2 and sum(i >= 7 for i in picks) == 1
    assert (weights >= 0).all() and float(weights.mean()) == pytest.approx(1)
    g = rows[picks].double()
    scale = float((weights @ g) @ aim.double() / (weights @ g).square().sum())  # the factor of the optimum
    slope = g @ (aim.double() - scale * (weights @ g))
    assert (slope <= 1e-4).all() and slope[weights > 0].abs().max() < 1e-4


def test_partition_sel_equals_the_best_of_all_subsets_where_rows_are_orthogonal():
    rows, aim = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])), torch.tensor([3.0, -1.0, 5.0, 4.0])
    found = partition_sel(rows, 2, aim, kept=NONE, groups=[(torch.arange(4), 2)])
    assert found.indices.tolist() == [3, 2], "by <g, v>: 16, 15, 3, -2"
    torch.testing.assert_close(found.weights, torch.tensor([1.0, 5 / 3]) * 2 / (1 + 5 / 3))
    against = partition_sel(-rows.abs(), 2, aim.abs(), kept=NONE, groups=[(torch.arange(4), 2)])
    assert against.weights.tolist() == [1.0, 1.0], "no row helps"
    with pytest.raises(ValueError, match="do not add up to k=3"):
        partition_sel(rows, 3, aim, kept=NONE, groups=[(torch.arange(4), 2)])


def test_opus_draws_with_the_stated_chances_and_is_greats_at_temperature_0():
    rows, aim = rows_and_aim()
    cold = opus(rows, 5, aim, rate=0.3, temperature=0, generator=generator())
    assert cold.indices.tolist() == greats(rows, 5, aim, rate=0.3).indices.tolist()
    utility = (rows @ aim).double()
    want = torch.softmax(utility / (0.8 * utility.std(correction=0)), 0)
    g, seen = generator(1), torch.zeros(12)
    for _ in range(4000):
        seen[opus(rows, 1, aim, rate=0.3, temperature=0.8, generator=g).indices] += 1
    torch.testing.assert_close(seen.double() / 4000, want, atol=0.03, rtol=0)
    assert len(set(opus(rows, 12, aim, rate=0.3, generator=g).indices.tolist())) == 12


def test_uds_adds_the_distance_from_what_was_chosen_lately():
    features = torch.randn(9, 4, generator=generator()).abs()
    memory = torch.randn(5, 4, generator=generator(1))
    want = [float(row[0] + sum((row[1:] - old[1:]).norm() for old in memory) / 5) for row in features]
    found = uds(features, 4, memory).indices.tolist()
    assert found == sorted(range(9), key=lambda i: -want[i])[:4]
    assert uds(features, 9, memory[:0]).indices.tolist() == sorted(range(9), key=lambda i: -float(features[i, 0]))


@pytest.mark.parametrize("method", ["greats", "partition_sel", "opus"])
def test_methods_with_target_rows_ask_for_them(method):
    rows, aim = rows_and_aim()
    with pytest.raises(UsageError, match=f"{method} compares rows with target rows, and there are none"):
        select_batch(rows, ["a"] * 12, 4, method=method, generator=generator())
    chosen, _ = select_batch(rows, ["a"] * 6 + ["b"] * 6, 4, method=method, generator=generator(), wanted=aim, rate=0.1)
    assert sorted(i // 6 for i in chosen.indices.tolist()) == [0, 0, 1, 1]
