"""An extension of griffe: doctest examples in docstrings become code blocks on the site.

Markdown knows nothing of `>>>`, and takes `a["x"]["y"]` in an example for a link.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^([ ]*)>>> .*\n?(?:^\1.*\S.*\n?)*", re.M)


def fenced(text: str) -> str:
    """The docstring with a fence around each run of lines that begins with `>>>`."""

    def fence(found: re.Match[str]) -> str:
        return f"{found[1]}```python\n{found[0].rstrip()}\n{found[1]}```\n"

    return _EXAMPLE.sub(fence, text)


class Doctests(griffe.Extension):
    """Fences the examples of every object as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
