"""Messages in the forms that chat templates understand."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.rows.formats.shape import Message

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")  # the names in templates: Qwen, gpt-oss, others


def for_template(message: Message) -> dict[str, Any]:
    """Return a message in the form of chat templates, with reasoning under each of the names in use.

    Args:
        message: The message.
    """
    known = {
        key: message[key]
        for key in ("role", "content", "tool_calls", "tool_call_id", "name")
        if message.get(key) is not None
    }  # transformers omits None too
    return known | dict.fromkeys(_REASONING_NAMES if "reasoning" in message else (), message.get("reasoning"))


def ways_to_write(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the forms in which templates take tool calls, the most common first; only one form if there are no calls.

    Args:
        messages: The messages.
    """
    if not any("tool_calls" in message for message in messages):
        yield list(messages)
        return
    for as_text in (False, True):
        for empty in (None, ""):
            written = []
            for message in messages:
                message = dict(message)
                if "tool_calls" in message:
                    message["content"] = message["content"] or empty
                    message["tool_calls"] = [_written_call(call, as_text) for call in message["tool_calls"]]
                written.append(message)
            yield written


def _written_call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    function = dict(call["function"])
    if as_text and not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}
