"""Run folders: who may use one, what it records, what stops a run from being continued, and how an interrupt ends."""

import errno
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datatools import DataError, DatatoolsError, EnvironmentProblem, UsageError, files
from datatools.files import seals
from pipelines.runs import folder as runs
from pipelines.runs.folder import Progress, Run, Terminated, derive_seed, interruptible, progress, redact, slug
from pipelines.settings.load import load_config
from pipelines.settings.select import SelectConfig
from pipelines.settings.train import TrainConfig
from tests.processes import spawn

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["datatools", "select"])
    monkeypatch.setattr(Run, "last_folder", None)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield
    runs.set_quiet(False)
    assert Run.current is None


def config(**more):
    values = {"model": "m", "train": "a.jsonl", "target": "d.jsonl"} | more
    return SelectConfig(**values)


def read(path):
    return json.loads(Path(path).read_text())


# ---------------------------------------------------------------------------------------------- what it leaves


def test_a_run_explains_itself(tmp_path):
    with Run(tmp_path / "r", config(seed=7), "select") as run:
        run.check({"data": {"a.jsonl": "abc"}})
        with run.stage("read"), progress("reading", 10, "rows") as bar:
            bar.advance(10)
        runs.warn("odd row")
        assert Run.current is run and not run.resumed
    folder = tmp_path / "r"
    assert sorted(p.name for p in folder.iterdir()) == [
        "events.jsonl",
        "progress.json",
        "provenance.json",
        "run.yaml",
        "seals.jsonl",
    ]
    assert (folder / "run.yaml").read_text().startswith(f"# Replays this run: datatools select {folder}/run.yaml\n")
    assert load_config(SelectConfig, folder / "run.yaml", wanted=()) == config(seed=7)
    found = read(folder / "provenance.json")
    assert found["seed"] == 7 and found["facts"]["data"] == {"a.jsonl": "abc"} and found["changed"] == []
    assert set(found["facts"]["code"]) == {"version", "digest"} and found["versions"]["torch"]
    assert found["machine"]["cpus"] and found["world_size"] == 1
    assert read(folder / "progress.json")["state"] == "done"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["started", "stage", "stage_end", "warning", "done"]
    assert run.warnings == ["odd row"] and run.stages[0]["name"] == "read"


def test_the_same_command_continues(tmp_path):
    with pytest.raises(ZeroDivisionError), Run("r", config(), "select") as run, run.stage("slow"):
        time.sleep(0.02)
        raise ZeroDivisionError
    assert read("r/progress.json")["state"] == "failed" and "ZeroDivision" in read("r/progress.json")["error"]
    before = Path("r/run.yaml").read_bytes()
    with Run("r", config(out=Path("elsewhere")), "select") as run:  # a moved folder is still the same run
        assert run.resumed
        with run.stage("slow"):
            pass
    assert Path("r/run.yaml").read_bytes() == before
    assert [s["name"] for s in run.stages] == ["slow"] and run.stages[0]["seconds"] >= 0.02


def test_a_cut_event_line_is_passed_over():
    with Run("r", config(), "select") as run, run.stage("one"):
        pass
    with open("r/events.jsonl", "ab") as file:
        file.write(b'{"time": "2026')
    with Run("r", config(), "select") as run:
        assert [s["name"] for s in run.stages] == ["one"]
    assert json.loads(Path("r/events.jsonl").read_text().splitlines()[-1])["event"] == "done"


def test_other_settings_are_refused_by_name_and_overwrite_moves_aside(capsys):
    with Run("r", config(), "select"):
        Path("r/selected.jsonl").write_text("first")
    with pytest.raises(UsageError, match=r"other settings: seed was 0, is 1.*--overwrite"):
        with Run("r", config(seed=1, budget="10%"), "select"):
            pass
    assert read("r/progress.json")["state"] == "done" and Path("r/selected.jsonl").exists()
    for number in (1, 2):
        with Run("r", config(seed=number, overwrite=True), "select") as run:
            assert not run.resumed
        assert Path(f"r.old-{number}/run.yaml").exists() and not Path(f"r.old-{number}/.lock").exists()
    assert Path("r.old-1/selected.jsonl").read_text() == "first"
    assert "moved the earlier run to r.old-2" in capsys.readouterr().err


def test_another_command_is_refused():
    with Run("r", config(), "select"):
        pass
    with pytest.raises(UsageError, match="holds a run of `datatools select`, not train"):
        with Run("r", TrainConfig(model="m", data="x"), "train"):
            pass


@pytest.mark.parametrize("name", ["run.yaml", "provenance.json"])
def test_an_edited_record_is_refused_by_name(name):
    """A hand-edited learning rate must not be reported as the one that ran."""
    with Run("r", config(seed=7), "select"):
        pass
    path = Path("r", name)
    before = path.read_text()
    path.write_text(before.replace("7", "8", 1))
    with pytest.raises(DataError, match=f"r/{name} is not what the run wrote"), Run("r", config(seed=8), "select"):
        pass
    with pytest.raises(DataError, match="copy it out of the folder" if name == "run.yaml" else "is not what"):
        files.read_bytes(path)
    assert path.read_text() != before
    with Run("r", config(seed=8 if name == "run.yaml" else 7, accept_change=["seals"]), "select") as run:
        assert run.resumed


def test_a_damaged_run_yaml_is_written_anew_by_the_command_that_ran(capsys):
    with Run("r", config(seed=7), "select"):
        pass
    before = Path("r/run.yaml").read_bytes()
    Path("r/run.yaml").write_bytes(before[:-9])
    with Run("r", config(seed=7), "select") as run:
        assert run.resumed
    assert Path("r/run.yaml").read_bytes() == before and "written anew" in capsys.readouterr().err


def test_a_copy_of_run_yaml_is_a_recipe():
    """Outside its folder the file is the user's to edit."""
    with Run("r", config(seed=7), "select"):
        pass
    Path("mine.yaml").write_text(Path("r/run.yaml").read_text().replace("seed: 7", "seed: 8"))
    with Run("s", load_config(SelectConfig, Path("mine.yaml")), "select") as run:
        assert run.config.seed == 8


def test_a_damaged_result_is_set_aside_and_named(capsys):
    with Run("r", config(), "select") as run:
        files.write_json(files.make_folder(run.path("deep")) / "scores.json", {"a": 1})
        with files.atomic_folder(run.path("adapter")) as folder:
            (folder / "weights").write_bytes(bytes(100))
    for name, data in (("deep/scores.json", b'{\n "a": 2\n}\n'), ("adapter/weights", bytes(99))):
        Path("r", name).write_bytes(data)
        with pytest.raises(DataError, match=f"r/{name} is not what the run wrote"):
            files.checked(Path("r", name))
    with Run("r", config(), "select") as run:
        assert sorted(run.lost) == ["adapter/weights", "deep/scores.json"]
        files.write_json(run.path("deep", "scores.json"), {"a": 1})
    assert Path("r/deep/scores.json.damaged").exists() and "set aside as" in capsys.readouterr().err
    with Run("r", config(), "select") as run:
        assert run.lost == [] and files.read_json("r/deep/scores.json") == {"a": 1}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_damaged_seals_are_named(damage):
    with Run("r", config(), "select"):
        pass
    path = Path("r/seals.jsonl")
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[20] ^= 1
        path.write_bytes({"flip": data, "cut": data[:9], "empty": b""}[damage])
    with pytest.raises(DataError, match=r"seals\.jsonl.*--overwrite.*--accept-change seals"):
        with Run("r", config(), "select"):
            pass
    with Run("r", config(accept_change=["seals"]), "select") as run:
        assert run.resumed


def test_a_line_of_seals_that_a_kill_cut_is_passed_over():
    with Run("r", config(), "select") as run:
        files.write_json(run.path("a.json"), 1)
    with open("r/seals.jsonl", "ab") as file:
        file.write(b'{"name": "b.json", "byt')
    with Run("r", config(), "select") as run:
        files.write_json(run.path("b.json"), 2)
    with Run("r", config(), "select") as run:
        assert run.lost == [] and files.read_json("r/b.json") == 2


def test_a_kill_between_seal_and_rename_leaves_a_file_that_is_believed():
    with Run("r", config(), "select") as run:
        files.write_json(run.path("a.json"), 1)
    seals.record("r/a.json", seals.Seal(2, "0" * 32))
    with Run("r", config(), "select") as run:
        assert run.lost == [] and files.read_json("r/a.json") == 1


def test_a_full_disk_at_any_write_is_said_and_the_same_command_goes_on(monkeypatch):
    """Half-written seals, too: a file without one, or with that of a content that never came, is not damaged."""

    def work():
        with Run("r", config(), "select") as run, run.stage("work"):
            files.write_json(run.path("a.json"), [1])
            with files.atomic_folder(run.path("adapter")) as folder:
                (folder / "weights").write_bytes(bytes(9))
            files.write_json(run.path("a.json"), [1, 2])

    calls, fail_at = [0], [0]

    def full(inner):
        def write(descriptor, data, *where):
            calls[0] += 1
            if calls[0] == fail_at[0]:
                inner(descriptor, data[: len(data) // 2], *where)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return inner(descriptor, data, *where)

        return write

    for name in ("write", "pwrite"):
        monkeypatch.setattr(os, name, full(getattr(os, name)))
    work()
    total = calls[0]
    assert total > 15
    for number in range(1, total + 1):
        shutil.rmtree("r")
        calls[0], fail_at[0] = 0, number
        with suppress(EnvironmentProblem):  # none, where only the note of how far the run is was not written
            work()
            assert number > total - 5
        fail_at[0] = 0
        work()
        assert files.read_json("r/a.json") == [1, 2] and not list(Path("r").rglob("*.damaged")), number
        assert not list(Path("r").rglob(".tmp-*"))


def test_a_name_is_free_again_for_libraries_once_its_file_was_moved_away():
    with Run("r", config(), "select") as run:
        files.write_json(files.make_folder(run.path("checkpoint-4")) / "a.json", 1)
        files.move(run.path("checkpoint-4"), run.path("checkpoint-4.broken"))
        run.path("checkpoint-4").mkdir()
        run.path("checkpoint-4", "a.json").write_text("2")
        assert files.read_json(run.path("checkpoint-4", "a.json")) == 2
    with Run("r", config(), "select") as run:
        assert run.lost == []


def test_a_folder_of_an_older_version_is_read_with_a_note(capsys):
    with Run("r", config(), "select") as run:
        files.write_json(run.path("summary.json"), {})
    Path("r/seals.jsonl").unlink()
    record = Path("r/provenance.json")
    record.write_text(record.read_text().replace('"format": 2', '"format": 1'))
    assert files.read_json("r/summary.json") == {}
    with Run("r", config(), "select") as run:
        assert run.resumed
    assert "a version without seals" in capsys.readouterr().err
    Path("r/summary.json").write_text("{} ")
    with Run("r", config(), "select") as run:
        assert run.lost == ["summary.json"]


def test_damaged_times_of_stages_are_passed_over_and_said(capsys):
    with Run("r", config(), "select") as run, run.stage("one"):
        pass
    path = Path("r/events.jsonl")
    text = path.read_text()
    at = text.index('"seconds": ') + len('"seconds": ')
    path.write_text(text[:at] + "9" + text[at + 1 :])
    with Run("r", config(), "select") as run:
        assert run.stages == []
    assert "1 damaged lines" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- odd folders


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
    with pytest.raises(UsageError, match="folder you are in"), Run(".", config(), "select", overwrite=True):
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
    with pytest.raises(UsageError, match="--out .*(a folder of its own|not seen)") as caught:
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

    runs.set_quiet(True)
    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Run.current = None  # threads share it; only processes are promised
    assert most[0] == 1 and all("in use" in error for error in errors)
    assert not list(Path("r").glob(".tmp-*"))


def test_only_rank_0_writes_and_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Run("r", config(), "select") as run, run.stage("x"), progress("y", 3) as bar:
        bar.advance(3)
        runs.warn("w")
        assert run.check({"data": 1}) == []
    assert not Path("r").exists() and capsys.readouterr().err == "" and runs.world_size() == 2
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(EnvironmentProblem, match="RANK is 'one'"):
        runs.rank()


# ------------------------------------------------------------------------------------------- changed world


def test_a_changed_fact_is_refused_by_name_until_accepted():
    facts = {"data": {"a.jsonl": "1", "b.jsonl": "2"}, "model": {"weights": "3"}, "template": "4"}
    with Run("r", config(), "select") as run:
        run.check(facts)
    changed = {"data": {"a.jsonl": "1", "b.jsonl": "9"}, "model": {"weights": "3"}, "template": "5"}
    with pytest.raises(DataError) as caught, Run("r", config(), "select") as run:
        run.check(changed)
    message = str(caught.value)
    assert 'data.b.jsonl was "2", is "9"' in message and 'template was "4", is "5"' in message
    assert "--accept-change data --accept-change template" in message and "a.jsonl" not in message.split("Restore")[0]
    with Run("r", config(accept_change=["data", "template"]), "select") as run:
        assert run.check(changed) == ["data.b.jsonl", "template"] and run.changed == ["data.b.jsonl", "template"]
    found = read("r/provenance.json")
    assert [(c["what"], c["old"], c["new"]) for c in found["changed"]] == [
        ("data.b.jsonl", "2", "9"),
        ("template", "4", "5"),
    ]
    with Run("r", config(), "select") as run:
        assert run.check(changed) == []


def test_facts_that_come_or_go_inside_a_group_are_changes():
    with Run("r", config(), "select") as run:
        run.check({"data": {"a": "1"}})
    for now in ({"a": "1", "b": "2"}, {"b": "1"}, {}):
        with pytest.raises(DataError, match="data"), Run("r", config(), "select") as run:
            run.check({"data": now})
    with Run("r", config(), "select") as run:
        assert run.check({"data": {"a": "1"}, "new": "fact"}) == []


def test_changed_code_is_refused_and_a_changed_library_is_said(monkeypatch, capsys):
    with Run("r", config(), "select"):
        pass
    monkeypatch.setattr(runs, "code_digest", lambda: "0" * 32)
    with pytest.raises(DataError, match=r"code.digest was .* --accept-change code"), Run("r", config(), "select"):
        pass
    with Run("r", config(accept_change=["code"]), "select") as run:
        assert run.changed == ["code.digest"]
    monkeypatch.setattr(runs, "versions", lambda: {"torch": "99"})
    with Run("r", config(), "select") as run:
        assert run.changed == ["versions.torch"]
    assert "warning: torch is 99 and was" in capsys.readouterr().err


def test_the_code_digest_sees_every_byte(tmp_path, monkeypatch):
    for package in ("optim", "datatools", "pipelines"):
        (tmp_path / package).mkdir()
    file = tmp_path / "optim" / "x.py"
    file.write_text("a = 1\n")
    (tmp_path / "pipelines" / "cli.py").write_text("shows\n")
    monkeypatch.setattr(runs, "_ROOT", tmp_path)
    first = runs.code_digest()
    (tmp_path / "pipelines" / "cli.py").write_text("shows otherwise\n")
    assert runs.code_digest() == first
    file.write_text("a = 2\n")
    second = runs.code_digest()
    file.rename(file.with_name("y.py"))
    assert len({first, second, runs.code_digest()}) == 3


def test_git_commit(tmp_path):
    commit = "0123456789" * 4
    git = tmp_path / ".git"
    assert runs.git_commit(tmp_path) is None
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text(f"{commit}\n")
    assert runs.git_commit(tmp_path) == commit
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert runs.git_commit(tmp_path) is None
    (git / "packed-refs").write_text(f"# pack-refs\n{commit[::-1]} refs/heads/main\n")
    assert runs.git_commit(tmp_path) == commit[::-1]
    (git / "refs/heads/main").write_text(f"{commit}\n")
    assert runs.git_commit(tmp_path) == commit
    worktree = tmp_path / "tree"
    (git / "worktrees/tree").mkdir(parents=True)
    worktree.mkdir()
    (worktree / ".git").write_text("gitdir: ../.git/worktrees/tree\n")
    (git / "worktrees/tree/HEAD").write_text("ref: refs/heads/main\n")
    (git / "worktrees/tree/commondir").write_text("../..\n")
    assert runs.git_commit(worktree) == commit


def test_digest_inputs(tmp_path):
    Path("d").mkdir()
    Path("d/x").write_bytes(b"1")
    Path("y").write_bytes(b"2")
    assert runs.digest_inputs(["d", "y"]) == {"d/x": files.digest(b"1"), "y": files.digest(b"2")}
    with pytest.raises(DataError, match="missing"):
        runs.digest_inputs(["missing"])


# ---------------------------------------------------------------------------------------------- secrets, names


def test_secrets_and_names_stay_out(monkeypatch, tmp_path):
    secrets = {
        "HF_TOKEN": "hf_abcdefghijklmnop",
        "WANDB_API_KEY": "0123456789abcdef0123",
        "MY_SECRET": "correct horse",
        "DB_PASSWORD": "hunter2hunter2",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home/alice"))
    monkeypatch.setenv("USER", "alice")
    others = [
        "hf_ZZZZZZZZZZZZ",
        "sk-proj-abcdefgh1234",
        "ghp_abcdefghijklmnop",
        "AKIAABCDEFGHIJKLMNOP",
        "s3cr3tpass",
        "zyx987tok",
    ]
    argv = [
        "datatools",
        "select",
        "--model",
        others[0],
        "--set",
        f"a={others[1]}",
        others[2],
        others[3],
        f"https://bob:{others[4]}@host/x",
        f"--token={others[5]}",
        str(tmp_path / "home/alice/data"),
        "/scratch/alice/x",
        *secrets.values(),
        f"{platform.node()}:/x",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(DataError), Run("r", config(model=str(tmp_path / "home/alice/m")), "select"):
        raise DataError(f"{others[0]} {secrets['MY_SECRET']} {tmp_path}/home/alice/z")
    everything = "".join(p.read_text() for p in Path("r").iterdir())
    for hidden in [*secrets.values(), *others, "alice", *([platform.node()] if len(platform.node()) > 2 else [])]:
        assert hidden not in everything, hidden
    assert "~/data" in everything and "<user>" in everything and "~/m" in Path("r/run.yaml").read_text()
    assert "<user>" not in runs.command_line(names=False)


def test_redact_leaves_ordinary_words(monkeypatch):
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setenv("SOME_KEY", "12345678")  # a number could be anything: a budget, a seed
    monkeypatch.setenv("GIT_AUTHOR_NAME", "select")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "budget")
    text = "select --budget 12345678 --train annual.jsonl planning-ann.x --key-frames 3 token budget 20000 tokens"
    assert redact(text).replace("<user>", "ann") == text


@given(st.text(max_size=300))
def test_slugs_are_safe_names(name):
    text = slug(name)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*|[A-Za-z0-9._-]*-[0-9a-f]{8}", text) and len(text) <= 80
    assert text not in (".", "..") and not text.startswith((".", "-")) and slug(name) == text
    assert slug(text) == text


def test_slugs():
    names = [
        "dolly",
        "a/b",
        "a b",
        "../x",
        "..",
        "",
        "CON",
        "nul.txt",
        "x" * 300,
        "日本",
        "a\u2215b",
        "C:\\x",
        "-rf",
        "a\0",
    ]
    slugs = [slug(n) for n in names]
    assert slugs[0] == "dolly" and len(set(slugs)) == len(names)


def test_paths_stay_inside():
    run = Run("r", config(), "select")
    assert run.path("a", "b.json") == Path("r/a/b.json")
    for parts in (("..", "x"), ("/etc",), ("a", "../../x"), ("a\0",)):
        with pytest.raises(UsageError, match="not a path inside"):
            run.path(*parts)


def test_seeds_are_separate_streams():
    seeds = {derive_seed(s, *n) for s in (0, 1) for n in [("a",), ("b",), ("a", 1), ("a", "1"), ("a1",), ()]}
    assert len(seeds) == 12 and all(0 <= s < 2**63 for s in seeds)
    assert (
        derive_seed(0, "warm-up") == 1671845863333336181
    )  # b2sum -l 64 of '[0, "warm-up"]', halved; seeds never change


# ----------------------------------------------------------------------------------------------------- progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_lines_every_thirty_seconds(capsys):
    clock = Clock()
    bar = Progress("gradients", 1000, "rows", 100, clock=clock)
    for _ in range(9):
        clock.now += 10
        bar.advance(20, loss=1.23456, tokens=900)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "gradients: 160 of 1,000 rows (16 %), 2 rows/s, loss 1.235, tokens 900, about 7 min left"
    assert bar.rate == 2 and bar.eta_seconds == 360


def test_quiet_means_quiet(capsys):
    runs.set_quiet(True)
    with progress("x", 3) as bar:
        bar.advance(3)
    runs.say("hello")
    assert capsys.readouterr().err == ""
    runs.warn("still said")
    assert capsys.readouterr().err == "warning: still said\n"


def test_progress_json_is_fresh():
    with Run("r", config(), "select"), progress("gradients", 4, "rows") as bar:
        bar.advance(1, loss=2.0)
        found = read("r/progress.json")
        assert found["state"] == "running" and found["doing"]["description"] == "gradients"
        assert found["doing"]["done"] == 1 and found["doing"]["total"] == 4 and found["doing"]["notes"] == {"loss": 2.0}


def test_data_cannot_command_the_terminal(capsys):
    runs.say("\x1b[31mred\u202egnp.exe\r")
    with progress("a\x1b[2J", None) as bar:
        bar.advance(1, source="x\x07")
    text = capsys.readouterr().err
    assert not set(text) & {"\x1b", "\u202e", "\r", "\x07"} and "red" in text


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress("outer", 2, "files") as outer, progress("inner [bold]", 5) as inner:
        inner.advance(5, loss=0.5)
        runs.say("news [red]")
        outer.advance()
    text = screen.getvalue()
    assert "inner [bold]" in text and "news [red]" in text and runs._Screen.bars is None
    with pytest.raises(ZeroDivisionError), progress("broken", 2):
        raise ZeroDivisionError
    assert runs._Screen.bars is None and runs._Screen.open_bars == 0


# ---------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_signals_become_exceptions_and_handlers_come_back(number, kind):
    before = signal.getsignal(number)
    with interruptible():
        with pytest.raises(kind) as caught:
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert type(caught.value) is kind
        os.kill(os.getpid(), number)  # the same wish, while cleaning up
        time.sleep(0.05)
    assert signal.getsignal(number) is before


def test_the_write_under_way_is_finished(monkeypatch, tmp_path):
    """The signal comes between opening the temporary file and the rename; the file is there, then the exception."""
    real = os.fsync
    sent = []

    def slow(descriptor):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    with interruptible(), pytest.raises(Terminated):
        files.write_text(tmp_path / "x", "whole")
        time.sleep(5)
    assert (tmp_path / "x").read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_write_that_hangs_does_not_hold_the_interrupt_for_ever(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "_PATIENCE_SECONDS", 0.2)

    def hang(descriptor):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(os, "fsync", hang)
    start = time.monotonic()
    with interruptible(), pytest.raises(Terminated):
        files.write_text(tmp_path / "x", "whole")
    assert time.monotonic() - start < 5 and list(tmp_path.iterdir()) == []


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with interruptible():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_interrupted_run_says_so():
    with pytest.raises(Terminated), Run("r", config(), "select"):
        raise Terminated
    assert read("r/progress.json")["state"] == "interrupted"
    assert "finished work is kept in r; the same command continues it: datatools select" in runs.how_to_continue()
    with Run("r", config(), "select") as run:
        assert run.resumed


def test_a_run_that_failed_before_it_made_anything_does_not_occupy_the_folder():
    """A slip in the command must not force --overwrite upon its correction; results in the folder do."""
    with pytest.raises(ZeroDivisionError), Run("r", config(seed=1), "select"):
        raise ZeroDivisionError
    with Run("r", config(seed=2), "select") as run:
        assert not run.resumed and len(Path("r/events.jsonl").read_text().splitlines()) == 1
        Path("r/scores.parquet").write_bytes(b"result")
    with pytest.raises(UsageError, match="other settings"), Run("r", config(seed=3), "select"):
        pass


def test_a_setting_that_is_read_last_may_change_in_a_finished_run():
    """Another budget must not cost the features again; run.yaml says what was asked last."""
    with Run("r", config(budget="5%"), "select"):
        pass
    Path("r/scores.parquet").write_bytes(b"result")
    with Run("r", config(budget="7"), "select") as run:
        assert run.resumed
    assert "budget: '7'" in Path("r/run.yaml").read_text()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the peak is what getrusage says")
def test_the_peak_of_memory_is_the_process_s_own():
    """getrusage's begins with that of the process which started this one."""
    child = "from pipelines.runs.folder import peak_rss_bytes; print(peak_rss_bytes())"
    parent = "import subprocess, sys; held = bytearray(400 << 20); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    found = subprocess.run([sys.executable, "-c", parent, child], cwd=REPOSITORY, capture_output=True, check=True)
    assert 1 << 22 < int(found.stdout) < 400 << 20
