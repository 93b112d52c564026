"""The engine `ray`: the members of a team are actors on a Ray cluster, which this process starts and waits for.

An actor loads the model once and writes its results to the folder of the run; only receipts pass through the object
store. Ray starts an actor again when it or its node dies, and adds nodes where the cluster scales: an actor that comes
later joins the team.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from datatools import DataError, DatatoolsError, EnvironmentProblem, UsageError
from pipelines.engines.member import LED, take_part
from pipelines.engines.units import own_name
from pipelines.runs import current, messages, threads, workers
from pipelines.runs.messages import say, warn
from pipelines.settings.base import RunSettings
from pipelines.settings.engine import EngineConfig
from pipelines.texts import plural

S = TypeVar("S", bound=RunSettings)

_STORE_BYTES = 100 << 20
"""The object store of a cluster on this machine: receipts are small."""

_ERRORS: dict[str, type[DatatoolsError]] = {kind.__name__: kind for kind in (UsageError, DataError, EnvironmentProblem)}


def run(program: Callable[[S], Path], config: S, how: EngineConfig) -> Path:
    """Run a program by `how.workers` actors.

    Args:
        program: The program.
        config: Its settings. The folder of the run must be the same folder on all nodes.
        how: The engine.

    Returns:
        The folder of the run.

    Raises:
        EnvironmentProblem: Ray is not installed, or no cluster answers.
        DatatoolsError: The run failed; the error is that of the actor.
    """
    each = how.threads or max(1, threads.cores() // how.workers)
    out = config.out.absolute()
    current.opened(out)
    with _cluster(how.workers * each) as ray:
        gpus = _gpus(ray, config)
        say(f"{plural(how.workers, 'Ray actor')} with {'a GPU' if gpus else plural(each, 'thread')} each")
        actor = ray.remote(_Actor).options(num_cpus=each, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)
        order = {
            "program": [program.__module__, program.__qualname__],
            "settings": [type(config).__module__, type(config).__qualname__],
            "config": config.model_copy(update={"out": out}).model_dump(mode="json"),
            "size": how.workers,
            "threads": each,
            "quiet": messages.quiet(),
            "folder": str(Path.cwd()),
        }
        team = [actor.remote({**order, "place": place}) for place in range(how.workers)]
        try:
            _wait(ray, {one.work.remote(): place + 1 for place, one in enumerate(team)})
        finally:
            for one in team:
                with suppress(Exception):
                    ray.kill(one)
    return config.out


def _gpus(ray: Any, config: RunSettings) -> int:
    """Return the number of GPUs of an actor.

    Raises:
        EnvironmentProblem: The settings ask for GPUs, and the cluster has none.
    """
    device = getattr(getattr(config, "model", None), "device", "auto")
    there = bool(ray.cluster_resources().get("GPU"))
    if device == "cuda" and not there:
        raise EnvironmentProblem(
            "--device cuda: no node of the Ray cluster has a GPU; start nodes with GPUs, or use --device auto"
        )
    return int(there and device in ("auto", "cuda"))


class _Actor:
    """One member of the team; Ray creates it in a process of its own."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        os.environ["OMP_NUM_THREADS"] = str(order["threads"])  # before torch is loaded
        threads.chosen["OMP_NUM_THREADS"] = str(order["threads"])
        threads.choose(command=True)
        self._order = order

    def work(self) -> dict[str, str]:
        """Take part in the run until it is done, and return the error that ended it, if any."""
        order = self._order
        with suppress(OSError):
            os.chdir(order["folder"])  # so that relative names of inputs mean the same
        try:
            program, settings = (
                getattr(import_module(module), name) for module, name in (order["program"], order["settings"])
            )
            me = workers.Member(own_name(f"actor-{order['place'] + 1}"), order["place"], order["size"], leads=False)
            with messages.quietly(order["quiet"]):
                take_part(program, settings.model_validate(order["config"]), me)
        except DatatoolsError as error:
            kind = next(name for name, one in _ERRORS.items() if isinstance(error, one))
            return {"kind": kind, "text": str(error)}
        return {}


def _wait(ray: Any, left: dict[Any, int]) -> None:
    """Wait until one actor says that the run is done, or all have failed.

    Raises:
        DatatoolsError: The first error of an actor that is not a report of the leader's.
    """
    errors: list[DatatoolsError] = []
    while left:
        [ready], _ = ray.wait(list(left), num_returns=1)
        place = left.pop(ready)
        try:
            found = ray.get(ready)
        except Exception as error:  # Ray has given up on the actor, or its code has a bug
            found = {"kind": "EnvironmentProblem", "text": f"actor {place} was lost: {_first_line(error)}"}
        if not found:
            return
        errors.append(_ERRORS[found["kind"]](found["text"]))
        if left:
            warn(f"actor {place} has ended: {found['text']}")
    raise next((error for error in errors if LED not in str(error)), errors[0])


@contextmanager
def _cluster(cpus: int) -> Iterator[Any]:
    """Connect to the cluster at RAY_ADDRESS, or start one on this machine.

    Args:
        cpus: The logical CPUs of a cluster on this machine.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise EnvironmentProblem(
            "--engine ray needs Ray, which is not installed: pip install 'datatools-llm[ray]', or use --engine local"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address)
        else:
            ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=_STORE_BYTES)
    except Exception as error:
        where = f"RAY_ADDRESS={address}: no Ray cluster answers there" if address else "Ray cannot be started here"
        raise EnvironmentProblem(
            f"{where} ({_first_line(error)}); start one with `ray start --head`, unset RAY_ADDRESS for one on this "
            "machine, or use --engine local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[-1] if lines else type(error).__name__)[:200]
