"""Redaction of access tokens, passwords in URLs and values of secret environment variables in everything a run writes.

A secret in the settings of a run is written as `***` and cannot be read back from the file: `trust.check` asks for the
setting again. No import here loads torch.
"""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"

_FORMS = [
    re.compile(pattern)
    for pattern in (
        r"\bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{6,}|\bhf_[A-Za-z0-9]{20,}",  # not hf_models, a folder
        r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{8,}",
        r"\bgh[pousr]_[A-Za-z0-9]{8,}|\bgithub_pat_\w{8,}|\bglpat-[\w-]{8,}",
        r"\bAKIA[0-9A-Z]{12,}|\bxox[abprs]-[\w-]{8,}|\beyJ[\w-]{10,}\.[\w-]+\.[\w-]*",
        r"(?<=://)[^/\s@]+(?=@)",
        r"(?i)(?<=bearer )\S+",
        r"(?i)(?:(?<=token=)|(?<=key=)|(?<=secret=)|(?<=password=)|(?<=passwd=)|(?<=signature=)|(?<=[?&]sig=))"
        r"[^\s&;,'\"]+",
        r"(?i)(?:(?<=token )|(?<=api-key )|(?<=secret )|(?<=password ))(?=\S{8})[^\s'\"]*[0-9][^\s'\"]*",
    )
]
_NAMES = re.compile(r"(?i)token(?!iz)|keys?(?:_|$)|secret|passw|credential|auth(?!or)")


def hide(text: str) -> str:
    """Replace every secret in a text with `***`.

    Args:
        text: The text.

    Example:
        >>> hide("https://user:password@example.org")
        'https://***@example.org'
    """
    secrets = {v for k, v in os.environ.items() if _NAMES.search(k) and len(v) >= 6 and not v.isdecimal()}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for form in _FORMS:
        text = form.sub(HIDDEN, text)
    return text


def hide_all(value: Any) -> Any:
    """Hide the secrets in every text and every name of plain values.

    Args:
        value: Plain values, as in JSON.
    """
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {hide(str(key)): hide_all(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [hide_all(inner) for inner in value]
    return value


def hidden(value: object) -> bool:
    """Return whether a setting that was read from a file contains a hidden secret.

    Args:
        value: The value of the setting.
    """
    if isinstance(value, dict):
        return any(hidden(key) or hidden(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return any(map(hidden, value))
    return not isinstance(value, bool | int | float | None) and HIDDEN in str(value)
