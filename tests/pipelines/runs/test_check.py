"""What stops a run from being continued: other settings, changed facts, damaged files."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from datatools import DataError, EnvironmentProblem, UsageError, files
from datatools.files import seals
from pipelines.runs.folder import Run
from pipelines.settings.load import load_config
from pipelines.settings.select import SelectConfig
from pipelines.settings.train import TrainConfig
from tests.pipelines.runs.common import config, read


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
    with pytest.raises(UsageError, match="contains a run of `datatools select`, not of train"):
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
    with pytest.raises(DataError, match=f"r/{name} is not what"), Run("r", config(seed=8), "select"):
        pass
    with pytest.raises(DataError, match="copy it out of the folder" if name == "run.yaml" else "is not what"):
        files.read_bytes(path)
    assert path.read_text() != before
    with Run("r", config(seed=8 if name == "run.yaml" else 7, accept_change=["seals"]), "select") as run:
        assert run.resumed


def test_a_damaged_run_yaml_is_written_again_by_the_command_that_ran(capsys):
    with Run("r", config(seed=7), "select"):
        pass
    before = Path("r/run.yaml").read_bytes()
    Path("r/run.yaml").write_bytes(before[:-9])
    with Run("r", config(seed=7), "select") as run:
        assert run.resumed
    assert Path("r/run.yaml").read_bytes() == before and "written again" in capsys.readouterr().err


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
        with pytest.raises(DataError, match=f"r/{name} is not what"):
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


def test_a_setting_that_is_read_last_may_change_in_a_finished_run():
    """Another budget must not cost the features again; run.yaml says what was asked last."""
    with Run("r", config(budget="5%"), "select"):
        pass
    Path("r/scores.parquet").write_bytes(b"result")
    with Run("r", config(budget="7"), "select") as run:
        assert run.resumed
    assert "budget: '7'" in Path("r/run.yaml").read_text()
