"""What rows offer to be judged by, and `evaluate` with every metric on a tiny model."""

import json
import sys

import numpy as np
import pytest
import torch

from datatools import DataError, EnvironmentProblem, UsageError
from pipelines.models import load as models
from pipelines.rows.prepare import prepare
from pipelines.settings.load import load_config
from pipelines.settings.metrics import MetricsConfig
from pipelines.settings.parts import DataConfig, ModelConfig
from pipelines.settings.train import EvaluateConfig
from pipelines.training import evaluation
from pipelines.training.accuracy import measure
from pipelines.training.accuracy.questions import questions


def chat(number, said, **more):
    turns = [{"role": "user", "content": f"question {number}?"}, {"role": "assistant", "content": said}]
    return {"id": f"r{number}", "messages": turns, **more}


@pytest.fixture
def read(world, tmp_path):
    """Rows -> `Rows`, by the tiny model's tokenizer."""
    loaded = models.load(ModelConfig(name=str(world.model)), tokenizer_only=True)

    def read(rows, **data):
        path = tmp_path / f"{len(list(tmp_path.glob('*.jsonl')))}rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(paths=[str(path)], **data)
        return prepare(config, ModelConfig(name=str(world.model)), loaded.tokenizer, cache=tmp_path, label="data")

    return read


@pytest.mark.parametrize(
    "more, right",
    [
        ({"options": ["ja", "nein"], "answer": "nein"}, 1),
        ({"options": ["ja", "nein"], "answer": "B"}, 1),
        ({"options": ["ja", "nein"], "answer": "(a)"}, 0),
        ({"options": ["ja", "nein"], "answer": 1}, 1),
        ({"options": ["ja", "nein"], "answer": "0"}, 0),
        ({"options": ["0", "1"], "answer": 1}, 1),
        ({"options": ["3", "7"], "answer": "7"}, 1),
        ({"options": {"text": ["ja", "nein"], "label": ["X", "Y"]}, "answer": "y"}, 1),
        ({"options": {"X": "ja", "Y": "nein"}, "answer": "Y"}, 1),
        ({"options": ["ja", "nein"]}, 0),
        # labels come before numbers (ARC), and a number of a column with missing ones is a float
        ({"options": {"text": ["ja", "nein"], "label": ["1", "2"]}, "answer": 1}, 0),
        ({"options": {"text": ["ja", "nein"], "label": [1, 2]}, "answer": 2}, 1),
        ({"options": {"text": ["ja", "nein"], "label": ["1", "2"]}, "answer": "2"}, 1),
        ({"options": {"1": "ja", "2": "nein"}, "answer": 1.0}, 0),
        ({"options": ["ja", "nein"], "answer": 1.0}, 1),
        # tables fill up the shorter ones
        ({"options": {"A": "ja", "B": "nein", "C": None}, "answer": "B"}, 1),
        ({"options": {"text": ["ja", "nein", None], "label": ["A", "B", None]}, "answer": "B"}, 1),
        # texts that are equal only when normalised
        ({"options": [".5", "5"], "answer": "5"}, 1),
        ({"options": ["Polish", "polish"], "answer": "polish"}, 1),
    ],
)
def test_the_right_option(read, more, right):
    (asked,) = questions(read([chat(0, "ja", **more)]))
    assert (asked.options, asked.right) == (
        ("ja", "nein") if "ja" in str(more["options"]) else tuple(more["options"]),
        right,
    )


@pytest.mark.parametrize(
    "more, words",
    [
        ({"options": ["ja", "nein"], "answer": "vielleicht"}, "is none of the 2 options"),
        ({"options": ["ja", "nein"], "answer": 2}, "is none of the 2 options"),
        ({"options": ["1", "0"], "answer": 1}, "the text of one option and the number of another"),
        ({"options": {"1": "2", "2": "1"}, "answer": "1"}, "the text of one option and the number of another"),
        ({"options": ["Yes", "yes"], "answer": "YES"}, "may be several of the options"),
        ({"options": ["ja", None, "nein"], "answer": "ja"}, "expected two or more different texts"),
        ({"options": ["ja"], "answer": "ja"}, "expected two or more different texts"),
        ({"options": ["ja", "ja"], "answer": "ja"}, "expected two or more different texts"),
        ({"options": "ja", "answer": "ja"}, "expected two or more different texts"),
        ({"options": [1, 2], "answer": "ja"}, "expected two or more different texts"),
        ({"tests": {"a": 1}}, "expected a text or a list of texts"),
    ],
)
def test_columns_that_make_no_sense_are_refused_by_row(read, more, words):
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{words}"):
        questions(read([chat(0, "ja", **more)]))


def test_columns_of_other_names(read):
    rows = [chat(0, "x", choices=["ja", "nein"], label="nein", asserts="assert True")]
    (asked,) = questions(read(rows, columns={"options": "choices", "gold": "label", "tests": "asserts"}))
    assert (asked.right, asked.gold, asked.tests) == (1, "nein", ("assert True",))


def test_answers_that_repeat_are_options(read):
    """Of each subtask; of all subtasks that have one answer each together; never of answers that do not repeat."""
    rows = [chat(i, ("yes", "no")[i % 2], subtask="a") for i in range(6)]
    rows += [chat(10 + i, f"{i % 3}", subtask="b") for i in range(9)]
    rows += [chat(30 + i, ("Album", "Plant")[i % 2], subtask=("Album", "Plant")[i % 2]) for i in range(6)]
    rows += [chat(50 + i, f"word {i}", subtask="c") for i in range(6)]
    found = {one.row.subtask: one.options for one in questions(read(rows))}
    assert found == {
        "a": ("no", "yes"), "b": ("0", "1", "2"), "Album": ("Album", "Plant"), "Plant": ("Album", "Plant"), "c": (),
    }  # fmt: skip
    few = [chat(i, ("yes", "no")[i % 2]) for i in range(4)]
    assert not questions(read(few))[0].options
    others = read([chat(10 + i, ("yes", "no")[i % 2]) for i in range(4)])
    assert questions(read(few), [others])[0].options == ("no", "yes")


def test_only_the_last_answer_is_asked_for(read):
    said = [("user", "a?"), ("assistant", "first"), ("user", "b?"), ("assistant", "second"), ("user", "c?")]
    turns = [{"role": role, "content": text} for role, text in said]
    rows = read([{"messages": turns}, {"text": "plain text"}, {"prompt": "q", "completion": "a"}])
    chatted, pair = questions(rows)
    assert chatted.turn == "second" and chatted.row.masked == {1} and len(chatted.row.messages) == 4
    assert pair.index == 2 and pair.gold == "a"
    labels = rows.encoder(chatted.row).labels
    assert rows.encoder._tokenizer.decode([label for label in labels if label != -100]).startswith("second")


def test_auto_says_what_it_chose(read, world):
    loaded = models.load(ModelConfig(name=str(world.model)), tokenizer_only=True)

    def chosen(rows, **config):
        found = measure.plan(MetricsConfig(**config), read(rows), [], loaded.tokenizer, loaded.limits)
        return found.metrics, " ".join(found.said)

    assert chosen([chat(i, f"a long answer {i}") for i in range(6)]) == ((), "")
    names, said = chosen([chat(i, ("yes", "no")[i % 2]) for i in range(6)])
    assert names == ("options",) and "6 of 6 rows, each with 2 options" in said
    names, said = chosen([chat(i, f"{i} + 1 = {i + 1}\n#### {i + 1}", answer=str(i + 1)) for i in range(6)])
    assert names == ("exact",) and "by rule: number (6)" in said
    names, said = chosen([chat(i, f"{i}\n#### {i}") for i in range(6)])
    assert names == ("exact",)
    tested = [chat(i, "x = 1", tests=["assert x == 1"]) for i in range(4)]
    names, said = chosen(tested)
    assert names == () and "--allow-code-execution" in said
    with pytest.raises(DataError, match="no row has options"):
        chosen([chat(i, f"answer {i}") for i in range(3)], names=["options"])
    with pytest.raises(DataError, match="no row has tests"):
        chosen([chat(i, f"answer {i}") for i in range(3)], names=["code"], allow_code_execution=True)
    _, said = chosen([chat(0, "so we count", answer="7")], names=["exact"])
    assert "in 1 row no rule finds the gold answer" in said and "--extract" in said


def evaluated(world, path, tmp_path, **more):
    config = {"model": ModelConfig(name=str(world.model)), "data": DataConfig(paths=[str(path)]), **more}
    return evaluation.evaluate(EvaluateConfig(**config))


def test_evaluate_ranks_options_as_by_hand(world, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [chat(i, ("yes", "no", "perhaps not")[i % 3], answer="yes") for i in range(9)]
    rows = [{**row, "answer": row["messages"][1]["content"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "answers.jsonl"
    found = evaluated(world, path, tmp_path, predictions=out)
    loaded = models.load(ModelConfig(name=str(world.model)))
    options = ["no", "perhaps not", "yes"]
    right, chances = [], []
    for row in rows:
        scores = []
        for option in options:
            turns = [row["messages"][0], {"role": "assistant", "content": option}]
            head = loaded.tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
            start = len(loaded.tokenizer(head, add_special_tokens=False)["input_ids"])
            ids = loaded.tokenizer(head + option + "<|im_end|>", add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logits[t - 1, ids[t]]) for t in range(start, len(ids))))
        place = options.index(row["answer"])
        right.append(int(np.argmax(scores)) == place)
        chances.append(np.exp(scores[place]) / np.exp(scores).sum())
    assert found["metrics"]["options"]["mean"] == pytest.approx(np.mean(right))
    assert found["metrics"]["options"]["probability"] == pytest.approx(np.mean(chances), rel=1e-4)
    assert found["metrics"]["loss"]["mean"] == pytest.approx(found["loss"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["right"] for line in lines] == right and lines[0]["row"].endswith("rows.jsonl:1")


def test_evaluate_is_the_loss_alone_where_rows_offer_nothing_else(world, tmp_path):
    assert "metrics" not in evaluated(world, world.test, tmp_path)
    with pytest.raises(UsageError, match="--predictions"):
        evaluated(world, world.test, tmp_path, predictions=tmp_path / "x.jsonl")


@pytest.mark.skipif(sys.platform != "linux", reason="the fence is the Linux kernel's")
def test_evaluate_runs_the_tests_of_generated_code(world, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows = [chat(i, "def f(): return 1", tests=["assert f() == 1"]) for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["def f(): return 1", "```python\ndef f(): return 1\n```", "def f(): return 2"]
    monkeypatch.setattr(measure.Writer, "write", lambda *_: texts)
    metrics = MetricsConfig(names=["code"], allow_code_execution=True)
    found = evaluated(world, path, tmp_path, metrics=metrics)["metrics"]["code"]
    assert found["mean"] == pytest.approx(2 / 3) and found["timeouts"] == 0
    with pytest.raises(UsageError, match="--allow-code-execution"):
        evaluated(world, path, tmp_path, metrics=MetricsConfig(names=["code"]))


def test_no_file_allows_code_to_run(tmp_path):
    path = tmp_path / "evaluate.yaml"
    path.write_text("model: m\ndata: d.jsonl\nmetrics: {names: [code], allow_code_execution: true}\n")
    with pytest.raises(UsageError, match="--allow-code-execution"):
        load_config(EvaluateConfig, path)
    assert load_config(
        EvaluateConfig, None, {"model.name": "m", "data.paths": ["d"], "metrics.allow_code_execution": True}
    )


def test_a_task_of_lm_eval_needs_the_extra(world, monkeypatch, tmp_path):
    monkeypatch.setattr("pipelines.settings.metrics.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"datatools-llm\[lm-eval\]"):
        evaluated(world, world.test, tmp_path, metrics=MetricsConfig(names=["lm-eval:arc_easy"]))


@pytest.mark.parametrize("value, words", [("exat", "did you mean 'exact'"), ("lm-eval:", "there is no metric")])
def test_unknown_metrics_are_named(value, words):
    with pytest.raises(ValueError, match=words):
        MetricsConfig(names=[value])


@pytest.mark.parametrize("value, words", [("numbr", "did you mean 'number'"), ("regex:(", "no regular expression")])
def test_unknown_rules_are_named(value, words):
    with pytest.raises(ValueError, match=words):
        MetricsConfig(extract=value)
