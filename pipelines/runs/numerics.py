"""What decides last bits besides settings, rows and weights: recorded in a run, and compared when the run goes on.

The number of threads decides in which parts sums are made, so it is one of these facts. A run that goes on where there
are more or fewer cores keeps the number that it began with, for the same bytes; a number that the user has set is not
overridden: another one is refused.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch

from datatools import EnvironmentProblem
from optim import backend
from pipelines.runs import threads
from pipelines.runs.messages import say
from pipelines.runs.provenance import version
from pipelines.settings.base import Json
from pipelines.texts import visible

GROUP = "numerics"
MOST_THREADS = 1024

_SETTINGS = ("MKL_CBWR", "ONEDNN_DEFAULT_FPMATH_MODE", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
"""Variables by which libraries compute otherwise."""


def facts() -> dict[str, Json]:
    """Device, instructions, threads, what steps are made of, and versions of the libraries that compute.

    Raises: EnvironmentProblem for an OPTIM_BACKEND that is not there.
    """
    cuda = torch.cuda.is_available()
    found: dict[str, Json] = {
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "torch": str(torch.__version__),
        **{name: version(name) for name in ("transformers", "peft")},
        "steps": _steps(cuda),
    }
    if not cuda:  # where sums are made on the GPU, the processor's own way to make them decides nothing
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
        raise EnvironmentProblem("OPTIM_BACKEND=triton, and triton is not installed")
    if backend.triton is not None and (chosen == "triton" or (cuda and chosen == "auto")):
        return f"triton {version('triton')}"
    return f"compiled by llvmlite {version('llvmlite')}" if compiled and not cuda else "torch operations"


def keep_threads(recorded: object) -> None:
    """Take the number of threads of the facts that a run began with, where the number is a command's to choose."""
    wanted = recorded.get("threads") if isinstance(recorded, dict) else None
    now = torch.get_num_threads()
    if type(wanted) is not int or not 1 <= wanted <= MOST_THREADS or wanted == now or not threads.count_is_free():
        return
    if not torch.cuda.is_available():
        torch.set_num_threads(wanted)
        say(
            f"threads: {wanted}, as when this run began (it would be {now} here), for the same bytes; "
            f"--accept-change {GROUP} takes {now}"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """`threads 2 and 1, torch 2.12 and 2.13`: what differs between two sets of facts; empty where nothing does."""
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return visible(", ".join(f"{name} {old.get(name)} and {new.get(name)}" for name in names))
