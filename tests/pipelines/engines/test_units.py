"""Units of work among processes: each is committed, also when members die; nothing here loads torch."""

import os
import random
import signal
import time

import pytest

from datatools import DataError, files
from pipelines.engines.units import Job, receipts, taken
from pipelines.runs import current, following, workers

UNITS = 40


@pytest.fixture
def run(tmp_path):
    """A run folder that this process leads, with its lock."""
    with files.lock_folder(tmp_path):
        current.opened(tmp_path)
        with workers.acting_as(workers.Member("leader", 0, 3, leads=True)):
            files.write_json(tmp_path / "provenance.json", {"facts": {}})
            following.begin(tmp_path)
            yield tmp_path
    current.opened(None)


def job(folder, seen=None):
    def committed(unit):
        return (folder / f"unit-{unit}").exists()

    missing = [unit for unit in range(UNITS) if not committed(unit)]
    return Job("things", folder, missing, committed, seen or (lambda unit: None))


def work(folder, seconds, found=None):
    for unit in taken(job(folder, found)):
        time.sleep(seconds)
        with open(folder / f"unit-{unit}.log", "a") as file:
            file.write(f"{os.getpid()}\n")
        (folder / f"unit-{unit}").touch()


def fork_helper(run, folder, place, seconds):
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            with workers.acting_as(workers.Member(f"helper-{place}", place, 3, leads=False)):
                following.join(run)
                work(folder, seconds)
                code = 0
        finally:
            os._exit(code)
    return pid


def test_all_members_share_the_units(run):
    folder, seen = run / "job", []
    pids = [fork_helper(run, folder, place, 0.02) for place in (1, 2)]
    work(folder, 0.02, seen.append)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    counts = receipts("things")
    assert sum(counts.values()) == UNITS and len(counts) == 3 and min(counts.values()) > UNITS // 8
    assert len(seen) == UNITS - counts["leader"]
    assert all(len((folder / f"unit-{unit}.log").read_text().split()) == 1 for unit in range(UNITS))
    assert not list(folder.glob(".leases*"))


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_member_costs_at_most_its_unit(run, seed):
    folder, rng = run / "job", random.Random(seed)
    pids = [fork_helper(run, folder, place, 0.02) for place in (1, 2)]
    killer = os.fork()
    if killer == 0:
        time.sleep(0.1 + 0.2 * rng.random())
        os.kill(pids[0], signal.SIGKILL)
        os._exit(0)
    work(folder, 0.02)
    os.waitpid(killer, 0)
    assert os.waitpid(pids[0], 0)[1] == signal.SIGKILL and os.waitpid(pids[1], 0)[1] == 0
    twice = [unit for unit in range(UNITS) if len((folder / f"unit-{unit}.log").read_text().split()) > 1]
    assert len(twice) <= 1 and all((folder / f"unit-{unit}").exists() for unit in range(UNITS))


def test_a_process_by_itself_takes_all_units_in_order_and_removes_what_a_team_left(tmp_path):
    (tmp_path / ".leases-things").touch()
    assert list(taken(job(tmp_path))) == list(range(UNITS))
    assert not (tmp_path / ".leases-things").exists()


def test_a_helper_without_its_leader_says_so(run):
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            with workers.acting_as(workers.Member("helper", 1, 2, leads=False)):
                following.join(run)
                (run / ".lock").unlink()  # as the leader's last act
                for _ in taken(job(run / "job")):
                    code = 8
        except following.Orphaned:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    "facts, named",
    [
        ({"code": {"digest": "other"}}, "code.digest is other here, mine there"),
        ({"data": {"p.jsonl": "2"}}, "data.p.jsonl is 2 here, 1 there"),
        ({"data": {"q.jsonl": "1"}}, "data.p.jsonl is missing here, 1 there"),
    ],
)
def test_a_member_that_sees_something_else_is_refused_by_name(run, facts, named):
    files.write_json(run / "provenance.json", {"facts": {"code": {"digest": "mine"}, "data": {"p.jsonl": "1"}}})
    with workers.acting_as(workers.Member("rank-1", 1, 2, leads=False)):
        with pytest.raises(DataError, match=f"worker rank-1 cannot help.*{named}"):
            following.compare(run, facts, ())
        following.compare(run, facts, tuple(facts))
        following.compare(run, {"another": 1}, ())


def test_members_read_while_the_leader_reads_and_are_compared_when_it_has(tmp_path):
    """`welcome` lets them in; what they have read is compared with what the leader records later."""
    facts = {"data": {"p.jsonl": "1"}}
    with files.lock_folder(tmp_path), workers.acting_as(workers.Member("leader", 0, 2, leads=True)):
        current.opened(tmp_path)
        files.write_json(tmp_path / "provenance.json", {"facts": {}})
        following.welcome(tmp_path)
        pid = os.fork()
        if pid == 0:
            code = 9
            try:
                with workers.acting_as(workers.Member("helper", 1, 2, leads=False)):
                    following.join(tmp_path)
                    (tmp_path / "joined").touch()
                    try:
                        following.compare(tmp_path, {"data": {"p.jsonl": "2"}}, ())
                    except DataError:
                        code = 0 if (tmp_path / "recorded").exists() and following.leader_has_inputs() else 8
            finally:
                os._exit(code)
        while not (tmp_path / "joined").exists():
            time.sleep(0.01)
        files.write_json(tmp_path / "provenance.json", {"facts": facts})
        (tmp_path / "recorded").touch()
        following.begin(tmp_path)
        assert os.waitpid(pid, 0)[1] == 0
    current.opened(None)


def test_a_member_that_fails_on_the_rows_leaves_the_report_to_the_leader(run):
    """The leader ends before it has recorded its inputs, by the same bad row."""
    following.welcome(run)
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            with workers.acting_as(workers.Member("helper", 1, 2, leads=False)):
                following.join(run)
                (run / ".lock").unlink()
                code = 8 if following.leader_has_inputs() else 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
