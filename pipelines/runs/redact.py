"""Redaction: what a run writes about its machine and its command names no user or host and has no secrets."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from pipelines.settings import redaction

_call: ContextVar[str | None] = ContextVar("call", default=None)


def redact(text: str, *, names: bool = True) -> str:
    """Hide access tokens, values of secret environment variables and the home folder.

    Args:
        text: Any text that goes into a file or to the terminal.
        names: Whether to hide the names of the user and of the host too.

    Returns:
        The text, with `***`, `~`, `<user>` and `<host>` in their places.
    """
    text = redaction.hide(text)
    home = str(Path.home())
    if home != "/":
        text = re.sub(rf"{re.escape(home)}(?=/|\W|$)", "~", text)
    for name, mask in () if not names else ((os.environ.get("USER", ""), "<user>"), (platform.node(), "<host>")):
        if len(name) >= 3:
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", mask, text)
    return text


@contextmanager
def called_as(call: str) -> Iterator[None]:
    """Report another text as the typed command inside the `with` block, for functions that a program calls.

    Args:
        call: The text.
    """
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def command_line(*, names: bool = True) -> str:
    """Return the command as it was typed, quoted for a shell and redacted.

    Args:
        names: As in `redact`.
    """
    return redact(_call.get() or shlex.join(["datatools", *sys.argv[1:]]), names=names)
