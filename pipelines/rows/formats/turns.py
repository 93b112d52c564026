"""The turns of a conversation, with either set of names, checked and in one form."""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from datatools import did_you_mean
from pipelines.rows.formats.calls import calls_of
from pipelines.rows.formats.contents import checked_text, emptiness, first_of, text_flags, text_of, visible
from pipelines.rows.formats.loss_marks import has_no_loss
from pipelines.rows.formats.shape import Message, Shape
from pipelines.rows.jsonl import Malformed, json_type, shown

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""Accepted role names (in any case) and their meaning."""
TOOL_ROLES = {"tool", "function", "function_response", "tool_response", "observation", "ipython"}
"""Roles of turns with the result of a tool; the template gets them as "tool"."""
CALL_ROLES = {"function_call", "tool_call"}
"""Roles of turns that are an assistant's tool call, written as JSON (sharegpt)."""
_MEANING = ROLES | dict.fromkeys(TOOL_ROLES, "tool") | dict.fromkeys(CALL_ROLES, "assistant")
"""Every accepted role name -> the role that the template gets."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which a turn may have its reasoning."""

KEYS = ("role", "content", "from", "value")
"""The keys of a turn, which a `columns` mapping may translate."""


def from_messages(value: Any, column: str, columns: Mapping[str, str], system: Any = None) -> Shape:
    """Return a list of turns as a conversation.

    Args:
        value: The value of the row's column.
        column: The name of the column, for messages.
        columns: Our names -> the data's.
        system: A system prompt from a separate column.

    Raises:
        Malformed: The value is not a list of turns with something to learn.
    """
    if value is None or value == []:
        raise Malformed("no_messages", f"{column} is {json_type(value) if value is None else 'empty'}")
    if not isinstance(value, list):
        raise Malformed("messages_not_list", f"{column} is {json_type(value)}, not a list of turns")
    turns, masked, flags = turns_of(value, columns)
    if system is not None and visible(text := checked_text(system, "system")):
        turns.insert(0, {"role": "system", "content": text})
        masked = {k + 1 for k in masked}
    return conversation(turns, masked, flags)


def turns_of(value: list[Any], columns: Mapping[str, str]) -> tuple[list[Message], set[int], set[str]]:
    """Return role and content of each turn, the positions without loss, and flags.

    Args:
        value: The turns, with either set of names.
        columns: Our names -> the data's.

    Raises:
        Malformed: A turn has a fault.
    """
    turns: list[Message] = []
    masked: set[int] = set()
    flags: set[str] = set()
    for k, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise Malformed("turn_not_object", f"turn {k + 1} is {json_type(turn)}")
        role = first_of(turn, columns.get("role", "role"), columns.get("from", "from"))
        if role is None:
            raise Malformed("missing_role", f"turn {k + 1} has no role")
        if not isinstance(role, str):
            raise Malformed("unknown_role", f"the role of turn {k + 1} is {json_type(role)}")
        lowered = role.strip().lower()
        if lowered not in _MEANING:
            raise Malformed("unknown_role", f"{shown(role, 30)} in turn {k + 1}{did_you_mean(lowered, ROLES)}")
        name = _MEANING[lowered]
        if name != role:
            flags.add("role_renamed")
        content = first_of(turn, columns.get("content", "content"), columns.get("value", "value"))
        calls = calls_of(turn, content if lowered in CALL_ROLES else None, k) if name == "assistant" else []
        reasoning = first_of(turn, *REASONING) if name == "assistant" else None
        if name == "assistant" and isinstance(content, list) and reasoning is None:
            content, reasoning = _thoughts(content)
        if isinstance(content, list) and (name != "tool" or all(_is_text_part(part) for part in content)):
            content = _join_parts(content, k)
            flags.add("parts_joined")
        elif name == "tool" and not isinstance(content, str):
            content = "" if content is None else json.dumps(content, ensure_ascii=False)
        if calls and (content is None or lowered in CALL_ROLES):
            content = ""
        what = {"assistant": "answer", "user": "prompt", "system": "system", "tool": "answer"}[name]
        message: Message = {"role": name, "content": checked_text(content, what, k)}
        if reasoning is not None and visible(checked_text(reasoning, "reasoning", k)):
            message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = calls
        for key in ("name", "tool_call_id"):
            if name == "tool" and isinstance(turn.get(key), str):
                message[key] = turn[key]
        if name == "assistant" and has_no_loss(turn, k):
            masked.add(len(turns))
        turns.append(message)
    return turns, masked, flags


def conversation(turns: list[Message], masked: set[int], flags: set[str]) -> Shape:
    """Return the turns as a shape, if there is an answer to learn and a prompt for it.

    Args:
        turns: The turns.
        masked: Positions of assistant turns without loss.
        flags: Flags of the row so far.

    Raises:
        Malformed: There is nothing to learn.
    """
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        only = "only a system turn" if set(roles) <= {"system"} else "no assistant turn"
        raise Malformed("no_assistant_turn", only)
    if "user" not in roles:
        raise Malformed("no_user_turn", "an answer without a user turn")
    for k, turn in enumerate(turns):
        if turn["role"] not in ("system", "tool") and not visible(turn["content"]) and "tool_calls" not in turn:
            what = "answer" if turn["role"] == "assistant" else "prompt"
            raise Malformed(f"{emptiness(turn['content'])}_{what}", f"turn {k + 1} is empty")
    if all(k in masked for k, role in enumerate(roles) if role == "assistant"):
        raise Malformed("no_trained_turn", "no assistant turn is left to train on")
    spoken = [role for role in roles if role != "system"]
    if spoken[0] == "assistant":
        flags.add("assistant_first")
    if spoken[-1] == "user":
        flags.add("ends_with_user")
    if any(a == b != "tool" for a, b in pairwise(spoken)):
        flags.add("same_role_twice")
    flags.update(text_flags([text_of(turn) for turn in turns]))
    return Shape(messages=tuple(turns), masked=frozenset(masked), flags=tuple(sorted(flags)))


def _thoughts(parts: list[Any]) -> tuple[list[Any], str | None]:
    """Return the parts of a content without reasoning, and the reasoning ({"type": "thinking", "thinking": text})."""
    rest, thoughts = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        thought = first_of(part, *REASONING, "text") if kind in REASONING else None
        if isinstance(thought, str):
            thoughts.append(thought)
        else:
            rest.append(part)
    return rest, "\n".join(thoughts) if thoughts else None


def _is_text_part(part: Any) -> bool:
    return isinstance(part, str) or (
        isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
    )


def _join_parts(parts: list[Any], k: int) -> str:
    """Join OpenAI's list of parts, if every part is a text."""
    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type") if isinstance(part, dict) else json_type(part)
            raise Malformed("part_not_text", f"turn {k + 1} has a part that is not text ({shown(str(kind), 30)})")
    return "".join(texts)
