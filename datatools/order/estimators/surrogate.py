"""The base class of estimates: cheap functions from orders to predicted held-out losses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from jaxtyping import Float64, Int64
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
LIMIT_BYTES = 8 << 30  # default size limit of the gradients that an estimator stores


@dataclass(frozen=True, eq=False)
class Surrogate(ABC):
    """Predicts the held-out loss at the end of training in any order of the reference's batches; lower is better.

    Orders that are not a permutation of the reference's sequence are refused. The class is also the record of the
    estimator: `datatools order`, `datatools ls estimators`, cost estimates and checks read its attributes.

    Args:
        sequence: the reference's sequence of batches.
        cost: cost of computing the estimate.

    Attributes:
        name: name in `ESTIMATORS`, in `--estimators` and in saved files.
        title: description in one line.
        once: cost of computing the estimate, in words.
        each: cost of a score, in words.
        source: origin of the method.
        limits: indicator of `trust` -> the largest value for which the estimate is considered valid.
        every_step: whether it needs an anchor at every step of the reference run.
        by_source: whether each batch must come from one source.
        keeps_gradients: whether it stores gradients, whose size `LIMIT_BYTES` limits.
        together: number of orders that a local search scores at a time.

    Example:
        >>> from datatools.order import precompute
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> surrogate = precompute("moments", reference, problem)
        >>> surrogate.scores([(0, 1, 2, 3), (3, 2, 1, 0)]).shape, sorted(surrogate.trust((3, 2, 1, 0)))
        (torch.Size([2]), ['curvature', 'drift', 'replay'])

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
        """Compute the estimate from a reference run.

        Args:
            reference: the recorded run.
            problem: the batches and their loss.
            options: options of the estimator.

        Returns:
            The estimate.

        """
        raise NotImplementedError(cls.__name__)

    @classmethod
    def options(cls, question: Question) -> dict[str, Any]:
        """Return the options of `precompute` that the settings choose.

        Args:
            question: the order question.

        Returns:
            Keyword arguments.

        """
        return {}

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """Predict the cost of `precompute`.

        Args:
            question: the order question.

        Returns:
            Gradients, products, and the largest block of memory in bytes.

        """
        return Cost()

    @classmethod
    def per_score(cls, question: Question) -> float:
        """Predict the cost of a score.

        Args:
            question: the order question.

        Returns:
            The cost in batch gradients.

        """
        return 0.0 if cls.fast(question.settings) else question.held_out / 3

    @classmethod
    def fast(cls, settings: Settings) -> bool:
        """Return whether a score needs neither the model nor the rule.

        Args:
            settings: settings of the estimators.

        Returns:
            Whether it does not.

        """
        return False

    @classmethod
    def freezes(cls, settings: Settings) -> bool:
        """Return whether the second moment is frozen, which requires linear moments and a warmed-up optimizer.

        Args:
            settings: settings of the estimators.

        Returns:
            Whether it is.

        """
        return False

    @classmethod
    def depends_on(cls, question: Question) -> dict[str, Any]:
        """Return the settings that determine the numbers of the estimate; other values are stored in other files.

        Args:
            question: the order question.

        Returns:
            Name of the setting in stored files -> its value.

        """
        return {} if cls.every_step else {"recorded": question.settings.anchors}

    @classmethod
    def check(cls, question: Question) -> None:
        """Refuse a question that the estimator cannot answer, before anything is computed.

        Args:
            question: the order question.

        Raises:
            UsageError: if the second moment is frozen and the rule's moments are not linear.

        """
        if cls.freezes(question.settings):
            check_linear(question.recipe)

    def score(self, sequence: Sequence[int]) -> float:
        """Predict the held-out loss of one order.

        Args:
            sequence: a permutation of the reference's sequence.

        Returns:
            The loss; inf if the estimated run diverges.

        Raises:
            UsageError: if the order is not a permutation of the reference's.

        """
        return float(self.scores([sequence])[0])

    def scores(self, sequences: Iterable[Sequence[int]]) -> Float64[Tensor, " R"]:
        """Predict the held-out losses of R orders.

        Args:
            sequences: permutations of the reference's sequence.

        Returns:
            float64 [R]; inf if the estimated run diverges.

        Raises:
            UsageError: if an order is not a permutation of the reference's.

        """
        listed = [list(map(int, s)) for s in sequences]
        for sequence in listed:
            check_permutation(sequence, self.sequence)
        return self.ranked(torch.tensor(listed, dtype=torch.int64).reshape(-1, len(self.sequence)))

    def ranked(self, sequences: Int64[Tensor, "R T"]) -> Float64[Tensor, " R"]:
        """Predict losses of sequences that have been checked.

        Args:
            sequences: int64 [R, T].

        Returns:
            float64 [R]; losses that are not finite become inf, the worst.

        """
        found = self._scores(sequences)
        return torch.where(found.isfinite(), found, math.inf)

    @abstractmethod
    def _scores(self, sequences: Tensor) -> Tensor:
        """Score orders: int64 [R, T] -> float64 [R]; not finite if the estimated run diverges."""

    def save(self, folder: files.PathLike, reference: ReferenceRun) -> None:
        """Write `tensors.safetensors` and, last, `meta.json`, without the reference run and the problem.

        Args:
            folder: folder to write to; created if missing.
            reference: the reference run, whose digest is recorded.

        """
        tensors: dict[str, Tensor] = {}
        values = _taken_apart(self, "", tensors)
        folder = files.make_folder(folder)
        sealed.write_tensors(folder / "tensors.safetensors", tensors)
        devices = {key: str(tensor.device) for key, tensor in tensors.items()}
        meta = {"format": FORMAT, "name": self.name, "reference": reference.digest(), "devices": devices}
        sealed.write_json(folder / "meta.json", meta | {"values": values})

    @abstractmethod
    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """Measure how far an order is from the assumptions of the estimate; small values are good.

        Args:
            sequence: a permutation of the reference's sequence.

        Returns:
            Indicator -> value; each indicator has a limit in `limits`.

        """

    def matrix(self) -> Float64[Tensor, "n n"] | None:
        """Compute the cost of having batch i before batch j instead of after it.

        Returns:
            float64 [n, n], or None if the estimate has no such matrix.

        """
        return None


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, for JSON; also in lists, tuples and dicts.

    Args:
        value: a plain value.

    Returns:
        The converted value.

    Example:
        >>> finite({"loss": math.inf, "steps": [1, 2]})
        {'loss': None, 'steps': [1, 2]}

    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _taken_apart(value: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Convert the fields of a dataclass to plain values; its tensors, also of nested dataclasses, go into `tensors`.

    The run and the problem, which are passed again, and dicts, which are caches, are omitted. Numbers that are not
    finite become None, because JSON cannot represent them.
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
    """Build an estimate from the values and tensors that `Surrogate.save` wrote.

    Args:
        kind: class of the estimate.
        plain: plain values by field.
        tensors: tensors by field.
        reference: the reference run.
        problem: the batches and their loss.

    Returns:
        The estimate.

    """
    made: Surrogate = _put_together(kind, plain, "", tensors, {"reference": reference, "problem": problem})
    return made


def _put_together(kind: Any, plain: dict[str, Any], prefix: str, tensors: dict[str, Tensor], given: Any) -> Any:
    """Invert `_taken_apart`; `given` has the fields that it omits."""
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
    """Draw random permutations of a sequence.

    Args:
        sequence: batch numbers [T].
        count: number of permutations.
        seed: seed of the draws.

    Returns:
        The permutations.

    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(sequence), generator=generator).tolist() for _ in range(count)]
    return [[sequence[place] for place in order] for order in drawn]
