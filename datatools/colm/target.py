"""The matrix whose per-sample gradients are features, and properties of the model around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from datatools.colm.value_rows import Kind


@dataclass(frozen=True, eq=False)
class Target:
    """A matrix inside a late decoder layer whose gradient is a row's feature; `LastLayer.of` finds it.

    Attributes:
        layers: the decoder layers up to the one that calls it first, in the order of their calls.
        projection: the linear layer.
        sharing: all layers that use its weight; there are several in models that repeat a layer.
        name: the parameter, as in `model.named_parameters()`: LoRA's B if the projection has an adapter, else its
            weight.
        outputs: which outputs of the projection count: for a joint projection, those that are values.
        shape: [outputs, inputs] of the matrix, or [outputs, rank].
        parameter: the parameter itself, floating dtype.
        transposed: whether the parameter is stored as [inputs, outputs], as in GPT-2's Conv1D.
        adapter: name of the LoRA adapter; None without one.
        kind: "values"; "output", the output projection of the last mixer, in models where no layer computes values
            (Mamba); "named", all outputs of a projection that was requested by name.
        product: whether gradients are products of the projection's inputs and output gradients, whose first dimension
            is the row; if not, there is one backward pass per row.
        replays: whether running the model from that layer on gives the same losses as running it whole.
        forwards: whether torch's forward-mode derivative is correct for this model.

    """

    layers: tuple[nn.Module, ...]
    projection: nn.Module
    sharing: tuple[nn.Module, ...]
    name: str
    outputs: slice | Int64[Tensor, " outputs"]
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
        """Number of elements of the matrix."""
        return self.shape[0] * self.shape[1]

    def embed(self, direction: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "rows columns"]:
        """Extend a direction of the matrix to the whole parameter, with zeros for outputs that do not count.

        Args:
            direction: floating dtype [outputs, inputs].

        Returns:
            In the shape and dtype of the parameter.

        """
        whole = torch.zeros_like(self.parameter)
        (whole.T if self.transposed else whole)[self.outputs] = direction.to(whole.dtype)
        return whole

    def part(self, grad: Float[Tensor, "rows columns"]) -> Float[Tensor, "outputs inputs"]:
        """Extract the outputs that count from a gradient of the whole parameter.

        Args:
            grad: in the shape of the parameter.

        Returns:
            [outputs, inputs].

        """
        return (grad.T if self.transposed else grad)[self.outputs]

    def contract(
        self, x: Float[Tensor, "b ... in"], g: Float[Tensor, "b ... out"]
    ) -> Float32[Tensor, "b outputs inputs"]:
        """Compute per-sample gradients from the inputs and output gradients of the projection.

        Args:
            x: inputs, floating dtype [b, ..., in].
            g: output gradients, floating dtype [b, ..., out].

        Returns:
            float32 [b, outputs, inputs].

        """
        x, g = x.flatten(1, -2), g[..., self.outputs].flatten(1, -2).float()  # latents may have a dimension of heads
        if self.adapter is not None:
            scale = self.projection.scaling[self.adapter]  # type: ignore[index]
            a = self.projection.lora_A[self.adapter].weight.detach()  # type: ignore[index, union-attr]
            x = x.float() @ (a.float() * float(scale)).mT
        return g.mT @ x.float()
