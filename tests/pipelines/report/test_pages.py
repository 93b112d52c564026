"""`datatools report DIR` draws what is there, or says what is not."""

import json

import pytest

from datatools import DataError, UsageError, files
from pipelines.cli.app import main
from pipelines.report import pages
from pipelines.runs.folder import Run
from pipelines.select import run as select
from tests.pipelines import damage
from tests.pipelines.report.made_up import make_run, words


def drawn(folder):
    return words(pages.draw(folder).read_text())


@pytest.fixture
def audit(tmp_path):
    """The folder of an audit."""
    found = make_run(tmp_path, n=100)["audit"] | {"test_rows": 61, "test_tokens": 900, "recipe": {"epochs": 3}}
    (tmp_path / "audit").mkdir()
    files.write_json(tmp_path / "audit" / "audit.json", found)
    return tmp_path / "audit"


def test_folders_without_a_run_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        pages.draw(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="this is a file"):
        pages.draw(tmp_path / "file")
    with pytest.raises(UsageError, match="run.yaml is missing"):
        pages.draw(tmp_path)


def test_an_audit_has_a_page_of_its_own(audit):
    page = drawn(audit)
    assert "Does training on the selection help?" in page and "61" in page and "random, same lengths" in page
    assert "epochs" in page


def test_a_run_that_failed_says_with_what(world, tmp_path):
    with pytest.raises(DataError), Run(tmp_path / "run", world.select(tmp_path / "run"), "select") as run:
        with run.stage("read"):
            pass
        raise DataError("row 7 is <b>broken</b>")
    page = pages.draw(tmp_path / "run").read_text()
    assert "This run failed" in page and "row 7 is &lt;b&gt;broken&lt;/b&gt;" in page and "<b>broken" not in page
    assert "datatools select" in page and "the same command continues the run" in page and "budget" in page


def test_a_run_that_was_killed_and_one_that_runs_are_told_apart(world, tmp_path):
    folder = tmp_path / "run"
    with Run(folder, world.select(folder), "select"):
        assert "This run is running" in drawn(folder)
        left = (folder / "progress.json").read_bytes()
    (folder / "progress.json").write_bytes(left)  # as a kill leaves it
    assert "was stopped before it finished" in drawn(folder)
    for name in ("progress.json", "provenance.json", "events.jsonl"):
        damage.check(pages.draw, folder / name, 15)
        (folder / name).write_text("{")
    assert "ended in an unknown state" in drawn(folder)
    files.write_bytes(folder / "run.yaml", b"\xff\xfe\x00: \x1b[31m")
    assert "U+001B" in pages.draw(folder).read_text()
    (folder / "run.yaml").write_text("by: hand")
    assert "is not what the run wrote" in drawn(folder)


@pytest.mark.parametrize("name", ["progress.json", "provenance.json", "events.jsonl", "run.yaml"])
def test_a_record_of_which_one_digit_changed_is_named_on_the_page_of_a_run(world, tmp_path, capsys, name):
    """The page left out what it could not read, without a word, and believed another digit in progress.json."""
    with pytest.raises(DataError), Run(tmp_path / "run", world.select(tmp_path / "run"), "select") as run:
        run.warned("256 rows")
        raise DataError("256 dimensions")
    path = tmp_path / "run" / name
    text = path.read_text()
    assert "256" in text or name == "provenance.json"
    path.write_text(text.replace("256", "257") if "256" in text else text.replace('"python": "', '"python": "4', 1))
    assert path.read_text() != text
    page = drawn(tmp_path / "run")
    assert name in capsys.readouterr().err and name in page and "257" not in page


def test_the_page_of_a_run_names_a_log_that_was_cut_and_a_result_that_changed(world, tmp_path, capsys):
    folder = tmp_path / "run"
    with Run(folder, world.select(folder), "select"):
        files.write_text(folder / "order.txt", "1 2 3")
    assert "ends before" not in drawn(folder) and capsys.readouterr().err == ""
    lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (lines[:-1], []):
        (folder / "events.jsonl").write_bytes(b"".join(kept))
        assert "events.jsonl ends before the run did" in drawn(folder)
    (folder / "order.txt").write_text("1 2 4")
    assert "order.txt is not what the run wrote" in drawn(folder) and "order.txt" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for kind in pages.KINDS for name in kind.files])
def test_a_damaged_file_is_named(tmp_path, name):
    for content in ("{", "[]", "1", '{"rows": 3}'):
        (tmp_path / name).write_text(content)
        try:
            pages.draw(tmp_path)
        except DataError as error:
            assert name in str(error) or "scores.parquet" in str(error) or "metrics.jsonl" in str(error)
        else:
            assert name == "audit.json" and content.startswith('{"'), "every part of it may be missing"


@pytest.mark.parametrize("name", [name for kind in pages.KINDS for name in kind.files])
def test_the_command_takes_every_folder_that_has_a_page(tmp_path, capsys, name):
    """A folder with nothing but this file is not refused as no run: its content is looked at."""
    (tmp_path / name).write_text("{")
    assert main(["report", str(tmp_path)]) == 3
    assert name in capsys.readouterr().err


def test_values_of_another_type_are_told(audit):
    assert damage.check(pages.draw, audit / "audit.json", 30) < 30
    damage.check(pages.draw, audit.parent / "summary.json", 60)


def test_a_finished_selection_is_drawn_again(world, tmp_path):
    run = select.run(world.select(tmp_path / "run", method="random"))
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert pages.draw(run).read_bytes() == before
    summary = json.loads((run / "summary.json").read_text())
    files.write_json(run / "summary.json", {**summary, "warnings": 5})
    with pytest.raises(DataError, match=r"summary.json is damaged .*; run the same command again"):
        pages.draw(run)


def test_a_new_kind_of_page_is_one_line(tmp_path, monkeypatch):
    def render(folder):
        files.write_text(folder / "report.html", "<h1>A new kind</h1>")
        return folder / "report.html"

    files.write_json(tmp_path / "new.json", {})
    monkeypatch.setattr(pages, "KINDS", [*pages.KINDS, pages.Kind(("new.json",), render)])
    assert drawn(tmp_path).strip() == "A new kind"
