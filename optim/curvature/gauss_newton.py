"""The Gauss-Newton matrix of a cross-entropy loss: its diagonal from sampled labels, and exact products with it.

It is the positive semi-definite part of the Hessian.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from optim.curvature.losses import (
    Parts,
    add,
    graph_leaves,
    mean_over_ranks,
    mix,
    parts_of,
    private,
    rank_count,
    refuse_sharded,
    scalar,
)


class NoCrossEntropy(ValueError):
    """A loss does not call torch.nn.functional.cross_entropy, so that its Gauss-Newton matrix is not known."""


class CrossEntropies(TorchFunctionMode, ABC):
    """A mode that sees every call of torch.nn.functional.cross_entropy and may change its arguments."""

    @abstractmethod
    def replaced(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call that are to be replaced.

        Args:
            given: The arguments of the call, by name.

        Returns:
            New values, by the names of the arguments.
        """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.cross_entropy:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(functional.cross_entropy).bind(*args, **(kwargs or {})).arguments
        return func(**given | self.replaced(given))


def gauss_newton(loss_fn: Parts, params: Sequence[Tensor], *, seed: int) -> list[Tensor | None]:
    """Return B g^2 for each parameter: the diagonal of the Gauss-Newton matrix in expectation (Gauss-Newton-Bartlett).

    Here g is the gradient of the mean loss over B labels drawn from the model's own distribution. In every
    `torch.nn.functional.cross_entropy` of the loss, the labels are replaced by sampled ones, except for ignored labels.

    Args:
        loss_fn: A function that computes the loss, or several functions whose sum is the loss.
        params: The parameters, of any shapes.
        seed: The seed of the labels.

    Returns:
        One tensor per parameter, of its shape; None if no rank's loss depends on it.

    Raises:
        NoCrossEntropy: A ValueError, if the loss does not call cross_entropy.
        TypeError: For sharded parameters.

    Source:
        Liu et al. 2023, arXiv 2305.14342, algorithm 2.

    Example:
        >>> from optim import curvature
        >>> w = torch.zeros(3, 4, requires_grad=True)
        >>> x, y = torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> (diagonal,) = curvature.gauss_newton(lambda: torch.nn.functional.cross_entropy(x @ w.T, y), [w], seed=0)
        >>> diagonal.shape, bool((diagonal >= 0).all())
        (torch.Size([3, 4]), True)
    """
    refuse_sharded(params)
    total: list[Tensor | None] = [None] * len(params)
    labels = _SampledLabels(seed)
    losses = parts_of(loss_fn)  # empty on a rank that has no part of the batch
    with private(params):
        for part in losses:
            with labels:
                loss = scalar(part())
            add(total, torch.autograd.grad(loss, list(params), allow_unused=True))
    if losses and labels.calls == 0:
        raise NoCrossEntropy(
            "curvature: this loss does not call torch.nn.functional.cross_entropy, whose labels could be sampled; "
            "compute your own estimate and pass it to curvature.absorb"
        )
    averaged = mean_over_ranks(total, params)
    terms = labels.terms
    if rank_count() > 1 and params:
        terms = terms.to(params[0].device)  # NCCL does not accept CPU tensors
        dist.all_reduce(terms)
    return [None if g is None else terms.to(g.device) * g * g for g in averaged]


def gauss_newton_product(
    loss: Callable[[], Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """Return J^T H_z J v for each parameter: the product of the Gauss-Newton matrix with v.

    Here z are the logits that the loss passes to cross_entropy, J = dz/dparams, and H_z is the Hessian of the loss with
    respect to z. The matrix G is the Hessian without the curvature of the model itself (Schraudolph 2002). It equals
    the Hessian if z is linear in the parameters, and v^T G v >= 0. J v is computed by differentiating J^T w with
    respect to w, so that any kernel with a second derivative works. Parts of the loss that do not pass through
    cross_entropy are ignored.

    Args:
        loss: A function that computes the loss.
        params: The parameters, of any shapes.
        vectors: v, one tensor per parameter, of its shape and dtype.

    Returns:
        One tensor per parameter, of its shape and dtype.

    Cost:
        About three gradients, and the memory of a graph of the gradient.

    Raises:
        NoCrossEntropy: A ValueError, for a loss that never calls torch.nn.functional.cross_entropy.

    Example:
        >>> from optim import curvature
        >>> w = torch.zeros(3, 4, requires_grad=True)
        >>> x, y, v = torch.ones(8, 4), torch.zeros(8, dtype=torch.int64), torch.ones(3, 4)
        >>> loss = lambda: torch.nn.functional.cross_entropy(x @ w.T, y)
        >>> curvature.gauss_newton_product(loss, [w], [v])[0].abs().max() < 1e-6  # equal logits move alike
        tensor(True)
    """
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), _Logits() as seen:
        value = loss()
    if not seen.logits:
        raise NoCrossEntropy(
            "curvature: Gauss-Newton products need a loss computed by torch.nn.functional.cross_entropy of logits, "
            "which this loss does not call"
        )
    for z in seen.logits:
        graph_leaves(z)  # refuses a graph that hides parameters
    probes = [torch.zeros_like(z, requires_grad=True) for z in seen.logits]
    pulled = torch.autograd.grad(seen.logits, params, probes, create_graph=True, allow_unused=True)
    used = [(g, v) for g, v in zip(pulled, vectors, strict=True) if g is not None]
    pushed = torch.autograd.grad([g for g, _ in used], probes, [v for _, v in used], retain_graph=True)
    slopes = torch.autograd.grad(value, seen.copies, create_graph=True)
    bent = torch.autograd.grad(slopes, seen.copies, pushed)
    found = torch.autograd.grad(seen.logits, params, bent, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(params, found, strict=True)]


class _SampledLabels(CrossEntropies):
    """Replace the labels of cross_entropy by labels drawn from its own logits, and count terms that are not ignored."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.calls, self.terms = seed, 0, torch.zeros(())

    def replaced(self, given: dict[str, Any]) -> dict[str, Any]:
        logits, target = given["input"].detach(), given["target"]
        spread = logits.movedim(1 if logits.ndim > 1 else 0, -1).float().softmax(-1)
        flat = spread.reshape(-1, spread.shape[-1]).nan_to_num(nan=1.0)  # the gradient will show NaNs
        generator = torch.Generator(logits.device).manual_seed(mix(self.seed, self.calls))
        drawn = flat.new_empty(0, dtype=torch.int64)
        if len(flat):
            drawn = torch.multinomial(flat, 1, generator=generator)
        labels = drawn.reshape(spread.shape[:-1])
        if not target.is_floating_point():
            ignored = target == given.get("ignore_index", -100)
            labels = torch.where(ignored, target, labels)
            self.terms = self.terms + (~ignored).sum().cpu()
        else:
            self.terms = self.terms + labels.numel()
        self.calls += 1
        return {"target": labels, "label_smoothing": 0.0}


class _Logits(CrossEntropies):
    """Replace the `logits` of cross_entropy by `copies`, so that the loss and the model are separate graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []
        self.copies: list[Tensor] = []

    def replaced(self, given: dict[str, Any]) -> dict[str, Any]:
        self.logits.append(given["input"])
        self.copies.append(given["input"].detach().requires_grad_())
        return {"input": self.copies[-1]}
