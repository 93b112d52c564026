"""Rendering of chat templates in a separate process, with limits of processor time and memory (`worker.py`).

The limit is processor time, not elapsed time, so that the result of a row does not depend on the load of the machine.
Any thread may render; a forked process starts its own renderer.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datatools import EnvironmentProblem

SECONDS = 10.0
"""Processor time that one rendering may take, in seconds. A normal one takes a fraction of a millisecond."""

MEMORY = 2 << 30
"""Bytes that the process may use beyond its size at the start."""


def asked_as(longest: int, arguments: Mapping[str, Any]) -> bytes:
    """Return a rendering as it is asked for.

    Args:
        longest: The maximum number of characters of the result.
        arguments: The arguments of transformers' `render_jinja_template`.
    """
    return json.dumps([SECONDS, longest, dict(arguments)]).encode("ascii")


class Worker:
    """The process, which is started when it is first needed and again after it has ended."""

    def __init__(self) -> None:
        self._owner = 0  # the process that started it
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, longest: int, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """Render one conversation.

        Args:
            longest: The maximum number of characters of the result.
            arguments: The arguments of transformers' `render_jinja_template`.

        Returns:
            (kind, text): "text" and the rendered text; "refused" or "invalid" and a message; "long" (more than
            `longest` characters), "slow" or "large".

        Raises:
            EnvironmentProblem: The process cannot be started, or it has crashed.
        """
        self._own()
        with self._lock:
            answer = self._ask(asked_as(longest, arguments))
            if answer:
                kind, text = json.loads(answer)
                return kind, text
            code = self.close()
        if code == -signal.SIGPROF:
            return "slow", ""
        if code == -signal.SIGKILL or code in (-signal.SIGSEGV, -signal.SIGABRT):
            return "large", ""
        raise EnvironmentProblem(
            f"the process that renders chat templates ended with code {code}; check that transformers "
            "is installed completely (python -c 'import transformers')"
        )

    def render_all(self, wanted: Sequence[bytes]) -> list[tuple[str, str]]:
        """Render conversations by one message, each with its own limit of time.

        Args:
            wanted: Renderings, as `asked_as` returns them.

        Returns:
            The result of each, as of `render`; none at all if one of them has ended the process, or memory was short.

        Raises:
            EnvironmentProblem: The process cannot be started.
        """
        self._own()
        with self._lock:
            answer = self._ask(b"[" + b",".join(wanted) + b"]")
            if not answer:
                self.close()
                return []
        found = [(kind, text) for kind, text in json.loads(answer)]
        return [] if any(kind == "large" for kind, _ in found) else found

    def _own(self) -> None:
        if self._owner != os.getpid():  # forked: the pipes and the lock are the parent's
            self._owner, self._lock, self._process = os.getpid(), threading.Lock(), None

    def _ask(self, asked: bytes) -> bytes:
        """Return the answer of the process; nothing if it has ended."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(struct.pack("<q", len(asked)) + asked)
            process.stdin.flush()
            header = process.stdout.read(8)
            return process.stdout.read(*struct.unpack("<q", header)) if len(header) == 8 else b""
        except BrokenPipeError:
            return b""

    def close(self) -> int:
        """End the process and return its exit code."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return 0
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        try:
            return process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        program = Path(__file__).with_name("worker.py")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(program), str(MEMORY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "USE_TORCH": "0", "HF_HUB_OFFLINE": "1"}, start_new_session=True)  # fmt: skip
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot start a process to render chat templates: {error.strerror}; free memory or processes"
            ) from error
        return self._process


worker = Worker()
atexit.register(worker.close)
