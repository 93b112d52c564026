"""Every file of every kind of run folder, damaged, read by every command that opens it: a fixed sample, or all."""

import os

import pytest

from tests.attack.run import WRONG, Attacker
from tests.attack.sweep import HOW, KINDS, damages, readers, sweep


@pytest.fixture(scope="module")
def attacker(command, tmp_path_factory):
    return Attacker(tmp_path_factory.mktemp("sweep"), command)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS if os.environ.get("ATTACK_SWEEP") else ["train", "order-search", "diagnose"])
def test_a_damaged_file_changes_no_result_unnoticed(attacker, kind):
    """With ATTACK_SWEEP=1 every file and damage (hours), as `make attack` does; else 4 for some of the commands."""
    scenarios, each = list(readers([kind])), None
    if not os.environ.get("ATTACK_SWEEP"):
        scenarios, each = [s for s in scenarios if s.name.endswith(("/again", "/report", "/evaluate"))], 4
    tries = sweep(attacker, scenarios, each=each, seed=int(os.environ.get("ATTACK_SEED", "0")))
    assert not [str(one) for one in tries if one.outcome in WRONG]
    assert len(tries) >= 4 * len(scenarios)


def test_the_sweep_takes_every_file_in_every_way(tmp_path):
    (tmp_path / "inputs").mkdir()
    for name in ("run.yaml", "inputs/tokens.bin", "empty"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"x")

    class Made:
        start, scenario = tmp_path, next(readers(["train"]))

    found = damages(Made, None, 0)
    assert {(name, how) for name, how, _ in found} == {(n, h) for n in ("run.yaml", "inputs/tokens.bin") for h in HOW}
    assert len(found) == 6 and damages(Made, None, 0) == found and len(damages(Made, 2, 0)) == 2
    assert {how for _, how, _ in damages(Made, None, 0, ["empty"])} == {"empty"}


def test_every_command_that_opens_a_run_folder_reads_in_the_sweep():
    commands = {scenario.command.split()[0] for scenario in readers(list(KINDS))}
    assert commands == {"select", "train", "order", "audit", "evaluate", "explain", "neighbours", "report", "diagnose"}
