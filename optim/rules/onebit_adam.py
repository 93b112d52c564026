"""1-bit Adam: after a warm-up the second moment is frozen, and workers exchange the signs of the first moment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from optim import cpu_jit
from optim.checks import check_counts, check_non_negative, checked_betas
from optim.distributed.collectives import all_reduced_means, group_size
from optim.distributed.onebit import compressed_means, padded
from optim.moments import zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule
from optim.sharding import is_sharded


@dataclass(frozen=True, kw_only=True)
class OneBitAdamRule(UpdateRule):
    """1-bit Adam: Adam without bias correction, whose second moment is frozen after a warm-up.

        u = m / (sqrt(v) + eps),  m <- b1 m + (1 - b1) g

    In the first `freeze_step` steps v <- b2 v + (1 - b2) g^2; after that v does not change.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.
        freeze_step: The number of warm-up steps. The paper and its code recommend 15 to 25 per cent of all steps.

    Shapes:
        Elementwise. The moments have the parameter's shape.

    State:
        8 bytes per parameter (two float32 moments) and a step count.

    Source:
        Tang et al. 2021, arXiv 2102.02888, algorithm 1; DeepSpeed, runtime/fp16/onebit/adam.py.

    Differs:
        See `OneBitAdam`, which adds the communication between workers.
    """

    name: ClassVar[str] = "onebit_adam"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    freeze_step: int = 100_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("OneBitAdamRule", self.betas))
        check_non_negative("OneBitAdamRule", eps=self.eps)
        check_counts("OneBitAdamRule", freeze_step=self.freeze_step)

    def init(self, param: OfParam) -> State:
        """Return zero moments and a zero step count.

        Raises:
            ValueError: For a shard, because workers hold whole parameters.
        """
        if is_sharded(param):
            raise ValueError(
                "OneBitAdamRule: a parameter is sharded, but every worker needs whole parameters, as under DDP"
            )
        return {"step": zero_step(), "exp_avg": zero_moment(param), "exp_avg_sq": zero_moment(param)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        m, v = state["exp_avg"], state["exp_avg_sq"]
        g = grad.to(m.dtype)
        t = state["step"] + 1
        m = b1 * m + (1 - b1) * g
        v = torch.where((t > self.freeze_step).to(v.device), v, b2 * v + (1 - b2) * g * g)
        return m / (v.sqrt() + self.eps), {"step": t, "exp_avg": m, "exp_avg_sq": v}


class OneBitAdam(Optimizer):
    """1-bit Adam on several workers, each with the gradient of its own data.

    During the warm-up, gradients are averaged by all-reduce. After it, every worker updates the shared momentum with
    its own gradient, and `compressed_means` synchronises the momentum again with one bit per entry. Therefore nothing
    else may average gradients after the warm-up: do not use `DistributedDataParallel`, or back-propagate under its
    `no_sync()`. With one process nothing is sent or compressed. After the warm-up, a gradient that is not finite on one
    worker would make the scale of its tensor NaN on all of them. Such a tensor and its errors are left unchanged on all
    workers, with a warning.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps, freeze_step: See `OneBitAdamRule`.
        weight_decay: Decoupled weight decay.
        process_group: The workers; all processes by default.
        masks: A mapping from a parameter's name to a tensor of zeros and ones. Where the mask is 0, the momentum is set
            to 0 after each exchange.
        mask_unseen: Whether entries with v = 0 at the freeze are masked as well. An exact zero cannot be sent, so that
            m / eps would grow without bound there.

    Raises:
        ValueError: For a mask with an unknown name or another shape, and for sharded parameters.

    State:
        That of `OneBitAdamRule`. In addition each worker has the errors of its own compression, 4 bytes per parameter,
        and 4 / workers bytes per parameter as a server. They differ between workers and are not saved in checkpoints: a
        resumed run starts them at 0, as the published code does.

    Differs:
        The published code discards the first gradient during its set-up and therefore updates v only
        ``freeze_step - 1`` times; here v is updated `freeze_step` times. The published code has no `mask_unseen`, which
        corresponds to False, and sends each tensor separately. Here one message contains all tensors, with the same
        content.

    Example:
        >>> import torch
        >>> from optim import OneBitAdam
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = OneBitAdam(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        freeze_step: int = 100_000,
        *,
        masks: Mapping[str, Tensor] | None = None,
        mask_unseen: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.process_group, self.mask_unseen = process_group, mask_unseen
        self._errors: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._masks: dict[Tensor, Tensor] = {}
        rule = OneBitAdamRule(betas=betas, eps=eps, freeze_step=freeze_step)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
        named = dict(
            pair
            for g in self.param_groups
            if "param_names" in g
            for pair in zip(g["param_names"], g["params"], strict=True)
        )
        for name, mask in (masks or {}).items():
            if name not in named:
                raise ValueError(f"OneBitAdam: masks has {name!r}, which is not the name of a parameter")
            if mask.shape != named[name].shape:
                raise ValueError(
                    f"OneBitAdam: the mask of {name!r} has shape {tuple(mask.shape)}, not {tuple(named[name].shape)}"
                )
            self._masks[named[name]] = mask

    def __getstate__(self) -> dict[str, Any]:
        """Add the errors and masks to what torch copies and pickles, which is groups and states."""
        own = ("process_group", "mask_unseen", "_errors", "_masks")
        return super().__getstate__() | {key: getattr(self, key) for key in own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as `Optimizer` does; the compression errors, which belong to the earlier run, start at 0."""
        super().load_state_dict(state_dict)
        self._errors.clear()

    def _step_those(
        self, rule: UpdateRule, params: list[Tensor], grads: list[Tensor], *, lr: float | Tensor, weight_decay: float
    ) -> list[bool]:
        if group_size(self.process_group) == 1 or not isinstance(rule, OneBitAdamRule):
            return super()._step_those(rule, params, grads, lr=lr, weight_decay=weight_decay)
        states = self._states_of(rule, params)
        # by step counts, which are equal on all workers but lower for a parameter that sometimes had no gradient
        early = [i for i, state in enumerate(states) if state["step"] < rule.freeze_step]
        late = [i for i, state in enumerate(states) if state["step"] >= rule.freeze_step]
        if early:
            means = all_reduced_means([grads[i] for i in early], self.process_group)
            super()._step_those(rule, [params[i] for i in early], means, lr=lr, weight_decay=weight_decay)
        fine = [True] * len(params)
        for i, good in zip(late, self._finite_everywhere([grads[i] for i in late]), strict=True):
            fine[i] = good
        late = [i for i in late if fine[i]]
        if late:
            self._compressed(rule, [(params[i], grads[i], states[i]) for i in late], lr, weight_decay)
        return fine

    def _finite_everywhere(self, grads: Sequence[Tensor]) -> list[bool]:
        """Return whether each gradient is finite on all workers; one byte per gradient is sent."""
        if not grads:
            return []
        fine = torch.tensor(cpu_jit.all_finite(grads), dtype=torch.uint8, device=grads[0].device)
        dist.all_reduce(fine, op=dist.ReduceOp.MIN, group=self.process_group)
        return [bool(good) for good in fine.tolist()]

    def _compressed(
        self, rule: OneBitAdamRule, entries: Sequence[tuple[Tensor, Tensor, State]], lr: float | Tensor, decay: float
    ) -> None:
        b1 = rule.betas[0]
        for _, grad, state in entries:
            state["step"] += 1
            state["exp_avg"].mul_(b1).add_(grad.to(state["exp_avg"].dtype), alpha=1 - b1)
        moments = [state["exp_avg"] for _, _, state in entries]
        errors = [self._errors_of(param, m) for (param, _, _), m in zip(entries, moments, strict=True)]
        for (param, _, state), m in zip(entries, compressed_means(moments, errors, self.process_group), strict=True):
            if param in self._masks:
                m = m * self._masks[param].to(m)
            if self.mask_unseen:
                m = torch.where(state["exp_avg_sq"] == 0, 0.0, m)
            state["exp_avg"].copy_(m)
            work = param.to(m.dtype)
            direction = m / (state["exp_avg_sq"].sqrt() + rule.eps)
            param.copy_(work - lr * (direction + decay * work if decay else direction))

    def _errors_of(self, param: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Return the errors so far of what this worker sent, as a worker and as a server."""
        if param not in self._errors:
            workers = group_size(self.process_group)
            size = padded(param.numel(), workers)
            self._errors[param] = moment.new_zeros(size), moment.new_zeros(size // workers)
        return self._errors[param]
