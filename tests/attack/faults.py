"""Faults that a child process suffers on purpose: the n-th file operation of a kind fails, or is its last.

`install` wraps the calls through which Python code reaches the disk (`os.open`, `os.write`, `os.replace`, `os.fsync`,
`open`, ...) and the writers of libraries that do not (torch, safetensors, pyarrow). Only calls on files inside one
folder count. Each operation has a number, in the order of the calls, so that a fault is repeatable: "the 17th write
fails".

Kinds: `read` and `write` (opening and writing), `rename` (rename, replace, link), `fsync`, `library` (a whole file
written by a library), `full` (the n-th write and every one after it), and `kill` (SIGKILL before the n-th operation of
any kind).
"""

import builtins
import errno
import io
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

KINDS = ("read", "write", "rename", "fsync", "library", "full")


class Faults:
    """Counts the file operations inside `within`, and lets one of them fail.

    Args:
        within: the folder whose files count.
        kind: one of `KINDS` or "kill"; None only counts.
        nth: the number of the operation that fails, from 1.

    """

    def __init__(self, within: str, kind: str | None = None, nth: int = 0) -> None:
        self.within, self.kind, self.nth = os.path.realpath(within), kind, nth
        self.calls: Counter[str] = Counter()
        self._busy = False

    def meets(self, kind: str, target: Any) -> bool:
        """Count an operation on `target` (a path or a descriptor); whether it is the one that fails."""
        if self._busy or not self._inside(target):
            return False
        self.calls[kind] += 1
        self.calls["kill"] += 1
        if self.kind == "kill" and self.calls["kill"] == self.nth:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "full":
            return kind == "write" and self.calls["write"] >= self.nth
        return kind == self.kind and self.calls[kind] == self.nth

    def _inside(self, target: Any) -> bool:
        with suppress(OSError, TypeError, ValueError):
            if isinstance(target, int):
                path = os.readlink(f"/proc/self/fd/{target}")
            else:
                path = os.path.join(os.path.realpath(os.path.dirname(os.fspath(target))), os.path.basename(target))
            return path == self.within or path.startswith(self.within + os.sep)
        return False

    def library(self, inner: Callable[..., Any], path_of: Callable[..., Any]) -> Callable[..., Any]:
        """`inner`, a library's writer of one file, which runs into a full disk at the n-th call."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.meets("library", path_of(*args, **kwargs)):
                return inner(*args, **kwargs)
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            try:
                return inner(*args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        return wrapped


def _error(kind: str, path: Any) -> OSError:
    number = errno.ENOSPC if kind in ("write", "full") else errno.EIO
    return OSError(number, os.strerror(number), path if isinstance(path, str | os.PathLike) else None)


def install(settings: Mapping[str, Any]) -> Faults:
    """Wrap the file operations of this process for good. Call it in a child that is about to run one command."""
    faults = Faults(settings["within"], settings.get("kind"), int(settings.get("nth", 0)))

    def failing(inner: Callable[..., Any], kind: str, target: int = 0) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if args and faults.meets(kind, args[target]):
                raise _error(kind, args[target])
            return inner(*args, **kwargs)

        return wrapped

    def opened(inner: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
            kind = "write" if flags & (os.O_WRONLY | os.O_RDWR) else "read"
            if not flags & os.O_DIRECTORY and faults.meets(kind, path):
                raise _error(kind, path)
            return inner(path, flags, *args, **kwargs)

        return wrapped

    def opened_by_name(inner: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            kind = "write" if set(mode) & set("wax+") else "read"
            if not isinstance(path, int) and faults.meets(kind, path):
                raise _error(kind, path)
            return inner(path, mode, *args, **kwargs)

        return wrapped

    write = os.write

    def half_written(descriptor: int, data: Any) -> int:
        if faults.meets("write", descriptor):
            with suppress(OSError):
                write(descriptor, memoryview(data)[: len(data) // 2])
            raise _error("write", None)
        return write(descriptor, data)

    os.write = half_written  # type: ignore[assignment]
    os.open = opened(os.open)
    builtins.open = io.open = opened_by_name(builtins.open)  # type: ignore[assignment]
    os.fsync = failing(os.fsync, "fsync")
    for name in ("rename", "replace", "link"):
        setattr(os, name, failing(getattr(os, name), "rename", 1))

    import pyarrow.parquet
    import safetensors.torch
    import torch

    def second(_: Any, path: Any, *__: Any, **___: Any) -> Any:
        return path

    torch.save = faults.library(torch.save, second)
    safetensors.torch.serialize_file = faults.library(safetensors.torch.serialize_file, second)
    pyarrow.parquet.write_table = faults.library(pyarrow.parquet.write_table, second)
    return faults


def flip(path: Path, at: float) -> None:
    """Flip one bit of the byte that lies at the fraction `at` of the file."""
    data = bytearray(path.read_bytes())
    data[min(int(at * len(data)), len(data) - 1)] ^= 1 << (int(at * 1e6) % 7)
    path.write_bytes(data)


def truncate(path: Path, at: float) -> None:
    """Cut the file at the fraction `at` of its length."""
    os.truncate(path, int(at * path.stat().st_size))
