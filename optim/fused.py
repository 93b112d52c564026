"""Steps inside the backward pass, so that no more than one gradient exists at a time."""

import sys
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from optim.group_checks import kind_name, label_of
from optim.optimizer import Optimizer
from optim.rule import UpdateRule


class FusedBackward:
    """Steps every parameter as soon as its gradient is complete, and frees the gradient.

    `remove`, or the end of a ``with`` block, ends this; the optimizer then steps as usual.

    Args:
        model: The model.
        optimizer: The optimizer of its parameters.

    Attributes:
        optimizer: The optimizer. Its groups are live: a scheduler drives the next backward pass. Its `step` only has
            parameters left whose gradient did not come from a backward pass, so that a training loop may call it.

    Example:
        >>> from optim import FusedBackward, create
        >>> model = torch.nn.Linear(4, 2)
        >>> with FusedBackward(model, create("adamw", model, lr=0.1)) as fused:
        ...     model(torch.ones(3, 4)).sum().backward()
        >>> int(fused.optimizer.state[model.weight]["step"]), model.weight.grad
        (1, None)

    Raises:
        ValueError: If the rule of a group lets parameters exchange information, or if no parameter is in both.
        TypeError: For DistributedDataParallel, and for optimizers that exchange gradients or states themselves.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise TypeError(
                "fuse_backward: the model is wrapped in DistributedDataParallel, which averages gradients after they "
                "would be stepped; use FSDP2 (fully_shard), or step as usual"
            )
        if type(optimizer)._step_those is not Optimizer._step_those:
            raise TypeError(
                f"fuse_backward: {type(optimizer).__name__} exchanges data between processes in its step; step as usual"
            )
        for group in optimizer.param_groups:
            if group["rule"].coupled:
                raise ValueError(
                    f"fuse_backward: under {group['rule'].name} the step of one parameter depends on the gradients of "
                    "others, which do not exist yet; choose a rule that steps each parameter alone, such as AdamW"
                )
        own = {id(param) for param in model.parameters()}
        self.optimizer = optimizer
        self._hooks: list[Any] = [
            param.register_post_accumulate_grad_hook(partial(self._step, index=index))
            for index, group in enumerate(optimizer.param_groups)
            for param in group["params"]
            if param.requires_grad and id(param) in own
        ]
        if not self._hooks:
            raise ValueError("fuse_backward: the optimizer has no parameter of this model that requires a gradient")
        self._hooks += [module.register_forward_pre_hook(self._begin) for module in model.modules()]
        self._model = model
        self._stepped: set[Tensor] = set()
        self._groups: set[int] = set()
        self._since_forward: dict[Tensor, bool] = {}  # whether the pass that stepped it was inside another

    def _begin(self, module: nn.Module, _: Any) -> None:
        """Forget what was stepped before this forward pass, unless a backward pass recomputes it."""
        if torch._C._current_graph_task_id() != -1:
            return
        for param in self._since_forward.copy() if module is self._model else module.parameters(recurse=False):
            self._since_forward.pop(param, None)

    def _check_whole(self, param: Tensor, index: int) -> None:
        """Check that a gradient does not arrive in parts, of which the first one has been stepped."""
        nested = _inside_another_pass()
        if param in self._since_forward and (nested or self._since_forward[param]):
            groups = self.optimizer.param_groups
            group, offset = groups[index], sum(len(g["params"]) for g in groups[:index])
            place = next(i for i, other in enumerate(group["params"]) if other is param)
            raise RuntimeError(
                f"fuse_backward: the gradient of parameter {label_of(group, offset, place)} arrives in parts, because "
                "the parameter is used in several places and reentrant activation checkpointing computes each in a "
                "backward pass of its own; it has been stepped with the first part. Use "
                "torch.utils.checkpoint(..., use_reentrant=False), or step as usual"
            )
        self._since_forward[param] = nested

    @torch.no_grad()
    def _step(self, param: Tensor, *, index: int) -> None:
        self._check_whole(param, index)
        if param in self._stepped:  # an earlier pass ended with an error
            self._end_of_pass()
        if not self._stepped:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_pass)
        group = self.optimizer.param_groups[index]
        if index in self._groups and "rounding_step" in group:
            group["rounding_step"] -= 1  # which counts the steps of the group, and not of its parameters
        self._stepped.add(param)
        self._groups.add(index)
        self.optimizer.step_one(param, index)
        param.grad = None

    def _end_of_pass(self) -> None:
        self._stepped.clear()
        self._groups.clear()

    def remove(self) -> None:
        """Let the optimizer step as usual from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def _inside_another_pass() -> bool:
    """Return whether the current backward pass was started by the backward of an autograd function."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def fuse_backward(model: nn.Module, rule: UpdateRule | Optimizer, **settings: Any) -> FusedBackward:
    """Step every parameter inside the backward pass as soon as its gradient is complete, and free the gradient.

    Only one gradient exists at a time, so that the memory for gradients is that of the largest parameter instead of all
    parameters (LOMO). The steps are those of `Optimizer.step` after the backward pass, to the bit.

    Every backward pass is one step of each parameter that it reaches. Gradients can therefore neither be accumulated
    over several backward passes nor be clipped by their common norm, and `torch.amp.GradScaler` cannot undo an
    overflow. Parameters that are frozen now are stepped by `optimizer.step()` if they get a gradient later. Activation
    checkpointing works; with ``use_reentrant=True`` a parameter that is used in several places ends the pass with an
    error, because its gradient arrives in parts.

    Args:
        model: The model.
        rule: The rule of all parameters that require a gradient, or an optimizer of the model's parameters (such as
            `create("muon", model, ...)`).
        settings: `lr` and, if not 0, `weight_decay`, for a rule; nothing for an optimizer.

    Returns:
        An object with the `optimizer`, and with `remove`.

    Raises:
        ValueError: If the rule lets parameters exchange information (`UpdateRule.coupled`), or for values out of range.
        TypeError: For DistributedDataParallel and optimizers that exchange data between processes, and for missing or
            unknown settings.

    Source:
        Lv et al. 2023, arXiv 2306.09782 (LOMO).

    Example:
        >>> from optim import AdamWRule, fuse_backward
        >>> model = torch.nn.Linear(4, 2)
        >>> fused = fuse_backward(model, AdamWRule(), lr=1e-3)
        >>> before = model.weight.detach().clone()
        >>> model(torch.ones(3, 4)).square().mean().backward()
        >>> bool((model.weight != before).all()), model.weight.grad
        (True, None)
    """
    if isinstance(rule, Optimizer):
        if settings:
            raise TypeError(f"fuse_backward: {', '.join(settings)} belong to the groups of the given optimizer")
        return FusedBackward(model, rule)
    if not isinstance(rule, UpdateRule):
        raise TypeError(f"fuse_backward: rule is {kind_name(rule)}; expected one such as AdamWRule(), or an optimizer")
    if "lr" not in settings:
        raise TypeError("fuse_backward: a rule needs a learning rate; pass lr=...")
    return FusedBackward(model, Optimizer(model, rule, **settings))
