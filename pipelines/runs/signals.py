"""Signals: Ctrl-C and SIGTERM end a run between two writes, and the command line prints how to continue it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from datatools.files import is_writing
from pipelines.runs import current
from pipelines.runs.redact import command_line
from pipelines.runs.run_files import shown


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that files are closed and the command prints how to continue."""


_RETRY_SECONDS = 0.02
_PATIENCE_SECONDS = 5.0


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C into KeyboardInterrupt and SIGTERM into `Terminated`, after the write that is in progress.

    A second signal within two seconds counts as the same request, so that it does not cut the cleanup short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: dict[int, float] = {}
    raised_at = -1e9

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal raised_at
        now = time.monotonic()
        if now - raised_at < 2.0:
            return
        first = asked.setdefault(number, now)
        if is_writing(frame) and now - first < _PATIENCE_SECONDS:
            again = threading.Timer(_RETRY_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        asked.pop(number, None)
        raised_at = now
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def how_to_continue() -> str:
    """Return what to type after an interrupt."""
    command = command_line(names=False)
    if (folder := current.last_folder()) is not None:
        return f"finished work is kept in {shown(folder)}; to continue, run the same command again: {command}"
    return f"no incomplete files were left; to start again, run: {command}"
