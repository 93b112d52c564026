"""Feature stores of a selection: opened or created, checked, and shared by runs that wait for each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datatools import DataError, GradientFeatures, OtherFeatures, files
from pipelines.rows.rows import Rows
from pipelines.runs import numerics
from pipelines.runs.messages import say, warn
from pipelines.select.scored import Context
from pipelines.select.scorer import Asked

FEATURE_VERSION = "2"
"""Increase it if the same model, row and settings give other features: older stores are then refused, not mixed."""


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Lock a store for this run; it waits for another run that fills the store, and uses the result.

    Args:
        folder: The folder of the store.

    Raises:
        DataError: The folder is a symbolic link.
    """
    if folder.is_symlink():
        raise DataError(f"{folder} is a symbolic link; nothing is written through it: remove it")

    def waiting(owner: str) -> None:
        say(f"waiting for {owner}, which computes features in {folder}")

    with files.lock_folder(folder, waiting):
        yield


def open_store(
    context: Context,
    folder: Path,
    rows: Mapping[str, int],
    *,
    meta: Mapping[str, Any],
    among: Mapping[str, int] | None = None,
    **options: Any,
) -> GradientFeatures:
    """Return a store, planned for `rows` and checked; this run has to compute what is missing in it.

    Facts that affect the last bits of results are part of its plan. A store that was begun with other numerics is used,
    with a warning.

    Args:
        context: What is scored.
        folder: The folder of the store, which need not exist yet.
        rows: Content keys of the rows that are needed.
        meta: What the features depend on, besides the rows.
        among: Content keys of all rows that the caller can compute, if `rows` are only some of them: units that were
            planned for another shortlist of the same pool are then computed, too.
        **options: As for `GradientFeatures.create_or_open`.

    Raises:
        DataError: Rows are planned there that this run does not have.
    """
    among = rows if among is None else among
    now = numerics.facts()
    begun: dict[str, Any] | None = now
    if (folder / "plan.json").is_file():  # check before this run plans rows there; otherwise neither run could finish
        there = GradientFeatures.open(folder)
        _refuse_unfinished(there, among)
        begun = there.meta.get(numerics.GROUP)  # absent where an earlier version wrote it
    if isinstance(begun, dict):
        options["meta"] = {**meta, numerics.GROUP: begun}
    else:
        options["meta"] = meta
    try:
        store = GradientFeatures.create_or_open(folder, keys=list(rows), **options)
    except OtherFeatures:
        # with its own features folder, a run continues after an accepted change by computing new features
        if context.config.features.folder is not None or not context.run.provenance["changed"]:
            raise
        aside = files.free_name(folder.with_name(f"{folder.name}.old"))
        files.move(folder, aside)
        say(f"{folder} was made before what has changed: it is in {aside.name}, and computed again")
        begun, options["meta"] = now, {**meta, numerics.GROUP: now}
        store = GradientFeatures.create_or_open(folder, keys=list(rows), **options)
    store.verify()  # a damaged unit is set aside and computed again; its bytes are read for scoring anyway
    _refuse_unfinished(store, among)
    if isinstance(begun, dict) and store.missing_units() and (odd := numerics.differences(begun, numerics.facts())):
        warn(f"{folder} was begun with other numerics ({odd}): its rows and those of this run differ by rounding")
    return store


def _refuse_unfinished(store: GradientFeatures, rows: Mapping[str, int]) -> None:
    """Refuse a shared store with planned rows that are not computed and that this run does not have."""
    unknown = {key for unit in store.missing_units() for key in store.unit_keys(unit)} - set(rows)
    if unknown:
        raise DataError(
            f"{store.folder}: {len(unknown)} rows that another run planned there are not computed yet; finish that "
            "run first, or choose another features.folder"
        )


def tokens_of(rows: Rows, folder: Path) -> tuple[float, float]:
    """Return the tokens of the unique usable rows, and of those whose features are not in a store yet.

    Args:
        rows: The pool or the target.
        folder: The folder of the store.
    """
    there, unique = _stored(folder), rows.unique()
    whole = sum(int(rows.scan.tokens[i]) for i in unique.values())
    return float(whole), float(sum(int(rows.scan.tokens[i]) for key, i in unique.items() if key not in there))


def _stored(folder: Path) -> set[str]:
    """Return the keys whose features are already in the store `folder`."""
    if not (folder / "plan.json").is_file():
        return set()
    store = GradientFeatures.open(folder)
    missing = set(store.missing_units())
    return {key for unit in range(store.units) if unit not in missing for key in store.unit_keys(unit)}


def kept(asked: Asked, *names: str) -> Path:
    """Return the folder of the features of a finished run.

    Args:
        asked: The question.
        *names: The names of the stores that are needed.

    Raises:
        DataError: One of the stores is missing.
    """
    home = asked.config.features.folder or asked.folder / "features"
    if not all((home / name).is_dir() for name in names):
        raise DataError(f"{home}: the run's features are gone; run the same selection again to explain its selection")
    return home
