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
from datatools.errors import DataError
from datatools.files import sealed
from datatools.files.order_file import check_permutation
from datatools.order.problem import Cost, Problem
from datatools.order.reference_run import ReferenceRun

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


# ----------------------------------------------------------------------------------------- linear moments, as numbers
