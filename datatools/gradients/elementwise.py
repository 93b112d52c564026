"""Parameters that scale, shift or divide elementwise, alone or at the end of a normalization."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from datatools.gradients.uses import Use, View

Views = Mapping[int, View]


@dataclass(eq=False)
class Scale(Use):
    """A use whose gradient is the sum over tokens of g times `x`, elementwise; `x` has the width of the view."""

    def contract(self, x: Float[Tensor, "b n width"] | None, g: Float[Tensor, "b n width"]) -> dict[str, Tensor]:
        """Compute the gradient of the view from its factors and the output gradients.

        Args:
            x: the derivative of the output by the parameter, floating dtype [b, n, width].
            g: output gradients, floating dtype [b, n, width].

        Returns:
            Name -> gradient of the view [b, *shape], summed over n.

        """
        assert x is not None
        return {self.view.name: (g * x).sum(1).view(len(g), *self.shape)}  # x may be integers or less precise than g


@dataclass(eq=False)
class Channels(Use):
    """A factor or a bias of each channel: tokens are the inputs, whose channels and places stay as they are.

    With x, its gradient is the sum over tokens and places of g times x, and without it, that of g.
    """

    def contract(self, x: Float[Tensor, "b n features"] | None, g: Float[Tensor, "b n features"]) -> dict[str, Tensor]:
        """Compute the gradient of the view.

        Args:
            x: the derivative of the output by the parameter, floating dtype [b, n, channels * places]; None for a bias.
            g: output gradients, floating dtype [b, n, channels * places].

        Returns:
            Name -> gradient of the view [b, *shape], summed over n and places.

        """
        product = g if x is None else g * x
        return {self.view.name: product.view(*g.shape[:2], self.shape.numel(), -1).sum((1, 3)).view(-1, *self.shape)}


def by_channel(
    view: View, param: Float[Tensor, " channels"], x: Float[Tensor, "rows channels *places"] | None, rows: int
) -> Channels:
    """Describe a factor or a bias of each channel, where channels are the second dimension.

    Args:
        view: the parameter, as the use sees it.
        param: the view, floating dtype [channels].
        x: the derivative of the output by the parameter, of the output's shape; None for a bias.
        rows: size of the first dimension of the output.

    Returns:
        The use.

    """
    x = None if x is None else x.detach().reshape(rows, 1, -1)
    return Channels(view, param.shape, torch.Size((rows, 1)), x, align=lambda g: g.reshape(rows, 1, -1))


def broadcast(*shapes: torch.Size) -> torch.Size:
    """Return the shape of an elementwise result.

    Args:
        shapes: the shapes of the operands.

    Returns:
        The broadcast shape.

    Example:
        >>> broadcast(torch.Size((3, 1)), torch.Size((2,)))
        torch.Size([3, 2])

    """
    return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def spread_over(shape: torch.Size, result: torch.Size) -> tuple[torch.Size, Callable[[Tensor], Tensor]]:
    """Split the dimensions of an elementwise result into tokens and features of one operand.

    Tokens are the dimensions along which the operand is broadcast.

    Args:
        shape: shape of the operand.
        result: shape of the result.

    Returns:
        Sizes of the token dimensions, and a function that rearranges a tensor of the result's shape to [*tokens,
        features].

    """
    own = (1,) * (len(result) - len(shape)) + tuple(shape)
    tokens = [k for k in range(len(result)) if own[k] == 1 and result[k] != 1]
    features = [k for k in range(len(result)) if k not in tokens]
    leading = torch.Size(result[k] for k in tokens)
    width = math.prod(result[k] for k in features)
    return leading, lambda g: g.permute(*tokens, *features).reshape(*leading, width)


def _scale(view: View, param: Tensor, factor: Tensor, shape: torch.Size) -> Use | None:
    """Describe a use whose derivative by the parameter is `factor`, broadcast to `shape`."""
    if isinstance(view.picked(), Tensor):
        return None
    tokens, align = spread_over(param.shape, shape)
    return Scale(view, param.shape, tokens, align(factor.detach().expand(shape)), align=align)


def _operands(views: Views, left: Any, right: Any) -> bool:
    """Return whether exactly one of two tensors is watched."""
    return isinstance(left, Tensor) and isinstance(right, Tensor) and (id(left) in views) != (id(right) in views)


def _mul(views: Views, left: Any, right: Any, *, out: Any = None) -> list[Use] | None:
    if not _operands(views, left, right) or out is not None:
        return None
    param, x = (left, right) if id(left) in views else (right, left)
    use = _scale(views[id(param)], param, x, broadcast(left.shape, right.shape))
    return None if use is None else [use]


def _mul_in_place(views: Views, x: Any, param: Any) -> list[Use] | None:
    return _mul(views, x.clone(), param) if id(param) in views else None  # `x` is about to be overwritten


def _divide(views: Views, left: Any, right: Any, *, rounding_mode: Any = None, out: Any = None) -> list[Use] | None:
    if not _operands(views, left, right) or rounding_mode is not None or out is not None:
        return None
    param = left if id(left) in views else right
    with torch.no_grad():
        factor = 1 / right if param is left else -left / (right * right)
    use = _scale(views[id(param)], param, factor, broadcast(left.shape, right.shape))
    return None if use is None else [use]


def _divided_by(views: Views, right: Any, left: Any) -> list[Use] | None:
    return _divide(views, left, right)


def _subtract(views: Views, left: Any, right: Any, *, alpha: float = 1, out: Any = None) -> list[Use] | None:
    if not _operands(views, left, right) or alpha != 1 or out is not None:
        return None
    param, sign = (left, 1) if id(left) in views else (right, -1)
    if isinstance(views[id(param)].picked(), Tensor):
        return None
    tokens, align = spread_over(param.shape, broadcast(left.shape, right.shape))
    return [Use(views[id(param)], param.shape, tokens, None, align=lambda g: sign * align(g))]


def _subtracted_from(views: Views, right: Any, left: Any, *, alpha: float = 1) -> list[Use] | None:
    return _subtract(views, left, right, alpha=alpha)


def _affine(
    views: Views, plain: Callable[[], Tensor], weight: Tensor | None, bias: Tensor | None, features: list[int],
    shape: torch.Size,
) -> list[Use] | None:  # fmt: skip
    """Describe the end of a normalization: a scale and a shift of channels, [1], or along the last dimensions."""
    leading = shape[: len(shape) - len(features)]

    def align(g: Tensor) -> Tensor:
        return g.reshape(*leading, -1)

    found: list[Use] = []
    for param in (weight, bias):
        if param is None or id(param) not in views:
            continue
        with torch.no_grad():
            x = plain() if param is weight else None
        if features == [1]:
            found.append(by_channel(views[id(param)], param, x, shape[0]))
        elif x is None:
            found.append(Use(views[id(param)], param.shape, leading, None, align=align))
        else:
            found.append(Scale(views[id(param)], param.shape, leading, align(x), align=align))
    return None if any(isinstance(use.view.picked(), Tensor) for use in found) else found


def _layer_norm(views: Views, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
                bias: Tensor | None = None, eps: float = 1e-5, *_: Any, **__: Any) -> list[Use] | None:  # fmt: skip
    x, count = input.detach(), 1 if isinstance(normalized_shape, int) else len(normalized_shape)
    features = list(range(-count, 0))
    return _affine(
        views, lambda: functional.layer_norm(x, tuple(x.shape[-count:]), None, None, eps), weight, bias, features,
        x.shape,
    )  # fmt: skip


def _rms_norm(views: Views, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
              eps: float | None = None) -> list[Use] | None:  # fmt: skip
    x, count = input.detach(), 1 if isinstance(normalized_shape, int) else len(normalized_shape)
    features = list(range(-count, 0))
    return _affine(
        views, lambda: functional.rms_norm(x, tuple(x.shape[-count:]), None, eps), weight, None, features, x.shape
    )


def _group_norm(views: Views, input: Tensor, num_groups: int, weight: Tensor | None = None,
                bias: Tensor | None = None, eps: float = 1e-5, *_: Any) -> list[Use] | None:  # fmt: skip
    x = input.detach()
    return _affine(views, lambda: functional.group_norm(x, num_groups, None, None, eps), weight, bias, [1], x.shape)


def _instance_norm(views: Views, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
                   weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
                   momentum: float = 0.1, eps: float = 1e-5, *_: Any) -> list[Use] | None:  # fmt: skip
    x, (mean, var) = input.detach(), (None, None) if use_input_stats else (running_mean, running_var)

    def plain() -> Tensor:  # without running statistics where they would be updated a second time
        return functional.instance_norm(x, mean, var, None, None, use_input_stats, momentum, eps)

    return _affine(views, plain, weight, bias, [1], x.shape)


def _batch_norm(views: Views, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
                weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
                momentum: float = 0.1, eps: float = 1e-5, *_: Any) -> list[Use] | None:  # fmt: skip
    if training or running_mean is None or running_var is None:
        raise ValueError(
            "per-sample gradients: `batch_norm` normalizes by the statistics of its batch, so that rows depend on "
            "each other and no row has a gradient of its own; use running statistics or another normalization"
        )
    x = input.detach()
    return _affine(
        views, lambda: functional.batch_norm(x, running_mean, running_var, None, None, False, momentum, eps),
        weight, bias, [1], x.shape,
    )  # fmt: skip


ELEMENTWISE: dict[str, Callable[..., list[Use] | None]] = {
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _mul),
    **dict.fromkeys(("mul_", "multiply_", "__imul__"), _mul_in_place),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__", "__div__"), _divide),
    **dict.fromkeys(("__rtruediv__", "__rdiv__"), _divided_by),
    **dict.fromkeys(("sub", "subtract", "__sub__", "sub_", "__isub__"), _subtract),
    **dict.fromkeys(("rsub", "__rsub__"), _subtracted_from),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
}
