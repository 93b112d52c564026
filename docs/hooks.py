"""Tables and equations of the documentation.

`<!-- table: KIND -->` in a page becomes what `datatools ls KIND` lists, and `<!-- settings: COMMAND -->` all settings
of a command, with their flags, defaults and meanings. mkdocs calls the functions `on_...`; tests call `table` and
`settings`. An unknown kind is an error, so that no page promises one.
"""

from __future__ import annotations

import html
import re
from typing import Any

from pipelines import listing
from pipelines.cli.commands import COMMANDS
from pipelines.settings import reference

MARK = re.compile(r"<!-- table: (\w+) -->")
SETTINGS = re.compile(r"<!-- settings: (\w+) -->")
EQUATION = re.compile(r'<(?:span|div) class="arithmatex">(.*?)</(?:span|div)>', re.S)
MODELS = {name: COMMANDS[name].settings for name in ("select", "train", "order", "audit", "diagnose")}


def table(kind: str) -> str:
    """Returns the Markdown table of one kind. Raises: UsageError for a kind that `datatools ls` does not have."""
    rows = listing.rows(kind)
    head = [re.sub(r"-?\n", "", column) for column in listing.KINDS[kind][1]]
    return _markdown(head, [[f"`{row[0]}`", *map(_cell, row[1:])] for row in rows])


def settings(command: str) -> str:
    """Returns the Markdown table of all settings of one command."""
    code = [
        [f"`{cell}`" if cell else "" for cell in row[:3]] + [_cell(row[3])] for row in reference.rows(MODELS[command])
    ]
    return _markdown(["setting", "flag", "default", "meaning"], code)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """The text, with an example on a line of its own as code."""
    said, _, example = text.replace("|", "\\|").partition("\n")
    if example.startswith("{"):
        example = f"`{example}`"
    return f"{said}<br>{example}" if example else said


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' hook: the page with its tables."""
    return SETTINGS.sub(lambda found: settings(found[1]), MARK.sub(lambda found: table(found[1]), markdown))


def on_page_content(content: str, **_: Any) -> str:
    """mkdocs' hook: equations as MathML, which browsers draw themselves; no script and no network is needed."""
    from latex2mathml.converter import convert  # of the docs extra

    def drawn(found: re.Match[str]) -> str:
        text = html.unescape(found[1])
        return convert(text[2:-2].strip(), display="block" if text.startswith("\\[") else "inline")

    return EQUATION.sub(drawn, content)
