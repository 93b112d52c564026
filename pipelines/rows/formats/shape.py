"""What one row says, whatever its format."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; an assistant's may also have "reasoning" (text)
and "tool_calls" ([{"type": "function", "function": {"name", "arguments"}}]), a tool's "name" and "tool_call_id"."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What one row says, whatever its format. Exactly one of `messages`, `text`, `prompt` with `completion` is set."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    masked: frozenset[int] = frozenset()
    """Positions of assistant turns that are context only (in a prompt, or of weight 0): no loss on them."""
    tools: tuple[Any, ...] = ()
    """Definitions of tools, as the row has them."""
    flags: tuple[str, ...] = ()
    """Odd but usable: assistant_first, ends_with_user, same_role_twice, role_renamed, parts_joined,
    control_characters, bidi_controls."""
