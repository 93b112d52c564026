"""Texts of rows: their content, whether they are visible, and their peculiarities."""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.rows.formats.shape import Message
from pipelines.rows.jsonl import Malformed, json_type

REASONING_TAG = re.compile(
    r"[<\[◁]\|?(?P<close>/|end_(?:of_)?)?(?:(?:start|begin)_(?:of_)?)?(?:[a-z]+:)?"
    r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|scratchpad)\|?[>\]▷]",
    re.IGNORECASE,
)
"""Tags that open or close reasoning inside a content: <think>, </think>, [THINK], <|END_THINKING|>, ..."""
# invisible, although Unicode does not call them spaces or controls: fillers, joiners, variation selectors
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")


def text_of(message: Message) -> str:
    """Return what a turn says: its reasoning, its content and its tool calls (as JSON), separated by line breaks.

    Args:
        message: The turn.
    """
    calls = (json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ()))
    return "\n".join(text for text in (message.get("reasoning", ""), message["content"] or "", *calls) if text)


def strings(value: Any) -> Iterator[str]:
    """Yield every string in nested lists and objects, keys included.

    Args:
        value: The nested value.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) or (not isinstance(value, list | tuple) and isinstance(value, Mapping)):
        for key, item in value.items():
            yield str(key)
            if isinstance(item, str):
                yield item
            else:
                yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def characters(value: Any) -> int:
    """Return how long the `strings` of nested lists and objects are together.

    Args:
        value: The nested value.
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict) or (not isinstance(value, list | tuple) and isinstance(value, Mapping)):
        return sum([len(str(key)) + characters(item) for key, item in value.items()])
    return sum(map(characters, value)) if isinstance(value, list | tuple) else 0


def visible(text: str) -> bool:
    """Return whether a text is visible. Spaces, controls, format characters, fillers and variation selectors are not.

    Args:
        text: The text.
    """
    if text.isascii():
        return any("!" <= c <= "~" for c in text)
    return any(
        unicodedata.category(c) not in {"Zs", "Zl", "Zp", "Cc", "Cf", "Cs"} and not _INVISIBLE.match(c) for c in text
    )


def checked_text(value: Any, what: str, k: int | None = None) -> str:
    """Return a value if it is a string. Numbers are refused: 42 and "42.0" may be the same answer or not.

    Args:
        value: The value.
        what: The name of the value, for the reason code.
        k: The position of the turn, for the message.

    Raises:
        Malformed: The value is not a string.
    """
    where = f" of turn {k + 1}" if k is not None else ""
    if value is None:
        raise Malformed(f"null_{what}", f"the content{where} is null or missing")
    if not isinstance(value, str):
        raise Malformed(f"{what}_not_text", f"the content{where} is {json_type(value)}; expected a string")
    return value


def first_of(turn: Mapping[str, Any], *names: str) -> Any:
    """Return the value of the first column that is not null.

    Args:
        turn: The turn.
        *names: The columns.
    """
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def emptiness(text: str) -> str:
    """Return the word for a text that shows nothing: empty, blank, or invisible.

    Args:
        text: The text.
    """
    return "empty" if not text else "blank" if not text.strip() else "invisible"


def text_flags(texts: list[str]) -> tuple[str, ...]:
    """Return the peculiarities of the characters of some texts (`Shape.flags`).

    Args:
        texts: The texts.
    """
    found = []
    if any(_BIDI.search(text) for text in texts):
        found.append("bidi_controls")
    if any(_CONTROL.search(text) for text in texts):
        found.append("control_characters")
    return tuple(found)
