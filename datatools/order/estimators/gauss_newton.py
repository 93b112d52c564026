"""Products with the Gauss-Newton matrix: the part of the Hessian that is never negative."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from datatools.errors import UsageError


def product(loss: Callable[[], Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """J^T H_z J v for each parameter: z the logits that the loss hands to cross_entropy, J = dz/dparams, and H_z the
    Hessian of the loss in z.

    The Hessian without the curvature of the model itself (Schraudolph 2002); equal to it where z is linear in the
    parameters, and v^T G v >= 0. J v by differentiating J^T w in w, so any kernel with a second derivative will do.
    Cost: about three gradients, and the memory of a graph of the gradient. What of the loss does not pass through
    cross_entropy does not count.
    Raises: UsageError for a loss that never calls torch.nn.functional.cross_entropy.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), _Logits() as seen:
        value = loss()
    if not seen.logits:
        raise UsageError(
            "order: Gauss-Newton products need a loss by torch.nn.functional.cross_entropy of logits; this one calls "
            "none. Use hvp_method 'auto'"
        )
    probes = [torch.zeros_like(z, requires_grad=True) for z in seen.logits]
    pulled = torch.autograd.grad(seen.logits, params, probes, create_graph=True, allow_unused=True)
    used = [(g, v) for g, v in zip(pulled, vectors, strict=True) if g is not None]
    pushed = torch.autograd.grad([g for g, _ in used], probes, [v for _, v in used], retain_graph=True)
    slopes = torch.autograd.grad(value, seen.copies, create_graph=True)
    bent = torch.autograd.grad(slopes, seen.copies, pushed)
    found = torch.autograd.grad(seen.logits, params, bent, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(params, found, strict=True)]


class _Logits(TorchFunctionMode):
    """While active, cross_entropy reads copies (`copies`) of its `logits`: loss and model are two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []
        self.copies: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.cross_entropy:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(functional.cross_entropy).bind(*args, **(kwargs or {})).arguments
        self.logits.append(given["input"])
        self.copies.append(given["input"].detach().requires_grad_())
        return func(**given | {"input": self.copies[-1]})
