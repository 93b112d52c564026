"""Indexing as a job: which parts an index has, which are missing, and how one process or several make them.

A part is the unit of the job. It has the same bytes whoever makes it, it is committed by its name, and it depends on
nothing but its range, so that workers need not know of each other and a part that is there is never made again.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from datatools import DatatoolsError, files
from pipelines.rows import part as parts
from pipelines.rows.encode import Encoder
from pipelines.rows.options import Options
from pipelines.rows.part import Input, Part
from pipelines.rows.ranges import Range
from pipelines.runs import workers as team

_LEASES = ".leases-parts"
_SHORTEST, _LONGEST = 0.02, 0.5  # pauses of a member that waits for the parts of others, in seconds


@dataclass(frozen=True)
class Job:
    """What has to be indexed. It can be pickled, with its encoder.

    Attributes:
        inputs: The input files.
        ranges: Their ranges, in order.
        options: How rows are read.
        encoder: How rows are encoded; None only reads them, an error is why they cannot be encoded.
        folder: The folder of the index; None keeps the parts in memory.
    """

    inputs: Sequence[Input]
    ranges: Sequence[Range]
    options: Options
    encoder: Encoder | DatatoolsError | None = None
    folder: Path | None = None

    @cached_property
    def names(self) -> list[str]:
        """The identity of each part: a digest of all that its bytes depend on."""
        encoding = self.encoder.identity() if isinstance(self.encoder, Encoder) else None
        how = [asdict(self.options.limits), self.options.source_key, self.options.detect, self.options.preference]
        shared = files.digest(json.dumps([how, encoding, _code()], sort_keys=True).encode())
        return [
            files.digest(json.dumps([shared, *self._facts(place)], sort_keys=True).encode()) for place in self.ranges
        ]

    def _facts(self, place: Range) -> list[Any]:
        of = self.inputs[place.file]
        end = place.line + place.lines
        problems = [[n, one.reason, one.detail] for n, one in of.problems.items() if place.line <= n < end]
        return [of.name, of.stem, of.columns, place.start, place.line, f"{place.digest:016x}", problems]

    def make(self, number: int) -> Part:
        """Make a part, and write it if the index has a folder and nothing prevents its rows from being encoded.

        Args:
            number: The number of the part.

        Raises:
            DataError: A file cannot be read, or has changed.
            EnvironmentProblem: The part cannot be written.
        """
        place = self.ranges[number]
        made = parts.read_part(self.inputs[place.file], place, self.options, self.encoder)
        if self.folder is not None and made.failure is None and made.tokens is not None:
            parts.write(made, self.folder, self.names[number])
            made.tokens = None
        return made

    def found(self, number: int, *, fresh: bool = False) -> Part | None:
        """Return a part that is there; None if it has to be made.

        Args:
            number: The number of the part.
            fresh: Whether this run made it.
        """
        if self.folder is None or not isinstance(self.encoder, Encoder):
            return None
        return parts.read(self.folder, self.names[number], fresh=fresh)

    def all(self, workers: int = 1) -> Iterator[Part]:
        """Yield all parts in order; those that are missing are made.

        Args:
            workers: How many processes make them.

        Raises:
            DataError: As in `make`.
            EnvironmentProblem: As in `make`.
        """
        if self.folder is not None:
            files.make_folder(self.folder)
        if min(workers, len(self.ranges)) < 2:
            self._share()
            for number in range(len(self.ranges)):
                yield self.found(number) or self.make(number)
            return
        with ProcessPoolExecutor(workers, get_context("spawn"), _start, (self,)) as pool:
            waiting: list[Any] = []
            for number in range(len(self.ranges)):
                waiting.append(self.found(number) or pool.submit(_make, number))
                if len(waiting) > 2 * workers:  # so that few parts are in memory
                    yield self._made(waiting.pop(0))
            for one in waiting:
                yield self._made(one)

    def _share(self) -> None:
        """As a member of a team, make the missing parts that no other member makes at this moment.

        Members begin at different parts and agree by leases, so that a part is made twice only if its maker has ended.
        Members that get here when all parts are there make none: whether indexing is shared depends on when the engine
        starts them.
        """
        me = team.member()
        if me is None or me.size < 2 or self.folder is None or not isinstance(self.encoder, Encoder):
            return
        count = len(self.ranges)
        start = count * me.place // me.size % max(1, count)
        left = [*range(start, count), *range(start)]
        pause = _SHORTEST
        with files.Leases(self.folder / _LEASES) as leases:
            while left:
                before = len(left)
                for number in list(left):
                    if self.found(number) is not None:
                        left.remove(number)
                    elif leases.take(number):
                        try:
                            if self.found(number) is None:  # it was given back just now
                                self.make(number)
                        finally:
                            leases.give_back(number)
                        left.remove(number)
                if len(left) == before:  # others make them
                    time.sleep(pause)
                    pause = min(_LONGEST, 1.5 * pause)

    def _made(self, one: Any) -> Part:
        if isinstance(one, Part):
            return one
        found = one.result()
        if isinstance(found, Part):
            return found
        there = self.found(found, fresh=True)
        return there or self.make(found)  # somebody has removed it

    def clear(self) -> None:
        """Remove files of the folder that belong to other rows, or to another encoding."""
        assert self.folder is not None
        mine = {f"{kind}-{name}.arrow" for name in self.names for kind in ("rows", "tokens")}
        for other in self.folder.iterdir():
            unknown = re.fullmatch(r"(rows|tokens)-[0-9a-f]{32}\.arrow", other.name) and other.name not in mine
            if unknown or other.name == _LEASES:
                files.remove(other)


_job: Job | None = None  # of a worker


def _start(job: Job) -> None:
    global _job
    _job = job


def _make(number: int) -> Part | int:
    """Make a part in a worker: its number if it was written, otherwise the part."""
    assert _job is not None
    made = _job.make(number)
    return made if _job.folder is None or made.failure is not None or made.tokens is not None else number


@cache
def _code() -> Mapping[str, str]:
    """Return the code that makes parts: digests of the files of this room, and versions of the packages it calls."""
    room = Path(__file__).parent
    found = {path.relative_to(room).as_posix(): files.digest_file(path) for path in sorted(room.rglob("*.py"))}
    return found | {name: importlib.metadata.version(name) for name in ("jinja2", "tokenizers", "transformers")}
