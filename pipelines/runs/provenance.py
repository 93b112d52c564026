"""Provenance of a run: versions, the digest of the code, the commit and the machine. No import here loads torch."""

import os
import platform
import re
import resource
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from datatools import files
from pipelines.runs import run_files, threads
from pipelines.runs.events import now
from pipelines.runs.redact import redact
from pipelines.runs.workers import world_size
from pipelines.settings.base import Json, Settings
from pipelines.settings.dump import config_digest

DISTRIBUTION = "datatools-llm"
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "datasets", "accelerate")

ROOT = Path(__file__).resolve().parents[2]

SHOWING = tuple(
    f"pipelines/{place}"
    for place in ("cli/ report/ demo_data/ __main__.py demo.py doctor.py listing.py texts.py select/explain.py".split())
)
"""Folders and files that only display results; the rows of the demo are an ordinary input.

Every other file of the packages counts as code that computes results: a run is not continued after such a file was
edited.
"""

_NO_CODE = (".md", ".pyc", "~")


def versions() -> dict[str, Json]:
    """Return the versions of this toolkit and of the libraries that compute; null where one is not installed."""
    found: dict[str, Json] = {"datatools": version(DISTRIBUTION)}
    return found | {name: version(name) for name in LIBRARIES}


def version(name: str) -> str | None:
    """Return the version of an installed distribution, or None.

    Args:
        name: The name of the distribution.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def code_digest() -> str:
    """Return the xxh3-128 digest of the files that compute results (names and bytes, sorted).

    `SHOWING` lists the files that do not.
    """
    parts = []
    for package in ("optim", "datatools", "pipelines"):
        for path in sorted((ROOT / package).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            hidden = any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
            if not (hidden or name.startswith(SHOWING) or name.endswith(_NO_CODE)) and path.is_file():
                parts.append(f"{name} {files.digest_file(path)}\n")
    return files.digest("".join(parts).encode())


def git_commit(root: Path = ROOT) -> str | None:
    """Return the commit that is checked out, read from the files of the repository; None outside a repository.

    Args:
        root: The root of the repository.
    """
    try:
        git = root / ".git"
        if git.is_file():  # a worktree
            git = (root / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else None
        name = head.removeprefix("ref:").strip()
        common = git
        if (git / "commondir").is_file():
            common = (git / (git / "commondir").read_text(encoding="utf-8").strip()).resolve()
        for folder in (git, common):
            if (folder / name).is_file():
                return (folder / name).read_text(encoding="utf-8").strip()
        for line in (common / "packed-refs").read_text(encoding="utf-8").splitlines():
            if line.endswith(f" {name}"):
                return line.split()[0]
    except (OSError, UnicodeError, ValueError):
        pass
    return None


def machine() -> dict[str, Json]:
    """Return the system, processor type, and sizes; never the names of the host or the user."""
    memory: int | None = None
    with suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = (*threads.COUNTS, *threads.WAITING)
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cores": threads.cores(),
        "memory_bytes": memory,
        "python": platform.python_version(),
        **{name: redact(os.environ[name]) for name in names if name in os.environ},
    }


def record(command: str, config: Settings, found: dict[str, Any]) -> dict[str, Any]:
    """Return the content of provenance.json when a run begins or continues.

    Args:
        command: The command, such as `select`.
        config: The settings of the run.
        found: The earlier content of the file; empty for a new run.
    """
    return {
        "format": run_files.SEALED_SINCE,
        "command": command,
        "argv": [redact(argument) for argument in sys.argv[1:]],
        "created": found.get("created") or now(),
        "updated": now(),
        "config_digest": config_digest(config),
        "seed": getattr(config, "seed", None),
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": machine(),
        "world_size": world_size(),
        "facts": found.get("facts", {}),
        "changed": found.get("changed", []),
    }


def peak_rss_bytes() -> int:
    """Return the peak memory of this process, in bytes."""
    try:  # on Linux: ru_maxrss begins with the peak of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
