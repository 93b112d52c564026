"""The content of one row, whatever its format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; an assistant's may also have "reasoning" (text)
and "tool_calls" ([{"type": "function", "function": {"name", "arguments"}}]), a tool's "name" and "tool_call_id"."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The content of one row, whatever its format: exactly one of `messages`, `text`, `prompt` with `completion`."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    masked: frozenset[int] = frozenset()
    """Positions of assistant turns that are only context (in a prompt, or with weight 0) and have no loss."""
    tools: tuple[Any, ...] = ()
    """Definitions of tools, as the row has them."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as enable_thinking, as the row has them in `chat_template_kwargs`."""
    flags: tuple[str, ...] = ()
    """Peculiarities of a usable row: assistant_first, ends_with_user, same_role_twice, role_renamed, parts_joined,
    media_dropped, unwanted_answer, row_weight_ignored, control_characters, bidi_controls."""
