"""Estimators of what another order would have done: one file and one line in `ESTIMATORS` each.

An estimator is a class that derives from `Surrogate`. Its attributes and class methods say what others need to know
(its name, what it costs, what it needs, what its numbers depend on); its instances are the estimates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from datatools import files
from datatools.errors import DataError, UsageError, did_you_mean
from datatools.files import sealed
from datatools.order.estimators.surrogate import FORMAT, Surrogate, put_together
from datatools.order.problem import Problem
from datatools.order.reference_run import ReferenceRun

ESTIMATORS: dict[str, str | type[Surrogate]] = {
    "pairwise": "datatools.order.estimators.pairwise:Pairwise",
    "reduced": "datatools.order.estimators.reduced:Reduced",
    "moments": "datatools.order.estimators.moments:Moments",
    "own-moments": "datatools.order.estimators.own_moments:OwnMoments",
    "table": "datatools.order.estimators.fut:Table",
    "groups": "datatools.order.estimators.groups:Groups",
}
"""Name -> the class, or where it is ("module:Class"), which is imported when the estimator is first used."""


def estimator(name: str) -> type[Surrogate]:
    """The estimator of that name.

    Raises:
        UsageError: for a name that is not in `ESTIMATORS`.

    Example:
        >>> estimator("pairwise").title
        'a precedence matrix of the batches, with the kernel of the momentum'

    """
    if name not in ESTIMATORS:
        raise UsageError(f"order: no estimator is called {name!r}{did_you_mean(name, ESTIMATORS)}")
    found = ESTIMATORS[name]
    if isinstance(found, str):
        module, _, kind = found.partition(":")
        found = getattr(import_module(module), kind)
    assert not isinstance(found, str)
    return found


def precompute(name: str, reference: ReferenceRun, problem: Problem, **options: Any) -> Surrogate:
    """The estimate of that name, made from a reference run.

    Args:
        name: in `ESTIMATORS`.
        reference: the recorded run.
        problem: the batches and their loss, as recorded.
        options: those of the estimator's own `precompute`.

    Raises:
        UsageError: for an unknown name; and what the estimator raises.

    Example:
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> surrogate = precompute("pairwise", reference, problem)
        >>> round(surrogate.score(reference.sequence) - problem.held_out_loss(reference.end.params), 6)
        0.0

    """
    return estimator(name).precompute(reference, problem, **options)


def load_surrogate(folder: files.PathLike, reference: ReferenceRun, problem: Problem) -> Surrogate:
    """Read what `Surrogate.save` wrote, with the reference run that it was made from.

    Raises:
        DataError: for another reference run, and when something is missing or damaged.

    Example:
        >>> import tempfile
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> made = precompute("pairwise", reference, problem)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made.save(folder, reference)
        ...     read = load_surrogate(folder, reference, problem)
        >>> read.score((3, 2, 1, 0)) == made.score((3, 2, 1, 0))
        True

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
        if meta["name"] not in ESTIMATORS:
            raise KeyError(meta["name"])
        return put_together(estimator(meta["name"]), meta["values"], tensors, reference, problem)
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{folder}: a damaged surrogate ({error!r}); remove it, it is made again") from error


def limits() -> dict[str, float]:
    """Each indicator of `Surrogate.trust` -> the value up to which the estimate is taken to hold.

    Example:
        >>> limits()["replay"]
        0.2

    """
    found: dict[str, float] = {}
    for name in ESTIMATORS:
        found |= estimator(name).limits
    return found


def trusted(indicators: Mapping[str, float]) -> bool:
    """Whether every indicator is a number within its limit.

    Example:
        >>> trusted({"drift": 0.1, "replay": 0.05}), trusted({"drift": 0.9})
        (True, False)

    """
    known = limits()
    return all(math.isfinite(value) and value <= known.get(name, math.inf) for name, value in indicators.items())
