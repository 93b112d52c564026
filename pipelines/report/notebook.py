"""A report as a value: shown by a notebook, saved where somebody says, and a short text elsewhere."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from pathlib import Path

from datatools import files


@dataclass(frozen=True, repr=False)
class Report:
    """The page of a run, and what it says in a few words.

    Attributes:
        html: The whole page: one file without script, which asks nothing of the network.
        text: The same in a few lines, for a terminal.
    """

    html: str
    text: str

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that neither its style nor the notebook's reaches the other."""
        return (
            f'<iframe srcdoc="{html.escape(self.html, quote=True)}" sandbox="" '
            'style="width:100%;height:44em;border:1px solid #8884" title="report"></iframe>'
        )

    def __repr__(self) -> str:
        return self.text

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to the file `path`, and return it.

        Raises:
            EnvironmentProblem: The file cannot be written.
        """
        files.write_text(Path(path), self.html)
        return Path(path)
