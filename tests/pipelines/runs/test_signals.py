"""How an interrupt ends a run."""

import os
import signal
import threading
import time

import pytest

from datatools import files
from pipelines.runs import signals
from pipelines.runs.folder import Run
from pipelines.runs.signals import Terminated, interruptible
from tests.pipelines.runs.common import config, read


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_signals_become_exceptions_and_handlers_come_back(number, kind):
    before = signal.getsignal(number)
    with interruptible():
        with pytest.raises(kind) as caught:
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert type(caught.value) is kind
        os.kill(os.getpid(), number)  # the same wish, while cleaning up
        time.sleep(0.05)
    assert signal.getsignal(number) is before


def test_the_write_under_way_is_finished(monkeypatch, tmp_path):
    """The signal comes between opening the temporary file and the rename; the file is there, then the exception."""
    real = os.fsync
    sent = []

    def slow(descriptor):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    with interruptible(), pytest.raises(Terminated):
        files.write_text(tmp_path / "x", "whole")
        time.sleep(5)
    assert (tmp_path / "x").read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_write_that_hangs_does_not_hold_the_interrupt_for_ever(monkeypatch, tmp_path):
    monkeypatch.setattr(signals, "_PATIENCE_SECONDS", 0.2)

    def hang(descriptor):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(os, "fsync", hang)
    start = time.monotonic()
    with interruptible(), pytest.raises(Terminated):
        files.write_text(tmp_path / "x", "whole")
    assert time.monotonic() - start < 5 and list(tmp_path.iterdir()) == []


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with interruptible():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_interrupted_run_says_so():
    with pytest.raises(Terminated), Run("r", config(), "select"):
        raise Terminated
    assert read("r/progress.json")["state"] == "interrupted"
    assert (
        "finished work is kept in r; to continue, run the same command again: datatools select"
        in signals.how_to_continue()
    )
    with Run("r", config(), "select") as run:
        assert run.resumed
