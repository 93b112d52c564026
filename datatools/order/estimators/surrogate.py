"""What an estimator leaves behind: a cheap function from orders to predicted held-out losses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from torch import Tensor

from datatools import files
from datatools.files import sealed
from datatools.files.order_file import check_permutation
from datatools.order.estimators.linear import check_linear
from datatools.order.estimators.question import Question, Settings
from datatools.order.problem import Cost, Problem
from datatools.order.reference_run import ReferenceRun

FORMAT = 5  # 1 had no `replay`, 2 no sketched tables, 3 a `replay` by distance, 4 no seals
CURVATURE_LIMIT = 0.5  # ||H d|| / ||g|| along the path (spec B.6)
DRIFT_LIMIT = 0.7  # ||gamma_t - theta_t|| / ||theta_t - theta_0|| (spec B.6)
LIMIT_BYTES = 8 << 30  # of the gradients that an estimator keeps, unless its `limit_bytes` says otherwise


@dataclass(frozen=True, eq=False)
class Surrogate(ABC):
    """Predicts the held-out loss at the end of training in any order of the reference's batches; lower is better.

    Scores of orders that are no permutation of the reference's sequence are refused. The class is the record of the
    estimator: what `datatools order`, `datatools ls estimators`, costs and checks know of it stands here.

    Args:
        sequence: the reference's sequence of batches.
        cost: what making the estimate took.

    Attributes:
        name: in `ESTIMATORS`, in `--estimators` and in saved files.
        title: what it is, in one line.
        once: what making it costs, in words.
        each: what a score costs, in words.
        source: where the method comes from.
        limits: each indicator of `trust` -> the value up to which the estimate is taken to hold.
        every_step: whether it needs an anchor at every step of the reference run.
        by_source: whether it needs batches of one source each.
        keeps_gradients: whether it keeps gradients, whose size `LIMIT_BYTES` limits.
        together: how many orders a local search has scored at a time.

    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    once: ClassVar[str] = ""
    each: ClassVar[str] = ""
    source: ClassVar[str] = ""
    limits: ClassVar[Mapping[str, float]] = {}
    every_step: ClassVar[bool] = False
    by_source: ClassVar[bool] = False
    keeps_gradients: ClassVar[bool] = False
    together: ClassVar[int] = 64

    sequence: tuple[int, ...]
    cost: Cost

    @classmethod
    def precompute(cls, reference: ReferenceRun, problem: Problem, **options: Any) -> Surrogate:
        """The estimate, made from a reference run; every entry of `ESTIMATORS` has one."""
        raise NotImplementedError(cls.__name__)

    @classmethod
    def options(cls, question: Question) -> dict[str, Any]:
        """The options of `precompute` that the settings ask for."""
        return {}

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """What making it will take: gradients, products, and the largest block of memory in bytes."""
        return Cost()

    @classmethod
    def per_score(cls, question: Question) -> float:
        """What a score takes, in batch gradients."""
        return 0.0 if cls.fast(question.settings) else question.held_out / 3

    @classmethod
    def fast(cls, settings: Settings) -> bool:
        """Whether a score needs neither the model nor the rule."""
        return False

    @classmethod
    def freezes(cls, settings: Settings) -> bool:
        """Whether it freezes the second moment, and so needs a rule with linear moments and a warm optimizer."""
        return False

    @classmethod
    def depends_on(cls, question: Question) -> dict[str, Any]:
        """The settings that its numbers depend on, in the names of what is kept of it: other values, other files."""
        return {} if cls.every_step else {"recorded": question.settings.anchors}

    @classmethod
    def check(cls, question: Question) -> None:
        """Refuse what cannot be made, before anything is computed.

        Raises:
            UsageError: for a rule whose moments are not linear, where the second moment is frozen.

        """
        if cls.freezes(question.settings):
            check_linear(question.recipe)

    def score(self, sequence: Sequence[int]) -> float:
        """The predicted held-out loss of one order.

        Raises:
            UsageError: when it is no permutation of the reference's.
        """
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

    @abstractmethod
    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """Indicators of how far the estimate is from what it rests on, each with a limit in `limits`; small is good."""

    def matrix(self) -> Tensor | None:
        """What it costs to have batch i before batch j rather than after, [n, n]; None where that is not known."""
        return None


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


def put_together(
    kind: type[Surrogate],
    plain: dict[str, Any],
    tensors: dict[str, Tensor],
    reference: ReferenceRun,
    problem: Problem,
) -> Surrogate:
    """A surrogate of the values and tensors that `Surrogate.save` wrote."""
    made: Surrogate = _put_together(kind, plain, "", tensors, {"reference": reference, "problem": problem})
    return made


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


def random_orders(sequence: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """`count` seeded permutations of a sequence."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(sequence), generator=generator).tolist() for _ in range(count)]
    return [[sequence[place] for place in order] for order in drawn]


# -------------------------------------------------------------------------------------------- named tensors as vectors


# ----------------------------------------------------------------------------------------- linear moments, as numbers
