"""Rules that read a curvature, and the function that renews it."""

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from optim.checks import check_positive_counts
from optim.curvature.gauss_newton import gauss_newton
from optim.curvature.hutchinson import draw, hutchinson
from optim.curvature.losses import Parts, mix, rank_count, refuse_sharded
from optim.moments import moment_dtype
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class CurvatureRule(UpdateRule):
    """A rule whose state has an entry that `update` reads and that only `refresh` renews, every `refresh_every` steps.

    Before the first refresh, `update` must work sensibly without it.

    Args:
        refresh_every: The number of steps from one refresh to the next.

    Example:
        >>> from optim import SophiaGRule, curvature
        >>> issubclass(SophiaGRule, curvature.CurvatureRule), SophiaGRule.probe
        (True, 'labels')
    """

    probe: ClassVar[Literal["labels", "normal", "signs"]]
    """The estimator: `gauss_newton` with sampled labels, or `hutchinson` with normal vectors or random signs."""

    refresh_at_start: ClassVar[bool] = True
    """Whether the first refresh is before the first step, or after `refresh_every` steps."""

    refresh_every: int = 10

    @property
    def uncodable(self) -> str:
        """Why the state cannot be stored as codes: it contains a curvature."""
        return "not a rule that reads a curvature, which is written to its state from outside"

    def __post_init__(self) -> None:
        check_positive_counts(type(self).__name__, refresh_every=self.refresh_every)

    @abstractmethod
    def absorb(self, estimate: OfParam, state: State) -> State:
        """Return the entries of the state that an estimate of the diagonal renews, without changing the arguments.

        Args:
            estimate: The estimate, of the parameter's shape.
            state: The state of the parameter.

        Returns:
            The entries of the state that change.
        """


def refresh(optimizer: torch.optim.Optimizer, loss_fn: Parts, *, every: int | None = None, seed: int = 0) -> bool:
    """Renew the curvature of every parameter whose rule reads one, if it is due.

    Call it before every `optimizer.step()`, with the unscaled loss of the current batch that is minimised. The rules
    determine which estimate they need, with at most two passes over the batch each; without such rules nothing happens.

    Only the curvature entries of the optimizer's state change; parameters, gradients and the global generators do not.
    The loss is computed as `loss_fn` computes it: dropout is drawn as in the next forward pass and not as in that of
    this step, and these passes also update buffers that a forward pass updates (BatchNorm's statistics). Steps are
    counted by the optimizer's state, and probes are seeded by (seed, step, parameter), so that a resumed run continues
    bit for bit. With `torch.distributed`, probes are the same on all ranks, labels are not, and estimates are averaged:
    call it on all ranks. A parameter on which the loss does not depend keeps its curvature, and so does one whose
    estimate is not finite, with a RuntimeWarning that names it.

    Args:
        optimizer: The optimizer.
        loss_fn: A function that computes the loss and its graph. For rules with sampled labels (Sophia-G) it must be a
            mean of `torch.nn.functional.cross_entropy` over all label terms, whose labels are replaced while it runs.
        every: The number of steps from one refresh to the next; the rules' own `refresh_every` by default.
        seed: The seed of probes and labels.

    Returns:
        Whether a refresh was due.

    Raises:
        ValueError: For an unsuitable loss.
        TypeError: For sharded parameters.

    Example:
        >>> from optim import SophiaH, curvature
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = SophiaH([w], lr=0.01)
        >>> curvature.refresh(optimizer, lambda: (w**4).sum())
        True
    """
    if every is not None:
        check_positive_counts("curvature.refresh", every=every)
    refuse_sharded(param for _, _, param in _wanting(optimizer) if param.requires_grad)
    step = _steps_taken(optimizer)
    due: dict[str, dict[int, Tensor]] = {}
    for index, rule, param in _wanting(optimizer):
        k = rule.refresh_every if every is None else every
        if step % k == 0 and (step > 0 or rule.refresh_at_start) and param.requires_grad:
            due.setdefault(rule.probe, {})[index] = param
    for probe, entries in due.items():
        params = list(entries.values())
        if probe == "labels":
            rank = dist.get_rank() if rank_count() > 1 else 0
            found = gauss_newton(loss_fn, params, seed=mix(seed, step, "labels", rank))
        else:
            probes = [draw(p, probe, mix(seed, step, index)) for index, p in entries.items()]
            found = hutchinson(loss_fn, params, probes)
        absorb(optimizer, {p: h for p, h in zip(params, found, strict=True) if h is not None})
    return bool(due)


@torch.no_grad()
def absorb(optimizer: torch.optim.Optimizer, estimates: Mapping[Tensor, Tensor]) -> None:
    """Pass estimates of the Hessian's diagonal to the rules, however they were computed.

    It creates a parameter's state if there is none. An estimate that is not finite is ignored, with a RuntimeWarning.

    Args:
        optimizer: The optimizer.
        estimates: A mapping from parameter to estimate, of the parameter's shape.

    Example:
        >>> from optim import SophiaH, curvature
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = SophiaH([w], lr=0.01, betas=(0.9, 0.5))
        >>> curvature.absorb(optimizer, {w: torch.tensor([4.0, 8.0])})
        >>> optimizer.state[w]["hessian"]
        tensor([2., 4.])
    """
    for index, rule, param in _wanting(optimizer):
        if param not in estimates:
            continue
        estimate = estimates[param].to(moment_dtype(param))
        if not bool(estimate.isfinite().all()):
            warnings.warn(
                f"parameter {_label(optimizer, index)}: its curvature is not finite; {rule.name} keeps the old one",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        state = optimizer.state[param]
        if not state:
            state.update(rule.init(param))
        for key, value in rule.absorb(estimate, state).items():
            state[key].copy_(value)


def _wanting(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, CurvatureRule, Tensor]]:
    """Yield (position in the optimizer, rule, parameter) for every parameter whose rule reads curvature."""
    offset = 0
    for group in optimizer.param_groups:
        if isinstance(group.get("rule"), CurvatureRule):
            for i, param in enumerate(group["params"], start=offset):
                yield i, group["rule"], param
        offset += len(group["params"])


def _steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of steps so far: that of the parameter with the most (others may have been frozen)."""
    return max((int(optimizer.state[p]["step"]) for _, _, p in _wanting(optimizer) if p in optimizer.state), default=0)


def _label(optimizer: torch.optim.Optimizer, index: int) -> str:
    names = [n for group in optimizer.param_groups for n in group.get("param_names", [None] * len(group["params"]))]
    return f"number {index}" if names[index] is None else repr(names[index])
