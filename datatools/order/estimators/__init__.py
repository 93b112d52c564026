"""Estimators of the result of training in another order: one file and one line in `ESTIMATORS` each.

An estimator is a class derived from `Surrogate`. Its attributes and class methods describe it (name, cost,
requirements, and the settings on which its numbers depend); its instances are the estimates.
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
    "span": "datatools.order.estimators.span:Span",
}
"""Name -> the class, or its location ("module:Class"), which is imported when the estimator is first used."""


def estimator(name: str) -> type[Surrogate]:
    """Look up an estimator.

    Args:
        name: a name of `ESTIMATORS`.

    Returns:
        The class.

    Raises:
        UsageError: if there is no such estimator.

    Example:
        >>> estimator("pairwise").title
        'a precedence matrix of the batches, with the kernel of the momentum'

    """
    if name not in ESTIMATORS:
        raise UsageError(f"order: unknown estimator {name!r}{did_you_mean(name, ESTIMATORS)}")
    found = ESTIMATORS[name]
    if isinstance(found, str):
        module, _, kind = found.partition(":")
        found = getattr(import_module(module), kind)
    assert not isinstance(found, str)
    return found


def precompute(name: str, reference: ReferenceRun, problem: Problem, **options: Any) -> Surrogate:
    """Compute an estimate from a reference run.

    Args:
        name: a name of `ESTIMATORS`.
        reference: the recorded run.
        problem: the batches and their loss, as recorded.
        options: options of the estimator's own `precompute`.

    Returns:
        The estimate.

    Raises:
        UsageError: if the name is unknown, or the estimator raises it.

    Example:
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> surrogate = precompute("pairwise", reference, problem)
        >>> round(surrogate.score(reference.sequence) - problem.held_out_loss(reference.end.params), 6)
        0.0

    """
    return estimator(name).precompute(reference, problem, **options)


def load_surrogate(folder: files.PathLike, reference: ReferenceRun, problem: Problem) -> Surrogate:
    """Read an estimate that `Surrogate.save` wrote.

    Args:
        folder: the folder.
        reference: the reference run from which it was computed.
        problem: the batches and their loss.

    Returns:
        The estimate.

    Raises:
        DataError: if it was computed from another reference run, or a file is missing or damaged (a KeyError inside
            becomes one).

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
            raise DataError(
                f"{folder}: the surrogate has format {meta['format']}, but this version reads {FORMAT}; "
                "compute it again"
            )
        if meta["reference"] != reference.digest():
            raise DataError(f"{folder}: the surrogate was computed from another reference run; compute it again")
        found = sealed.read_tensors(folder / "tensors.safetensors")
        tensors = {key: found[key].to(device) for key, device in meta["devices"].items()}
        if meta["name"] not in ESTIMATORS:
            raise KeyError(meta["name"])
        return put_together(estimator(meta["name"]), meta["values"], tensors, reference, problem)
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{folder}: the surrogate is damaged ({error!r}); remove it and compute it again") from error


def limits() -> dict[str, float]:
    """Collect the limits of all indicators of `Surrogate.trust`.

    Returns:
        Indicator -> the largest value for which an estimate is considered valid.

    Example:
        >>> limits()["replay"]
        0.2

    """
    found: dict[str, float] = {}
    for name in ESTIMATORS:
        found |= estimator(name).limits
    return found


def trusted(indicators: Mapping[str, float]) -> bool:
    """Return whether every indicator is a finite number within its limit.

    Args:
        indicators: result of `Surrogate.trust`.

    Returns:
        Whether the estimate is considered valid.

    Example:
        >>> trusted({"drift": 0.1, "replay": 0.05}), trusted({"drift": 0.9})
        (True, False)

    """
    known = limits()
    return all(math.isfinite(value) and value <= known.get(name, math.inf) for name, value in indicators.items())
