"""Accuracy while a model trains: `train --metric` at the end and at every evaluation, and the best by accuracy."""

import json
import shutil

import pytest

from datatools import DataError, UsageError
from pipelines.report import pages
from pipelines.rows import preflight
from pipelines.settings.dump import dump
from pipelines.settings.load import load_config
from pipelines.settings.metrics import MetricsConfig
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import CoresetConfig, EvaluateConfig, TrainConfig, ValidationMetrics
from pipelines.training import evaluation, held_out, train, trainer
from tests.pipelines.conftest import make_world


def row(number):
    word = ("red", "blue")[number % 2]
    turns = [{"role": "user", "content": f"colour of {number}?"}, {"role": "assistant", "content": word}]
    return {"dataset": "t", "id": f"t-{number}", "messages": turns, "answer": word}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with `few.jsonl`, 24 rows of two answers; `asked.jsonl` are 8 others."""
    made = make_world(tmp_path_factory.mktemp("world"))
    for name, numbers in (("few", range(24)), ("asked", range(100, 108))):
        (made.folder / f"{name}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in numbers))
    return made


def settings(world, out, **changes):
    """A run of 6 steps, 3 an epoch, evaluated after every second."""
    values = {
        "model": ModelConfig(name=str(world.model)),
        "data": DataConfig(paths=[str(world.folder / "few.jsonl")]),
        "out": out,
        "lora": LoraConfig(rank=4, dropout=0.1),
        "training": TrainingConfig(epochs=2, batch_size=8, micro_tokens=4096, learning_rate=0.03),
        "eval_data": [str(world.folder / "asked.jsonl")],
        "eval_every": 2,
        "metrics": ValidationMetrics(names=["options", "exact"], max_new_tokens=4),
    }
    return TrainConfig(**values | changes)


def entries(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def values(run, key):
    return {entry["step"]: entry[key] for entry in entries(run) if key in entry}


def facts(run):
    return json.loads((run / "training.json").read_text())["validation"]


def weights(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def script(monkeypatch):
    """`script([1, 0, 1])`: the exact matches by evaluation; `stop`: the evaluation after that step never comes."""
    inner = trainer.DataTrainer.evaluate

    def arrange(right, stop=None):
        def evaluate(self, *args, **kwargs):
            if self.state.global_step == stop:
                raise KeyboardInterrupt
            plain, place = self.validate, (self.state.global_step + 1) // 2 - 1
            self.validate = lambda model: plain(model) | {"eval_exact": float(right[place])}
            try:
                return inner(self, *args, **kwargs)
            finally:
                self.validate = plain

        monkeypatch.setattr(trainer.DataTrainer, "evaluate", evaluate)

    return arrange


def test_the_end_is_measured_once_as_evaluate_does(world, tmp_path, capsys, monkeypatch):
    """And training is not touched, nor are weights and losses."""
    run = train.run(settings(world, tmp_path / "run"))
    plain = train.run(settings(world, tmp_path / "plain", metrics=None))
    assert weights(run) == weights(plain) and values(run, "eval_loss") == values(plain, "eval_loss")
    model = ModelConfig(name=str(world.model), adapter=run / "adapter")
    data = DataConfig(paths=[str(world.folder / "asked.jsonl")])
    metrics = MetricsConfig(names=["options", "exact"], max_new_tokens=4)
    found = evaluation.evaluate(EvaluateConfig(model=model, data=data, metrics=metrics))["metrics"]
    for name in ("options", "exact"):
        one = dict(facts(run)["metrics"][name])
        assert one.pop("label") in ("option accuracy", "exact match")
        assert one == pytest.approx(found[name])
        assert list(values(run, f"eval_{name}")) == [facts(run)["best_step"]], "once, beside the weights that are saved"
    assert "metrics" not in facts(plain) and "eval_exact" not in (plain / "metrics.jsonl").read_text()
    said = capsys.readouterr().err
    assert "metric options: 8 of 8 rows" in said and "validation: option accuracy" in said
    page = (run / "report.html").read_text()
    assert "Accuracy of the saved weights" in page and "option accuracy" in page
    assert "Accuracy of the saved weights" not in (plain / "report.html").read_text()
    (run / "report.html").unlink()
    assert pages.draw(run).read_text() == page, "equal inputs, equal bytes"


def test_always_measures_at_every_evaluation_and_draws_it(world, tmp_path):
    metrics = ValidationMetrics(names=["options"], when="always")
    run = train.run(settings(world, tmp_path / "run", metrics=metrics))
    plain = train.run(settings(world, tmp_path / "plain", metrics=None))
    assert list(values(run, "eval_options")) == [2, 4, 6] and weights(run) == weights(plain)
    assert [e["loss"] for e in entries(run)] == [e["loss"] for e in entries(plain)]
    last = values(run, "eval_options")[facts(run)["best_step"]]
    assert last == pytest.approx(facts(run)["metrics"]["options"]["mean"])
    assert "Share of validation rows after the step." in (run / "report.html").read_text()


def test_the_best_by_accuracy_is_kept_and_a_resumed_run_has_its_bytes(world, tmp_path, script):
    """The first of two equal ones."""
    right, best = [0, 1, 1], 4
    metrics = ValidationMetrics(names=["exact"], max_new_tokens=2, best_by="exact")
    script(right)
    whole = train.run(settings(world, tmp_path / "whole", metrics=metrics))
    assert facts(whole)["best_step"] == best and facts(whole)["best_by"] == "exact"
    assert (whole / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes() == weights(whole)
    assert facts(whole)["best_loss"] == pytest.approx(values(whole, "eval_loss")[best], abs=1e-6)
    assert f"By exact, the model was best after step {best}" in (whole / "report.html").read_text()
    for stop in (4, 6):
        script(right, stop=stop)
        with pytest.raises(KeyboardInterrupt):
            train.run(settings(world, tmp_path / "run", metrics=metrics))
    script(right)
    run = train.run(settings(world, tmp_path / "run", metrics=metrics))
    assert weights(run) == weights(whole) and facts(run) == facts(whole)
    told = [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in entries(run)]
    assert told == [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in entries(whole)]


def test_patience_counts_accuracies_and_a_run_killed_at_the_end_measures_again(world, tmp_path, script, monkeypatch):
    metrics = ValidationMetrics(names=["exact"], max_new_tokens=2, best_by="exact")
    script([1, 0, 1])
    run = train.run(settings(world, tmp_path / "run", metrics=metrics, patience=1))
    assert list(values(run, "eval_loss")) == [2, 4] and facts(run)["stopped"]
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "adapter")
    train.run(settings(world, again, metrics=metrics, patience=1))
    assert weights(again) == weights(run) and facts(again) == facts(run)


def test_a_coreset_has_its_accuracy_in_its_report(world, tmp_path):
    coreset = CoresetConfig(large_batch=8, keep=4, probes=2)
    run = train.run(settings(world, tmp_path / "run", coreset=coreset, metrics=ValidationMetrics(names=["options"])))
    assert "Accuracy of the saved weights" in (run / "report.html").read_text()


def test_what_is_refused_before_a_model_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train.fit, "fit", lambda *_, **__: pytest.fail("trained"))
    lost, code, options = (
        ValidationMetrics(names=["options"], best_by="exact"),
        ValidationMetrics(names=["code"]),
        ValidationMetrics(names=["options"]),
    )
    with pytest.raises(UsageError, match="--metric: there are no held-out rows to measure it on; name them with"):
        preflight.contradictions(settings(world, tmp_path / "a", eval_data=[]))
    with pytest.raises(UsageError, match="needs --allow-code-execution"):
        preflight.contradictions(settings(world, tmp_path / "a", metrics=code))
    with pytest.raises(UsageError, match="--best-by exact: measured are loss, options; name it with --metric too"):
        train.run(settings(world, tmp_path / "b", metrics=lost))
    with pytest.raises(DataError, match="--metric options: no row has options"):
        train.run(settings(world, tmp_path / "c", eval_data=[str(world.test)], metrics=options))


def test_a_run_without_metrics_is_written_as_before(world, tmp_path):
    assert "\nmetrics:" not in dump(settings(world, tmp_path, metrics=None))
    asked = {"metrics.names": ["exact"], "metrics.best_by": "exact"}
    flags = {"model.name": "m", "data.paths": ["a"], "eval_data": ["b"], **asked}
    assert load_config(TrainConfig, None, flags).metrics.during
    assert not ValidationMetrics(names=["exact"]).during


def test_several_processes_use_what_the_first_measured(monkeypatch):
    sent = []

    def broadcast(found):
        sent.append(list(found))
        found[0] = {"exact": 1.0}

    monkeypatch.setattr(held_out, "world_size", lambda: 2)
    monkeypatch.setattr(held_out, "rank", lambda: 1)
    monkeypatch.setattr(held_out.torch.distributed, "broadcast_object_list", broadcast)
    assert held_out.accuracies(None, None) == {"eval_exact": 1.0} and sent == [[None]]
