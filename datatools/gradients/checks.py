"""What gradients per row assume: rows are independent, and a pass leaves nothing behind for the next one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from datatools.gradients.types import Batch, Loss

TOLERANCE = 3.0
"""In units of the root of the precision: 0.001 in float32 and float64, 0.26 in bfloat16; real errors are about 1."""

_NOISE = 16.0
"""In units of the precision: what a loss near zero, such as the divergence from a reference, may be off by rounding."""


def precision_of(module: nn.Module) -> float:
    """Return the spacing of numbers near 1 in which a module computes.

    Args:
        module: the model; parts of a float64 model may compute in float32.

    Returns:
        The largest spacing of its floating parameters, at least that of float32.

    """
    found = max((torch.finfo(p.dtype).eps for p in module.parameters() if p.is_floating_point()), default=0.0)
    return max(found, torch.finfo(torch.float32).eps)


class Precision(TorchFunctionMode):
    """Finds the precision of what runs inside it, which is lower than that of the parameters under autocast.

    Args:
        module: the model.

    Attributes:
        eps: the largest spacing of numbers near 1 so far.

    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.eps = precision_of(module)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, and note the dtype of its result."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        return result


def keep_gradients(module: nn.Module) -> None:
    """Keep the 4-bit weights of bitsandbytes in the layout that has gradients.

    On a CPU with AVX512-BF16, a forward pass in eval mode and without gradients lets bitsandbytes move 4-bit weights
    into a layout whose product rounds to bfloat16 and has no backward pass: later gradients would lack all that flows
    through it, without an error. That is switched off here, for good.

    Args:
        module: the model.

    Raises:
        ValueError: if its weights are in that layout already.

    Example:
        >>> from datatools import keep_gradients
        >>> keep_gradients(torch.nn.Linear(2, 2))  # nothing to do

    """
    for name, child in module.named_modules():
        if hasattr(child, "support_avx512bf16_for_cpu"):
            if getattr(getattr(child.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"a forward pass moved the 4-bit weights of {name!r} into a layout that has no gradients; load the "
                    "model again, and give it before it is used"
                )
            child.support_avx512bf16_for_cpu = False


def check_modules(module: nn.Module) -> None:
    """Refuse modules that normalize by the statistics of a batch, and weights in a layout without gradients.

    Args:
        module: the model.

    Raises:
        ValueError: if it contains such a module.

    """
    keep_gradients(module)
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and (child.training or child.running_mean is None):
            why = "is in training mode" if child.training else "has no running statistics"
            remedy = "call module.eval()" if child.training else "set track_running_stats=True, or use GroupNorm"
            raise ValueError(
                f"per-sample gradients: {type(child).__name__} {name!r} {why}, so that it normalizes by the statistics "
                f"of the batch and rows depend on each other; {remedy}"
            )


def check_rows_are_independent(loss: Loss, module: nn.Module, batch: Batch, precision: float) -> bool:
    """Refuse a loss whose value for the last row of a batch is another one if the row is alone.

    Args:
        loss: (module, batch) -> losses, floating dtype [b].
        module: the model.
        batch: name -> tensor [b, ...], at least two rows.
        precision: the spacing of numbers near 1 in which the model computes.

    Returns:
        Whether the values are large enough to show that they are equal; a loss of 0 or near it shows nothing.

    Raises:
        ValueError: if the values differ.

    """
    together = loss(module, batch).detach()
    alone = loss(module, {key: tensor[-1:] for key, tensor in batch.items()}).detach()
    if together.ndim != 1 or alone.shape != (1,):
        return True  # its shape is refused where gradients are taken
    size = max(float(alone.abs()), float(together.abs().mean()))
    limit, noise = TOLERANCE * precision**0.5 * size, _NOISE * precision
    if abs(float(together[-1]) - float(alone)) > limit + noise:  # False if not finite
        raise ValueError(
            f"per-sample gradients: the loss of a row is {float(alone):.6g} alone and {float(together[-1]):.6g} in a "
            f"batch of {len(together)}, so that rows depend on each other, as with a mean over the tokens of the whole "
            "batch, a contrastive loss, normalization by the batch, experts that drop tokens above their capacity, or "
            "attention along the dimension of rows; divide by the tokens of the row, and let each row see only itself"
        )
    return bool(0.5 * float(alone.abs()) > limit + noise)  # the least that a mean over a batch of two rows changes


def buffer_versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return what shows whether a buffer was changed.

    Args:
        module: the model.

    Returns:
        Name of each floating buffer -> its identity and version.

    """
    return {name: (id(b), b._version) for name, b in module.named_buffers() if b.is_floating_point()}


def check_passes_are_equal(loss: Loss, module: nn.Module, batch: Batch) -> None:
    """Refuse a loss that is another one in a second pass over the last row of a batch.

    Args:
        loss: (module, batch) -> losses, floating dtype [b].
        module: the model.
        batch: name -> tensor [b, ...].

    Raises:
        ValueError: if the losses differ.

    """
    row = {key: tensor[-1:] for key, tensor in batch.items()}
    versions = buffer_versions(module)
    with Precision(module) as seen:
        first, second = (loss(module, row).detach().sum().reshape(1) for _ in range(2))
    check_loss_is_repeatable(first, second, module, versions, seen.eps)


def check_loss_is_repeatable(
    first: Float[Tensor, " 1"],
    second: Float[Tensor, " 1"],
    module: nn.Module,
    versions: Mapping[str, tuple[int, int]],
    precision: float,
) -> None:
    """Refuse a loss that is another one in a second pass over the same row.

    Args:
        first: the loss in the first pass, floating dtype [1].
        second: the loss in the second pass, floating dtype [1].
        module: the model.
        versions: its `buffer_versions` before the first pass.
        precision: the spacing of numbers near 1 in which it computes.

    Raises:
        ValueError: if the losses differ.

    """
    a, b = float(first), float(second)
    limit = min(100 * precision, TOLERANCE * precision**0.5) * max(abs(a), abs(b)) + _NOISE * precision
    if abs(a - b) > limit:  # False if not finite
        now = buffer_versions(module)
        changed = [name for name, version in now.items() if versions.get(name) != version]
        why = (
            f"its forward pass changes the buffer {changed[0]!r}; make it constant in eval mode"
            if changed
            else "it draws random numbers in eval mode (such as functional dropout without `training=self.training`), "
            "or keeps a state between passes"
        )
        raise ValueError(
            f"per-sample gradients: two passes of {type(module).__name__} over the same row have the losses {a:.6g} "
            f"and {b:.6g}: {why}"
        )


def hidden_parameters(module: nn.Module) -> set[str]:
    """Return the names of parameters whose operations cannot be observed.

    Args:
        module: the model.

    Returns:
        The names of the parameters of TorchScript modules inside.

    """
    scripted = {
        id(p) for child in module.modules() if isinstance(child, torch.jit.ScriptModule) for p in child.parameters()
    }
    return {name for name, p in module.named_parameters() if id(p) in scripted}


def is_of_checkpointing(error: Exception) -> bool:
    """Return whether an error comes from gradient checkpointing.

    Args:
        error: an error of a backward pass.

    Returns:
        Whether it does.

    """
    return "torch.utils.checkpoint" in str(error)


def first_line(error: Exception) -> str:
    """Return the first line of a message, without its end mark.

    Args:
        error: the error.

    Returns:
        The line; the kind of error if there is no message.

    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def gradients_of(value: Float[Tensor, ""], params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Compute the gradients of a scalar.

    Args:
        value: the scalar.
        params: tensors that require gradients.

    Returns:
        The gradient of each; None for those that the value does not use.

    Raises:
        ValueError: if the module uses a kind of gradient checkpointing that allows no such gradients.

    """
    try:
        return torch.autograd.grad(value, list(params), allow_unused=True)
    except RuntimeError as error:
        if not is_of_checkpointing(error):
            raise
        raise ValueError(
            "per-sample gradients: the module uses gradient checkpointing in a form that gives no gradients of single "
            "rows; switch it off (gradient_checkpointing_disable()), or use use_reentrant=False"
        ) from error
