"""Feature stores of a selection: opened or created, checked, and shared by runs that wait for each other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datatools import DataError, GradientFeatures, OtherFeatures, files
from pipelines.engines import units
from pipelines.engines.units import Job
from pipelines.rows.rows import Rows
from pipelines.runs import following, numerics, workers
from pipelines.runs.messages import say, warn
from pipelines.runs.progress import Progress
from pipelines.select.scored import Context
from pipelines.select.scorer import Asked

FEATURE_VERSION = "2"
"""Increase it if the same model, row and settings give other features: older stores are then refused, not mixed."""


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Lock a store for this run; it waits for another run that fills the store, and uses the result.

    Of the members of a team, the leader holds the lock.

    Args:
        folder: The folder of the store.

    Raises:
        DataError: The folder is a symbolic link.
    """
    if folder.is_symlink():
        raise DataError(f"{folder} is a symbolic link; nothing is written through it: remove it")

    if workers.helps():
        yield
        return

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
    if workers.helps():
        return _opened_by_the_leader(folder, rows, meta)
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
    units.forget(folder, folder.name)
    store.verify()  # a damaged unit is set aside and computed again; its bytes are read for scoring anyway
    _refuse_unfinished(store, among)
    if isinstance(begun, dict) and store.missing_units() and (odd := numerics.differences(begun, numerics.facts())):
        warn(f"{folder} was begun with other numerics ({odd}): its rows and those of this run differ by rounding")
    return store


_PATIENCE_SECONDS = 60.0
"""How long the leader may take to replace a store that was made in another way."""


def _opened_by_the_leader(folder: Path, rows: Mapping[str, int], meta: Mapping[str, Any]) -> GradientFeatures:
    """Return a store as soon as the leader of the team has planned all of `rows` in it.

    Raises:
        DataError: This process would compute other features than the leader.
    """
    plan, looked, odd_since = folder / "plan.json", 0, 0.0
    wanted = json.loads(files.json_bytes(meta))

    def planned() -> bool:
        nonlocal looked, odd_since
        changed = plan.stat().st_mtime_ns if plan.is_file() else 0
        if changed == looked and not odd_since:
            return False
        store = GradientFeatures.open(folder)
        looked = changed
        there = {name: value for name, value in store.meta.items() if name != numerics.GROUP}
        if odd := [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]:
            odd_since = odd_since or time.monotonic()
            if time.monotonic() - odd_since > _PATIENCE_SECONDS:
                raise DataError(f"{folder}: this worker and the leader of the run differ in {', '.join(odd[:3])}")
            return False
        return not store.absent(list(rows)).any()

    following.until(planned)
    return GradientFeatures.open(folder)


def job_of(store: GradientFeatures, bar: Progress, size: Callable[[int], int]) -> Job:
    """Return what is missing in a store as a job of this process, or of its team.

    Args:
        store: The store.
        bar: The progress of the whole, advanced by the units that other members of the team compute.
        size: Returns how far a unit advances it.
    """

    def found(unit: int) -> None:
        bar.advance(size(unit), workers=following.working())

    return Job(store.folder.name, store.folder, store.missing_units(), store.written, found)


def _refuse_unfinished(store: GradientFeatures, rows: Mapping[str, int]) -> None:
    """Refuse a shared store with planned rows that are not computed and that this run does not have."""
    unknown = sum(key not in rows for unit in store.missing_units() for key in store.unit_keys(unit))
    if unknown:
        raise DataError(
            f"{store.folder}: {unknown} rows that another run planned there are not computed yet; finish that "
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
