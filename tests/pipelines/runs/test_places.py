"""Where a run may be: odd names, folders of others, links, two starters at a time."""

import os
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from datatools import DataError, DatatoolsError, EnvironmentProblem, UsageError, files
from pipelines.runs import messages
from pipelines.runs.folder import Run
from tests.pipelines.runs.common import config
from tests.processes import spawn


def test_a_folder_with_something_else_is_left_alone():
    Path("r").mkdir()
    Path("r/thesis.tex").write_text("x")
    for overwrite in (False, True):
        with (
            pytest.raises(UsageError, match=r"thesis.tex|no run\.yaml"),
            Run("r", config(), "select", overwrite=overwrite),
        ):
            pass
    assert [p.name for p in Path("r").iterdir()] == ["thesis.tex"]


def test_what_a_kill_leaves_before_run_yaml_is_no_obstacle():
    Path("r").mkdir()
    for name in ("provenance.json", "progress.json", ".lock"):
        Path("r", name).write_text("{}")
    Path("r/events.jsonl").write_text("")
    with Run("r", config(), "select") as run:
        assert not run.resumed


def test_the_folder_you_are_in_is_not_moved(monkeypatch):
    with Run("r", config(), "select"):
        pass
    monkeypatch.chdir("r")
    with pytest.raises(UsageError, match="is the current folder"), Run(".", config(), "select", overwrite=True):
        pass


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "a\0b", "loop", "loop/below"])
def test_impossible_folders_are_named(name):
    Path("file").write_text("x")
    Path("loop").symlink_to("loop")
    with pytest.raises((UsageError, EnvironmentProblem, DataError)) as caught, Run(name, config(), "select"):
        pass
    assert "--out" in str(caught.value)
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\udcffb", "a\u202eb", "/", "~"])
def test_names_that_cannot_be_read_and_folders_of_everybody_are_refused(name):
    name = os.path.expanduser(name)
    with pytest.raises(UsageError, match="--out .*(a folder of its own|invisible characters)") as caught:
        with Run(name, config(), "select"):
            pass
    assert str(caught.value).isprintable() and not list(Path().iterdir())


@pytest.mark.parametrize("name", ["events.jsonl", "progress.json", "run.yaml", "inputs", "deep/x.json", ".lock"])
@pytest.mark.parametrize("kind", ["link", "pipe", "hard"])
def test_what_is_planted_in_a_run_folder_is_not_written_through(name, kind):
    """A link, a pipe or a second name of a file outside: refused by name or replaced, never followed or waited for."""
    with Run("r", config(), "select"):
        pass
    Path("outside").write_text("precious")
    path = Path("r", name)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    {"link": lambda: path.symlink_to("../outside"), "pipe": lambda: os.mkfifo(path),
     "hard": lambda: os.link("outside", path)}[kind]()  # fmt: skip
    with pytest.raises(DatatoolsError) if kind != "hard" else nullcontext(), Run("r", config(), "select") as run:
        files.write_json(files.make_folder(run.path("deep")) / "x.json", 1)
    assert Path("outside").read_text() == "precious"


def test_a_link_that_comes_later_is_not_followed():
    Path("outside").mkdir()
    with Run("r", config(), "select") as run:
        run.path("deep").symlink_to(Path("outside").resolve())
        with pytest.raises(DataError, match="r/deep is a symbolic link"):
            files.write_json(run.path("deep", "x.json"), 1)
        with pytest.raises(DataError, match="r/deep is a symbolic link"):
            files.make_folder(run.path("deep", "more"))
        with pytest.raises(DataError, match="r/deep is a symbolic link"), files.atomic_folder(run.path("deep", "x")):
            pass
    assert not list(Path("outside").iterdir())


def test_the_folder_itself_may_be_a_link():
    Path("disk").mkdir()
    Path("r").symlink_to("disk")
    for _ in range(2):
        with Run("r", config(), "select") as run:
            files.write_json(run.path("a.json"), 1)
    assert run.resumed and run.lost == []


def test_files_of_libraries_are_not_for_others_to_write():
    before = os.umask(0)
    try:
        with Run("deep/r", config(), "select") as run:
            run.path("theirs").mkdir()
            run.path("theirs", "x").write_text("x")
    finally:
        assert os.umask(before) == 0
    modes = [p.stat().st_mode & 0o022 for p in (Path("deep"), *Path("deep").rglob("*"))]
    assert not any(modes)


def test_what_killed_writers_left_anywhere_goes():
    with Run("r", config(), "select") as run:
        for part in ("inputs", "inputs/.tmp-0123456789abcdef"):
            run.path(part).mkdir()
        for name in ("inputs/.tmp-1", "inputs/.tmp-0123456789abcdef/x", ".tmp-2"):
            run.path(name).write_text("half")
    with Run("r", config(), "select"):
        pass
    assert not [p for p in Path("r").rglob("*") if ".tmp-" in str(p)] and Path("r/inputs").is_dir()


@pytest.mark.parametrize("name", ["with space", "été 日本", "x" * 255, "-dash"])
def test_odd_but_possible_names(name):
    with Run(name, config(), "select"):
        pass
    assert Path(name, "run.yaml").exists()


def test_two_runs_in_one_folder_are_refused():
    with Run("r", config(), "select"):
        code = """
            from pipelines.settings.select import SelectConfig
            from pipelines.runs.folder import Run
            Run("r", SelectConfig(model="m", train="a.jsonl", target="d.jsonl", overwrite=True), "select").__enter__()
        """
        other = spawn(code)
        _, error = other.communicate(timeout=60)
    assert other.returncode != 0 and f"process {os.getpid()}" in error and "started" in error
    assert Path("r/run.yaml").exists() and not Path("r.old-1").exists()


def test_of_many_overwriting_starters_the_folder_holds_one_at_a_time():
    errors, inside, most = [], [0], [0]
    guard = threading.Lock()

    def start():
        try:
            with Run("r", config(overwrite=True), "select"):
                with guard:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.01)
                with guard:
                    inside[0] -= 1
        except EnvironmentProblem as error:
            errors.append(str(error))

    with messages.quietly():
        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most[0] == 1 and all("in use" in error for error in errors)
    assert not list(Path("r").glob(".tmp-*"))


def test_a_run_that_failed_before_it_made_anything_does_not_occupy_the_folder():
    """A slip in the command must not force --overwrite upon its correction; results in the folder do."""
    with pytest.raises(ZeroDivisionError), Run("r", config(seed=1), "select"):
        raise ZeroDivisionError
    with Run("r", config(seed=2), "select") as run:
        assert not run.resumed and len(Path("r/events.jsonl").read_text().splitlines()) == 1
        Path("r/scores.parquet").write_bytes(b"result")
    with pytest.raises(UsageError, match="other settings"), Run("r", config(seed=3), "select"):
        pass
