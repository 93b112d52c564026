"""The one optimizer class: param groups, state dicts and torch's conventions around any `UpdateRule`."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from optim import cpu_jit, rounding
from optim.averaging import AveragedWeights
from optim.group_checks import check_gradients, check_params, kind_name, labelled, without_duplicates
from optim.param_groups import by_name, trained
from optim.rule import State, UpdateRule
from optim.saved import (
    adopted_rule,
    bare_name,
    check_splits,
    check_state,
    kept_keys,
    loaded_state,
    native_state,
    saved_rule,
    settle_states,
)
from optim.settings import TORCH_FLAGS, ParamGroup, checked

Params: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""What `torch.optim` accepts (parameters, named parameters or param groups), or a model with its trained parameters."""

Group: TypeAlias = dict[str, Any]
"""A param group: `params`, `lr` and other settings."""

_GRAD, _IS_META, _LAYOUT = attrgetter("grad"), attrgetter("is_meta"), attrgetter("layout")


class Optimizer(AveragedWeights, torch.optim.Optimizer):
    """Step every parameter by the rule of its group: ``p <- p - lr * (direction + weight_decay * decay)``.

    A param group has `rule`, `lr` and `weight_decay`. A group may replace the rule or individual fields of it
    (``{"params": ps, "betas": (0.9, 0.95)}``). Everything that determines the update is in the groups and in `state`.
    Fields can also be read and written by their names: ``group["momentum"] = 0.9`` takes effect from the next step on
    and is part of the state dict. torch's schedulers cycle momentum in this way; see `optim.settings.ParamGroup`.

    `UpdateRule.init` creates the state of a parameter at its first step: plain tensors in the rule's own dtype (float32
    moments for bfloat16 parameters). They keep that dtype after `load_state_dict`, where torch would cast them to the
    dtype of the parameter. A state dict stores each rule as its name and plain fields and can be read with
    ``torch.load(weights_only=True)``. Loading compares the rules, except for settings that were written to a group
    after its creation: those are restored, like `lr`. State dicts of `torch.optim.AdamW`, `SGD`, `NAdam` and `Muon`
    load into the classes of the same names, and `optim.to_torch_state` converts back.

    A parameter without a gradient is skipped and its step count does not change. Under an elementwise rule, non-finite
    entries of a gradient only affect their own coordinates, as in torch. Under a rule with ``elementwise = False`` a
    single one would corrupt a whole matrix, so that tensor and its state are left unchanged for this step and a
    RuntimeWarning names the parameter. To skip the step of a whole model, test the gradients before calling `step`.

    Groups that are added later are divided like those given at construction: by `divide`, in classes that choose the
    rule of each parameter, and by each of the `divisions` (`optim.divide_groups`). The optimizer works with torch's
    schedulers, step and state-dict hooks, closures, `copy.deepcopy` and `torch.compile`, which runs the step uncompiled
    by itself. The torch switches `maximize`, `foreach`, `fused`, `capturable` and `differentiable` are refused.

    Args:
        params: The model, of which the parameters that require a gradient are taken; its parameters, with or without
            names; or param groups.
        rule: The rule of the groups that do not have their own.
        lr: Learning rate, a number or a tensor with one element.
        weight_decay: Decoupled weight decay.

    Raises:
        ValueError: For values out of range.
        TypeError: For complex or integer parameters and for sparse gradients.

    Example:
        >>> from optim import AdamWRule, Optimizer, SGDRule
        >>> model = torch.nn.Linear(4, 2)
        >>> groups = [{"params": [model.weight]}, {"params": [model.bias], "rule": SGDRule(), "lr": 0.1}]
        >>> optimizer = Optimizer(groups, AdamWRule(), lr=1e-3)
        >>> optimizer.param_groups[0]["betas"] = (0.9, 0.95)
        >>> [(group["rule"].name, group["lr"]) for group in optimizer.param_groups]
        [('adamw', 0.001), ('sgd', 0.1)]
    """

    arrived: rounding.Arrived | None = None
    """If set, steps of groups with a `rounding` record here how much of the intended updates they made."""

    divide: Callable[[Group, "Optimizer"], list[Group]] | None = None
    divisions: Sequence[Callable[[Group], list[Group]]] = ()

    def __init__(self, params: Params, rule: UpdateRule, *, lr: float | Tensor, weight_decay: float = 0.0) -> None:
        if not isinstance(rule, UpdateRule):
            raise TypeError(f"Optimizer: rule is {kind_name(rule)}; expected an UpdateRule such as AdamWRule()")
        if isinstance(params, Mapping):
            raise TypeError("Optimizer: params is a dict; pass an iterable such as model.named_parameters()")
        if isinstance(params, nn.Module):
            params = trained(params)
        super().__init__(params, ParamGroup({"rule": rule, "lr": lr, "weight_decay": weight_decay}))

    def __getstate__(self) -> dict[str, Any]:
        """Add the divisions to what torch copies and pickles, which is groups and states."""
        own = {key: self.__dict__[key] for key in ("divide", "divisions") if key in self.__dict__}
        return super().__getstate__() | own

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; fields of its rule that are given next to `params` replace those of the default rule.

        A parameter that the group contains more than once is stepped once, and a warning says so. The group becomes
        several groups if the optimizer divides its parameters, as Muon does into matrices and the rest.

        Args:
            param_group: A dictionary with `params` and settings.

        Raises:
            ValueError: For values out of range, unsupported switches, or a parameter that is in another group.
            TypeError: For parameters that are not real floating-point tensors, for a rule that is not an `UpdateRule`,
                and for parameters without names if names determine the groups. In all these cases, no group is added.
        """
        before = len(self.param_groups)
        try:
            if not isinstance(param_group, dict):
                super().add_param_group(param_group)  # raises an error that says what is wrong
            for group in self._divided_group(dict(param_group)):
                super().add_param_group(group)
                check_params(*list(self._offsets())[-1])
        except (TypeError, ValueError):
            del self.param_groups[before:]
            raise

    def _divided_group(self, group: Group) -> list[Group]:
        if isinstance(group.get("params"), Iterator):
            group["params"] = list(group["params"])
        if "params" in group:
            offset = sum(len(earlier["params"]) for earlier in self.param_groups)
            group["params"] = without_duplicates(group["params"], offset)
        parts = [group] if self.divide is None else self.divide(group, self)
        parts = [self._resolved(part) for part in parts]
        for division in self.divisions:
            parts = [smaller for part in parts for smaller in by_name(division, part)]
        return parts

    def _resolved(self, group: dict[str, Any]) -> ParamGroup:
        """Return the group with its rule built and its values checked."""
        rule = group.get("rule", self.defaults["rule"])
        if not isinstance(rule, UpdateRule):
            raise TypeError(f"param group: rule is {kind_name(rule)}; expected an UpdateRule such as AdamWRule()")
        for flag, advice in TORCH_FLAGS.items():
            if group.pop(flag, None):
                raise ValueError(f"param group: {flag} is not supported; {advice}")
        group["rule"] = rule.with_settings(**{key: group.pop(key) for key in rule.settings() & set(group)})
        for key in ("lr", "weight_decay"):
            group[key] = checked(key, group.get(key, self.defaults[key]))
        resolved = ParamGroup(group)
        resolved.settle()
        return resolved

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient.

        Args:
            closure: A function that computes the loss and its gradients; it is called once, with gradients enabled.

        Returns:
            The value of the closure, or None if there is none.

        Raises:
            TypeError: For a sparse gradient or a parameter on the meta device, before any parameter has changed.
            RuntimeError: If the parameters hold averages since `eval()`.
        """
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @_disable_dynamo  # a step has its own compiled paths, which a new setting does not recompile
    def _step(self) -> None:
        self.check_training()
        work = [(group, offset, *self._ready(group, offset)) for group, offset in self._offsets()]
        for i, (group, _) in enumerate(self._offsets()):
            settle_states(i, group, self.state)
        for group, offset, params, grads in work:
            self._step_group(group, offset, params, grads)

    @_disable_dynamo
    def step_one(self, param: Tensor, index: int) -> None:
        """Step one parameter with its gradient, without the hooks of `step`; `fuse_backward` uses this.

        Args:
            param: The parameter, under a rule that is not `coupled`.
            index: The number of its group.

        Raises:
            TypeError: For a sparse gradient.
            RuntimeError: If the parameters hold averages since `eval()`.
        """
        self.check_training()
        group, offset = list(self._offsets())[index]
        if param.grad is None or param.grad.layout != torch.strided:
            return check_gradients(group, offset)
        settle_states(index, group, self.state)
        self._step_group(group, offset, [param], [param.grad])

    def _step_group(self, group: ParamGroup, offset: int, params: list[Tensor], grads: list[Tensor]) -> None:
        rule: UpdateRule = group["rule"]
        if rule.shares and params:
            params, grads = self._share(rule, group, offset, params, grads)
        if "rounding" in group:
            fine = rounding.step(self._step_those, group, offset, params, grads, self.arrived)
        else:
            fine = self._step_those(rule, params, grads, lr=group["lr"], weight_decay=group["weight_decay"])
        self._warn_of_left(group, offset, params, fine)

    def _step_those(
        self, rule: UpdateRule, params: list[Tensor], grads: list[Tensor], *, lr: float | Tensor, weight_decay: float
    ) -> list[bool]:
        """Step these parameters and return, for each, if it was stepped; `optim.distributed` overrides this."""
        return cpu_jit.step(rule, params, grads, self._states_of(rule, params), lr=lr, weight_decay=weight_decay)

    def _offsets(self) -> Iterator[tuple[ParamGroup, int]]:
        offset = 0
        for i, group in enumerate(self.param_groups):
            if not isinstance(group, ParamGroup):  # other code put a plain dict there
                group = self.param_groups[i] = ParamGroup(group)
            yield group, offset
            offset += len(group["params"])

    def _ready(self, group: dict[str, Any], offset: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the group's parameters that have a gradient, and their gradients, without a loop over many tensors."""
        params: list[Tensor] = group["params"]
        grads: list[Any] = list(map(_GRAD, params))
        if None.__class__ in set(map(type, grads)):
            params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        if any(map(_IS_META, params)) or set(map(_LAYOUT, grads)) - {torch.strided}:
            check_gradients(group, offset)
        return params, grads

    def _share(
        self, rule: UpdateRule, group: dict[str, Any], offset: int, params: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Call `rule.share` for the parameters with finite gradients, and return these parameters and gradients."""
        if not rule.elementwise:
            fine = cpu_jit.all_finite(grads)
            self._warn_of_left(group, offset, params, fine)
            params, grads = ([x for x, good in zip(xs, fine, strict=True) if good] for xs in (params, grads))
        states = self._states_of(rule, params)
        everyone = [self.state[param] for param in group["params"] if self.state.get(param)]
        for state in states:
            state.update(rule.told(state, lr=group["lr"], weight_decay=group["weight_decay"]))
        if params:
            rule.share(grads, states, everyone)
        return params, grads

    def _warn_of_left(self, group: dict[str, Any], offset: int, params: Sequence[Tensor], fine: Sequence[bool]) -> None:
        """Warn about each parameter whose gradient is not finite, by name."""
        if all(fine):
            return
        labels = {param: label for label, param in labelled(group, offset)}
        for param, good in zip(params, fine, strict=True):
            if not good:
                warnings.warn(
                    f"parameter {labels[param]}: its gradient is not finite; {group['rule'].name} left it unchanged",
                    RuntimeWarning,
                    stacklevel=9,  # the line that calls step()
                )

    def _states_of(self, rule: UpdateRule, params: Sequence[Tensor]) -> list[State]:
        """Return the states of the parameters, and create those that do not exist yet."""
        states: list[State] = list(map(self.state.__getitem__, params))
        if not all(states):
            for param, state in zip(params, states, strict=True):
                if not state:
                    state.update(rule.init(param))
        return states

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does, with each group's rule as its name and plain fields, and `param_names`.

        Returns:
            `state` and `param_groups`.
        """

        def describe_rules(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            for group in saved["param_groups"]:
                group["rule"] = group["rule"].describe()

        # first, so that the user's hooks see what will be stored; a permanent hook would not survive deepcopy
        for group, _ in self._offsets():
            group.settle()
        handle = self.register_state_dict_post_hook(describe_rules, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep states in the rule's dtype, and neither change nor alias the input.

        Settings that were written to a group, in the saved optimizer or in this one, are restored as they were saved,
        like `lr`.

        Args:
            state_dict: What `state_dict` returned, of this class or of torch's class of the same name.

        Raises:
            ValueError: If other settings of a group's rule or its parameter names differ from the saved ones, or if a
                parameter's state has other entries or shapes than the rule creates. Nothing is changed in that case.
        """
        seen: dict[str, Any] = {}
        rules: list[UpdateRule] = []
        names = [group.get("param_names") for group in self.param_groups]

        def verify(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:  # runs last, after the user's hooks
            seen.update(saved)
            rules.extend(self._verify(saved))

        def restore(_: torch.optim.Optimizer) -> None:  # runs first, so that hooks see the final state
            self._restore(seen, rules, names)

        handles = (
            self.register_load_state_dict_pre_hook(verify),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _saved_states(
        self, saved: dict[str, Any], rules: Sequence[UpdateRule]
    ) -> Iterator[tuple[str, UpdateRule, Tensor, Mapping[str, Any] | None]]:
        """Yield (label, rule, parameter, saved state with this rule's entries) for every parameter that was saved."""
        for (group, offset), rule, saved_group in zip(self._offsets(), rules, saved["param_groups"], strict=False):
            for (label, param), key in zip(labelled(group, offset), saved_group["params"], strict=False):
                if key in saved["state"]:
                    yield label, rule, param, native_state(rule, saved_group, saved["state"][key])

    def _verify(self, saved: dict[str, Any]) -> list[UpdateRule]:
        """Check a state dict, and return the rules to continue with, group by group."""
        rules = []
        check_splits(self.param_groups, saved["param_groups"])
        for index, ((group, _), saved_group) in enumerate(zip(self._offsets(), saved["param_groups"], strict=False)):
            rule = adopted_rule(group, saved_group)
            found = rule.differences(saved_rule(saved_group, rule))
            if found:
                raise ValueError(
                    f"load_state_dict: param group {index} was saved with another rule: "
                    + "; ".join(found)
                    + ". Build the optimizer with the saved settings."
                )
            rules.append(rule)
            here, there = group.get("param_names"), saved_group.get("param_names")
            if here is None or there is None:
                continue
            for a, b in zip(here, there, strict=False):
                if bare_name(a) != bare_name(b):
                    raise ValueError(
                        f"load_state_dict: the parameter {a!r} is in the place where {b!r} was saved; "
                        "a state belongs to its parameter, so pass the parameters in the saved order"
                    )
        for label, rule, param, state in self._saved_states(saved, rules):
            if state is not None:
                check_state(label, rule, param, state)
        return rules

    def _loaded(self, rule: UpdateRule, param: Tensor, state: Mapping[str, Any]) -> State:
        """Return a saved state in the form that this parameter stores; `optim.distributed` overrides this."""
        return loaded_state(rule, param, state)

    def _restore(self, saved: dict[str, Any], rules: list[UpdateRule], names: list[list[str] | None]) -> None:
        for i, (rule, own_names) in enumerate(zip(rules, names, strict=True)):
            # interned, because the key objects that were read from a file would change the bytes of the next file
            kept = {sys.intern(key): value for key, value in kept_keys(self.param_groups[i]).items()}
            group = kept | {"rule": rule}
            if own_names is not None:
                group["param_names"] = own_names
            self.param_groups[i] = ParamGroup(group)
        for _, rule, param, state in self._saved_states(saved, rules):
            if state is not None:
                self.state[param] = self._loaded(rule, param, state)
            else:
                self.state.pop(param, None)
