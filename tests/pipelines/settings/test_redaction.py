"""No secret of the settings is in any file of a run folder, and what was hidden is not run as something else."""

from pathlib import Path

import pytest

from datatools import UsageError
from pipelines.cli import app as cli
from pipelines.settings import redaction
from pipelines.settings.dump import dump
from pipelines.settings.load import load_config
from pipelines.settings.select import SelectConfig
from tests.tiny import save_tiny_model, write_rows

SECRET, TOKEN = "s3cr3tPlace-77", "hf_ABCDEFGHIJKLMNOPQRSTUVWXYZ01234567"


def holding(folder: Path) -> list[str]:
    """The files under `folder` whose bytes, or whose names, hold a secret."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    secrets = (SECRET.encode(), TOKEN.encode())
    return [str(p.relative_to(folder)) for p in found
            if any(s in p.read_bytes() or s.decode() in p.name for s in secrets)]  # fmt: skip


def test_no_file_of_a_run_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_STORAGE_TOKEN", SECRET)
    home = tmp_path / SECRET / TOKEN
    model = save_tiny_model(home / "model")
    pool, target = write_rows(home / "pool.jsonl", 16), write_rows(home / "dev.jsonl", 2, start=90)
    test = write_rows(home / "test.jsonl", 2, start=190)
    less = ["--train", pool, "--target", target, "--budget", "3", "--dim", "64", "--epochs", "1", "--lora-rank", "2",
            "--set", "warmup.minimum_rows=8", "--method", "less"]  # fmt: skip
    runs: dict[str, list[object]] = {
        "select": ["select", "--model", model, *less],
        "train": ["train", "--model", model, "--data", pool, "--epochs", "1", "--lora-rank", "2"],
        "full": ["train", "--model", model, "--data", pool, "--epochs", "1", "--lora-rank", "0"],
        "diagnose": ["diagnose", "--model", model, "--data", pool, "--checks", "sharpness", "--rows", "2"],
    }
    for name, argv in runs.items():
        monkeypatch.setattr("sys.argv", ["datatools", *map(str, argv)])
        assert cli.main([*map(str, argv), "--out", str(tmp_path / name), "--quiet"]) == 0
        # a pickle of transformers' own arguments, which nothing here reads
        assert [p for p in holding(tmp_path / name) if not p.endswith("training_args.bin")] == [], name
        assert cli.main([*map(str, argv), "--out", str(tmp_path / name), "--quiet"]) == 0  # the same settings go on
    audit = ["audit", "--selected", tmp_path / "select" / "selected.jsonl", "--pool", pool, "--target", target,
             "--test", test, "--model", model, "--seeds", "1", "--epochs", "1", "--against", "random"]  # fmt: skip
    assert cli.main([*map(str, audit), "--quiet"]) == 0
    assert [p for p in holding(tmp_path / "select") if not p.endswith("training_args.bin")] == []


@pytest.mark.parametrize("value", [
    f"/data/{TOKEN}/m", "https://bob:pass123@host/m", f"https://host/m?token={SECRET}", f"https://host/m?sig={SECRET}",
    f"/mnt/{SECRET}/m", "hf://u:t0k3n@datasets/x",
])  # fmt: skip
def test_what_was_hidden_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MY_STORAGE_TOKEN", SECRET)
    flags: dict[str, object] = {"model.name": value, "train.paths": ["a", value], "target": ["t"]}
    path = tmp_path / "settings.yaml"
    path.write_text(dump(load_config(SelectConfig, None, flags)))
    text = path.read_text()
    assert not any(s in text for s in (SECRET, TOKEN, "pass123", "t0k3n")) and "***" in text
    with pytest.raises(UsageError, match="model.name was a secret"):
        load_config(SelectConfig, path)
    with pytest.raises(UsageError, match="train.paths was a secret"):
        load_config(SelectConfig, path, {"model.name": value})
    again = load_config(SelectConfig, path, {"model.name": value, "train.paths": ["a", value]})
    assert again.model.name == value


def test_ordinary_names_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data/hf_models/x", "hf_datasets", "runs/select", "HuggingFaceTB/SmolLM2-135M", "hf:owner/name:train"):
        assert redaction.hide(name) == name
