"""Which fast paths can run here. This is the only module that decides, and the only one that launches a kernel.

The environment variable ``OPTIM_BACKEND`` is ``auto`` (the default), ``torch`` (the definitions, nothing is compiled),
or ``triton`` (for tests: CPU tensors use the Triton kernels too, under its interpreter with ``TRITON_INTERPRET=1``).
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
    """Return the package if kernels may run (torch has CUDA, or one of the two variables asks for it), else None."""
    if torch.version.cuda is None and not _interpreting() and os.environ.get("OPTIM_BACKEND") != "triton":
        return None
    try:
        import triton
    except ImportError:
        return None
    return triton


triton = _load_triton()
interpreted = triton is not None and _interpreting()
"""Whether the kernels were built for Triton's interpreter; this is decided when the module is first imported."""


def jit(function: Any) -> Any:
    """Compile a kernel with `triton.jit`, or for Triton's interpreter.

    The environment at the time when this module was imported decides between them, whatever is set now.

    Args:
        function: The Python function that defines the kernel.

    Returns:
        The kernel.
    """
    if interpreted:
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction(function)
    return triton.jit(function)


CPU_MULTIPLIES_BFLOAT16: bool = torch.backends.mkldnn.is_available() and (  # type: ignore[no-untyped-call]
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)
"""Whether this CPU has instructions for bfloat16 products. With them they are faster than in float32, and without them
much slower."""


@cache
def _has_llvm() -> bool:
    try:
        import llvmlite.binding  # noqa: F401
    except (ImportError, OSError):  # not installed, or its library does not load on this system
        return False
    return True


def use_cpu_jit() -> bool:
    """Return whether steps on CPU tensors are compiled by `optim.cpu_jit`.

    Returns:
        True if llvmlite is installed and OPTIM_BACKEND is auto.
    """
    return _chosen() == "auto" and _has_llvm()


def use_triton(*tensors: Tensor) -> bool:
    """Return whether a Triton kernel may process these tensors.

    Kernels run on GPUs with compute capability 8.0 or higher on which they can be compiled (this is tried once, and a
    warning is issued if it fails). The tensors must be plain and dense (no DTensor or other subclass, none inside
    `torch.vmap`, `torch.func` or `torch.compile`), of 32 bits or fewer, on one GPU (or on the CPU, under the
    interpreter and OPTIM_BACKEND=triton), and autograd must not be tracking them, because the kernels have no
    derivatives. The kernel itself checks whether it needs contiguous tensors.

    Args:
        *tensors: The tensors that the kernel would read and write.

    Returns:
        True if all of them fulfil these conditions.

    Raises:
        RuntimeError: With OPTIM_BACKEND=triton if triton is not installed.
    """
    chosen = _chosen()
    if chosen == "triton" and triton is None:
        raise RuntimeError(
            "OPTIM_BACKEND=triton, but triton is not installed (or the variable was set after `import optim`)"
        )
    if chosen == "torch" or triton is None or not tensors or torch.compiler.is_compiling():
        return False
    if not set(map(type, tensors)) <= _PLAIN or len(set(map(_DEVICE, tensors))) > 1:  # no loop over many tensors
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
    """Return whether kernels run there; the GPU, its driver or a missing C compiler may prevent it."""
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
    """Return the tensor that `torch.vmap` wrapped, for a kernel that is an operation with a batching rule.

    Args:
        t: A tensor, inside `torch.vmap` or not.

    Returns:
        The tensor without its wrappers.
    """
    while torch._C._functorch.is_batchedtensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **settings: Any) -> None:
    """Launch ``kernel[grid](...)`` on the given device, whether or not it is current; an empty grid launches nothing.

    Args:
        kernel: The kernel.
        grid: The number of programs along each axis.
        *arguments: The positional arguments of the kernel.
        device: Where to launch it.
        **settings: The keyword arguments of the kernel, such as block sizes.
    """
    if 0 in grid:
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, enable_fp_fusion=True, **settings)
    else:
        kernel[grid](*arguments, **settings)


def triton_dtype(dtype: torch.dtype) -> Any:
    """Return the Triton element type for a pointer that a kernel reads from a table.

    Args:
        dtype: A dtype of torch.

    Returns:
        The corresponding dtype of `triton.language`.
    """
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
        """Add 1 to a number, the smallest kernel that shows whether kernels compile and run."""
        tl.store(x, tl.load(x) + 1.0)
