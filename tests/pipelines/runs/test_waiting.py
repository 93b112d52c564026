"""Idle threads spin for long only while nothing else wants the cores; what children inherit spins briefly."""

import os
import sys
import time

import pytest
import torch

from pipelines.runs import threads, waiting
from tests.processes import spawn

watched = pytest.mark.skipif(not waiting.can_watch(), reason="no GNU OpenMP, or no Linux")


class Clock:
    """Seconds that the main thread has waited for a core: the share of real time that it is told."""

    def __init__(self):
        self.share, self.sum, self.then = 0.0, 0.0, time.monotonic()

    def __call__(self):
        now = time.monotonic()
        self.sum += self.share * (now - self.then)
        self.then = now
        return self.sum


def until(condition):
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_a_shared_machine_is_noticed_and_so_is_its_end(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(waiting, "_waited", clock)
    monkeypatch.setattr(waiting, "_PERIOD", 0.02)
    monkeypatch.setattr(waiting, "_QUIET", 0.1)
    environ = {**waiting.LONG, "MINE": "1"}
    watch = waiting.Watch(environ, {"GOMP_SPINCOUNT": "1000"})
    watch.start()
    until(lambda: environ == {"MINE": "1", "GOMP_SPINCOUNT": "1000"})
    assert not watch.shared
    clock.share = 0.5
    until(lambda: watch.shared)
    clock.share = 0.0
    until(lambda: not watch.shared)

    def gone():
        raise OSError("no /proc any more")

    monkeypatch.setattr(waiting, "_waited", gone)
    until(lambda: watch.shared)  # it cannot be known, so idle threads spin briefly
    watch.long()


@watched
def test_one_more_team_makes_more_threads_than_cores_only_while_it_sleeps():
    before = len(os.listdir("/proc/self/task"))
    watch = waiting.Watch({}, {})
    watch.brief()
    watch.brief()  # no second one
    until(lambda: len(os.listdir("/proc/self/task")) >= before + torch.get_num_threads())
    watch.long()
    until(lambda: len(os.listdir("/proc/self/task")) <= before)


@watched
def test_a_watched_command_leaves_short_spinning_to_its_children():
    code = """
        import os, time
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY"):
            os.environ.pop(name, None)
        from pipelines.runs import threads, waiting
        print(sorted(threads.choose(command=True)))
        import torch
        end = time.monotonic() + 60
        while "OMP_WAIT_POLICY" in os.environ and time.monotonic() < end:
            time.sleep(0.01)
        print(os.environ["GOMP_SPINCOUNT"], "OMP_WAIT_POLICY" in os.environ, threads.waits_briefly())
    """
    out, _ = spawn(code, OMP_NUM_THREADS="1").communicate(timeout=300)
    assert out.split("\n")[:2] == [
        "['GOMP_SPINCOUNT', 'OMP_WAIT_POLICY']",
        f"{threads.SPINS} False True",
    ]


def test_no_watch_without_the_files_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(waiting, "_WAITED", tmp_path / "schedstat")
    assert not waiting.can_watch()
    (tmp_path / "schedstat").write_text("no numbers")
    assert not waiting.can_watch()
    assert "torch" in sys.modules
