"""Lines of JSON: every broken one has a number and a reason, and no bytes are too odd."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datatools import DataError
from pipelines.rows.formats.shape import Shape
from pipelines.rows.formats.table import read_shape
from pipelines.rows.jsonl import Limits, Malformed, parse_object
from tests.pipelines.rows.pools import line, lines, read


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
