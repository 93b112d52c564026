"""A report as a value: displayed by a notebook, saved to a file, or printed as a short text."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from pathlib import Path

from datatools import files


@dataclass(frozen=True, repr=False)
class Report:
    """The page of a run, and its short text.

    Attributes:
        html: The whole page: one file without script or network access.
        text: A summary in a few lines, for a terminal.
    """

    html: str
    text: str

    def _repr_html_(self) -> str:
        """Return the page in a separate frame, so that its style and that of the notebook do not affect each other."""
        return (
            f'<iframe srcdoc="{html.escape(self.html, quote=True)}" sandbox="" '
            'style="width:100%;height:44em;border:1px solid #8884" title="report"></iframe>'
        )

    def __repr__(self) -> str:
        return self.text

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file.

        Args:
            path: The file.

        Returns:
            The file.

        Raises:
            EnvironmentProblem: The file cannot be written.
        """
        files.write_text(Path(path), self.html)
        return Path(path)
