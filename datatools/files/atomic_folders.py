"""Write folders whole or not at all, for libraries that save several files at once."""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from datatools.errors import DataError
from datatools.files import seals
from datatools.files.disk import refuse_links, sync_folder, umask
from datatools.files.folders import new_locked_folder
from datatools.files.problems import PathLike, explained
from datatools.files.reading import seal_of
from datatools.files.seals import TEMPORARY, shown


@contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """Provide a new folder that a library can write to; it becomes `path` on a clean exit and is removed on an error.

    Files get mode 0644 and folders 0755, less the umask, and all are fsynced before the rename, so that a folder with
    the final name is complete. An existing file or folder at `path` is replaced; a symbolic link at `path`, or inside
    it, is never followed.

    Args:
        path: final name of the folder; its parent must exist.

    Yields:
        The temporary folder, in the same parent.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.
        DataError: if the block wrote a link or another special file.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> with files.atomic_folder(path) as temporary:
        ...     written = (temporary / "config.json").write_text("{}")
        >>> [file.name for file in path.iterdir()]
        ['config.json']

    """
    path = Path(path)
    with explained(path, "write"):
        refuse_links(path)
        descriptor, temporary = new_locked_folder(path.parent, TEMPORARY)
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


def _settle(folder: Path) -> None:
    """Give everything in `folder` the permissions of finished files and folders, and fsync it."""
    mask = umask()
    for parent, folders, names in os.walk(folder, topdown=False):
        for name in (*folders, *names):
            child = Path(parent) / name
            mode = os.lstat(child).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise DataError(f"cannot write {shown(child)}: it is neither a file nor a folder; remove what made it")
            if stat.S_ISDIR(mode):
                continue  # the walk visits it separately
            descriptor = os.open(child, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fchmod(descriptor, 0o644 & ~mask)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.chmod(parent, 0o755 & ~mask)
        sync_folder(Path(parent))


def _seal_folder(folder: Path, path: Path) -> None:
    """Record seals for the files of `folder` under the names that they will have in `path`."""
    if seals.root_of(path) is None:
        return
    for parent, _, names in os.walk(folder):
        for name in names:
            child = Path(parent) / name
            seals.record(path / child.relative_to(folder), seal_of(child))


def _put(folder: Path, path: Path) -> None:
    """Move `folder` to `path`, replacing a link, file or folder at that path."""
    old = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    with suppress(FileNotFoundError):
        os.rename(path, old)  # renames a link itself, not its target
    os.rename(folder, path)
    sync_folder(path.parent)
    if os.path.islink(old) or old.is_file():
        os.unlink(old)
    elif old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
