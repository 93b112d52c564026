"""Which fast paths can run here: the only place that asks."""

import os
from functools import cache


@cache
def _has_llvm() -> bool:
    try:
        import llvmlite.binding  # noqa: F401
    except (ImportError, OSError):  # not installed, or its library does not load on this system
        return False
    return True


def use_fused() -> bool:
    """Whether steps on CPU tensors are compiled (`optim.fused`): llvmlite is there, and not OPTIM_BACKEND=torch."""
    chosen = os.environ.get("OPTIM_BACKEND", "auto")
    if chosen not in ("auto", "torch"):
        raise ValueError(f"OPTIM_BACKEND is {chosen!r}; choose auto or torch")
    return chosen == "auto" and _has_llvm()
