"""What each worker of a machine computes with: a GPU of its own, or a share of the cores."""

import os


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; CUDA is not initialized."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def gpu_of(place: int) -> dict[str, str]:
    """Return the environment in which a worker sees only its own GPU; empty without GPUs.

    Args:
        place: The number of the worker on its machine. Workers beyond the number of GPUs share them.
    """
    there = gpus()
    return {"CUDA_VISIBLE_DEVICES": there[place % len(there)]} if there else {}
