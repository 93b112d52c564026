"""What a command reads before it works: rows, with the model that encodes them, compared with what its run began with.

    inputs = Inputs(run, config.model, loaded)
    pool = inputs.read("pool", config.train, group="data", bad_rows=True)
    target = inputs.read_like("target", config.train, config.target, config.target_columns)
    inputs.record(by_content=("data", "target"), grows=("data",))

Five commands do this: select, train, order, audit and diagnose.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import xxhash

from pipelines.models.limits import ModelLimits
from pipelines.rows.prepare import prepare, target_data
from pipelines.rows.rows import Rows
from pipelines.runs.folder import Run
from pipelines.runs.messages import say
from pipelines.runs.redact import redact
from pipelines.settings.base import Columns, Json
from pipelines.settings.parts import DataConfig, ModelConfig


class Encodes(Protocol):
    """What of a model reads rows: a loaded model, or only its tokenizer."""

    @property
    def tokenizer(self) -> object: ...  # noqa: D102

    @property
    def digests(self) -> Mapping[str, str]: ...  # noqa: D102

    @property
    def limits(self) -> ModelLimits: ...  # noqa: D102


class Inputs:
    """The rows of a run, read one source after the other, then compared and recorded together.

    Args:
        run: the open run.
        model: how rows are encoded.
        loaded: the tokenizer, the digests of the model's files, and how many tokens it takes.

    """

    def __init__(self, run: Run, model: ModelConfig, loaded: Encodes) -> None:
        self._run, self._model, self._loaded = run, model, loaded
        self._read: dict[str, Rows] = {}

    def read(
        self, label: str, data: DataConfig, *, group: str | None = None, bad_rows: bool = False, recorded: bool = True
    ) -> Rows:
        """Read, check, encode and deduplicate rows: see `prepare`.

        Args:
            label: what messages call the rows.
            data: where they are.
            group: what the run records them as; by default the label.
            bad_rows: write those that cannot be used to bad_rows.jsonl of the run.
            recorded: whether the run records their files.

        Raises:
            DataError: As `prepare`.

        """
        rows = prepare(
            data,
            self._model,
            self._loaded.tokenizer,
            cache=self._run.path("inputs"),
            label=label,
            folder=self._run.folder if bad_rows else None,
            limits=self._loaded.limits,
        )
        if recorded:
            self._read[group or label] = rows
        return rows

    def read_like(
        self,
        label: str,
        pool: DataConfig,
        paths: Sequence[str] | None,
        columns: Columns | None,
        *,
        bad_rows: bool = False,
        recorded: bool = True,
    ) -> Rows | None:
        """Read rows as those of `pool` are read, each of which must be good; None where no path is given.

        Args:
            label: what messages call the rows, and what the run records them as.
            pool: how they are read.
            paths: where they are.
            columns: their own columns, if they differ.
            bad_rows: as in `read`.
            recorded: as in `read`.

        Raises:
            DataError: As `prepare`.

        """
        if not paths:
            return None
        return self.read(label, target_data(pool, paths, columns), bad_rows=bad_rows, recorded=recorded)

    def record(
        self,
        *,
        by_content: Collection[str] = (),
        grows: Collection[str] = (),
        encoding: bool = True,
        **more: Json,
    ) -> dict[str, Json]:
        """Compare model, encoding and files with what the run began with, and record them.

        Args:
            by_content: groups whose results are kept under the content that they were made of: see `Run.check`.
            grows: groups whose files may have got longer, and may be joined by new ones; the user is told.
            encoding: whether the run records how the rows that were read first are encoded.
            more: other facts.

        Returns:
            The facts.

        Raises:
            DataError: Something has changed that the user has not accepted; names it.

        """
        for group in grows:
            if grown := _accept_growth(self._run, group, self._read[group]):
                say(f"{', '.join(grown)} has grown since the last run: only the new rows are computed")
        facts: dict[str, Json] = {"model": dict(self._loaded.digests)}
        if encoding:
            facts["encoding"] = dict(next(iter(self._read.values())).encoder.fingerprint())
        facts |= {group: _files(rows) for group, rows in self._read.items()}
        facts |= more
        self._run.check(facts, by_content)
        return facts


def _files(rows: Rows) -> dict[str, Json]:
    """Path -> "digest, n bytes" per input file."""
    return {redact(info.path): f"{info.digest}, {info.bytes} bytes" for info in rows.pool.files}


def _accept_growth(run: Run, group: str, rows: Rows) -> list[str]:
    """Let a continued run go on with input files that only got longer, and with new ones; returns their paths.

    A file whose beginning is still, byte for byte, the file that the run began with has new rows and no changed one.
    """
    recorded = run.provenance["facts"].get(group, {}) if run.resumed else {}
    grown = []
    for info in rows.pool.files:
        name = redact(info.path)
        digest, _, size = str(recorded.get(name, "")).removesuffix(" bytes").partition(", ")
        longer = size.isdecimal() and info.bytes > int(size) and Path(info.path).is_file()
        if (longer and _digest_of_start(Path(info.path), int(size)) == digest) or (recorded and name not in recorded):
            grown.append(name)
            run.accept = (*run.accept, f"{group}.{name}")
    return grown


def _digest_of_start(path: Path, size: int) -> str:
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while size and (chunk := file.read(min(size, 1 << 20))):
            state.update(chunk)
            size -= len(chunk)
    return state.hexdigest()
