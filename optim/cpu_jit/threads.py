"""Threads of the process that help with a step; none of them works after it."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

_MOST = 256
"""The largest number of helper threads of a process; they are started when they are needed."""


def together(work: Callable[[], None], helpers: int) -> None:
    """Run `work` on this thread and up to `helpers` others, none of which is working after the return or an exception.

    If no thread can be started, for example because the interpreter is shutting down while other threads still train,
    this thread does everything.

    Args:
        work: A function that processes items until none is left, so that it may run on any number of threads. It must
            own everything that it accesses: a helper may start too late, and then only releases it.
        helpers: The number of other threads.
    """
    futures: list[Future[None]] = [Future() for _ in range(helpers)]  # they exist before any thread starts
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
                except BaseException as error:  # an interrupt; memory must not be released yet
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
    """Return the executor of this process, because a fork does not have its parent's threads."""
    return ThreadPoolExecutor(_MOST, thread_name_prefix="optim")
