"""Damage every file of every kind of run folder in turn, and let each command that opens such a folder read it.

    python -m tests.attack.sweep --journal sweep.jsonl
    python -m tests.attack.sweep --only train,diagnose --each 10

A file gets one flipped bit, is cut to half of its length, and is emptied. Each command then ends with the results that
it has in an undamaged folder, or with a named refusal; the outcomes are those of `tests.attack.run`, and so is the exit
code. `--each N` tries N damages per command, spread over the files, instead of all.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.attack.run import OUTCOMES, WRONG, Attacker, Journal, Prepared, Try, Unprepared
from tests.attack.scenarios import ORDER, SELECT, TRAIN, Scenario
from tests.pipelines.conftest import commands

HOW = ("flip", "truncate", "empty")
_RUN, _NEW = "$R/run", "--out $R/new"


def _in_run(command: str) -> str:
    return command.replace("--out $R", f"--out {_RUN}")


def _new(command: str) -> str:
    return command.replace("--out $R", _NEW)


_AUDIT = f"audit --selected {_RUN}/selected.jsonl --pool $W/pool.jsonl --test $W/test.jsonl --against random --seeds 1"
_FULL = TRAIN.replace("--lora-rank 4", "--lora-rank 0")
_LOOK = "diagnose --model $W/model --data $W/few.jsonl --checks sharpness --out $R"
_REPORT = ("report", f"report {_RUN}")
_WARM = " ".join(f"--checkpoints {_RUN}/warmup/checkpoint-{step}" for step in (4, 8))


def _order(task: str) -> str:
    return ORDER.replace("validate", task)


KINDS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "select": (
        (_in_run(SELECT), _AUDIT),
        (
            ("again", _in_run(SELECT)),
            _REPORT,
            ("report-audit", f"report {_RUN}/audit"),
            ("explain", f"explain {_RUN}/selected.jsonl:1"),
            ("explain-row", f"explain {_RUN} $W/pool.jsonl:3"),
            ("neighbours", f"neighbours {_RUN}"),
            ("neighbours-row", f"neighbours {_RUN} $W/pool.jsonl:3"),
            ("audit", _AUDIT),
            ("features", f"{_new(SELECT)} --set features.folder={_RUN}/features"),
            ("checkpoints", f"{_new(SELECT)} {_WARM}"),
            ("train", _new(TRAIN.replace("$W/few.jsonl", f"{_RUN}/selected.jsonl"))),
        ),
    ),
    "select-rds": (
        (_in_run(SELECT.replace("--method less", "--method rds")),),
        (
            ("again", _in_run(SELECT.replace("--method less", "--method rds"))),
            ("explain", f"explain {_RUN}/selected.jsonl:1"),
            ("neighbours", f"neighbours {_RUN}"),
        ),
    ),
    "select-tfidf": (
        (_in_run(SELECT.replace("--method less", "--method tfidf")),),
        (
            ("again", _in_run(SELECT.replace("--method less", "--method tfidf"))),
            _REPORT,
            ("explain", f"explain {_RUN}/selected.jsonl:1"),
        ),
    ),
    "train": (
        (_in_run(TRAIN),),
        (
            ("again", _in_run(TRAIN)),
            _REPORT,
            ("evaluate", f"evaluate --model $W/model --adapter {_RUN}/adapter --data $W/test.jsonl"),
            ("evaluate-checkpoint", f"evaluate --model $W/model --adapter {_RUN}/checkpoints/checkpoint-2 "
                                    "--data $W/test.jsonl"),
            ("train", f"{_new(_FULL)} --adapter {_RUN}/adapter"),
            ("select", f"{_new(SELECT)} --checkpoints {_RUN}/checkpoints/checkpoint-4"),
            ("diagnose", f"{_new(_LOOK)} --adapter {_RUN}/adapter"),
        ),
    ),
    "train-full": (
        (_in_run(_FULL),),
        (
            ("again", _in_run(_FULL)),
            ("evaluate", f"evaluate --model {_RUN}/model --data $W/test.jsonl"),
            ("train", _new(TRAIN.replace("$W/model", f"{_RUN}/model"))),
            ("select", f"{_new(SELECT)} --checkpoints {_RUN}/checkpoints/checkpoint-4"),
        ),
    ),
    "train-validated": (
        (_in_run(f"{TRAIN} --eval-data $W/test.jsonl --eval-every 1"),),
        (("again", _in_run(f"{TRAIN} --eval-data $W/test.jsonl --eval-every 1")), _REPORT),
    ),
    "train-coreset": (
        (_in_run(f"{TRAIN} --coreset colm --large-batch 8 --keep 4"),),
        (("again", _in_run(f"{TRAIN} --coreset colm --large-batch 8 --keep 4")), _REPORT),
    ),
    "order-search": (
        (_in_run(_order("search")),),
        (
            ("again", _in_run(_order("search"))),
            _REPORT,
            ("validate", _in_run(_order("validate"))),
            ("estimate", _in_run(_order("estimate"))),
            ("train", _new(TRAIN.replace("--epochs 1 ", f"--order {_RUN}/order.npz "))),
        ),
    ),
    "order-validate": ((_in_run(ORDER),), (("again", _in_run(ORDER)), _REPORT, ("map", _in_run(_order("map"))))),
    "order-estimate": (
        (_in_run(_order("estimate")),),
        (("again", _in_run(_order("estimate"))), _REPORT, ("search", _in_run(_order("search")))),
    ),
    "order-record": (
        (_in_run(_order("record")),),
        (("again", _in_run(_order("record"))), _REPORT, ("estimate", _in_run(_order("estimate")))),
    ),
    "order-map": ((_in_run(_order("map")),), (("again", _in_run(_order("map"))), _REPORT)),
    "diagnose": ((_in_run(_LOOK),), (("again", _in_run(_LOOK)), _REPORT)),
}  # fmt: skip
"""Kind of run folder -> (the commands that make it; name and text of each command that opens it)."""


def readers(kinds: Sequence[str]) -> Iterator[Scenario]:
    """The commands that open a folder of these kinds, each with the commands that make the folder."""
    for kind in kinds:
        before, commands_ = KINDS[kind]
        for name, command in commands_:
            yield Scenario(f"{kind}/{name}", command, before, shown=True)


def damages(made: Prepared, each: int | None, seed: int, hows: Sequence[str] = HOW) -> list[tuple[str, str, float]]:
    """(file, how, where) for every file of the folder and every kind of damage; `each` of them, or all for None."""
    rng = random.Random(f"{seed} {made.scenario.name}")
    names = [str(p.relative_to(made.start)) for p in sorted(made.start.rglob("*")) if p.is_file() and p.stat().st_size]
    places = {"flip": rng.random, "truncate": lambda: 0.5, "empty": lambda: 0.0}
    every = [(name, how, places[how]()) for name in names for how in HOW]
    every = [one for one in every if one[1] in hows]
    return every if each is None else rng.sample(every, min(each, len(every)))


def sweep(
    attacker: Attacker,
    scenarios: Sequence[Scenario],
    *,
    each: int | None,
    hows: Sequence[str] = HOW,
    seed: int = 0,
    journal: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Try]:
    """Damage the files that each scenario opens, one at a time; the tries, of which those that went wrong are said."""
    kept = Journal(journal, seed)
    known = kept.known()
    tries: list[Try] = []
    for scenario in scenarios:
        before = len(tries)
        try:
            made = attacker.prepare(scenario, halfway=False)
        except Unprepared as error:
            tries.append(Try(scenario.name, "nothing", "stuck", f"not prepared: {error}"))
        else:
            for name, how, at in damages(made, each, seed, hows):
                key = f"{how} {name}"
                done = known.get((scenario.name, key))
                if done is None:
                    done = attacker.damage(made, made.start, name, "flip" if how == "flip" else "truncate", at)
                    kept.add(key, done)
                tries.append(done)
        mine = tries[before:]
        counts = Counter(one.outcome for one in mine)
        say(f"{scenario.name}: {len(mine)} tries, " + ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o]))
        for one in mine:
            if one.outcome in WRONG:
                say(f"  {one}")
    return tries


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kinds of folders, or kind/command, comma-separated")
    parser.add_argument("--how", default=",".join(HOW), help="kinds of damage, comma-separated")
    parser.add_argument("--each", type=int, help="damages per command; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal", type=Path, help="a file of the tries that are over; the same command goes on")
    options = parser.parse_args(argv)
    wanted = [name for name in options.only.split(",") if name]
    scenarios = [s for s in readers(list(KINDS)) if not wanted or {s.name, s.name.partition("/")[0]} & {*wanted}]
    if not scenarios:
        parser.error(f"no kind is called {options.only!r}; there are {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory() as folder, commands() as call:
        tries = sweep(
            Attacker(Path(folder), call),
            scenarios,
            each=options.each,
            hows=options.how.split(","),
            seed=options.seed,
            journal=options.journal,
            say=lambda text: print(text, flush=True),
        )
    counts = Counter(one.outcome for one in tries)
    print(f"{len(tries)} tries: " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES))
    return int(any(counts[outcome] for outcome in WRONG))


if __name__ == "__main__":
    sys.exit(main())
