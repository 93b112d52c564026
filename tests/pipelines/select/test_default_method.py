"""`auto` is the method of a selection that names none; runs that were begun with another one keep it."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from datatools import UsageError
from pipelines import select
from pipelines.cli.app import main
from pipelines.settings.load import load_config
from pipelines.settings.methods import DEFAULT, known
from pipelines.settings.select import SelectConfig
from tests.pipelines.select.test_in_memory import SMALL


def test_the_default_is_auto_in_yaml_and_on_the_command_line(tmp_path):
    assert DEFAULT == "auto" and known(DEFAULT).candidates
    path = tmp_path / "s.yaml"
    path.write_text("model: m\ntrain: a.jsonl\ntarget: d.jsonl\n")
    assert load_config(SelectConfig, path).method == "auto"
    assert load_config(SelectConfig, path, {"method": "less"}).method == "less"


def test_without_a_target_the_message_names_methods_that_need_none(world, tmp_path, capsys):
    assert main(["select", "--model", str(world.model), "--train", str(world.pool), "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert "method 'auto' compares with target rows and got none; name them with --target FILE" in error
    assert "or use a method that needs none: --method random or random-length or loss" in error


def test_a_run_by_less_is_not_continued_by_another_method(world, tmp_path, capsys):
    """The command of an older version, whose default was less, was typed without a method."""
    out = tmp_path / "run"
    argv = world.argv("select", out=out)
    place = argv.index("--method")
    assert main(argv) == 0
    before = (out / "selected.jsonl").read_bytes()
    assert main(argv[:place] + argv[place + 2 :]) == 2
    error = capsys.readouterr().err
    assert 'method was "less", is "auto"' in error and f"`datatools select {out / 'run.yaml'}`" in error
    assert main(["select", str(out / "run.yaml")]) == 0
    assert (out / "selected.jsonl").read_bytes() == before


def test_in_memory_the_default_is_raced_when_asked(world):
    rows = [json.loads(line) for line in world.pool.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(world.model)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    found = select(model, tokenizer, rows[:50], rows[50:], budget=5, verify=True,
                   settings={**SMALL, "training.epochs": 1, "metrics.names": ["loss"]})  # fmt: skip
    assert found.summary["method"] == "auto" and found.summary["race"]["rows"] == 10
    assert found.summary["race"]["kept"] in known("auto").candidates and len(found) == 5
    assert "Which candidate selects?" in found.report()._repr_html_()
    with pytest.raises(UsageError, match="method 'rds' has none"):
        select(model, tokenizer, rows[:50], rows[50:], method="rds", verify=True, settings=SMALL)
