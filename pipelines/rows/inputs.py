"""The inputs of a command: rows and the model that encodes them, compared with what the run began with.

    inputs = Inputs(run, config.model, loaded)
    pool = inputs.read("pool", config.train, group="data", bad_rows=True)
    target = inputs.read_like("target", config.train, config.target, config.target_columns)
    inputs.record(by_content=("data", "target"), grows=("data",))

Five commands use this: select, train, order, audit and diagnose.
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
from pipelines.runs.workers import leads
from pipelines.settings.base import Columns, Json
from pipelines.settings.parts import DataConfig, ModelConfig


class Encodes(Protocol):
    """The parts of a model that reading rows needs: a loaded model, or only its tokenizer."""

    @property
    def tokenizer(self) -> object:
        """The tokenizer."""

    @property
    def digests(self) -> Mapping[str, str]:
        """The digests of the model's files."""

    @property
    def limits(self) -> ModelLimits:
        """The number of tokens and the vocabulary that the model takes."""


class Inputs:
    """The rows of a run, read one input after the other, then compared and recorded together.

    Args:
        run: The open run.
        model: How rows are encoded.
        loaded: The tokenizer, the digests of the model's files, and the model's limits.
    """

    def __init__(self, run: Run, model: ModelConfig, loaded: Encodes) -> None:
        self._run, self._model, self._loaded = run, model, loaded
        self._read: dict[str, Rows] = {}

    def read(
        self, label: str, data: DataConfig, *, group: str | None = None, bad_rows: bool = False, recorded: bool = True
    ) -> Rows:
        """Read, check, encode and deduplicate rows; see `prepare`.

        Args:
            label: The name of the rows in messages.
            data: Where the rows are.
            group: The name under which the run records them; by default the label.
            bad_rows: Whether to write unusable rows to bad_rows.jsonl of the run.
            recorded: Whether the run records their files.

        Raises:
            DataError: As in `prepare`.
        """
        rows = prepare(
            data,
            self._model,
            self._loaded.tokenizer,
            cache=self._run.path("inputs"),
            label=label,
            folder=self._run.folder if bad_rows and leads() else None,
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
        """Read rows in the same way as a pool; every row must be usable.

        Args:
            label: The name of the rows in messages and in the run's records.
            pool: How the pool is read.
            paths: Where the rows are.
            columns: The columns of the rows, if they differ.
            bad_rows: As in `read`.
            recorded: As in `read`.

        Returns:
            The rows; None if no path is given.

        Raises:
            DataError: As in `prepare`.
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
            by_content: Groups whose results are stored by the content that they were computed from; see `Run.check`.
            grows: Groups whose files may have grown and may be joined by new ones; the user is told.
            encoding: Whether the run records how the first rows are encoded.
            **more: Other facts.

        Returns:
            The facts.

        Raises:
            DataError: A fact has changed that the user has not accepted; the message names it.
        """
        for group in grows:
            if grown := _accept_growth(self._run, group, self._read[group]):
                say(f"{', '.join(grown)} has grown since the last run; only the new rows are computed")
        facts: dict[str, Json] = {"model": dict(self._loaded.digests)}
        if encoding:
            facts["encoding"] = dict(next(iter(self._read.values())).encoder.fingerprint())
        facts |= {group: _files(rows) for group, rows in self._read.items()}
        facts |= more
        self._run.check(facts, by_content)
        return facts


def _files(rows: Rows) -> dict[str, Json]:
    """Return path -> "digest, n bytes" for each input file."""
    return {redact(info.path): f"{info.digest}, {info.bytes} bytes" for info in rows.pool.files}


def _accept_growth(run: Run, group: str, rows: Rows) -> list[str]:
    """Accept input files of a continued run that have only grown, and new ones; returns their paths.

    A file whose beginning is, byte for byte, the file that the run began with has new rows and no changed ones.
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
