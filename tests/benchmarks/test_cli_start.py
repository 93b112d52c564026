"""How long a user waits for help."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.measure import Report, Settings, interleaved, median

pytestmark = pytest.mark.bench


def test_cli_start(bench: Settings, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("datatools")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "pipelines"]
    arms = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "datatools --help": [*command, "--help"],
        "datatools select --help": [*command, "select", "--help"],
    }
    for arguments in list(arms.values())[1:]:  # right before it is timed, and warm: files read, bytecode written
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Usage:" in done.stdout

    def run(arguments: list[str]) -> None:
        subprocess.run(arguments, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)

    samples = interleaved({name: lambda a=a: run(a) for name, a in arms.items()}, bench.times(11, 3), bench.seconds)
    report = Report("cli_start", "Wall time of a command that only answers", bench)
    report.add("python -c pass", median(samples["python -c pass"]), "s")
    for name in list(arms)[1:]:
        report.add(name, median(samples[name]), "s", at_most=0.5)
    report.notes.append("Warm file cache, bytecode written; wall time of the whole process, starting Python included.")
    report.keep(samples)
    report.write(tmp_path)
