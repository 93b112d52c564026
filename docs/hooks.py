"""Tables of the documentation: `<!-- table: KIND -->` in a page becomes what `datatools ls KIND` lists.

mkdocs calls `on_page_markdown`; tests call `table`. An unknown kind is an error, so that no page promises one.
"""

from __future__ import annotations

import re
from typing import Any

from pipelines import listing

MARK = re.compile(r"<!-- table: (\w+) -->")


def table(kind: str) -> str:
    """Returns the Markdown table of one kind. Raises: UsageError for a kind that `datatools ls` does not have."""
    rows = listing.rows(kind)
    head = [re.sub(r"-?\n", "", column) for column in listing.KINDS[kind][1]]
    lines = [head, ["---"] * len(head), *([f"`{row[0]}`", *map(_cell, row[1:])] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """The text, with an example on a line of its own as code."""
    said, _, example = text.replace("|", "\\|").partition("\n")
    return f"{said}<br>`{example}`" if example else said


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' hook: the page with its tables."""
    return MARK.sub(lambda found: table(found[1]), markdown)
