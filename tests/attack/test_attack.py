"""A fixed sample of `make attack`, and that the attacks are what they say."""

import os
import random
from pathlib import Path

import pytest

from tests.attack.faults import flip, truncate
from tests.attack.run import OUTCOMES, WRONG, Attacker, attack, damages, faults
from tests.attack.scenarios import SCENARIOS, Scenario, leaves, results


@pytest.fixture(scope="module")
def attacker(command, tmp_path_factory):
    return Attacker(tmp_path_factory.mktemp("attack"), command)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["select", "train", "order-validate", "evaluate"])
def test_a_sample_of_every_attack_ends_well(attacker, name):
    """The last figures of `make attack` are 0, here for a few tries of each kind."""
    scenarios = [s for s in SCENARIOS if s.name == name]
    before = len(attacker.tries)
    attack(attacker, scenarios, kills=2, flips=5, faults_=5, seed=int(os.environ.get("ATTACK_SEED", "0")))
    tries = attacker.tries[before:]
    assert not [str(one) for one in tries if one.outcome in WRONG]
    assert len(tries) >= 10


@pytest.mark.slow
def test_the_harness_sees_what_is_wrong(attacker):
    """Undamaged it says identical, a wanted result that differs is silent, an error without a name a traceback."""
    made = attacker.prepare(next(s for s in SCENARIOS if s.name == "evaluate"))
    assert made.want["stdout"] and made.calls["read"]
    assert attacker.kill(made, 0.0).outcome == "identical"
    assert attacker.damage(made, made.start, "adapter/adapter_model.safetensors", "flip", 0.9).outcome == "refused"
    made.want["stdout"] = "something else"
    assert attacker.kill(made, 0.0).outcome == "silent"
    broken = type(made)(**{**made.__dict__, "scenario": type(made.scenario)("none", "evaluate --no-such-flag")})
    assert attacker.kill(broken, 0.0).outcome == "stuck"
    assert set(WRONG) < set(OUTCOMES)


@pytest.mark.slow
def test_a_campaign_goes_on_after_what_failed_and_after_what_is_done(attacker, tmp_path):
    """A scenario that cannot be prepared ended the campaign, and a campaign that was stopped began anew."""
    known = [s for s in SCENARIOS if s.name == "explain"]
    scenarios = [Scenario("none", "explain --no-such-flag"), *known]
    before, asked, call = len(attacker.tries), [], attacker.call
    journal = tmp_path / "tries.jsonl"
    attack(attacker, scenarios, kills=2, flips=2, faults_=0, seed=0, journal=journal)
    first = attacker.tries[before:]
    assert [one.outcome for one in first if one.scenario == "none"] == ["stuck"] and "not prepared" in first[0].detail
    assert len(journal.read_text().splitlines()) == len(first) - 1 == 2
    attacker.call = lambda *argv, **more: (asked.append(argv), call(*argv, **more))[1]
    again = attack(attacker, known, kills=1, flips=2, faults_=0, seed=0, journal=journal)[before + len(first) :]
    attacker.call = call
    assert [str(one) for one in again[:2]] == [str(one) for one in first[1:]] and len(again) == 3
    assert len(asked) == 3 + 1, "prepared in the folder that is built already, and one try that was not done"


def test_a_command_is_stuck_by_its_processor_time_and_not_by_the_clock(command):
    """On a busy machine a command may take long."""
    assert command("ls", "methods", kill_after_cpu=600, kill_after_idle=600).code == 0
    assert command("doctor", kill_after_cpu=0.001).code == -9


def test_flips_and_cuts(tmp_path):
    path = tmp_path / "file"
    for at in (0.0, 0.5, 0.999999):
        path.write_bytes(bytes(100))
        flip(path, at)
        assert sum(bin(byte).count("1") for byte in path.read_bytes()) == 1
        truncate(path, at)
        assert path.stat().st_size == int(at * 100)


def test_samples_cover_every_file_and_every_kind_before_they_repeat(tmp_path):
    for state in ("done", "half"):
        for name in ("a", "b/c"):
            (tmp_path / state / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / state / name).write_text("x")

    class Made:
        done, half = tmp_path / "done", tmp_path / "half"
        calls = {"write": 3, "read": 2, "rename": 0, "fsync": 1}

    places = [(state, name) for state, name, _, _ in damages(Made, 4, random.Random(0))]
    assert len(set(places)) == 4
    assert {kind for kind, _ in faults(Made, 4, random.Random(0))} == {"write", "read", "fsync", "full"}
    every = faults(Made, None, random.Random(0))
    assert len(every) == len(set(every)) == 3 + 2 + 1 + 3


def test_results_are_leaves_and_digests(tmp_path):
    (tmp_path / "a.json").write_text('{"x": [1, {"y": 2}], "cost": {"tokens": 5}}')
    (tmp_path / "b.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    (tmp_path / "c.bin").write_bytes(b"c")
    (tmp_path / "events.jsonl").write_text("{}")
    found = results(tmp_path, "shown")
    assert found["a.json:.x.0"] == 1 and found["a.json:.x.1.y"] == 2 and "a.json:.cost.tokens" not in found
    assert found["b.jsonl:.1.x"] == 2 and len(found["c.bin"]) == 128 and found["stdout"] == "shown"
    assert not [name for name in found if name.startswith("events")]
    assert dict(leaves([])) == {} and Path(tmp_path).is_dir()
