"""Options, fixtures and the final counts that all tests share."""

import gc
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # helpers are imported as tests.<...>, however pytest is started

os.environ.setdefault("OPTIM_CACHE", str(REPOSITORY / "build" / "optim-steps"))  # not that of the user

if not torch.cuda.is_available():  # kernels are made for Triton's interpreter or a GPU when they are first imported
    with pytest.MonkeyPatch.context() as _environment:
        _environment.setenv("TRITON_INTERPRET", "1")
        from optim import backend  # noqa: F401, `import optim` alone loads nothing

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, database=None)
settings.register_profile(
    "nightly",
    deadline=None,
    max_examples=2000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def shared_folder() -> Path:
    """Where data and reference numbers that are not part of the repository lie."""
    return Path(os.environ.get("DATATOOLS_SHARED", REPOSITORY.parent / "shared"))


def golden_folder(config: pytest.Config) -> Path:
    """The folder of reference numbers: `--golden-dir`, or `golden` of the shared folder."""
    given = config.getoption("--golden-dir")
    return Path(given) if given else shared_folder() / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        metavar="DIR",
        help="reference numbers to compare with: folders with a manifest.json (default: ../shared/golden)",
    )


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder} (set DATATOOLS_SHARED)")
    return folder


@pytest.fixture(scope="session")
def golden_dir(pytestconfig: pytest.Config) -> Path:
    folder = golden_folder(pytestconfig)
    if not folder.is_dir():
        pytest.skip(f"no golden folder at {folder} (pass --golden-dir DIR)")
    return folder


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose tensors Triton kernels take: the CPU, by the interpreter, and with `-m gpu` a GPU."""
    from optim import backend

    if backend.triton is None:
        pytest.skip("triton is not installed")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return torch.device("cuda", 0)
    if not backend.interpreted:
        pytest.skip("a GPU is there: kernels are compiled, not interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OPTIM_BACKEND", "triton")
    return torch.device("cpu")


_frozen = 0


def pytest_runtest_setup() -> None:
    """Spare the garbage collector what modules hold: accelerate runs it once per training, and it would take 0.5 s."""
    global _frozen
    if len(sys.modules) > _frozen + 100:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The counts of the optimizer battery and of the golden cases: what was held, and what was left out and why."""
    battery: Counter[str] = Counter()
    excepted: dict[str, list[str]] = {}
    golden: Counter[str] = Counter()
    not_built: Counter[str] = Counter()
    elsewhere: dict[str, str] = {}
    run: set[str] = set()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            marks = dict(getattr(report, "user_properties", []))
            if "battery" in marks:
                if "excepted" in marks:
                    excepted.setdefault(marks["excepted"], []).append(marks["battery"])
                else:
                    battery[outcome] += 1
            if "golden" in marks:
                if "not_built" in marks:
                    not_built[marks["not_built"]] += 1
                elif "elsewhere" in marks:
                    elsewhere[marks["golden"]] = marks["elsewhere"]
                else:
                    golden[outcome] += 1
                    run.add(marks["golden"])
    if battery or excepted:
        left_out = sum(len(cells) for cells in excepted.values())
        total = sum(battery.values()) + left_out
        terminalreporter.section("optimizer battery")
        terminalreporter.write_line(
            f"rule x property: {total} = {battery['passed']} held, {battery['failed'] + battery['error']} failed, "
            f"{battery['skipped']} skipped, {left_out} exceptions ({100 * left_out / total:.1f} %)"
        )
        for reason, cells in sorted(excepted.items()):
            terminalreporter.write_line(f"  exception: {', '.join(sorted(cells))}: {reason}")
    if golden or not_built or elsewhere:
        terminalreporter.section("golden cases")
        left = Counter(test for case, test in elsewhere.items() if case not in run)
        terminalreporter.write_line(
            f"{golden['passed']} held, {golden['failed'] + golden['error']} failed, "
            f"{sum(not_built.values())} not supported"
            + (f", {golden['skipped']} skipped" if golden["skipped"] else "")
            + (f", {sum(left.values())} of tests that did not run" if left else "")
        )
        for reason, count in sorted(not_built.items()):
            terminalreporter.write_line(f"  not supported: {reason} ({count})")
        for test, count in sorted(left.items()):
            terminalreporter.write_line(f"  not run: {count} of {test}")
