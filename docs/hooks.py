"""Tables and equations of the documentation.

`<!-- table: KIND -->` in a page becomes what `datatools ls KIND` lists, and `<!-- settings: COMMAND -->` all settings
of a command, with their flags, defaults and meanings. mkdocs calls the functions `on_...`; tests call `table` and
`settings`. An unknown kind is an error, so that no page promises one.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from pipelines import listing
from pipelines.cli.commands import COMMANDS
from pipelines.settings import reference

MARK = re.compile(r"<!-- table: (\w+) -->")
SETTINGS = re.compile(r"<!-- settings: (\w+) -->")
EQUATION = re.compile(r'<(?:span|div) class="arithmatex">(.*?)</(?:span|div)>', re.S)
BELOW = re.compile(r"<msub>(<mo>(?:min|max)</mo><mrow>(?:(?!<msub>).)*?</mrow>)</msub>")
"""What a minimum or maximum is over; in an equation on a line of its own it stands below."""
MODELS = {name: COMMANDS[name].settings for name in ("select", "train", "order", "audit", "diagnose")}
METHODS = Path(__file__).resolve().parent / "pages" / "methods"
SHARED_PAGES = {
    "aggregations": "aggregations.md",
    "features": "colm.md",
    "optimizers": "optimizers.md",
    "projectors": "projections.md",
    "searches": "searches.md",
    "selectors": "selectors.md",
}
"""Kinds whose methods share a page; each other method is in the heading of its own."""


def page_of(kind: str, name: str) -> str:
    """Returns the file of the page about one method. Raises: KeyError if there is none."""
    if kind in SHARED_PAGES:
        return SHARED_PAGES[kind]
    for path in sorted(METHODS.glob("*.md")):
        heading = path.read_text(encoding="utf-8").partition("\n")[0]
        if name in re.findall(r"[\w-]+", " ".join(re.findall("`([^`]+)`", heading))):
            return path.name
    raise KeyError(f"no page in {METHODS} has {name!r} of the {kind} in its heading")


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


def _linked(kind: str) -> str:
    """The table of one kind, where each method is a link to its page."""
    if kind == "formats":
        return table(kind)
    return re.sub(
        r"^\| `([^`]+)`", lambda found: f"| [`{found[1]}`]({page_of(kind, found[1])})", table(kind), flags=re.MULTILINE
    )


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """mkdocs' hook: the page with its tables, in which the overview of methods links to the pages of methods."""
    overview = page is not None and page.file.src_uri == "methods/index.md"
    markdown = MARK.sub(lambda found: (_linked if overview else table)(found[1]), markdown)
    return SETTINGS.sub(lambda found: settings(found[1]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """mkdocs' hook: equations as MathML, which browsers draw themselves; no script and no network is needed."""
    from latex2mathml.converter import convert  # of the docs extra

    def drawn(found: re.Match[str]) -> str:
        text = html.unescape(found[1])
        done = convert(text[2:-2].strip(), display="block" if text.startswith("\\[") else "inline")
        if "\\" in done:
            raise ValueError(f"an equation has a command that latex2mathml does not know: {text}")
        return BELOW.sub(r"<munder>\1</munder>", done) if text.startswith("\\[") else str(done)

    return EQUATION.sub(drawn, content)
