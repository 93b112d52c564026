"""How parameters are updated: the optimizer's rules, its learning rates by position, and the loop that trains.

Estimators and true retraining use the same `Recipe.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch

from datatools.errors import UsageError
from datatools.order.problem import Diverged, Params, Problem
from optim import Optimizer, Quantized, State, UpdateRule, cpu_jit, curvature, rule_from

States: TypeAlias = dict[str, State]


@dataclass(frozen=True)
class Recipe:
    """How parameters are updated: rule, learning-rate factor and weight decay per parameter; rates by position.

    Args:
        rules: name -> rule, in the order of the model's parameters, in which a norm over all of them is summed.
        rates: T learning rates, which belong to positions, not to batches.
        factors: name -> factor of the learning rate.
        weight_decay: name -> weight decay.
        clip: largest norm of the whole gradient; None does not clip.

    Raises:
        UsageError: if a rule cannot be replayed from gradients alone: it reads a curvature, its parameters share
            statistics at every step (`UpdateRule.shares`), or its moments are stored in 8 bits.

    Example:
        >>> from optim import AdamW
        >>> optimizer = AdamW([("w", torch.nn.Parameter(torch.zeros(2)))], lr=0.1)
        >>> Recipe.of(optimizer, rates=[0.1, 0.05]).rates
        (0.1, 0.05)

    """

    rules: Mapping[str, UpdateRule]
    rates: tuple[float, ...]
    factors: Mapping[str, float]
    weight_decay: Mapping[str, float]
    clip: float | None = None

    def __post_init__(self) -> None:
        for name, rule in self.rules.items():
            why = _why_not_replayed(rule)
            if why:
                raise UsageError(
                    f"order: the rule {rule.name!r} of {name!r} cannot be replayed from gradients alone ({why}); "
                    "train with adamw, sgd, lion, nadam, adabelief or muon"
                )
            if getattr(rule, "fixed_decay", False) and self.weight_decay[name]:
                raise UsageError(
                    f"order: the rule {rule.name!r} of {name!r} decays weights independently of the learning rate "
                    "(fixed_decay), which estimates cannot represent; train with fixed_decay=False"
                )

    @classmethod
    def of(cls, optimizer: Optimizer, rates: Sequence[float], *, clip: float | None = None) -> Recipe:
        """Build the recipe of an optimizer that was created from named parameters.

        Args:
            optimizer: the optimizer.
            rates: the learning rates of its first group, one per position.
            clip: largest norm of the whole gradient; None does not clip.

        Returns:
            The recipe.

        Raises:
            UsageError: if a rule cannot be replayed.

        """
        rules: dict[str, UpdateRule] = {}
        factors: dict[str, float] = {}
        decay: dict[str, float] = {}
        first = float(optimizer.param_groups[0]["lr"])
        for group in optimizer.param_groups:
            for name in group["param_names"]:
                rules[name] = _rule(group["rule"])
                factors[name] = float(group["lr"]) / first if first else 1.0
                decay[name] = float(group["weight_decay"])
        return cls(rules, tuple(float(r) for r in rates), factors, decay, clip)

    def init(self, params: Params) -> States:
        """Create the optimizer states before the first step.

        Args:
            params: name -> [*shape], floating dtype.

        Returns:
            Name -> state of the rule.

        """
        return {name: rule.init(params[name]) for name, rule in self.rules.items()}

    @cached_property
    def _groups(self) -> list[tuple[tuple[UpdateRule, float, float], list[str]]]:
        """The optimizer's parameter groups: (rule, factor, weight decay) and the parameters that have them."""
        found: list[tuple[tuple[UpdateRule, float, float], list[str]]] = []
        for name, rule in self.rules.items():
            key = (rule, self.factors[name], self.weight_decay[name])
            names = next((names for known, names in found if known == key), None)
            if names is None:
                found.append((key, names := []))
            names.append(name)
        return found

    def clip_factor(self, grads: Params) -> float:
        """Compute the factor by which clipping scales a gradient, as `torch.nn.utils.clip_grad_norm_` does.

        Args:
            grads: name -> [*shape], floating dtype.

        Returns:
            A factor, at most 1.

        """
        if self.clip is None:
            return 1.0
        norm = torch.nn.utils.get_total_norm([grads[name].detach() for name in self.rules])
        return float((self.clip / (norm + 1e-6)).clamp(max=1.0))

    def step(self, params: Params, states: States, grads: Params, position: int) -> tuple[Params, States]:
        """Take one step; the arguments are not changed.

        The step is that of `Optimizer`, group by group, and is bit-identical to it.

        Args:
            params: name -> [*shape], floating dtype.
            states: name -> state of the rule.
            grads: name -> gradient [*shape].
            position: 0-based position of the step.

        Returns:
            Parameters and states after the step.

        Raises:
            Diverged: if a gradient is not finite.

        """
        scale = self.clip_factor(grads)
        new_params = {name: p.detach().clone() for name, p in params.items()}
        new_states = {name: {k: v.clone() for k, v in states[name].items()} for name in self.rules}
        with torch.no_grad():
            for (rule, factor, decay), names in self._groups:
                parts = [grads[name].detach() * scale if scale != 1.0 else grads[name].detach() for name in names]
                for name, fine in zip(names, cpu_jit.all_finite(parts), strict=True):
                    if not fine:
                        raise Diverged(
                            f"order: the gradient of {name!r} at step {position + 1} is not finite; lower the learning "
                            "rate"
                        )
                cpu_jit.step(
                    rule, [new_params[name] for name in names], parts, [new_states[name] for name in names],
                    lr=self.rates[position] * factor, weight_decay=decay,
                )  # fmt: skip
        return new_params, new_states

    def describe(self) -> dict[str, Any]:
        """Convert the recipe to plain values, for `meta.json`.

        Returns:
            Values that JSON can represent.

        """
        return {
            "rules": {name: rule.describe() for name, rule in self.rules.items()},
            "rates": list(self.rates),
            "factors": dict(self.factors),
            "weight_decay": dict(self.weight_decay),
            "clip": self.clip,
        }

    @classmethod
    def from_description(cls, saved: Mapping[str, Any]) -> Recipe:
        """Restore a recipe; the inverse of `describe`.

        Args:
            saved: result of `describe`.

        Returns:
            The recipe.

        """
        rules = {name: rule_from(rule) for name, rule in saved["rules"].items()}
        return cls(rules, tuple(saved["rates"]), saved["factors"], saved["weight_decay"], saved["clip"])


def _why_not_replayed(rule: UpdateRule) -> str:
    """Return why the steps of this rule cannot be replayed from gradients alone, or "" if they can."""
    if rule.shares:
        return "its parameters share statistics"
    if isinstance(rule, curvature.CurvatureRule):
        return "it reads a curvature that only `refresh` updates"
    return "its moments are stored in 8 bits, which have no derivative" if isinstance(rule, Quantized) else ""


def _rule(found: Any) -> UpdateRule:
    return found if isinstance(found, UpdateRule) else rule_from(found)


def train(
    problem: Problem,
    recipe: Recipe,
    sequence: Sequence[int | None],
    params: Params,
    states: States | None = None,
    *,
    start: int = 0,
    observe: Callable[[int, Params, States], None] | None = None,
) -> tuple[Params, States]:
    """Train from position `start` to the end of `sequence`: the definition that every estimator approximates.

    Args:
        problem: the batches and their loss.
        recipe: how parameters are updated.
        sequence: the batch of each step; None skips a step, and later steps keep their positions and learning rates.
        params: name -> [*shape], floating dtype; they are not changed.
        states: states of the optimizer; new ones by default.
        start: position of the first step.
        observe: called before each step, and after the last, with (position, parameters, states).

    Returns:
        Parameters and states after the last step.

    Raises:
        Diverged: if a gradient is not finite.

    Example:
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> end, _ = train(problem, reference.recipe, [3, 2, 1, 0], reference.start.params)
        >>> problem.held_out_loss(end) < problem.held_out_loss(reference.start.params)
        True

    """
    states = recipe.init(params) if states is None else states
    for position in range(start, len(sequence)):
        if observe is not None:
            observe(position, params, states)
        batch = sequence[position]
        if batch is not None:
            params, states = recipe.step(params, states, problem.gradient(params, batch), position)
    if observe is not None:
        observe(len(sequence), params, states)
    return params, states
