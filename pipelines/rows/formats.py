"""The row shapes of instruction data, read into one: messages, prompt and completion, pairs, preferences, text.

A row that cannot be trained on as it stands has a reason; nothing is repaired silently, and what is merely odd is a
flag that is counted.
"""

import fnmatch
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from datatools import UsageError, did_you_mean
from pipelines.rows.jsonl import Malformed, json_type, parse_inside, shown

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; an assistant's may also have "reasoning" (text)
and "tool_calls" ([{"type": "function", "function": {"name", "arguments"}}]), a tool's "name" and "tool_call_id"."""

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
"""Accepted role names (any case) and what they mean."""

TOOL_ROLES = {"tool", "function", "function_response", "tool_response", "observation", "ipython"}
"""Roles of turns that hold what a tool returned; the template gets them as "tool"."""

CALL_ROLES = {"function_call", "tool_call"}
"""Roles of turns that are an assistant's call of a tool, written as JSON (sharegpt)."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which a turn may hold its reasoning."""

REASONING_TAG = re.compile(
    r"[<\[◁]\|?(?P<close>/|end_(?:of_)?)?(?:(?:start|begin)_(?:of_)?)?(?:[a-z]+:)?"
    r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|scratchpad)\|?[>\]▷]",
    re.IGNORECASE,
)
"""What opens or closes reasoning inside a content: <think>, </think>, [THINK], <|END_THINKING|>, ..."""

COLUMNS = (
    "messages",
    "role",
    "content",
    "conversations",
    "from",
    "value",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "question",
    "answer",
    "query",
    "response",
    "context",
    "chosen",
    "rejected",
    "system",
    "history",
    "text",
    "tools",
    "id",
    "source",
    "subtask",
)
"""Names that a `columns` map may give: ours -> the data's. `source` is the row's source, `subtask` a target's part."""

_FORMATS = {  # the columns that decide, in the order in which the formats are tried
    "messages": ("messages",),
    "preference": ("chosen", "rejected"),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "question_answer": ("question", "answer"),
    "query_response": ("query", "response"),
    "instruction_response": ("instruction", "response"),
    "prompt_response": ("prompt", "response"),
    "input_output": ("input", "output"),
}
# drawn as nothing, though Unicode does not call them spaces or controls: fillers, joiners, variation selectors
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
_SPEAKER = re.compile(r"\s*+(Human|Assistant):")
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
    tools: tuple[Any, ...] = ()
    """Definitions of tools, as the row has them."""
    flags: tuple[str, ...] = ()
    """Odd but usable: assistant_first, ends_with_user, same_role_twice, role_renamed, parts_joined,
    control_characters, bidi_controls."""


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


Columns = Mapping[str, str | Mapping[str, str]]
"""Our names -> the data's; also file -> such a map of its own, which then is the only one for it."""


def check_columns(columns: Columns | None) -> dict[str, str | dict[str, str]]:
    """The `columns` map, its names checked. Raises: UsageError with the nearest known name."""
    checked: dict[str, str | dict[str, str]] = {}
    for name, theirs in (columns or {}).items():
        own = {name: theirs} if isinstance(theirs, str) else theirs
        for key in own:
            if key not in COLUMNS:
                raise UsageError(f"columns: no column is called '{key}'{did_you_mean(key, COLUMNS)}")
        checked[name] = theirs if isinstance(theirs, str) else dict(theirs)
    return checked


def columns_of(file: str, columns: Mapping[str, str | dict[str, str]]) -> tuple[dict[str, str], str | None]:
    """The map for `file`, and the name that it has in `columns` if it has a map of its own there.

    A file's name is its path, its last part, a folder above it, or a pattern of these (*.jsonl).
    """
    for name, own in columns.items():
        if isinstance(own, dict) and (
            file == name
            or file.startswith(name.rstrip("/") + "/")
            or any(fnmatch.fnmatchcase(path, name) for path in (file, os.path.basename(file)))
        ):
            return own, name
    return {name: theirs for name, theirs in columns.items() if isinstance(theirs, str)}, None


def read_shape(
    row: Mapping[str, Any], columns: Mapping[str, str] | None = None, preference: str | None = None
) -> Shape:
    """Detect the format of `row` by its columns and read it; `columns` maps our names to the data's.

    preference: which answer of a row with `chosen` and `rejected` is the answer ("chosen"); None refuses such rows.
    Raises: Malformed with a reason if the row has no known format or is not fit to train on.
    """
    columns = columns or {}
    name = _detect(row, columns)

    def get(column: str) -> Any:
        return row.get(columns.get(column, column))

    tools = _tools(get("tools"))
    if name == "messages":
        shape = _from_messages(get("messages"), "messages", columns)
    elif name == "sharegpt":
        shape = _from_messages(get("conversations"), "conversations", columns, get("system"))
    elif name == "prompt_completion":
        shape = _from_prompt(get("prompt"), get("completion"), columns)
    elif name == "preference":
        if preference is None:
            raise Malformed(
                "preference_row",
                "the row has a chosen and a rejected answer; --preference chosen reads "
                "it as its prompt and the chosen one",
            )
        shape = _from_preference(get, columns)
    elif name != "text":
        shape = _from_pair(get, *_FORMATS[name])
    else:
        text = _text(get("text"), "text")
        if not visible(text):
            raise Malformed(f"{_emptiness(text)}_text", "the text has nothing to learn from")
        shape = Shape(text=text, flags=_text_flags([text]))
    if tools and not shape.messages:
        raise Malformed("tools", "the row defines tools, which only a conversation (messages) can use")
    return replace(shape, tools=tools) if tools else shape


def visible(text: str) -> bool:
    """Does `text` draw anything? Spaces, controls, format characters, fillers and variation selectors do not."""
    if text.isascii():
        return any("!" <= c <= "~" for c in text)
    return any(
        unicodedata.category(c) not in {"Zs", "Zl", "Zp", "Cc", "Cf", "Cs"} and not _INVISIBLE.match(c) for c in text
    )


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
    raise Malformed(
        "unknown_format",
        f"{there}; expected messages, text, or a pair such as prompt and completion "
        "(datatools ls formats); name other columns with --columns "
        "prompt=YOURS,completion=YOURS (of target rows: --target-columns)",
    )


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
            raise Malformed(
                "mixed_prompt",
                f"prompt is {json_type(prompt)}, completion is {json_type(completion)}; "
                "both must be texts, or both lists of messages",
            )
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


def _from_preference(get: Any, columns: Mapping[str, str]) -> Shape:
    """The prompt with the chosen answer. A prompt that is only implied is what both conversations begin with."""
    chosen, rejected = ([turns] if isinstance(turns, dict) else turns for turns in (get("chosen"), get("rejected")))
    prompt = get("prompt")
    if prompt is None and isinstance(get("conversations"), list):
        prompt = get("conversations")
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str) and _SPEAKER.match(chosen):
        chosen, rejected = _dialogue(chosen), _dialogue(rejected)
    if isinstance(chosen, list):
        first = next((_first(turn, "role", "from") for turn in chosen if isinstance(turn, dict)), None)
        whole = isinstance(first, str) and first.strip().lower() not in {"assistant", "gpt", "bot", "model", "chatgpt"}
        if isinstance(prompt, list):
            return _from_prompt(prompt, chosen[len(prompt) :] if chosen[: len(prompt)] == prompt else chosen, columns)
        if whole:  # the prompt is in the conversation, whether it is in a column, too, or not
            pairs = zip(chosen, rejected if isinstance(rejected, list) else [], strict=False)
            shared = next((k for k, (a, b) in enumerate(pairs) if a != b), 0)
            shared = shared or len(chosen) - 1
            return _from_prompt(chosen[:shared], chosen[shared:], columns)
    if not isinstance(prompt, list):
        ask = next(
            (name for name in ("prompt", "question", "instruction", "query", "input") if get(name) is not None),
            "prompt",
        )
        if ask == "prompt" and get("system") is None and not isinstance(chosen, list):
            if prompt is None:
                raise Malformed(
                    "null_prompt",
                    "chosen and rejected are texts, and there is no prompt; give it in a column of its own",
                )
            return _from_prompt(prompt, chosen, columns)
        if not isinstance(chosen, list):
            return _from_pair(get, ask, "chosen")
        prompt = [{"role": "user", "content": get(ask)}]
    if not isinstance(chosen, list):
        chosen = [{"role": "assistant", "content": chosen}]
    return _from_prompt(prompt, chosen, columns)


def _dialogue(text: str) -> list[Message]:
    """A conversation that is written in one text, as in Anthropic's hh-rlhf."""
    turns: list[tuple[str, int, int]] = []  # who, and where the turn begins with its name, and behind it
    reached = 0
    for name in re.finditer("(Human|Assistant):", text):
        before = text[reached : name.start()]
        said = before.rstrip()
        if "\n\n" in before[len(said) :] or (not reached and not said):
            turns.append((name[1].lower(), name.start(), name.end()))
        reached = name.end()
    ends = [start for _, start, _ in turns[1:]] + [len(text)]
    return [
        {"role": speaker, "content": text[begin:end].strip()}
        for (speaker, _, begin), end in zip(turns, ends, strict=True)
    ]


def _from_pair(get: Any, ask: str, say: str) -> Shape:
    """A question and an answer, as a conversation; `input` and `context` follow the question on lines of their own,
    and earlier pairs in `history` are trained too.
    """
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
    more = [_text(get(name), "prompt") for name in ("input", "context") if name != ask and get(name) is not None]
    more = [text for text in more if visible(text)]
    question = "" if get(ask) is None and more else _text(get(ask), "prompt")
    turns.append({"role": "user", "content": "\n".join([question, *more] if visible(question) else more or [question])})
    turns.append({"role": "assistant", "content": _text(get(say), "answer")})
    return _conversation(turns, set(), set())


def _tools(value: Any) -> tuple[Any, ...]:
    """The definitions of tools in a row: a list of objects, one object, or their JSON."""
    if isinstance(value, str) and value.strip():
        value = _loads(value, "tools_not_list", "tools")
    if value in (None, [], {}, "") or isinstance(value, str):
        return ()
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Malformed("tools_not_list", f"tools is {json_type(value)}, not a list of objects")
    return tuple(value)


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
        known = ROLES | dict.fromkeys(TOOL_ROLES, "tool") | dict.fromkeys(CALL_ROLES, "assistant")
        if lowered not in known:
            raise Malformed("unknown_role", f"{shown(role, 30)} in turn {k + 1}{did_you_mean(lowered, ROLES)}")
        name = known[lowered]
        if name != role:
            flags.add("role_renamed")
        content = _first(turn, columns.get("content", "content"), columns.get("value", "value"))
        calls = _calls(turn, content if lowered in CALL_ROLES else None, k) if name == "assistant" else []
        reasoning = _first(turn, *REASONING) if name == "assistant" else None
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
        message: Message = {"role": name, "content": _text(content, what, k)}
        if reasoning is not None and visible(_text(reasoning, "reasoning", k)):
            message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = calls
        for key in ("name", "tool_call_id"):
            if name == "tool" and isinstance(turn.get(key), str):
                message[key] = turn[key]
        weight = _first(turn, "weight", "train")
        if name == "assistant" and weight is not None:
            if weight not in (0, 1):  # also False and True
                raise Malformed("turn_weight", f"turn {k + 1} has weight {weight!r}; 0 and 1 are understood")
            if weight == 0:
                masked.add(len(turns))
        turns.append(message)
    return turns, masked, flags


def _loads(text: str, reason: str, what: str) -> Any:
    """The JSON inside a text of a row. Raises: Malformed."""
    try:
        return parse_inside(text)
    except Malformed as error:
        raise Malformed(reason, f"{what}: {error}") from None
    except ValueError:
        raise Malformed(reason, f"{what} is not JSON: {shown(text, 40)}") from None


def _calls(turn: Mapping[str, Any], content: Any, k: int) -> list[dict[str, Any]]:
    """The tool calls of an assistant's turn in one form, arguments that are JSON of an object as that object."""
    found = turn.get("tool_calls") or turn.get("function_call")
    if content is not None:
        found = content
        if isinstance(content, str):
            found = _loads(content, "bad_tool_call", f"turn {k + 1}, a call of a tool,")
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
            parsed = _loads(arguments, "bad_tool_call", what) if arguments.strip() else {}
            arguments = parsed if isinstance(parsed, dict) else arguments
        elif arguments is not None and not isinstance(arguments, dict):
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


def _conversation(turns: list[Message], masked: set[int], flags: set[str]) -> Shape:
    """The turns, if there is something to learn and something to learn it from."""
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        only = "a system turn only" if set(roles) <= {"system"} else "no assistant turn"
        raise Malformed("no_assistant_turn", only)
    if "user" not in roles:
        raise Malformed("no_user_turn", "an answer to nothing")
    for k, turn in enumerate(turns):
        if turn["role"] not in ("system", "tool") and not visible(turn["content"]) and "tool_calls" not in turn:
            what = "answer" if turn["role"] == "assistant" else "prompt"
            raise Malformed(f"{_emptiness(turn['content'])}_{what}", f"turn {k + 1} has nothing in it")
    if all(k in masked for k, role in enumerate(roles) if role == "assistant"):
        raise Malformed("no_trained_turn", "no assistant turn is left to train on")
    spoken = [role for role in roles if role != "system"]
    if spoken[0] == "assistant":
        flags.add("assistant_first")
    if spoken[-1] == "user":
        flags.add("ends_with_user")
    if any(a == b != "tool" for a, b in itertools.pairwise(spoken)):
        flags.add("same_role_twice")
    flags.update(_text_flags([text_of(turn) for turn in turns]))
    return Shape(messages=tuple(turns), masked=frozenset(masked), flags=tuple(sorted(flags)))


def _thoughts(parts: list[Any]) -> tuple[list[Any], str | None]:
    """A content's parts without its reasoning, and that ({"type": "thinking", "thinking": text})."""
    rest, thoughts = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        thought = _first(part, *REASONING, "text") if kind in REASONING else None
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


def _emptiness(text: str) -> str:
    return "empty" if not text else "blank" if not text.strip() else "invisible"


def _text_flags(texts: list[str]) -> tuple[str, ...]:
    found = []
    if any(_BIDI.search(text) for text in texts):
        found.append("bidi_controls")
    if any(_CONTROL.search(text) for text in texts):
        found.append("control_characters")
    return tuple(found)
