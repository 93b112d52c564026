"""Mistakes that need no model are told without torch: a table of them, tried where torch cannot be imported."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.settings import names
from tests.tiny import write_rows

SELECT = ["select", "--train", "a.jsonl", "--method", "random", "--model", "m"]
LESS = ["select", "--train", "a.jsonl", "--target", "a.jsonl", "--model", "m"]
TRAIN = ["train", "--data", "a.jsonl", "--model", "m"]
ORDER = ["order", "validate", "--data", "a.jsonl", "--model", "m"]
AUDIT = ["audit", "--selected", "a.jsonl", "--pool", "a.jsonl", "--test", "a.jsonl", "--model", "m"]
LOOK = ["diagnose", "--data", "a.jsonl", "--model", "m"]
LOSS = ["evaluate", "--data", "a.jsonl", "--model", "m"]

# arguments, exit code, words of the message
CASES = [
    (["select", "--train", "none.jsonl", "--method", "random", "--model", "m"], 3, "none.jsonl"),
    (["select", "--train", "a.jsonl", "--target", "none.jsonl", "--model", "m"], 3, "none.jsonl"),
    (["select", "--train", "none/*.jsonl", "--method", "random", "--model", "m"], 3, "no file matches"),
    ([*SELECT, "--budget", "5%%"], 2, "'5%%'"),
    ([*SELECT, "--budget", "0.05"], 2, "ambiguous"),
    ([*TRAIN, "--out", "a.jsonl/run"], 2, "a file"),
    ([*TRAIN, "--out", "a.jsonl"], 2, "a file"),
    ([*TRAIN, "--out", "full"], 2, "contains no run"),
    ([*TRAIN, "--out", "full", "--overwrite"], 2, "is not moved"),
    ([*TRAIN, "--out", "other"], 2, "contains a run of `datatools select`"),
    ([*SELECT, "--out", "other", "--seed", "7"], 2, "seed was 0, is 7"),
    (["train", "--data", "a.jsonl", "--model", "./nowhere"], 2, "./nowhere: no such"),
    (["train", "--data", "a.jsonl", "--model", "a.jsonl"], 2, "must be GGUF"),
    (["train", "--data", "a.jsonl", "--model", "full"], 2, "neither config.json nor a GGUF"),
    (["train", "--data", "a.jsonl", "--model", "lora"], 2, "give its base (b)"),
    ([*TRAIN, "--chat-template", "tuluu"], 2, "did you mean 'tulu'"),
    ([*TRAIN, "--adapter", "nowhere", "--lora-rank", "0"], 2, "nowhere: no such folder"),
    ([*TRAIN, "--adapter", "full", "--lora-rank", "0"], 3, "adapter_config.json is missing"),
    ([*TRAIN, "--adapter", "lora"], 2, "merge it into its model first"),
    ([*TRAIN, "--optimizer", "adamv"], 2, "did you mean 'adam' or 'adamw'"),
    ([*TRAIN, "--schedule", "cosin"], 2, "did you mean 'cosine'"),
    ([*TRAIN, "--order", "none.npz"], 2, "none.npz: no such file"),
    ([*TRAIN, "--order", "a.jsonl", "--coreset", "colm"], 2, "exclude each other"),
    ([*TRAIN, "--coreset", "colm", "--large-batch", "4"], 2, "cannot keep 8 rows of a large batch of 4"),
    ([*TRAIN, "--coreset", "colmm"], 2, "colmm"),
    ([*TRAIN, "--gradient", "zoo"], 2, "zoo"),
    ([*TRAIN, "--source-key", "datasett"], 2, "did you mean 'dataset'"),
    ([*TRAIN, "--columns", "prompt=q,completion=a"], 3, "the columns are dataset, id, messages; correct --columns"),
    ([*TRAIN, "--columns", "promt=q"], 2, "did you mean 'prompt'"),
    ([*TRAIN, "--columns", "prompt"], 2, "names no column"),
    ([*TRAIN, "--columns", "subtask=kind"], 2, "no column 'kind'"),
    ([*TRAIN, "--set", "training.epoch=3"], 2, "did you mean 'epochs'"),
    ([*TRAIN, "--epochs", "0"], 2, "epochs"),
    ([*TRAIN, "--epochs", "three"], 2, "three"),
    ([*TRAIN, "--dataa", "a.jsonl"], 2, "--dataa"),
    (["train", "none.yaml"], 2, "none.yaml"),
    (["train", "--data", "odd.parquet", "--model", "m"], 3, "unknown_format"),
    (["train", "--data", "odd.parquet", "--model", "m", "--columns", "prompt=q,completion=b"], 3, "no column 'b'"),
    (["train", "--data", "odd.csv", "--model", "m", "--columns", "prompt=q,completion=b"], 3, "no column 'b'"),
    (["train", "--data", "odd.jsonl.gz", "--model", "m"], 3, "unknown_format"),
    (["train", "--data", "odd.json", "--model", "m"], 3, "unknown_format"),
    (["train", "--model", "m"], 2, "--data"),
    (["train", "--model", "m", "--data", "a.jsonl", "--eval-data", "odd.json", "--set",
      "eval_columns={prompt: q, completion: b}"], 3, "correct eval_columns"),
    ([*LESS, "--target-columns", "prompt=q,completion=a"], 3, "--target-columns"),
    ([*LESS, "--checkpoints", "no"], 2, "no: no such folder"),
    ([*LESS, "--projector", "sjltt"], 2, "did you mean 'sjlt'"),
    ([*LESS, "--set", "aggregate=means"], 2, "did you mean 'mean'"),
    ([*LESS, "--set", "features.method=hook"], 2, "did you mean 'hooks'"),
    ([*LESS, "--adam-mode", "papers"], 2, "papers"),
    ([*LESS, "--method", "lss"], 2, "lss"),
    ([*SELECT, "--set", "budgett=3"], 2, "budgett"),
    (["select", "--train", "a.jsonl", "--model", "m"], 2, "--target"),
    (["audit", "--selected", "a.jsonl", "--pool", "a.jsonl", "--test", "no.jsonl", "--model", "m"], 3, "no.jsonl"),
    (["audit", "--selected", "no.jsonl", "--pool", "a.jsonl", "--test", "a.jsonl", "--model", "m"], 2, "no.jsonl"),
    ([*AUDIT, "--against", "tfidf"], 2, "--target"),
    ([*AUDIT, "--against", "best"], 2, "best"),
    ([*AUDIT, "--lora-rank", "0"], 2, "lora is null"),
    ([*AUDIT, "--test-columns", "prompt=q,completion=a"], 3, "--test-columns"),
    (["order", "serch", "--data", "a.jsonl", "--model", "m"], 2, "did you mean 'search'"),
    ([*ORDER, "--validation", "no.jsonl"], 3, "no.jsonl"),
    ([*ORDER, "--validation", "a.jsonl", "--validation-columns", "prompt=q,completion=a"], 3, "--validation-columns"),
    ([*ORDER, "--estimators", "groups", "--grouping", "mixed"], 2, "--grouping source"),
    ([*ORDER, "--estimators", "pairwize"], 2, "pairwize"),
    ([*ORDER, "--set", "lora.dropout=0.1"], 2, "dropout"),
    ([*ORDER, "--set", "sequences=none.npz"], 2, "none.npz"),
    ([*LOOK, "--checks", "spectrums"], 2, "spectrums"),
    ([*LOOK, "--set", "updates=[adamw, muonn]"], 2, "did you mean 'muon'"),
    (["diagnose", "--data", "no.jsonl", "--model", "m"], 3, "no.jsonl"),
    ([*LOSS, "--adapter", "nowhere"], 2, "nowhere"),
    ([*LOSS, "--columns", "text=body"], 3, "no column 'body'"),
    (["explain", "a.jsonl"], 2, "FILE:LINE"),
    (["explain", "no.jsonl:3"], 2, "is not in the folder of a run"),
    (["explain", "nowhere", "a.jsonl:3"], 2, "no such file; give selected.jsonl of a run"),
    (["explain", "other/selected.jsonl:9"], 2, "the file has 3 lines"),
    (["report", "nowhere"], 2, "no such folder"),
    (["report", "full"], 2, "not the folder of a run"),
    (["report", "a.jsonl"], 2, "a file"),
    (["ls", "optimizer"], 2, "did you mean 'optimizers'"),
    (["demo", "--out", "a.jsonl/x"], 2, "a file"),
]  # fmt: skip

PROGRAM = """
import contextlib, io, json, sys
for name in ("torch", "transformers"):
    sys.modules[name] = None  # importing it fails
from pipelines.cli.app import main
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(arguments)
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("mistakes")
    write_rows(here / "a.jsonl", 3)
    for name in ("full", "lora", "other"):
        (here / name).mkdir()
    (here / "full" / "a.txt").write_text("mine")
    (here / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "b"}')
    run = "# Replays this run: datatools select other/run.yaml\nmodel: m\ntrain: a.jsonl\nmethod: random\n"
    (here / "other" / "run.yaml").write_text(run)
    write_rows(here / "other" / "selected.jsonl", 3)
    rows = [{"q": "a", "other": "b"}] * 2
    pq.write_table(pa.Table.from_pylist(rows), here / "odd.parquet")
    (here / "odd.csv").write_text("q,other\na,b\n")
    (here / "odd.json").write_text(json.dumps(rows))
    import gzip

    (here / "odd.jsonl.gz").write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    return here


def test_mistakes_are_told_where_torch_cannot_be_imported(folder):
    """One process tries all of them: each is one line with its code, and nothing is made."""
    before = sorted(folder.rglob("*"))
    table = json.dumps([arguments for arguments, _, _ in CASES])
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, input=table)
    assert done.returncode == 0, done.stderr
    wrong = []
    for (arguments, code, words), line in zip(CASES, done.stdout.splitlines(), strict=True):
        came, said = json.loads(line)
        if came != code or words not in said or not said.startswith("error: ") or said.count("\n") != 1:
            wrong.append((arguments, came, said))
    assert not wrong, "\n".join(map(str, wrong))
    assert sorted(folder.rglob("*")) == before


def test_a_mistake_costs_less_than_a_second(folder):
    """Processor time, best of two: elapsed time on a busy machine says nothing."""
    spent = []
    for _ in range(2):
        before = os.times()
        command = [sys.executable, "-m", "pipelines", *TRAIN, "--columns", "prompt=q,completion=a"]
        done = subprocess.run(command, cwd=folder, capture_output=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
        after = os.times()
        assert done.returncode == 3
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(spent) < 1


def test_names_are_those_of_the_tables():
    """Read from the source without importing it, so that torch stays away."""
    from importlib import import_module

    from optim import OPTIMIZERS

    for kind, (file, table) in names.TABLES.items():
        module = import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        entries = getattr(module, table) if table else OPTIMIZERS
        assert tuple(names._read(file, table)) == tuple(entries) == names.known(kind), kind


def test_what_is_right_passes(folder, monkeypatch):
    """Columns of other rows that a target borrows, turns' own names, and mixed files are no mistakes."""
    from pipelines.rows import preflight
    from pipelines.settings.select import SelectConfig
    from pipelines.settings.train import TrainConfig

    monkeypatch.chdir(folder)
    (folder / "talk.jsonl").write_text('{"talk": [{"who": "user", "says": "a"}, {"who": "assistant", "says": "b"}]}\n')
    talk = {"messages": "talk", "role": "who", "content": "says"}
    preflight.check(TrainConfig(model="m", data={"paths": "talk.jsonl", "columns": talk}), "train")
    preflight.check(
        SelectConfig(model="m", train={"paths": "odd.csv", "columns": "prompt=q,completion=other"}, target="a.jsonl"),
        "select",
    )
    (folder / "few.jsonl").write_text('{"text": "a"}\n' + '{"nothing": 1}\n')  # one bad row is the reader's to tell
    preflight.check(TrainConfig(model="m", data="few.jsonl"), "train")


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """As root every folder can be written to, so the question itself is answered otherwise."""
    from datatools import EnvironmentProblem
    from pipelines.rows import preflight

    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(EnvironmentProblem, match="cannot be written to; name another folder"):
        preflight._writable(tmp_path / "a" / "b")
