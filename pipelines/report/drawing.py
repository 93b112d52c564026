"""Reports are drawn last, and their failure loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipelines.runs.messages import say, warn


def draw_last(draw: Callable[[], Path | None], *, saved: Path) -> Path | None:
    """`draw()`, once all that took computing is saved in `saved`: a report that cannot be drawn is a warning.

    Returns: the page, or None.
    """
    try:
        page = draw()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        warn(
            f"the report could not be drawn ({type(error).__name__}: {first}); what was computed is safe in {saved}, "
            "and the same command draws the page again without computing it anew"
        )
        return None
    if page is not None:
        say(f"report: {page}")
    return page
