"""The checks of `datatools diagnose`: one file and one line in `CHECKS` each."""

from __future__ import annotations

from importlib import import_module

from pipelines.diagnose.looks import Check

CHECKS: dict[str, str | Check] = {
    "sharpness": "pipelines.diagnose.checks.sharpness:CHECK",
    "spectrum": "pipelines.diagnose.checks.spectrum:CHECK",
    "smoothness": "pipelines.diagnose.checks.smoothness:CHECK",
    "conditioning": "pipelines.diagnose.checks.conditioning:CHECK",
    "double-descent": "pipelines.diagnose.checks.double_descent:CHECK",
}
"""Name -> the record, or its place ("module:NAME"), which is imported when the check is first used."""


def check(name: str) -> Check:
    """Return the check of a name in `CHECKS`.

    Args:
        name: The name.
    """
    found = CHECKS[name]
    if isinstance(found, str):
        module, _, record = found.partition(":")
        found = getattr(import_module(module), record)
    assert isinstance(found, Check)
    return found
