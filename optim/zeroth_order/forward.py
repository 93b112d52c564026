"""The directional derivative of a loss by forward-mode differentiation."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

_NO_RULE = re.compile(r"forward AD|forward-mode|setup_context|jvp")
"""What torch's errors contain if an operation has no forward-mode rule."""


class _Calling(nn.Module):
    """Run a function that uses `inner` as the forward pass of a module that has the parameters of `inner`."""

    def __init__(self, inner: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self) -> Any:
        return self.function()


def directional(
    module: nn.Module, loss_fn: Callable[[], Tensor], tangents: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Return the loss and its exact derivative <grad loss, v> at the module's parameters, without a graph.

    It is one forward pass with dual numbers. Attention uses torch's math kernel, because the fused kernels have no
    forward-mode rule.

    Args:
        module: The model.
        loss_fn: A function that computes the loss by calling `module`.
        tangents: v, by parameter name, of the parameter's shape and dtype.

    Returns:
        The loss and the derivative.

    Cost:
        The time of two to three forward passes, and the memory of v and of one tangent per live activation.

    Raises:
        ValueError: For an operation of the model that has no forward-mode rule, by name, and for a loss that is not one
            floating-point number.
    """
    calling = _Calling(module, loss_fn)
    named = dict(module.named_parameters())
    primals = {f"inner.{name}": named[name].detach() for name in tangents}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return functional_call(calling, params, ())  # type: ignore[no-any-return]

    try:
        with sdpa_kernel(SDPBackend.MATH):
            found: Any = jvp(loss, (primals,), ({f"inner.{name}": v for name, v in tangents.items()},))
    except RuntimeError as error:
        if not _NO_RULE.search(str(error)):
            raise
        raise ValueError(
            f"forward gradient: {str(error).splitlines()[0]}; use the two-sided estimator for this model"
        ) from error
    value, slope = found
    if not isinstance(value, Tensor) or value.numel() != 1 or not torch.is_floating_point(value):
        raise ValueError("forward gradient: the loss must be one differentiable number, a tensor of a floating dtype")
    return float(value), float(slope)
