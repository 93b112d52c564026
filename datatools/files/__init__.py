"""The only module that writes files.

A file is written under a temporary name in its own folder, fsynced, renamed over its final name, and the folder is
fsynced: after a kill or a power cut the final name shows the old bytes or the new ones, never a mixture. Temporary
files are `.tmp-<random>`, mode 0600, and locked while their writer lives, so `remove_leftovers` can tell an abandoned
one from one in use. Finished files are 0644 less the umask. Libraries that save a whole folder get a fresh one
(`atomic_folder`), which is treated alike. In a run folder, finished files are sealed (`datatools.files.seals`): what
is read there later is what was written.

Nothing here follows a link to write, or waits for a pipe: a name that is taken by a link is replaced, and a folder
inside a run folder that is a link is refused.

Failures surface as `EnvironmentProblem` (no space, no permission, disk error, folder in use) or `DataError` (no such
file, not a readable file), always with the path and what to do. POSIX only: locks are `flock`, which the kernel drops
when its holder dies, so no lock is ever stale; a network folder must support `flock`, `rename` and `fsync`.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import xxhash

from datatools.errors import DataError, DatatoolsError, EnvironmentProblem
from datatools.files import seals
from datatools.files.seals import shown

_TEMPORARY = seals.TEMPORARY
_SCRATCH = "datatools-scratch-"
_LOCK = ".lock"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}
_umask_lock = threading.Lock()

PathLike = str | os.PathLike[str]


# ---------------------------------------------------------------- errors


def explain(error: OSError, path: PathLike, doing: str) -> DatatoolsError:
    """`error` while `doing` ("write", "read", "create") something to `path`, as one of ours with advice."""
    what = error.strerror or str(error)
    head = f"cannot {doing} {shown(path)}: {what}"
    if error.errno in _NO_SPACE:
        return EnvironmentProblem(
            f"{head}; free some space (or raise the quota) and run the same command again, finished parts are kept"
        )
    if error.errno in _FORBIDDEN:
        return EnvironmentProblem(f"{head}; check the permissions, or choose another folder")
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return EnvironmentProblem(f"{head}; raise the limit on open files (ulimit -n)")
    if error.errno == errno.ENOENT:
        return DataError(f"{head}; check the path")
    if error.errno in {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST}:
        return DataError(f"{head}; choose another path")
    return EnvironmentProblem(f"{head}; check the disk and run the same command again, finished parts are kept")


@contextmanager
def _explained(path: PathLike, doing: str) -> Iterator[None]:
    if "\0" in os.fspath(path):
        raise DataError(f"cannot {doing} {shown(path)}: a path holds no null byte; choose another path")
    try:
        yield
    except OSError as error:
        raise explain(error, path, doing) from error


# ---------------------------------------------------------------- writing


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
    with _explained(path, "write"), _temporary(path) as (descriptor, temporary):
        _write_all(descriptor, data)
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
    with _explained(path, "write"), _temporary(path) as (descriptor, temporary):
        for piece in pieces:
            total.update(piece)
            _write_all(descriptor, piece)
        _commit(descriptor, temporary, path, durable=True, seal=seal)
    return total.hexdigest()


def write_new(path: PathLike, data: bytes | bytearray | memoryview) -> bool:
    """Put if absent: write `path`, unsealed, only if it does not exist; of many writers exactly one gets True."""
    path = Path(path)
    with _explained(path, "write"), _temporary(path) as (descriptor, temporary):
        _write_all(descriptor, data)
        os.fchmod(descriptor, 0o644 & ~_umask())
        os.fsync(descriptor)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        _sync_folder(path.parent)
    return True


def append_line(path: PathLike, line: str) -> None:
    """Append `line` and a newline in one write, for logs; a kill can cut the last line, never an earlier one."""
    with _explained(path, "append to"):
        _refuse_links(path)
        descriptor = _open_log(Path(path))
        try:
            _write_all(descriptor, line.encode("utf-8", "backslashreplace") + b"\n")
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
    with _explained(path, "write"):
        descriptor, temporary = _open_temporary(path)
    try:
        try:
            yield temporary
        except OSError as error:
            ours = error.filename is not None and os.fspath(error.filename) == os.fspath(temporary)
            if error.errno in _NO_SPACE or ours:
                raise explain(error, path, "write") from error
            raise  # the block's own trouble with another file
        with _explained(path, "write"):
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
    with _explained(path, "write"):
        descriptor, temporary = _make_temporary_folder(path)
    try:
        yield temporary
        with _explained(path, "write"):
            _settle(temporary)
            _seal_folder(temporary, path)
            _put(temporary, path)
    finally:
        if os.path.lexists(temporary):
            shutil.rmtree(temporary, ignore_errors=True)  # which unlinks links and never follows them
        os.close(descriptor)


def _make_temporary_folder(path: Path) -> tuple[int, Path]:
    _refuse_links(path)
    while True:
        temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        os.mkdir(temporary, 0o700)
        with suppress(FileNotFoundError):  # remove_leftovers came between the making and the lock: once more
            descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            _flock(descriptor, fcntl.LOCK_EX)
            if os.path.lexists(temporary):
                return descriptor, temporary
            os.close(descriptor)


def _settle(folder: Path) -> None:
    """Permissions of a finished folder for everything in `folder`, on the disk for good."""
    mask = _umask()
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
        _sync_folder(Path(parent))


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
    old = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    with suppress(FileNotFoundError):
        os.rename(path, old)  # of a link the link itself
    os.rename(folder, path)
    _sync_folder(path.parent)
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


def _refuse_links(path: PathLike) -> None:
    if (link := seals.link_inside(path)) is not None:
        raise DataError(
            f"cannot write {shown(path)}: {shown(link)} is a symbolic link, and a run folder holds none; "
            "remove the link"
        )


def _open_temporary(path: Path) -> tuple[int, Path]:
    _refuse_links(path)
    while True:
        temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"  # a short name: `path` may use all 255 bytes
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600)
        try:
            _flock(descriptor, fcntl.LOCK_EX)
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
    os.fchmod(descriptor, 0o644 & ~_umask())
    if durable:
        os.fsync(descriptor)
        if seal and seals.root_of(path) is not None:  # before the file has its name
            seals.record(path, _seal_of(descriptor))
        elif not seal and seals.expected(path):  # of a version that sealed this file
            seals.drop(path)
    os.replace(temporary, path)
    if durable:
        _sync_folder(path.parent)


def _write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems do not sync folders; the rename is still atomic
            raise
    finally:
        os.close(descriptor)


_WRITERS = ("write", "append", "move", "_commit", "_write_all", "_sync_folder")


def is_writing(frame: FrameType | None) -> bool:
    """Whether a file is being written in `frame` or in one that called it, so that an interrupt should wait."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == __file__ and code.co_name.startswith(_WRITERS):
            return True
        frame = frame.f_back
    return False


def _umask() -> int:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    with _umask_lock:  # elsewhere it can only be read by setting it
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


# ---------------------------------------------------------------- folders, moving, removing


def make_folder(path: PathLike) -> Path:
    """Create the folder `path` and its parents where missing (0755 less the umask)."""
    path = Path(path)
    with _explained(path, "create the folder"):
        _refuse_links(path / "x")
        for parent in reversed(path.parents):
            if not parent.is_dir():  # os.makedirs would give it all that the umask allows
                with suppress(FileExistsError):
                    os.mkdir(parent, 0o755)
        os.makedirs(path, mode=0o755, exist_ok=True)
    return path


@contextmanager
def scratch_folder(within: PathLike | None = None) -> Iterator[Path]:
    """A fresh private folder in `within` (the system's folder for temporary files), gone at the end.

    The folder around it is locked while its owner lives, so that what killed owners left goes when the next one is
    made. The folder itself is not: a run in it locks the folder that it is in.
    """
    place = Path(within if within is not None else tempfile.gettempdir())
    with _explained(place, "make a temporary folder in"):
        with suppress(OSError):
            _sweep_scratch(place)
        while True:
            folder = place / f"{_SCRATCH}{secrets.token_hex(8)}"
            os.mkdir(folder, 0o700)
            with suppress(FileNotFoundError):  # swept between the making and the lock: once more
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                _flock(descriptor, fcntl.LOCK_EX)
                if os.path.lexists(folder):
                    break
                os.close(descriptor)
    try:
        inner = folder / "work"
        with _explained(inner, "create the folder"):
            os.mkdir(inner, 0o700)
        yield inner
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _sweep_scratch(place: Path) -> None:
    """Remove the scratch folders in `place` of which nobody holds the lock."""
    with os.scandir(place) as entries:
        names = [e.name for e in entries if re.fullmatch(rf"{_SCRATCH}[0-9a-f]{{16}}", e.name)]
    for name in names:
        with suppress(OSError):  # in use, of another user, or gone
            descriptor = os.open(place / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(place / name)
            finally:
                os.close(descriptor)


def move(path: PathLike, to: PathLike) -> None:
    """Rename `path` (a file or a folder) to the free name `to` on the same file system, durably, without its seals."""
    with _explained(path, f"move to {shown(to)}:"):
        if os.path.lexists(to):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(to))
        seals.drop(path)
        os.rename(path, to)
        for folder in {Path(path).parent, Path(to).parent}:
            _sync_folder(folder)


def remove(path: PathLike) -> None:
    """Unlink the file `path`; no error if it is gone already."""
    with _explained(path, "remove"), suppress(FileNotFoundError):
        os.unlink(path)


def remove_folder(path: PathLike) -> None:
    """Remove the folder `path`, or a link in its place, all or nothing: it is renamed first. No error if it is gone."""
    aside = Path(path).parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    with _explained(path, "remove"), suppress(FileNotFoundError):
        os.rename(path, aside)
        _sync_folder(aside.parent)
        if aside.is_symlink() or not aside.is_dir():
            os.unlink(aside)
        else:
            shutil.rmtree(aside)


def remove_leftovers(folder: PathLike) -> int:
    """Remove the temporary files and folders that killed writers left in `folder`; those of living writers stay.

    Returns: how many went.
    """
    count = 0
    with _explained(folder, "clean"):
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(_TEMPORARY)]
        for name in names:
            temporary = Path(folder) / name
            kind = os.O_RDONLY | os.O_DIRECTORY if temporary.is_dir() else os.O_RDWR
            try:
                descriptor = os.open(temporary, kind | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:  # renamed meanwhile, or not ours
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    shutil.rmtree(temporary)
                else:
                    os.unlink(temporary)
                count += 1
            except OSError:  # its writer lives, or nobody can tell: leave it
                continue
            finally:
                os.close(descriptor)
    return count


# ---------------------------------------------------------------- reading


def read_bytes(path: PathLike, *, limit: int | None = None) -> bytes:
    """The bytes of the regular file `path`.

    Raises: DataError if it is missing, not a file, over `limit` bytes, or in a run folder and not what the run wrote.
    """
    with _explained(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # not to hang on a named pipe
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise DataError(f"cannot read {shown(path)}: it is not a file; choose another path")
            if limit is not None and facts.st_size > limit:
                raise DataError(f"cannot read {shown(path)}: {facts.st_size} bytes, at most {limit} were expected")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read()
        finally:
            os.close(descriptor)
    seals.check_bytes(path, data)
    return data


def open_file(path: PathLike, *, buffering: int = 0) -> BinaryIO:
    """The regular file `path`, open for reading bytes; never waits for a pipe.

    Raises: DataError if it is missing or not a file. In a run folder it is not compared with its seal: see `checked`.
    """
    with _explained(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DataError(f"cannot read {shown(path)}: it is not a file; choose another path")
        return open(descriptor, "rb", buffering=buffering)


def read_json(path: PathLike, *, limit: int | None = None) -> Any:
    """The JSON value in `path`. Raises: DataError if it is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(read_bytes(path, limit=limit))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown(path)} is not valid JSON: {error}") from error


def digest(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128 of `data`, 32 hex characters. Detects accidents; it is no defence against forgery."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_file(path: PathLike) -> str:
    """`digest` of the regular file's bytes, read in pieces of 4 MiB."""
    return seal_of(path).digest


def seal_of(path: PathLike) -> seals.Seal:
    """Size and digest of the regular file `path`. Raises: DataError if it is missing or not a file."""
    with open_file(path) as file, _explained(path, "read"):
        return _seal_of(file.fileno())


def _seal_of(descriptor: int) -> seals.Seal:
    total, size = xxhash.xxh3_128(), 0
    piece = memoryview(bytearray(4 << 20))
    while count := os.preadv(descriptor, [piece], size):
        total.update(piece[:count])
        size += count
    return seals.Seal(size, total.hexdigest())


def checked(path: PathLike) -> Path:
    """`path`, for libraries that open files themselves: in a run folder, only if it is what the run wrote.

    Raises: DataError if it is not, or is missing or not a file.
    """
    if seals.expected(path):
        seals.check(path, seal_of(path))
    return Path(path)


# ---------------------------------------------------------------- locks


def _flock(descriptor: int, operation: int) -> None:
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_FLOCK:  # without flock writers work, and leftovers stay where they are
            raise


@contextmanager
def folder_mutex(folder: PathLike) -> Iterator[None]:
    """A short critical section among the processes that change files of `folder` together; waits, leaves no file."""
    with _explained(folder, "lock the folder"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(path: PathLike, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the folder `path` (created if missing) for one run; a second holder is refused at once, or waits.

    waiting: called once with the holder's name when there is one; then this waits until the folder is free.

    The file `.lock` inside names host, pid and start time and is gone afterwards. A killed holder leaves the file but
    not the lock, so the next run takes over.
    Raises: EnvironmentProblem that names the holder.
    """
    folder = make_folder(path)
    file = folder / _LOCK
    with _explained(file, "lock"):
        descriptor = _acquire(folder, file, waiting)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(file)  # before the lock goes: whoever waits on this inode sees that it is gone
        os.close(descriptor)


def _acquire(folder: Path, file: Path, waiting: Callable[[str], None] | None) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(file, flags, 0o600)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise DataError(f"cannot lock {shown(folder)}: {_LOCK} in it is not a file; remove it")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.stat(file, follow_symlinks=False)
            if current.st_nlink > 1:  # a second name of another file, which is not ours to write
                os.unlink(file)
            elif current.st_ino == facts.st_ino:
                started = time.strftime("%Y-%m-%d %H:%M:%S %z")
                owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, owner.encode(), 0)
                return descriptor
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            if waiting is not None:
                waiting(owner)
                waiting = _said
                time.sleep(0.2)
                continue
            raise EnvironmentProblem(
                f"{shown(folder)} is in use by {owner}; wait for that run, stop it, or choose another folder"
            ) from None
        except FileNotFoundError:  # the last holder removed it between open and stat
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _said(owner: str) -> None:
    """Who holds the folder was said already."""


def _owner(descriptor: int) -> str:
    for _ in range(50):  # the holder writes its name right after it has the lock
        try:
            owner = json.loads(os.pread(descriptor, 4096, 0))
            return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.01)
    return "another process"
