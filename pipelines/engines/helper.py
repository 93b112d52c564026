"""A worker that `local` has started: `python -m pipelines.engines.helper`, with its orders as JSON on stdin.

It ends when stdin ends, which is when the process that started it ends.
"""

import json
import os
import signal
import sys
import threading
from importlib import import_module
from typing import Any

from datatools import DatatoolsError
from pipelines.runs import following, threads, workers
from pipelines.texts import visible


def main() -> int:
    """Help with a run until the process that started this one ends.

    Returns:
        The exit code; an error is one line on stderr.
    """
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    if order["free"]:  # not a number that the user has set: the run may ask for the one with which it began
        threads.chosen["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
    threads.choose(command=order["free"])  # before torch is loaded
    number = order["place"] + 1
    try:
        _help(order, f"worker-{number}")
    except DatatoolsError as error:
        print(f"error: worker {number}: {visible(str(error))}", file=sys.stderr)
        return error.exit_code
    return 0


def _help(order: dict[str, Any], label: str) -> None:
    from pipelines.engines.units import own_name

    program, settings = (getattr(import_module(module), name) for module, name in (order["program"], order["settings"]))
    config = settings.model_validate(order["config"])
    with workers.acting_as(workers.Member(own_name(label), order["place"], order["size"], leads=False)):
        for _ in following.pauses():  # until the leader has its folder
            try:
                program(config)
            except following.Orphaned:
                continue
            except following.Enough:
                break
            except DatatoolsError:
                if following.leader_has_inputs():
                    raise
                break
    threading.Event().wait()  # for the end of the run


def _end_with_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)  # units are committed whole, so nothing is lost


if __name__ == "__main__":
    sys.exit(main())
