"""Rows at URLs: copied once, found again, copied again when they change, and never half."""

import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from datatools import DataError, EnvironmentProblem, UsageError
from pipelines.rows import remote
from pipelines.rows.input_files import find_sources

pytest.importorskip("aiohttp", reason="pip install datatools-llm[remote]")


class Handler(SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(the folder that is served, its URL, the paths that were read)."""
    monkeypatch.setenv("DATATOOLS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "one"}\n')
    handler = type("Own", (Handler,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


def test_a_file_is_copied_once_and_again_when_it_changes(served):
    folder, url, asked = served
    first, again = (find_sources([f"{url}/rows.jsonl"])[0] for _ in range(2))
    assert first == again and first.path.read_text() == '{"text": "one"}\n'
    assert (first.name, first.kind, first.stem) == (f"{url}/rows.jsonl", ".jsonl", "rows")
    assert asked == ["/rows.jsonl"]
    (folder / "rows.jsonl").write_text('{"text": "two"}\n')  # as many bytes
    os.utime(folder / "rows.jsonl", (0, 0))
    other = find_sources([f"{url}/rows.jsonl"])[0]
    assert other.path != first.path and "two" in other.path.read_text() and "one" in first.path.read_text()


@pytest.mark.parametrize("damage", [b"", b'{"text": "0ne"}\n'])
def test_a_damaged_copy_is_made_again(served, damage):
    _, url, _ = served
    copy = find_sources([f"{url}/rows.jsonl"])[0].path
    copy.write_bytes(damage)
    assert find_sources([f"{url}/rows.jsonl"])[0].path.read_text() == '{"text": "one"}\n'


def test_a_copy_that_was_cut_off_is_no_copy(served, monkeypatch):
    folder, url, _ = served
    monkeypatch.setattr(Handler, "copyfile", lambda self, source, to: to.write(source.read()[:5]))
    with pytest.raises((EnvironmentProblem, DataError), match="copy|arrived"):
        find_sources([f"{url}/rows.jsonl"])
    monkeypatch.undo()
    monkeypatch.setenv("DATATOOLS_CACHE", str(folder.parent / "cache"))
    assert find_sources([f"{url}/rows.jsonl"])[0].path.read_text() == '{"text": "one"}\n'


def test_a_server_that_tells_no_version_is_read_every_time(served, monkeypatch):
    folder, url, _ = served
    monkeypatch.setattr(Handler, "date_time_string", lambda self, timestamp=None: "")
    monkeypatch.setattr(remote, "_MARKS", ("size",))
    assert "one" in find_sources([f"{url}/rows.jsonl"])[0].path.read_text()
    (folder / "rows.jsonl").write_text('{"text": "two"}\n')
    assert "two" in find_sources([f"{url}/rows.jsonl"])[0].path.read_text()


def test_the_kind_is_that_of_the_path(served):
    folder, url, _ = served
    (folder / "rows.csv.gz").write_bytes(b"x")
    assert find_sources([f"{url}/rows.csv.gz?token=1"])[0].kind == ".csv.gz"
    (folder / "rows.zip").write_bytes(b"x")
    with pytest.raises(DataError, match=r"\.zip is not supported"):
        find_sources([f"{url}/rows.zip"])


@pytest.mark.parametrize("name", ["..", "../../evil.jsonl", "x" * 200 + ".jsonl", "a b.jsonl"])
def test_a_name_never_leaves_the_cache(tmp_path, monkeypatch, name):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setenv("DATATOOLS_CACHE", str(tmp_path / "cache"))
    store = MemoryFileSystem()
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    store.pipe("/bucket/rows.jsonl", b"{}\n")
    monkeypatch.setattr(
        store, "open", lambda *_: (store.store["/bucket/rows.jsonl"].seek(0), store.store["/bucket/rows.jsonl"])[1]
    )
    url = f"https://host/{quote(name, safe='')}"
    copy = remote._copy(store, url, {"size": 3, "etag": "1"}, url)
    assert copy.read_bytes() == b"{}\n" and copy.parent.parent == tmp_path / "cache" / "inputs"


def test_what_cannot_be_read_is_said(served):
    _, url, _ = served
    with pytest.raises(DataError, match="no such file"):
        find_sources([f"{url}/other.jsonl"])
    with pytest.raises(UsageError, match="files are not read from foo://; supported are s3"):
        find_sources(["foo://bucket/rows.jsonl"])
    with pytest.raises(UsageError, match="named twice"):
        find_sources([f"{url}/rows.jsonl"] * 2)


def test_a_missing_package_is_named(monkeypatch):
    import fsspec

    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(EnvironmentProblem, match="Install s3fs.*datatools-llm.remote."):
        find_sources(["s3://bucket/rows.jsonl"])


def test_folders_and_patterns(tmp_path: Path, monkeypatch):
    """On a file system of fsspec that can list, as object stores can."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setenv("DATATOOLS_CACHE", str(tmp_path))
    store = MemoryFileSystem()
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    for name in ("a.jsonl", "b/c.jsonl", "b/.hidden.jsonl", "b/notes.txt", ".tmp/d.jsonl"):
        store.pipe(f"/bucket/{name}", b'{"text": "x"}\n')
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (store, url.removeprefix("s3:/")))
    assert [Path(s.name).name for s in find_sources(["s3://bucket"])] == ["a.jsonl", "c.jsonl"]
    assert [Path(s.name).name for s in find_sources(["s3://bucket/b/*.jsonl"])] == ["c.jsonl"]
    with pytest.raises(DataError, match="names no file|no such file"):
        find_sources(["s3://bucket/*.csv"])
