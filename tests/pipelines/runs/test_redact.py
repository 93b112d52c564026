"""Secrets and names stay out of what a run writes."""

import platform
import sys
from pathlib import Path

import pytest

from datatools import DataError
from pipelines.runs.folder import Run
from pipelines.runs.redact import command_line, redact
from tests.pipelines.runs.common import config


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
    assert "<user>" not in command_line(names=False)


def test_redact_leaves_ordinary_words(monkeypatch):
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setenv("SOME_KEY", "12345678")  # a number could be anything: a budget, a seed
    monkeypatch.setenv("GIT_AUTHOR_NAME", "select")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "budget")
    text = "select --budget 12345678 --train annual.jsonl planning-ann.x --key-frames 3 token budget 20000 tokens"
    assert redact(text).replace("<user>", "ann") == text
