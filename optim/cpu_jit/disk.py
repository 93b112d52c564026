"""Compiled steps in files, so that the next process does not compile them again.

The files are in the folder that the environment variable ``OPTIM_CACHE`` names, by default ``optim-steps`` in the
user's cache folder. ``OPTIM_CACHE=0`` turns them off. Everything that determines the machine code is part of a file's
name: the assembly of the step (which contains the rule), the processor with its features, and the versions of the
compiler. A file that is damaged is compiled again. A folder that other users can write to is not used, because its
contents are executed. If files cannot be written, steps are compiled in every process.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

KEPT = 512
"""The number of files that are kept, of about 20 kB each. When there are more, those that were not used for the longest
time are deleted."""

_MAGIC = b"optim compiled step, version 1\n"


def folder() -> Path | None:
    """Return the folder of compiled steps, which may not exist yet.

    Returns:
        The folder, or None if it is turned off or if there is no home folder.
    """
    chosen = os.environ.get("OPTIM_CACHE", "")
    if chosen == "0":
        return None
    if chosen:
        return Path(chosen)
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home folder
        return None
    return caches / "optim-steps"


def key_of(parts: Iterable[str]) -> str:
    """Return the name of a file.

    Args:
        parts: Everything that determines the machine code.

    Returns:
        A digest in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def load(key: str) -> bytes | None:
    """Return the stored machine code.

    Args:
        key: What `key_of` returned.

    Returns:
        The object file, or None if there is none, if it is damaged, or if other users could have written it.
    """
    place = folder()
    if place is None or not _trusted(place):
        return None
    path = place / f"{key}.o"
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head = _MAGIC + key.encode()
    digest, code = content[len(head) : len(head) + 32], content[len(head) + 32 :]
    if not content.startswith(head) or hashlib.sha256(code).digest() != digest:
        return None
    with suppress(OSError):
        os.utime(path)
    return code


def save(key: str, code: bytes) -> None:
    """Store machine code, if the folder can be written.

    Args:
        key: What `key_of` returned.
        code: The object file.
    """
    place = folder()
    if place is None:
        return
    with suppress(OSError):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _trusted(place):
            return
        handle, name = tempfile.mkstemp(dir=place, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + key.encode() + hashlib.sha256(code).digest() + code)
            Path(name).replace(place / f"{key}.o")
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        _prune(place)


def _trusted(place: Path) -> bool:
    """Return whether the folder exists and only this user can write to it."""
    try:
        found = place.stat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):  # Windows, where the user's folder is private
        return True
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _prune(place: Path) -> None:
    files = [path for path in place.iterdir() if path.suffix in (".o", ".tmp")]
    if len(files) > KEPT:
        files.sort(key=lambda path: path.stat().st_mtime)
        for path in files[: len(files) - KEPT * 3 // 4]:
            path.unlink(missing_ok=True)
