"""Convolutions of one to three dimensions and their transposes: the gradient of each row without unfolded inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from datatools.gradients.elementwise import by_channel
from datatools.gradients.uses import Use, View


@dataclass(eq=False)
class Convolution(Use):
    """A convolution; its tokens are the inputs of the batch, with channels and places flattened into features.

    Attributes:
        inner: sizes of an input after the batch dimension: channels and places.
        outer: the same of an output.
        settings: stride, padding, dilation, transposed, output padding and groups, as aten orders them.

    """

    inner: tuple[int, ...] = ()
    outer: tuple[int, ...] = ()
    settings: tuple[Any, ...] = ()

    def contract(self, x: Float[Tensor, "b n inner"] | None, g: Float[Tensor, "b n outer"]) -> dict[str, Tensor]:
        """Compute the gradient of the kernel of each row: rows become groups of one backward pass of a convolution.

        On CPUs this takes a tenth to two thirds of the time of unfolded inputs or of one pass per row.

        Args:
            x: inputs, floating dtype [b, n, channels * places].
            g: output gradients, floating dtype [b, n, channels * places].

        Returns:
            Name -> gradient of the kernel [b, *shape], summed over n.

        """
        assert x is not None
        rows, *settings, groups = len(x), *self.settings
        x = x.reshape(*x.shape[:2], *self.inner).transpose(0, 1).flatten(1, 2)  # [n, b * channels, *places]
        g = g.to(x.dtype).reshape(*g.shape[:2], *self.outer).transpose(0, 1).flatten(1, 2)
        like = x.new_empty(rows * self.shape[0], *self.shape[1:])
        mask = [False, True, False]
        grads = torch.ops.aten.convolution_backward(
            g.contiguous(), x.contiguous(), like, None, *settings, rows * groups, mask
        )
        return {self.view.name: grads[1].view(rows, *self.shape)}


def _each(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in values] * (count // len(values))


def _uses(
    views: Mapping[int, View], x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any,
    dilation: Any, groups: int, transposed: bool, output_padding: Any,
) -> list[Use] | None:  # fmt: skip
    count = weight.ndim - 2
    batched = x.ndim == weight.ndim
    x = x.detach() if batched else x.detach()[None]
    stride, dilation, output_padding = _each(stride, count), _each(dilation, count), _each(output_padding, count)
    kernel = weight.shape[2:]
    if padding == "valid":
        padding = 0
    elif padding == "same":  # an odd number of zeros has the last one on the right
        widths = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        x = functional.pad(x, [side for w in reversed(widths) for side in (w // 2, w - w // 2)])
        padding = 0
    padding = _each(padding, count)
    places = [
        (n - 1) * s - 2 * p + d * (k - 1) + o + 1 if transposed else (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, s, p, d, k, o in zip(x.shape[2:], stride, padding, dilation, kernel, output_padding, strict=True)
    ]
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    outer = (channels, *places)
    rows = len(x)
    found: list[Use] = []
    if id(weight) in views:
        found.append(
            Convolution(
                views[id(weight)], weight.shape, torch.Size((rows, 1)), x.reshape(rows, 1, -1),
                align=lambda g: g.reshape(rows, 1, -1), inner=tuple(x.shape[1:]), outer=outer,
                settings=(stride, padding, dilation, transposed, output_padding, groups),
            )
        )  # fmt: skip
    if bias is not None and id(bias) in views:
        found.append(by_channel(views[id(bias)], bias, None, rows))
    return None if any(isinstance(use.view.picked(), Tensor) for use in found) else found


def _convolution(views: Mapping[int, View], input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
                 padding: Any = 0, dilation: Any = 1, groups: int = 1) -> list[Use] | None:  # fmt: skip
    return _uses(views, input, weight, bias, stride, padding, dilation, groups, False, 0)


def _transposed(views: Mapping[int, View], input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
                padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
                ) -> list[Use] | None:  # fmt: skip
    return _uses(views, input, weight, bias, stride, padding, dilation, groups, True, output_padding)


CONVOLUTIONS: dict[str, Callable[..., list[Use] | None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
}
