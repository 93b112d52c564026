"""The engine `local`: this process leads, and starts the other workers on its machine.

The workers end with this process, whatever ends it. A worker that is killed costs the unit that it was computing.
"""

from __future__ import annotations

import contextvars
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pipelines.engines.units import own_name
from pipelines.runs import devices, threads, workers
from pipelines.runs.messages import say, warn
from pipelines.runs.provenance import ROOT
from pipelines.settings.base import RunSettings
from pipelines.settings.engine import EngineConfig
from pipelines.texts import plural

S = TypeVar("S", bound=RunSettings)

_GRACE_SECONDS = 5.0
"""How long a worker may take to end when the run is over."""


def run(program: Callable[[S], Path], config: S, how: EngineConfig) -> Path:
    """Run a program in this process and in `how.workers - 1` others.

    Args:
        program: The program.
        config: Its settings.
        how: The engine.

    Returns:
        The folder of the run.
    """
    each = use_threads(how)
    there = devices.gpus()
    if there:
        say(f"{plural(how.workers, 'worker')} on {plural(min(how.workers, len(there)), 'GPU')}")
    else:
        say(
            f"{plural(how.workers, 'worker')} with {plural(each, 'thread')} each on {plural(threads.cores(), 'core')}; "
            f"{'more workers than cores slow each other down; ' if how.workers > threads.cores() else ''}"
            f"any number of workers with {plural(each, 'thread')} gives the same bytes"
        )
    me = workers.Member(own_name("worker-1"), 0, how.workers, leads=True)
    with _helpers(program, config, how.workers, each), workers.acting_as(me):
        return program(config)


def use_threads(how: EngineConfig) -> int:
    """Give this process its share of the cores, and return the number of its threads.

    Args:
        how: The engine.
    """
    import torch

    if how.threads is not None:
        torch.set_num_threads(how.threads)
    elif threads.count_is_free():
        torch.set_num_threads(max(1, threads.cores() // how.workers))
    return torch.get_num_threads()


@contextmanager
def _helpers(program: Callable[[S], Path], config: S, size: int, each: int) -> Iterator[None]:
    """Start the other workers, and end them with the block."""
    order = {
        "program": [program.__module__, program.__qualname__],
        "settings": [type(config).__module__, type(config).__qualname__],
        "config": config.model_dump(mode="json"),
        "size": size,
        "threads": each,
        "free": threads.count_is_free(),
    }
    closing = threading.Event()
    children: list[subprocess.Popen[bytes]] = []
    try:
        for place in range(1, size):
            env = {**os.environ, "OMP_NUM_THREADS": str(each), **devices.gpu_of(place)}
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            child = subprocess.Popen(
                [sys.executable, "-m", "pipelines.engines.helper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=env,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the others
            )
            children.append(child)
            assert child.stdin is not None
            with suppress(BrokenPipeError):
                child.stdin.write(json.dumps({**order, "place": place}).encode() + b"\n")
                child.stdin.flush()  # and stays open: its end tells the worker that this process has ended
            watch = contextvars.copy_context()
            threading.Thread(target=watch.run, args=(_watch, child, place + 1, closing), daemon=True).start()
        yield
    finally:
        closing.set()
        _end(children)


def _watch(child: subprocess.Popen[bytes], number: int, closing: threading.Event) -> None:
    code = child.wait()
    if not closing.is_set():
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        warn(f"worker {number} has ended {how}; the other workers do its unit of work again")


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        assert child.stdin is not None
        with suppress(OSError):
            child.stdin.close()
    for child in children:
        try:
            child.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
