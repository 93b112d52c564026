"""Rows made ready for work: what is said, and written down, about those that cannot be used."""

import json

import pytest

from pipelines.models import load as models
from pipelines.rows import prepare as module
from pipelines.rows.prepare import prepare, target_data
from pipelines.rows.row import Refused
from pipelines.settings.parts import DataConfig, ModelConfig


@pytest.fixture
def broken(tmp_path):
    """Seven bad lines, an id that is used twice, and two good lines."""
    good = [{"id": name, "prompt": "q", "completion": "a"} for name in ("one", "two", "one")]
    path = tmp_path / "broken.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in good) + "{\n" * 7)
    return path


def refused(data, tmp_path, folder=None):
    with pytest.raises(Refused) as caught:
        prepare(data, ModelConfig(name="m"), None, cache=tmp_path / "cache", label="pool", folder=folder)
    return caught.value


def test_all_rows_that_an_error_is_about_are_in_the_file(tmp_path, broken, monkeypatch):
    """The message names the first five; bad_rows.jsonl has all of them, and the input is read once for both."""
    read, real = [], module.index_rows
    monkeypatch.setattr(module, "index_rows", lambda *args, **options: read.append(1) or real(*args, **options))
    error = refused(DataConfig(paths=[str(broken)]), tmp_path, tmp_path)
    assert "8 of 10 rows cannot be used" in str(error) and str(error).endswith("copies them to a file)")
    found = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["line"] for row in found] == [3, 4, 5, 6, 7, 8, 9, 10] and found[0]["reason"] == "repeated_id"
    assert len(error.rows) == 8 and len(read) == 1


def test_a_file_of_which_every_row_is_bad_is_in_the_file_too(tmp_path):
    (tmp_path / "x.jsonl").write_text("{\n{\n")
    refused(DataConfig(paths=[str(tmp_path / "x.jsonl")], on_bad_row="skip"), tmp_path, tmp_path)
    assert len((tmp_path / "bad_rows.jsonl").read_text().splitlines()) == 2


def test_no_target_row_is_left_out(tmp_path, broken):
    data = target_data(DataConfig(paths=["pool.jsonl"], on_bad_row="skip"), [str(broken)])
    error = refused(data, tmp_path, tmp_path)
    assert "8 of 10 rows" in str(error) and str(error).endswith("target rows are never left out automatically")
    assert "--on-bad-row" not in str(error) and not (tmp_path / "bad_rows.jsonl").exists()


def test_what_rows_say_beside_their_text_is_warned_of(tmp_path, world, monkeypatch):
    """Pictures that a model of text does not get, and answers of unpaired preferences that are not wanted."""
    said = []
    monkeypatch.setattr(module, "warn", said.append)
    model = ModelConfig(name=str(world.model))
    tokenizer = models.load(model, tokenizer_only=True).tokenizer
    for more, words in (
        ({"label": False}, "1 of 2 rows, the column label is false"),
        ({"kto_tag": False}, "1 of 2 rows, the column label is false"),
        ({"image": "a.png"}, "1 of 2 rows, pictures, sound or video"),
        ({"label": 0, "image": None, "kto_tag": None}, ""),
    ):
        said.clear()
        rows = [{"prompt": "q", "completion": "a", **more}, {"prompt": "q", "completion": "b", "label": True}]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare(
            DataConfig(paths=[str(tmp_path / "rows.jsonl")]), model, tokenizer, cache=tmp_path / "cache", label="pool"
        )
        assert [words in text for text in said] == ([True] if words else [])
