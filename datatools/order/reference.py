"""A run to lean on: how parameters step, what the loss is, and a recorded run with its anchors.

Everything here is a function of named tensors. `Problem` is the loss and the data, `Recipe` the optimizer and its
learning rates by position, `train` the loop. Estimators and true retrainings use the same `Recipe.step`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from datatools import files
from datatools.errors import DataError, UsageError
from datatools.files import sealed
from datatools.orders import check_permutation
from optim import Optimizer, State, UpdateMap, UpdateRule, cpu_jit, curvature, rule_from

Params: TypeAlias = dict[str, Tensor]
"""Parameters, gradients or displacements: name -> [*shape]."""
States: TypeAlias = dict[str, State]
Loss: TypeAlias = Callable[[Params, Any], Tensor]
"""(parameters, batch) -> mean loss of the batch, 0-d, differentiable in the parameters."""


class Diverged(DataError):
    """A loss that is not finite: training has left what the model can compute."""


class Parts(tuple[Any, ...]):
    """A batch in parts (micro-batches), whose losses add up to the batch's: only one part's graph is held at a time."""

    __slots__ = ()


_FORMAT = 2  # 1 had no seals


@dataclass
class Cost:
    """What an estimator spent: passes over one batch. A gradient is the unit; forward passes count a third of it."""

    gradients: float = 0
    hvps: int = 0
    forwards: int = 0
    bytes: int = 0

    def in_gradients(self, *, hvp: float = 3.0) -> float:
        """Batch-gradient equivalents, a Hessian-vector product being `hvp` of them (2 to 4; spec B.2)."""
        return self.gradients + hvp * self.hvps + self.forwards / 3


@dataclass
class Problem:
    """The data of an order question: n training batches, held-out batches, one loss for both.

    batches, validation: of any kind that the loss takes, or `Parts` of such.
    hvp_method: "auto", "exact" or "difference" as in `optim.curvature.hvp`, or "gauss-newton" for products with that
    matrix in place of the Hessian (`curvature.gauss_newton_product`).
    weights: of the held-out batches (numbers of tokens, say); equal unless given.
    samples: for each training batch a part of its rows, as a batch of its own, whose gradients change as the batch's do
    when parameters move (the estimator `reduced`); share: what a gradient of one costs, in gradients of a batch.
    cost: counted up by every call, so that estimators can say what they spent.
    spent: called after each gradient or product of a training batch has been counted, for a bar of progress.
    Raises: UsageError for no batches; Diverged (a DataError) for a gradient of a loss that is not finite.
    """

    loss: Loss
    batches: Sequence[Any]
    validation: Sequence[Any]
    weights: Sequence[float] | None = None
    samples: Sequence[Any] | None = None
    share: float = 1.0
    hvp_method: str = "auto"
    cost: Cost = field(default_factory=Cost)
    spent: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        if not len(self.batches) or not len(self.validation):
            raise UsageError("order: a problem needs training batches and held-out batches")

    def gradient(self, params: Params, batch: int) -> Params:
        """The gradient of training batch `batch` at `params`; a parameter that the loss misses has zero."""
        self._spend(gradients=1)
        return self._grad(params, self.batches[batch], f"batch {batch}")

    def sample_gradient(self, params: Params, batch: int) -> Params:
        """The gradient of the sample of training batch `batch`. Raises: UsageError for a problem without samples."""
        if self.samples is None:
            raise UsageError("order: this estimate needs Problem(samples=): a few rows of every batch")
        self._spend(gradients=self.share)
        return self._grad(params, self.samples[batch], f"the sample of batch {batch}")

    def held_out_gradient(self, params: Params) -> Params:
        """The gradient of the held-out loss."""
        self.cost.gradients += len(self.validation)
        total: Params = {}
        for weight, batch in self._weighted():
            for name, grad in self._grad(params, batch, "a held-out batch").items():
                total[name] = weight * grad + total[name] if name in total else weight * grad
        return total

    def held_out_loss(self, params: Params) -> float:
        """The weighted mean loss over the held-out batches."""
        self.cost.forwards += len(self.validation)
        with torch.no_grad():
            return math.fsum(weight * self._value(params, batch) for weight, batch in self._weighted())

    def train_loss(self, params: Params, batch: int) -> float:
        """The loss of training batch `batch`."""
        self.cost.forwards += 1
        with torch.no_grad():
            return self._value(params, self.batches[batch])

    def hvp(self, params: Params, batch: int, vector: Params) -> Params:
        """H v of training batch `batch` at `params`."""
        self._spend(hvps=1)
        return self._hvp(params, self.batches[batch], vector)

    def held_out_hvp(self, params: Params, vector: Params) -> Params:
        """H v of the held-out loss."""
        self.cost.hvps += len(self.validation)
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for weight, batch in self._weighted():
            product = self._hvp(params, batch, vector)
            total = {name: t + weight * product[name] for name, t in total.items()}
        return total

    def _spend(self, gradients: float = 0, hvps: int = 0) -> None:
        self.cost.gradients += gradients
        self.cost.hvps += hvps
        if self.spent is not None:
            self.spent()

    def _hvp(self, params: Params, data: Any, vector: Params) -> Params:
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        losses = [partial(self.loss, leaves, part) for part in _parts(data)]
        along = [vector[name].to(p.dtype) for name, p in leaves.items()]
        if self.hvp_method == "gauss-newton":
            try:
                products = [curvature.gauss_newton_product(loss, list(leaves.values()), along) for loss in losses]
            except curvature.NoCrossEntropy as error:
                raise UsageError(f"order: {str(error).removeprefix('curvature: ')}. Use hvp_method 'auto'") from error
            return {name: torch.stack(parts).sum(0) for name, *parts in zip(leaves, *products, strict=True)}
        found = curvature.hvp(losses, list(leaves.values()), along, method=self.hvp_method)
        return {
            name: torch.zeros_like(p) if h is None else h.detach()
            for (name, p), h in zip(leaves.items(), found, strict=True)
        }

    def _weighted(self) -> Iterator[tuple[float, Any]]:
        weights = self.weights if self.weights is not None else [1.0] * len(self.validation)
        total = math.fsum(weights)
        for weight, batch in zip(weights, self.validation, strict=True):
            yield weight / total, batch

    def _value(self, params: Params, data: Any) -> float:
        return math.fsum(float(self.loss(params, part)) for part in _parts(data))

    def _grad(self, params: Params, data: Any, what: str) -> Params:
        total: Params = {}
        for part in _parts(data):  # as `backward` of one micro-batch after the other adds them up
            for name, grad in self._part_grad(params, part, what).items():
                total[name] = total[name] + grad if name in total else grad
        return total

    def _part_grad(self, params: Params, data: Any, what: str) -> Params:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            loss = self.loss(leaves, data)
            if not bool(loss.isfinite()):
                raise Diverged(f"order: the loss of {what} is {float(loss.detach())}; lower the learning rate")
            if not loss.requires_grad:
                raise UsageError(
                    f"order: the loss of {what} cannot be differentiated in the parameters: a kernel of the model has "
                    "no backward, or the loss was detached; use attention 'sdpa' or 'eager', and no inference mode"
                )
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        if not all(bool(g.isfinite().all()) for g in grads if g is not None):
            raise Diverged(
                f"order: the gradient of {what} is not finite, though its loss is ({float(loss.detach()):.4g}); a run "
                "of all its steps cannot leave one out. Lower the learning rate, or look at these rows"
            )
        return {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), grads, strict=True)
        }


def _parts(data: Any) -> tuple[Any, ...]:
    return data if isinstance(data, Parts) else (data,)


@dataclass(frozen=True)
class Recipe:
    """How parameters step: a rule, a factor of the learning rate and a weight decay a parameter; rates by position.

    rules: in the order of the model's parameters, in which a norm over all of them is added up.
    rates: [T], the learning rate belongs to the position, never to the batch.
    clip: largest norm of the whole gradient, or None.
    Raises: UsageError for rules that cannot be replayed out of a gradient alone: those that read a curvature, and those
    whose parameters tell each other something at every step (`UpdateRule.share`).
    """

    rules: Mapping[str, UpdateRule]
    rates: tuple[float, ...]
    factors: Mapping[str, float]
    weight_decay: Mapping[str, float]
    clip: float | None = None

    def __post_init__(self) -> None:
        for name, rule in self.rules.items():
            shares = type(rule).share is not UpdateRule.share
            if shares or isinstance(rule, curvature.CurvatureRule):
                why = "its parameters share statistics" if shares else "it reads a curvature that only `refresh` renews"
                raise UsageError(
                    f"order: the rule {rule.name!r} of {name!r} cannot be replayed from gradients alone ({why}); "
                    "train with adamw, sgd, lion, nadam, adabelief or muon"
                )
            if getattr(rule, "fixed_decay", False) and self.weight_decay[name]:
                raise UsageError(
                    f"order: the rule {rule.name!r} of {name!r} decays weights whatever the learning rate is "
                    "(fixed_decay), which the estimates have no term for; train with fixed_decay=False"
                )

    @classmethod
    def of(cls, optimizer: Optimizer, rates: Sequence[float], *, clip: float | None = None) -> Recipe:
        """The recipe of an optimizer built from named parameters; `rates` are those of its first group."""
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
        """The states before the first step."""
        return {name: rule.init(params[name]) for name, rule in self.rules.items()}

    @cached_property
    def _groups(self) -> list[tuple[tuple[UpdateRule, float, float], list[str]]]:
        """(rule, factor, weight decay) and the parameters that have them: the optimizer's param groups."""
        found: list[tuple[tuple[UpdateRule, float, float], list[str]]] = []
        for name, rule in self.rules.items():
            key = (rule, self.factors[name], self.weight_decay[name])
            names = next((names for known, names in found if known == key), None)
            if names is None:
                found.append((key, names := []))
            names.append(name)
        return found

    def clip_factor(self, grads: Params) -> float:
        """What clipping multiplies this gradient with, as `torch.nn.utils.clip_grad_norm_` does."""
        if self.clip is None:
            return 1.0
        norm = torch.nn.utils.get_total_norm([grads[name].detach() for name in self.rules])
        return float((self.clip / (norm + 1e-6)).clamp(max=1.0))

    def step(self, params: Params, states: States, grads: Params, position: int) -> tuple[Params, States]:
        """Parameters and states after the step at `position` (0-based) on `grads`; arguments untouched.

        The step is that of `Optimizer`, group by group, and so the same to the bit.
        Raises: Diverged for a gradient that is not finite.
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
        """Plain values, for `meta.json`."""
        return {
            "rules": {name: rule.describe() for name, rule in self.rules.items()},
            "rates": list(self.rates),
            "factors": dict(self.factors),
            "weight_decay": dict(self.weight_decay),
            "clip": self.clip,
        }

    @classmethod
    def from_description(cls, saved: Mapping[str, Any]) -> Recipe:
        """The inverse of `describe`."""
        rules = {name: rule_from(rule) for name, rule in saved["rules"].items()}
        return cls(rules, tuple(saved["rates"]), saved["factors"], saved["weight_decay"], saved["clip"])


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

    A step whose batch is None is left out: the next ones keep their positions, and so their learning rates.
    observe: called before each step, and after the last, with (position, parameters, states).
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


@dataclass(frozen=True)
class Anchor:
    """Parameters and optimizer states before the step at `position` (T: after the last)."""

    position: int
    params: Params
    states: States


@dataclass(frozen=True)
class ReferenceRun:
    """One recorded run: its sequence of batches, its recipe, and anchors of which the first and the last are the ends.

    facts: what it was made with (model, data, code); `check_same` refuses another's.
    """

    sequence: tuple[int, ...]
    recipe: Recipe
    anchors: tuple[Anchor, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> Anchor:
        """Where training begins."""
        return self.anchors[0]

    @property
    def end(self) -> Anchor:
        """What the reference order ended with."""
        return self.anchors[-1]

    def nearest(self, position: float) -> Anchor:
        """The anchor whose position is nearest."""
        return min(self.anchors, key=lambda anchor: (abs(anchor.position - position), anchor.position))

    def check(self, sequence: Sequence[int]) -> None:
        """Raise UsageError unless `sequence` is a permutation of the reference's."""
        check_permutation(sequence, self.sequence)

    def check_same(self, facts: Mapping[str, Any], what: str = "this run") -> None:
        """Raise DataError, naming the first fact that differs, unless the reference was made with the same."""
        _check_same(self.facts, facts, what)

    def digest(self) -> str:
        """What tells this run from another: its sequence, recipe, anchors, facts, and the parameters it ended with."""
        flat = (p.detach().cpu().reshape(-1) for p in self.end.params.values())
        ends = b"".join(p.view(torch.uint8).numpy().tobytes() for p in flat)
        said = [self.sequence, self.recipe.describe(), [a.position for a in self.anchors], dict(self.facts)]
        return files.digest(files.json_bytes(said) + files.digest(ends).encode())

    def save(self, folder: files.PathLike) -> None:
        """Write `anchor-NNNNN.safetensors` and, last, `meta.json`."""
        folder = files.make_folder(folder)
        for anchor in self.anchors:
            save_anchor(folder, anchor)
        sealed.write_json(
            folder / "meta.json",
            {
                "format": _FORMAT,
                "sequence": list(self.sequence),
                "recipe": self.recipe.describe(),
                "anchors": [anchor.position for anchor in self.anchors],
                "shapes": {name: list(p.shape) for name, p in self.start.params.items()},
                "facts": dict(self.facts),
            },
        )

    @classmethod
    def load(cls, folder: files.PathLike, device: torch.device | str = "cpu") -> ReferenceRun:
        """Read what `save` wrote, to a device. Raises: DataError when something is missing or damaged, naming it."""
        folder = Path(folder)
        meta = sealed.read_json(folder / "meta.json")
        try:
            if meta["format"] != _FORMAT:
                raise DataError(f"{folder}: a reference run of format {meta['format']}, this version reads {_FORMAT}")
            recipe = Recipe.from_description(meta["recipe"])
            anchors = tuple(load_anchor(folder, position, recipe, device) for position in meta["anchors"])
            return cls(tuple(meta["sequence"]), recipe, anchors, meta["facts"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / 'meta.json'} is damaged ({error!r}); record the reference run again") from error


def _check_same(known: Mapping[str, Any], facts: Mapping[str, Any], what: str) -> None:
    for name in sorted(set(known) | set(facts)):
        if known.get(name) != facts.get(name):
            raise DataError(
                f"the reference run was recorded with another {name} than {what}: {known.get(name)!r} there, "
                f"{facts.get(name)!r} here; record it again"
            )


def anchor_path(folder: Path, position: int) -> Path:
    """Where the anchor of a position stands."""
    return folder / f"anchor-{position:05d}.safetensors"


def save_anchor(folder: Path, anchor: Anchor) -> None:
    """Write one anchor, whole or not at all."""
    tensors = {f"param/{name}": p for name, p in anchor.params.items()}
    for name, state in anchor.states.items():
        tensors |= {f"state/{name}/{key}": value for key, value in state.items()}
    sealed.write_tensors(anchor_path(folder, anchor.position), tensors)


def load_anchor(folder: Path, position: int, recipe: Recipe, device: torch.device | str = "cpu") -> Anchor:
    """Read one anchor, to a device; its states go where the rule makes them.

    Raises: DataError when it is missing, damaged, or lacks parameters or states of the recipe.
    """
    path = anchor_path(folder, position)
    tensors = sealed.read_tensors(path)
    params = {name: tensors[f"param/{name}"].to(device) for name in recipe.rules if f"param/{name}" in tensors}
    missing = [name for name in recipe.rules if name not in params]
    states: States = {}
    for name, rule in recipe.rules.items():
        if name in params:
            keys = rule.init(params[name])
            at = {k: f"state/{name}/{k}" for k in keys}
            states[name] = {k: tensors[at[k]].to(fresh.device) for k, fresh in keys.items() if at[k] in tensors}
            missing += [f"{name}/{key}" for key in keys if key not in states[name]]
    if missing:
        raise DataError(
            f"{path} lacks {missing[0]!r} (and {len(missing) - 1} more): a reference run needs the parameters and the "
            "optimizer states of every anchor; record it again"
        )
    return Anchor(position, params, states)


def anchor_positions(steps: int, anchors: int) -> list[int]:
    """`anchors` positions spread evenly over 0..steps, both ends among them."""
    if not 2 <= anchors <= steps + 1:
        raise UsageError(f"order: {anchors} anchors for {steps} steps; expected 2 to {steps + 1}")
    return sorted({round(i * steps / (anchors - 1)) for i in range(anchors)})


def record(
    problem: Problem,
    recipe: Recipe,
    sequence: Sequence[int],
    params: Params,
    states: States | None = None,
    *,
    anchors: int = 3,
    folder: files.PathLike | None = None,
    facts: Mapping[str, Any] | None = None,
    observe: Callable[[int], None] | None = None,
    damaged: Callable[[DataError], object] | None = None,
) -> ReferenceRun:
    """Train in the reference order and keep the anchors; with `folder`, a killed recording goes on at its last one.

    states: of a run that was warm before; fresh ones if not given.
    damaged: told of a file in the folder that is not what was written; the run goes on from the anchor before it.
    Without it such a file is an error.
    Raises: UsageError for a sequence that does not fit; DataError for a folder that holds another reference run.
    """
    if len(sequence) != len(recipe.rates):
        raise UsageError(f"order: {len(sequence)} steps and {len(recipe.rates)} learning rates; one a position")
    wrong = [b for b in sequence if not 0 <= b < len(problem.batches)]
    if wrong:
        raise UsageError(f"order: batch {wrong[0]} does not exist; there are {len(problem.batches)}")
    positions = anchor_positions(len(sequence), anchors)
    wanted = {
        "sequence": list(sequence),
        "recipe": recipe.describe(),
        "anchors": positions,
        "facts": dict(facts or {}),
    }
    kept: dict[int, Anchor] = {}
    if folder is not None:
        folder = files.make_folder(folder)
        kept = _recorded(folder, wanted, recipe, next(iter(params.values())).device, damaged)
        if len(kept) == len(positions) and _is_sound(folder / "meta.json", damaged):
            return ReferenceRun(tuple(sequence), recipe, tuple(kept[p] for p in positions), dict(facts or {}))
        sealed.write_json(folder / "plan.json", wanted)
    check_repeatable(problem, params, sequence[0])
    newest = kept[max(kept)] if kept else Anchor(0, params, recipe.init(params) if states is None else states)

    def keep(position: int, now: Params, state: States) -> None:
        if observe is not None:
            observe(position)
        if position in positions and position not in kept:
            kept[position] = Anchor(position, now, state)
            if folder is not None:
                save_anchor(folder, kept[position])

    train(problem, recipe, sequence, newest.params, newest.states, start=newest.position, observe=keep)
    run = ReferenceRun(tuple(sequence), recipe, tuple(kept[p] for p in positions), dict(facts or {}))
    if folder is not None:
        run.save(folder)
    return run


def _recorded(
    folder: Path,
    wanted: Mapping[str, Any],
    recipe: Recipe,
    device: torch.device,
    damaged: Callable[[DataError], object] | None,
) -> dict[int, Anchor]:
    """The anchors that an earlier process kept of the run `wanted`, up to the first that is missing or damaged."""
    kept: dict[int, Anchor] = {}
    plan = folder / "plan.json"
    if not plan.is_file():
        return kept
    try:
        known = sealed.read_json(plan)
        _check_same(known.get("facts", {}), dict(wanted["facts"]), "this run's")
        if known != json.loads(files.json_bytes(wanted)):
            raise DataError(f"{folder} holds another reference run, or a part of one; choose another folder")
        for position in wanted["anchors"]:
            if not anchor_path(folder, position).is_file():
                break
            kept[position] = load_anchor(folder, position, recipe, device)
    except sealed.Damaged as error:
        if damaged is None:
            raise
        damaged(error)
    return kept


def _is_sound(path: Path, damaged: Callable[[DataError], object] | None) -> bool:
    """Whether a file is there, and holds what was written."""
    try:
        return path.is_file() and bool(sealed.read_json(path))
    except sealed.Damaged as error:
        if damaged is None:
            raise
        damaged(error)
        return False


def check_repeatable(problem: Problem, params: Params, batch: int) -> None:
    """Raise DataError when the loss is not the same twice: dropout, or data drawn anew. Every estimate differentiates
    one loss, and a random one would be another at each call.
    """
    first, again = problem.train_loss(params, batch), problem.train_loss(params, batch)
    if first != again and not (math.isnan(first) and math.isnan(again)):
        raise DataError(
            f"order: the loss of batch {batch} is {first!r}, and {again!r} when computed again: it is random (dropout "
            "is on?). Put the model in eval mode, and set dropout to 0"
        )


def snapshot(optimizer: Optimizer, position: int) -> Anchor:
    """An anchor of a run that trains in place (a `Trainer`): copies of parameters and states."""
    found = UpdateMap.of(optimizer)
    return Anchor(position, dict(found.params), {name: dict(state) for name, state in found.states.items()})
