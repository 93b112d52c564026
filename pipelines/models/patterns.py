"""Regular expressions in the configuration of an adapter, which name the layers that it is put on.

They come with the adapter, and peft matches them against every layer. A pattern such as `(.+)+x` would match forever.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from datatools import DataError
from pipelines.texts import first_line

_SECONDS = 2.0  # of processor time, for all layers of a model


def check(model: nn.Module, folder: Path, config: Mapping[str, Any]) -> None:
    """Match the patterns of an adapter's configuration against the layers of a model, within a limited time.

    Args:
        model: The model.
        folder: The folder of the adapter, for messages.
        config: The content of adapter_config.json.

    Raises:
        DataError: A pattern is not a regular expression, or takes too long.
    """
    names = [name for name, _ in model.named_modules()]
    for setting, pattern in _patterns(config):
        try:
            with _limited():
                for name in names:
                    re.match(pattern, name)
        except (re.error, RecursionError, OverflowError) as error:
            raise DataError(
                f"adapter {folder}: {setting} in adapter_config.json is not a regular expression: {first_line(error)}"
            ) from error
        except _TooLong:
            raise DataError(
                f"adapter {folder}: matching {setting} in adapter_config.json against the {len(names)} layers of the "
                f"model takes more than {_SECONDS:g} s; write the names of the layers as a list"
            ) from None


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (setting, pattern), as peft matches it."""
    for setting in ("target_modules", "exclude_modules"):
        if isinstance(value := config.get(setting), str):
            yield setting, f"(?:{value})\\Z"
    for setting in ("rank_pattern", "alpha_pattern"):
        value = config.get(setting)
        for key in value if isinstance(value, dict) else ():
            yield setting, rf"(.*\.)?({key})$"
    value = config.get("layers_pattern")
    for key in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
        yield "layers_pattern", rf".*\.{key}\.(\d+)\."


class _TooLong(Exception):
    pass


@contextmanager
def _limited() -> Iterator[None]:
    """Raise `_TooLong` inside the `with` block after `_SECONDS` of processor time; in the main thread only."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGVTALRM"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
