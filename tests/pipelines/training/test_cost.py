"""What a run costs: dry runs do nothing expensive, the time left is that of the whole run, a resumed run adds up."""

import json
import re
import time
from datetime import UTC, datetime, timedelta

import pytest
import torch

from pipelines import demo
from pipelines.diagnose import run as diagnose
from pipelines.models import load as models
from pipelines.order import run as order
from pipelines.runs import messages
from pipelines.runs.ahead import Ahead
from pipelines.runs.folder import Run
from pipelines.runs.progress import Progress
from pipelines.select import audit
from pipelines.select import run as select
from pipelines.settings.audit import AuditConfig
from pipelines.settings.demo import DemoConfig
from pipelines.settings.diagnose import DiagnoseConfig
from pipelines.settings.order import OrderConfig
from pipelines.settings.parts import LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import cost, train, validation

FIGURES = re.compile(r"about [\d.,]+ (s|min|h).*, [\d.,]+ [kMG]B of memory, [\d.,]+ [kMG]?B on disk")


def settings(kind, world, out, **more):
    model = {"name": str(world.model)}
    if kind == "train":
        return train.run, TrainConfig(model=model, data=str(world.pool), out=out, training={"epochs": 2}, **more)
    if kind == "order":
        batches = {"batches": 4, "warmup_steps": 2, "orders": 4, "held_out": 8, "seeds": 2}
        return order.run, OrderConfig(model=model, data=str(world.pool), out=out, **batches, **more)
    if kind == "diagnose":
        return diagnose.run, DiagnoseConfig(model=model, data=str(world.pool), out=out, **more)
    if kind == "select":
        return select.run, world.select(out, **more)
    chosen = world.folder / "chosen.jsonl"
    chosen.write_text("".join(world.pool.read_text().splitlines(keepends=True)[:8]))
    return audit.run, AuditConfig(
        selected=chosen, pool=str(world.pool), test=str(world.test), target=[str(world.target)], model=model, out=out,
        against=["random", "rds", "tfidf", "loss", "full"], seeds=2, training={"epochs": 1}, **more,
    )  # fmt: skip


@pytest.fixture
def nothing_expensive(monkeypatch):
    """Training, extraction, scores and recorded runs fail."""

    def refuse(*_, **__):
        raise AssertionError("a dry run must not do this")

    refuse.hooked = True  # else torch wraps it, for good
    for name in ("pipelines.training.fit.fit", "pipelines.select.gradients.extract", "datatools.order.record",
                 "datatools.order.train", "datatools.order.precompute", "torch.optim.Optimizer.step",
                 "optim.Optimizer.step", "pipelines.training.evaluation.losses"):  # fmt: skip
        monkeypatch.setattr(name, refuse)
    for name in ("tfidf", "rds", "loss", "less"):
        monkeypatch.setattr(f"pipelines.select.{name}.score", refuse)


TASKS = ["train", "diagnose", "select", "audit", *(f"order {task}" for task in order.TASKS)]


@pytest.mark.parametrize("task", TASKS)
def test_a_dry_run_says_time_memory_and_bytes_and_does_nothing(task, own_world, tmp_path, capsys, nothing_expensive):
    kind, _, what = task.partition(" ")
    run, config = settings(kind, own_world, tmp_path / "run", dry_run=True, **({"task": what} if what else {}))
    state = torch.get_rng_state()
    run(config)
    said = capsys.readouterr().err
    assert FIGURES.search(said), said
    assert "synthetic tokens" in said and not (tmp_path / "run").exists()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dry_demo_names_no_file_that_is_not_there(own_world, tmp_path, capsys):
    demo.run(DemoConfig(out=tmp_path / "demo", model=ModelConfig(name=str(own_world.model)), dry_run=True))
    said = capsys.readouterr().err
    assert "report.html" not in said and FIGURES.search(said)
    assert not (tmp_path / "demo").exists()
    selection, _, audited = said.partition("then an audit: 2 training runs")
    assert FIGURES.search(selection) and FIGURES.search(audited), "both parts have a price"
    assert "2 training runs; timed on" in audited


def test_the_estimate_of_training_is_near_the_truth(own_world, tmp_path, monkeypatch):
    """Processor time on both sides: elapsed time on a busy machine says nothing."""
    monkeypatch.setattr("pipelines.training.cost.time.perf_counter", time.process_time)
    loaded = models.load(ModelConfig(name=str(own_world.model)))
    recipe = TrainingConfig(epochs=8)
    with cost.as_trained(loaded.model, LoraConfig()) as module:
        found, rule = cost.probe(module, 20), cost.recipe_of(recipe, module)
    assert not any(p.requires_grad for n, p in loaded.model.named_parameters() if "lora" in n)
    config = TrainConfig(model=str(own_world.model), data=str(own_world.pool), out=tmp_path / "run", training=recipe)
    begin = time.process_time()
    train.run(config)
    took = time.process_time() - begin
    guess = cost.training(found, rule, recipe, [20] * 60, saves=8)
    assert 1 / 3 < took / guess < 3


def test_validation_has_a_price(own_world, tmp_path, capsys):
    """Its tokens and passes are counted, as often as it comes; they were not."""
    tokens = []
    for every in (None, 8, 3):
        more = {} if every is None else {"eval_data": [str(own_world.test)], "eval_every": every}
        _, config = settings("train", own_world, tmp_path / "run", dry_run=True, **more)
        train.run(config)
        said = capsys.readouterr().err
        tokens.append(int(re.search(r"cost: ([\d,]+) tokens", said)[1].replace(",", "")))
    held = int(re.search(r"validation: 4 rows, ([\d,]+) tokens, 6 times", said)[1])  # of 16 steps, and the last
    assert tokens[1] - tokens[0] == 2 * held and tokens[2] - tokens[0] == 6 * held


def test_time_left_has_the_validation_to_come_and_not_the_one_that_was():
    """120 s for 10 steps and an evaluation: 2 s a step, not 12; before one is timed, its tokens say how long it is."""
    now = [0.0]
    bar = Progress("training", 100, "steps", clock=lambda: now[0])
    checked = validation.Validation(lambda model: now.__setitem__(0, now[0] + 100) or 1.0, 10, steps=4.0)
    timed = validation.Timed(checked, bar)
    now[0] = 10.0
    bar.advance(5)
    assert bar.eta_seconds == pytest.approx(95 * 2 + 10 * 4 * 2)
    now[0] = 20.0
    bar.advance(5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipelines.training.validation.time.monotonic", lambda: now[0])
        timed(None)
    assert now[0] == 120 and bar.rate == pytest.approx(0.5)
    assert bar.eta_seconds == pytest.approx(90 * 2 + 9 * 100)
    assert [validation.planned(100, 10, done) for done in (0, 9, 10, 95, 100)] == [10, 10, 9, 1, 0]
    assert validation.planned(16, 3) == 6 and validation.planned(7, 10) == 1


def test_steps_of_an_earlier_attempt_do_not_enter_the_rate():
    now = [0.0]
    bar = Progress("training", 100, "steps", clock=lambda: now[0])
    bar.resume(80)
    assert bar.done == 80 and bar.eta_seconds is None
    now[0] = 10.0
    bar.advance(5)
    assert bar.eta_seconds == pytest.approx(15 * 2)


def test_time_left_is_that_of_the_whole_run(tmp_path, monkeypatch):
    """A part that takes twice its estimate doubles those that are to come."""
    ahead = Ahead({"one": 10.0, "two": 20.0, "three": 30.0})
    assert ahead.left("one", 0.0, 0.0, None) == 60
    assert ahead.left("one", 10.0, 0.5, 10.0) == pytest.approx(10 + 2 * 50)
    ahead.finish("one", 20.0)
    assert ahead.left("two", 0.0, 0.0, None) == pytest.approx(2 * 50)
    assert ahead.left("another", 5.0, 0.5, 5.0) == pytest.approx(5 + 2 * 50)
    now = [0.0]
    with Run(tmp_path / "run", DiagnoseConfig(model="m", data="d"), "diagnose") as run:
        run.expect({"here": 100.0, "later": 1000.0})
        bar = Progress("here", 100, "rows", clock=lambda: now[0])
        now[0] = 50.0
        bar.done = 50
        assert bar.line() == "here: 50 of 100 rows (50 %), 1 rows/s, about 50 s left, 17 min 30 s of the whole run"
        bar._report()
        assert json.loads((tmp_path / "run" / "progress.json").read_text())["eta_seconds"] == 1050


def test_stages_inside_others_are_counted_once_and_killed_attempts_count(tmp_path):
    config = DiagnoseConfig(model="m", data="d")
    with Run(tmp_path / "run", config, "diagnose") as run:
        begin = time.monotonic()
        with run.stage("outer"), run.stage("inner"):
            time.sleep(0.05)
        assert 0.05 <= run.seconds <= time.monotonic() - begin + 0.002
    before = run.seconds
    now = datetime.now(UTC)  # an attempt that was killed 40 s after it began a stage
    with open(tmp_path / "run" / "events.jsonl", "a") as file:
        for event in ({"event": "continued"}, {"event": "stage", "name": "features"}):
            file.write(json.dumps({"time": (now - timedelta(seconds=60)).isoformat(), **event}) + "\n")
    progress = {"state": "running", "updated": (now - timedelta(seconds=20)).isoformat()}
    (tmp_path / "run" / "progress.json").write_text(json.dumps(progress))
    for _ in range(2):  # once, however often it is continued
        with Run(tmp_path / "run", config, "diagnose") as run:
            assert run.seconds == pytest.approx(before + 40, abs=0.01)


def test_a_resumed_selection_compares_like_with_like(own_world, tmp_path, monkeypatch):
    """Stopped after the warm-up and continued: tokens and seconds are those of all attempts on both sides."""
    whole = select.run(own_world.select(tmp_path / "whole"))
    want = json.loads((whole / "summary.json").read_text())["cost"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pipelines.select.gradients.extract", stop)
        with pytest.raises(KeyboardInterrupt):
            select.run(own_world.select(tmp_path / "run"))
    first = json.loads((tmp_path / "run" / "cost.json").read_text())
    said = []
    monkeypatch.setattr(messages, "_print", said.append)
    found = json.loads((select.run(own_world.select(tmp_path / "run")) / "summary.json").read_text())["cost"]
    for side in ("before", "after"):
        assert found[side]["tokens"] == want[side]["tokens"] == want["before"]["tokens"]
        assert found[side]["bytes"] == pytest.approx(want[side]["bytes"], rel=0.1)
    assert found["before"]["seconds"] > first["spent"] and "are done; left: " in "".join(said)
    assert json.loads((tmp_path / "run" / "cost.json").read_text()) == first


def test_whole_weights_and_zeroth_order_have_a_price_too(own_world):
    model = models.load(ModelConfig(name=str(own_world.model))).model
    with cost.as_trained(model, None) as module:
        found = cost.probe(module, 16)
        assert found.trainable == sum(p.numel() for p in model.parameters()) and found.saved > 0
        assert cost.recipe_of(TrainingConfig(optimizer="muon"), module).step > 0
    lengths = [16] * 32
    rule = cost.Recipe(0.0, 0)
    one = cost.training(found, rule, TrainingConfig(epochs=1), lengths)
    assert cost.training(found, rule, TrainingConfig(epochs=4), lengths) > one
    assert cost.training(found, rule, TrainingConfig(epochs=4, max_steps=4), lengths) == pytest.approx(one, rel=0.01)
    assert cost.training(found, rule, TrainingConfig(epochs=1, gradient="zo", zo={"q": 50}), lengths) > one


@pytest.mark.parametrize("needed, fits", [(6e9, True), (20e9, False)])
def test_where_the_model_is_on_a_gpu_its_memory_counts(monkeypatch, capsys, needed, fits):
    for name, value in (
        ("is_available", True), ("max_memory_allocated", 5_000_000_000),
        ("mem_get_info", (9_000_000_000, 16_000_000_000)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert cost.peak() == 5_000_000_000
    cost.Estimate(tokens=10, memory=int(needed)).announce()
    said = capsys.readouterr().err
    assert f"{needed / 1e9:.1f} GB of GPU memory" in said
    assert ("are expected, and there are 16.0 GB" in said) is not fits


def test_more_than_main_memory_is_said(monkeypatch, capsys):
    monkeypatch.setattr(cost.psutil, "virtual_memory", lambda: type("", (), {"total": 8_000_000_000}))
    cost.Estimate(tokens=10, memory=9_000_000_000).announce()
    assert "of memory are expected, and there are 8.0 GB" in capsys.readouterr().err
