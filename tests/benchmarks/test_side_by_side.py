"""Two runs on one machine: what the second costs the first, and what the remedy costs one run alone."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.measure import Report, Sample, Settings, interleaved, median, ratio
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.bench

KINDS = {"train": "training of a tiny model", "order": "gradients of batches", "extract": "extraction of features"}


class Worker:
    """A process that does its piece of work when told to."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.answer()  # ready

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "a worker ended; its message is above"
        return json.loads(line)


@contextmanager
def workers(kind: str, how: str, folder: Path) -> Iterator[list[Worker]]:
    """Two warm processes, without any setting of threads in their environment but the user's own."""
    with ExitStack() as stack:
        started = []
        for number in range(2):
            place = folder / f"{kind}-{how}-{number}"
            place.mkdir()
            command = [sys.executable, "-m", "tests.benchmarks.side_by_side_once", kind, how, str(place)]
            process = stack.enter_context(
                subprocess.Popen(command, cwd=REPOSITORY, env=dict(os.environ), stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, text=True)
            )  # fmt: skip
            started.append(process)
        found = [Worker(process) for process in started]  # both load at the same time
        yield found
        for worker in found:
            assert worker.process.stdin is not None
            worker.process.stdin.close()


def together(some: list[Worker]) -> list[Any]:
    """All of them work at the same time."""
    for worker in some:
        worker.tell()
    return [worker.answer() for worker in some]


def test_side_by_side(bench: Settings, tmp_path: Path) -> None:
    report = Report("side_by_side", "Two runs on one machine", bench)
    kept: dict[str, list[Sample]] = {}
    for kind, title in KINDS.items():
        with workers(kind, "datatools", tmp_path) as ours, workers(kind, "torch", tmp_path) as plain:
            arms = {
                "one run": lambda w=ours: together(w[:1]),
                "one run, as torch waits by itself": lambda w=plain: together(w[:1]),
                "two runs": lambda w=ours: together(w),
            }
            samples = interleaved(arms, bench.times(9), bench.seconds / 6)
            # by itself it may be many times slower: twice is enough to see that
            worst = interleaved({"two": lambda w=plain: together(w)}, 2)["two"]
        one, alone, two = (samples[name] for name in arms)
        report.add(f"{title}: one run", median(one), "s")
        report.add(f"{title}: two runs / one", ratio(two, one), "x", at_most=2.2)
        report.add(f"{title}: one run / one as torch waits by itself", ratio(one, alone), "x", at_most=1.03)
        report.add(f"{title}: two runs / one, as torch waits by itself", median(worst) / median(alone), "x")
        cpu = [sum(worker["cpu_seconds"] for worker in sample.value) for sample in (*one, *two)]
        report.add(f"{title}: processor time of two runs / of one", sum(cpu[len(one) :]) / sum(cpu[: len(one)]), "x")
        kept |= {f"{kind}: {name}": list_ for name, list_ in [*samples.items(), ("two as torch", worst)]}
    report.workload = {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}
    report.notes.append(
        "Each run is a warm process; a piece of work is a whole `datatools train` (without the start of Python), the "
        "gradients of 20 batches, or the features of 2 rows. Two runs do twice the work: 2 is what it takes "
        "without any waste. Waiting: `pipelines.runs.threads.choose`, against libgomp's own 300,000 rounds of spinning."
    )
    report.keep(kept)
    report.write(tmp_path)
