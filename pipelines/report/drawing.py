"""Drawing reports after everything else, so that a failure loses no result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipelines.runs.messages import say, warn


def draw_last(draw: Callable[[], Path | None], *, saved: Path) -> Path | None:
    """Call `draw` after all results have been saved; a report that cannot be drawn is only a warning.

    Args:
        draw: Draws the page.
        saved: The folder with the results, for the message.

    Returns:
        The page, or None.
    """
    try:
        page = draw()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        warn(
            f"the report could not be drawn ({type(error).__name__}: {first}); the results are saved in {saved}, "
            "and the same command draws the page again without computing them"
        )
        return None
    if page is not None:
        say(f"report: {page}")
    return page
