"""Run folders: one folder per run, which records what ran, continues after a kill, and refuses to mix two runs.

    with Run(config.out, config, "select", overwrite=config.overwrite) as run:
        run.check({"data": {"train.jsonl": digest}})   # refuses to continue with changed data
        with run.stage("features"), progress("gradients", total=n, unit="rows") as bar:
            bar.advance(16)

Only the process that leads prints and writes here: RANK 0, or the leader of a team. No import here loads torch.
"""

import os
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from datatools import DataError, DatatoolsError, UsageError, files
from pipelines.runs import check, current, following, places, provenance, run_files
from pipelines.runs.ahead import Ahead
from pipelines.runs.events import PROGRESS, Events, now, with_sum
from pipelines.runs.messages import warn
from pipelines.runs.redact import redact
from pipelines.runs.run_files import shown
from pipelines.runs.workers import helps, leads
from pipelines.settings import redaction
from pipelines.settings.base import Json, Settings
from pipelines.settings.dump import dump

S = TypeVar("S", bound=Settings)


class Run:
    """A folder that belongs to one run, with `run.yaml` (to repeat it), `provenance.json` and `progress.json`.

    Entering locks the folder and continues the run in it if the settings are the same. The files that the run has
    written are sealed (`datatools.files.seals`): a damaged result is set aside and computed again, and an edited
    record is refused.

    Args:
        folder: The folder of the run; it is created if it is missing.
        config: The settings.
        command: The command that runs, such as `select`.
        overwrite: Whether to move an earlier run in the folder aside; by default `config.overwrite`.

    Attributes:
        folder: The folder of the run.
        resumed: Whether an earlier attempt is continued.
        accept: Names of facts that may have changed.
        changed: Names of facts that have changed and were accepted.
        lost: Names of files that were set aside because they were damaged.
        warnings: Texts of the warnings so far.
        provenance: The content of provenance.json.
        ahead: The parts that have not finished yet, after the run has stated them.

    Raises:
        UsageError: On entering: other settings, or a folder that contains something else.
        DataError: On entering: changed inputs or an edited record.
        EnvironmentProblem: On entering: the folder is in use or cannot be written to.
    """

    def __init__(self, folder: Path | str, config: Settings, command: str, overwrite: bool | None = None) -> None:
        self.folder = Path(folder)
        self.config, self.command = config, command
        self.overwrite = bool(getattr(config, "overwrite", False)) if overwrite is None else overwrite
        self.accept: tuple[str, ...] = tuple(getattr(config, "accept_change", ()))
        self.resumed = False
        self.changed: list[str] = []
        self.lost: list[str] = []
        self.warnings: list[str] = []
        self.provenance: dict[str, Any] = {}
        self.ahead: Ahead | None = None
        self._leads = leads()
        self._events = Events(self.folder, writes=self._leads)
        self._stack = ExitStack()
        self._doing: Json = None
        self._asks_anew = False  # a setting that is only read at the end has another value
        self._started = time.monotonic()

    # ----------------------------------------------------------------------------------------------- enter and leave

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # undone when entering fails
            stack.enter_context(current.listening(self))
            # libraries create files that others may write; no file of a run may be one
            before = os.umask(0o077)
            os.umask(before | 0o022)
            stack.callback(os.umask, before)
            if self._leads:
                self._open(stack)
            else:
                if helps():
                    self.provenance = following.join(self.folder)
                self._keep_threads(self._recorded())
                if helps():
                    following.compare(self.folder, redaction.hide_all(_own_facts()), self.accept, early=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            state = "done"
        else:
            state = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        with self._stack:
            if self._leads:
                if error is None:
                    self._finish(state, None)
                else:  # show the error that ended the run, even if the disk is full
                    with suppress(DatatoolsError):
                        self._finish(state, error)

    def _finish(self, state: str, error: BaseException | None) -> None:
        text = redact(f"{type(error).__name__}: {error}") if error is not None else None
        self._doing = None if error is None else self._doing
        self._save_provenance()
        self.report_progress(state=state, error=text)
        self.event(state, seconds=round(time.monotonic() - self._started, 3), **({"error": text} if text else {}))

    def _open(self, stack: ExitStack) -> None:
        folder = self.folder
        places.refuse_odd(folder)
        try:
            files.make_folder(folder.parent)
            files.make_folder(folder)
        except DatatoolsError as error:
            raise type(error)(f"--out: {error}") from error
        with files.folder_mutex(folder.parent):  # so that moving aside and locking are one step among several starters
            if self.overwrite and folder.is_dir() and any(folder.iterdir()):
                places.move_aside(folder)
            files.make_folder(folder)
            stack.enter_context(files.lock_folder(folder))
        current.opened(folder)
        run_files.sweep(folder)
        self._refuse_others(forget=True)
        if not self.resumed:
            run_files.begin(folder)
        self._events.read()
        self._write_provenance()
        if not self.resumed or self._asks_anew:
            files.write_text(folder / "run.yaml", self._yaml())
        self.event("continued" if self.resumed else "started", command=self.command)
        self.report_progress(state="running")
        if not self.accept:  # otherwise files may be set aside while the inputs are recorded
            following.welcome(folder)

    def refuse(self) -> None:
        """Raise the errors that entering the folder would raise, as far as the folder alone shows them; writes nothing.

        Raises:
            UsageError: The folder contains another run or something else.
            EnvironmentProblem: The folder cannot be written to.
            DataError: A record was damaged.
        """
        places.refuse_odd(self.folder)
        if self.folder.is_dir():
            if self.overwrite:
                places.refuse_to_move(self.folder)
            else:
                self._refuse_others(forget=False)

    def _refuse_others(self, *, forget: bool) -> None:
        """Continue the run in the folder, or refuse other content.

        Args:
            forget: Whether to compare the files with their seals and to remove a run that failed early; otherwise
                nothing is changed.
        """
        folder = self.folder
        foreign = places.foreign(folder)
        if (folder / "run.yaml").is_file():
            try:
                if forget:
                    self.lost += check.contents(folder, self._yaml(), accept=self.accept)
                self._asks_anew = check.settings(folder, self.config, self.command)
                self.resumed = True
            except UsageError:
                if not places.failed_early(folder, forget=forget):
                    raise
        elif foreign:
            raise UsageError(
                f"--out {shown(folder)} is not empty and contains no run ({shown(sorted(foreign)[0])} is in it); "
                "choose a new or an empty folder"
            )

    def _yaml(self) -> str:
        replay = shlex.join(["datatools", self.command, redact(str(self.folder / "run.yaml"), names=False)])
        return f"# Replays this run: {replay}\n{dump(self.config)}"

    # ----------------------------------------------------------------------------------------------------- provenance

    def _write_provenance(self) -> None:
        path = self.folder / "provenance.json"
        found: Any = self._recorded() if self.resumed else {}
        if not isinstance(found, dict) or not isinstance(found.get("facts", {}), dict):
            raise DataError(f"{shown(path)} is damaged; restore it, or remove it to continue without its checks")
        self.provenance = fresh = provenance.record(self.command, self.config, found)
        known, processes = fresh["facts"].get("numerics"), found.get("world_size")
        if isinstance(known, dict) and type(processes) is int and processes > 1:  # the fact is younger than the record
            known.setdefault("processes", processes)
        old_versions = found.get("versions") or {}
        for name, version in fresh["versions"].items():
            if name != "datatools" and name in old_versions and old_versions[name] != version:
                warn(f"{name} is {version} and was {old_versions[name]} when this run began")
                self._note_change(f"versions.{name}", old_versions[name], version)
        self._keep_threads(found)
        self.check(_own_facts())
        self._save_provenance()

    def _recorded(self) -> Any:
        path = self.folder / "provenance.json"
        return files.read_json(path, limit=64_000_000) if path.is_file() else {}

    def _keep_threads(self, recorded: Any) -> None:
        """Keep the number of threads with which the run began; each worker reads it from the run folder."""
        facts = recorded.get("facts") if isinstance(recorded, dict) else None
        if isinstance(facts, dict) and "torch" in sys.modules and "numerics" not in self.accept:
            _numerics().keep_threads(facts.get("numerics"))

    def _save_provenance(self) -> None:
        files.write_json(self.folder / "provenance.json", self.provenance)

    def _note_change(self, name: str, old: Json, new: Json) -> None:
        self.changed.append(name)
        self.provenance["changed"].append({"what": name, "old": old, "new": new, "when": now()})

    def check(self, facts: Mapping[str, Json], by_content: Collection[str] = ()) -> list[str]:
        """Record facts (digests of data, model, tokenizer, template), and compare them when a run continues.

        A fact that differs from the recorded one is refused by name, unless the fact or its group is in
        `accept_change`. An accepted fact replaces the recorded one, and the results that depend on it are set aside,
        so that all results of the run come from the new fact.

        Args:
            facts: Facts by group (code, model, data, ...), flat or nested.
            by_content: Groups whose results are stored by the content that they were computed from. Their results are
                not set aside: results that still apply are found, and the others are computed. Code always counts as
                one.

        Returns:
            Names of the facts that have changed and were accepted.

        Raises:
            DataError: Another fact has changed, or differs from the leader's of a team; the message gives its name and
                both values.
        """
        facts = redaction.hide_all(dict(facts))
        if not self._leads:
            if helps():
                following.compare(self.folder, facts, self.accept)
            return []
        known: dict[str, Any] = self.provenance["facts"]
        changes = check.facts(known, facts, accept=self.accept, by_content=by_content, folder=self.folder)
        for change in changes.accepted:
            self._note_change(*change)
        if changes.outdated:
            self.set_aside(changes.outdated)
        self.provenance["facts"] = known | dict(facts)
        self._save_provenance()
        return [name for name, _, _ in changes.accepted]

    def accepts(self, group: str) -> bool:
        """Return whether the user has accepted, now or in an earlier attempt, that facts of a group differ.

        Args:
            group: The name of the group.
        """
        changed = [str(change.get("what", "")) for change in self.provenance.get("changed", [])]
        return any(name.partition(".")[0] == group for name in (*self.accept, *changed))

    def set_aside(self, changed: Sequence[str]) -> None:
        """Move the existing results to `before-change-N` in the run folder, so that they are computed again.

        Args:
            changed: Names of the changed facts, for the message.
        """
        if check.set_results_aside(self.folder, changed):
            self._events.stages.clear()

    # -------------------------------------------------------------------------------------- events, stages, progress

    def path(self, *parts: str) -> Path:
        """Return a path inside the folder.

        Args:
            *parts: The parts of the path.

        Raises:
            UsageError: The path would leave the folder.
        """
        relative = Path(*parts)
        if relative.is_absolute() or ".." in relative.parts or "\0" in str(relative):
            raise UsageError(f"{shown(relative)} is not a path inside the run folder {shown(self.folder)}")
        return self.folder / relative

    def event(self, kind: str, /, **fields: Json) -> None:
        """Append one line with a time stamp to events.jsonl.

        Args:
            kind: The kind of event.
            **fields: Further values of the event.
        """
        self._events.add(kind, **fields)

    def warned(self, text: str) -> None:
        """Keep a warning; see `messages.warn`.

        Args:
            text: The text of the warning.
        """
        self.warnings.append(text)
        self.event("warning", text=text)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Return the context of a named part of the run, which is announced, timed and logged.

        Args:
            name: The name of the stage. Its seconds add up over attempts in `stages`.
        """
        return self._events.stage(name)

    @property
    def stages(self) -> list[dict[str, Json]]:
        """`{"name", "seconds"}` per stage, over all attempts."""
        return self._events.stages

    @property
    def seconds(self) -> float:
        """Seconds of all stages, over all attempts."""
        return self._events.seconds

    def expect(self, parts: Mapping[str, float]) -> None:
        """State the parts of the run that are still to come; see `Ahead`.

        Args:
            parts: Estimated seconds, by the label of the part's progress.
        """
        self.ahead = Ahead(parts)

    def report_progress(
        self, *, state: str, doing: Json = None, error: str | None = None, eta_seconds: float | None = None
    ) -> None:
        """Replace progress.json, which other tools may poll.

        Args:
            state: The state of the run, such as "running".
            doing: The progress of the current loop as plain values; None keeps the last one.
            error: The error that ended the run.
            eta_seconds: Estimated seconds until the end of the run; None if unknown.
        """
        if not self._leads:
            return
        self._doing = doing if doing is not None else self._doing
        value = {
            "state": state,
            "command": self.command,
            "updated": now(),
            "seconds": round(time.monotonic() - self._started, 1),
            "doing": self._doing,
            **({"eta_seconds": round(eta_seconds, 1)} if eta_seconds is not None else {}),
            **({"error": error} if error else {}),
        }
        files.write_json(self.folder / PROGRESS, with_sum(value), durable=False)


@contextmanager
def in_scratch(config: S) -> Iterator[S]:
    """Yield the settings to run with; a dry run gets a temporary `out`, because it must leave nothing behind.

    Args:
        config: The settings of the command.
    """
    if not getattr(config, "dry_run", False):
        yield config
        return
    with files.scratch_folder() as scratch:
        yield config.model_copy(update={"out": scratch / "run", "overwrite": False})


def _own_facts() -> dict[str, Json]:
    """Return the facts about the code and, if this process computes with torch, its numerics."""
    code = {"version": provenance.version(provenance.DISTRIBUTION), "digest": provenance.code_digest()}
    return {"code": code} | ({"numerics": _numerics().facts()} if "torch" in sys.modules else {})


def _numerics() -> Any:
    from pipelines.runs import numerics  # which imports torch

    return numerics
