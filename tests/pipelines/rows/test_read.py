"""Pools: rows are the input lines byte for byte, and every bad row has a number and a reason."""

import json
import time
import tracemalloc

import pytest

from datatools import DataError, UsageError
from pipelines.rows.jsonl import Limits
from pipelines.rows.read import read_pool
from pipelines.rows.row import Row
from tests.pipelines.rows.pools import chat, line, read

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
    pool, _ = read(
        tmp_path, b"\n".join(map(line, ["x", "x", "x#2", "x#2"]))
    )  # these share an id, and give way to row 1
    assert pool.ids == ["x", "x#2", "x#2#2", "x#2#3"] and pool.flags["repeated_id"] == 3
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
