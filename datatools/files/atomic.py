"""Write files whole or not at all.

A file is written under a temporary name in its own folder, fsynced, renamed to its final name, and the folder is
fsynced. After a kill or a power failure, the final name refers to the old content or to the new content, never to a
mixture. Temporary files are named `.tmp-<random>`, have mode 0600, and are locked while their writer lives, so that
`remove_leftovers` can distinguish abandoned files from those in use. Finished files have mode 0644 less the umask.
Whole folders are written in the same way (`atomic_folders.py`).
"""

import fcntl
import json
import os
import secrets
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
from datatools.files.reading import read_bytes, seal_of_open
from datatools.files.seals import TEMPORARY, shown


def write_bytes(
    path: PathLike, data: bytes | bytearray | memoryview, *, durable: bool = True, seal: bool = True
) -> None:
    """Replace the file `path` by `data`, all or nothing.

    Args:
        path: file to write; its folder must exist.
        data: the whole content.
        durable: fsync the file and its folder. False is for files that may be lost; these are not sealed.
        seal: in a sealed folder, record the content. False is for files that carry a digest of their own.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.
        DataError: if the folder does not exist, or is a link inside a run folder.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "data.bin"
        >>> files.write_bytes(path, b"new")
        >>> path.read_bytes()
        b'new'

    """
    path = Path(path)
    with explained(path, "write"), _temporary(path) as (descriptor, temporary):
        write_all(descriptor, data)
        _commit(descriptor, temporary, path, durable, seal)


def write_text(path: PathLike, text: str, *, durable: bool = True) -> None:
    r"""Write `text` in UTF-8 with `write_bytes`; line ends are not converted.

    Args:
        path: file to write; its folder must exist.
        text: the whole content.
        durable: see `write_bytes`.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.
        DataError: if the text has lone surrogates, which UTF-8 cannot encode.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> files.write_text(path, "naïve")
        >>> path.read_bytes()
        b'na\xc3\xafve'

    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"cannot write {shown(path)} as UTF-8: {error.reason} at character {error.start}") from error
    write_bytes(path, data, durable=durable)


def write_json(path: PathLike, value: Any, *, durable: bool = True) -> None:
    """Write `json_bytes(value)` with `write_bytes`.

    Args:
        path: file to write; its folder must exist.
        value: a value that JSON can represent.
        durable: see `write_bytes`.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.
        DataError: if JSON cannot represent `value` (NaN, a tensor, ...).

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "result.json"
        >>> files.write_json(path, {"loss": 2.5})
        >>> files.read_json(path)
        {'loss': 2.5}

    """
    try:
        data = json_bytes(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot write {shown(path)} as JSON: {error}") from error
    write_bytes(path, data, durable=durable)


def json_bytes(value: Any) -> bytes:
    r"""Serialize `value` as indented UTF-8 JSON with a final newline; keys keep their order.

    Args:
        value: a value that JSON can represent; NaN and infinities are refused.

    Returns:
        The JSON text as bytes.

    Example:
        >>> from datatools import files
        >>> files.json_bytes({"b": 1, "a": 2})
        b'{\n "b": 1,\n "a": 2\n}\n'

    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a lone surrogate somewhere: escape everything beyond ASCII instead
        return json.dumps(value, indent=1, allow_nan=False).encode("ascii") + b"\n"


def write_pieces(path: PathLike, pieces: Iterable[bytes | bytearray | memoryview], *, seal: bool = True) -> str:
    """Write the concatenated `pieces` as `write_bytes` does, holding one piece in memory at a time.

    Args:
        path: file to write; its folder must exist.
        pieces: the content, in order.
        seal: see `write_bytes`.

    Returns:
        The `digest` of the whole content.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "data.bin"
        >>> files.write_pieces(path, (b"ab", b"c")) == files.digest(b"abc")
        True

    """
    path = Path(path)
    total = xxhash.xxh3_128()
    with explained(path, "write"), _temporary(path) as (descriptor, temporary):
        for piece in pieces:
            total.update(piece)
            write_all(descriptor, piece)
        _commit(descriptor, temporary, path, durable=True, seal=seal)
    return total.hexdigest()


def write_new(path: PathLike, data: bytes | bytearray | memoryview) -> bool:
    """Create the file `path`, unsealed, only if it does not exist; of several concurrent writers exactly one succeeds.

    Args:
        path: file to create; its folder must exist.
        data: the whole content.

    Returns:
        True if this call created the file, False if it existed already.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "claim"
        >>> files.write_new(path, b"first"), files.write_new(path, b"second")
        (True, False)

    """
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
    """Append `line` and a newline to a log file in one write. A kill can truncate only the last line.

    Args:
        path: log file; it is created where missing, and never sealed.
        line: text without a newline.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.
        DataError: if `path` is not a regular file.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "log.txt"
        >>> files.append_line(path, "step 1")
        >>> files.append_line(path, "step 2")
        >>> path.read_text().splitlines()
        ['step 1', 'step 2']

    """
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
            raise DataError(f"cannot append to {shown(path)}: it is not a regular file; remove it")
        write_bytes(path, read_bytes(path), seal=False)  # a hard link to another file, which must stay unchanged


@contextmanager
def atomic_path(path: PathLike, *, durable: bool = True) -> Iterator[Path]:
    """Provide a temporary path for a library to write to; it becomes `path` on a clean exit and is removed on an error.

    Args:
        path: final name of the file; its folder must exist.
        durable: see `write_bytes`.

    Yields:
        The temporary path, in the same folder.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "data.txt"
        >>> with files.atomic_path(path) as temporary:
        ...     written = temporary.write_text("whole")
        ...     path.exists()
        False
        >>> path.read_text()
        'whole'

    """
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
            raise  # the block failed on a file of its own
        with explained(path, "write"):
            written = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)  # may differ from `descriptor`
            try:
                _commit(written, temporary, path, durable, seal=True)
            finally:
                os.close(written)
    finally:
        _discard(descriptor, temporary)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[int, Path]]:
    """Yield a new locked file in the folder of `path`; it is unlinked at the end unless it was renamed."""
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
        os.close(descriptor)  # remove_leftovers removed it between open and flock: try again


def _discard(descriptor: int, temporary: Path) -> None:
    with suppress(OSError):  # already renamed, or the disk fails: without the lock it counts as abandoned
        os.unlink(temporary)
    os.close(descriptor)


def _commit(descriptor: int, temporary: Path, path: Path, durable: bool, seal: bool) -> None:
    os.fchmod(descriptor, 0o644 & ~umask())
    if durable:
        os.fsync(descriptor)
        if seal and seals.root_of(path) is not None:  # before the file has its name
            seals.record(path, seal_of_open(descriptor))
        elif not seal and seals.expected(path):  # a seal from a version that sealed this file
            seals.drop(path)
    os.replace(temporary, path)
    if durable:
        sync_folder(path.parent)


_WRITERS = ("write", "append", "move", "_commit", "sync_folder")
_FILES = {str(Path(__file__).with_name(name)) for name in ("atomic.py", "disk.py", "folders.py")}


def is_writing(frame: FrameType | None) -> bool:
    """Return whether `frame` or one of its callers is writing a file, so that an interrupt should be deferred.

    Args:
        frame: the frame that a signal interrupted; None gives False.

    Returns:
        Whether the frame belongs to a write, append, move or commit of this package.

    Example:
        >>> import sys
        >>> from datatools import files
        >>> files.is_writing(sys._getframe())
        False

    """
    while frame is not None:
        code = frame.f_code
        if code.co_filename in _FILES and code.co_name.startswith(_WRITERS):
            return True
        frame = frame.f_back
    return False
