"""Definitions and calls of tools, in one form."""

from collections.abc import Mapping
from typing import Any

from pipelines.rows.formats.contents import first_of
from pipelines.rows.formats.record import Given
from pipelines.rows.jsonl import Malformed, json_type, parse_inside, shown

_KEYS = {"name", "function"}
"""A definition of a tool has one of these keys."""


def tools_in(given: Given) -> tuple[Any, ...]:
    """Return the definitions of tools of a row: those of its column, else of its system turn.

    Args:
        given: The row.

    Raises:
        Malformed: The definitions have another form.
    """
    if found := tools_of(given.get("tools")):
        return found
    functions = given.row.get("functions")
    if isinstance(functions, list) and all(isinstance(one, dict) and _KEYS & one.keys() for one in functions):
        return tools_of(functions, plain=True)
    for column in ("messages", "conversations", "prompt"):
        turns = given.get(column)
        for turn in turns if isinstance(turns, list) else ():
            if (
                isinstance(turn, dict)
                and first_of(turn, "role", "from") in ("system", "developer")
                and turn.get("tools")
            ):
                return tools_of(turn["tools"])
    return ()


RESERVED = frozenset(
    {"messages", "conversation", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
     "continue_final_message", "return_assistant_tokens_mask", "bos_token", "eos_token", "pad_token", "unk_token",
     "sep_token", "cls_token", "mask_token"}
)  # fmt: skip
"""Variables of a chat template that come from the conversation and the tokenizer, not from the settings of a row."""


def settings_in(given: Given) -> dict[str, Any]:
    """Return the variables that a row gives to its chat template (`chat_template_kwargs`), as TRL passes them.

    Args:
        given: The row.

    Raises:
        Malformed: They are no object, or name something that the conversation or the tokenizer decides.
    """
    value = given.get("chat_template_kwargs")
    in_json = isinstance(value, str)
    if isinstance(value, str) and value.strip():
        value = loads(value, "template_settings", "chat_template_kwargs")
    if value in (None, "") or isinstance(value, str):
        return {}
    if not isinstance(value, dict):
        raise Malformed("template_settings", f"chat_template_kwargs is {json_type(value)}, not an object")
    if wrong := sorted(RESERVED & value.keys()):
        raise Malformed(
            "template_settings",
            f"chat_template_kwargs sets {wrong[0]}, which the conversation or the tokenizer decides",
        )
    return value if in_json else without_nulls(value)


def tools_of(value: Any, *, plain: bool = False) -> tuple[Any, ...]:
    """Return the definitions of tools in a row: a list of objects, one object, or their JSON.

    Args:
        value: The value of the column.
        plain: Whether the objects are the functions themselves (OpenAI's former `functions`).

    Raises:
        Malformed: The value is something else.
    """
    in_json = isinstance(value, str)
    if isinstance(value, str) and value.strip():
        value = loads(value, "tools_not_list", "tools")
    if value in (None, [], {}, "") or isinstance(value, str):
        return ()
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Malformed("tools_not_list", f"tools is {json_type(value)}, not a list of objects")
    found = value if in_json else [without_nulls(tool) for tool in value]
    return tuple({"type": "function", "function": tool} if plain and "function" not in tool else tool for tool in found)


def without_nulls(value: Any) -> Any:
    """Return a value without the keys of its objects that are null.

    Tables give all objects of a column the keys of each, so that the arguments of one function would be null in the
    calls of every other one. JSON in a text does not have this problem, and keeps its nulls.

    Args:
        value: A JSON value.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def loads(text: str, reason: str, what: str) -> Any:
    """Return the JSON value inside a text of a row.

    Args:
        text: The text.
        reason: The code of the error if it is not JSON.
        what: The name of the text, for the message.

    Raises:
        Malformed: The text is not JSON.
    """
    try:
        return parse_inside(text)
    except Malformed as error:
        raise Malformed(reason, f"{what}: {error}") from None
    except ValueError:
        raise Malformed(reason, f"{what} is not JSON: {shown(text, 40)}") from None


def calls_of(turn: Mapping[str, Any], content: Any, k: int) -> list[dict[str, Any]]:
    """Return the tool calls of an assistant's turn in one form, with arguments as objects where they are JSON.

    Args:
        turn: The turn.
        content: The content of a turn whose role is a tool call; otherwise None.
        k: The position of the turn, for messages.

    Raises:
        Malformed: A call has no name, or its arguments are not an object.
    """
    found = turn.get("tool_calls") or turn.get("function_call")
    in_json = isinstance(content, str)
    if content is not None:
        found = content
        if isinstance(content, str):
            found = loads(content, "bad_tool_call", f"turn {k + 1}, a call of a tool,")
    if not found:
        return []
    calls = []
    for call in found if isinstance(found, list) else [found]:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise Malformed(
                "bad_tool_call",
                f"a tool call of turn {k + 1} has no name; expected "
                '{"function": {"name": ..., "arguments": {...}}}',
            )
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            what = f"the text of the arguments of {shown(function['name'], 30)} in turn {k + 1}"
            parsed = loads(arguments, "bad_tool_call", what) if arguments.strip() else {}
            arguments = parsed if isinstance(parsed, dict) else arguments
        elif isinstance(arguments, dict):
            arguments = arguments if in_json else without_nulls(arguments)
        elif arguments is not None:
            raise Malformed(
                "bad_tool_call",
                f"the arguments of {shown(function['name'], 30)} in turn {k + 1} are "
                f"{json_type(arguments)}, not an object",
            )
        identity = {key: call[key] for key in ("id",) if isinstance(call.get(key), str)}
        calls.append(
            {
                **identity,
                "type": "function",
                "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
            }
        )
    return calls
