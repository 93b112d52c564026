"""What an estimator leaves behind: a cheap function from orders to predicted held-out losses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from torch import Tensor

from datatools import files
from datatools.errors import DataError, UsageError
from datatools.files import sealed
from datatools.order.reference import Cost, Params, Problem, Recipe, ReferenceRun
from datatools.orders import check_permutation

FORMAT = 5  # 1 had no `replay`, 2 no sketched tables, 3 a `replay` by distance, 4 no seals
HVP_WARNING = 0.5  # ||H d|| / ||g|| along the path (spec B.6)
DRIFT_WARNING = 0.7  # ||gamma_t - theta_t|| / ||theta_t - theta_0|| (spec B.6)
LIMIT_BYTES = 8 << 30  # of the gradients that an estimator keeps, unless its `limit_bytes` says otherwise


@dataclass(frozen=True, eq=False)
class Surrogate(ABC):
    """Predicts the held-out loss at the end of training in any order of the reference's batches; lower is better.

    sequence: the reference's. cost: what it took to make. Scores of orders that are no permutation of it are refused.
    """

    name: ClassVar[str]
    sequence: tuple[int, ...]
    cost: Cost

    def score(self, sequence: Sequence[int]) -> float:
        """The predicted held-out loss of one order. Raises: UsageError when it is no permutation."""
        return float(self.scores([sequence])[0])

    def scores(self, sequences: Iterable[Sequence[int]]) -> Tensor:
        """The predicted held-out losses [R] of R orders; inf where the estimated run diverges."""
        listed = [list(map(int, s)) for s in sequences]
        for sequence in listed:
            check_permutation(sequence, self.sequence)
        return self.ranked(torch.tensor(listed, dtype=torch.int64).reshape(-1, len(self.sequence)))

    def ranked(self, sequences: Tensor) -> Tensor:
        """`scores` of checked sequences, int64 [R, T] -> float64 [R]; what is no finite number is inf, the worst."""
        found = self._scores(sequences)
        return torch.where(found.isfinite(), found, math.inf)

    @abstractmethod
    def _scores(self, sequences: Tensor) -> Tensor:
        """int64 [R, T] -> float64 [R]; not finite where the estimated run diverges."""

    def save(self, folder: files.PathLike, reference: ReferenceRun) -> None:
        """Write `tensors.safetensors` and, last, `meta.json`: all but the reference run and the problem."""
        tensors: dict[str, Tensor] = {}
        values = _taken_apart(self, "", tensors)
        folder = files.make_folder(folder)
        sealed.write_tensors(folder / "tensors.safetensors", tensors)
        devices = {key: str(tensor.device) for key, tensor in tensors.items()}
        meta = {"format": FORMAT, "name": self.name, "reference": reference.digest(), "devices": devices}
        sealed.write_json(folder / "meta.json", meta | {"values": values})

    @staticmethod
    def load(folder: files.PathLike, reference: ReferenceRun, problem: Problem) -> Surrogate:
        """Read what `save` wrote, with the reference run that it was made from.

        Raises: DataError for another reference run, and when something is missing or damaged.
        """
        folder = Path(folder)
        meta = sealed.read_json(folder / "meta.json")
        try:
            if meta["format"] != FORMAT:
                raise DataError(f"{folder}: a surrogate of format {meta['format']}, this version reads {FORMAT}")
            if meta["reference"] != reference.digest():
                raise DataError(f"{folder}: this surrogate was made from another reference run; make it again")
            found = sealed.read_tensors(folder / "tensors.safetensors")
            tensors = {key: found[key].to(device) for key, device in meta["devices"].items()}
            kinds = {kind.name: kind for kind in Surrogate.__subclasses__()}
            given = {"reference": reference, "problem": problem}
            made: Surrogate = _put_together(kinds[meta["name"]], meta["values"], "", tensors, given)
            return made
        except (KeyError, TypeError, AttributeError, OSError) as error:
            raise DataError(f"{folder}: a damaged surrogate ({error!r}); remove it, it is made again") from error

    @abstractmethod
    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """Indicators of how far the estimate is from what it rests on, each with a limit in `LIMITS`; small is good."""


def finite(value: Any) -> Any:
    """`value`, with None in place of numbers that are not finite; in lists, tuples and dicts too, for JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _taken_apart(value: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of a dataclass as plain values; its tensors, and those of dataclasses in it, go into `tensors`.

    Left out: the run and the problem, which are given again, and dicts, which are caches. A number that is not finite
    is None there: JSON has no other.
    """
    plain: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            tensors[prefix + field.name] = item
        elif not isinstance(item, ReferenceRun | Problem | dict):
            inside = is_dataclass(item)
            plain[field.name] = _taken_apart(item, f"{prefix}{field.name}.", tensors) if inside else finite(item)
    return plain


def _put_together(kind: Any, plain: dict[str, Any], prefix: str, tensors: dict[str, Tensor], given: Any) -> Any:
    """The inverse of `_taken_apart`, `given` for what it left out."""
    hints, made = get_type_hints(kind), {}
    for field in fields(kind):
        key, value = prefix + field.name, plain.get(field.name)
        if key in tensors:
            value = tensors[key]
        elif field.name in given:
            value = given[field.name]
        elif field.name not in plain:
            continue
        elif isinstance(value, dict):
            inner = next(h for h in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(h))
            value = _put_together(inner, value, f"{key}.", tensors, given)
        elif value is None and hints[field.name] is float:
            value = math.nan
        made[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


LIMITS: dict[str, float] = {
    "curvature": HVP_WARNING,
    "drift": DRIFT_WARNING,
    "replay": 0.2,
    "frozen": 0.5,
    "second_order": 0.05,
    "fresh": 0.7,
    "sketch": 0.2,
    "mixing": 0.2,
}
"""Where an indicator of `trust` says that the estimate may not hold.

Differs: spec B.6 names no limit for the second order; on a small Llama rankings were no better than chance from 0.08
on. `replay` is measured, along the held-out gradient: the error about the reference order, whose truth is known, over
what tells orders apart (`moments.replay`, `pairwise.precompute`). Its limit is where rankings of a small Llama cease to
hold (`python -m tests.benchmarks.order --rates 1e-4,3e-4,1e-3,3e-3`); `pairwise` is at times right beyond it.
`frozen` is the share of an update that a table leaves with the reference's batches.
`sketch` is the relative error of projected terms, and so of what tells orders apart: limited as `replay` is.
`mixing` is how far `groups` is from the blocks that it measured: 0 in blocks, about 1 in a random order.
`fresh` is the share of the second moment that the run itself makes: near 1, no frozen one describes its first steps.
"""


def trusted(indicators: Mapping[str, float]) -> bool:
    """Whether every indicator is within its limit (and a number)."""
    return all(math.isfinite(value) and value <= LIMITS.get(name, math.inf) for name, value in indicators.items())


def random_orders(sequence: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """`count` seeded permutations of a sequence."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(sequence), generator=generator).tolist() for _ in range(count)]
    return [[sequence[place] for place in order] for order in drawn]


# -------------------------------------------------------------------------------------------- named tensors as vectors


@dataclass(frozen=True)
class Layout:
    """How named tensors lie in one vector [p], in the order of the names."""

    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, params: Params) -> Layout:
        """The layout of these parameters."""
        return cls({name: p.shape for name, p in params.items()})

    @property
    def size(self) -> int:
        """p."""
        return sum(shape.numel() for shape in self.shapes.values())

    def vector(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """[p]."""
        return torch.cat([tensors[name].detach().reshape(-1).to(dtype) for name in self.shapes])

    def tensors(self, vector: Tensor) -> Params:
        """name -> [*shape], views of the vector."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), torch.split(vector, sizes), strict=True)
        }


# ----------------------------------------------------------------------------------------- linear moments, as numbers


@dataclass(frozen=True)
class Linear:
    """A rule with frozen second moment, as a linear filter with a diagonal preconditioner.

    One step: m <- beta m + (1 - beta) g, theta <- theta - lr P m / (1 - beta^t) (without bias correction: P m).
    SGD with momentum mu is beta = mu, P = 1 / (1 - mu).
    """

    beta: float
    preconditioner: Tensor  # [p]
    carried: Tensor  # [p], the first moment before the first step
    steps: int | None  # taken before the first position; None: no bias correction

    def correction(self, position: int) -> float:
        """What m is divided by at a position."""
        return 1.0 if self.steps is None else 1.0 - self.beta ** (self.steps + position + 1)

    def filter(self, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
        """E [T, T + 1] and e [T + 1], float64: what a gradient at s, and the carried moment, have moved before step q.

        d_q = -P (sum_{s < q} E[s, q] g_s + e[q] m_0);  E[s, q] = sum_{t = s}^{q - 1} lr_t (1 - b) b^(t - s) / c_t. With
        one learning rate and no bias correction E[s, q] = lr (1 - b^(q - s)): the momentum kernel of spec B.3, and
        E[s, T] its tail.
        """
        n, b = len(rates), self.beta
        moved, carried = torch.zeros(n, n + 1, dtype=torch.float64), torch.zeros(n + 1, dtype=torch.float64)
        weights = torch.zeros(n, dtype=torch.float64)
        for t, rate in enumerate(rates):
            weights *= b
            weights[t] += 1 - b
            moved[:, t + 1] = moved[:, t] + rate * weights / self.correction(t)
            carried[t + 1] = carried[t] + rate * b ** (t + 1) / self.correction(t)
        return moved, carried


def check_linear(recipe: Recipe) -> None:
    """Raise UsageError unless the rule's moments are linear once its preconditioner is frozen, for all parameters."""
    rules = list(recipe.rules.values())
    rule, fields = rules[0], rules[0].describe()
    if any(other != rule for other in rules) or rule.name not in ("adamw", "sgd"):
        names = sorted({r.name for r in rules})
        raise UsageError(
            f"order: this estimator needs moments that are linear with a frozen preconditioner, which adamw and sgd "
            f"have, the same for every parameter; the reference was trained with {', '.join(names)}. Use the estimator "
            "'moments', which carries the state of any rule"
        )
    if rule.name == "sgd" and (fields.get("nesterov") or fields.get("dampening")):
        raise UsageError("order: sgd with nesterov or dampening is not linearised; use the estimator 'moments'")
    if fields.get("amsgrad"):
        raise UsageError("order: adamw with amsgrad is not linearised; use the estimator 'moments'")


def linearised(reference: ReferenceRun, layout: Layout, position: int, second_moment: Tensor | None) -> Linear:
    """The linear filter of the reference's rule, its second moment frozen.

    second_moment: [p], bias-corrected, in place of the one in the anchor's state.
    Raises: UsageError for rules whose moments are not linear: those of `own-moments` are exact for any.
    """
    check_linear(reference.recipe)
    rule = next(iter(reference.recipe.rules.values()))
    fields = rule.describe()
    factors = torch.cat(
        [torch.full((shape.numel(),), float(reference.recipe.factors[name])) for name, shape in layout.shapes.items()]
    )
    states = reference.start.states
    if rule.name == "sgd":
        mu, carried = float(fields["momentum"]), torch.zeros_like(layout.vector(reference.start.params))
        if mu and all("momentum_buffer" in state for state in states.values()):
            carried = layout.vector({n: s["momentum_buffer"] for n, s in states.items()}) * (1 - mu)
        return Linear(mu, factors.to(carried) / (1 - mu), carried, None)
    b1, b2 = fields["betas"]
    anchor = reference.nearest(position)
    if second_moment is None:
        steps = float(next(iter(anchor.states.values()))["step"])
        if steps == 0:
            raise UsageError("order: the second moment at step 0 is zero; anchor later, or warm up first")
        correct = 1 - b2**steps if fields["bias_correction"] else 1.0
        second_moment = layout.vector({n: s["exp_avg_sq"] for n, s in anchor.states.items()}) / correct
    taken = int(next(iter(states.values()))["step"])
    preconditioner = factors.to(second_moment) / ((second_moment + fields["eps_root"]).sqrt() + fields["eps"])
    carried = layout.vector({n: s["exp_avg"] for n, s in states.items()})
    return Linear(float(b1), preconditioner, carried, taken if fields["bias_correction"] else None)
