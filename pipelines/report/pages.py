"""Which report a run folder gets: `datatools report DIR` looks for what the run has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from datatools import UsageError
from pipelines.report import audit_page, run_page, select_page
from pipelines.report import colm_page as coreset_report
from pipelines.report import diagnose_page as diagnose_view
from pipelines.report import order_page as order_report
from pipelines.report import training_page as training_report
from pipelines.report.page import damaged
from pipelines.runs import run_files
from pipelines.runs.messages import say

KINDS: dict[str, Callable[[Path], Path]] = {
    "summary.json": select_page.render,
    "audit.json": audit_page.render,
    "diagnose.json": diagnose_view.render,
    "coreset.json": coreset_report.render,
    training_report.FACTS: training_report.render,
    **{f"{part}.json": order_report.render for part in order_report.PARTS},
}
"""A file that a finished run has -> what draws its page."""


def draw(folder: Path) -> Path:
    """Draw report.html of the run in `folder` again; returns its path. A run without a result has the page of a run.

    Raises:
        UsageError: where there is no run.
        DataError: where a result is damaged.
    """
    if not folder.is_dir():
        there = "this is a file" if folder.exists() else "no such folder"
        raise UsageError(f"report {folder}: {there}; give the folder of a run")
    run_files.refuse_special(folder)
    if text := run_files.note(folder):
        say(text)
    for name, render in KINDS.items():
        if (folder / name).is_file():
            with damaged(folder / name, "run the same command again to write it anew"):
                return render(folder)
    if not (folder / "run.yaml").is_file():
        raise UsageError(f"report {folder}: not the folder of a run (run.yaml is missing)")
    return run_page.render(folder)
