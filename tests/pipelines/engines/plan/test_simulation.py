"""The simulation against what can be computed by hand, and against two runs that were really measured."""

import json
import math

import pytest

from datatools import UsageError
from pipelines.engines.plan.simulation import Stage, World, simulate
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("stage", "workers", "seconds"),
    [
        (Stage("s", 10, 6.0), 1, 60.0),
        (Stage("s", 10, 6.0), 4, 18.0),  # three rounds
        (Stage("s", 10, 6.0, alone=True), 4, 60.0),
        (Stage("s", 8, 1.0, bytes=10.0, rate=5.0), 4, 17.0),  # the folder takes two seconds for each
        (Stage("s", 0, 1.0), 4, 0.0),
        (Stage("s", 3, 9.9, measured=(1.0, 2.0, 3.0)), 2, 4.0),
    ],
)
def test_by_hand(stage, workers, seconds):
    assert simulate([stage], World(workers)).total == pytest.approx(seconds)


def test_few_events_stand_for_many_units():
    assert simulate([Stage("s", 1_000_000, 0.5)], World(64)).total == pytest.approx(500_000 / 64, abs=0.5)


def test_a_slow_worker_takes_less_of_the_work():
    """Four workers at one unit per second and one at half of it: 4.5 units per second, not 5 and not 2.5."""
    found = simulate([Stage("s", 4500, 1.0)], World(5, stragglers=0.2, slowdown=2.0)).total
    assert found == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize("returns", [True, False])
def test_lost_workers_cost_their_unit_and_their_absence(returns):
    calm = simulate([Stage("s", 2000, 1.0)], World(8)).total
    world = World(8, failures=1000.0, restart=50.0, returns=returns)
    found = [simulate([Stage("s", 2000, 1.0)], world, seed) for seed in range(20)]
    assert all(one.lost and one.total > calm for one in found if one.lost)
    assert sum(one.lost for one in found)
    assert all(one.again <= one.lost * 1.0 + 1e-9 for one in found)  # a lost worker costs at most its unit
    mean = sum(one.total for one in found) / len(found)
    if returns:  # each of 8 workers is away 50 of 1,050 seconds
        assert mean == pytest.approx(calm * 1050 / 1000, rel=0.03)


def test_the_leader_is_replaced_at_once_or_waited_for():
    stages, lost = [Stage("s", 4, 100.0, alone=True)], {"failures": 150.0, "restart": 1000.0}
    replaced, waited = (
        [simulate(stages, World(4, **lost, returns=returns), seed).total for seed in range(30)]
        for returns in (True, False)
    )
    assert sum(replaced) < 0.7 * sum(waited)


def test_it_ends_whatever_fails():
    found = simulate([Stage("s", 500, 1.0), Stage("t", 3, 1.0, alone=True)], World(6, failures=3.0, returns=False))
    assert math.isfinite(found.total) and found.lost


def test_a_very_slow_worker_holds_one_unit_and_not_its_share_of_the_work():
    found = simulate([Stage("s", 80_000, 1.0)], World(8, stragglers=0.125, slowdown=100.0)).total
    assert found == pytest.approx(80_000 / 7.01, rel=0.02)


@pytest.mark.parametrize(
    "stages",
    [
        [Stage("s", 50, 1000.0)],
        [Stage("s", 4, 1000.0, alone=True)],
        [Stage("t", 1, 0.0), Stage("s", 1, 1e9, alone=True)],
    ],
)
@pytest.mark.parametrize("returns", [True, False])
def test_a_run_that_would_not_end_is_refused(stages, returns):
    with pytest.raises(UsageError, match="lost so often that a run would not end"):
        simulate(stages, World(4, failures=3.6, restart=1.0, returns=returns))


def measured(what):
    kept = json.loads((REPOSITORY / "tests" / "benchmarks" / "results" / "workers.json").read_text())
    return next(one["value"] for one in kept["results"] if one["what"] == what), kept["workload"]


def test_two_workers_from_the_seconds_of_one():
    """A run of 10,000 rows in 100 units that was measured with one worker and with two, on two cores."""
    one, workload = measured("features, one worker")
    units = workload["rows"] // workload["rows_per_unit"]
    two = one / measured("features: one worker / two workers")[0]
    assert simulate([Stage("features", units, one / units)], World(2)).total == pytest.approx(two, rel=0.15)


def test_a_run_from_its_receipts():
    """Another run on the same machine while it was busy: 100 receipts, and 42.6 s for the stage."""
    seconds = tuple(json.loads((REPOSITORY / "tests/pipelines/engines/plan/receipts.json").read_text())["seconds"])
    found = simulate([Stage("features", len(seconds), 0.0, measured=seconds)], World(2)).total
    assert found == pytest.approx(42.586, rel=0.15)
