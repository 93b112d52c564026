"""Run folders: one run a folder, which says what ran, continues after a kill, and refuses to mix two runs.

    with Run(config.out, config, "select", overwrite=config.overwrite) as run:
        run.check({"data": {"train.jsonl": digest}})   # refuses to continue over changed data
        with run.stage("features"), progress("gradients", total=n, unit="rows") as bar:
            bar.advance(16)

Only rank 0 prints and writes here; other ranks pass through. Nothing here imports torch.
"""

import hashlib
import json
import math
import os
import platform
import re
import resource
import shlex
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from datatools import DataError, DatatoolsError, EnvironmentProblem, UsageError, files
from datatools.files import seals
from pipelines import texts
from pipelines.runs import run_files, threads
from pipelines.runs.run_files import shown as _shown
from pipelines.settings import redaction
from pipelines.settings.base import Json, Settings
from pipelines.settings.dump import as_dict, config_digest, dump, fingerprint, flatten
from pipelines.settings.load import load_config
from pipelines.texts import visible

DISTRIBUTION = "datatools-llm"
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "datasets", "accelerate")

# ------------------------------------------------------------------------------------------------------- small helpers


def rank() -> int:
    """The number of this process among the workers: RANK as torchrun sets it, 0 alone."""
    return _whole_number("RANK", 0)


def world_size() -> int:
    """How many workers there are: WORLD_SIZE as torchrun sets it, 1 alone."""
    return _whole_number("WORLD_SIZE", 1)


def alone(command: str) -> None:
    """Refuse to run `command` as several processes. Raises: UsageError."""
    if world_size() > 1:
        raise UsageError(
            f"{command} runs as one process, and WORLD_SIZE is {world_size()}; start it without torchrun "
            "(`datatools train` and datatools.extract share their work among processes, this does not yet)"
        )


def _whole_number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise EnvironmentProblem(
            f"environment variable {name} is {text!r}; expected a whole number, as torchrun sets it"
        )
    return int(text) if text else default


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed for one purpose, such as ("warmup", "rows"): 63 bits of blake2b over `seed` and `names`."""
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def slug(name: str, limit: int = 80) -> str:
    """A file name for any text from data: letters, digits, `._-`; changed names get a hash so that no two collide."""
    text = unicodedata.normalize("NFKC", name)
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-. ")
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", text)
    if text == name and 0 < len(text) <= limit and not reserved:
        return text
    tail = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{text[: limit - 10]}-{tail}" if text and not reserved else f"name-{tail}"


def redact(text: str, *, names: bool = True) -> str:
    """`text` without access tokens, values of secret environment variables, home folder; and user and host `names`."""
    text = redaction.hide(text)
    home = str(Path.home())
    if home != "/":
        text = re.sub(rf"{re.escape(home)}(?=/|\W|$)", "~", text)
    for name, mask in () if not names else ((os.environ.get("USER", ""), "<user>"), (platform.node(), "<host>")):
        if len(name) >= 3:
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", mask, text)
    return text


def command_line(*, names: bool = True) -> str:
    """The command that was typed, quoted for a shell and redacted."""
    return redact(shlex.join(["datatools", *sys.argv[1:]]), names=names)


def peak_rss_bytes() -> int:
    """The most memory this process has held, in bytes."""
    try:  # on Linux: ru_maxrss begins with the peak of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---------------------------------------------------------------------------------------------------------- interrupts


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that files are closed and the run says how to continue."""


_RETRY_SECONDS = 0.02
_PATIENCE_SECONDS = 5.0
_WRITERS = ("write", "append", "move", "_commit", "_write_all", "_sync_folder")


def _is_writing(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_filename == files.__file__ and code.co_name.startswith(_WRITERS):
            return True
        frame = frame.f_back
    return False


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C into KeyboardInterrupt and SIGTERM into `Terminated`, once, and after the write that is under way.

    A second signal within two seconds is taken for the same wish, so that cleaning up is not cut short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: dict[int, float] = {}
    raised_at = -1e9

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal raised_at
        now = time.monotonic()
        if now - raised_at < 2.0:
            return
        first = asked.setdefault(number, now)
        if _is_writing(frame) and now - first < _PATIENCE_SECONDS:
            again = threading.Timer(_RETRY_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        asked.pop(number, None)
        raised_at = now
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ screen and progress


class _Screen:
    """What is shown on stderr, and whether."""

    quiet = False
    bars: Any = None  # the rich display, shared by nested bars
    open_bars = 0


def set_quiet(quiet: bool) -> None:
    """Show warnings and errors only."""
    _Screen.quiet = quiet


def quiet() -> bool:
    """Whether only warnings and errors are shown."""
    return _Screen.quiet


def say(text: str) -> None:
    """One line of news on stderr, from rank 0 and unless quiet."""
    if not _Screen.quiet and rank() == 0:
        _print(text)


def warn(text: str) -> None:
    """`warning: text` on stderr from rank 0, even when quiet; also an event of the current run."""
    if rank() == 0:
        _print(f"warning: {text}")
        if Run.current is not None:
            Run.current.warnings.append(text)
            Run.current.event("warning", text=text)


@contextmanager
def library_warnings() -> Iterator[None]:
    """Inside, warnings of per-example gradients (a slower method had to be taken) are the run's own: see `warn`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="per-sample gradients")
        warnings.showwarning = lambda message, *_, **__: warn(str(message))
        yield


def _print(text: str) -> None:
    if _Screen.bars is not None:
        _Screen.bars.console.print(visible(text, keep="\n"), markup=False, highlight=False, soft_wrap=True)
    else:
        with suppress(BrokenPipeError):
            print(visible(text, keep="\n"), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """42.3 -> '42 s', 150 -> '2 min 30 s'; with plain spaces, for logs."""
    return texts.duration(seconds).replace(texts.NBSP, " ")


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"


class Ahead:
    """What is to come in a run: the estimated seconds of each part, by the label of its progress.

    How long finished parts took beside their estimates corrects those that are to come.
    """

    def __init__(self, parts: Mapping[str, float]) -> None:
        self.parts = dict(parts)
        self._took = self._guessed = 0.0

    def finish(self, label: str, seconds: float) -> None:
        """A part is over."""
        guess = self.parts.pop(label, None)
        if guess is not None:
            self._took, self._guessed = self._took + seconds, self._guessed + guess

    def left(self, label: str, seconds: float, share: float, eta: float | None) -> float:
        """Seconds to the end of the run, in the part `label`, which has run for so long and is at this share of its
        way; eta: what its own rate says is left of it.
        """
        guess = self.parts.get(label, 0.0)
        took, guessed = self._took + seconds * (guess > 0), self._guessed + guess * share
        pace = min(10.0, max(0.1, took / guessed)) if guessed > 0 and took > 0 else 1.0
        here = eta if eta is not None else pace * guess * (1 - share)
        return here + pace * sum(value for name, value in self.parts.items() if name != label)


class Progress:
    """How far a loop is. Made by `progress`; `advance` is cheap enough to call for every batch."""

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str,
        done: int = 0,
        *,
        line_seconds: float = 30.0,
        file_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self.notes: dict[str, Json] = {}
        self._first, self._clock, self._start = done, clock, clock()
        self._line_seconds, self._file_seconds = line_seconds, file_seconds
        self._next_line, self._next_file = self._start + line_seconds, self._start
        self._bar: Any = None

    def advance(self, n: int = 1, **notes: float | int | str) -> None:
        """`n` more are done; `notes` (loss=1.2, tokens=900) are shown and kept until replaced."""
        self.done += n
        self.notes |= notes
        now = self._clock()
        if self._bar is not None:
            _Screen.bars.update(self._bar, completed=self.done, detail=self._detail())
        elif now >= self._next_line:
            self._next_line = now + self._line_seconds
            say(self.line())
        if now >= self._next_file:
            self._next_file = now + self._file_seconds
            self._report("running")

    @property
    def rate(self) -> float | None:
        """Units a second since the start of this process."""
        seconds = self._clock() - self._start
        return (self.done - self._first) / seconds if seconds > 0 and self.done > self._first else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to go at the present rate."""
        rate = self.rate
        return None if self.total is None or rate is None else max(0, self.total - self.done) / rate

    @property
    def run_eta_seconds(self) -> float | None:
        """Seconds to the end of the whole run, where the run has said what is to come."""
        ahead = Run.current.ahead if Run.current is not None else None
        if ahead is None or not ahead.parts:
            return None
        share = min(1.0, self.done / self.total) if self.total else 0.0
        return ahead.left(self.description, self._clock() - self._start, share, self.eta_seconds)

    def _detail(self) -> str:
        parts = [f"{_count(self.rate)} {self.unit}/s"] if self.rate else []
        if self._bar is not None and (left := self.run_eta_seconds) is not None:
            parts.append(f"run {duration(left)} left")
        for name, value in self.notes.items():
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        return visible(", ".join(parts))

    def line(self) -> str:
        """`gradients: 120 of 1,000 rows (12 %), 4.1 rows/s, about 3 min 35 s left`."""
        share = f" of {_count(self.total)}" if self.total is not None else ""
        percent = f" ({100 * self.done // self.total} %)" if self.total else ""
        parts = [f"{self.description}: {_count(self.done)}{share} {self.unit}{percent}"]
        parts += [detail] if (detail := self._detail()) else []
        eta, whole = self.eta_seconds, self.run_eta_seconds
        if eta and whole is not None:
            parts.append(f"about {duration(eta)} left, {duration(max(eta, whole))} of the whole run")
        elif eta:
            parts.append(f"about {duration(eta)} left")
        return ", ".join(parts)

    def _report(self, state: str) -> None:
        if Run.current is not None:
            eta = self.eta_seconds
            Run.current.report_progress(
                state=state,
                eta_seconds=self.run_eta_seconds,
                doing={
                    "description": self.description,
                    "done": self.done,
                    "total": self.total,
                    "unit": self.unit,
                    "per_second": self.rate,
                    "eta_seconds": eta,
                    **({"notes": dict(self.notes)} if self.notes else {}),
                },
            )

    def _open(self) -> None:
        self._report("running")
        if _Screen.quiet or rank() != 0:
            self._next_line = float("inf")
            return
        if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        if _Screen.bars is None:
            _Screen.bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
                transient=True,
            )
            _Screen.bars.start()
        _Screen.open_bars += 1
        shown = visible(self.description)
        self._bar = _Screen.bars.add_task(shown, total=self.total, completed=self.done, detail="")

    def _close(self, failed: bool) -> None:
        if self._bar is not None:
            _Screen.bars.remove_task(self._bar)
            self._bar = None
            _Screen.open_bars -= 1
            if _Screen.open_bars == 0:
                _Screen.bars.stop()
                _Screen.bars = None
        seconds = self._clock() - self._start
        if not failed:
            if Run.current is not None and Run.current.ahead is not None:
                Run.current.ahead.finish(self.description, seconds)
            rate = f", {_count(self.rate)} {self.unit}/s" if self.rate else ""
            say(f"{self.description}: {_count(self.done)} {self.unit} in {duration(seconds)}{rate}")
        with suppress(DatatoolsError):
            self._report("running")


@contextmanager
def progress(description: str, total: int | None, unit: str = "rows", *, done: int = 0) -> Iterator[Progress]:
    """A bar with rate and time left on a terminal, else a line every 30 s; keeps the current run's progress.json fresh.

    `done` counts what an earlier attempt finished; it does not enter the rate.
    """
    bar = Progress(description, total, unit, done)
    bar._open()
    failed = True
    try:
        yield bar
        failed = False
    finally:
        bar._close(failed)


# ---------------------------------------------------------------------------------------------------------- provenance


def versions() -> dict[str, Json]:
    """Versions of this toolkit and of the libraries that compute; null where one is not installed."""
    found: dict[str, Json] = {"datatools": _version(DISTRIBUTION)}
    return found | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


_ROOT = Path(__file__).resolve().parents[2]
# What displays results and does not make them, by folder or file: editing it does not stop a run from being continued.
_SHOWING = tuple(
    f"pipelines/{place}"
    for place in "cli/ report/ __main__.py demo.py doctor.py listing.py texts.py select/explain.py".split()
)


def code_digest() -> str:
    """xxh3-128 over the source files that make results (names and bytes, sorted)."""
    parts = []
    for package in ("optim", "datatools", "pipelines"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            name = path.relative_to(_ROOT).as_posix()
            if not name.startswith(_SHOWING):
                parts.append(f"{name} {files.digest_file(path)}\n")
    return files.digest("".join(parts).encode())


def git_commit(root: Path = _ROOT) -> str | None:
    """The commit checked out in the repository at `root`, read from its files; None outside a repository."""
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
    """System, processor type and sizes; never the names of host or user."""
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


def digest_inputs(paths: Iterable[Path | str]) -> dict[str, Json]:
    """File name as it was given -> xxh3-128 of its bytes; a folder counts file by file. Raises: DataError."""
    found: dict[str, Json] = {}
    for given in paths:
        path = Path(given)
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            found[redact(str(file))] = files.digest_file(file)
    return found


# ----------------------------------------------------------------------------------------------------------- the folder

# What may lie in a folder that a killed run left before it wrote run.yaml.
_OURS = run_files.RECORDS | run_files.OPEN
# What reading the inputs leaves behind, before anything is made of them.
_INPUTS = {"inputs", "bad_rows.jsonl", "quarantine.jsonl"}
_BEFORE_CHANGE = "before-change-"


class Run:
    """A folder that one run owns: `run.yaml` replays it, `provenance.json` says with what, `progress.json` how far.

    Entering locks the folder and continues the run in it if the settings are the same. What the run has written is
    sealed (`datatools.files.seals`): a damaged result is set aside and computed again, an edited record is refused.
    Attributes: `folder`, `resumed`, `changed` (names of things that changed and were accepted), `lost` (names of files
    that were set aside), `warnings`, `stages` [{"name", "seconds"}] over all attempts.
    Raises: UsageError for other settings or a folder that holds something else; DataError for changed inputs;
    EnvironmentProblem for a folder in use or not writable.
    """

    current: "Run | None" = None
    last_folder: "Path | None" = None

    def __init__(self, folder: Path | str, config: Settings, command: str, overwrite: bool | None = None) -> None:
        self.folder = Path(folder)
        self.config, self.command = config, command
        self.overwrite = bool(getattr(config, "overwrite", False)) if overwrite is None else overwrite
        self.accept: tuple[str, ...] = tuple(getattr(config, "accept_change", ()))
        self.resumed = False
        self.changed: list[str] = []
        self.lost: list[str] = []
        self.warnings: list[str] = []
        self.stages: list[dict[str, Json]] = []
        self.provenance: dict[str, Any] = {}
        self._leads = rank() == 0
        self._stack = ExitStack()
        self._before: Run | None = None
        self.ahead: Ahead | None = None
        self._doing: Json = None
        self._inner: list[float] = []  # seconds of the stages inside each open one
        self._asks_anew = False  # continued with another value of a setting that is only read at the end
        self._started = time.monotonic()

    # ----------------------------------------------------------------------------------------------- enter and leave

    def __enter__(self) -> Self:
        self._before, Run.current = Run.current, self
        try:
            # libraries create files for everybody; nothing of a run is for others to write
            before = os.umask(0o077)
            os.umask(before | 0o022)
            self._stack.callback(os.umask, before)
            if self._leads:
                self._open()
            else:
                self._keep_threads(self._recorded())
        except BaseException:
            self._stack.close()
            Run.current = self._before
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            state = "done"
        else:
            state = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        try:
            if self._leads:
                if error is None:
                    self._finish(state, None)
                else:  # the error that ended the run is the one to show, even if the disk is full
                    with suppress(DatatoolsError):
                        self._finish(state, error)
        finally:
            Run.current = self._before
            self._stack.close()

    def _finish(self, state: str, error: BaseException | None) -> None:
        text = redact(f"{type(error).__name__}: {error}") if error is not None else None
        self._doing = None if error is None else self._doing
        self._save_provenance()
        self.report_progress(state=state, error=text)
        self.event(state, seconds=round(time.monotonic() - self._started, 3), **({"error": text} if text else {}))

    def _open(self) -> None:
        folder = self.folder
        self._refuse_odd_places()
        try:
            files.make_folder(folder.parent)
            files.make_folder(folder)
        except DatatoolsError as error:
            raise type(error)(f"--out: {error}") from error
        with files.folder_mutex(folder.parent):  # so that moving aside and locking are one step among several starters
            if self.overwrite and folder.is_dir() and any(folder.iterdir()):
                self._move_aside()
            files.make_folder(folder)
            self._stack.enter_context(files.lock_folder(folder))
        Run.last_folder = folder
        run_files.sweep(folder)
        self._refuse_others(forget=True)
        if not self.resumed:
            run_files.begin(folder)
        self._read_stages()
        self._write_provenance()
        if not self.resumed or self._asks_anew:
            files.write_text(folder / "run.yaml", self._yaml())
        self.event("continued" if self.resumed else "started", command=self.command)
        self.report_progress(state="running")

    def refuse(self) -> None:
        """Raise what entering the folder would raise, as far as the folder alone tells; writes nothing.

        Raises: UsageError, EnvironmentProblem, DataError, as entering does.
        """
        self._refuse_odd_places()
        if self.folder.is_dir():
            if self.overwrite:
                self._refuse_to_move()
            else:
                self._refuse_others(forget=False)

    def _refuse_others(self, *, forget: bool) -> None:
        """Continue the run in the folder, or refuse what else is in it.

        forget: compare its files with their seals, and remove a run that failed early; else nothing is touched.
        """
        folder = self.folder
        foreign = [entry.name for entry in folder.iterdir() if entry.name not in _OURS]
        foreign = [name for name in foreign if not name.startswith(".tmp-")]
        if (folder / "run.yaml").is_file():
            try:
                if forget:
                    self._verify()
                self._compare()
            except UsageError:
                if not self._failed_early(foreign, forget=forget):
                    raise
        elif foreign:
            raise UsageError(
                f"--out {_shown(folder)} is not empty and holds no run ({_shown(sorted(foreign)[0])} is in it); "
                "choose a new or an empty folder"
            )

    def _failed_early(self, found: list[str], *, forget: bool) -> bool:
        """Whether the run in the folder failed before it made anything (a slip in the command); if so, its traces go.

        Then the corrected command may use the same folder.
        """
        path = self.folder / "progress.json"
        if set(found) - _INPUTS or not path.is_file():
            return False
        state = files.read_json(path, limit=1_000_000)
        if not isinstance(state, dict) or state.get("state") != "failed":
            return False
        for name in ("run.yaml", "provenance.json", "events.jsonl", seals.NAME) if forget else ():
            if (self.folder / name).exists():
                files.remove(self.folder / name)
        return True

    def _verify(self) -> None:
        """Compare the files of the run with their seals, before any of them is believed."""
        folder = self.folder
        if "seals" in self.accept:
            run_files.adopt(folder)
            return
        if not run_files.is_sealed(folder):
            say(
                f"the run in {_shown(folder)} is of a version without seals: its files are taken as they are, and "
                "sealed from now on"
            )
            run_files.adopt(folder)
            return
        for name in run_files.damaged(folder):
            path = folder / name
            if (
                name == "run.yaml"
                and (text := self._yaml().encode())
                and seals.Seal(len(text), files.digest(text)) in seals.expected(path)
            ):
                files.write_bytes(path, text)
                say(f"{_shown(path)} was damaged or edited; it is written anew, with the settings that ran")
            elif name in run_files.RECORDS:
                raise DataError(f"{seals.refusal(path)}, or start anew with --overwrite")
            else:
                run_files.set_aside(path)
                self.lost.append(name)
                say(
                    f"{_shown(path)} is not what the run wrote (damaged or edited): set aside as "
                    f"{_shown(path.name)}.damaged, and made again"
                )

    def _refuse_odd_places(self) -> None:
        folder = self.folder
        if visible(str(folder)) != str(folder):
            raise UsageError(
                f"--out {_shown(folder)}: the name holds characters that are not seen, or bytes that are not UTF-8; "
                "choose a name that can be read"
            )
        with suppress(OSError, RuntimeError, ValueError):
            if folder.resolve() in (Path("/"), Path.home().resolve()):
                raise UsageError(f"--out {_shown(folder)}: a run needs a folder of its own; name one inside")
        try:
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"--out {_shown(folder)} is a file; expected a folder, new or of an earlier run")
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise EnvironmentProblem(f"--out {_shown(folder)}: no permission to write there; choose another folder")
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links, no permission above it
            reason = getattr(error, "strerror", None) or str(error)
            raise EnvironmentProblem(f"--out {_shown(folder)}: {reason}; choose another folder") from error

    def _refuse_to_move(self) -> bool:
        """Refuse to move a folder aside that is no run's, or that this process is in; False if there is no run."""
        folder = self.folder
        if not (folder / "run.yaml").is_file():
            if any(entry.name not in _OURS and not entry.name.startswith(".tmp-") for entry in folder.iterdir()):
                raise UsageError(
                    f"--overwrite: {_shown(folder)} holds no run (no run.yaml), so it is left alone; "
                    "choose another --out, or move it yourself"
                )
            return False
        here = Path.cwd().resolve()
        if folder.resolve() in (here, *here.parents):
            raise UsageError(f"--overwrite: {_shown(folder)} is the folder you are in; go to another one and run again")
        return True

    def _move_aside(self) -> None:
        folder = self.folder
        if not self._refuse_to_move():
            return
        with files.lock_folder(folder):  # refused while another process runs in it
            number = 1
            while os.path.lexists(aside := folder.with_name(f"{folder.name}.old-{number}")):
                number += 1
            files.move(folder, aside)
        files.remove(aside / ".lock")
        say(f"moved the earlier run to {aside}")

    def _yaml(self) -> str:
        replay = shlex.join(["datatools", self.command, redact(str(self.folder / "run.yaml"), names=False)])
        return f"# Replays this run: {replay}\n{dump(self.config)}"

    def _compare(self) -> None:
        """Continue the run in the folder, or say in which settings it differs."""
        path = self.folder / "run.yaml"
        aside = f"choose another --out, or --overwrite to move it to {_shown(self.folder)}.old-N"
        first_line = files.read_bytes(path, limit=1_000_000).decode("utf-8", "replace").partition("\n")[0]
        match = re.match(r"# Replays this run: datatools ([a-z-]+) ", first_line)
        if match and match[1] != self.command:
            raise UsageError(
                f"{_shown(self.folder)} holds a run of `datatools {match[1]}`, not {self.command}; {aside}"
            )
        try:
            before = load_config(type(self.config), path, wanted=())  # only compared with what was asked for
        except UsageError as error:
            raise UsageError(f"the run in {_shown(self.folder)} cannot be continued: {error}; {aside}") from error
        old, new = fingerprint(before), fingerprint(self.config)
        differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if differing:
            shown = [f"{n} was {_value(old.get(n))}, is {_value(new.get(n))}" for n in differing[:5]]
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise UsageError(
                f"{_shown(self.folder)} holds a run with other settings: {'; '.join(shown)}{more}. "
                f"Use its settings to continue it, {aside}"
            )
        self.resumed = True
        kept = [as_dict(config, leave_out=("volatile", "elsewhere")) for config in (before, self.config)]
        self._asks_anew = kept[0] != kept[1]

    # ----------------------------------------------------------------------------------------------------- provenance

    def _write_provenance(self) -> None:
        path = self.folder / "provenance.json"
        found: Any = {}
        if self.resumed and path.is_file():
            found = files.read_json(path, limit=64_000_000)
            if not isinstance(found, dict) or not isinstance(found.get("facts", {}), dict):
                raise DataError(f"{_shown(path)} is damaged; restore it, or remove it to continue without its checks")
        fresh: dict[str, Any] = {
            "format": run_files.SEALED_SINCE,
            "command": self.command,
            "argv": [redact(argument) for argument in sys.argv[1:]],
            "created": found.get("created") or _now(),
            "updated": _now(),
            "config_digest": config_digest(self.config),
            "seed": getattr(self.config, "seed", None),
            "versions": versions(),
            "git_commit": git_commit(),
            "machine": machine(),
            "world_size": world_size(),
            "facts": found.get("facts", {}),
            "changed": found.get("changed", []),
        }
        old_versions = found.get("versions") or {}
        moved = [
            n for n, v in fresh["versions"].items() if n in old_versions and old_versions[n] != v and n != "datatools"
        ]
        self.provenance = fresh
        for name in moved:
            warn(f"{name} is {fresh['versions'][name]} and was {old_versions[name]} when this run began")
            self._note_change(f"versions.{name}", old_versions[name], fresh["versions"][name])
        self._keep_threads(found)
        facts: dict[str, Json] = {"code": {"version": _version(DISTRIBUTION), "digest": code_digest()}}
        if "torch" in sys.modules:  # else nothing in this process can compute with it
            facts["numerics"] = _numerics().facts()
        self.check(facts)
        self._save_provenance()

    def _recorded(self) -> Any:
        path = self.folder / "provenance.json"
        return files.read_json(path, limit=64_000_000) if path.is_file() else {}

    def _keep_threads(self, provenance: Any) -> None:
        """Go on with the number of threads that the run began with; each worker reads it for itself."""
        facts = provenance.get("facts") if isinstance(provenance, dict) else None
        if isinstance(facts, dict) and "torch" in sys.modules and "numerics" not in self.accept:
            _numerics().keep_threads(facts.get("numerics"))

    def _save_provenance(self) -> None:
        files.write_json(self.folder / "provenance.json", self.provenance)

    def _note_change(self, name: str, old: Json, new: Json) -> None:
        self.changed.append(name)
        self.provenance["changed"].append({"what": name, "old": old, "new": new, "when": _now()})

    def check(self, facts: Mapping[str, Json], by_content: Collection[str] = ()) -> list[str]:
        """Record facts about the world (digests of data, model, tokenizer, template), and compare on a continued run.

        A fact that differs from what the run began with is refused by name, unless its name or its first part is in the
        configuration's `accept_change`; then it replaces the old one and its name is returned, and what was made of
        the old one is set aside, so that everything is of the new one.

        Args:
            facts: by group (code, model, data, ...), flat or nested.
            by_content: groups whose results are kept under the content that they were made of: nothing of theirs is
                set aside, because what still applies is found and the rest is computed. Code always counts as one.

        Raises: DataError naming what changed, with old and new value.

        """
        if not self._leads:
            return []
        facts = redaction.hide_all(dict(facts))
        known: dict[str, Any] = self.provenance["facts"]
        accepted, refused, outdated = [], [], []
        for group, value in facts.items():
            new = {(group, part): v for part, v in flatten(value).items()}
            stored = flatten(known[group]) if group in known else {}
            old = {(group, part): v for part, v in stored.items()}
            differing = [key for key in {**old, **new} if group in known and old.get(key) != new.get(key)]
            for key in differing:
                name = ".".join(part for part in key if part)
                if self.accept and {name, group} & set(self.accept):
                    accepted.append(name)
                    if group not in (*by_content, "code", "numerics"):  # those two: what is there is gone on with
                        outdated.append(name)
                    self._note_change(name, old.get(key), new.get(key))
                else:
                    refused.append((group, name, old.get(key), new.get(key)))
        if refused:
            shown = [f"{name} was {_value(was)}, is {_value(now)}" for _, name, was, now in refused[:4]]
            more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
            accept = " ".join(f"--accept-change {group}" for group in dict.fromkeys(group for group, *_ in refused))
            raise DataError(
                f"changed since the run in {_shown(self.folder)} began: {'; '.join(shown)}{more}. Restore it, start "
                f"anew with another --out or --overwrite, or go on all the same with {accept}"
            )
        if outdated:
            self._set_results_aside(outdated)
        self.provenance["facts"] = known | dict(facts)
        self._save_provenance()
        return accepted

    def _set_results_aside(self, changed: Sequence[str]) -> None:
        """Move what the run has made so far to `before-change-N` in its folder, but for what was read just now."""
        kept = _OURS | _INPUTS
        names = [entry.name for entry in sorted(self.folder.iterdir()) if entry.name not in kept]
        names = [name for name in names if not name.startswith((_BEFORE_CHANGE, seals.TEMPORARY))]
        if not names:
            return
        number = 1
        while (aside := self.folder / f"{_BEFORE_CHANGE}{number}").exists():
            number += 1
        files.make_folder(aside)
        for name in names:
            files.move(self.folder / name, aside / name)
        self.stages.clear()
        say(f"{', '.join(changed[:3])} changed: what was made before is in {_shown(aside)}, and is made again")

    # -------------------------------------------------------------------------------------- events, stages, progress

    def path(self, *parts: str) -> Path:
        """A path inside the folder. Raises: UsageError if it would leave it (use `slug` for names from data)."""
        relative = Path(*parts)
        if relative.is_absolute() or ".." in relative.parts or "\0" in str(relative):
            raise UsageError(f"{_shown(relative)} is not a path inside the run folder {_shown(self.folder)}")
        return self.folder / relative

    def event(self, kind: str, /, **fields: Json) -> None:
        """One line in events.jsonl, stamped with the time."""
        if self._leads:
            files.append_line(self.folder / "events.jsonl", _summed({"time": _now(), "event": kind, **fields}))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A named part of the run: announced, timed, logged. Its seconds add up over attempts in `stages`."""
        say(f"{name} ...")
        self.event("stage", name=name)
        start = time.monotonic()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = time.monotonic() - start
            seconds = round(max(0.0, whole - self._inner.pop()), 3)  # a stage inside counts its own
            if self._inner:
                self._inner[-1] += whole
            self._add_stage(name, seconds)
            with suppress(DatatoolsError):
                self.event("stage_end", name=name, seconds=seconds)

    def expect(self, parts: Mapping[str, float]) -> None:
        """Say what is to come, as estimated seconds by the label of its progress: see `Ahead`."""
        self.ahead = Ahead(parts)

    @property
    def seconds(self) -> float:
        """Of all stages, over all attempts."""
        return math.fsum(seconds for entry in self.stages if isinstance(seconds := entry["seconds"], float))

    def _add_stage(self, name: str, seconds: float) -> None:
        for entry in self.stages:
            if entry["name"] == name:
                before = entry["seconds"]
                entry["seconds"] = round((before if isinstance(before, float) else 0.0) + seconds, 3)
                return
        self.stages.append({"name": name, "seconds": float(seconds)})

    def _read_stages(self) -> None:
        path = self.folder / "events.jsonl"
        if not path.is_file():
            return
        lines = files.read_bytes(path, limit=1 << 30).split(b"\n")
        if lines[-1]:  # a kill cut it
            files.write_bytes(path, b"".join(line + b"\n" for line in lines[:-1]), seal=False)
        damaged = 0
        open_since: dict[str, datetime] = {}
        for line in lines[:-1]:
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line) if line else {"event": ""}
                if "sum" in entry and _summed({k: v for k, v in entry.items() if k != "sum"}).encode() != line:
                    raise ValueError
                if entry["event"] == "stage_end":
                    self._add_stage(str(entry["name"]), float(entry["seconds"]))
                    open_since.pop(str(entry["name"]), None)
                elif entry["event"] in ("started", "continued"):
                    open_since = {}
                elif entry["event"] == "stage":
                    open_since[str(entry["name"])] = datetime.fromisoformat(entry["time"])
                continue
            damaged += 1
        if damaged:
            say(f"{_shown(path)}: {damaged} damaged lines are passed over; the times of stages may lack some")
        if open_since:
            self._count_killed(open_since)

    def _count_killed(self, open_since: Mapping[str, datetime]) -> None:
        """A killed attempt ended no stage: what it spent in the last one counts, up to its last sign of life."""
        with suppress(DatatoolsError, ValueError, KeyError, TypeError):
            seen = datetime.fromisoformat(files.read_json(self.folder / "progress.json", limit=1_000_000)["updated"])
            name = max(open_since, key=lambda stage: open_since[stage])
            seconds = (seen - open_since[name]).total_seconds()
            if seconds > 0:
                self._add_stage(name, round(seconds, 3))
                self.event("stage_end", name=name, seconds=round(seconds, 3), killed=True)

    def report_progress(
        self, *, state: str, doing: Json = None, error: str | None = None, eta_seconds: float | None = None
    ) -> None:
        """Replace progress.json; other tools may poll it."""
        if not self._leads:
            return
        self._doing = doing if doing is not None else self._doing
        value = {
            "state": state,
            "command": self.command,
            "updated": _now(),
            "seconds": round(time.monotonic() - self._started, 1),
            "doing": self._doing,
            **({"eta_seconds": round(eta_seconds, 1)} if eta_seconds is not None else {}),
            **({"error": error} if error else {}),
        }
        files.write_json(self.folder / "progress.json", value, durable=False)


def _numerics() -> Any:
    from pipelines.runs import numerics  # which imports torch

    return numerics


def _summed(entry: dict[str, Json]) -> str:
    """An event as a line, with a checksum of the rest as its last field."""
    text = json.dumps(entry, ensure_ascii=True)
    return json.dumps({**entry, "sum": files.digest(text.encode())[:16]}, ensure_ascii=True)


def _value(value: Json) -> str:
    text = visible(json.dumps(value, ensure_ascii=False)) if value is not None else "none"
    return text if len(text) <= 60 else text[:57] + "..."


def how_to_continue() -> str:
    """What to type after an interrupt, for the command line."""
    command = command_line(names=False)
    if Run.last_folder is not None:
        return f"finished work is kept in {_shown(Run.last_folder)}; the same command continues it: {command}"
    return f"nothing was left half-written; run it again with: {command}"
