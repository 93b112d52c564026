"""Tables: every type that Arrow has, in every format that carries it; and files that unpack to more than they are."""

import datetime
import decimal
import json
import subprocess
import sys
import tracemalloc
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datatools import DataError
from pipelines.rows.jsonl import Limits, Malformed
from pipelines.rows.read import read_pool
from pipelines.rows.tables import checks, csv
from pipelines.rows.tables.arrow import rows_of_arrow, rows_of_parquet
from pipelines.rows.tables.sizes import sizes
from pipelines.rows.tables.values import as_json
from tests.conftest import REPOSITORY

D = decimal.Decimal
TEXT = "héllo"


def stored(kind, values, storage):
    return pa.ExtensionArray.from_storage(kind, pa.array(values, storage))


def invalid_text(values, kind, text):
    """An array of type `text` with the bytes of `values`, valid or not."""
    return pa.array(values, kind).view(text)


ROW = pa.struct([("a", pa.string())])
BYTES = pa.struct([("a", pa.binary())])

# name -> (three values as Arrow, what each is as JSON; a text in capitals is the reason of a bad row)
TYPES = {
    **{str(kind): (pa.array([1, None, 0], kind), [1, None, 0]) for kind in (
        pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.float16(), pa.float32(),
        pa.float64())},
    "uint64": (pa.array([2**64 - 1, None, 0], pa.uint64()), [2**64 - 1, None, 0]),
    "bool": (pa.array([True, None, False]), [True, None, False]),
    "null": (pa.nulls(3), [None] * 3),
    "not finite": (pa.array([float("nan"), float("inf"), 1.5]), [None, None, 1.5]),
    **{str(kind): (pa.array([TEXT, None, ""], kind), [TEXT, None, ""]) for kind in (
        pa.string(), pa.large_string(), pa.string_view())},
    **{str(kind): (pa.array([b"ab", None, b"\xff\xfe"], kind), ["ab", None, None]) for kind in (
        pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(2))},
    **{str(kind): (pa.array([D("1.50"), None, D(-2)], kind), ["1.50", None, "-2.00"]) for kind in (
        pa.decimal32(5, 2), pa.decimal64(10, 2), pa.decimal128(20, 2), pa.decimal256(50, 2))},
    **{str(kind): (pa.array([datetime.date(2024, 2, 29), None, datetime.date(1, 1, 1)], kind),
                   ["2024-02-29", None, "0001-01-01"]) for kind in (pa.date32(), pa.date64())},
    **{str(kind): (pa.array([datetime.time(1, 2, 3), None, datetime.time(0)], kind), ["01:02:03", None, "00:00:00"])
       for kind in (pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"))},
    **{f"timestamp {unit}": (pa.array([0, None, 10**9], pa.timestamp(unit)), ["1970-01-01T00:00:00", None, later])
       for unit, later in (("s", "2001-09-09T01:46:40"), ("ms", "1970-01-12T13:46:40"), ("us", "1970-01-01T00:16:40"),
                           ("ns", "1970-01-01T00:00:01"))},
    "nanosecond": (pa.array([1, None, 0], pa.timestamp("ns")),
                   ["1970-01-01T00:00:00.000000001", None, "1970-01-01T00:00:00"]),
    "zone": (pa.array([0, None, 0], pa.timestamp("us", "Europe/Berlin")),
             ["1970-01-01T01:00:00+01:00", None, "1970-01-01T01:00:00+01:00"]),
    "offset": (pa.array([0, None, 0], pa.timestamp("ms", "+05:30")),
               ["1970-01-01T05:30:00+05:30", None, "1970-01-01T05:30:00+05:30"]),
    "no such zone": (pa.array([0, None, 0], pa.timestamp("ms", "No/Where")),
                     ["UNKNOWN_TIME_ZONE", None, "UNKNOWN_TIME_ZONE"]),
    "year 10000": (pa.array([2**40, None, 0], pa.timestamp("s")), ["VALUE_OUT_OF_RANGE", None, "1970-01-01T00:00:00"]),
    "late date": (pa.array([2**31 - 1, None, 0], pa.date32()), ["VALUE_OUT_OF_RANGE", None, "1970-01-01"]),
    "late in a list": (pa.array([[2**50], None, [0]], pa.list_(pa.timestamp("ms"))),
                       ["VALUE_OUT_OF_RANGE", None, ["1970-01-01T00:00:00"]]),
    "hour 25": (pa.array([90000, None, 0], pa.time32("s")), ["VALUE_OUT_OF_RANGE", None, "00:00:00"]),
    **{f"duration {unit}": (pa.array([90_000 * n, None, -n // 2], pa.duration(unit)), ["P1DT3600S", None, half])
       for unit, n, half in (("s", 1, "-P0DT1S"), ("ms", 1000, "-P0DT0.5S"), ("us", 10**6, "-P0DT0.5S"),
                             ("ns", 10**9, "-P0DT0.5S"))},
    "long duration": (pa.array([2**60, None, 0], pa.duration("s")), ["VALUE_OUT_OF_RANGE", None, "P0DT0S"]),
    "interval": (pa.array([(1, 2, 3), None, (0, 0, 0)], pa.month_day_nano_interval()), [[1, 2, 3], None, [0, 0, 0]]),
    "dictionary": (pa.array([TEXT, None, "y"]).dictionary_encode(), [TEXT, None, "y"]),
    "run ends": (pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["x", "y"])),
                 ["x", "x", "y"]),
    **{str(kind): (pa.array([["a", "b"], None, ["c", None]], kind), [["a", "b"], None, ["c", None]]) for kind in (
        pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_view(pa.string()), pa.large_list_view(pa.string()),
        pa.list_(pa.string(), 2))},
    "struct": (pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": []}]),
               [{"a": 1, "b": ["x"]}, None, {"a": None, "b": []}]),
    "empty struct": (pa.array([{}, None, {}], pa.struct([])), [{}, None, {}]),
    "map": (pa.array([[("k", "v")], None, []], pa.map_(pa.string(), pa.string())), [{"k": "v"}, None, {}]),
    "map of numbers": (pa.array([[(1, "v")], None, []], pa.map_(pa.int32(), pa.string())), [{"1": "v"}, None, {}]),
    "key twice": (pa.array([[("k", "v"), ("k", "w")], None, []], pa.map_(pa.string(), pa.string())),
                  ["DUPLICATE_KEY", None, {}]),
    "keys of structs": (pa.array([[({"a": "x"}, "v")], None, []], pa.map_(ROW, pa.string())),
                        ["VALUE_OUT_OF_RANGE", None, {}]),
    "sparse union": (pa.UnionArray.from_sparse(
        pa.array([0, 1, 0], pa.int8()), [pa.array([1, 2, 3]), pa.array(list("abc"))]), [1, "b", 3]),
    "dense union": (pa.UnionArray.from_dense(pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()),
                                             [pa.array([1, 2]), pa.array(["b"])]), [1, "b", 2]),
    "uuid": (stored(pa.uuid(), [uuid.UUID(int=1).bytes, None, bytes(16)], pa.binary(16)),
             [str(uuid.UUID(int=1)), None, str(uuid.UUID(int=0))]),
    "bool8": (stored(pa.bool8(), [1, None, 0], pa.int8()), [True, None, False]),
    "json": (stored(pa.json_(pa.string()), ['{"a": 1}', None, "2"], pa.string()), ['{"a": 1}', None, "2"]),
    "tensor": (stored(pa.fixed_shape_tensor(pa.int32(), (2,)), [[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)),
               [[1, 2], None, [3, 4]]),
    "opaque": (stored(pa.opaque(pa.string(), "t", "v"), ["a", None, "b"], pa.string()), ["a", None, "b"]),
    **{f"no {text}": (invalid_text([b"ok", None, b"\xff"], kind, text), ["ok", None, "INVALID_UTF8"])
       for kind, text in ((pa.binary(), pa.string()),
                          (pa.large_binary(), pa.large_string()), (pa.binary_view(), pa.string_view()))},
    "no text in a list": (invalid_text([[{"a": b"ok"}], None, [{"a": b"\xff"}]], pa.list_(BYTES), pa.list_(ROW)),
                          [[{"a": "ok"}], None, "INVALID_UTF8"]),
    "no text in a map": (invalid_text([[(b"k", b"v")], None, [(b"\xff", b"x")]], pa.map_(pa.binary(), pa.binary()),
                                      pa.map_(pa.string(), pa.string())), [{"k": "v"}, None, "INVALID_UTF8"]),
}  # fmt: skip
NOT_IN_PARQUET = {"interval", "run ends", "empty struct", "sparse union", "dense union"}


def write(form, path, batch):
    if form == "parquet":
        pq.write_table(pa.Table.from_batches([batch]), path, compression="zstd")
    else:
        compression = "zstd" if form == "packed" else None
        new = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with new(str(path), batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_batch(batch)


def rows(form, path, limits=Limits()):  # noqa: B008 (frozen)
    return list((rows_of_parquet if form == "parquet" else rows_of_arrow)(path, path.name, limits))


@pytest.mark.parametrize(("kind", "form"), [
    (kind, form) for kind in TYPES for form in ("parquet", "file", "stream", "packed")
    if form != "parquet" or kind not in NOT_IN_PARQUET])  # fmt: skip
def test_every_type_is_a_json_value_or_a_bad_row_by_name(kind, form, tmp_path):
    values, want = TYPES[kind]
    write(form, tmp_path / "t", pa.record_batch([pa.array(["a", "b", "c"]), values], ["text", "x"]))
    found = rows(form, tmp_path / "t")
    assert [row.reason.upper() if isinstance(row, Malformed) else json.loads(row)["x"] for row in found] == want
    assert all("'x'" in row.detail for row in found if isinstance(row, Malformed))


def test_bad_values_of_a_table_are_bad_rows_of_the_pool(tmp_path):
    table = pa.table({"text": invalid_text([b"one", b"\xff", b"three"], pa.binary(), pa.string())})
    pq.write_table(table, tmp_path / "t.parquet")
    pool, bad = read_pool([tmp_path / "t.parquet"], cache=tmp_path, on_bad_row="skip")
    assert [row.text for row in pool] == ["one", "three"]
    assert [(row.line, row.reason) for row in bad] == [(2, "invalid_utf8")]


@pytest.mark.parametrize("form", ["parquet", "file", "stream"])
@pytest.mark.parametrize(
    "kind", [None, pa.struct, lambda f: pa.list_(pa.struct(f)), lambda f: pa.map_(pa.string(), pa.list_(pa.struct(f)))]
)
def test_a_column_that_is_there_twice_is_refused(kind, form, tmp_path):
    fields = [pa.field("text", pa.string()), pa.field("text", pa.string())]
    schema = pa.schema(fields if kind is None else [pa.field("turns", kind(fields))])
    write(form, tmp_path / "t", pa.record_batch([pa.nulls(1, field.type) for field in schema], schema))
    with pytest.raises(DataError, match="has the column 'text' twice"):
        rows(form, tmp_path / "t")


def shared(n, size):
    """`n` rows that are one text of `size` characters."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array(["a" * size]))


BOMBS = {
    "dictionary": lambda: shared(50_000, 100_000),
    "run ends": lambda: pa.RunEndEncodedArray.from_arrays(pa.array([50_000], pa.int32()), pa.array(["a" * 100_000])),
    "views": lambda: pa.ListViewArray.from_arrays(pa.array(np.zeros(50_000, np.int32)),
                                                  pa.array(np.full(50_000, 10, np.int32)),
                                                  pa.array(["a" * 10_000] * 10)),
    "one text": lambda: pa.array(["a" * (20 << 20)]),
    "one list": lambda: pa.array([np.zeros(2 << 20, np.int8)]),
    "nulls in a list": lambda: pa.ListArray.from_arrays(pa.array([0, 1 << 30], pa.int32()), pa.nulls(1 << 30)),
    "a list of shared texts": lambda: pa.ListArray.from_arrays(pa.array([0, 50_000], pa.int32()),
                                                               shared(50_000, 100_000)),
}  # fmt: skip


@pytest.mark.parametrize(("bomb", "form"), [
    (bomb, form) for bomb in BOMBS for form in ("parquet", "packed")
    if form != "parquet" or bomb not in ("run ends", "views", "nulls in a list")])  # fmt: skip
def test_what_a_table_unpacks_to_is_bounded(bomb, form, tmp_path):
    """Python never holds more than one group of rows, and no more is written than the ratio allows."""
    values = BOMBS[bomb]()
    write(form, tmp_path / "t", pa.record_batch([values], ["text"]))
    size = (tmp_path / "t").stat().st_size
    assert size < 200_000
    path = (tmp_path / "t").rename(tmp_path / ("t.parquet" if form == "parquet" else "t.arrow"))
    del values
    tracemalloc.start()
    with pytest.raises(DataError, match=r"unpacked_ratio|1 of 1 rows cannot be used \(1 line_too_long"):
        read_pool([path], cache=tmp_path / "cache", on_bad_row="skip", limits=Limits(ratio_from=8 << 20))
    assert tracemalloc.get_traced_memory()[1] < 150 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", TYPES)
def test_sizes_are_no_less_than_the_text_and_follow_slices(kind):
    values, want = TYPES[kind]
    found = np.broadcast_to(sizes(values), 3)
    for value, size in zip(want, found.tolist(), strict=True):
        text = json.dumps(value, ensure_ascii=False).encode()
        assert (isinstance(value, str) and value.isupper()) or size >= len(text) / 2
    assert np.broadcast_to(sizes(values.slice(1)), 2).tolist() == found[1:].tolist()


def test_a_batch_may_take_so_much_memory(tmp_path):
    """The operating system stops what Arrow's headers do not tell: here a text of 100 MB in a file of a few kB."""
    write("packed", tmp_path / "t", pa.record_batch([pa.array(["a" * (100 << 20)])], ["text"]))
    script = (  # in a process of its own: this one may have so much address space to spare
        "import sys; from pathlib import Path; from pipelines.rows.tables import arrow; "
        "from tests.pipelines.rows.test_tables import rows; "
        "arrow._FREE = 50 << 20; rows('packed', Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "t")], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert "one batch of its rows takes more than 52428800 bytes of memory" in done.stderr


def test_a_parquet_file_that_describes_itself_at_length_is_refused(tmp_path, monkeypatch):
    write("parquet", tmp_path / "t", pa.record_batch([pa.array([1])], ["text"]))
    monkeypatch.setattr(checks, "_FOOTER_BYTES", 10)
    with pytest.raises(DataError, match="write it in fewer, larger row groups"):
        rows("parquet", tmp_path / "t")


def test_nesting_and_columns_are_bounded(tmp_path):
    kind = pa.string()
    for _ in range(40):
        kind = pa.list_(kind)
    write("file", tmp_path / "t", pa.record_batch([pa.nulls(1, kind)], ["text"]))
    with pytest.raises(DataError, match="deeper than 20 levels"):
        rows("file", tmp_path / "t", Limits(depth=20))
    write("file", tmp_path / "t", pa.record_batch([pa.nulls(1)] * 20, list(map(str, range(20)))))
    with pytest.raises(DataError, match="20 columns; the limit is 10"):
        rows("file", tmp_path / "t", Limits(values=10))


# ---------------------------------------------------------------------------------------------------------------- CSV


class Counting:
    """A binary file that counts what is read from it."""

    def __init__(self, path):
        self._file = open(path, "rb")  # noqa: SIM115
        self.bytes = self.largest = 0

    def readline(self, limit):
        line = self._file.readline(limit)
        self.bytes += len(line)
        self.largest = max(self.largest, len(line))
        return line

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


LONG = Limits(line_bytes=10_000)


def csv_rows(tmp_path, data, limits=LONG):
    (tmp_path / "t.csv").write_bytes(data)
    with Counting(tmp_path / "t.csv") as file:
        found = [
            row.reason if isinstance(row, Malformed) else json.loads(row) for row in csv.rows_of_csv(file, ",", limits)
        ]
    return found, file


def test_a_missing_quotation_mark_costs_its_own_row(tmp_path):
    lines = [f"question {k},it is {k}\n" for k in range(3000)]
    lines[3] = 'question 3,"it is 3\n'
    found, _ = csv_rows(tmp_path, ("prompt,completion\n" + "".join(lines)).encode())
    assert found[3] == "line_too_long"
    good = [row["completion"] for row in found if row != "line_too_long"]
    assert good == [f"it is {k}" for k in range(3000) if k != 3]
    assert found.count("line_too_long") == 1


def test_many_missing_quotation_marks_are_read_in_linear_time(tmp_path):
    data = b"prompt,completion\n" + b'q,"a\n"b\n' * 5000 + b'q,"' + b"x,\n" * 20000
    _, file = csv_rows(tmp_path, data)
    assert file.bytes < len(data) + (csv._REWINDS + 2) * 2 * LONG.line_bytes


@pytest.mark.parametrize(
    "data",
    [
        b"word " * 100_000,
        b"w," * 100_000,
        b'"' + b"w\n" * 100_000,
        b"\r" * 9_999 + b"x" * 100_000,
        b'"a\nb",' * 20_000,
        b'"a\r' * 20_000,
    ],
)
def test_a_record_without_an_end_is_a_bad_row(tmp_path, data):
    found, file = csv_rows(tmp_path, b"prompt,completion\n" + data + b"\nq,last\n")
    assert {"line_too_long", "invalid_csv"} & {row for row in found if isinstance(row, str)}
    assert file.largest <= max(LONG.line_bytes + 2, 1 << 20)
    assert found[-1] == {"prompt": "q", "completion": "last"}


def test_names_of_columns_do_not_multiply(tmp_path):
    """A header is written again for every row: 100 kB of names times 1000 rows are 100 MB of JSON."""
    (tmp_path / "t.csv").write_bytes(b"prompt,completion," + b"n" * 100_000 + b"\n" + b"q,a,\n" * 1000)
    with pytest.raises(DataError, match="times its size as JSONL"):
        read_pool([tmp_path / "t.csv"], cache=tmp_path / "cache", limits=Limits(ratio_from=1 << 20))


def test_line_ends_of_every_kind(tmp_path):
    found, _ = csv_rows(tmp_path, b'\xef\xbb\xbfa,b\r\n1,"x\r\ny"\r2,z\n\r\n3,"\r"')
    assert found == [{"a": "1", "b": "x\r\ny"}, {"a": "2", "b": "z"}, {"a": "3", "b": "\r"}]


def test_values_of_numpy_and_pandas_keep_their_digits():
    """An integer of numpy is no float: 2**60 + 1 would become another id."""
    row = {"i": np.int64(2**60 + 1), "u": np.uint64(2**64 - 1), "b": np.bool_(True), "f": np.float32(0.5),
           "s": np.str_("a"), "n": np.float64("nan"), "na": pd.NA, "nat": pd.NaT, "when": pd.Timestamp("2020-01-02"),
           "list": [np.int8(3), np.array([2**60 + 1])]}  # fmt: skip
    assert json.loads(as_json(row)) == {
        "i": 2**60 + 1, "u": 2**64 - 1, "b": True, "f": 0.5, "s": "a", "n": None, "na": None, "nat": None,
        "when": "2020-01-02T00:00:00", "list": [3, [2**60 + 1]],
    }  # fmt: skip


def test_calls_of_different_functions_in_one_table(tmp_path):
    """A struct has the keys of all rows; the arguments of one function must not appear in the calls of another."""
    rows = []
    for name, arguments in (("f", {"x": 1}), ("g", {"y": "b"})):
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": dict.fromkeys(arguments)}}}
        tool["function"]["parameters"]["properties"] = {key: {"type": f"t{name}"} for key in arguments}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        rows.append({"messages": said, "tools": [tool]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pool, _ = read_pool([tmp_path / "a.parquet"], cache=tmp_path)
    for row, wanted in zip(pool, rows, strict=True):
        assert row.messages[1]["tool_calls"] == wanted["messages"][1]["tool_calls"]
        assert list(row.tools) == wanted["tools"]
