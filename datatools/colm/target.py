"""The matrix whose gradient is a row's feature, and what is known of the model around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datatools.colm.value_rows import Kind


@dataclass(frozen=True, eq=False)
class Target:
    """A matrix inside a late decoder layer, whose gradient is a row's feature; `LastLayer.of` finds it.

    layers: the decoder layers up to the one that calls it first, in the order of their calls. projection: the linear
    layer. sharing: all layers that use its weight; there are several in models that repeat a layer. name: the
    parameter, as in `model.named_parameters()`: LoRA's B if the projection has an adapter, else its weight. outputs:
    which of the projection's outputs count: of a joint projection those that are values. shape: [outputs, inputs] of
    the matrix, or [outputs, rank]. kind: "values"; "output", the output projection of the last mixer, where no layer
    makes values (Mamba); "named", all outputs of a projection that was asked for.
    product: gradients are products of the projection's inputs and output gradients, whose first dimension is the row;
    else there is one backward pass per row. replays: running from that layer on gives what the whole model gives.
    forwards: torch's forward-mode derivative is the derivative.
    """

    layers: tuple[nn.Module, ...]
    projection: nn.Module
    sharing: tuple[nn.Module, ...]
    name: str
    outputs: slice | Tensor
    shape: tuple[int, int]
    parameter: nn.Parameter
    transposed: bool
    adapter: str | None
    kind: Kind
    product: bool = True
    replays: bool = True
    forwards: bool = True

    @property
    def numel(self) -> int:
        """Numbers in the matrix."""
        return self.shape[0] * self.shape[1]

    def embed(self, direction: Tensor) -> Tensor:
        """A direction [*shape] as one of the whole parameter: zero for outputs that do not count."""
        whole = torch.zeros_like(self.parameter)
        (whole.T if self.transposed else whole)[self.outputs] = direction.to(whole.dtype)
        return whole

    def part(self, grad: Tensor) -> Tensor:
        """The outputs that count [*shape] of a gradient of the whole parameter."""
        return (grad.T if self.transposed else grad)[self.outputs]

    def contract(self, x: Tensor, g: Tensor) -> Tensor:
        """Inputs x [b, ..., in] and output gradients g [b, ..., out] -> per-example gradients [b, *shape], float32."""
        x, g = x.flatten(1, -2), g[..., self.outputs].flatten(1, -2).float()  # latents may have a dimension of heads
        if self.adapter is not None:
            scale = self.projection.scaling[self.adapter]  # type: ignore[index]
            a = self.projection.lora_A[self.adapter].weight.detach()  # type: ignore[index, union-attr]
            x = x.float() @ (a.float() * float(scale)).mT
        return g.mT @ x.float()
