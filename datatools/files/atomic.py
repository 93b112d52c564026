"""Files written whole or not at all.

A file is written under a temporary name in its own folder, fsynced, renamed over its final name, and the folder is
fsynced: after a kill or a power cut the final name shows the old bytes or the new ones, never a mixture. Temporary
files are `.tmp-<random>`, mode 0600, and locked while their writer lives, so that `remove_leftovers` can tell an
abandoned one from one in use. Finished files are 0644 less the umask. Libraries that save a whole folder get a fresh
one (`atomic_folder`), which is treated in the same way.
"""

import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import xxhash

from datatools.errors import DataError
from datatools.files import seals
from datatools.files.disk import flock, refuse_links, sync_folder, umask, write_all
from datatools.files.problems import NO_SPACE, PathLike, explain, explained
from datatools.files.reading import read_bytes, seal_of, seal_of_open
from datatools.files.seals import TEMPORARY, shown


def write_bytes(
    path: PathLike, data: bytes | bytearray | memoryview, *, durable: bool = True, seal: bool = True
) -> None:
    """Replace `path` by `data`, all or nothing.

    Args:
        path: where to; its folder must exist.
        data: the whole content.
        durable: fsync the file and its folder; False is for files that may be lost, which are not sealed either.
        seal: in a sealed folder, record the content; False is for files that carry a digest of their own.

    """
    path = Path(path)
    with explained(path, "write"), _temporary(path) as (descriptor, temporary):
        write_all(descriptor, data)
        _commit(descriptor, temporary, path, durable, seal)


def write_text(path: PathLike, text: str, *, durable: bool = True) -> None:
    """`write_bytes` of `text` in UTF-8; line ends as they are. Raises: DataError on lone surrogates."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"cannot write {shown(path)} as UTF-8: {error.reason} at character {error.start}") from error
    write_bytes(path, data, durable=durable)


def write_json(path: PathLike, value: Any, *, durable: bool = True) -> None:
    """`write_bytes` of `json_bytes(value)`. Raises: DataError if JSON cannot hold `value` (NaN, a tensor, ...)."""
    try:
        data = json_bytes(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot write {shown(path)} as JSON: {error}") from error
    write_bytes(path, data, durable=durable)


def json_bytes(value: Any) -> bytes:
    """`value` as indented UTF-8 JSON with a final newline; keys keep their order, NaN and infinities are refused."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a lone surrogate somewhere: escape everything beyond ASCII instead
        return json.dumps(value, indent=1, allow_nan=False).encode("ascii") + b"\n"


def write_pieces(path: PathLike, pieces: Iterable[bytes | bytearray | memoryview], *, seal: bool = True) -> str:
    """`write_bytes` of the joined `pieces`, holding one at a time; returns the `digest` of all of them."""
    path = Path(path)
    total = xxhash.xxh3_128()
    with explained(path, "write"), _temporary(path) as (descriptor, temporary):
        for piece in pieces:
            total.update(piece)
            write_all(descriptor, piece)
        _commit(descriptor, temporary, path, durable=True, seal=seal)
    return total.hexdigest()


def write_new(path: PathLike, data: bytes | bytearray | memoryview) -> bool:
    """Put if absent: write `path`, unsealed, only if it does not exist; of many writers exactly one gets True."""
    path = Path(path)
    with explained(path, "write"), _temporary(path) as (descriptor, temporary):
        write_all(descriptor, data)
        os.fchmod(descriptor, 0o644 & ~umask())
        os.fsync(descriptor)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        sync_folder(path.parent)
    return True


def append_line(path: PathLike, line: str) -> None:
    """Append `line` and a newline in one write, for logs; a kill can cut the last line, never an earlier one."""
    with explained(path, "append to"):
        refuse_links(path)
        descriptor = _open_log(Path(path))
        try:
            write_all(descriptor, line.encode("utf-8", "backslashreplace") + b"\n")
        finally:
            os.close(descriptor)


def _open_log(path: Path) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    while True:
        descriptor = os.open(path, flags, 0o644)
        facts = os.fstat(descriptor)
        if stat.S_ISREG(facts.st_mode) and facts.st_nlink <= 1:
            return descriptor
        os.close(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise DataError(f"cannot append to {shown(path)}: it is not a file; remove it")
        write_bytes(path, read_bytes(path), seal=False)  # a second name of another file: that one stays as it is


@contextmanager
def atomic_path(path: PathLike, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path to write to with any library; it becomes `path` on a clean exit and vanishes on an error."""
    path = Path(path)
    with explained(path, "write"):
        descriptor, temporary = _open_temporary(path)
    try:
        try:
            yield temporary
        except OSError as error:
            ours = error.filename is not None and os.fspath(error.filename) == os.fspath(temporary)
            if error.errno in NO_SPACE or ours:
                raise explain(error, path, "write") from error
            raise  # the block's own trouble with another file
        with explained(path, "write"):
            written = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)  # maybe not the file of `descriptor`
            try:
                _commit(written, temporary, path, durable, seal=True)
            finally:
                os.close(written)
    finally:
        _discard(descriptor, temporary)


@contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """A fresh folder beside `path` for a library to write to; it becomes `path` on a clean exit, else it vanishes.

    Files are made 0644 and folders 0755, less the umask, and all are fsynced before the move, so that a folder with the
    final name is whole. What stood at `path` is replaced; a symbolic link there, or one inside it, is never followed.
    Raises: DataError for a link or another special file that the block wrote.
    """
    path = Path(path)
    with explained(path, "write"):
        descriptor, temporary = _make_temporary_folder(path)
    try:
        yield temporary
        with explained(path, "write"):
            _settle(temporary)
            _seal_folder(temporary, path)
            _put(temporary, path)
    finally:
        if os.path.lexists(temporary):
            shutil.rmtree(temporary, ignore_errors=True)  # which unlinks links and never follows them
        os.close(descriptor)


def _make_temporary_folder(path: Path) -> tuple[int, Path]:
    refuse_links(path)
    while True:
        temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        os.mkdir(temporary, 0o700)
        with suppress(FileNotFoundError):  # remove_leftovers came between the making and the lock: once more
            descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            flock(descriptor, fcntl.LOCK_EX)
            if os.path.lexists(temporary):
                return descriptor, temporary
            os.close(descriptor)


def _settle(folder: Path) -> None:
    """Permissions of a finished folder for everything in `folder`, on the disk for good."""
    mask = umask()
    for parent, folders, names in os.walk(folder, topdown=False):
        for name in (*folders, *names):
            child = Path(parent) / name
            mode = os.lstat(child).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise DataError(f"cannot write {shown(child)}: it is neither a file nor a folder; remove what made it")
            if stat.S_ISDIR(mode):
                continue  # the walk comes to it, or has
            descriptor = os.open(child, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fchmod(descriptor, 0o644 & ~mask)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.chmod(parent, 0o755 & ~mask)
        sync_folder(Path(parent))


def _seal_folder(folder: Path, path: Path) -> None:
    """Record the files of `folder` under the names that they will have in `path`."""
    if seals.root_of(path) is None:
        return
    for parent, _, names in os.walk(folder):
        for name in names:
            child = Path(parent) / name
            seals.record(path / child.relative_to(folder), seal_of(child))


def _put(folder: Path, path: Path) -> None:
    """Move `folder` to `path`; a link or a file there goes, a folder there is moved out of the way first."""
    old = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    with suppress(FileNotFoundError):
        os.rename(path, old)  # of a link the link itself
    os.rename(folder, path)
    sync_folder(path.parent)
    if os.path.islink(old) or old.is_file():
        os.unlink(old)
    elif old.is_dir():
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[int, Path]]:
    """A fresh locked file beside `path`; unlinked at the end unless it was renamed away."""
    descriptor, temporary = _open_temporary(path)
    try:
        yield descriptor, temporary
    finally:
        _discard(descriptor, temporary)


def _open_temporary(path: Path) -> tuple[int, Path]:
    refuse_links(path)
    while True:
        temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"  # a short name: `path` may use all 255 bytes
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600)
        try:
            flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor, temporary
        except BaseException:
            _discard(descriptor, temporary)
            raise
        os.close(descriptor)  # remove_leftovers came between open and flock: once more


def _discard(descriptor: int, temporary: Path) -> None:
    with suppress(OSError):  # renamed, or the disk is gone: then the end of the lock marks it as abandoned
        os.unlink(temporary)
    os.close(descriptor)


def _commit(descriptor: int, temporary: Path, path: Path, durable: bool, seal: bool) -> None:
    os.fchmod(descriptor, 0o644 & ~umask())
    if durable:
        os.fsync(descriptor)
        if seal and seals.root_of(path) is not None:  # before the file has its name
            seals.record(path, seal_of_open(descriptor))
        elif not seal and seals.expected(path):  # of a version that sealed this file
            seals.drop(path)
    os.replace(temporary, path)
    if durable:
        sync_folder(path.parent)


_WRITERS = ("write", "append", "move", "_commit", "sync_folder")
_FILES = {str(Path(__file__).with_name(name)) for name in ("atomic.py", "disk.py", "folders.py")}


def is_writing(frame: FrameType | None) -> bool:
    """Whether a file is being written in `frame` or in one that called it, so that an interrupt should wait."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename in _FILES and code.co_name.startswith(_WRITERS):
            return True
        frame = frame.f_back
    return False
