"""Would the tests notice? `python -m tests.mutation.run`: small wrong changes of the modules below, one at a time.

Every mutant is a copy of the tree with one change (`operators`), and the tests of its module run on it until one fails.
A seeded sample is drawn, as many of each module as of the others and spread over the operators. A mutant that no test
can tell from the original stands in `equivalent.txt`, with the reason. The exit code is 1 unless 95 % of the others are
caught.

The copy is made of the files that git knows. Tests run in children of one process that has imported the libraries, so
that a mutant costs its tests and a second. A child that takes three times the processor time of the unchanged module's
tests is ended and counts as caught.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.mutation.operators import Mutant, mutants

REPOSITORY = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
WANTED = 0.95

MODULES: Mapping[str, tuple[str, ...]] = {
    "datatools/features/store.py": ("tests/datatools/features/test_store.py",
                                      "tests/datatools/features/test_store_damage.py"),
    "datatools/selection/candidates.py": ("tests/datatools/selection/test_selection.py",),
    "datatools/selection/fill.py": ("tests/datatools/selection/test_selection.py",),
    "datatools/subsets/facility_location.py": ("tests/datatools/colm/test_choice.py",
                                               "tests/datatools/colm/test_colm.py"),
    "datatools/less/influence.py": ("tests/datatools/less/test_scores.py",),
    "pipelines/rows/encode.py": ("tests/pipelines/rows/test_encode.py", "tests/pipelines/rows/chat"),
    "datatools/colm/choice.py": ("tests/datatools/colm/test_choice.py",
                                     "tests/datatools/colm/test_colm.py"),
    "datatools/order/estimators/pairwise.py": ("tests/datatools/order/test_pairwise.py",
    "tests/datatools/order/test_oracles.py",
                                    "tests/datatools/order/test_estimators.py"),
    "datatools/order/estimators/expansion.py": ("tests/datatools/order/test_pairwise.py",
                                                "tests/datatools/order/test_oracles.py",
                                                "tests/datatools/order/test_estimators.py"),
    "optim/optimizer.py": ("tests/optim/test_rule.py", "tests/optim/test_update_map.py", "tests/optim/test_registry.py",
                           "tests/optim/rules/test_spam.py", "tests/optim/rules/test_blocks.py",
                           "tests/optim/test_battery.py"),
    "optim/block_rates.py": ("tests/optim/test_block_rates.py",),
    "optim/param_groups.py": ("tests/optim/test_param_groups.py", "tests/optim/test_later_groups.py",
                              "tests/optim/test_block_rates.py", "tests/optim/test_registry.py",
                              "tests/optim/rules/test_blocks.py", "tests/optim/rules/test_matrices.py"),
    **dict.fromkeys(
        ("optim/roles/names.py", "optim/roles/kinds.py", "optim/roles/layouts.py", "optim/roles/blocks.py"),
        ("tests/optim/roles/test_roles.py", "tests/optim/test_block_rates.py", "tests/optim/test_param_groups.py",
         "tests/optim/rules/test_matrices.py"),
    ),
}  # fmt: skip
"""A module -> the files of its tests, the quickest first."""
ONLY: Mapping[str, str] = {
    "optim/optimizer.py": "not test_property or adamw- or sgd- or muon- or spam- or lion_8bit-",
}
"""Which tests of these are enough, as for pytest's -k: the battery has 30 rules, and the optimizer is one."""


@dataclass
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    before: str
    after: str
    state: str  # "caught", "survived", "equivalent"
    how: str = ""
    seconds: float = 0.0


# ------------------------------------------------------------------------------------------------- which mutants


def equivalents(text: str | None = None) -> dict[tuple[str, str, str], str]:
    """(file, line before, line after) -> why nothing can tell the two apart.

    Entries are blocks of four lines: the file, `- ` the line, `+ ` the mutant's, `# ` the reason.
    """
    found: dict[tuple[str, str, str], str] = {}
    blocks = (EQUIVALENT.read_text(encoding="utf-8") if text is None else text).strip().split("\n\n")
    for block in blocks if blocks != [""] else []:
        lines = block.splitlines()
        file, before, after, *reason = lines
        if not (before.startswith("- ") and after.startswith("+ ") and reason and reason[0].startswith("# ")):
            raise SystemExit(f"{EQUIVALENT.name}: not an entry of file, '- ', '+ ' and '# ' lines:\n{block}")
        found[file, before[2:], after[2:]] = " ".join(line.removeprefix("# ") for line in reason)
    return found


def sample(found: Mapping[str, Sequence[Mutant]], count: int, seed: int) -> list[Mutant]:
    """`count` mutants: as many of each module (while it has any), and of a module, of each operator in turn."""
    queues = {}
    for file, of_file in found.items():
        draw = random.Random(f"{seed} {file}")
        kinds: dict[str, list[Mutant]] = {}
        for mutant in of_file:
            kinds.setdefault(mutant.operator, []).append(mutant)
        for several in kinds.values():
            draw.shuffle(several)
        order = sorted(kinds)
        draw.shuffle(order)
        queues[file] = [kinds[k][i] for i in range(max(map(len, kinds.values()))) for k in order if i < len(kinds[k])]
    chosen: list[Mutant] = []
    place = 0
    while len(chosen) < count and any(place < len(queue) for queue in queues.values()):
        chosen += [queue[place] for queue in queues.values() if place < len(queue)][: count - len(chosen)]
        place += 1
    return chosen


# ------------------------------------------------------------------------------------------------- running tests


def preload() -> None:
    """Import what tests import that is not of this project."""
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import scipy.optimize  # noqa: F401
    import sklearn.cluster  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    import transformers

    transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.Trainer  # noqa: B018 (lazy names)
    torch.set_num_threads(1)


def copy_tree(to: Path) -> None:
    """The files that git knows, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY,
                            capture_output=True, check=True).stdout.decode().split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (REPOSITORY / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, to / name)


def start(tree: Path, file: str, processor: int | None) -> int:
    """Run a module's tests in a child, in the copy; its process id. processor: seconds of it at most."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(tree)
        log = os.open(tree.with_name(f"{tree.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["PYTHONPATH"] = str(tree)
        sys.path[:] = [str(tree), *(p for p in sys.path if p and Path(p).resolve() != REPOSITORY)]
        for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "optim", "datatools", "pipelines")]:
            del sys.modules[name]
        if processor is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (processor, processor + 1))
        import pytest

        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning",
                     "-m", "not bench and not gpu and not slow and not real", "--no-header",
                     "--basetemp", str(tree.with_name(f"{tree.name}.tmp")), *MODULES[file]]  # fmt: skip
        if file in ONLY:
            arguments += ["-k", ONLY[file]]
        code = int(pytest.main(arguments))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(pid: int, deadline: float) -> tuple[int | None, resource.struct_rusage]:
    """Wait for a child: its exit code, negative for a signal, None when it had to be ended."""
    ended = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return (None if ended else os.waitstatus_to_exitcode(status)), usage
        if time.monotonic() > deadline and not ended:
            ended = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)


def failed_test(tree: Path) -> str:
    """The first test that failed, as the log has it."""
    lines = tree.with_name(f"{tree.name}.log").read_text(errors="replace").splitlines()
    return next((line.split(" - ")[0].split(" ", 1)[1] for line in lines if line.startswith(("FAILED", "ERROR "))), "")


def baseline(tree: Path, files: Sequence[str]) -> dict[str, float]:
    """Processor seconds of each module's tests without a change. Raises: SystemExit where they fail already."""
    spent = {}
    for file in files:
        code, usage = finish(start(tree, file, None), time.monotonic() + 1800)
        if code != 0:
            print(tree.with_name(f"{tree.name}.log").read_text(errors="replace")[-4000:])
            raise SystemExit(f"{file}: its tests fail without a change (code {code})")
        spent[file] = usage.ru_utime + usage.ru_stime
        print(f"{file}: its tests take {spent[file]:.0f} s of a processor", flush=True)
    return spent


def examine(tree: Path, chosen: Sequence[Mutant], sources: Mapping[str, str]) -> Iterator[Outcome]:
    """Run the tests on each mutant in turn."""
    known = equivalents()
    left = [m for m in chosen if (m.file, *m.lines(sources[m.file])) not in known]
    spent = baseline(tree, sorted({m.file for m in left}))
    for mutant in chosen:
        before, after = mutant.lines(sources[mutant.file])
        if reason := known.get((mutant.file, before, after)):
            yield Outcome(mutant, before, after, "equivalent", reason)
            continue
        began = time.monotonic()
        (tree / mutant.file).write_text(mutant.apply(sources[mutant.file]), encoding="utf-8")
        limit = int(3 * spent[mutant.file]) + 10
        try:
            code, _ = finish(start(tree, mutant.file, limit), began + 40 * limit)
        finally:
            (tree / mutant.file).write_text(sources[mutant.file], encoding="utf-8")
        if code == 0:
            yield Outcome(mutant, before, after, "survived", "", time.monotonic() - began)
        elif code in (1, 2, 3, 4):  # a test failed, or the file could not be imported
            yield Outcome(mutant, before, after, "caught", failed_test(tree), time.monotonic() - began)
        else:
            yield Outcome(mutant, before, after, "caught", f"took too long or died ({code})", time.monotonic() - began)


# --------------------------------------------------------------------------------------------------------- report


def stale(known: Mapping[tuple[str, str, str], str], sources: Mapping[str, str]) -> list[str]:
    """Entries of `equivalent.txt` that are no mutant of today's files."""
    now = {(file, *m.lines(source)) for file, source in sources.items() for m in mutants(file, source)}
    return [f"{key[0]}: {key[1]}" for key in known if key[0] in sources and key not in now]


def show(outcome: Outcome) -> str:
    mutant = outcome.mutant
    return (f"{mutant.file}:{mutant.line}: {mutant.operator}\n"
            f"    - {outcome.before}\n    + {outcome.after}")  # fmt: skip


def report(outcomes: Sequence[Outcome]) -> tuple[str, float]:
    """The table by module, the survivors, and the share that was caught of those that can be."""
    states = Counter((o.mutant.file, o.state) for o in outcomes)
    lines = ["", f"{'module':34}{'mutants':>9}{'caught':>9}{'survived':>10}{'equivalent':>12}"]
    for file in dict.fromkeys(o.mutant.file for o in outcomes):
        caught, survived, equal = (states[file, state] for state in ("caught", "survived", "equivalent"))
        lines.append(f"{file:34}{caught + survived + equal:>9}{caught:>9}{survived:>10}{equal:>12}")
    total = Counter(o.state for o in outcomes)
    can = total["caught"] + total["survived"]
    score = total["caught"] / can if can else 1.0
    lines += ["", *(show(o) for o in outcomes if o.state == "survived")]
    lines += [f"{len(outcomes)} mutants, {total['equivalent']} of them equivalent; "
              f"{total['caught']} of {can} caught: {100 * score:.1f} %"]  # fmt: skip
    return "\n".join(lines), score


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=80, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", action="append", choices=list(MODULES), help="only of this one; may be repeated")
    parser.add_argument("--line", type=int, action="append", help="all mutants of this line (with one --module)")
    parser.add_argument(
        "--again",
        type=Path,
        metavar="FILE",
        help="run what survived in this --json of an earlier run; what was caught there stays caught",
    )
    parser.add_argument("--list", action="store_true", help="print the mutants drawn, run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what became of each")
    chosen = parser.parse_args(argv)
    sources = {file: (REPOSITORY / file).read_text(encoding="utf-8") for file in chosen.module or MODULES}
    if old := stale(equivalents(), sources):
        raise SystemExit("equivalent.txt has entries that are no mutant of today's files:\n" + "\n".join(old))
    found = {file: mutants(file, source) for file, source in sources.items()}
    drawn = sample(found, chosen.count, chosen.seed)
    if chosen.line:
        drawn = [m for of_file in found.values() for m in of_file if m.line in chosen.line]
    caught_before: list[Outcome] = []
    if chosen.again:
        entries = json.loads(chosen.again.read_text(encoding="utf-8"))
        earlier = {(entry["file"], entry["before"], entry["after"]): entry for entry in entries}
        known = {(m.file, *m.lines(sources[m.file])): m for of_file in found.values() for m in of_file}
        drawn = [known[key] for key, entry in earlier.items() if key in known and entry["state"] == "survived"]
        caught_before = [Outcome(known[key], key[1], key[2], "caught", "before") for key, entry in earlier.items()
                         if key in known and entry["state"] == "caught"]  # fmt: skip
        gone = len(earlier) - len(drawn) - len(caught_before)
        print(f"{len(caught_before)} of {len(earlier)} were caught before, {gone} are of lines that have changed")
    every = sum(map(len, found.values()))
    print(f"{len(drawn)} of {every} mutants of {len(found)} modules, seed {chosen.seed}", flush=True)
    if chosen.list:
        for mutant in drawn:
            print(show(Outcome(mutant, *mutant.lines(sources[mutant.file]), "")))
        return 0
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                   "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    os.environ.update(environment)
    sys.dont_write_bytecode = True
    preload()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        tree = Path(name) / "tree"
        copy_tree(tree)
        for outcome in examine(tree, drawn, sources):
            outcomes.append(outcome)
            where = f"{outcome.mutant.file}:{outcome.mutant.line}"
            print(f"{len(outcomes):4} {outcome.state:10} {outcome.seconds:6.1f} s  {where}  {outcome.mutant.operator}"
                  f"  {outcome.how[:100]}", flush=True)  # fmt: skip
            if outcome.state == "survived":
                print(show(outcome), flush=True)
    outcomes = [*caught_before, *outcomes]
    text, score = report(outcomes)
    print(text)
    if chosen.json:
        chosen.json.write_text(json.dumps([described(o) for o in outcomes], indent=1) + "\n", encoding="utf-8")
    return 0 if score >= WANTED else 1


def described(outcome: Outcome) -> dict[str, Any]:
    return {**asdict(outcome.mutant), **{k: v for k, v in asdict(outcome).items() if k != "mutant"}}


if __name__ == "__main__":
    sys.exit(main())
