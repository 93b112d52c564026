"""The page of each kind of run folder: `datatools report DIR` looks for the files of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from datatools import UsageError
from pipelines.report import audit_page, colm_page, diagnose_page, order_page, run_page, select_page, training_page
from pipelines.report.page import damaged
from pipelines.runs import run_files
from pipelines.runs.messages import say


class Kind(NamedTuple):
    """A kind of page: the files, one of which its run folder has, and the function that draws it."""

    files: tuple[str, ...]
    render: Callable[[Path], Path]
    """Folder -> the page that was written."""


KINDS = [
    Kind(("summary.json",), select_page.render),
    Kind(("audit.json",), audit_page.render),
    Kind(("diagnose.json",), diagnose_page.render),
    Kind(("coreset.json",), colm_page.render),
    Kind((training_page.FACTS,), training_page.render),
    Kind(tuple(f"{part}.json" for part in order_page.PARTS), order_page.render),
]
"""One line per kind of page; a folder with files of several kinds gets the first."""


def draw(folder: Path) -> Path:
    """Draw report.html of a run again; a run without a result gets the page of a run.

    Args:
        folder: The folder of the run.

    Returns:
        The page.

    Raises:
        UsageError: There is no run.
        DataError: A result is damaged.
    """
    if not folder.is_dir():
        there = "this is a file" if folder.exists() else "no such folder"
        raise UsageError(f"report {folder}: {there}; give the folder of a run")
    run_files.refuse_special(folder)
    if text := run_files.note(folder):
        say(text)
    for kind in KINDS:
        for name in kind.files:
            if (folder / name).is_file():
                with damaged(folder / name, "run the same command again to write it"):
                    return kind.render(folder)
    if not (folder / "run.yaml").is_file():
        raise UsageError(f"report {folder}: not the folder of a run (run.yaml is missing)")
    return run_page.render(folder)
