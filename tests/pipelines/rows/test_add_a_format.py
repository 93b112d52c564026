"""A row format is one file and one line in a table: a plugin written here is read, listed, encoded and selected."""

import json
from importlib import import_module

import pytest

from datatools import DataError, UsageError
from pipelines import listing
from pipelines.models import load as models
from pipelines.rows import peek
from pipelines.rows.formats.table import FORMATS, column_names, read_shape
from pipelines.rows.input_files import find_sources
from pipelines.rows.prepare import prepare
from pipelines.select import run as select
from pipelines.settings.parts import DataConfig, ModelConfig
from pipelines.settings.select import SelectConfig
from tests.tiny import save_tiny_model

PLUGIN = """
from pipelines.rows.formats.record import BY_TEMPLATE, Format
from pipelines.rows.formats.turns import conversation


def _read(given, columns):
    ask, say = (given.get(column) for column in columns)
    return conversation([{"role": "user", "content": ask}, {"role": "assistant", "content": say}], set(), set())


RIDDLE = Format(
    name="riddle",
    title="riddle, solution",
    learned="loss on the solution",
    example='{"riddle": "What has keys and no locks?", "solution": "A piano."}',
    used_by="the sphinx",
    rendering=BY_TEMPLATE,
    columns=(("riddle", "solution"),),
    read=_read,
)
"""


@pytest.fixture
def riddle(tmp_path, monkeypatch):
    """The format from a file of its own, and the one line in the table."""
    (tmp_path / "riddle_format.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = import_module("riddle_format").RIDDLE
    monkeypatch.setitem(FORMATS, found.name, found)
    return found


def write(path, n, **names):
    ask, say = names.get("ask", "riddle"), names.get("say", "solution")
    rows = ({ask: f"What is {k} plus {k}?", say: f"It is {2 * k}."} for k in range(n))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_new_format_is_detected_listed_and_named_in_errors(riddle, tmp_path):
    row = json.loads(riddle.example)
    assert [turn["content"] for turn in read_shape(row).messages] == [row["riddle"], row["solution"]]
    assert "riddle, solution" in dict(listing.rows("formats"))
    assert {"riddle", "solution"} <= set(column_names())
    assert read_shape({"q": "a", "solution": "b"}, {"riddle": "q"}).messages[0]["content"] == "a"
    (tmp_path / "odd.jsonl").write_text('{"frage": "q"}\n')
    odd = find_sources([str(tmp_path / "odd.jsonl")])
    with pytest.raises(DataError, match="expected .*; riddle, solution"):
        peek.check(odd, columns=None, flag="--columns")
    with pytest.raises(UsageError, match="did you mean 'riddle'"):
        peek.check(odd, columns={"ridle": "frage"}, flag="--columns")


def test_rows_of_a_new_format_are_encoded_and_selected(riddle, tmp_path):
    model = ModelConfig(name=str(save_tiny_model(tmp_path / "model")), chat="tulu")
    pool, target = write(tmp_path / "pool.jsonl", 12), write(tmp_path / "target.jsonl", 3, ask="frage")
    rows = prepare(DataConfig(paths=[pool]), model, models.load(model, tokenizer_only=True).tokenizer,
                   cache=tmp_path / "cache", label="train")  # fmt: skip
    assert rows.usable.all() and all(rows.scan.supervised > 0)
    config = SelectConfig(
        model=model,
        train=DataConfig(paths=[pool]),
        target=[target],
        target_columns={"riddle": "frage"},
        method="tfidf",
        budget="4",
        out=tmp_path / "run",
    )
    chosen = (select.run(config) / "selected.jsonl").read_text().splitlines()
    assert len(chosen) == 4 and all("riddle" in json.loads(line) for line in chosen)


def test_no_two_formats_share_a_name_and_each_stands_in_its_own_file():
    for name, known in FORMATS.items():
        module = import_module(f"pipelines.rows.formats.{name}")
        assert known.name == name and getattr(module, name.upper()) is known
        shape = read_shape(json.loads(known.example), preference="chosen")
        assert shape.messages or shape.text or shape.completion
