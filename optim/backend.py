"""Which fast paths can run here: the only place that decides, and the only place that launches a kernel.

``OPTIM_BACKEND`` in the environment is ``auto`` (the default), ``torch`` (the definitions, nothing compiled), or
``triton`` (for tests: CPU tensors too use the Triton kernels, through its interpreter with ``TRITON_INTERPRET=1``).
"""

import os
import warnings
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = {Tensor, Parameter}
_WIDE = {torch.float64, torch.complex32, torch.complex64, torch.complex128}
_DEVICE, _DTYPE, _LAYOUT, _REQUIRES_GRAD = map(attrgetter, ("device", "dtype", "layout", "requires_grad"))


def _chosen() -> str:
    chosen = os.environ.get("OPTIM_BACKEND", "auto")
    if chosen not in ("auto", "torch", "triton"):
        raise ValueError(f"OPTIM_BACKEND is {chosen!r}; choose auto, torch or triton")
    return chosen


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _load_triton() -> Any:
    """The package, where kernels may run: torch knows CUDA, or one of the two variables asks for it. None elsewhere."""
    if torch.version.cuda is None and not _interpreting() and os.environ.get("OPTIM_BACKEND") != "triton":
        return None
    try:
        import triton
    except ImportError:
        return None
    return triton


triton = _load_triton()
interpreted = triton is not None and _interpreting()
"""Whether the kernels were made for Triton's interpreter, which is decided when they are first imported."""


def jit(function: Any) -> Any:
    """`triton.jit`; for the interpreter where that was asked for when this module was imported, whatever is set now."""
    if interpreted:
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction(function)
    return triton.jit(function)


CPU_MULTIPLIES_BFLOAT16: bool = torch.backends.mkldnn.is_available() and (  # type: ignore[no-untyped-call]
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)
"""Whether this CPU has instructions for products in bfloat16, then faster than in float32 and otherwise far slower."""


@cache
def _has_llvm() -> bool:
    try:
        import llvmlite.binding  # noqa: F401
    except (ImportError, OSError):  # not installed, or its library does not load on this system
        return False
    return True


def use_cpu_jit() -> bool:
    """Whether steps on CPU tensors are compiled (`optim.cpu_jit`): llvmlite is installed, and OPTIM_BACKEND is auto."""
    return _chosen() == "auto" and _has_llvm()


def use_triton(*tensors: Tensor) -> bool:
    """Whether a Triton kernel may process these tensors; whether they must be contiguous is up to the kernel.

    This holds on GPUs from compute capability 8.0 on, where kernels can be compiled (tried once, with a warning if they
    cannot). The tensors must be plain and dense (no DTensor or other subclass, none inside `torch.vmap`, `torch.func`
    or `torch.compile`), of 32 bits or fewer, on one GPU (or on the CPU, under the interpreter and
    OPTIM_BACKEND=triton), and autograd must not be watching them: the kernels have no derivatives.

    Raises:
        RuntimeError: With OPTIM_BACKEND=triton if triton is not installed.
    """
    chosen = _chosen()
    if chosen == "triton" and triton is None:
        raise RuntimeError("OPTIM_BACKEND=triton, and triton is not installed (or was asked for after `import optim`)")
    if chosen == "torch" or triton is None or not tensors or torch.compiler.is_compiling():
        return False
    if not set(map(type, tensors)) <= _PLAIN or len(set(map(_DEVICE, tensors))) > 1:  # there may be many: no loops
        return False
    device = tensors[0].device
    if interpreted:
        if chosen != "triton" or device.type != "cpu":
            return False
    elif device.type != "cuda" or not _can_launch(device):
        return False
    return not (
        set(map(_LAYOUT, tensors)) - {torch.strided}
        or set(map(_DTYPE, tensors)) & _WIDE
        or (torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors)))
        or any(map(Tensor.is_neg, tensors))
        or any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    )


@cache
def _can_launch(device: torch.device) -> bool:
    """Whether kernels run there; what stands in the way may be the GPU, its driver, or a missing C compiler."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        launch(_probe, (1,), torch.zeros(1, device=device), device=device)
    except Exception as error:  # of any kind: a step must not fail because it could not be made fast
        warnings.warn(
            f"Triton kernels do not run on {device} ({type(error).__name__}: {error}); torch operations are used, "
            "as with OPTIM_BACKEND=torch",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def unbatched(t: Tensor) -> Tensor:
    """Return the tensor that `torch.vmap` wrapped, for a kernel that is an operation with a batching rule."""
    while torch._C._functorch.is_batchedtensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **settings: Any) -> None:
    """Launch ``kernel[grid](...)`` on that device, current or not; an empty grid launches nothing."""
    if 0 in grid:
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, enable_fp_fusion=True, **settings)
    else:
        kernel[grid](*arguments, **settings)


def triton_dtype(dtype: torch.dtype) -> Any:
    """Return the element type of Triton that a pointer read from a table points to."""
    return {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.uint8: tl.uint8,
    }[dtype]


if triton is not None:
    import triton.language as tl

    @jit
    def _probe(x):  # type: ignore[no-untyped-def]
        """The least that shows whether kernels compile and run."""
        tl.store(x, tl.load(x) + 1.0)
