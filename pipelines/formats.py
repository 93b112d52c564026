"""The row shapes of instruction data, read into one: messages, prompt and completion, alpaca, sharegpt, text.

A row that cannot be trained on as it stands has a reason; nothing is repaired silently, and what is merely odd is a
flag that is counted.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datatools import UsageError
from pipelines.jsonl import Malformed, json_type, shown

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
}
"""Accepted role names (any case) and what they mean."""

TOOL_ROLES = {"tool", "function", "function_call", "function_response", "observation", "ipython", "tool_call"}

COLUMNS = ("messages", "role", "content", "conversations", "from", "value", "prompt", "completion", "instruction",
           "input", "output", "system", "history", "text", "id", "source", "subtask")
"""Names that a `columns` map may give: ours -> the data's. `source` is the row's source, `subtask` a target's part."""

_FORMATS = {  # the columns that decide, in the order in which the formats are tried
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
# drawn as nothing, though Unicode does not call them spaces or controls: fillers, joiners, variation selectors
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
                        "\U000e0000-\U000e0fff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, slots=True)
class Shape:
    """What one row says, whatever its format. Exactly one of `messages`, `text`, `prompt` with `completion` is set."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    masked: frozenset[int] = frozenset()
    """Positions of assistant turns that are context only (in a prompt, or of weight 0): no loss on them."""
    flags: tuple[str, ...] = ()
    """Odd but usable: assistant_first, ends_with_user, same_role_twice, role_renamed, parts_joined,
    control_characters, bidi_controls."""


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """The `columns` map, its names checked. Raises: UsageError with the nearest known name."""
    for name in columns or {}:
        if name not in COLUMNS:
            raise UsageError(f"columns: no column is called '{name}'{_nearest(name, COLUMNS)}")
    return dict(columns or {})


def read_shape(row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Shape:
    """Detect the format of `row` by its columns and read it; `columns` maps our names to the data's.

    Raises: Malformed with a reason if the row has no known format or is not fit to train on.
    """
    columns = columns or {}
    name = _detect(row, columns)

    def get(column: str) -> Any:
        return row.get(columns.get(column, column))

    if get("tools") not in (None, [], {}, "", "[]"):
        raise Malformed("tools", "the row defines tools; tool use is not read yet")
    if name == "messages":
        return _from_messages(get("messages"), "messages", columns)
    if name == "sharegpt":
        return _from_messages(get("conversations"), "conversations", columns, get("system"))
    if name == "prompt_completion":
        return _from_prompt(get("prompt"), get("completion"), columns)
    if name == "alpaca":
        return _from_alpaca(get)
    text = _text(get("text"), "text")
    if not visible(text):
        raise Malformed(f"{_emptiness(text)}_text", "the text has nothing to learn from")
    return Shape(text=text, flags=_text_flags([text]))


def visible(text: str) -> bool:
    """Does `text` draw anything? Spaces, controls, format characters, fillers and variation selectors do not."""
    if text.isascii():
        return any("!" <= c <= "~" for c in text)
    return any(unicodedata.category(c) not in {"Zs", "Zl", "Zp", "Cc", "Cf", "Cs"} and not _INVISIBLE.match(c)
               for c in text)


def _detect(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    named = {name for name, keys in _FORMATS.items() if any(key in columns for key in keys)}
    found = []
    for name, keys in _FORMATS.items():
        mapped = [columns.get(key, key) for key in keys]
        if (not named or name in named) and all(key in row for key in mapped):
            if any(row[key] is not None for key in mapped):
                return name
            found.append(name)  # tables that hold several formats fill the columns of the others with nulls
    if found:
        return found[0]
    if named:
        missing = sorted({columns.get(k, k) for n in named for k in _FORMATS[n]} - set(row))
        raise Malformed("missing_column", f"no column {', '.join(map(shown, missing))}")
    if "input_ids" in row:
        raise Malformed("pre_tokenised", "the row holds input_ids; give its text, so that one tokenizer is used")
    there = ", ".join(shown(key, 30) for key in list(row)[:8]) or "no column at all"
    raise Malformed("unknown_format", f"{there}; expected messages, conversations, prompt and completion, instruction "
                                      "and output, or text")


def _from_messages(value: Any, column: str, columns: Mapping[str, str], system: Any = None) -> Shape:
    if value is None or value == []:
        raise Malformed("no_messages", f"{column} is {json_type(value) if value is None else 'empty'}")
    if not isinstance(value, list):
        raise Malformed("messages_not_list", f"{column} is {json_type(value)}, not a list of turns")
    turns, masked, flags = _turns(value, columns)
    if system is not None and visible(text := _text(system, "system")):
        turns.insert(0, {"role": "system", "content": text})
        masked = {k + 1 for k in masked}
    return _conversation(turns, masked, flags)


def _from_prompt(prompt: Any, completion: Any, columns: Mapping[str, str]) -> Shape:
    if isinstance(prompt, list) or isinstance(completion, list):
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise Malformed("mixed_prompt", f"prompt is {json_type(prompt)}, completion is {json_type(completion)}; "
                                            "both must be texts, or both lists of messages")
        before, _, flags = _turns(prompt, columns)
        after, masked, more = _turns(completion, columns)
        masked = {k + len(before) for k in masked} | {k for k, t in enumerate(before) if t["role"] == "assistant"}
        return _conversation(before + after, masked, flags | more)
    question, answer = _text(prompt, "prompt"), _text(completion, "answer")
    if not visible(question):
        raise Malformed(f"{_emptiness(question)}_prompt", "the prompt is empty; for plain text use a 'text' column")
    if not visible(answer):
        raise Malformed(f"{_emptiness(answer)}_answer", "the completion has nothing to learn from")
    return Shape(prompt=question, completion=answer, flags=_text_flags([question, answer]))


def _from_alpaca(get: Any) -> Shape:
    """instruction and input joined by a newline; earlier [instruction, output] pairs in `history` are trained too."""
    turns: list[Message] = []
    if get("system") is not None and visible(system := _text(get("system"), "system")):
        turns.append({"role": "system", "content": system})
    history = get("history")
    if history is not None and not isinstance(history, list):
        raise Malformed("history_not_list", f"history is {json_type(history)}, not a list of pairs")
    for pair in history or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Malformed("history_not_list", "an entry of history is not a pair of instruction and output")
        turns.append({"role": "user", "content": _text(pair[0], "prompt")})
        turns.append({"role": "assistant", "content": _text(pair[1], "answer")})
    question = _text(get("instruction"), "prompt")
    extra = "" if get("input") is None else _text(get("input"), "prompt")
    if visible(extra):
        question = f"{question}\n{extra}" if visible(question) else extra
    turns.append({"role": "user", "content": question})
    turns.append({"role": "assistant", "content": _text(get("output"), "answer")})
    return _conversation(turns, set(), set())


def _turns(value: list[Any], columns: Mapping[str, str]) -> tuple[list[Message], set[int], set[str]]:
    """Role and content of each turn, under either naming, the positions without loss, and flags."""
    turns: list[Message] = []
    masked: set[int] = set()
    flags: set[str] = set()
    for k, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise Malformed("turn_not_object", f"turn {k + 1} is {json_type(turn)}")
        role = _first(turn, columns.get("role", "role"), columns.get("from", "from"))
        if role is None:
            raise Malformed("missing_role", f"turn {k + 1} has no role")
        if not isinstance(role, str):
            raise Malformed("unknown_role", f"the role of turn {k + 1} is {json_type(role)}")
        lowered = role.strip().lower()
        if lowered in TOOL_ROLES:
            raise Malformed("tool_turn", f"turn {k + 1} is a {shown(role, 30)} turn; tool use is not read yet")
        if lowered not in ROLES:
            raise Malformed("unknown_role", f"{shown(role, 30)} in turn {k + 1}{_nearest(lowered, ROLES)}")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise Malformed("tool_turn", f"turn {k + 1} calls a tool; tool use is not read yet")
        name = ROLES[lowered]
        if name != role:
            flags.add("role_renamed")
        what = {"assistant": "answer", "user": "prompt", "system": "system"}[name]
        content = _first(turn, columns.get("content", "content"), columns.get("value", "value"))
        if isinstance(content, list):
            content = _join_parts(content, k)
            flags.add("parts_joined")
        turns.append({"role": name, "content": _text(content, what, k)})
        weight = _first(turn, "weight", "train")
        if name == "assistant" and weight is not None:
            if weight not in (0, 1):  # also False and True
                raise Malformed("turn_weight", f"turn {k + 1} has weight {weight!r}; 0 and 1 are understood")
            if weight == 0:
                masked.add(k)
    return turns, masked, flags


def _conversation(turns: list[Message], masked: set[int], flags: set[str]) -> Shape:
    """The turns, if there is something to learn and something to learn it from."""
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        only = "a system turn only" if set(roles) <= {"system"} else "no assistant turn"
        raise Malformed("no_assistant_turn", only)
    if "user" not in roles:
        raise Malformed("no_user_turn", "an answer to nothing")
    for k, turn in enumerate(turns):
        if turn["role"] != "system" and not visible(turn["content"]):
            what = "answer" if turn["role"] == "assistant" else "prompt"
            raise Malformed(f"{_emptiness(turn['content'])}_{what}", f"turn {k + 1} has nothing in it")
    if all(k in masked for k, role in enumerate(roles) if role == "assistant"):
        raise Malformed("no_trained_turn", "no assistant turn is left to train on")
    spoken = [role for role in roles if role != "system"]
    if spoken[0] == "assistant":
        flags.add("assistant_first")
    if spoken[-1] == "user":
        flags.add("ends_with_user")
    if any(a == b for a, b in zip(spoken, spoken[1:], strict=False)):
        flags.add("same_role_twice")
    flags.update(_text_flags([turn["content"] for turn in turns]))
    return Shape(messages=tuple(turns), masked=frozenset(masked), flags=tuple(sorted(flags)))


def _join_parts(parts: list[Any], k: int) -> str:
    """OpenAI's list of parts, if every part is a text."""
    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type") if isinstance(part, dict) else json_type(part)
            raise Malformed("part_not_text", f"turn {k + 1} holds a part that is not text ({shown(str(kind), 30)})")
    return "".join(texts)


def _text(value: Any, what: str, k: int | None = None) -> str:
    """`value` if it is a string. Numbers are refused: 42 and "42.0" may be the same answer, only the author knows."""
    where = f" of turn {k + 1}" if k is not None else ""
    if value is None:
        raise Malformed(f"null_{what}", f"the content{where} is null or missing")
    if not isinstance(value, str):
        raise Malformed(f"{what}_not_text", f"the content{where} is {json_type(value)}, a string was expected")
    return value


def _first(turn: Mapping[str, Any], *names: str) -> Any:
    """The first of the columns that is not null."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def _emptiness(text: str) -> str:
    return "empty" if not text else "blank" if not text.strip() else "invisible"


def _text_flags(texts: list[str]) -> tuple[str, ...]:
    found = []
    if any(_BIDI.search(text) for text in texts):
        found.append("bidi_controls")
    if any(_CONTROL.search(text) for text in texts):
        found.append("control_characters")
    return tuple(found)
