"""What an optimizer is here: a pure function from a gradient, a state and a parameter to an update."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor

from optim.sharding import is_sharded, sharded_as

State: TypeAlias = dict[str, Tensor]
"""What a rule remembers of one parameter, under torch's names: `step`, `exp_avg`, `exp_avg_sq`, `momentum_buffer`."""


@dataclass(frozen=True, kw_only=True)
class UpdateRule(ABC):
    """One optimizer. Its fields are the hyper-parameters; its two pure functions are the algorithm.

    A parameter moves by ``p <- p - lr * (direction + weight_decay * decay)``: the learning rate and the decoupled
    weight decay belong to the `Optimizer`'s param group, the direction belongs to the rule.

    To write one: a frozen, keyword-only dataclass with a `name`, `init`, `update`, and range checks in `__post_init__`.
    `init` and `update` never write to their arguments and read no global state, so that selection can `vmap` them and
    order estimation can differentiate them. `init` looks at the parameter's shape, dtype and device only (it is also
    run on the meta device, to check a loaded state). Fields are plain values (bool, int, float, str, None, tuples of
    these, or another rule), because a checkpoint stores them as such.

    Written as one tensor program, without Python branches on values and without writing in place, `update` and `decay`
    are also what a step runs: `optim.cpu_jit` compiles them, on the CPU, to one loop over memory. A rule that overrides
    `step` is stepped by that instead, tensor by tensor.
    """

    name: ClassVar[str]
    """The rule's key in `optim.RULES`, and its name in a checkpoint."""

    elementwise: ClassVar[bool] = True
    """Whether every coordinate of the direction depends on that coordinate alone.

    Then the rule may be applied to slices and shards, and `update` must broadcast: a gradient ``[batch, *shape]``
    against a state ``[*shape]`` gives the directions ``[batch, *shape]`` of each gradient by itself.
    """

    @abstractmethod
    def init(self, param: Tensor) -> State:
        """The state before the first step: fresh tensors, moments in `moment_dtype(param)`."""

    @abstractmethod
    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """The direction (to be subtracted, times lr) and the state after this gradient; arguments untouched.

        The direction may be the gradient tensor itself (plain SGD): do not write to it.
        """

    def decay(self, direction: Tensor, state: State, param: Tensor) -> Tensor:
        """What weight decay pulls towards zero: the parameter itself, unless a method says otherwise.

        `state` is the state after the update.
        """
        return param

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """What the parameters of a param group tell each other before they are stepped; by default nothing.

        The only way from one parameter to another, and where a step renews what `update` only reads (Conda's basis):
        a method that needs it (a counter of the whole optimizer, a second moment of several tensors) writes to entries
        of `states`, in place, which `update` then reads. `grads` and `states` are of the parameters about to be
        stepped; `group` has the states of all that ever were.
        """
        return

    @property
    def coupled(self) -> bool:
        """Whether `share` makes one tensor's step depend on others: then no process can step some of them alone.

        So it is taken to be where there is a `share`; a rule that looks at one tensor at a time there may say so.
        """
        return type(self).share is not UpdateRule.share

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
        """The parameter, in the direction's dtype, and the state after one step; arguments untouched but for `out`.

        weight_decay: None for none (0 times an infinite parameter would not be nothing).
        out: where the parameter may be written, itself for one; it is the one returned if so.
        """
        direction, new_state = self.update(grad, state, param)
        work = param.to(direction.dtype)
        if weight_decay is not None:
            direction = _plus(direction, weight_decay, self.decay(direction, new_state, work))
        return _plus(work, -lr, direction, out), new_state

    def step(self, param: Tensor, grad: Tensor, state: State, *, lr: float | Tensor, weight_decay: float) -> None:
        """One step in place: `stepped`, written back to `param` (and only then rounded to its dtype) and `state`."""
        new_param, new_state = self.stepped(param, grad, state, lr=lr, weight_decay=weight_decay or None, out=param)
        if new_param is not param:
            param.copy_(sharded_as(param, new_param))
        for key, value in new_state.items():
            state[key].copy_(sharded_as(state[key], value))  # not rebound: a new value may alias the gradient

    def step_part(
        self, param: Tensor, grad: Tensor, state: State, *, start: int, lr: float | Tensor, weight_decay: float
    ) -> None:
        """`step` of a piece of a tensor, flat and from entry `start` on, under an elementwise rule."""
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
        """`step` of parameters that `optim.cpu_jit` does not take: one by one, unless a rule has a kernel for many."""
        for param, grad, state in zip(params, grads, states, strict=True):
            self.step(param, grad, state, lr=lr, weight_decay=weight_decay)

    @property
    def rounds_itself(self) -> bool:
        """Whether the rule can write bfloat16 parameters back with `stochastic_rounding`, in its own kernel."""
        return any(field.name == "stochastic_rounding" for field in fields(self))

    @property
    def step_is_update(self) -> bool:
        """Whether `step` is `stepped` written back and no more, so that `optim.cpu_jit` may compile it."""
        return type(self).step is UpdateRule.step

    def describe(self) -> dict[str, Any]:
        """The rule as plain values, ``{"name": ..., field: value, ...}``; `optim.rule_from` is the inverse."""
        described: dict[str, Any] = {"name": self.name}
        for field in fields(self):
            value = getattr(self, field.name)
            described[field.name] = value.describe() if isinstance(value, UpdateRule) else value
        return described

    def settings(self) -> set[str]:
        """The names of the rule's fields, and of those of a rule inside it."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return set(own).union(*(rule.settings() for rule in own.values() if isinstance(rule, UpdateRule)))

    def setting(self, name: str) -> Any:
        """The field of that name, the rule's own or that of a rule inside it; KeyError for none of `settings`."""
        own = [f.name for f in fields(self)]
        if name in own:
            return getattr(self, name)
        for inner in (getattr(self, key) for key in own):
            if isinstance(inner, UpdateRule) and name in inner.settings():
                return inner.setting(name)
        raise KeyError(name)

    def state_settings(self) -> dict[str, Any]:
        """The settings without which a state cannot be read, which therefore stay as they were once there is one.

        None, unless a rule says so, beyond those that show in the shapes and dtypes of its state.
        """
        inner = (getattr(self, f.name) for f in fields(self))
        return {k: v for rule in inner if isinstance(rule, UpdateRule) for k, v in rule.state_settings().items()}

    def with_settings(self, **changed: Any) -> Self:
        """The rule with these fields instead; what it has no field for goes to the rule inside it.

        Raises: TypeError for a name that is none of `settings`.
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
        """How this rule differs from a saved description, one phrase a field; empty if it does not.

        A field that the description lacks (it was written by an older version) counts as that field's default.
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
    """x + factor y; if factor is a number in one pass, and into `out` if that has x's dtype: temporaries cost time."""
    if isinstance(factor, Tensor):
        return x + factor * y
    if out is None or out.dtype != x.dtype or y.dtype != x.dtype or is_sharded(out):
        return x.add(y, alpha=factor)
    return torch.add(x, y, alpha=factor, out=out)


def _plain(value: Any) -> Any:
    """Lists and tuples alike: YAML and JSON give lists."""
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


def moment_dtype(param: Tensor) -> torch.dtype:
    """The dtype of running averages: float32 for parameters of 16 bits and less, otherwise the parameter's own.

    The increment (1 - b2) g^2 of a second moment is below bfloat16's resolution, so a 16-bit moment would stand still.
    """
    return torch.promote_types(param.dtype, torch.float32)


def zero_moment(param: Tensor) -> Tensor:
    """A zero tensor of the parameter's shape, device and layout, in `moment_dtype`."""
    return torch.zeros_like(param, dtype=moment_dtype(param), requires_grad=False)


def scalar_moment(param: Tensor, value: float = 0.0) -> Tensor:
    """One number for the whole tensor, 0-d in `moment_dtype`; on every rank alike where the parameter is a DTensor."""
    return param.new_full((), value, dtype=moment_dtype(param), requires_grad=False)


def zero_step() -> Tensor:
    """A step count: a float32 scalar on the CPU, as in torch, so that reading it never waits for a GPU."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


def correction(beta: float | Tensor, step: Tensor) -> Tensor:
    """1 - beta^step as a float64 scalar; float32 would lose digits that float64 parameters show."""
    return 1 - beta ** step.double()
