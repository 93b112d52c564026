"""Columns that only the names of folders hold (`lang=en/part-0.parquet`), against pyarrow; for every kind of file."""

import gzip
import json

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from datatools import DataError
from pipelines.rows.input_files import SUFFIXES, find_sources
from pipelines.rows.jsonl import Limits
from pipelines.rows.peek import look
from pipelines.rows.read import read_pool


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    frame, kind = pd.DataFrame(rows), path.suffix
    if kind == ".parquet":
        frame.to_parquet(path)
    elif kind in (".arrow", ".feather"):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, (table := pa.table(frame)).schema) as out:
            out.write_table(table)
    elif kind in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="\t" if kind == ".tsv" else ",")
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    else:
        text = "\n".join(json.dumps(row) for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if kind == ".gz" else text.encode())


def read(path, cache):
    return [json.loads(row.raw) for row in read_pool([path], cache=cache)[0]]


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".jsonl.gz"])
def test_rows_of_every_kind_of_file_have_the_columns_of_their_folders(tmp_path, suffix):
    for lang, level in (("en", 1), ("de", 2)):
        write(tmp_path / f"pool/source={lang}/level={level}/part-0{suffix}", [{"text": f"{lang} 1"}, {"text": "x"}])
    expected = [{"text": f"{x} 1", "source": x, "level": n} for x, n in (("de", 2), ("en", 1))]
    for named in ("pool", "pool/**/*part-0*"):
        found = read(tmp_path / named, tmp_path / "cache")
        assert found[::2] == expected and [row["source"] for row in found[1::2]] == ["de", "en"]
    one = tmp_path / "pool/source=en/level=1"
    for named in (one, one / f"part-0{suffix}", tmp_path / "pool/source=en"):
        assert read(named, tmp_path / "cache")[0] == expected[1]
    pool, _ = read_pool([tmp_path / "pool"], cache=tmp_path / "cache")
    assert [row.source for row in pool] == ["de", "de", "en", "en"]  # for --source-key, mixtures and reports
    for source in find_sources([tmp_path / "pool"]):
        if not source.packing:
            assert {"source", "level"} <= set(look(source).rows[0])


VALUES = {
    "integers": ["1", "-2", "007", "2147483647"],
    "too large": ["1", "2147483648"],
    "text": ["a", "1"],
    "fractions": ["1.5", "2"],
    "signs": ["+1", "2"],
    "escapes": ["a%20b", "c%2Fd", "e%3Df"],
    "nulls": ["__HIVE_DEFAULT_PARTITION__", "3"],
    "booleans": ["true", "false"],
    "equals": ["a=b", "c"],
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_types_are_those_of_pyarrow(tmp_path, values):
    for k, value in enumerate(values):
        write(tmp_path / f"pool/key={value}/part.parquet", [{"text": f"t{k}"}])
    table = ds.dataset(tmp_path / "pool", format="parquet", partitioning="hive").to_table()
    by_text = {row["text"]: row for row in table.to_pylist()}
    assert {row["text"]: row for row in read(tmp_path / "pool", tmp_path / "c")} == by_text


def test_a_column_of_the_rows_with_another_value_is_refused(tmp_path):
    for kind in ("parquet", "jsonl", "csv"):
        own = tmp_path / kind / f"lang=en/part.{kind}"
        write(own, [{"text": "a", "lang": "en"}, {"text": "b", "lang": "de"}])
        with pytest.raises(
            DataError, match=r"part.*:2: partition \(the column 'lang' is \W*de\W*, but .* lang=en; rename"
        ):
            read_pool([tmp_path / kind], cache=tmp_path / "c")
        write(own, [{"text": "a", "lang": "en"}, {"text": "b", "lang": None}])
        assert [row["lang"] for row in read(tmp_path / kind, tmp_path / "c")] == ["en", "en"]
    write(tmp_path / "n/k=1/part.csv", [{"text": "a", "k": "1"}])  # a CSV file holds numbers as text
    assert read(tmp_path / "n", tmp_path / "c") == [{"text": "a", "k": "1"}]


def test_lines_keep_their_numbers_and_their_bytes(tmp_path):
    path = tmp_path / "k=v/part.jsonl"
    path.parent.mkdir()
    path.write_bytes(
        b'\xef\xbb\xbf{"text":  "a"}\n\n{broken\n  { "text": "\\u00e9", "k": "v" }\r\n' + b'{"text":"long long"}'
    )
    pool, bad = read_pool([tmp_path], cache=tmp_path / "c", on_bad_row="skip", limits=Limits(line_bytes=35))
    assert [(row.line, row.raw) for row in pool] == [
        (1, b'{"k": "v", "text":  "a"}'),
        (4, b'  { "text": "\\u00e9", "k": "v" }\r'),
        (5, b'{"k": "v", "text":"long long"}'),
    ]
    assert [row.line for row in bad] == [3]


def test_folders_without_a_value_and_far_above_name_nothing(tmp_path):
    write(tmp_path / "run=3/data/=x/y=/part.jsonl", [{"text": "a"}])
    assert read(tmp_path / "run=3/data", tmp_path / "c") == [{"text": "a", "y": ""}]
    write(tmp_path / "run=3/data/pool.jsonl", [{"text": "a"}])
    assert read(tmp_path / "run=3/data/pool.jsonl", tmp_path / "c") == [{"text": "a"}]
