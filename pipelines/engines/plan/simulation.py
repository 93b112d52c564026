"""A discrete-event simulation of workers that share out units, some of them slow, and some lost on the way.

Every event is one of three: a worker has computed its unit, has committed it, or is lost. Commits pass through the
shared folder, whose rate all workers share. A lost worker's unit goes back, and the next idle worker takes it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from datatools import UsageError

CHUNKS = 8
"""A worker takes at most the share 1 / (CHUNKS * workers) of the units that are left as one event, so that few events
stand for many units, and the last units are simulated one by one. More than 128 workers take larger shares, down to
1 / (2 * workers), and slow workers take smaller ones, as they do when every unit is taken by itself."""

MOST_LOST = 300_000
"""How many workers one simulated run may lose before it is given up."""


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        name: Its name.
        units: The number of units.
        seconds: Seconds of one worker to compute one unit, on average.
        bytes: Bytes of one unit that are written to the shared folder, or read from it.
        rate: Bytes per second of the folder for all workers together.
        alone: Whether the leader does it by itself.
        bound: What limits it, in words.
        measured: Seconds of each unit, if they are known; then `seconds` is not used.
    """

    name: str
    units: int
    seconds: float
    bytes: float = 0.0
    rate: float = math.inf
    alone: bool = False
    bound: str = "compute"
    measured: tuple[float, ...] = ()

    def ideal(self, workers: int) -> float:
        """Return the seconds without stragglers and failures, with work that divides evenly.

        Args:
            workers: The number of workers.
        """
        work = sum(self.measured) if self.measured else self.units * self.seconds
        moved = self.units * self.bytes / self.rate
        return max((work + moved) / (1 if self.alone else workers), moved)


@dataclass(frozen=True)
class World:
    """The workers, and what goes wrong with them.

    Attributes:
        workers: Their number.
        stragglers: The share of them that is slow.
        slowdown: How many times slower those are.
        spread: The standard deviation of the seconds of a unit, as a share of their mean.
        failures: Seconds until a worker is lost, on average; infinite for never.
        restart: Seconds until a lost worker is there again.
        returns: Whether all lost workers come back (`ray`, `ranks`), or only the leader (`local`).
    """

    workers: int
    stragglers: float = 0.0
    slowdown: float = 1.0
    spread: float = 0.0
    failures: float = math.inf
    restart: float = 0.0
    returns: bool = True


@dataclass
class Outcome:
    """What one simulated run took.

    Attributes:
        seconds: Seconds of each stage, by its name.
        lost: How many workers were lost.
        again: Seconds of work that was done twice.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    lost: int = 0
    again: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


@dataclass
class _Worker:
    speed: float
    fails: float
    gone: bool = False


@dataclass(frozen=True)
class _Work:
    """Units that a worker does one after another, as one event."""

    units: int
    seconds: float


def simulate(stages: Sequence[Stage], world: World, seed: int = 0) -> Outcome:
    """Return what one run takes: its stages one after another, with the same workers.

    Args:
        stages: The stages.
        world: The workers.
        seed: The seed of everything that is random.

    Raises:
        UsageError: Workers are lost so often that a run would not end.

    Example:
        >>> simulate([Stage("features", units=10, seconds=6.0)], World(workers=2)).total
        30.0
    """
    draw = Random(seed)
    slow = round(world.stragglers * world.workers) if world.workers > 1 else 0
    speeds = [world.slowdown] * slow + [1.0] * (world.workers - slow)
    draw.shuffle(speeds)
    team = [_Worker(speed, _next(draw, 0.0, world)) for speed in speeds]
    found, now = Outcome(), 0.0
    for stage in stages:
        end = _Run(stage, team, world, draw, found).end(now) if stage.units else now
        found.seconds[stage.name] = found.seconds.get(stage.name, 0.0) + end - now
        now = end
    return found


def _next(draw: Random, now: float, world: World) -> float:
    return now + draw.expovariate(1.0 / world.failures) if math.isfinite(world.failures) else math.inf


def _parts(stage: Stage, world: World, draw: Random) -> deque[_Work]:
    if stage.measured:
        return deque(_Work(1, seconds) for seconds in stage.measured)
    found: deque[_Work] = deque()
    left = stage.units
    while left:
        units = max(1, left // (min(CHUNKS, max(2, 128 * CHUNKS // world.workers)) * world.workers))
        sigma = math.sqrt(math.log1p(world.spread**2 / units))  # the sum of many varies less than each
        factor = draw.lognormvariate(-sigma * sigma / 2, sigma) if sigma and not stage.alone else 1.0
        found.append(_Work(units, units * stage.seconds * factor))
        left -= units
    return found


_COMPUTED, _COMMITTED, _LOST, _BACK = range(4)


class _Run:
    """One stage while it is simulated."""

    def __init__(self, stage: Stage, team: list[_Worker], world: World, draw: Random, found: Outcome) -> None:
        self._stage, self._team, self._world, self._draw, self._found = stage, team, world, draw, found
        self._todo = _parts(stage, world, draw)
        self._idle: deque[int] = deque()
        self._events: list[tuple[float, int, int, float, _Work]] = []  # when, what, who, when it began, with what
        self._channel = 0.0
        self._failed = self._committed = 0

    def end(self, now: float) -> float:
        """Return when the stage ends that begins at `now`."""
        there = [n for n, one in enumerate(self._team) if not one.gone]
        for who in there[:1] if self._stage.alone else there:
            self._free(who, now)
        left, end = sum(work.units for work in self._todo), now
        self._give(now)
        while left:
            when, what, who, begin, work = heapq.heappop(self._events)
            if what == _COMPUTED:
                self._channel = max(self._channel, when) + work.units * self._stage.bytes / self._stage.rate
                self._plan(self._channel, _COMMITTED, who, begin, work)
                continue
            if what == _LOST:
                left -= self._lose(who, when, begin, work)
            elif what == _COMMITTED:
                left, end = left - work.units, when
                self._committed += work.units
                self._idle.append(who)
            else:
                self._idle.append(who)
            self._give(when)
        return end

    def _free(self, who: int, now: float) -> None:
        """Let a worker begin, unless it has been lost since the last stage and is not back yet."""
        one, back = self._team[who], now
        while one.fails < now:
            self._lost()
            one.gone = not self._world.returns and who > 0
            if one.gone:
                return
            back = one.fails + self._world.restart
            one.fails = _next(self._draw, back, self._world)
        if back > now:
            heapq.heappush(self._events, (back, _BACK, who, back, _Work(0, 0.0)))
        else:
            self._idle.append(who)

    def _give(self, when: float) -> None:
        while self._todo and self._idle:
            who, work = self._idle.popleft(), self._todo.popleft()
            speed = self._team[who].speed
            if speed > 1.0 and work.units > 1:  # the others take more while it is busy
                units, each = max(1, int(work.units / speed)), work.seconds / work.units
                if units < work.units:
                    self._todo.appendleft(_Work(work.units - units, each * (work.units - units)))
                    work = _Work(units, each * units)
            self._plan(when + work.seconds * speed, _COMPUTED, who, when, work)

    def _lost(self) -> None:
        """Count a lost worker; refuse a run that makes no progress, which would be simulated forever."""
        self._found.lost += 1
        vain = self._failed > 1000 + 10 * (len(self._team) + self._committed)
        if vain or self._found.lost > MOST_LOST:
            raise UsageError(
                f"--hours-between-failures {self._world.failures / 3600:g}: in the stage {self._stage.name!r}, workers "
                "are lost so often that a run would not end; give more hours, or plan a smaller job "
                "or smaller units (--set rows_per_unit=N)"
            )

    def _plan(self, when: float, what: int, who: int, begin: float, work: _Work) -> None:
        """Let something happen, unless the worker is lost before."""
        fails = self._team[who].fails
        heapq.heappush(
            self._events, (fails, _LOST, who, begin, work) if fails < when else (when, what, who, begin, work)
        )

    def _lose(self, who: int, when: float, begin: float, work: _Work) -> int:
        """Give back what a lost worker has not committed, and return how many units it had committed."""
        one, each = self._team[who], work.seconds / work.units
        took = each * one.speed + self._stage.bytes / self._stage.rate
        kept = min(work.units - 1, int((when - begin) / took)) if took else 0
        self._todo.appendleft(_Work(work.units - kept, each * (work.units - kept)))
        self._committed += kept
        self._failed += 1
        self._lost()
        self._found.again += when - begin - kept * took
        back = when + self._world.restart
        one.fails = _next(self._draw, back, self._world)
        one.gone = not self._world.returns and who > 0
        if self._stage.alone and self._world.returns and len(self._team) > 1:  # another one leads at once
            self._free((who + 1) % len(self._team), when)
        elif not one.gone:
            heapq.heappush(self._events, (back, _BACK, who, back, _Work(0, 0.0)))
        return kept
