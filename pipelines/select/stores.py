"""Feature stores of a selection: opened or begun, checked, shared by runs that wait for each other."""

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
"""Raise it when the same model, row and settings give other features: stores made before are then refused, not
mixed."""


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """The store in `folder` for this run alone: it waits for another run that fills it, and uses what that one made."""
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
    """The store in `folder`, planned for `rows` and checked: what is missing in it now is this run's to compute.

    What decides last bits is in its plan. A store that was begun with other numerics is used, and that is said.

    Args:
        context: What is being scored.
        folder: Where the store is, or will be.
        rows: Content keys of the rows that are needed.
        meta: What the features are a function of, besides the rows.
        among: Content keys of all rows that the caller can compute, where `rows` are some of them: units that were
            planned for another shortlist of the same pool are then computed too.
        options: As for `GradientFeatures.create_or_open`.

    Raises:
        DataError: Rows are planned there that this run does not have.
    """
    among = rows if among is None else among
    now = numerics.facts()
    begun: dict[str, Any] | None = now
    if (folder / "plan.json").is_file():  # asked before this run plans rows there, or neither could ever finish
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
        # of its own features a run may go on past a change that was accepted: with new ones
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
    """Refuse a shared store in which rows that this run does not have are planned and not computed."""
    unknown = {key for unit in store.missing_units() for key in store.unit_keys(unit)} - set(rows)
    if unknown:
        raise DataError(
            f"{store.folder}: {len(unknown)} rows that another run planned there are not computed yet; finish that "
            "run first, or choose another features.folder"
        )


def tokens_of(rows: Rows, folder: Path) -> tuple[float, float]:
    """Tokens of the unique usable rows, in all, and of those whose features are not in the store `folder` yet."""
    there, unique = _stored(folder), rows.unique()
    whole = sum(int(rows.scan.tokens[i]) for i in unique.values())
    return float(whole), float(sum(int(rows.scan.tokens[i]) for key, i in unique.items() if key not in there))


def _stored(folder: Path) -> set[str]:
    """The keys whose features are in the store `folder` already."""
    if not (folder / "plan.json").is_file():
        return set()
    store = GradientFeatures.open(folder)
    missing = set(store.missing_units())
    return {key for unit in range(store.units) if unit not in missing for key in store.unit_keys(unit)}


def kept(asked: Asked, *names: str) -> Path:
    """The folder of the features of a finished run.

    Raises:
        DataError: if one of the stores `names` is not in it.
    """
    home = asked.config.features.folder or asked.folder / "features"
    if not all((home / name).is_dir() for name in names):
        raise DataError(f"{home}: the run's features are gone; run the same selection again to explain its picks")
    return home
