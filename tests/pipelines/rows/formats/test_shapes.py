"""Shapes of rows: what every format is read as, and why a row is refused."""

import json

import pytest

from datatools import DataError, UsageError
from pipelines.rows.formats.contents import visible
from pipelines.rows.formats.loss_marks import LOSS, NO_LOSS
from pipelines.rows.formats.shape import Shape
from pipelines.rows.formats.table import read_shape
from pipelines.rows.jsonl import Malformed
from pipelines.rows.read import read_pool
from pipelines.rows.row import Row
from tests.pipelines.rows.pools import chat, turn


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
        ({"messages": [turn("user", "q"), turn("assistant", "a", loss=2.5)]}, "turn_weight"),
        ({"messages": [turn("user", "q"), turn("assistant", "a", train="no")]}, "turn_weight"),
        (
            {
                "messages": [
                    turn("user", "q"),
                    turn("assistant", "a", train_detail=[{"begin_offset": 0, "train": False}]),
                ]
            },
            "turn_weight",
        ),
        ({**chat(("user", "<image>q"), ("assistant", "a")), "images": ["a.png"]}, "media"),
        ({"prompt": "q", "completion": "a <video>", "video": {"bytes": None, "path": None}}, "media"),
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


@pytest.mark.parametrize("key", [*LOSS, *NO_LOSS])
def test_turns_without_loss_under_the_names_of_every_trainer(key):
    for no, yes in ((0, 1), (False, True), (0.0, 1.0)):
        no, yes = (yes, no) if key in NO_LOSS else (no, yes)
        turns = [
            turn("user", "q", **{key: yes}),  # a turn of the user has no loss in any case
            turn("assistant", "a", **{key: no}),
            turn("user", "q", **{key: None}),
            turn("assistant", "b", **{key: yes}),
            turn("user", "q"),
            turn("assistant", "c", **{key: None}),
        ]
        assert read_shape({"messages": turns}).masked == {1}
        both = [
            turn("user", "q"),
            turn("assistant", "a", **{"weight": 1, "train": True, key: no}),
            turn("user", "q"),
            turn("assistant", "b"),
        ]
        assert read_shape({"messages": both}).masked == {1}
        assert read_shape({"prompt": both[:1], "completion": both[1:]}).masked == {1}


MARKS = ["mask", "Mask", "is_masked", "lossMask", "no_loss", "ignore_loss", "loss_scale", "token_weights", "supervised"]


@pytest.mark.parametrize("key", MARKS)
@pytest.mark.parametrize("value", [0, 1, True, False, 0.5, [0, 1]])
def test_marks_of_an_unknown_meaning_are_refused_in_answers(key, value):
    turns = [turn("user", "q", **{key: value}), turn("assistant", "a", **{key: value}), turn("assistant", "b")]
    for row in ({"messages": turns}, {"conversations": turns}, {"prompt": turns[:1], "completion": turns[1:]}):
        with pytest.raises(Malformed, match=rf"turn_weight: turn \d has '{key}' .*say it with 'weight'"):
            read_shape(row)
    for other in (None, "a text"):
        answers = [turn("assistant", "a", **{key: other}), turn("assistant", "b")]
        assert read_shape({"messages": [turns[0], *answers]}).masked == set()
    for name in ("train_id", "mask_token_id", "trainer", "weight_class", "glossary", "unlearned"):
        read_shape({"messages": [turns[0], turn("assistant", "a", **{name: value})]})


@pytest.mark.parametrize("key", [*LOSS, *NO_LOSS])
def test_lists_with_a_value_for_each_turn_are_followed(key):
    dialog = [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")]
    system = [turn("system", "s"), *dialog]
    yes, no = (0, 1) if key in NO_LOSS else (1, 0)
    for row, values, masked in [
        ({"messages": dialog}, [no, no, no, yes], {1}),
        ({"messages": dialog}, [yes, yes, yes, no], {3}),
        ({"messages": dialog}, [yes, no], {3}),  # for each answer
        ({"messages": dialog}, [bool(yes)] * 4, set()),
        ({"messages": system}, [no, no, no, no, yes], {2}),
        ({"messages": system}, [no, no, no, yes], {2}),  # without the system turn
        ({"conversations": dialog, "system": "s"}, [no, no, no, yes], {2}),
        ({"instruction": "r", "output": "b", "history": [["q", "a"]]}, [no, yes], {1}),
        ({"prompt": dialog[:1], "completion": dialog[1:]}, [no, no, no, yes], {1}),
    ]:
        assert read_shape({**row, key: values}).masked == masked, (row, values)
        assert read_shape({**row, key: json.dumps(values)}).masked == masked  # a cell of a CSV file
    for values in ([no] * 4, [no] * 2):
        with pytest.raises(Malformed, match="no_trained_turn"):
            read_shape({"messages": dialog, key: values})
    both = [dialog[0], turn("assistant", "a", weight=0), *dialog[2:]]
    assert read_shape({"messages": both, key: [yes] * 4}).masked == {1}


CHAT = {"messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")]}


@pytest.mark.parametrize(
    ("row", "more"),
    [
        (CHAT, {"loss_mask": [0, 1, 1]}),
        (CHAT, {"loss_mask": [0, 0, 0, 0.5]}),
        (CHAT, {"loss_mask": [[0, 1], [1]]}),
        (CHAT, {"mask": [0, 1, 0, 1]}),  # 1 with loss, or without?
        (CHAT, {"mask": "assistant"}),
        (CHAT, {"label": [0, 1]}),
        (CHAT, {"labels": [-100, -100, 5, 6]}),
        (CHAT, {"labels": [3, 4, 5], "input_ids": [3, 4, 5]}),
        (CHAT, {"assistant_masks": [0] * 5 + [1] * 3}),
        (CHAT, {"completion_mask": [0] * 5 + [1] * 3}),
        (CHAT, {"attention_mask": [1, 1, 0, 1]}),
        (CHAT, {"attention_mask": [1, 2, 3]}),
        ({"text": "t"}, {"loss_mask": [0, 1]}),
        ({"text": "t"}, {"masked": [True, False]}),
        ({"text": "t"}, {"labels": [-100, 4], "input_ids": [3, 4]}),
        ({"text": "t"}, {"attention_mask": [0, 1, 0, 1, 0]}),
        ({"prompt": "q", "completion": "a"}, {"loss_mask": [0, 1]}),
        ({"prompt": "q", "completion": "a"}, {"completion_mask": [0, 1]}),
        ({"instruction": "q", "output": "a"}, {"loss_weights": [0.5, 1.0]}),
    ],
)
def test_lists_that_cannot_be_followed_are_refused_by_name(row, more):
    column = next(iter(more))
    for held in (more, {key: json.dumps(value) for key, value in more.items() if isinstance(value, list)}):
        if held:
            with pytest.raises(Malformed, match=f"row_mask: .*{column}.*"):
                read_shape({**row, **held})
    assert read_shape({**row, column: None}) == read_shape(row) == read_shape({**row, column: []})


def test_columns_that_say_nothing_about_loss_stay():
    for row, more in [
        (CHAT, {"attention_mask": [0, 1, 1, 1, 0, 0], "input_ids": [3, 4]}),
        (CHAT, {"mask": "User", "type": "TEXT_TO_VALUE"}),  # NeMo's: the role without loss
        (CHAT, {"labels": ["maths", "easy"], "label": 1, "train_ids": [1, 2], "weights_file": "x"}),
        ({"text": "t"}, {"labels": [0, 1, 0], "loss_mask": [1, 1], "masked": [0, 0], "attention_mask": [1, 1]}),
        ({"text": "t"}, {"labels": [3, 4], "input_ids": [3, 4], "loss": 2.25}),
        (CHAT, {"weight": 1, "train": True, "masked": False, "loss": 0.7}),
    ]:
        assert read_shape({**row, **more}) == read_shape(row)
    for more in ({"weight": 0.25}, {"train": False}, {"masked": True}, {"loss_weight": 2}):
        assert read_shape({**CHAT, **more}).flags == ("row_weight_ignored",)
    assert read_shape({"said": "t", "loss_mask": [0, 1]}, {"text": "said", "gold": "loss_mask"}).text == "t"


def test_media_beside_a_text_are_counted():
    row = chat(("user", "q"), ("assistant", "a"))
    for held in (["a.png"], "a.png", {"bytes": None, "path": "a.png"}):
        assert read_shape({**row, "images": held}).flags == ("media_dropped",)
    for none in (None, [], "", {}):
        assert read_shape({**chat(("user", "an <image> tag in HTML"), ("assistant", "a")), "images": none}).flags == ()


def test_tools_are_found_where_others_write_them():
    """OpenAI's former column `functions`, and the system turn (as for GLM and DeepSeek)."""
    bare = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    tool = {"type": "function", "function": bare}
    turns = [turn("user", "q"), turn("assistant", "a")]
    for functions in ([bare], [tool]):
        assert read_shape({"messages": turns, "functions": functions}).tools == (tool,)
    for functions in (3, "f", [], ["f"], [{"x": 1}], None):  # a column of the same name with something else
        assert read_shape({"messages": turns, "functions": functions}).tools == ()
    assert read_shape({"messages": turns, "functions": [bare], "tools": [tool, tool]}).tools == (tool, tool)
    for role in ("system", "developer"):
        assert read_shape({"messages": [turn(role, "s", tools=[tool]), *turns]}).tools == (tool,)
    row = {"prompt": [turn("system", "s", tools=json.dumps([tool])), turns[0]], "completion": turns[1:]}
    assert read_shape(row).tools == (tool,)


def test_nulls_that_tables_add_to_calls_and_tools_are_absent():
    """A table gives every object of a column the keys of all; in a JSON text, a null is the row's own."""
    made = {"name": "f", "arguments": {"x": 1, "y": None, "z": [{"a": None, "b": 2}], "e": None}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "z": [{"b": 2}]}}}
    for said in (turn("assistant", None, tool_calls=[{"function": made}]), turn("function_call", made)):
        assert read_shape({"messages": [turn("user", "q"), said]}).messages[1]["tool_calls"] == [call]
    kept = {"x": None, "y": {"a": None}}
    for said in (
        turn("assistant", None, tool_calls=[{"name": "f", "arguments": json.dumps(kept)}]),
        turn("function_call", json.dumps({"name": "f", "arguments": kept})),
    ):
        found = read_shape({"messages": [turn("user", "q"), said]}).messages[1]["tool_calls"]
        assert found[0]["function"]["arguments"] == kept
    tools = [{"name": "f", "parameters": {"properties": {"x": {"type": "int", "enum": [None]}, "y": None}}}]
    turns = [turn("user", "q"), turn("assistant", "a")]
    found = read_shape({"messages": turns, "tools": tools}).tools
    assert found == ({"name": "f", "parameters": {"properties": {"x": {"type": "int", "enum": [None]}}}},)
    assert read_shape({"messages": turns, "tools": json.dumps(tools)}).tools == tuple(tools)


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
