"""Attack the commands: kill them, let file operations fail, damage their folders; then see what they make of it.

    python -m tests.attack.run --kills 500 --flips 500 --faults 500 --seed 0
    python -m tests.attack.run --kills 20 --flips 20 --faults 20 --only select,train --journal tries.jsonl

Every try ends in one of: `identical` (the command, or the same command started again, ends with the very results of an
undisturbed run), `refused` (a named error and a nonzero exit code, or a warning that names the damaged file),
`traceback` (an error that nobody explains), `silent` (other results with exit code 0) or `stuck` (it does not end, or
does not succeed when it is started again after a fault that is over). The last three are faults of the project: the
exit code is 1 if there is one.

Nothing here depends on how busy the machine is. A command is stuck when it has used many times the processor time of
the undisturbed one, or none at all for minutes; it may take as long as it wants. With `--journal` each try is written
down when it ends, and the same command line goes on after the last one.
"""

import argparse
import itertools
import json
import random
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.attack.faults import KINDS, flip, truncate
from tests.attack.scenarios import SCENARIOS, Scenario, results
from tests.pipelines.conftest import commands, make_world
from tests.tiny import write_rows

OUTCOMES = ("identical", "refused", "traceback", "silent", "stuck")
WRONG = OUTCOMES[2:]
_TRACEBACK = re.compile(r"Traceback|this is a bug|Exception ignored", re.IGNORECASE)
_LIMIT_CPU_SECONDS, _TIMES, _IDLE_SECONDS = 60.0, 20.0, 300.0
"""A command is stuck from this much processor time on, or from so many times the undisturbed command's; or idle."""
_VERIFIED = {"checkpoints", "warmup", "reference", "surrogates", "inputs", "arms", "losses-pool", "losses-target"}
"""Folders of files on the way to a result, which are compared when they are read; a run that needs them no more leaves
them alone."""


@dataclass
class Prepared:
    """A scenario whose undisturbed results are known."""

    scenario: Scenario
    start: Path  # the folder as the command finds it
    done: Path  # and as an undisturbed command leaves it
    half: Path  # and as a command that was killed on the way leaves it
    want: dict[str, Any]
    calls: dict[str, int]
    seconds: float
    cpu: float = 0.0
    """Processor time of the undisturbed command."""


@dataclass
class Try:
    """One try and its end."""

    scenario: str
    attack: str
    outcome: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.outcome}: {self.scenario}: {self.attack}: {self.detail}"


class Unprepared(Exception):
    """An undisturbed command of a scenario failed, so that there is nothing to compare with."""


@dataclass
class Attacker:
    """Runs commands in one world below `folder`, always in the same run folder, so that paths in results agree."""

    folder: Path
    call: Callable[..., SimpleNamespace]
    tries: list[Try] = field(default_factory=list)
    limit: float = 10 * _LIMIT_CPU_SECONDS
    """Processor time from which on a command is stuck."""
    built: dict[tuple[str, ...], Path] = field(default_factory=dict)
    """Folders as commands find them, by the commands that built them."""

    def __post_init__(self) -> None:
        self.world = make_world(self.folder / "world").folder
        write_rows(self.world / "few.jsonl", 32)
        self.run = self.folder / "run"

    def _do(self, text: str, **options: Any) -> SimpleNamespace:
        words = [w.replace("$W", str(self.world)).replace("$R", str(self.run)) for w in shlex.split(text)]
        limits = {"kill_after": 7200.0, "kill_after_cpu": self.limit, "kill_after_idle": _IDLE_SECONDS}
        return self.call(*words, **limits | options)

    def _set(self, state: Path | None) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        if state is not None and state.is_dir():
            shutil.copytree(state, self.run, symlinks=True)

    def _keep(self, name: str) -> Path:
        kept = self.folder / "states" / name
        shutil.rmtree(kept, ignore_errors=True)
        if self.run.is_dir():
            shutil.copytree(self.run, kept, symlinks=True)
        return kept

    def prepare(self, scenario: Scenario, *, halfway: bool = True) -> Prepared:
        """Build the folder, run the command twice undisturbed, and once until a kill on the way.

        What differs between the two undisturbed runs (times, rates) is no result. Scenarios that begin with the same
        commands share the folder that these build.

        Args:
            scenario: What is attacked.
            halfway: Whether the folder of the killed command is needed; otherwise it is the finished one.

        Raises:
            Unprepared: An undisturbed command failed.
        """
        self.limit = 10 * _LIMIT_CPU_SECONDS
        name = scenario.name.replace("/", "-")
        if (start := self.built.get(scenario.before)) is None:
            self._set(None)
            for before in scenario.before:
                self._undisturbed(before)
            start = self.built[scenario.before] = self._keep(f"{name}-start")
        found = []
        for _ in range(2):
            self._set(start)
            answer = self._undisturbed(scenario.command, fault={"within": str(self.folder)})
            found.append(results(self.run, answer.stdout if scenario.shown else ""))
        done = half = self._keep(f"{name}-done")
        want = {name: value for name, value in found[0].items() if found[1].get(name) == value}
        if halfway:
            self._set(start)
            nth = answer.calls.get("kill", 1) * 6 // 10
            self._do(scenario.command, fault={"within": str(self.folder), "kind": "kill", "nth": max(nth, 1)})
            half = self._keep(f"{name}-half")
        self.limit = max(_LIMIT_CPU_SECONDS, _TIMES * answer.cpu)
        return Prepared(scenario, start, done, half, want, answer.calls, answer.seconds, answer.cpu)

    def _undisturbed(self, command: str, **options: Any) -> SimpleNamespace:
        answer = self._do(command, **options)
        if answer.code != 0:
            raise Unprepared(f"{command}: exit code {answer.code}: {answer.stderr.strip()[-600:]}")
        return answer

    def _ended(self, made: Prepared, answer: SimpleNamespace, damaged: str | None = None) -> tuple[str, str]:
        """How a command ended, by its exit code, its messages and its results.

        A `damaged` file that the command only found may stay as it is, and so may what a later reader verifies.
        """
        if answer.code == -9:
            return "stuck", f"no end after {answer.cpu:.0f} s of processor time, {answer.seconds:.0f} s in all"
        if _TRACEBACK.search(answer.stderr):
            return "traceback", answer.stderr.strip()[-600:]
        if answer.code != 0:
            lines = answer.stderr.strip().splitlines()
            named = any(line.startswith("error:") for line in lines)
            return ("refused" if named else "traceback"), (lines[-1] if lines else f"exit code {answer.code}")[:300]
        got = results(self.run, answer.stdout if made.scenario.shown else "")
        differing = [name for name, value in made.want.items() if got.get(name) != value]
        if damaged is not None:
            found = damaged if (made.start / damaged).exists() else None
            differing = [n for n in differing if n.partition(":")[0] != found and not _VERIFIED & {*Path(n).parts}]
        if differing and damaged is not None:
            # without its last seals, a file differs from an older one of its own
            names = [
                Path(damaged).name,
                *(["is not what the run wrote"] if Path(damaged).name == "seals.jsonl" else []),
            ]
            said = [line for line in answer.stderr.splitlines() if any(name in line for name in names)]
            if said:
                return "refused", f"said: {said[0]}"
        if differing:
            name = differing[0]
            return "silent", f"{len(differing)} differ: {name}: {made.want[name]} != {got.get(name)}"
        return "identical", ""

    def _note(self, made: Prepared, attack: str, outcome: str, detail: str) -> Try:
        self.tries.append(Try(made.scenario.name, attack, outcome, detail))
        return self.tries[-1]

    def damage(self, made: Prepared, state: Path, name: str, how: str, at: float) -> Try:
        """Flip a bit of a file of the folder, or cut it; the command is then run in this folder."""
        self._set(state)
        (flip if how == "flip" else truncate)(self.run / name, at)
        outcome, detail = self._ended(made, self._do(made.scenario.command), damaged=name)
        return self._note(made, f"{how} {state.name.rpartition('-')[2]}/{name} at {at:.4f}", outcome, detail)

    def fault(self, made: Prepared, kind: str, nth: int) -> Try:
        """Let one file operation fail (or all writes from one on); then run the command again, undisturbed.

        A failure that the command survives must not change its results; one that it does not survive must be named.
        """
        self._set(made.start)
        attack = f"{kind} {nth} of {made.calls.get('write' if kind == 'full' else kind, 0)}"
        answer = self._do(made.scenario.command, fault={"within": str(self.folder), "kind": kind, "nth": nth})
        outcome, detail = self._ended(made, answer)
        if outcome == "silent" and "warning" in answer.stderr:  # it said that something could not be written
            outcome = "refused"
        if outcome in WRONG and not (kind == "kill" and answer.code == -9):
            return self._note(made, attack, outcome, detail)
        return self._again(made, attack)

    def kill(self, made: Prepared, after: float) -> Try:
        """SIGKILL after so many seconds; then run the command again, undisturbed."""
        self._set(made.start)
        self._do(made.scenario.command, kill_after=after)
        return self._again(made, f"kill after {after:.3f} s")

    def _again(self, made: Prepared, attack: str) -> Try:
        outcome, detail = self._ended(made, self._do(made.scenario.command))
        if outcome == "refused":  # nothing is wrong with the folder or the disk any more
            outcome = "stuck"
        return self._note(made, attack, outcome, detail)


def damages(made: Prepared, count: int, rng: random.Random) -> Iterator[tuple[Path, str, str, float]]:
    """`count` files of the finished and the half-finished folder to damage: each file once before any twice."""
    found = [(state, path) for state in (made.done, made.half) for path in sorted(state.rglob("*"))]
    places = [(state, str(path.relative_to(state))) for state, path in found if path.is_file() and path.stat().st_size]
    left: list[tuple[Path, str]] = []
    for number in range(count if places else 0):
        if not left:
            left = rng.sample(places, len(places))
        state, name = left.pop()
        yield state, name, "truncate" if number % 4 == 3 else "flip", rng.random()


def faults(made: Prepared, count: int | None, rng: random.Random) -> list[tuple[str, int]]:
    """`count` of the operations that can fail, spread over the kinds; all of them for None."""
    every = [[(kind, n + 1) for n in range(made.calls.get("write" if kind == "full" else kind, 0))] for kind in KINDS]
    if count is None:
        return [one for kind in every for one in kind]
    turns = itertools.zip_longest(*(rng.sample(kind, len(kind)) for kind in every))
    return [one for turn in turns for one in turn if one][:count]


@dataclass
class Journal:
    """The tries that are over, on disk, so that a campaign that was stopped goes on after them.

    Args:
        path: Of a JSON Lines file; None keeps nothing.
        seed: Of the campaign; tries of another one are not taken for this one's.
    """

    path: Path | None
    seed: int

    def known(self) -> dict[tuple[str, str], Try]:
        """The tries of this campaign that are over, by scenario and number."""
        if self.path is None or not self.path.is_file():
            return {}
        found = [json.loads(line) for line in self.path.read_text().splitlines()]
        return {(one["scenario"], one["key"]): Try(**one["try"]) for one in found if one["seed"] == self.seed}

    def add(self, key: str, done: Try) -> None:
        """Write down a try."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(
                    json.dumps({"seed": self.seed, "scenario": done.scenario, "key": key, "try": asdict(done)}) + "\n"
                )


def planned(
    attacker: Attacker, made: Prepared, *, kills: int, flips: int, faults_: int | None, seed: int
) -> Iterator[tuple[str, Callable[[], Try]]]:
    """(name, what does it) of each try of a scenario; the same ones for the same seed, whatever was done before."""
    rng = random.Random(f"{seed} {made.scenario.name} kills")
    for turn in range(kills):
        share = rng.random()
        if turn % 2 and (calls := made.calls.get("kill")):
            yield f"kill {turn}", partial(attacker.fault, made, "kill", 1 + int(share * calls))
        else:
            yield f"kill {turn}", partial(attacker.kill, made, share * made.seconds)
    rng = random.Random(f"{seed} {made.scenario.name} flips")
    for number, one in enumerate(damages(made, flips, rng)):
        yield f"flip {number}", partial(attacker.damage, made, *one)
    rng = random.Random(f"{seed} {made.scenario.name} faults")
    for number, (kind, nth) in enumerate(faults(made, faults_, rng)):
        yield f"fault {number}", partial(attacker.fault, made, kind, nth)


def attack(
    attacker: Attacker,
    scenarios: Sequence[Scenario],
    *,
    kills: int,
    flips: int,
    faults_: int | None,
    seed: int,
    say: Callable[[str], None] = print,
    journal: Path | None = None,
) -> list[Try]:
    """Share the tries among the scenarios, and report those that went wrong as they come.

    A scenario that cannot be prepared is one try that went wrong; the others are attacked all the same.
    """
    kept = Journal(journal, seed)
    known = kept.known()
    for number, scenario in enumerate(scenarios):

        def share(total: int, number: int = number) -> int:
            return total // len(scenarios) + (number < total % len(scenarios))

        before = len(attacker.tries)
        try:
            made = attacker.prepare(scenario)
        except Unprepared as error:
            attacker.tries.append(Try(scenario.name, "nothing", "stuck", f"not prepared: {error}"))
        else:
            shares = {"kills": share(kills), "flips": share(flips)}
            shares_of_faults = None if faults_ is None else share(faults_)
            for key, do in planned(attacker, made, **shares, faults_=shares_of_faults, seed=seed):
                if (done := known.get((scenario.name, key))) is not None:
                    attacker.tries.append(done)
                    continue
                done = do()
                kept.add(key, done)
                if done.outcome in WRONG:
                    say(f"  {done}")
        mine = attacker.tries[before:]
        counts = Counter(one.outcome for one in mine)
        say(f"{scenario.name}: {len(mine)} tries, " + ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o]))
        for one in mine:
            if one.outcome in WRONG:
                say(f"  {one}")
    return attacker.tries


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="at random moments, and before random file operations")
    parser.add_argument("--flips", type=int, default=500, help="files of a run folder with a flipped bit, or cut short")
    parser.add_argument("--faults", default="500", help="file operations that fail once, a number or 'all'")
    parser.add_argument("--only", default="", help="names of scenarios, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal", type=Path, help="a file of the tries that are over; the same command goes on")
    options = parser.parse_args(argv)
    wanted = [name for name in options.only.split(",") if name]
    unknown = set(wanted) - {s.name for s in SCENARIOS}
    if unknown:
        parser.error(f"no scenario is called {sorted(unknown)[0]!r}; there are {', '.join(s.name for s in SCENARIOS)}")
    scenarios = [s for s in SCENARIOS if not wanted or s.name in wanted]
    with tempfile.TemporaryDirectory() as folder, commands() as call:
        attacker = Attacker(Path(folder), call)
        tries = attack(
            attacker,
            scenarios,
            kills=options.kills,
            flips=options.flips,
            faults_=None if options.faults == "all" else int(options.faults),
            seed=options.seed,
            say=lambda text: print(text, flush=True),
            journal=options.journal,
        )
    counts = Counter(one.outcome for one in tries)
    print(f"{len(tries)} tries: " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES))
    return int(any(counts[outcome] for outcome in WRONG))


if __name__ == "__main__":
    sys.exit(main())
