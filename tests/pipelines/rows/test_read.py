"""Reading rows: every broken line has a number, an offset and a reason, and good lines survive byte for byte."""

import bz2
import csv
import gzip
import json
import lzma
import os
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datatools import DataError, EnvironmentProblem, UsageError
from pipelines.rows.formats.contents import visible
from pipelines.rows.formats.shape import Shape
from pipelines.rows.formats.table import read_shape
from pipelines.rows.index import Pool
from pipelines.rows.input_files import find_sources
from pipelines.rows.jsonl import Limits, Malformed, parse_object
from pipelines.rows.read import read_pool
from pipelines.rows.row import BadRow, Row


def turn(role, content, **more) -> dict:
    return {"role": role, "content": content, **more}


GOOD = {"dataset": "d", "id": "a", "messages": [turn("user", "q"), turn("assistant", "r")]}


def line(identity="a", **changes) -> bytes:
    return json.dumps({**GOOD, "id": identity, **changes}).encode()


def chat(*turns: tuple[object, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def read(tmp_path: Path, data: bytes, name="data.jsonl", **options) -> tuple[Pool, list[BadRow]]:
    (tmp_path / name).write_bytes(data)
    options.setdefault("on_bad_row", "skip")
    return read_pool([str(tmp_path / name)], cache=tmp_path / "cache", **options)


# ---------------------------------------------------------------- lines


def reason(raw: bytes, limits: Limits = Limits()) -> str:  # noqa: B008
    try:
        parse_object(raw, limits)
    except Malformed as error:
        return error.reason
    return "ok"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"a": 1}', "ok"),
        (b' {"a": 1} \r', "ok"),
        (b'{"a": "\\ud83d\\ude00"}', "ok"),
        (b'{"a": 1, "a": 1}', "ok"),  # said twice, but not two things
        (b'{"a": "\\u0000"}', "ok"),
        (b'{"a": 1', "truncated_json"),
        (b'{"a": "b', "truncated_json"),
        (b'{"a": [1, ', "truncated_json"),
        (b'{"a":', "truncated_json"),
        (b'{"a": 1,}', "trailing_comma"),
        (b'{"a": [1,]}', "trailing_comma"),
        (b"{'a': 1}", "python_repr"),
        (b'{"a": 1}{"b": 2}', "two_objects"),
        (b'{"a": 1} {"b": 2}', "two_objects"),
        (b'{"a": 1} x', "extra_data"),
        (b"[1, 2]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"null", "not_an_object"),
        (b"3", "not_an_object"),
        (b"true", "not_an_object"),
        (b"hello", "invalid_json"),
        (b'{"a": NaN}', "nan_literal"),
        (b'{"a": -Infinity}', "nan_literal"),
        (b'{"a": 1e999}', "number_overflow"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number_overflow"),
        (b'{"a": 1, "a": 2}', "duplicate_key"),
        (b'{"b": {"a": 1, "a": null}}', "duplicate_key"),
        (b'{"a": "\\ud800"}', "lone_surrogate"),
        (b'{"\\udfff": 1}', "lone_surrogate"),
        (b'{"a": ["x", {"b": "\\uDBFFx"}]}', "lone_surrogate"),
        (b'{"a": "\xff"}', "invalid_utf8"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_utf8"),  # a surrogate written as UTF-8
        (b'{"a": "\x00"}', "nul_byte"),
        (b'{"a": "\x01"}', "control_character"),
        (b"\xef\xbb\xbf" + b'{"a": 1}', "byte_order_mark"),  # the file's own is gone by then
        (b"[" * 100_000, "too_deep"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "too_deep"),
        (b'{"a": ' * 64 + b"1" + b"}" * 64, "ok"),
        (b'{"a": "' + b"[{" * 1000 + b'"}', "ok"),  # brackets in a text are no depth
    ],
)
def test_reason_of_a_line(raw, expected):
    assert reason(raw) == expected


def test_limits_name_themselves():
    assert reason(b'{"a": [1, 1, 1]}', Limits(values=2)) == "too_many_values"
    assert reason(b'{"a": "1,1,1,1"}', Limits(values=2)) == "ok"
    with pytest.raises(Malformed, match="line_bytes"):
        parse_object(None, Limits(line_bytes=10))


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "role",
                    "content",
                    "text",
                    "prompt",
                    "completion",
                    "instruction",
                    "output",
                    "id",
                    "conversations",
                    "from",
                    "value",
                    "history",
                    "system",
                    "input",
                    "weight",
                    "type",
                    "tools",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@st.composite
def lines(draw) -> bytes:
    """Valid JSON, then some bytes of it cut, doubled or overwritten."""
    raw = bytearray(json.dumps(draw(JSONISH), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 3))] = draw(
            st.sampled_from(
                [
                    b"",
                    b"{",
                    b"}",
                    b"[",
                    b'"',
                    b",",
                    b"\\",
                    b"\x00",
                    b"\xff",
                    b"\xef\xbb\xbf",
                    b"\r",
                    b"\\ud800",
                    b"NaN",
                    b"1e999",
                ]
            )
        )
    return bytes(raw)


@given(lines() | st.binary(max_size=200))
@example(b'{"messages": [{"role": [], "content": {}}]}')
@example(b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": [1]}]}')
@example(b'{"prompt": [], "completion": []}')
def test_any_bytes_give_a_row_or_a_reason(raw):
    try:
        shape = read_shape(parse_object(raw, Limits(depth=20)))
    except Malformed as error:
        assert error.reason.isidentifier() and error.detail.isprintable()
    else:
        assert isinstance(shape, Shape)


@given(st.lists(lines() | st.binary(max_size=60) | st.just(line()), max_size=6), st.sampled_from([b"\n", b"\r\n"]))
def test_any_file_gives_rows_or_one_error(tmp_path_factory, parts, end):
    folder = tmp_path_factory.mktemp("fuzz")
    data = end.join(parts)
    try:
        pool, bad = read(folder, data)
    except DataError as error:
        assert "\n" not in str(error)
        return
    physical = data.split(b"\n")
    for row in pool:
        expected = physical[row.line - 1]
        assert row.raw == (expected.removeprefix(b"\xef\xbb\xbf") if row.line == 1 else expected)
    for entry in bad:
        at = data[entry.byte_offset :].split(b"\n")[0]
        assert at == physical[entry.line - 1] or entry.line == 1
    assert pool.files[0].rows + pool.files[0].bad + pool.files[0].blank == len(physical) - (physical[-1] == b"")


@pytest.mark.parametrize(
    "raw",
    [
        b'"' * 2_000_000,
        b"\\" * 2_000_000,
        b"[" * 2_000_000,
        b'{"a":' * 400_000,
        b'"' + b'\\"' * 1_000_000,
        b'{"a": [' + b"{}," * 300_000 + b"0]}",
        b'{"a": 0.' + b"1" * 2_000_000 + b"}",
        b" " * 2_000_000 + b"x",
        b"{" + b'"a":1,' * 300_000 + b'"a":1}',
    ],
    ids=["quotes", "backslashes", "brackets", "objects", "escapes", "empty-objects", "digits", "spaces", "keys"],
)
def test_hostile_lines_take_no_time(raw):
    start = time.process_time()
    reason(raw)
    assert time.process_time() - start < 2


# ---------------------------------------------------------------- row shapes


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, "unknown_format"),
        ({"question": "q", "reply": "a"}, "unknown_format"),
        ({"question": "q", "answer": 7}, "answer_not_text"),
        ({"question": None, "answer": "a"}, "null_prompt"),
        ({"input": "", "output": "a"}, "empty_prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference_row"),
        ({"input_ids": [1, 2]}, "pre_tokenised"),
        ({"messages": None}, "no_messages"),
        ({"messages": []}, "no_messages"),
        ({"messages": "hello"}, "messages_not_list"),
        ({"messages": {"user": "a"}}, "messages_not_list"),
        ({"messages": ["a", "b"]}, "turn_not_object"),
        ({"messages": [{"content": "a"}]}, "missing_role"),
        ({"messages": [{"role": None, "content": "a"}]}, "missing_role"),
        (chat(("user", "q"), ("asistant", "a")), "unknown_role"),
        (chat((3, "q")), "unknown_role"),
        (chat(("user", "q"), ("tool", "a")), "no_assistant_turn"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "bad_tool_call"),
        (chat(("user", "q"), ("function_call", "f(x)")), "bad_tool_call"),
        (chat(("user", "q"), ("function_call", "[" * 100_000)), "bad_tool_call"),
        (
            {"messages": [turn("user", "q"), turn("assistant", None, tool_calls=[{"name": "f", "arguments": "{x"}])]},
            "bad_tool_call",
        ),
        (
            {"messages": [turn("user", "q"), turn("assistant", None, tool_calls=[{"name": "f", "arguments": [1]}])]},
            "bad_tool_call",
        ),
        ({**chat(("user", "q"), ("assistant", "a")), "tools": "f"}, "tools_not_list"),
        ({**chat(("user", "q"), ("assistant", "a")), "tools": [1]}, "tools_not_list"),
        ({"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}, "tools"),
        ({"messages": [turn("user", "q"), turn("assistant", None, reasoning_content="r")]}, "null_answer"),
        ({"messages": [turn("user", "q"), turn("assistant", "a", thinking=3)]}, "reasoning_not_text"),
        (chat(("user", "q")), "no_assistant_turn"),
        (chat(("system", "s")), "no_assistant_turn"),
        (chat(("assistant", "a")), "no_user_turn"),
        (chat(("user", ""), ("assistant", "a")), "empty_prompt"),
        (chat(("user", " \n"), ("assistant", "a")), "blank_prompt"),
        (chat(("user", "q"), ("assistant", "")), "empty_answer"),
        (chat(("user", "q"), ("assistant", " \t\n")), "blank_answer"),
        (chat(("user", "q"), ("assistant", "\u00a0\u3000")), "blank_answer"),
        (chat(("user", "q"), ("assistant", "\u200b\ufeff\u2060")), "invisible_answer"),
        (chat(("user", "q"), ("assistant", "\u3164\u2800\ufe0f")), "invisible_answer"),
        (chat(("user", "q"), ("assistant", "\x00\x1b")), "invisible_answer"),
        (chat(("user", "q"), ("assistant", None)), "null_answer"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant"}]}, "null_answer"),
        (chat(("user", "q"), ("assistant", 42)), "answer_not_text"),
        (chat(("user", True), ("assistant", "a")), "prompt_not_text"),
        (chat(("user", "q"), ("assistant", [{"type": "image", "url": "x"}])), "part_not_text"),
        (chat(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "")), "empty_answer"),
        ({"messages": [turn("user", "q"), turn("assistant", "a", weight=0.5)]}, "turn_weight"),
        ({"messages": [turn("user", "q"), turn("assistant", "a", weight=0)]}, "no_trained_turn"),
        ({"prompt": "q", "completion": ""}, "empty_answer"),
        ({"prompt": "", "completion": "a"}, "empty_prompt"),
        ({"prompt": "q", "completion": None}, "null_answer"),
        ({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}, "mixed_prompt"),
        ({"instruction": "q", "output": 3}, "answer_not_text"),
        ({"instruction": "", "input": "", "output": "a"}, "empty_prompt"),
        ({"instruction": "q", "output": "a", "history": [["only one"]]}, "history_not_list"),
        ({"text": " "}, "blank_text"),
        ({"text": 3}, "text_not_text"),
    ],
)
def test_reason_of_a_row(row, expected):
    with pytest.raises(Malformed) as caught:
        read_shape(row)
    assert caught.value.reason == expected


def contents(shape: Shape) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in shape.messages]


def test_shapes_of_the_five_formats():
    pair = [("user", "q"), ("assistant", "a")]
    assert contents(read_shape(chat(*pair))) == pair
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert contents(read_shape(shared)) == pair
    assert contents(read_shape({**shared, "system": "s"})) == [("system", "s"), *pair]
    assert contents(read_shape({"instruction": "q", "input": "", "output": "a"})) == pair
    assert contents(
        read_shape({"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["e", "f"]]})
    ) == [("system", "s"), ("user", "e"), ("assistant", "f"), ("user", "q\nx"), ("assistant", "a")]
    assert read_shape({"text": "t"}) == Shape(text="t")
    assert read_shape({"prompt": "q", "completion": "a"}) == Shape(prompt="q", completion="a")
    both = read_shape(
        {
            "prompt": [
                {"role": "user", "content": "e"},
                {"role": "assistant", "content": "f"},
                {"role": "user", "content": "q"},
            ],
            "completion": [{"role": "assistant", "content": "a"}],
        }
    )
    assert contents(both)[-1] == ("assistant", "a") and both.masked == {1}  # loss on the completion only
    weighed = read_shape(
        {
            "prompt": [turn("user", "q")],
            "completion": [turn("assistant", "a", weight=0), turn("user", "r"), turn("assistant", "b")],
        }
    )
    assert weighed.masked == {1}


@pytest.mark.parametrize(
    ("ask", "say"),
    [
        ("question", "answer"),
        ("query", "response"),
        ("instruction", "response"),
        ("prompt", "response"),
        ("input", "output"),
        ("instruction", "output"),
    ],
)
def test_pairs_under_other_names_are_conversations(ask, say):
    pair = [("user", "q"), ("assistant", "a")]
    assert contents(read_shape({ask: "q", say: "a", "category": "x"})) == pair
    assert contents(read_shape({ask: "q", say: "a", "system": "s", "history": [["e", "f"]]})) == [
        ("system", "s"),
        ("user", "e"),
        ("assistant", "f"),
        *pair,
    ]
    with_context = contents(read_shape({ask: "q", "context": "c", say: "a"}))
    assert with_context == [("user", "q\nc"), ("assistant", "a")]  # Dolly's
    assert contents(read_shape({ask: "q", "context": " ", say: "a"})) == pair
    assert contents(read_shape({"x": "q", "y": "a"}, {ask: "x", say: "y"})) == pair
    if (ask, say) != ("instruction", "output"):  # alpaca's own set has all of these
        assert read_shape({ask: "q", say: "a", "text": "t"}).text == "t"


def test_input_without_an_instruction():
    row = {"instruction": None, "input": "x", "output": "a"}
    assert contents(read_shape(row)) == [("user", "x"), ("assistant", "a")]


def test_preferences_are_read_as_prompt_and_chosen():
    """The shapes of TRL, LLaMA-Factory and public sets; loss on the chosen answer alone."""
    one, two = [turn("user", "q")], [turn("user", "e"), turn("assistant", "f"), turn("user", "q")]
    good, worse = [turn("assistant", "a")], [turn("assistant", "b")]
    assert read_shape({"prompt": "q", "chosen": "a", "rejected": "b"}, None, "chosen") == Shape(
        prompt="q", completion="a"
    )
    for row, answers, masked in [
        ({"prompt": one, "chosen": good, "rejected": worse}, "qa", set()),
        ({"prompt": two, "chosen": good, "rejected": worse}, "efqa", {1}),
        ({"prompt": two, "chosen": two + good, "rejected": two + worse}, "efqa", {1}),
        ({"chosen": one + good, "rejected": one + worse}, "qa", set()),
        ({"chosen": two + good, "rejected": two + worse}, "efqa", {1}),
        ({"prompt": "q", "chosen": one + good, "rejected": one + worse}, "qa", set()),
        ({"prompt": "q", "chosen": good, "rejected": worse}, "qa", set()),
        ({"chosen": one + good, "rejected": one + good}, "qa", set()),
        ({"chosen": two + good, "rejected": worse}, "efqa", {1}),
        ({"question": "q", "system": "", "chosen": "a", "rejected": "b"}, "qa", set()),
        ({"instruction": "q", "chosen": "a", "rejected": "b"}, "qa", set()),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            "qa",
            set(),
        ),
        ({"prompt": one, "chosen": "a", "rejected": "b"}, "qa", set()),
        (
            {
                "chosen": "\n\nHuman: e\n\nAssistant: f\n\nHuman: q\n\nAssistant: a",
                "rejected": "\n\nHuman: e\n\nAssistant: f\n\nHuman: q\n\nAssistant: b",
            },
            "efqa",
            {1},
        ),
    ]:
        shape = read_shape(row, None, "chosen")
        assert "".join(text for _, text in contents(shape)) == answers and shape.masked == masked, row
        with pytest.raises(Malformed, match="preference_row: .*--preference chosen"):
            read_shape(row)
    shape = read_shape({"prompt": "q", "system": "s", "chosen": "a", "rejected": "b"}, None, "chosen")
    assert contents(shape) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    for row, reason in [
        ({"chosen": "a", "rejected": "b"}, "null_prompt"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty_answer"),
        ({"prompt": "q", "chosen": 3, "rejected": 4}, "answer_not_text"),
        ({"chosen": [], "rejected": []}, "null_prompt"),
        ({"chosen": [3], "rejected": None}, "null_prompt"),
    ]:
        with pytest.raises(Malformed) as caught:
            read_shape(row, None, "chosen")
        assert caught.value.reason == reason, row
    assert read_shape({"chosen": None, "rejected": None, "text": "t"}).text == "t"


def test_files_may_have_columns_of_their_own(tmp_path):
    for name, row in (
        ("a.jsonl", {"q": "1", "r": "2"}),
        ("b.jsonl", {"ask": "3", "say": "4", "q": "x", "r": "y"}),
        ("c.jsonl", {"prompt": "5", "completion": "6"}),
    ):
        (tmp_path / name).write_text(json.dumps(row))
    columns = {
        "prompt": "q",
        "completion": "r",
        "b.jsonl": {"prompt": "ask", "completion": "say"},
        str(tmp_path / "c.jsonl"): {},
    }
    pool, _ = read_pool([tmp_path], cache=tmp_path, columns=columns)
    assert [(row.prompt, row.completion) for row in pool] == [("1", "2"), ("3", "4"), ("5", "6")]
    for pattern in (str(tmp_path), f"{tmp_path}/[ab].jsonl"):
        theirs = {pattern: {"prompt": "q", "completion": "r"}}
        pool, _ = read_pool([tmp_path / "a.jsonl"], cache=tmp_path, columns=theirs)
        assert pool[0].completion == "2"
    with pytest.raises(UsageError, match=r"columns: 'd.jsonl' is not one of the input files \('.*a.jsonl'"):
        read_pool([tmp_path], cache=tmp_path, columns={"d.jsonl": {"prompt": "x"}})
    with pytest.raises(UsageError, match="'promt'; did you mean 'prompt'"):
        read_pool([tmp_path], cache=tmp_path, columns={"a.jsonl": {"promt": "x"}})
    columns = {"prompt": "q", "completion": "r"}
    with pytest.raises(DataError, match="missing_column"):
        read_pool([tmp_path / "c.jsonl"], cache=tmp_path, columns=columns)
    found, _ = read_pool([tmp_path / "c.jsonl"], cache=tmp_path, columns=columns, detect=True)
    assert found[0].completion == "6"


def test_unknown_columns_name_the_flags():
    with pytest.raises(Malformed) as caught:
        read_shape({"frage": "q", "antwort": "a"})
    assert caught.value.detail.startswith("'frage', 'antwort'; expected messages; ")
    assert "--columns prompt=YOURS,completion=YOURS (of target rows: --target-columns)" in caught.value.detail


def test_formats_with_columns_of_others_are_told_apart():
    """Tables that hold several formats fill the columns of the others with nulls."""
    empty = {"messages": None, "prompt": None, "completion": None, "instruction": None, "output": None, "text": None}
    assert read_shape({**empty, "text": "t"}).text == "t"
    assert read_shape({**empty, "prompt": "q", "completion": "a"}).prompt == "q"
    assert contents(read_shape({**empty, **chat(("user", "q"), ("assistant", "a")), "prompt": "q"}))[0] == ("user", "q")


def test_odd_rows_are_kept_and_flagged():
    def flags(*turns):
        return set(read_shape(chat(*turns)).flags)

    assert flags(("user", "q"), ("assistant", "a")) == set()
    assert flags(("Human", "q"), ("gpt", "a")) == {"role_renamed"}
    assert flags(("assistant", "a"), ("user", "q")) == {"assistant_first", "ends_with_user"}
    assert flags(("user", "q"), ("user", "r"), ("assistant", "a")) == {"same_role_twice"}
    assert flags(("system", "s"), ("user", [{"type": "text", "text": "q"}]), ("assistant", "a")) == {"parts_joined"}
    assert flags(("user", "\u202eq"), ("assistant", "a\x1b[31m")) == {"bidi_controls", "control_characters"}
    shape = read_shape(
        {
            "messages": [
                turn("user", "q"),
                turn("assistant", "a", weight=0),
                turn("user", "q"),
                turn("assistant", "b", weight=1),
            ]
        }
    )
    assert shape.masked == {1}
    shape = read_shape(
        {
            "system": "s",
            "conversations": [
                turn("user", "q"),
                turn("assistant", "a", weight=0),
                turn("user", "q"),
                turn("assistant", "b"),
            ],
        }
    )
    assert shape.masked == {2} and len(shape.messages) == 5


def test_reasoning_and_tools_are_read_in_one_form():
    """Under the names in use: OpenAI's, DeepSeek's and Qwen's, gpt-oss's, Anthropic's parts, sharegpt's roles."""
    for said in [
        turn("assistant", "a", reasoning_content="r"),
        turn("assistant", "a", thinking="r"),
        turn("assistant", [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]),
    ]:
        shape = read_shape({"messages": [turn("user", "q"), said]})
        assert shape.messages[1] == {"role": "assistant", "content": "a", "reasoning": "r"}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    spoken = [
        turn("user", "q"),
        turn("assistant", "", tool_calls=[call]),
        turn("tool", "3", name="f"),
        turn("assistant", "a"),
    ]
    for said in [
        turn("assistant", None, tool_calls=[call]),
        turn("assistant", None, tool_calls=[{"name": "f", "arguments": '{"x": 1}'}]),
        turn("assistant", None, function_call={"name": "f", "arguments": {"x": 1}}),
        turn("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        turn("tool_call", '[{"function": {"name": "f", "parameters": {"x": 1}}}]'),
    ]:
        for role in ("tool", "function", "observation"):
            row = {"messages": [turn("user", "q"), said, turn(role, "3", name="f"), turn("assistant", "a")]}
            assert list(read_shape(row).messages) == spoken, (said, role)
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given_as in (tools, json.dumps(tools), tools[0]):
        assert read_shape({"messages": spoken, "tools": given_as}).tools == tuple(tools)
    for none in (None, [], "", "[]"):
        assert read_shape({"messages": spoken, "tools": none}).tools == ()
    data = {"messages": [turn("user", "q"), turn("assistant", None, tool_calls=[call]), turn("tool", {"t": [1]})]}
    assert read_shape(data).messages[2]["content"] == '{"t": [1]}'
    row = Row("i", "s", "f", 1, b"", (turn("user", "q"), turn("assistant", "a", reasoning="r", tool_calls=[call])))
    assert row.answer == 'r\na\n{"name": "f", "arguments": {"x": 1}}' and row.whole == f"q\n{row.answer}"


def test_columns_are_mapped_and_checked():
    row = {"question": "q", "answer": "a", "text": "something else"}
    columns = {"prompt": "question", "completion": "answer"}
    assert read_shape(row, columns).completion == "a"
    with pytest.raises(Malformed, match="missing_column: no column 'answer'"):
        read_shape({"question": "q"}, columns)
    turns = {"dialog": [{"who": "user", "said": "q"}, {"who": "assistant", "said": "a"}]}
    shape = read_shape(turns, {"messages": "dialog", "role": "who", "content": "said"})
    assert contents(shape)[1] == ("assistant", "a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        (" \n\t", False),
        ("\u200b", False),
        ("\u00ad\u034f", False),
        ("\U000e0020", False),
        ("\u3164", False),
        (".", True),
        ("é", True),
        ("👨\u200d👩", True),
        ("\u0301", True),
        ("\u200ba", True),
        ("\U0001fae9", True),
    ],
)
def test_visible(text, expected):
    assert visible(text) is expected


# ---------------------------------------------------------------- pools


UNICODE = ["emoji 🗼🇯🇵", "שלום עולם", "e\u0301", "a\u2028b\u0085c\u2029d", "\\ud83d\\ude00", "\u202eabc", "ﬁ ²"]


def test_rows_are_the_input_lines_byte_for_byte(tmp_path):
    raws = [b'{"id":"%d","z":1,  "a" : [1.0e0],"text":"%s"}' % (k, text.encode()) for k, text in enumerate(UNICODE)]
    raws.append(raws[0].replace(b'"0"', b'"crlf"') + b"\r")
    bom = b"\xef\xbb\xbf"
    assert read(tmp_path, raws[0] + b"\n" + bom + raws[1])[1][0].reason == "byte_order_mark"
    pool, bad = read(tmp_path, bom + b"\n".join(raws))  # no newline at the end
    assert not bad
    assert [row.raw for row in pool] == raws
    assert [row.text for row in pool][:4] == UNICODE[:4]
    assert [pool.offset(i) for i in range(2)] == [3, 3 + len(raws[0]) + 1]


def test_blank_lines_are_counted_and_numbers_stay_physical(tmp_path):
    data = b"\n".join([line("a"), b"", b"  \t ", b"broken", line("b"), b"\r", line("c"), b"", b""])
    pool, bad = read(tmp_path, data)
    assert [row.line for row in pool] == [1, 5, 7]
    assert [(b.line, b.byte_offset, b.reason) for b in bad] == [(4, data.index(b"broken"), "invalid_json")]
    info = pool.files[0]
    assert (info.bytes, info.rows, info.bad, info.blank) == (len(data), 3, 1, 4)
    assert str(bad[0]).startswith(f"{tmp_path}/data.jsonl:4: invalid_json (")


def test_long_lines_are_passed_over(tmp_path):
    long = b'{"text": "' + b"x" * 300 + b'"}'
    data = b"\n".join([b'{"text": "a"}', long, b'{"text": "b"}', long])
    pool, bad = read(tmp_path, data, limits=Limits(line_bytes=100), on_bad_row="quarantine", quarantine=tmp_path / "q")
    assert [row.text for row in pool] == ["a", "b"]
    assert [(entry.line, entry.byte_offset, entry.reason) for entry in bad] == [
        (2, data.index(long), "line_too_long"),
        (4, data.rindex(long), "line_too_long"),
    ]
    assert (tmp_path / "q").read_bytes() == long + b"\n" + long + b"\n"
    exact = b'{"text": "' + b"y" * 88 + b'"}'
    assert len(exact) == 100 and len(read(tmp_path, exact + b"\n", limits=Limits(line_bytes=100))[0]) == 1
    assert len(read(tmp_path, b"\xef\xbb\xbf" + exact, limits=Limits(line_bytes=100))[0]) == 1


def test_long_lines_take_little_memory(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "' + b"x" * 30_000_000 + b'"}\n{"text": "a"}\n')
    tracemalloc.start()
    try:
        read_pool([tmp_path / "data.jsonl"], cache=tmp_path, on_bad_row="skip", limits=Limits(line_bytes=1 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20


def test_policies(tmp_path):
    bad_line = b'{"text": "\xff"}'
    data = b"\n".join([line("a"), bad_line, b"[]\r", line("b")])
    with pytest.raises(DataError) as caught:
        read(tmp_path, data, on_bad_row="error")
    message = str(caught.value)
    assert "2 of 4 rows" in message and f"{tmp_path}/data.jsonl:2: invalid_utf8" in message
    assert "--on-bad-row skip" in message and "\n" not in message
    assert len(read(tmp_path, data, on_bad_row="skip")[0]) == 2
    pool, bad = read(tmp_path, data, on_bad_row="quarantine", quarantine=tmp_path / "quarantine.jsonl")
    assert len(pool) == 2 and len(bad) == 2
    assert (tmp_path / "quarantine.jsonl").read_bytes() == bad_line + b"\n[]\r\n"
    with pytest.raises(UsageError, match="no quarantine file"):
        read(tmp_path, data, on_bad_row="quarantine")
    with pytest.raises(UsageError, match="'ignore'; expected one of error, skip, quarantine"):
        read(tmp_path, data, on_bad_row="ignore")
    with pytest.raises(DataError, match="1 of 1 rows cannot be used"):
        read(tmp_path, b"[]", on_bad_row="skip")
    with pytest.raises(DataError, match="no row in"):
        read(tmp_path, b"\n \n")


def test_ids_are_unique(tmp_path):
    rows = [line("x"), line("x"), line("x#2"), line("x"), line(7), line(None), line(" "), line([1]), b'{"text": "t"}']
    pool, bad = read(tmp_path, b"\n".join(rows))
    assert pool.ids == ["x", "x#2", "x#2#2", "x#3", "7", "data:6", "data:7", "data:8", "data:9"]
    assert not bad and [row.id for row in pool] == pool.ids
    assert pool.flags["repeated_id"] == 3 and pool.flags["new_id"] == 4
    with pytest.raises(DataError, match="repeated_id \\(id 'x' is also at .*data.jsonl:1\\)"):
        read(tmp_path, b"\n".join(rows), on_bad_row="error")
    assert read(tmp_path, b"\n".join(map(line, ["x#2", "x", "x"])))[0].ids == ["x#2", "x", "x#3"]
    start = time.process_time()
    pool, _ = read(tmp_path, b"\n".join([line("same")] * 20_000))
    assert len(set(pool.ids)) == 20_000 and time.process_time() - start < 10


def test_sources_and_subtasks(tmp_path):
    rows = [
        line("a"),
        line("b", dataset=" spaced "),
        line("c", dataset=""),
        line("d", dataset=None, source="s"),
        line("e", dataset=3),
        line("f", dataset=["x"]),
        line("g", kind="k"),
        line("h", subtask="part", dataset="../x"),
    ]
    pool, _ = read(tmp_path, b"\n".join(rows), name="file.v1.jsonl")
    assert pool.sources == ["d", "spaced", "file.v1", "s", "3", "file.v1", "d", "../x"]
    assert [row.source for row in pool] == pool.sources
    assert pool[-1].subtask == "part" and pool[0].subtask is None
    assert pool.flags["source_from_file"] == 2
    assert read(tmp_path, rows[6], source_key="kind")[0].sources == ["k"]
    assert read(tmp_path, rows[6], columns={"source": "kind", "id": "dataset"})[0].ids == ["d"]
    with pytest.raises(UsageError, match="'sorce'; did you mean 'source'"):
        read(tmp_path, rows[0], columns={"sorce": "x"})


def test_row_views(tmp_path):
    long = chat(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"), ("user", "x"))
    rows = [line("a"), b'{"prompt": "q", "completion": "c"}', b'{"text": "t"}', json.dumps(long).encode()]
    pool, _ = read(tmp_path, b"\n".join(rows))
    assert [(r.question, r.answer) for r in pool] == [("q", "r"), ("q", "c"), ("", "t"), ("s\n\nq\n\na\n\nr", "b")]
    assert isinstance(pool[0], Row) and pool[-1].line == 4
    with pytest.raises(IndexError, match="row 4 of a pool of 4"):
        pool[4]


def test_changed_file_is_noticed(tmp_path):
    pool, _ = read(tmp_path, line("a") + b"\n" + line("b"))
    (tmp_path / "data.jsonl").write_bytes(line("a") + b"\n" + line("c"))
    assert pool[0].id == "a"
    with pytest.raises(DataError, match=r"data.jsonl:2 has changed since"):
        pool[1]
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(DataError, match="No such file"):
        pool[0]


# ---------------------------------------------------------------- files


ROWS = [{"prompt": f"question {k}", "completion": f"ответ {k}\nsecond line", "id": f"i{k}"} for k in range(5)]
JSONL = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)


def zstd(data: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".zst": zstd, ".xz": lzma.compress, ".bz2": bz2.compress}


def write_as(kind: str, path: Path) -> None:
    packed = next((suffix for suffix in PACK if kind.endswith(suffix)), None)
    if packed:
        inner = path.with_suffix("")
        write_as(kind.removesuffix(packed), inner)
        half = inner.stat().st_size // 2
        path.write_bytes(b"".join(map(PACK[packed], (inner.read_bytes()[:half], inner.read_bytes()[half:]))))
        inner.unlink()
        return
    if kind == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["prompt", "completion", "id"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "json":
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode() + b"\n")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        table = [{**row, "score": float("nan"), "when": None} for row in ROWS]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    elif kind in ("arrow", "feather"):  # a stream, as `datasets` writes it, and a file with an index
        import pyarrow

        table = pyarrow.Table.from_pylist([{**row, "when": None} for row in ROWS])
        new = pyarrow.ipc.new_stream if kind == "arrow" else pyarrow.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif kind == "json.gz":
        path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(JSONL[:100]) + gzip.compress(JSONL[100:]))  # members follow each other
    else:
        path.write_bytes(JSONL)


@pytest.mark.parametrize(
    "kind",
    [
        "jsonl",
        "json",
        "csv",
        "parquet",
        "jsonl.gz",
        "json.gz",
        "ndjson",
        "arrow",
        "feather",
        "jsonl.zst",
        "jsonl.xz",
        "jsonl.bz2",
        "csv.zst",
        "arrow.xz",
        "json.bz2",
    ],
)
def test_every_file_type_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"data.{kind.replace('feather', 'arrow')}"
    write_as(kind, path)
    pool, bad = read_pool([path], cache=tmp_path / "cache")
    assert not bad
    assert [(row.prompt, row.completion, row.id, row.line) for row in pool] == [
        (row["prompt"], row["completion"], row["id"], k) for k, row in enumerate(ROWS, start=1)
    ]
    assert pool.files[0].path == str(path) and pool.files[0].bytes == path.stat().st_size
    assert pool.file(0) == str(path) and pool.sources[0] == "data"


def test_json_lines_called_json(tmp_path):
    assert len(read(tmp_path, JSONL, name="data.json")[0]) == 5
    assert not (tmp_path / "cache").exists()


def test_bad_rows_of_an_array(tmp_path):
    data = b'[{"text": "a"}, {"text": "}]"}, 3, {"text": NaN},\n {"text": "x\ny"}, , {"text": "b"}, {"text": "c"'
    pool, bad = read(tmp_path, data, name="data.json")
    assert [(row.text, row.line) for row in pool] == [("a", 1), ("}]", 2), ("b", 7)]
    assert [(entry.line, entry.reason) for entry in bad] == [
        (3, "not_an_object"),
        (4, "nan_literal"),
        (5, "truncated_json"),
        (6, "invalid_json"),
        (8, "truncated_json"),
    ]
    assert [entry.reason for entry in read(tmp_path, b'[{"text": "a"}] x', name="data.json")[1]] == ["extra_data"]
    pool, bad = read(
        tmp_path, b'[{"text": "' + b"x" * 200 + b'"}, {"text": "a"}]', name="data.json", limits=Limits(line_bytes=100)
    )
    assert [row.line for row in pool] == [2] and bad[0].reason == "line_too_long"


@given(
    st.binary(max_size=120).map(lambda data: b"[" + data)
    | st.lists(lines(), max_size=4).map(lambda parts: b"[" + b",".join(parts) + b"]")
)
def test_any_array_gives_rows_or_one_error(tmp_path_factory, data):
    try:
        read(tmp_path_factory.mktemp("array"), data, name="data.json")
    except DataError as error:
        assert "\n" not in str(error)


@given(st.binary(max_size=120))
def test_any_table_gives_rows_or_one_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("table")
    for name in ("data.csv", "data.tsv", "data.parquet", "data.jsonl.gz"):
        try:
            read(folder, b"text,prompt,completion\n" * name.endswith(("csv", "tsv")) + data, name=name)
        except DataError as error:
            assert "\n" not in str(error)


def test_large_array_is_read_in_pieces(tmp_path):
    rows = [{"text": f"row {k} " + "x" * 50_000} for k in range(60)]  # elements straddle the blocks of 1 MiB
    pool, bad = read(tmp_path, json.dumps(rows, indent=1).encode(), name="data.json")
    assert not bad and [row.text for row in pool] == [row["text"] for row in rows]


def test_bad_rows_of_a_table(tmp_path):
    data = b'text,id\n"a, with comma",1\n"b"x,2\nc\n\nd\xff,4\ne,5\n'
    pool, bad = read(tmp_path, data, name="data.csv")
    assert [(row.text, row.id) for row in pool] == [("a, with comma", "1"), ("e", "5")]
    assert [(entry.line, entry.reason) for entry in bad] == [
        (2, "invalid_csv"),
        (3, "invalid_csv"),
        (4, "lone_surrogate"),
    ]
    with pytest.raises(DataError, match="names a column twice"):
        read(tmp_path, b"a,a\n1,2\n", name="data.csv")


def test_gzip_is_bounded(tmp_path):
    bomb = gzip.compress(b"\0" * (200 << 20), 9)
    with pytest.raises(DataError, match="unpacked_ratio"):
        read(tmp_path, bomb, name="bomb.jsonl.gz")
    with pytest.raises(DataError, match="unpacked_bytes"):
        read(tmp_path, gzip.compress(JSONL), name="data.jsonl.gz", limits=Limits(unpacked_bytes=10))
    for broken in (gzip.compress(JSONL)[:-20], gzip.compress(JSONL) + b"junk junk junk", JSONL):
        with pytest.raises(DataError, match="is damaged after"):
            read(tmp_path, broken, name="data.jsonl.gz")
    assert not list((tmp_path / "cache").glob("*"))  # nothing half done stays


@pytest.mark.parametrize("suffix", PACK)
def test_other_compressions_are_bounded(tmp_path, suffix):
    pack, name = PACK[suffix], f"data.jsonl{suffix}"
    bomb = pack(b"\0" * (200 << 20))
    with pytest.raises(DataError, match="unpacked_ratio"):
        read(tmp_path, bomb, name=name)
    with pytest.raises(DataError, match="unpacked_bytes"):
        read(tmp_path, pack(JSONL), name=name, limits=Limits(unpacked_bytes=10))
    for broken in (pack(JSONL)[:-6], pack(JSONL) + b"junk junk junk", JSONL, pack(JSONL)[:10]):
        with pytest.raises(DataError, match="is damaged after") as caught:
            read(tmp_path, broken, name=name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no row in"):
        read(tmp_path, b"", name=name)
    assert not list((tmp_path / "cache").glob("*.jsonl")) or suffix  # nothing half done stays
    assert len(read(tmp_path, pack(JSONL) + (b"\0" * 8 if suffix == ".xz" else b""), name=name)[0]) == 5


def test_tables_are_bounded_and_broken_ones_are_one_line(tmp_path):
    write_as("arrow", tmp_path / "rows.arrow")
    with pytest.raises(DataError, match="rows.arrow contains more than 100 bytes as JSONL"):
        read_pool([tmp_path / "rows.arrow"], cache=tmp_path / "cache", limits=Limits(unpacked_bytes=100))
    whole = (tmp_path / "rows.arrow").read_bytes()
    for broken in (whole[:-40], b"ARROW1" + whole[6:], whole[:100], b"text"):
        with pytest.raises(DataError, match="cannot read .* as (Arrow|a table)") as caught:
            read(tmp_path, broken, name="broken.arrow")
        assert "\n" not in str(caught.value)


def test_a_file_name_that_is_not_text_is_refused_at_the_start(tmp_path):
    (tmp_path / "b\udcff.jsonl").write_bytes(JSONL)
    for path in (tmp_path / "b\udcff.jsonl", tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match="is not UTF-8; rename it") as caught:
            find_sources([path])
        str(caught.value).encode()


def test_file_names_of_bad_rows_are_redacted_once(tmp_path, monkeypatch):
    from pipelines.rows import prepare
    from pipelines.rows.row import BadRow

    asked = []
    monkeypatch.setattr(prepare, "redact", lambda name: asked.append(name) or name)
    prepare._write_bad(tmp_path, [BadRow(f"{k % 2}.jsonl", k, 0, "reason", "") for k in range(100)])
    assert sorted(asked) == ["0.jsonl", "1.jsonl"]


def test_folders_of_save_to_disk(tmp_path):
    """Rows in order over several files, named after the folder; of several splits one must be named."""
    import datasets

    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "kept", num_shards=2)
    (tmp_path / "kept" / "cache-1234.arrow").write_bytes(b"left by a map")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([4, 0])}).save_to_disk(tmp_path / "two")
    for name, stem in (("kept", "kept"), ("one", "one"), ("two/train", "train")):
        pool, bad = read_pool([tmp_path / name], cache=tmp_path / "cache")
        assert not bad and [row.id for row in pool] == [row["id"] for row in ROWS]
        assert [row.completion for row in pool] == [row["completion"] for row in ROWS]
        assert pool.where(3) == f"{tmp_path / name}:4" and pool.sources[0] == stem
        assert pool.files[0].bytes > 100 and len(pool.files) == 1
    assert [row.id for row in read_pool([tmp_path / "two/test"], cache=tmp_path / "cache")[0]] == ["i4", "i0"]
    with pytest.raises(DataError, match=r"two contains 2 splits \(test, train\); name one, as in .*two/test"):
        read_pool([tmp_path / "two"], cache=tmp_path / "cache")
    (tmp_path / "all").mkdir()
    (tmp_path / "kept").rename(tmp_path / "all" / "a")
    (tmp_path / "all" / "b.jsonl").write_bytes(b'{"text": "more"}')
    assert len(read_pool([tmp_path / "all"], cache=tmp_path / "cache", on_bad_row="skip")[0]) == 6
    next((tmp_path / "one" / "train").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="is missing; copy the folder again"):
        read_pool([tmp_path / "one"], cache=tmp_path / "cache")
    (tmp_path / "two/train/state.json").write_text('{"_data_files": [{"filename": "../../etc"}]}')
    with pytest.raises(DataError, match="state.json does not list the files"):
        read_pool([tmp_path / "two/train"], cache=tmp_path / "cache")


def test_patterns_name_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x-1.jsonl", "a/x-2.jsonl.gz", "a/notes.md", "b/c/x-3.csv", "plain", "odd[1].jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(line(name))

    def names(*given):
        return [source.name for source in find_sources(given)]

    assert names("a/*") == ["a/x-1.jsonl", "a/x-2.jsonl.gz"]
    assert names("a/x-?.jsonl") == ["a/x-1.jsonl"]
    assert names("**/x-*") == ["a/x-1.jsonl", "a/x-2.jsonl.gz", "b/c/x-3.csv"]
    assert names("pl*") == ["plain"]  # of no known type, as if it was named
    assert names("odd[1].jsonl") == ["odd[1].jsonl"]  # a file's own name comes first
    assert names("[b]") == ["b/c/x-3.csv"]
    with pytest.raises(DataError, match=r"no file matches 'a/\*.parquet'; check the path"):
        find_sources(["a/*.parquet"])
    with pytest.raises(UsageError, match="named twice"):
        find_sources(["a/*.jsonl", "a/x-1.jsonl"])
    Path("a/x-4.jsonl.lz4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"\.lz4 is not supported; unpack or convert it"):
        find_sources(["a/*"])


def test_folders_and_missing_files(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", "a/.hidden.jsonl", ".git/x.jsonl", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(line(name))
    assert [Path(source.name).name for source in find_sources([tmp_path])] == ["z.jsonl", "b.jsonl"]
    with pytest.raises(UsageError, match="named twice"):
        find_sources([tmp_path, tmp_path / "b.jsonl"])
    with pytest.raises(UsageError, match="no data was named"):
        find_sources([])
    with pytest.raises(DataError, match="contains no data file"):
        (tmp_path / "empty").mkdir()
        find_sources([tmp_path / "empty"])
    with pytest.raises(DataError, match="cannot read .*missing.jsonl.*hf:owner/name"):
        find_sources([tmp_path / "missing.jsonl"])
    with pytest.raises(DataError, match="UTF-16"):
        read(tmp_path, "text".encode("utf-16"))
    with pytest.raises(DataError, match="let its name end in .gz"):
        read(tmp_path, gzip.compress(JSONL))
    for start, suffix in (
        (b"\x28\xb5\x2f\xfd", ".zst"),
        (b"BZh9", ".bz2"),
        (b"\xfd7zXZ\x00", ".xz"),
        (b"ARROW1", ".arrow"),
        (b"\xff\xff\xff\xff", ".arrow"),
    ):
        with pytest.raises(DataError, match=f"let its name end in {suffix}"):
            read(tmp_path, start + b" rest", name="data.jsonl")
    for name in ("data.jsonl.lz4", "data.zip", "data.tar.gz", "data.xlsx", "data.pkl"):
        with pytest.raises(
            DataError, match=r"\.\w+(\.gz)? is not supported; unpack or convert it \(supported are .jsonl,"
        ):
            read(tmp_path, JSONL, name=name)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="not a file"):
        find_sources([tmp_path / "pipe.jsonl"])


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    pool, _ = read_pool(["hf:owner/name/main@v1:train[:5]"], cache=tmp_path)
    assert asked == [("owner/name", "main", "train[:5]", "v1")] and len(pool) == 5
    assert pool[1].completion == ROWS[1]["completion"] and pool.where(1) == "hf:owner/name/main@v1:train[:5]:2"
    read_pool(["owner/other"], cache=tmp_path)
    assert asked[-1] == ("owner/other", None, "train", None)
    with pytest.raises(UsageError, match="not the name of a data set"):
        read_pool(["hf:a b"], cache=tmp_path)


def test_the_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    import datasets

    def fail(*args, **options):
        raise ConnectionError("Couldn't reach it\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EnvironmentProblem) as caught:
        read_pool(["owner/name"], cache=tmp_path)
    assert "HF_HUB_OFFLINE is set): Couldn't reach it;" in str(caught.value) and "\n" not in str(caught.value)


def test_many_rows_in_linear_time_and_flat_memory(tmp_path):
    """20,000 rows, read once and drawn at random; memory is the index and the ids, not the texts."""
    text = "word " * 100
    with open(tmp_path / "data.jsonl", "w") as file:
        for k in range(20_000):
            file.write(json.dumps({"id": f"row-{k}", "prompt": f"{k} {text}", "completion": "yes"}) + "\n")
    tracemalloc.start()
    try:
        start = time.process_time()
        pool, _ = read_pool([tmp_path / "data.jsonl"], cache=tmp_path)
        seconds = time.process_time() - start
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(pool) == 20_000 and seconds < 20
    assert held < 8 << 20  # the file has 12 MB
    assert pool[12_345].prompt.startswith("12345 word")
