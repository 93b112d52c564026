"""Estimates of the Hessian's diagonal."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from optim.curvature.losses import (
    Parts,
    add,
    mean_over_ranks,
    mix,
    parts_of,
    private,
    rank_count,
    refuse_sharded,
    scalar,
)
from optim.curvature.products import hvp
from optim.rule import moment_dtype


def hutchinson(loss_fn: Parts, params: Sequence[Tensor], probes: Sequence[Tensor]) -> list[Tensor | None]:
    """z (H z) for each parameter: for independent z with mean 0 and variance 1, the Hessian's diagonal in expectation.

    One product with all parameters at once. Averaged over the ranks of `torch.distributed`, where a rank whose loss
    does not depend on a parameter counts as zero. None where no rank's does.
    """
    products = hvp(loss_fn, params, probes)
    return mean_over_ranks([None if h is None else z * h for z, h in zip(probes, products, strict=True)], params)


def gauss_newton(loss_fn: Parts, params: Sequence[Tensor], *, seed: int) -> list[Tensor | None]:
    """B g^2 for each parameter, with g the gradient of the mean loss over B labels drawn from the model's own
    distribution: the diagonal of the Gauss-Newton matrix in expectation (Gauss-Newton-Bartlett).

    Every `torch.nn.functional.cross_entropy` of the loss gets sampled labels in the place of its own; ignored ones
    stay ignored. Source: Liu et al. 2023, arXiv 2305.14342, algorithm 2.
    Raises: ValueError if the loss calls no cross_entropy, TypeError for sharded parameters.
    """
    refuse_sharded(params)
    total: list[Tensor | None] = [None] * len(params)
    labels = _SampledLabels(seed)
    losses = parts_of(loss_fn)  # none on a rank that has no part of the batch
    with private(params):
        for part in losses:
            with labels:
                loss = scalar(part())
            add(total, torch.autograd.grad(loss, list(params), allow_unused=True))
    if losses and labels.calls == 0:
        raise ValueError(
            "curvature: this loss calls no torch.nn.functional.cross_entropy, whose labels could be sampled; "
            "make an estimate of your own and give it to curvature.absorb"
        )
    averaged = mean_over_ranks(total, params)
    terms = labels.terms
    if rank_count() > 1 and params:
        terms = terms.to(params[0].device)  # NCCL takes no tensors of the CPU
        dist.all_reduce(terms)
    return [None if g is None else terms.to(g.device) * g * g for g in averaged]


def draw(param: Tensor, probe: str, seed: int) -> Tensor:
    """A probe of the parameter's shape and dtype from a generator of its own: "normal" or "signs"."""
    generator = torch.Generator(param.device).manual_seed(seed)
    drawn = torch.empty(param.shape, dtype=moment_dtype(param), device=param.device)
    if probe == "normal":
        drawn.normal_(generator=generator)
    else:
        drawn.random_(0, 2, generator=generator).mul_(2).sub_(1)
    return drawn.to(param.dtype)


class _SampledLabels(TorchFunctionMode):
    """While active, cross_entropy gets labels drawn from its own logits; counts the terms that are not ignored."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.calls, self.terms = seed, 0, torch.zeros(())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.cross_entropy:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(functional.cross_entropy).bind(*args, **(kwargs or {})).arguments
        logits, target = given["input"].detach(), given["target"]
        spread = logits.movedim(1 if logits.ndim > 1 else 0, -1).float().softmax(-1)
        flat = spread.reshape(-1, spread.shape[-1]).nan_to_num(nan=1.0)  # non-finite: the gradient will show it
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
        return func(**given | {"target": labels, "label_smoothing": 0.0})
