"""`report.html` of a separate audit."""

from pathlib import Path
from typing import Any

from pipelines.report.audit_section import arms, audit_section, trust
from pipelines.report.page import damaged, page, write_page
from pipelines.report.values import Json, finite, mapping, read_summary


def render(folder: Path) -> Path:
    """Draw folder/report.html from folder/audit.json.

    Args:
        folder: The folder of the audit.

    Returns:
        The page.

    Raises:
        DataError: The file is damaged.
    """
    path = folder / "audit.json"
    found = read_summary(path)
    with damaged(path, "run the same audit again to write it"):
        text = page("audit.html", **_parts(found))
    return write_page(folder, text)


def _parts(audit: Json) -> dict[str, Any]:
    """Return everything that the page of an audit prints."""
    table = arms(audit, "selected")
    return {
        "title": "Does training on the selection help?",
        "trust": trust({"audit": audit}, table),
        "audit": audit_section({"audit": audit}, table),
        "test_rows": finite(audit.get("test_rows")),
        "test_tokens": finite(audit.get("test_tokens")),
        "recipe": [(str(name), str(value)) for name, value in mapping(audit.get("recipe")).items()],
        "selection": str(audit.get("selection") or ""),
    }
