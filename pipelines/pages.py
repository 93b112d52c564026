"""Which report a run folder gets: `datatools report DIR` looks for what the run has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from datatools import DataError, UsageError
from pipelines import coreset_report, diagnose_view, order_report, report

KINDS: dict[str, Callable[[Path], Path]] = {
    "summary.json": report.render,
    "diagnose.json": diagnose_view.render,
    "coreset.json": coreset_report.render,
    **{f"{part}.json": order_report.render for part in order_report.PARTS},
}
"""A file that a finished run has -> what draws its page."""


def draw(folder: Path) -> Path:
    """Draw report.html of the run in `folder` again; returns its path.

    Raises: UsageError where there is no run; DataError where a run is not finished, or has no report of its own.
    """
    if not folder.is_dir():
        raise UsageError(f"report {folder}: no such folder; give the folder of a run")
    for name, render in KINDS.items():
        if (folder / name).is_file():
            return render(folder)
    if not (folder / "run.yaml").is_file():
        raise UsageError(f"report {folder}: not the folder of a run (run.yaml is missing)")
    raise DataError(
        f"report {folder}: there is nothing to draw yet: the run has written none of {', '.join(KINDS)}. A run that "
        "was interrupted writes it when the same command is given again; training has a report where it chose "
        "coresets, and an audit is drawn into the report of its selection"
    )
