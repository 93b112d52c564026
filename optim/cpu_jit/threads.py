"""Threads of the process that help with a step, and leave nothing running after it."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

_MOST = 256
"""Helpers of a process; they are started as they are needed."""


def together(work: Callable[[], None], helpers: int) -> None:
    """Run `work` on this thread and up to `helpers` others, none of which works after the return or an exception.

    `work` takes its share until nothing is left, so it may run on any number of threads. It must own what it touches: a
    helper can come too late and then only lets go of it. Where no thread can be started, as when the interpreter ends
    while other threads still train, this thread does everything.
    """
    futures: list[Future[None]] = [Future() for _ in range(helpers)]  # known before any thread is
    try:
        try:
            for future in futures:
                _executor(os.getpid()).submit(_help, future, work)
        except RuntimeError:  # "cannot schedule new futures after shutdown", "can't start new thread"
            pass
        work()
    finally:
        late: BaseException | None = None
        for future in futures:
            while not (future.cancel() or future.done()):
                try:
                    future.exception()  # waits
                except BaseException as error:  # an interrupt: memory must not be given up now all the same
                    late = error
        if late is not None:
            raise late


def _help(future: "Future[None]", work: Callable[[], None]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            work()
        finally:
            future.set_result(None)


@lru_cache(maxsize=1)
def _executor(process: int) -> ThreadPoolExecutor:
    """Of this process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(_MOST, thread_name_prefix="optim")
