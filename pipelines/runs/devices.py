"""What a process computes with: the device that `--device` names, and the GPU of each worker of a machine.

`cpu` and `cuda:N` hide GPUs from the whole process, before torch looks for them. So no library can use another GPU, and
everything that asks whether there is a GPU, from the estimate to the recorded facts, gets the same answer. No import
here loads torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from datatools import EnvironmentProblem, UsageError
from pipelines.settings.parts import ModelConfig
from pipelines.texts import first_line

if TYPE_CHECKING:
    import torch

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NONE = "-1"

_asked = "auto"
"""The device that the current settings ask for."""

_only: tuple[str, str] | None = None
"""A device such as "cuda:1", and the value of CUDA_VISIBLE_DEVICES that makes it the only GPU of this process."""


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; CUDA is not initialized."""
    named = os.environ.get(_VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name.strip() != _NONE]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def gpu_of(place: int) -> dict[str, str]:
    """Return the environment in which a worker sees only its own GPU; empty without GPUs.

    Args:
        place: The number of the worker on its machine. Workers beyond the number of GPUs share them.
    """
    there = gpus()
    return {_VISIBLE: there[place % len(there)]} if there else {}


def use(config: ModelConfig, *, processes: bool, elsewhere: bool = False) -> None:
    """Make this process compute with the device of the settings, and refuse what does not exist or does not work here.

    What is hidden stays hidden until the process ends, because torch looks for GPUs only once.

    Args:
        config: The settings of the model.
        processes: Whether several processes share the work, each with a GPU of its own.
        elsewhere: Whether other machines compute, and this one may have other devices.

    Raises:
        UsageError: The device is one GPU, and several processes share the work.
        EnvironmentProblem: The device is not here, or cannot compute in the dtype.
    """
    global _asked, _only
    asked, named = config.device, os.environ.get(_VISIBLE)
    if processes and asked.startswith("cuda:"):
        raise UsageError(
            f"--device {asked} is one GPU, and several processes share this work, each with a GPU of its own; use "
            f"--device cuda, and set {_VISIBLE} to the GPUs that they may use"
        )
    if asked == "cpu":
        os.environ[_VISIBLE] = _NONE
    elif asked.startswith("cuda:") and (asked, named) != _only:
        number = int(asked.removeprefix("cuda:"))
        if named is not None and number >= len(there := gpus()):
            raise EnvironmentProblem(
                f"--device {asked}: {_VISIBLE}={named} lets this process use {len(there)} of the GPUs, and counting "
                "begins at 0"
            )
        os.environ[_VISIBLE] = alone = str(number) if named is None else gpus()[number]
        _only = asked, alone
    _asked = asked
    if (asked, config.dtype) != ("auto", "auto") and not elsewhere:
        _check(config)


def _check(config: ModelConfig) -> None:
    """Refuse a device that is not here, and a dtype in which it cannot compute."""
    import torch

    asked, found = config.device, kind()
    if asked == "mps" and not torch.backends.mps.is_available():
        raise EnvironmentProblem("--device mps: there is no GPU of Apple here; use --device auto")
    if asked.startswith("cuda"):
        if not torch.cuda.is_available():
            why = (
                "this torch is built without CUDA"
                if torch.version.cuda is None and torch.version.hip is None
                else "torch finds none"
            )
            raise EnvironmentProblem(
                f"--device {asked}: no such GPU here ({why}); nvidia-smi -L lists the GPUs, datatools doctor shows "
                "those that torch can use, and --device auto takes the CPU where there are none"
            )
        late = asked.startswith("cuda:") and torch._C._cuda_getDeviceCount() > 1
    else:
        late = asked == "cpu" and torch.cuda.is_available()
    if late:
        raise EnvironmentProblem(
            f"--device {asked}: this process has already looked for GPUs, so that the others can no longer be hidden "
            f"from it; set {_VISIBLE} before Python starts"
        )
    try:
        _multiply(found, dtype_of(config))
    except (RuntimeError, TypeError) as error:
        raise EnvironmentProblem(
            f"--device {asked} --dtype {config.dtype}: this device cannot compute in this dtype here "
            f"({first_line(error)}); use --dtype float32"
        ) from error


def _multiply(device: str, dtype: torch.dtype) -> None:
    import torch

    a = torch.ones(2, 2, dtype=dtype, device=device)
    (a @ a).sum().item()


def kind() -> str:
    """Return the type of the device of this process: "cuda", "mps" or "cpu". Only `--device mps` chooses mps."""
    import torch

    if _asked == "mps":
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"


def name() -> str:
    """Return the name of the device of this process for records: that of the GPU, or "cpu"."""
    import torch

    found = kind()
    return torch.cuda.get_device_name(0) if found == "cuda" else found


def dtype_of(config: ModelConfig) -> torch.dtype:
    """Return the dtype in which a model is loaded in this process.

    Args:
        config: The configuration of the model.
    """
    import torch

    if config.dtype == "auto":
        return torch.bfloat16 if kind() == "cuda" else torch.float32
    found: torch.dtype = getattr(torch, config.dtype)
    return found
