"""Files of every type, compressed or not, folders, patterns, and data sets of the Hub."""

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
from hypothesis import given
from hypothesis import strategies as st

from datatools import DataError, EnvironmentProblem, UsageError
from pipelines.rows.input_files import find_sources
from pipelines.rows.jsonl import Limits
from pipelines.rows.read import read_pool
from tests.pipelines.rows.pools import line, lines, read

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


def test_links_in_a_folder_are_followed_once(tmp_path):
    """os.walk leaves out links to folders, and a link that leads nowhere is no file: rows would be missing silently."""
    for name in ("pool/a.jsonl", "pool/2025/b.jsonl", "elsewhere/inner/c.jsonl", "elsewhere/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(line(name))
    pool = tmp_path / "pool"
    (pool / "more").symlink_to(tmp_path / "elsewhere")
    (pool / "latest").symlink_to("2025")  # visited anyway
    (pool / "again").symlink_to(tmp_path / "elsewhere" / "inner")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)  # a circle

    def names():
        return sorted(os.path.basename(source.name) for source in find_sources([pool]))

    assert names() == ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]
    (pool / "e.txt").symlink_to("nowhere.txt")  # no data file
    assert len(names()) == 4
    (pool / "e.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(DataError, match=r"e.jsonl is a link to nowhere.jsonl, which is missing; restore"):
        names()


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
    for name in ("data.csv", "data.tsv"):
        with pytest.raises(DataError, match=f"{name} is UTF-16"):
            read(tmp_path, "prompt,completion\na,b\n".encode("utf-16"), name=name)
        with pytest.raises(DataError, match="let its name end in .gz"):
            read(tmp_path, gzip.compress(b"prompt,completion"), name=name)
    for name in ("data.jsonl", "data.json"):
        with pytest.raises(DataError, match="JSON object over several lines, .* jq -c"):
            read(tmp_path, json.dumps({"data": [json.loads(JSONL.splitlines()[0])]}, indent=1).encode(), name=name)
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
