"""Run folders: one folder per run, which says what ran, continues after a kill, and refuses to mix two runs.

    with Run(config.out, config, "select", overwrite=config.overwrite) as run:
        run.check({"data": {"train.jsonl": digest}})   # refuses to continue over changed data
        with run.stage("features"), progress("gradients", total=n, unit="rows") as bar:
            bar.advance(16)

Only rank 0 prints and writes here; other ranks pass through. Nothing here imports torch.
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
from pipelines.runs import check, current, places, provenance, run_files
from pipelines.runs.ahead import Ahead
from pipelines.runs.events import Events, now
from pipelines.runs.messages import warn
from pipelines.runs.redact import redact
from pipelines.runs.run_files import shown
from pipelines.runs.workers import rank
from pipelines.settings import redaction
from pipelines.settings.base import Json, Settings
from pipelines.settings.dump import dump

S = TypeVar("S", bound=Settings)


class Run:
    """A folder that one run owns: `run.yaml` replays it, `provenance.json` says with what, `progress.json` how far.

    Entering locks the folder and continues the run in it if the settings are the same. What the run has written is
    sealed (`datatools.files.seals`): a damaged result is set aside and computed again, an edited record is refused.

    Args:
        folder: of the run; made where it is missing.
        config: the settings.
        command: whose run it is, such as `select`.
        overwrite: move an earlier run in the folder aside; by default as `config.overwrite` says.

    Attributes:
        folder: of the run.
        resumed: whether an earlier attempt is continued.
        accept: names of facts that may have changed.
        changed: names of things that have changed and were accepted.
        lost: names of files that were set aside because they were damaged.
        warnings: texts of the warnings so far.
        provenance: the content of provenance.json.
        ahead: what is still to come, once the run has said it.

    Raises:
        UsageError: On entering: other settings, or a folder that holds something else.
        DataError: On entering: changed inputs or an edited record.
        EnvironmentProblem: On entering: the folder is in use, or cannot be written to.

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
        self._leads = rank() == 0
        self._events = Events(self.folder, writes=self._leads)
        self._stack = ExitStack()
        self._doing: Json = None
        self._asks_anew = False  # continued with another value of a setting that is only read at the end
        self._started = time.monotonic()

    # ----------------------------------------------------------------------------------------------- enter and leave

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # undone when entering fails
            stack.enter_context(current.listening(self))
            # libraries create files for everybody; nothing of a run is for others to write
            before = os.umask(0o077)
            os.umask(before | 0o022)
            stack.callback(os.umask, before)
            if self._leads:
                self._open(stack)
            else:
                self._keep_threads(self._recorded())
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
                else:  # the error that ended the run is the one to show, even if the disk is full
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

    def refuse(self) -> None:
        """Raise what entering the folder would raise, as far as the folder alone tells; writes nothing.

        Raises:
            UsageError: As entering does; so are the others.
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
        """Continue the run in the folder, or refuse what else is in it.

        Args:
            forget: compare its files with their seals, and remove a run that failed early; else nothing is touched.

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
                f"--out {shown(folder)} is not empty and holds no run ({shown(sorted(foreign)[0])} is in it); "
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
        old_versions = found.get("versions") or {}
        for name, version in fresh["versions"].items():
            if name != "datatools" and name in old_versions and old_versions[name] != version:
                warn(f"{name} is {version} and was {old_versions[name]} when this run began")
                self._note_change(f"versions.{name}", old_versions[name], version)
        self._keep_threads(found)
        code: dict[str, Json] = {
            "version": provenance.version(provenance.DISTRIBUTION),
            "digest": provenance.code_digest(),
        }
        facts: dict[str, Json] = {"code": code}
        if "torch" in sys.modules:  # else nothing in this process can compute with it
            facts["numerics"] = _numerics().facts()
        self.check(facts)
        self._save_provenance()

    def _recorded(self) -> Any:
        path = self.folder / "provenance.json"
        return files.read_json(path, limit=64_000_000) if path.is_file() else {}

    def _keep_threads(self, recorded: Any) -> None:
        """Go on with the number of threads that the run began with; each worker reads it for itself."""
        facts = recorded.get("facts") if isinstance(recorded, dict) else None
        if isinstance(facts, dict) and "torch" in sys.modules and "numerics" not in self.accept:
            _numerics().keep_threads(facts.get("numerics"))

    def _save_provenance(self) -> None:
        files.write_json(self.folder / "provenance.json", self.provenance)

    def _note_change(self, name: str, old: Json, new: Json) -> None:
        self.changed.append(name)
        self.provenance["changed"].append({"what": name, "old": old, "new": new, "when": now()})

    def check(self, facts: Mapping[str, Json], by_content: Collection[str] = ()) -> list[str]:
        """Record facts about the world (digests of data, model, tokenizer, template), and compare on a continued run.

        A fact that differs from what the run began with is refused by name, unless its name or its first part is in the
        configuration's `accept_change`; then it replaces the old one, and what was made of the old one is set aside, so
        that everything is of the new one.

        Args:
            facts: by group (code, model, data, ...), flat or nested.
            by_content: groups whose results are kept under the content that they were made of: nothing of theirs is
                set aside, because what still applies is found and the rest is computed. Code always counts as one.

        Returns:
            Names of the facts that have changed and were accepted.

        Raises:
            DataError: Something else has changed; names it, with old and new value.

        """
        if not self._leads:
            return []
        facts = redaction.hide_all(dict(facts))
        known: dict[str, Any] = self.provenance["facts"]
        changes = check.facts(known, facts, accept=self.accept, by_content=by_content, folder=self.folder)
        for change in changes.accepted:
            self._note_change(*change)
        if changes.outdated:
            self.set_aside(changes.outdated)
        self.provenance["facts"] = known | dict(facts)
        self._save_provenance()
        return [name for name, _, _ in changes.accepted]

    def set_aside(self, changed: Sequence[str]) -> None:
        """Move what the run has made so far to `before-change-N` in its folder, so that it is made again.

        Args:
            changed: names of what has changed, for the message.

        """
        if check.set_results_aside(self.folder, changed):
            self._events.stages.clear()

    # -------------------------------------------------------------------------------------- events, stages, progress

    def path(self, *parts: str) -> Path:
        """A path inside the folder.

        Raises:
            UsageError: It would leave the folder.

        """
        relative = Path(*parts)
        if relative.is_absolute() or ".." in relative.parts or "\0" in str(relative):
            raise UsageError(f"{shown(relative)} is not a path inside the run folder {shown(self.folder)}")
        return self.folder / relative

    def event(self, kind: str, /, **fields: Json) -> None:
        """Append one line to events.jsonl, stamped with the time."""
        self._events.add(kind, **fields)

    def warned(self, text: str) -> None:
        """Keep a warning: see `messages.warn`."""
        self.warnings.append(text)
        self.event("warning", text=text)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """A named part of the run: announced, timed, logged. Its seconds add up over attempts in `stages`."""
        return self._events.stage(name)

    @property
    def stages(self) -> list[dict[str, Json]]:
        """`{"name", "seconds"}` per stage, over all attempts."""
        return self._events.stages

    @property
    def seconds(self) -> float:
        """Of all stages, over all attempts."""
        return self._events.seconds

    def expect(self, parts: Mapping[str, float]) -> None:
        """Say what is to come, as estimated seconds by the label of its progress: see `Ahead`."""
        self.ahead = Ahead(parts)

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
            "updated": now(),
            "seconds": round(time.monotonic() - self._started, 1),
            "doing": self._doing,
            **({"eta_seconds": round(eta_seconds, 1)} if eta_seconds is not None else {}),
            **({"error": error} if error else {}),
        }
        files.write_json(self.folder / "progress.json", value, durable=False)


@contextmanager
def in_scratch(config: S) -> Iterator[S]:
    """`config`, and for a dry run one whose `out` is a folder that is thrown away: it must leave nothing behind."""
    if not getattr(config, "dry_run", False):
        yield config
        return
    with files.scratch_folder() as scratch:
        yield config.model_copy(update={"out": scratch / "run", "overwrite": False})


def _numerics() -> Any:
    from pipelines.runs import numerics  # which imports torch

    return numerics
