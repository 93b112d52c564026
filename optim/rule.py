"""The definition of an optimizer: a pure function from a gradient, a state and a parameter to an update."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from optim.sharding import is_sharded, sharded_as

OfParam: TypeAlias = Float[Tensor, "*shape"]
"""A tensor of the parameter's shape."""

State: TypeAlias = dict[str, Tensor]
"""What a rule stores for one parameter, under torch's names: `step`, `exp_avg`, `exp_avg_sq`, `momentum_buffer`."""


@dataclass(frozen=True, kw_only=True)
class UpdateRule(ABC):
    """An optimizer: its fields are the hyper-parameters, and its two pure functions are the algorithm.

    A parameter moves by ``p <- p - lr * (direction + weight_decay * decay)``. The learning rate and the decoupled
    weight decay belong to the param group of the `Optimizer`; the direction belongs to the rule.

    A new rule is a frozen, keyword-only dataclass with a `name`, `init`, `update`, and range checks in `__post_init__`.
    `init` and `update` never write to their arguments and read no global state, so that selection can `vmap` them and
    order estimation can differentiate them. `init` only reads the parameter's shape, dtype and device (it also runs on
    the meta device, to check a loaded state). Fields are plain values (bool, int, float, str, None, tuples of these, or
    another rule), because a checkpoint stores them as such.

    `update` and `decay` are written as one tensor program, without Python branches on values and without in-place
    writes. A step then runs them too: `optim.cpu_jit` compiles them into one loop over memory on the CPU. A rule that
    overrides `step` is stepped by that method instead, tensor by tensor.

    Example:
        >>> from optim import AdamWRule
        >>> rule = AdamWRule(betas=(0.9, 0.95))
        >>> param, grad = torch.ones(2), torch.tensor([1.0, -3.0])
        >>> direction, state = rule.update(grad, rule.init(param), param)
        >>> [round(x, 4) for x in direction.tolist()]
        [1.0, -1.0]
    """

    name: ClassVar[str]
    """The rule's key in `optim.RULES`, and its name in a checkpoint."""

    elementwise: ClassVar[bool] = True
    """Whether every coordinate of the direction depends only on the same coordinate of the arguments.

    Such a rule may be applied to slices and shards, and its `update` must broadcast: a gradient ``[batch, *shape]``
    with a state ``[*shape]`` gives the directions ``[batch, *shape]`` of the individual gradients.
    """

    @abstractmethod
    def init(self, param: OfParam) -> State:
        """Return the state before the first step.

        Args:
            param: The parameter, of any shape and a real floating-point dtype. Its values are not read.

        Returns:
            Fresh tensors by name; moments have the dtype `moment_dtype(param)`.
        """

    @abstractmethod
    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction and the state after this gradient, without changing the arguments.

        Args:
            grad: The gradient, of the parameter's shape.
            state: The state before this gradient.
            param: The parameter.

        Returns:
            The direction, of the parameter's shape, which a step multiplies by lr and subtracts; and the new state. The
            direction may be the gradient tensor itself (plain SGD), so do not write to it.
        """

    def decay(self, direction: OfParam, state: State, param: OfParam) -> OfParam:
        """Return what weight decay pulls towards zero: the parameter itself, unless a method defines it differently.

        Args:
            direction: The direction of this step.
            state: The state after the update.
            param: The parameter.

        Returns:
            A tensor of the parameter's shape.
        """
        return torch.zeros_like(param) if "weight_decay" in self.reads else param

    @property
    def uncodable(self) -> str:
        """Why `Quantized` cannot store the state as codes of a few bits, as a clause after "it"; empty if it can."""
        return ""

    @property
    def averages(self) -> bool:
        """Whether the method averages weights, so that evaluation needs other weights than gradients; see `average`."""
        return False

    def average(self, state: State, param: Tensor) -> Tensor | None:
        """Return the weights that evaluation should use, if the method averages weights.

        Args:
            state: The state after the last step.
            param: The parameter, at which gradients are computed.

        Returns:
            A tensor of the parameter's shape, or None if the method does not average.
        """
        return None

    def from_average(self, state: State, average: Tensor) -> Tensor:
        """Return the parameter whose average is given: the inverse of `average`.

        Args:
            state: The state after the last step.
            average: The averaged weights.

        Returns:
            A tensor of the parameter's shape.

        Raises:
            NotImplementedError: If the method does not average weights.
        """
        raise NotImplementedError(f"{self.name} does not average weights")

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """Let the parameters of a param group exchange information before they are stepped; by default nothing happens.

        This is the only connection between parameters. A step also uses it to renew what `update` only reads (Conda's
        basis). A method that needs it (for a counter of the whole optimizer, or a second moment of several tensors)
        writes to entries of `states` in place, and `update` then reads them.

        Args:
            grads: Gradients of the parameters that are about to be stepped.
            states: The states of these parameters.
            group: The states of all parameters of the group that have been stepped before.
        """
        return

    @property
    def reads(self) -> frozenset[str]:
        """Which of the group's `lr` and `weight_decay` the direction depends on; none by default.

        For each of them the state has a scalar of the same name (`scalar_setting`). A step sets it to the group's value
        before anything reads it, and a map takes it from the group. The direction of a rule that reads the weight decay
        already contains it, so that no decay is added.
        """
        return frozenset()

    def told(self, state: State, *, lr: float | Tensor, weight_decay: float | Tensor | None) -> State:
        """Return the state with the group's values in the entries that `reads` names; the argument is not changed.

        Args:
            state: The state.
            lr: The learning rate of the group.
            weight_decay: The weight decay of the group; None stands for 0.

        Returns:
            The state itself if the rule reads nothing, otherwise a new dictionary.
        """
        given = {"lr": lr, "weight_decay": 0.0 if weight_decay is None else weight_decay}
        return state | {key: _scalar_as(state[key], given[key]) for key in self.reads} if self.reads else state

    @property
    def shares(self) -> bool:
        """Whether `share` does anything, so that a step has to call it; a wrapper asks the rule inside it."""
        return type(self).share is not UpdateRule.share

    @property
    def coupled(self) -> bool:
        """Whether `share` makes the step of one tensor depend on others, so that no process can step only some of them.

        A rule that shares is assumed to be coupled. A rule whose `share` looks at one tensor at a time may override
        this.
        """
        return self.shares

    def stepped(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        *,
        lr: float | Tensor,
        weight_decay: float | Tensor | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Return the parameter and the state after one step, without changing any argument except `out`.

        Args:
            param: The parameter.
            grad: The gradient, of the parameter's shape.
            state: The state before the step.
            lr: Learning rate.
            weight_decay: Decoupled weight decay, or None for no decay (0 times an infinite parameter would not be 0).
            out: A tensor to which the new parameter may be written and which is then returned, such as `param`.

        Returns:
            The parameter, in the direction's dtype, and the new state.
        """
        state = self.told(state, lr=lr, weight_decay=weight_decay)
        direction, new_state = self.update(grad, state, param)
        work = param.to(direction.dtype)
        if weight_decay is not None and "weight_decay" not in self.reads:
            direction = _plus(direction, weight_decay, self.decay(direction, new_state, work))
        return _plus(work, -lr, direction, out), new_state

    def step(self, param: Tensor, grad: Tensor, state: State, *, lr: float | Tensor, weight_decay: float) -> None:
        """Step in place: write the result of `stepped` to `param`, which rounds it to its dtype, and to `state`.

        Args:
            param: The parameter.
            grad: The gradient, of the parameter's shape.
            state: The state before the step.
            lr: Learning rate.
            weight_decay: Decoupled weight decay.
        """
        new_param, new_state = self.stepped(param, grad, state, lr=lr, weight_decay=weight_decay or None, out=param)
        if new_param is not param:
            param.copy_(sharded_as(param, new_param))
        for key, value in new_state.items():
            state[key].copy_(sharded_as(state[key], value))  # copied, because a new value may alias the gradient

    def step_part(
        self, param: Tensor, grad: Tensor, state: State, *, start: int, lr: float | Tensor, weight_decay: float
    ) -> None:
        """Step a flat piece of a tensor in place, under an elementwise rule.

        Args:
            param: A piece of the parameter, of shape [n].
            grad: The same piece of the gradient.
            state: The same piece of the state.
            start: The index in the flat tensor at which the piece begins.
            lr: Learning rate.
            weight_decay: Decoupled weight decay.
        """
        self.step(param, grad, state, lr=lr, weight_decay=weight_decay)

    def step_all(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        """Step the parameters that `optim.cpu_jit` does not step: one by one, or with a kernel for several.

        Args:
            params: The parameters.
            grads: The gradients, of the same shapes.
            states: The states.
            lr: Learning rate.
            weight_decay: Decoupled weight decay.
        """
        for param, grad, state in zip(params, grads, states, strict=True):
            self.step(param, grad, state, lr=lr, weight_decay=weight_decay)

    @property
    def rounds_itself(self) -> bool:
        """Whether the rule's own kernel can write bfloat16 parameters with `stochastic_rounding`."""
        return any(field.name == "stochastic_rounding" for field in fields(self))

    @property
    def step_is_update(self) -> bool:
        """Whether `step` only writes the result of `stepped`, so that `optim.cpu_jit` may compile it."""
        return type(self).step is UpdateRule.step

    def describe(self) -> dict[str, Any]:
        """Return the rule as plain values; `optim.rule_from` is the inverse.

        Returns:
            ``{"name": ..., field: value, ...}``; a rule inside this one is described in the same way.
        """
        described: dict[str, Any] = {"name": self.name}
        for field in fields(self):
            value = getattr(self, field.name)
            described[field.name] = value.describe() if isinstance(value, UpdateRule) else value
        return described

    def settings(self) -> set[str]:
        """Return the names of the rule's fields, including those of a rule inside it.

        Returns:
            The names.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return set(own).union(*(rule.settings() for rule in own.values() if isinstance(rule, UpdateRule)))

    def setting(self, name: str) -> Any:
        """Return the value of a field of this rule or of a rule inside it.

        Args:
            name: The name of the field.

        Returns:
            The value.

        Raises:
            KeyError: For a name that is not one of `settings`.
        """
        own = [f.name for f in fields(self)]
        if name in own:
            return getattr(self, name)
        for inner in (getattr(self, key) for key in own):
            if isinstance(inner, UpdateRule) and name in inner.settings():
                return inner.setting(name)
        raise KeyError(name)

    def state_settings(self) -> dict[str, Any]:
        """Return the settings that a state starts or is stored with; they cannot change once there is a state.

        By default there are none, because most settings do not affect the state or show in its shapes and dtypes.

        Returns:
            The values of the settings, by name.
        """
        inner = (getattr(self, f.name) for f in fields(self))
        return {k: v for rule in inner if isinstance(rule, UpdateRule) for k, v in rule.state_settings().items()}

    def with_settings(self, **changed: Any) -> Self:
        """Return the rule with other values of some fields; fields that it lacks are passed to the rule inside it.

        Args:
            **changed: The new values, by the names of the fields.

        Returns:
            A new rule, or this one if nothing is changed.

        Raises:
            TypeError: For a name that is not one of `settings`.
        """
        own = {f.name for f in fields(self)}
        rest = {key: value for key, value in changed.items() if key not in own}
        changed = {key: value for key, value in changed.items() if key in own}
        for field in fields(self):
            inner = changed.get(field.name, getattr(self, field.name))
            if rest and isinstance(inner, UpdateRule):
                mine = {key: rest.pop(key) for key in inner.settings() & set(rest)}
                changed[field.name] = inner.with_settings(**mine)
        if rest:
            known = ", ".join(sorted(self.settings()))
            raise TypeError(f"{self.name}: no setting {', '.join(map(repr, rest))}; known: {known}")
        return replace(self, **changed) if changed else self

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """Return how this rule differs from a saved description.

        A field that the description lacks (because an older version wrote it) counts as having that field's default.

        Args:
            saved: What `describe` returned.

        Returns:
            One phrase per field that differs; empty if none does.
        """
        if saved.get("name") != self.name:
            return [f"the rule is {self.name!r} here and {saved.get('name')!r} there"]
        here = self.describe()
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        found = [f"{key!r} is unknown here and {saved[key]!r} there" for key in saved if key not in here]
        for key, value in here.items():
            there = saved.get(key, defaults.get(key))
            if isinstance(there, UpdateRule):
                there = there.describe()
            inner = getattr(self, key)
            if isinstance(inner, UpdateRule) and isinstance(there, Mapping):
                found += [f"in {key}, {difference}" for difference in inner.differences(there)]
            elif _plain(value) != _plain(there):
                found.append(f"{key} is {value!r} here and {there!r} there")
        return found


def _plus(x: Tensor, factor: float | Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x + factor y, in one pass if factor is a number, and in `out` if the dtypes agree, to save temporaries."""
    if isinstance(factor, Tensor):
        return x + factor * y
    if out is None or out.dtype != x.dtype or y.dtype != x.dtype or is_sharded(out):
        return x.add(y, alpha=factor)
    return torch.add(x, y, alpha=factor, out=out)


def _scalar_as(like: Tensor, value: float | Tensor) -> Tensor:
    """Return a number, or a tensor with one element, as a scalar with the dtype and device of `like`."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(dtype=like.dtype, device=like.device)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def _plain(value: Any) -> Any:
    """Return the value with lists as tuples, because YAML and JSON produce lists."""
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value
