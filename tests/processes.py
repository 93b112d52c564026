"""Python code in a process of its own, for what only a process can show: exit codes, signals, what is imported."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def spawn(code: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """`code` with `arguments` in its sys.argv, the repository importable, output piped as text."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )
