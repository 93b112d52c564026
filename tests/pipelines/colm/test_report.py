"""What the report and the terminal say of coresets."""

import json
import math
import re
import shutil

import pytest

from datatools import DataError, files
from pipelines.colm import choosing, coresets
from pipelines.report import colm_page as coreset_report
from pipelines.settings.parts import TrainingConfig
from pipelines.settings.train import CoresetConfig
from pipelines.training import train
from tests.pipelines import damage
from tests.pipelines.colm.runs import metrics, settings


@pytest.mark.parametrize("name", ["coreset.json", "metrics.jsonl"])
def test_values_of_another_type_are_told(first, name):
    assert damage.check(coreset_report.render, first / name, 25)


def test_the_report_says_what_happened(first):
    page = (first / "report.html").read_text()
    assert "Does choosing rows have an effect?" in page and "<script" not in page
    assert 'style="width:100.00%"' in page, "bars use the width that there is"
    assert 'data-of="kept of drawn"' in page, "a narrow page names the numbers"
    for text in ("rare", "small: all kept", "share of kept rows", "choosing took", "herding",
                 "random rows, same sources and quotas"):  # fmt: skip
        assert text in page, text
    assert re.search(r"The process used up to [\d.]+\s[MG]B of memory, choosing included", page)
    assert page.count("<svg") == 3 and page.count('class="range other"') == 1
    assert coreset_report.render(first).read_text() == page, "drawn again from the files alone"


def test_the_report_warns_and_shows_hostile_names_harmlessly(first, tmp_path):
    run = shutil.copytree(first, tmp_path / "run")
    lines = metrics(run)
    for entry in lines:
        if "match_error" in entry:
            entry["step"] *= 40
            entry["match_error"] = entry["match_error_random"]
    facts = json.loads((run / "coreset.json").read_text())
    choose = CoresetConfig(**facts["settings"])
    monitored = coresets.monitored(lines)
    found = coresets.facts(choose, ["<script>alert(1)</script>", "b\u202ec"], monitored)
    assert "no better than random" in found["warning"]
    files.write_text(run / "coreset.json", json.dumps(found))
    page = coreset_report.render(run).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert "no better than random" in page
    control = coresets.facts(choose.model_copy(update={"method": "random_in_source"}), ["a"], monitored)
    assert control["warning"] is None, "the control is not blamed for being random"


def test_a_choice_that_costs_more_than_it_saves_says_so(world, tmp_path, capsys):
    """In the terminal while training and at its end, in metrics.jsonl, and in the report."""
    choose = CoresetConfig(keep=4, large_batch=8, monitor_every=1)
    run = train.run(settings(world, tmp_path / "run", coreset=choose))
    told, lines = capsys.readouterr().err, metrics(run)
    assert all(e["kept_rows"] == 4 and e["drawn_rows"] == 8 and "saved_seconds" in e for e in lines)
    assert [e["step"] for e in lines if "costs_more" in e] == [5], "said once, as soon as it is seen"
    text = "this choice costs more than it saves: choosing takes"
    assert told.count(f"warning: coreset: {text}") == 1 and told.count(text) == 2
    assert text in (run / "report.html").read_text() and text in lines[4]["costs_more"]


@pytest.mark.parametrize("change, words", [
    (lambda entry: {"overflows": entry["step"]}, "filled every batch, so nothing was chosen: both errors"),
    (lambda entry: {"overflows": 7}, "small sources alone filled 7 of 10 batches, whose rows are random"),
    (lambda entry: {"match_error": math.nan, "match_error_random": math.nan}, "has a finite matching error"),
    (lambda entry: {"match_error": math.nan} if entry["step"] == 4 else {}, "(without 1 monitored step whose error"),
    (lambda entry: {"match_error": 0.0, "match_error_random": 0.0}, "no step had rows to choose from"),
])  # fmt: skip
def test_errors_that_say_nothing_about_the_choice_are_called_so(first, tmp_path, change, words):
    """Small sources that fill the batches, errors that are not finite, batches that are kept whole."""
    told = []
    coreset_report.render(first, told.append)
    assert len(told) == 1 and "small sources" not in told[0]
    run = shutil.copytree(first, tmp_path / "run")
    lines = [{**e, **change(e)} if "match_error" in e else e for e in metrics(run)]
    files.write_text(run / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in lines))
    page = coreset_report.render(run, told.append).read_text()
    assert words in told[1]
    assert words.split(" rows")[0] in page and ">nan" not in page and 'nan"' not in page


def test_a_damaged_file_is_named(first, tmp_path):
    run = shutil.copytree(first, tmp_path / "run")
    files.write_text(run / "metrics.jsonl", "{")
    with pytest.raises(DataError, match=r"metrics\.jsonl: damaged"):
        coreset_report.render(run)


def test_the_warning_appears_while_training_and_the_terminal_is_clean(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choosing, "not_better", lambda entries: f"after {len(entries)} in vain")
    train.run(settings(world, tmp_path / "run", training=TrainingConfig(max_steps=2), lora=None))
    text = capsys.readouterr().err
    assert text.count("warning: after 1 in vain") == 1
    assert "40 rows, 2 optimizer steps of 8 rows" in text, "no word of epochs that are not finished"
    assert "model shards" not in text, "transformers' bars are off while weights are saved"
