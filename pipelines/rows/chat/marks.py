"""Marks around the texts of turns, inserted before a template is rendered and located in its output.

Marks consist of private-use characters, from the first window of such characters that the texts of a row do not use. A
mark has three characters: which end it is, and the number of the part that it encloses, in two digits.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.rows.chat.refusals import RowError
from pipelines.rows.formats.contents import REASONING_TAG, strings
from pipelines.rows.formats.shape import Message

_WINDOW = 0x800
_WINDOWS: tuple[int, ...] = (*range(0x100000, 0x10F000, _WINDOW), *range(0xF0000, 0xFF000, _WINDOW))
OPEN, CLOSE, _BASE = 0x7FE, 0x7FF, 0x7F0  # in the window; digits are below the base


@dataclass(slots=True)
class Part:
    """A part of a turn that is marked as one: `text`, which is at position `at` of the message's `key`."""

    turn: int
    kind: str  # "answer", "reasoning" (and text beside a call), "call" (its name), "other" (not an assistant's)
    key: str
    at: int  # a character, or which call
    text: str
    before: str = ""  # reasoning tags and white space between this part and its neighbours in the content
    after: str = ""
    start: int = -1  # in the rendered text; -1 if it is missing
    end: int = -1


@dataclass(slots=True)
class Marked:
    """A rendered text with its marks removed, and the parts that they enclosed, in the order of the conversation."""

    text: str
    parts: list[Part]
    blocks: list[tuple[int, int]] = field(default_factory=list)
    repeated: set[int] = field(default_factory=set)


def free_window(messages: Sequence[Message], tools: Sequence[Any]) -> int:
    """Return the first window of private-use characters that the texts of a row do not use.

    Args:
        messages: The messages.
        tools: Definitions of tools.

    Raises:
        RowError: The texts use all windows.
    """
    whole = "".join(strings([list(messages), list(tools)]))
    if whole.isascii() or max(whole) < "\U000f0000":
        return _WINDOWS[0]
    used = {ord(c) // _WINDOW * _WINDOW for c in whole}
    for window in _WINDOWS:
        if window not in used:
            return window
    raise RowError("private_use", "the texts contain private-use characters from all of U+F0000 to U+10FFFF")


def mark_of(window: int, end: int, number: int) -> str:
    """Return one mark.

    Args:
        window: The window of private-use characters.
        end: OPEN or CLOSE.
        number: The number of the part that it encloses.
    """
    return "".join(chr(window + digit) for digit in (end, *divmod(number, _BASE)))


def parts_of(written: Sequence[Message], others: bool, outside: bool) -> list[Part]:
    """Return the parts to mark: all that assistants say, and optionally the contents of the other turns.

    Args:
        written: The messages.
        others: Whether to mark the contents of the other turns.
        outside: Whether white space at the ends of a content is inside its marks.
    """
    parts: list[Part] = []
    for k, message in enumerate(written):
        content = message["content"] or ""
        if message["role"] != "assistant":
            if others and content.strip():
                parts.append(_part(k, "other", "content", content, outside))
            continue
        calls = message.get("tool_calls", ())
        if message.get("reasoning", "").strip():
            parts.append(_part(k, "reasoning", "reasoning", message["reasoning"], outside))
        parts += _content_parts(k, content, "reasoning" if calls else "answer", outside)
        parts += [Part(k, "call", "tool_calls", n, call["function"]["name"]) for n, call in enumerate(calls)]
    return parts


def _part(turn: int, kind: str, key: str, text: str, outside: bool) -> Part:
    if outside:
        return Part(turn, kind, key, 0, text)
    core = text.strip()
    at = text.index(core)
    return Part(turn, kind, key, at, core, text[:at], text[at + len(core) :])


def _content_parts(turn: int, content: str, kind: str, outside: bool) -> list[Part]:
    """Return the texts between the reasoning tags of a content; those before the last closing tag are reasoning."""
    tags = list(REASONING_TAG.finditer(content))
    thought_ends = max((tag.start() for tag in tags if tag["close"]), default=-1)
    edges = [0, *(edge for tag in tags for edge in tag.span()), len(content)]
    spans = [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if content[start:end].strip()]
    parts: list[Part] = []
    ended = 0  # where the last part ended
    for n, (start, end) in enumerate(spans):
        if not (outside and start == 0):
            start += len(content[start:end]) - len(content[start:end].lstrip())
        if not (outside and end == len(content)):
            end = start + len(content[start:end].rstrip())
        here = "reasoning" if end <= thought_ends else kind
        parts.append(Part(turn, here, "content", start, content[start:end], before=content[ended:start]))
        if n:
            parts[-2].after = parts[-1].before
        ended = end
    if parts:
        parts[-1].after = content[ended:]
    return parts


def with_marks(written: Sequence[Message], parts: Sequence[Part], window: int) -> list[Message]:
    """Return the messages with marks around each part; part i has the number i + 1 (0 is for generation blocks).

    Args:
        written: The messages.
        parts: The parts.
        window: The window of private-use characters.
    """
    result = [dict(message) for message in written]
    for number, part in reversed(list(enumerate(parts, start=1))):  # from the end, so that places stay
        message = result[part.turn]
        marked = f"{mark_of(window, OPEN, number)}{part.text}{mark_of(window, CLOSE, number)}"
        if part.key == "tool_calls":
            calls = list(message["tool_calls"])
            calls[part.at] = {**calls[part.at], "function": {**calls[part.at]["function"], "name": marked}}
            message["tool_calls"] = calls
        else:
            text = message[part.key]
            message[part.key] = text[: part.at] + marked + text[part.at + len(part.text) :]
    return result


def unmark(text: str, parts: list[Part], window: int) -> Marked:
    """Remove the marks from a text and write their positions into the parts.

    Args:
        text: The rendered text.
        parts: The parts, which are changed.
        window: The window of private-use characters.
    """
    digit = f"[{chr(window)}-{chr(window + _BASE - 1)}]"
    marks = re.compile(f"[{chr(window + OPEN)}{chr(window + CLOSE)}]{digit}{digit}")
    pieces: list[str] = []
    blocks: list[tuple[int, int]] = []
    repeated: set[int] = set()
    length = at = opened = 0
    for part in parts:
        part.start = part.end = -1
    for mark in marks.finditer(text):
        pieces.append(text[at : mark.start()])
        length += len(pieces[-1])
        at = mark.end()
        end, high, low = (ord(c) - window for c in mark[0])
        opens, number = end == OPEN, high * _BASE + low
        if not number:
            if opens:
                opened = length
            elif opened < length:
                blocks.append((opened, length))
        elif number <= len(parts):
            part = parts[number - 1]
            if opens and part.start < 0:
                part.start = length
            elif opens:
                repeated.add(number - 1)
            elif part.end < 0 <= part.start:
                part.end = length
    pieces.append(text[at:])
    for part in parts:
        if part.end < 0:  # only one of its marks is left
            part.start = -1
    return Marked("".join(pieces), parts, blocks, repeated)
