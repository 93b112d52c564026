"""datatools.files: whole files or none, locks with one holder, errors that say what to do."""

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datatools import DataError, EnvironmentProblem, files
from datatools.files import atomic, disk, reading

REPOSITORY = Path(__file__).resolve().parents[3]


def names(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 100_000])
def test_write_replaces_and_leaves_nothing_else(tmp_path, data):
    path = tmp_path / "a file ü \U0001f600"
    files.write_bytes(path, b"old")
    files.write_bytes(path, data)
    assert path.read_bytes() == data and names(tmp_path) == [path.name]
    assert files.digest_file(path) == files.digest(data)


def test_a_file_that_stands_as_it_did_is_digested_once(tmp_path, monkeypatch):
    """Another content, size, inode or time is read again, and so is a file whose last change is too recent to tell."""
    path, read = tmp_path / "x", []
    real = reading.seal_of_open
    monkeypatch.setattr(reading, "seal_of_open", lambda descriptor: read.append(1) or real(descriptor))
    path.write_bytes(b"one")
    assert files.seal_once(path) == files.seal_once(path) == files.seal_of(path) and len(read) == 3
    monkeypatch.setattr(reading, "_SETTLED_NS", -1)
    assert files.seal_once(path) == files.seal_once(os.path.relpath(path)) and len(read) == 4
    facts = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # only the time of the change of the inode tells
    assert files.seal_once(path).digest == files.digest(b"two")
    files.write_bytes(path, b"six")
    assert files.seal_once(path).digest == files.digest(b"six")
    path.unlink()
    with pytest.raises(DataError, match="cannot read"):
        files.seal_once(path)


def test_pieces_are_one_file_with_one_digest(tmp_path):
    digest = files.write_pieces(tmp_path / "x", (bytes([i]) * i for i in range(50)))
    whole = b"".join(bytes([i]) * i for i in range(50))
    assert (tmp_path / "x").read_bytes() == whole and digest == files.digest(whole)


def test_pieces_that_fail_leave_the_old_file(tmp_path):
    files.write_bytes(tmp_path / "x", b"old")

    def pieces():
        yield b"new"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.write_pieces(tmp_path / "x", pieces())
    assert (tmp_path / "x").read_bytes() == b"old" and names(tmp_path) == ["x"]


def test_a_name_may_have_255_bytes(tmp_path):
    path = tmp_path / ("n" * 255)
    files.write_text(path, "x")
    assert names(tmp_path) == [path.name]
    with pytest.raises(DataError, match="File name too long.*choose another path"):
        files.write_text(tmp_path / ("n" * 256), "x")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_permissions_follow_the_umask_and_stay_within_0644(tmp_path, umask):
    script = f"""
import os; os.umask({umask})
from datatools import files
folder = files.make_folder({str(tmp_path / "run")!r})
files.write_text(folder / "a", "x"); files.write_new(folder / "b", b"x"); files.append_line(folder / "c", "x")
with files.atomic_path(folder / "d") as temporary:
    assert os.stat(temporary).st_mode & 0o777 == 0o600
    temporary.write_text("x")
with files.lock_folder(folder): assert os.stat(folder / ".lock").st_mode & 0o777 == 0o600
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o755 & ~umask
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").iterdir()}
    assert modes == dict.fromkeys("abcd", 0o644 & ~umask)


def test_a_symlink_is_replaced_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to("victim")
    files.write_text(tmp_path / "link", "x")
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "link").is_symlink()
    (tmp_path / "log").symlink_to("victim")
    with pytest.raises(DataError, match="log"):
        files.append_line(tmp_path / "log", "x")
    assert (tmp_path / "victim").read_text() == "mine"


def test_write_new_lets_one_win(tmp_path):
    assert files.write_new(tmp_path / "x", b"first")
    assert not files.write_new(tmp_path / "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first" and names(tmp_path) == ["x"]


def test_atomic_path_commits_or_cleans_up(tmp_path):
    with files.atomic_path(tmp_path / "x") as temporary:
        temporary.write_bytes(b"new")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"new"
    with pytest.raises(RuntimeError, match="mine"), files.atomic_path(tmp_path / "x") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("mine")
    with files.atomic_path(tmp_path / "y") as temporary:  # some libraries write beside it and rename
        (tmp_path / "other").write_bytes(b"renamed")
        os.replace(tmp_path / "other", temporary)
    assert (tmp_path / "x").read_bytes() == b"new" and (tmp_path / "y").read_bytes() == b"renamed"
    assert names(tmp_path) == ["x", "y"]


def test_atomic_path_keeps_the_blocks_own_errors(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_path(tmp_path / "x"):
        (tmp_path / "input that is not there").read_bytes()
    with pytest.raises(ValueError, match="mine"), files.atomic_path(tmp_path / "x"):
        raise ValueError("mine")
    with pytest.raises(EnvironmentProblem, match="x: No space left"), files.atomic_path(tmp_path / "x"):
        raise OSError(28, "No space left on device")


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters()),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=10,
    )
)
def test_json_round_trip(value):
    data = files.json_bytes(value)
    assert json.loads(data) == value and data.endswith(b"\n")


def test_json_with_lone_surrogates_and_without_nan(tmp_path):
    files.write_json(tmp_path / "x", {"ü": "\ud800"})
    assert files.read_json(tmp_path / "x") == {"ü": "\ud800"}
    for value in (float("nan"), float("inf"), {1, 2}):
        with pytest.raises(DataError, match="as JSON"):
            files.write_json(tmp_path / "y", [value])
    with pytest.raises(DataError, match="as UTF-8"):
        files.write_text(tmp_path / "y", "\ud800")
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 100_000, b""])
def test_broken_json_names_the_file(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(DataError, match="x.json is not valid JSON"):
        files.read_json(tmp_path / "x.json")


def test_log_lines_are_appended(tmp_path):
    for line in ("a", "b\ud800"):
        files.append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_bytes() == b"a\nb\\ud800\n"


def test_reading_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "big").write_bytes(b"12345")
    for name, text in (("none", "check the path"), ("pipe", "not a file"), (".", "not a file"), ("loop", "symbolic")):
        with pytest.raises(DataError, match=text):
            files.read_bytes(tmp_path / name)
    with pytest.raises(DataError, match="5 bytes, at most 4"):
        files.read_bytes(tmp_path / "big", limit=4)
    with pytest.raises(DataError, match="null byte"):
        files.write_bytes(f"{tmp_path}/a\0b", b"")


def test_error_text_does_not_write_to_the_terminal(tmp_path):
    with pytest.raises(DataError) as error:
        files.read_bytes(tmp_path / "\x1b[31mred\u202e")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        (errno.EACCES, EnvironmentProblem, "check the permissions"),
        (errno.EROFS, EnvironmentProblem, "choose another"),
        (errno.EDQUOT, EnvironmentProblem, "free some space"),
        (errno.EMFILE, EnvironmentProblem, "ulimit -n"),
        (errno.EIO, EnvironmentProblem, "check the disk"),
        (errno.EINTR, EnvironmentProblem, "run the same command again"),
        (errno.ENOENT, DataError, "check the path"),
    ],
)
def test_each_error_names_path_and_remedy(tmp_path, monkeypatch, code, kind, advice):
    class Failing:
        def __getattr__(self, name):
            return getattr(os, name)

        def open(self, *args):
            raise OSError(code, os.strerror(code))

    for module in (atomic, disk):
        monkeypatch.setattr(module, "os", Failing())
    for call in (files.write_bytes, files.append_line):
        with pytest.raises(kind, match=f"cannot (write|append to) {tmp_path}/x: {os.strerror(code)}.*{advice}"):
            call(tmp_path / "x", "" if call is files.append_line else b"")


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "x").write_text("")
    for call in (files.make_folder, lambda path: files.write_bytes(path / "y", b"")):
        with pytest.raises(DataError, match="choose another path"):
            call(tmp_path / "x")


def test_move_refuses_to_overwrite(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(DataError, match="File exists"):
        files.move(tmp_path / "a", tmp_path / "b")
    files.move(tmp_path / "a", tmp_path / "c")
    files.remove(tmp_path / "b")
    files.remove(tmp_path / "b")
    assert names(tmp_path) == ["c"]


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path):
    (tmp_path / ".tmp-dead").write_text("half")
    (tmp_path / ".tmp-link").symlink_to("/etc/hostname")
    with files.atomic_path(tmp_path / "x") as temporary:
        assert files.remove_leftovers(tmp_path) == 1
        assert temporary.exists()
        temporary.write_text("whole")
    assert (tmp_path / "x").read_text() == "whole" and names(tmp_path) == [".tmp-link", "x"]


@pytest.mark.parametrize(
    "planted", ["nothing", "a link to a folder", "a dangling link", "a file", "a folder with a link"]
)
def test_a_fresh_folder_replaces_what_stood_there_and_follows_no_link(tmp_path, planted):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "weights").write_text("precious")
    home = tmp_path / "home"
    home.mkdir()
    path = home / "adapter"
    if planted == "a link to a folder":
        path.symlink_to(outside)
    elif planted == "a dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif planted == "a file":
        path.write_text("old")
    elif planted == "a folder with a link":
        path.mkdir()
        (path / "weights").symlink_to(outside / "weights")
    with files.atomic_folder(path) as fresh:
        (fresh / "weights").write_text("new")
        assert fresh.parent == home and not (path / "more").exists()
        (fresh / "more").mkdir()
    assert names(home) == ["adapter"] and names(path) == ["more", "weights"] and not path.is_symlink()
    assert (path / "weights").read_text() == "new"
    assert names(outside) == ["weights"] and (outside / "weights").read_text() == "precious"


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    with files.atomic_folder(tmp_path / "a") as fresh:
        (fresh / "x").write_text("old")
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "a") as fresh:
        (fresh / "x").write_text("new")
        raise ZeroDivisionError
    with pytest.raises(DataError, match="neither a file nor a folder"), files.atomic_folder(tmp_path / "a") as fresh:
        (fresh / "x").symlink_to("/etc/hostname")
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "x").read_text() == "old"


def test_permissions_of_a_folder_and_its_files_whatever_the_umask(tmp_path):
    script = """
import os; os.umask(0)
from datatools import files
with files.atomic_folder("a") as fresh:
    os.mkdir(fresh / "sub")
    (fresh / "sub" / "x").write_text("")
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/sub", "a/sub/x")]
    assert modes == [0o755, 0o755, 0o644]


def test_folders_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path):
    (tmp_path / ".tmp-dead").mkdir()
    (tmp_path / ".tmp-dead" / "x").write_text("half")
    with files.atomic_folder(tmp_path / "a") as fresh:
        assert files.remove_leftovers(tmp_path) == 1 and fresh.is_dir()
    assert names(tmp_path) == ["a"]


def test_scratch_folders_of_killed_owners_go_and_those_of_living_ones_stay(tmp_path):
    script = """
import sys
from datatools import files
with files.scratch_folder(sys.argv[1]) as folder:
    (folder / "part").write_bytes(bytes(1000))
    print(folder.parent.name, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    owner = subprocess.Popen(command, cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    name = owner.stdout.readline().strip()
    (tmp_path / "datatools-scratch-of-mine").mkdir()
    (tmp_path / f"datatools-scratch-{'0' * 16}").symlink_to(tmp_path / "datatools-scratch-of-mine")
    with files.scratch_folder(tmp_path) as mine:
        assert stat.S_IMODE(mine.stat().st_mode) == 0o700 and (tmp_path / name / "work" / "part").exists()
    owner.kill()
    owner.communicate()
    with files.scratch_folder(tmp_path):
        assert not (tmp_path / name).exists()
    assert names(tmp_path) == [f"datatools-scratch-{'0' * 16}", "datatools-scratch-of-mine"]


def test_import_is_light():
    script = "import sys; from datatools import files, DataError; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)


# ---------------------------------------------------------------- locks

HOLDER = """
import sys, time
from datatools import EnvironmentProblem, files
time.sleep(float(sys.argv[2]))
try:
    with files.lock_folder(sys.argv[1]):
        print("won", flush=True)
        sys.stdin.read()
except EnvironmentProblem as error:
    print(error, flush=True)
"""


def holder(folder, delay=0.0):
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(delay)],
        cwd=REPOSITORY,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_lock_names_its_holder_and_goes_with_it(tmp_path):
    with files.lock_folder(tmp_path / "run"):
        with pytest.raises(EnvironmentProblem) as error, files.lock_folder(tmp_path / "run"):
            pass
        assert f"process {os.getpid()} on {socket.gethostname()}, started 20" in str(error.value)
        assert "choose another folder" in str(error.value)
    assert names(tmp_path / "run") == []


def test_of_twenty_pairs_exactly_one_wins(tmp_path):
    pairs = [(holder(tmp_path / str(i)), holder(tmp_path / str(i), 0.005 * (i % 11))) for i in range(20)]
    for i, pair in enumerate(pairs):
        said = [process.stdout.readline().strip() for process in pair]
        assert sorted(s == "won" for s in said) == [False, True], said
        winner = pair[said.index("won")]
        assert f"process {winner.pid} " in said[1 - said.index("won")]
        for process in pair:
            process.communicate()
        assert names(tmp_path / str(i)) == []


def test_a_killed_holder_blocks_nobody(tmp_path):
    first = holder(tmp_path)
    assert first.stdout.readline() == "won\n"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert names(tmp_path) == [".lock"]
    with files.lock_folder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    # a folder copied while it was in use brings the lock file, not the lock; clocks do not matter
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "2001-01-01"}))
    os.utime(tmp_path / ".lock", (time.time() + 3600,) * 2)
    with files.lock_folder(tmp_path):
        pass
    assert names(tmp_path) == []
