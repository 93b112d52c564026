"""Curvature for rules that read a Hessian diagonal (Sophia, AdaHessian): Hessian-vector products, estimates, `refresh`.

    loss = loss_fn()
    loss.backward()
    curvature.refresh(optimizer, loss_fn)  # before the step; does nothing when it is not due, or no rule wants it
    optimizer.step()

The rules themselves only read what `refresh` left in their state.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from optim.rule import State, UpdateRule, moment_dtype
from optim.sharding import is_sharded

Loss: TypeAlias = Callable[[], Tensor]
Parts: TypeAlias = Loss | Sequence[Loss]
"""A function that computes the loss anew, or several (micro-batches) whose sum is the loss; one graph at a time."""

_ONCE_ONLY = re.compile(r"not implemented|double backward|differentiate twice")
"""How torch's errors say that an operation has no second derivative: kernels, torch.compile, once_differentiable."""


@dataclass(frozen=True, kw_only=True)
class CurvatureRule(UpdateRule):
    """A rule whose state has an entry that `update` reads and only `refresh` renews, every `refresh_every` steps.

    Until the first refresh `update` must do something sensible without it.
    """

    probe: ClassVar[Literal["labels", "normal", "signs"]]
    """The estimator: `gauss_newton` with sampled labels, or `hutchinson` with normal vectors or random signs."""

    refresh_at_start: ClassVar[bool] = True
    """Whether the first refresh comes before the first step, or after `refresh_every` of them."""

    refresh_every: int = 10

    def __post_init__(self) -> None:
        _check_every(type(self).__name__ + ": refresh_every", self.refresh_every)

    @abstractmethod
    def absorb(self, estimate: Tensor, state: State) -> State:
        """The entries of the state that an estimate [*shape] of the diagonal renews; arguments untouched."""


def refresh(optimizer: torch.optim.Optimizer, loss_fn: Parts, *, every: int | None = None, seed: int = 0) -> bool:
    """Renew the curvature of every parameter whose rule reads one, if it is due; whether it was.

    Call it before every `optimizer.step()`, with the loss of the current batch, unscaled and as it is minimised. The
    rules say which estimate they want, at most two passes over the batch each; without such rules nothing happens.

    loss_fn: computes the loss and its graph anew. For rules with sampled labels (Sophia-G) it is a mean of
    `torch.nn.functional.cross_entropy` over all label terms, whose labels are replaced while it runs.
    every: steps from one refresh to the next; the rules' own `refresh_every` by default.

    Of the optimizer nothing but the curvature entries of its state changes; parameters, gradients and the global
    generators are as before. The loss is computed as `loss_fn` computes it: dropout is drawn as the next forward pass
    will draw it, not as the one of this step was, and buffers that a forward pass updates (BatchNorm's statistics) are
    updated by these passes too. Steps are counted by the optimizer's state, and probes are seeded by (seed, step,
    parameter), so a resumed run goes on bit for bit. With `torch.distributed`, probes are the same on all ranks,
    labels are not, and estimates are averaged: call it on all ranks.

    A parameter that the loss does not reach keeps what it has; so does one whose estimate is not finite, with a
    RuntimeWarning that names it.
    Raises: ValueError for an unsuitable loss, TypeError for sharded parameters.
    """
    if every is not None:
        _check_every("curvature.refresh: every", every)
    _refuse_sharded(param for _, _, param in _wanting(optimizer) if param.requires_grad)
    step = _steps_taken(optimizer)
    due: dict[str, dict[int, Tensor]] = {}
    for index, rule, param in _wanting(optimizer):
        k = rule.refresh_every if every is None else every
        if step % k == 0 and (step > 0 or rule.refresh_at_start) and param.requires_grad:
            due.setdefault(rule.probe, {})[index] = param
    for probe, entries in due.items():
        params = list(entries.values())
        if probe == "labels":
            rank = dist.get_rank() if _ranks() > 1 else 0
            found = gauss_newton(loss_fn, params, seed=_mix(seed, step, "labels", rank))
        else:
            probes = [draw(p, probe, _mix(seed, step, index)) for index, p in entries.items()]
            found = hutchinson(loss_fn, params, probes)
        absorb(optimizer, {p: h for p, h in zip(params, found, strict=True) if h is not None})
    return bool(due)


@torch.no_grad()
def absorb(optimizer: torch.optim.Optimizer, estimates: Mapping[Tensor, Tensor]) -> None:
    """Give the rules estimates of the Hessian's diagonal, parameter -> [*shape], however they were made.

    Makes a parameter's state if there is none. An estimate that is not finite is left out, with a RuntimeWarning.
    """
    for index, rule, param in _wanting(optimizer):
        if param not in estimates:
            continue
        estimate = estimates[param].to(moment_dtype(param))
        if not bool(estimate.isfinite().all()):
            warnings.warn(
                f"parameter {_label(optimizer, index)}: its curvature is not finite; {rule.name} keeps what it had",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        state = optimizer.state[param]
        if not state:
            state.update(rule.init(param))
        for key, value in rule.absorb(estimate, state).items():
            state[key].copy_(value)


def hutchinson(loss_fn: Parts, params: Sequence[Tensor], probes: Sequence[Tensor]) -> list[Tensor | None]:
    """z (H z) for each parameter: for independent z with mean 0 and variance 1, the Hessian's diagonal in expectation.

    One product with all parameters at once. Averaged over the ranks of `torch.distributed`, where a rank whose loss
    does not depend on a parameter counts as zero. None where no rank's does.
    """
    products = hvp(loss_fn, params, probes)
    return _averaged([None if h is None else z * h for z, h in zip(probes, products, strict=True)], params)


def gauss_newton(loss_fn: Parts, params: Sequence[Tensor], *, seed: int) -> list[Tensor | None]:
    """B g^2 for each parameter, with g the gradient of the mean loss over B labels drawn from the model's own
    distribution: the diagonal of the Gauss-Newton matrix in expectation (Gauss-Newton-Bartlett).

    Every `torch.nn.functional.cross_entropy` of the loss gets sampled labels in the place of its own; ignored ones
    stay ignored. Source: Liu et al. 2023, arXiv 2305.14342, algorithm 2.
    Raises: ValueError if the loss calls no cross_entropy, TypeError for sharded parameters.
    """
    _refuse_sharded(params)
    total: list[Tensor | None] = [None] * len(params)
    labels = _SampledLabels(seed)
    losses = _parts(loss_fn)  # none on a rank that has no part of the batch
    with private(params):
        for part in losses:
            with labels:
                loss = _scalar(part())
            _add(total, torch.autograd.grad(loss, list(params), allow_unused=True))
    if losses and labels.calls == 0:
        raise ValueError(
            "curvature: this loss calls no torch.nn.functional.cross_entropy, whose labels could be sampled; "
            "make an estimate of your own and give it to curvature.absorb"
        )
    averaged = _averaged(total, params)
    terms = labels.terms
    if _ranks() > 1 and params:
        terms = terms.to(params[0].device)  # NCCL takes no tensors of the CPU
        dist.all_reduce(terms)
    return [None if g is None else terms.to(g.device) * g * g for g in averaged]


def hvp(
    loss_fn: Parts, params: Sequence[Tensor], vectors: Sequence[Tensor], *, method: str = "auto"
) -> list[Tensor | None]:
    """H v for each parameter, H the Hessian of the loss in all `params` together, in the moments' dtype.

    method: "exact" differentiates the gradient, with torch's math kernel for attention, since the fused ones have no
    second derivative. "difference" is (g(p + d v) - g(p - d v)) / 2d: any kernel, but half the digits; parameters move
    and come back bit for bit. "auto" takes the second where an operation of the loss has no second derivative. (A
    custom `autograd.Function` with a once-differentiable backward does not say so: torch counts that part as linear,
    which is noticed only if nothing of the gradient depends on a parameter.)
    Cost: about three gradients, and the memory of a graph of the gradient; "difference" two gradients and a copy.
    None where the loss does not depend on a parameter.
    Raises: ValueError for an unsuitable loss, and for a difference at 16-bit parameters, which would round it away;
    TypeError for sharded parameters.
    """
    if method not in ("auto", "exact", "difference"):
        raise ValueError(f"curvature.hvp: method = {method!r}; it must be 'auto', 'exact' or 'difference'")
    _refuse_sharded(params)
    with private(params):
        if method != "difference":
            try:
                return _exact(_parts(loss_fn), params, vectors)
            except RuntimeError as error:
                if method == "exact" or not _ONCE_ONLY.search(str(error)):
                    raise
                warnings.warn(
                    f"curvature: no second derivative here ({str(error).splitlines()[0]}); using finite differences",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return _difference(_parts(loss_fn), params, vectors)


def draw(param: Tensor, probe: str, seed: int) -> Tensor:
    """A probe of the parameter's shape and dtype from a generator of its own: "normal" or "signs"."""
    generator = torch.Generator(param.device).manual_seed(seed)
    drawn = torch.empty(param.shape, dtype=moment_dtype(param), device=param.device)
    if probe == "normal":
        drawn.normal_(generator=generator)
    else:
        drawn.random_(0, 2, generator=generator).mul_(2).sub_(1)
    return drawn.to(param.dtype)


# ------------------------------------------------------------------------------------------------------------ products


def _exact(parts: Sequence[Loss], params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor | None]:
    total: list[Tensor | None] = [None] * len(params)
    for part in parts:
        with sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(_scalar(part()), list(params), create_graph=True, allow_unused=True)
        used = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None and g.requires_grad]
        products: Sequence[Tensor | None] = [None] * len(params)
        if used:
            products = torch.autograd.grad([g for g, _ in used], list(params), [v for _, v in used], allow_unused=True)
        if all(h is None for h in products):  # zeros would be right for a linear loss, not for kernels without a graph
            raise RuntimeError("second derivative not implemented: the gradient depends on no parameter")
        pairs = zip(grads, products, strict=True)
        _add(total, [torch.zeros_like(g) if h is None and g is not None else h for g, h in pairs])
    return total


def _difference(parts: Sequence[Loss], params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor | None]:
    if any(p.dtype.itemsize < 4 for p in params):
        raise ValueError(
            "curvature: a finite difference at 16-bit parameters would be rounded away; use float32 parameters, or "
            "kernels with second derivatives (attn_implementation='sdpa' or 'eager', no torch.compile)"
        )
    size, length = _norm(params), _norm(vectors)
    relative = 1e-5 if all(p.dtype == torch.float64 for p in params) else 1e-3
    delta = relative * (size or 1.0) / (length or 1.0)
    kept = [p.detach().clone() for p in params]
    sides: list[list[Tensor | None]] = []
    try:
        for sign in (1, -1):
            with torch.no_grad():
                for p, start, v in zip(params, kept, vectors, strict=True):
                    p.copy_(start + sign * delta * v)
            total: list[Tensor | None] = [None] * len(params)
            with private(params):  # the same dropout on both sides
                for part in parts:
                    _add(total, torch.autograd.grad(_scalar(part()), list(params), allow_unused=True))
            sides.append(total)
    finally:
        with torch.no_grad():
            for p, start in zip(params, kept, strict=True):
                p.copy_(start)
    return [None if a is None or b is None else (a - b) / (2 * delta) for a, b in zip(*sides, strict=True)]


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
        generator = torch.Generator(logits.device).manual_seed(_mix(self.seed, self.calls))
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


# ------------------------------------------------------------------------------------------------------------- helpers


def _check_every(what: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} = {value!r}; it must be a whole number of steps, at least 1")


def _wanting(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, CurvatureRule, Tensor]]:
    """(number in the optimizer, rule, parameter) of every parameter whose rule reads curvature."""
    offset = 0
    for group in optimizer.param_groups:
        if isinstance(group.get("rule"), CurvatureRule):
            for i, param in enumerate(group["params"], start=offset):
                yield i, group["rule"], param
        offset += len(group["params"])


def _steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Steps of the optimizer so far: those of the parameter with the most (one may have been frozen in between)."""
    return max((int(optimizer.state[p]["step"]) for _, _, p in _wanting(optimizer) if p in optimizer.state), default=0)


def _label(optimizer: torch.optim.Optimizer, index: int) -> str:
    names = [n for group in optimizer.param_groups for n in group.get("param_names", [None] * len(group["params"]))]
    return f"number {index}" if names[index] is None else repr(names[index])


def _mix(*numbers: object) -> int:
    """One seed of several numbers."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _parts(loss_fn: Parts) -> Sequence[Loss]:
    return [loss_fn] if callable(loss_fn) else loss_fn


def _scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"curvature: loss_fn returned {what}; expected one number that depends on the parameters")
    return loss.reshape(())


def _add(total: list[Tensor | None], more: Sequence[Tensor | None]) -> None:
    """Sum in the moments' dtype, detached; None counts as nothing."""
    for i, value in enumerate(more):
        if value is not None:
            kept = value.detach().to(moment_dtype(value))
            before = total[i]
            total[i] = kept if before is None else before + kept


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _averaged(estimates: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """The mean over all ranks, where a rank whose loss does not reach a parameter counts as zero; None if none does."""
    if _ranks() == 1 or not params:
        return list(estimates)
    reached = torch.tensor([estimate is not None for estimate in estimates], dtype=torch.float32)
    reached = reached.to(params[0].device)
    dist.all_reduce(reached)  # every rank makes the same calls, whatever its own loss reaches
    averaged: list[Tensor | None] = []
    for estimate, param, ranks in zip(estimates, params, reached.tolist(), strict=True):
        if ranks == 0:
            averaged.append(None)
            continue
        mean = torch.zeros(param.shape, dtype=moment_dtype(param), device=param.device)
        if estimate is not None:
            mean.copy_(estimate)
        dist.all_reduce(mean)
        averaged.append(mean / _ranks())
    return averaged


def _refuse_sharded(params: Iterable[Tensor]) -> None:
    if any(map(is_sharded, params)):
        raise TypeError("curvature: a parameter is sharded (DTensor); estimates of shards are not supported")


@contextmanager
def private(params: Sequence[Tensor]) -> Iterator[None]:
    """Gradients enabled, and the global generators as before at the end."""
    gpus = sorted({p.device.index for p in params if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus), torch.enable_grad():
        yield
