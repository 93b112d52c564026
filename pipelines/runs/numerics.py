"""Facts that determine the last bits of results besides settings, rows and weights.

They are recorded in a run and in each checkpoint, and compared when the run continues. The number of threads is one of
these facts, because it determines how sums are split, and so is the number of processes that share a run. A run that
continues on a machine with more or fewer cores keeps the number of threads with which it began, so that the bytes stay
the same. A number that the user has set is not overridden; if it differs, the run is refused.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch

from datatools import EnvironmentProblem
from optim import backend
from pipelines.runs import devices, threads
from pipelines.runs.messages import say
from pipelines.runs.provenance import version
from pipelines.runs.workers import world_size
from pipelines.settings.base import Json
from pipelines.texts import visible

GROUP = "numerics"
MOST_THREADS = 1024

_SETTINGS = ("MKL_CBWR", "ONEDNN_DEFAULT_FPMATH_MODE", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
"""Environment variables that change how libraries compute."""


def facts() -> dict[str, Json]:
    """Return the device, instruction set, threads, processes, optimizer backend, and versions of libraries.

    Raises:
        EnvironmentProblem: OPTIM_BACKEND names a backend that is not available.
    """
    cuda = devices.kind() == "cuda"
    found: dict[str, Json] = {
        "device": devices.name(),
        "torch": str(torch.__version__),
        **{name: version(name) for name in ("transformers", "peft")},
        "steps": _steps(cuda),
    }
    if (processes := world_size()) > 1:  # they add up their parts of each gradient
        found["processes"] = processes
    if not cuda:  # on a GPU, the order of sums on the CPU does not matter
        found |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    if (precision := torch.get_float32_matmul_precision()) != "highest":
        found["float32_matmul_precision"] = precision
    return found | {name: os.environ[name][:200] for name in _SETTINGS if os.environ.get(name)}


def _steps(cuda: bool) -> str:
    try:
        compiled = backend.use_cpu_jit()
    except ValueError as error:
        raise EnvironmentProblem(str(error)) from error
    chosen = os.environ.get("OPTIM_BACKEND", "auto")
    if chosen == "triton" and backend.triton is None:
        raise EnvironmentProblem("OPTIM_BACKEND=triton is set, but triton is not installed")
    if backend.triton is not None and (chosen == "triton" or (cuda and chosen == "auto")):
        return f"triton {version('triton')}"
    return f"compiled by llvmlite {version('llvmlite')}" if compiled and not cuda else "torch operations"


def keep_threads(recorded: object) -> None:
    """Use the number of threads with which a run began, if the command may choose the number.

    Args:
        recorded: The recorded facts of the group `numerics`.
    """
    wanted = recorded.get("threads") if isinstance(recorded, dict) else None
    now = torch.get_num_threads()
    if type(wanted) is not int or not 1 <= wanted <= MOST_THREADS or wanted == now or not threads.count_is_free():
        return
    if devices.kind() != "cuda":
        torch.set_num_threads(wanted)
        say(
            f"threads: {wanted}, as when this run began ({now} is the default here), so that results stay identical; "
            f"use --accept-change {GROUP} for {now}"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the differences between two sets of facts as text; the text is empty if there are none.

    Args:
        old: The recorded facts.
        new: The current facts.

    Example:
        >>> differences({"threads": 2, "torch": "2.12"}, {"threads": 1, "torch": "2.12"})
        'threads 2 and 1'
    """
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return visible(", ".join(f"{name} {old.get(name)} and {new.get(name)}" for name in names))
