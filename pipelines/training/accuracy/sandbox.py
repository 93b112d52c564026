"""Generated code run on the tests of its row, in a process that can do nothing but compute.

The process has limits of time, memory, output and open files, and a filter of system calls that the kernel enforces: no
network, no other processes, no signals to others, and no file opened for writing, made, renamed or removed. It may read
files, and nothing that it says is kept. The filter needs Linux on x86-64 or ARM; nothing runs without it.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from datatools import EnvironmentProblem, files

CHILD = Path(__file__).with_name("sandbox_child.py")
PASSED, FAILED, TIMEOUT = "passed", "failed", "timeout"
_NO_FILTER = 97  # exit status of the child when the kernel takes no filter
_GRACE = 5.0  # seconds for the start of the interpreter


def outcome(code: str, tests: Sequence[str], *, seconds: float, megabytes: int) -> str:
    """Run `code`, then each of `tests`.

    Args:
        code: Python code.
        tests: Python code that raises an error where `code` is wrong.
        seconds: The time limit of all of it.
        megabytes: The memory limit.

    Returns:
        "passed", "failed" or "timeout". Code that ends the process has failed.

    Raises:
        EnvironmentProblem: This machine cannot isolate the process.
    """
    word = secrets.token_hex(16)  # the child says it when all tests are through: code that exits cannot
    with files.scratch_folder() as folder:
        program = "\n".join([code, *tests, ""])
        files.write_text(folder / "program.py", program)
        child = subprocess.Popen(
            [
                sys.executable,
                "-S",
                "-s",
                "-P",
                "-B",
                str(CHILD),
                str(folder / "program.py"),
                str(seconds),
                str(megabytes),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PATH": os.defpath},
            start_new_session=True,
            close_fds=True,
        )
        try:
            said, _ = child.communicate(word.encode(), timeout=seconds + _GRACE)
        except subprocess.TimeoutExpired:
            return TIMEOUT
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            child.communicate()
    if child.returncode == _NO_FILTER:
        raise EnvironmentProblem(
            "--metric code: this machine cannot take network and files away from a process (that needs Linux on x86-64 "
            "or ARM with seccomp); measure another metric here"
        )
    if child.returncode == -signal.SIGXCPU or (child.returncode == -signal.SIGKILL and not said):
        return TIMEOUT
    return PASSED if child.returncode == 0 and said.endswith(word.encode()) else FAILED


def check() -> None:
    """Run one line, to find out before anything is generated whether this machine can.

    Raises:
        EnvironmentProblem: It cannot.
    """
    outcome("x = 1", ["assert x == 1"], seconds=10.0, megabytes=512)
