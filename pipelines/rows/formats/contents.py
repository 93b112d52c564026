"""Texts of rows: what they say, whether they show anything, and what is odd about them."""

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
"""What opens or closes reasoning inside a content: <think>, </think>, [THINK], <|END_THINKING|>, ..."""
# drawn as nothing, though Unicode does not call them spaces or controls: fillers, joiners, variation selectors
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")


def text_of(message: Message) -> str:
    """What a turn says: its reasoning, its content and its tool calls (as JSON), a line break between two."""
    calls = (json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ()))
    return "\n".join(text for text in (message.get("reasoning", ""), message["content"] or "", *calls) if text)


def strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and objects, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def visible(text: str) -> bool:
    """Does `text` draw anything? Spaces, controls, format characters, fillers and variation selectors do not."""
    if text.isascii():
        return any("!" <= c <= "~" for c in text)
    return any(
        unicodedata.category(c) not in {"Zs", "Zl", "Zp", "Cc", "Cf", "Cs"} and not _INVISIBLE.match(c) for c in text
    )


def checked_text(value: Any, what: str, k: int | None = None) -> str:
    """`value` if it is a string. Numbers are refused: 42 and "42.0" may be the same answer, only the author knows."""
    where = f" of turn {k + 1}" if k is not None else ""
    if value is None:
        raise Malformed(f"null_{what}", f"the content{where} is null or missing")
    if not isinstance(value, str):
        raise Malformed(f"{what}_not_text", f"the content{where} is {json_type(value)}, a string was expected")
    return value


def first_of(turn: Mapping[str, Any], *names: str) -> Any:
    """The first of the columns that is not null."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def emptiness(text: str) -> str:
    """How a text that shows nothing is called: empty, blank, or invisible."""
    return "empty" if not text else "blank" if not text.strip() else "invisible"


def text_flags(texts: list[str]) -> tuple[str, ...]:
    """What is odd about the characters of some texts (`Shape.flags`)."""
    found = []
    if any(_BIDI.search(text) for text in texts):
        found.append("bidi_controls")
    if any(_CONTROL.search(text) for text in texts):
        found.append("control_characters")
    return tuple(found)
