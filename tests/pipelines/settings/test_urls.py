"""A URL is refused by name wherever a folder, a file or a model is expected; no folder called "s3:" is made."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from datatools import UsageError
from pipelines.cli.app import main
from pipelines.models.named import find
from pipelines.rows.input_files import find_sources
from pipelines.settings.train import EvaluateConfig

SELECT = "select --model smollm2 --train pool.jsonl --method random"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (f"{SELECT} --out s3://bucket/x", "s3://bucket/x is a URL"),
        (f"{SELECT} --out file:///data/x", "give the path itself: /data/x"),
        (f"{SELECT} --out x --set features.folder=gs://bucket/f", "gs://bucket/f is a URL"),
        (f"{SELECT} --out x --checkpoints s3://bucket/c", "s3://bucket/c is a URL"),
        (f"{SELECT} --out x --set model.adapter=s3://bucket/c", "s3://bucket/c is a URL"),
        ("train --model smollm2 --data a.jsonl --out s3://bucket/x", "s3://bucket/x is a URL"),
        ("train --model smollm2 --data a.jsonl --out x --order s3://bucket/o.npz", "s3://bucket/o.npz is a URL"),
        ("order search --model smollm2 --data a.jsonl --out s3://bucket/x", "s3://bucket/x is a URL"),
        ("diagnose --model smollm2 --data a.jsonl --out s3://bucket/x", "s3://bucket/x is a URL"),
        ("demo --out s3://bucket/x", "s3://bucket/x is a URL"),
        ("doctor --out s3://bucket/x", "s3://bucket/x is a URL"),
        ("plan --rows 10 --run s3://bucket/x", "s3://bucket/x is a URL"),
    ],
)
def test_places(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("reference://a.json", "are not read from reference://"),
        ("github://owner:name@main/a.jsonl", "are not read from github://"),
        ("hf://datasets/owner/name/data.parquet", "named hf:owner/name"),
        ("https://huggingface.co/datasets/owner/name", "named hf:owner/name"),
        ("file:///data/a.jsonl", "give the path itself"),
    ],
)
def test_rows(given, told):
    with pytest.raises(UsageError, match=told):
        find_sources([given])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("https://huggingface.co/owner/name", "named by 'owner/name'"),
        ("hf://owner/name", "named by 'owner/name'"),
        ("s3://bucket/model", "download the model"),
    ],
)
def test_models(given, told):
    with pytest.raises(UsageError, match=told):
        find(given)


@pytest.mark.parametrize("given", ["ab:/c", "C:/runs", "runs/s3://bucket", "a:b", "~/x:/y"])
def test_a_colon_makes_no_url(given):
    assert EvaluateConfig(model="m", data="a", predictions=given).predictions == Path(given).expanduser()
    assert EvaluateConfig(model="m", data="a", predictions=Path(given)).predictions == Path(given).expanduser()


@pytest.mark.parametrize("given", ["s3://b/x", Path("s3://b/x"), "foo+bar://b/x", Path("https://b/x"), "FILE:///x"])
def test_a_url_is_one_however_it_comes(given):
    with pytest.raises(ValidationError, match="is a URL"):
        EvaluateConfig(model="m", data="a", predictions=given)


def test_hub_names_stay():
    assert [source.name for source in find_sources(["hf:owner/name:train"])] == ["hf:owner/name:train"]
