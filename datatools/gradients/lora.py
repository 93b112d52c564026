"""LoRA layers, whose two matrices get their gradients from the input and the output of the whole layer.

y = W x + c B A x:   dA_i = c sum_s (B^T g_is) x_is^T,   dB_i = c sum_s g_is (A x_is)^T
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from datatools.gradients.layers import Adapter, is_conv1d
from datatools.gradients.uses import Use, View


@dataclass(eq=False)
class AdapterUse(Use):
    """A call of a LoRA layer: one input and one output for both of its matrices.

    Attributes:
        adapter: the layer.

    """

    adapter: Adapter | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of A and B."""
        assert self.adapter is not None
        return self.adapter.name_a, self.adapter.name_b

    def contract(self, x: Float[Tensor, "b n in"] | None, g: Float[Tensor, "b n out"]) -> dict[str, Tensor]:
        """Compute the gradients of A and B.

        Args:
            x: inputs, floating dtype [b, n, in].
            g: output gradients, floating dtype [b, n, out].

        Returns:
            Name -> gradients [b, r, in] and [b, out, r], summed over n.

        """
        one = self.adapter
        assert one is not None and x is not None
        x, g = x.to(one.a.dtype), g.to(one.a.dtype)  # adapters are float32 even on a bfloat16 model
        return {
            one.name_a: (g @ (one.b * one.scale)).mT @ x,
            one.name_b: g.mT @ (x @ (one.a * one.scale).mT),
        }


@contextmanager
def watch_adapter(
    one: Adapter, watched: Iterable[Tensor], used: Callable[[list[Use], Tensor, bool], Tensor]
) -> Iterator[None]:
    """Treat each call of a LoRA layer as one use.

    In float32, it runs as one product with W + c B A: the same function in exact arithmetic, at the cost of the
    plain layer. In lower precisions, where the sum would round the adapter away, the two paths stay separate.

    Args:
        one: the layer.
        watched: other parameters whose gradients are asked for.
        used: (uses, output, whether an input was changed in place) -> output, which may be replaced.

    Yields:
        Once, while the layer is watched.

    """

    def capture(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        x = inputs[0]
        use = AdapterUse(View(one.name_a), x.shape, x.shape[:-1], x.detach(), adapter=one)
        return used([use], output, False)

    base: Any = one.module.base_layer
    merges = type(base) is nn.Linear or is_conv1d(base)
    alone = not {id(p) for p in base.parameters()} & {id(p) for p in watched}
    plain = "forward" not in one.module.__dict__  # otherwise other code has wrapped it, and stays
    if merges and alone and plain and base.weight.dtype == torch.float32:
        weight = base.weight.detach().mT if is_conv1d(base) else base.weight.detach()
        one.module.forward = _linear(torch.addmm(weight, one.b, one.a, alpha=one.scale), base.bias)
    handle = one.module.register_forward_hook(capture)
    try:
        yield
    finally:
        handle.remove()
        if plain:
            one.module.__dict__.pop("forward", None)


def _linear(weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return functional.linear(x, weight, bias)

    return forward
