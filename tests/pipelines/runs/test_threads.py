"""How many threads torch gets and how idle ones wait: chosen before it is loaded, and never against the user."""

import os
import sys

import pytest

from pipelines.runs import threads, waiting
from tests.processes import spawn


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process of 8 cores in which torch is not loaded and nobody has set anything."""
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threads, "chosen", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(threads.cores, "__defaults__", (tmp_path,))
    return tmp_path


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_idle_threads_spin_briefly_and_there_are_as_many_as_torch_takes(fresh):
    environ = {}
    assert threads.choose(environ) == environ == {"GOMP_SPINCOUNT": str(threads.SPINS), "KMP_BLOCKTIME": "1"}
    assert threads.waits_briefly(environ) and not threads.count_is_users(environ)


@pytest.mark.parametrize("name", threads.WAITING)
def test_how_threads_wait_is_the_users(fresh, name):
    environ = {name: "ACTIVE"}
    assert threads.choose(environ) == {} and environ == {name: "ACTIVE"}
    assert not threads.waits_briefly(environ)


@pytest.mark.parametrize("name", threads.COUNTS)
def test_the_number_of_threads_is_the_users(fresh, name):
    put(fresh / "sys/fs/cgroup/cpu.max", "200000 100000\n")
    environ = {name: "7"}
    threads.choose(environ)
    assert environ[name] == "7" and not (set(threads.COUNTS) & set(environ)) - {name}
    assert threads.count_is_users(environ)


def test_after_torch_it_is_too_late(monkeypatch):
    assert "torch" in sys.modules
    environ = {}
    assert threads.choose(environ) == {} == environ and not threads.waits_briefly(environ)


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, 8),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"sys/fs/cgroup/cpu.max": "250000 100000"}, 3),
        ({"sys/fs/cgroup/cpu.max": "20000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "no numbers"}, 8),
        # a service or a batch job: the group of the process, or one above it
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/c/cpu.max": "300000 100000"}, 8),
        # version 1, in a container and outside
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
        (
            {
                "proc/self/cgroup": "5:memory:/job\n4:cpu,cpuacct:/job/7\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "500000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            5,
        ),
    ],
)
def test_cores_are_those_of_affinity_and_quota(fresh, files, cores):
    for name, text in files.items():
        put(fresh / name, f"{text}\n")
    assert threads.cores() == cores
    environ = {}
    threads.choose(environ)
    assert environ.get("OMP_NUM_THREADS") == (None if cores == 8 else str(cores))


def test_affinity_alone_is_left_to_torch_which_respects_it(fresh, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert threads.cores() == 1 and "OMP_NUM_THREADS" not in threads.choose({})


def test_workers_of_a_launcher_that_sets_no_number_share_the_cores(fresh):
    environ = {"LOCAL_WORLD_SIZE": "4"}
    assert threads.choose(environ)["OMP_NUM_THREADS"] == "2"
    assert not threads.count_is_users(environ | {"OMP_NUM_THREADS": "2"})
    assert "OMP_NUM_THREADS" not in threads.choose({"LOCAL_WORLD_SIZE": "junk"})


def test_a_command_chooses_before_torch_is_loaded():
    """By what torch's OpenMP library says that it was loaded with."""
    code = """
        import os
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY"):
            os.environ.pop(name, None)
        from pipelines.cli.app import main
        main(["ls", "optimizers"])
        import torch
    """
    process = spawn(code, OMP_DISPLAY_ENV="verbose")
    said = process.communicate(timeout=300)[1]
    if "GOMP_SPINCOUNT" in said:  # GNU's library
        spins = waiting.LONG["GOMP_SPINCOUNT"] if waiting.can_watch() else threads.SPINS
        assert f"GOMP_SPINCOUNT = '{spins}'" in said
    else:
        assert "KMP_BLOCKTIME" in said
