"""`datatools order` as a user runs it, on a tiny model with random weights; kills, changes and bad input."""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from datatools import DataError, EnvironmentProblem, Order, UsageError, order
from datatools.order.estimators.pairwise import Pairwise
from pipelines.models import load as models
from pipelines.order import cost, scores
from pipelines.order import kept as kept_files
from pipelines.order import plan as planning
from pipelines.order import run as pipeline
from pipelines.order import search as judging
from pipelines.order.run import run
from pipelines.order.setting import Setting
from pipelines.report import order_page as order_report
from pipelines.report import pages
from pipelines.rows.prepare import prepare
from pipelines.settings.order import OrderConfig, OrderData, OrderTraining
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TrainConfig
from pipelines.texts import size
from pipelines.training import fit, train, trainer
from tests.pipelines import damage
from tests.tiny import save_tiny_model, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    save_tiny_model(folder / "model", layers=1, hidden=16)
    write_rows(folder / "data.jsonl", 60)
    return folder


def settings(world: Path, out: Path, **changes: object) -> OrderConfig:
    base: dict[str, object] = {
        "model": ModelConfig(name=str(world / "model")),
        "data": OrderData(paths=[str(world / "data.jsonl")]),
        "out": out,
        "training": OrderTraining(batch_size=4, learning_rate=1e-3),
        "batches": 4,
        "held_out": 8,
        "orders": 5,
        "estimators": ["pairwise", "reduced"],
        "dimensions": 6,
        "warmup_steps": 0,
        "worth": 0,
    }
    return OrderConfig.model_validate(base | changes)


@pytest.fixture(scope="module")
def validated(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ["pairwise", "reduced", "moments", "table", "own-moments"]
    out = tmp_path_factory.mktemp("runs") / "validated"
    return run(settings(world, out, estimators=names, references=2, calibration=2, warmup_steps=2, seeds=2))


def test_validation_says_what_it_must(validated: Path) -> None:
    found = json.loads((validated / "validation.json").read_text())
    assert {"pairwise", "reduced", "moments", "table", "own-moments", "calibrated"} <= set(found["estimators"])
    for name, entry in found["estimators"].items():
        assert len(entry["true"]) == len(entry["estimated"]) == len(found["orders"]) == 5, name
        assert entry["true"] == [o["true"] for o in found["orders"]]
        assert entry["cost_in_batch_gradients"] > 0 and entry["regret"] >= 0
        assert entry["spearman"] == pytest.approx(order.spearman(entry["estimated"], entry["true"]))
    assert len(found["estimators"]["pairwise"]["references"]) == 1
    assert found["anything_to_win"]["over_seeds"] > 0
    best = found["estimators"]["own-moments"]
    assert best["spearman"] == pytest.approx(1.0) and best["mae_relative"] < 0.2
    page = (validated / "report.html").read_text()
    (validated / "report.html").unlink()
    assert pages.draw(validated) == validated / "report.html" and (validated / "report.html").read_text() == page
    assert "order-square" in page and "order-heat" in page and "<script" not in page


@pytest.fixture(scope="module")
def cold(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """What the tasks of a run share, from a cold start; batches fall into several micro-batches."""
    kept: list[Setting] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pipeline.TASKS, "record", kept.append)
        training = OrderTraining(batch_size=4, learning_rate=1e-3, micro_tokens=70)
        run(settings(world, tmp_path_factory.mktemp("runs") / "cold", task="record", training=training))
    assert max(map(len, kept[0].problem.batches)) > 1
    return kept[0]


def test_training_in_an_order_ends_where_its_true_run_does(cold: Setting, world: Path, tmp_path: Path) -> None:
    """`datatools train --order` and the tasks' own loop: one way of training, but for the last bit of fused steps."""
    given = cold.plan.reordered([2, 0, 3, 1])
    given.save(tmp_path / "order.npz")
    done = train.run(
        TrainConfig(
            model=ModelConfig(name=str(world / "model")),
            data=DataConfig(paths=[str(world / "data.jsonl")]),
            out=tmp_path / "trained",
            lora=None,
            training=train_recipe(),
            order=tmp_path / "order.npz",
        )
    )
    trained = AutoModelForCausalLM.from_pretrained(done / "model", dtype=torch.float32)
    start = kept_files.reference(cold).start.params
    end, _ = order.train(cold.problem, cold.recipe, given.sequence, start)
    for name, p in trained.named_parameters():
        if name in end:
            torch.testing.assert_close(p.detach(), end[name], rtol=1e-6, atol=1e-7)
    assert cold.problem.held_out_loss(end) == kept_files.true_loss(cold, given.sequence)
    metrics = (done / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 4, "one step a batch"


def test_a_trainer_records_the_same_reference_run(cold: Setting, world: Path, tmp_path: Path) -> None:
    """`DataTrainer(observe=...)` with a `Recorder`, as a user of the Trainer writes it."""
    model = ModelConfig(name=str(world / "model"))
    loaded = models.load(model)
    data = DataConfig(paths=[str(world / "data.jsonl")])
    rows = prepare(data, model, loaded.tokenizer, cache=tmp_path, label="data")
    recorder = order.Recorder(steps=len(cold.plan))

    def observe(step: int, chosen: Sequence[int]) -> None:
        recorder(step, [rows.pool.ids[row] for row in chosen], driver.optimizer)

    driver = trainer.DataTrainer(
        recipe=train_recipe(),
        observe=observe,
        model=train.trainable(loaded.model, None, seed=0),
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, max_grad_norm=0.0,
            report_to="none", save_strategy="no", remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=fit.SingleRows(rows.item, [row for step in train.rows_of(cold.plan, rows, "") for row in step]),
        data_collator=fit.gather,
        shuffle=False,
    )  # fmt: skip
    driver.train()
    recorded, plan = recorder.finish(driver.optimizer)
    wanted = kept_files.reference(cold)
    assert plan == cold.plan and recorded.recipe == wanted.recipe and recorded.sequence == wanted.sequence
    for one, other in zip(recorded.anchors, wanted.anchors, strict=True):
        assert one.position == other.position
        for name, p in other.params.items():
            torch.testing.assert_close(one.params[name], p, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(one.states[name], other.states[name], rtol=1e-4, atol=1e-7)
    scores = [order.precompute("pairwise", r, cold.problem).score([2, 0, 3, 1]) for r in (recorded, wanted)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def train_recipe() -> TrainingConfig:
    """What `OrderTraining` of the fixture `cold` says, for `datatools train`."""
    return TrainingConfig(
        batch_size=4, learning_rate=1e-3, schedule="constant", gradient_clip=None, epochs=1, micro_tokens=70
    )


def test_an_order_of_other_rows_is_refused(world: Path, tmp_path: Path) -> None:
    Order((("nobody",),), (0,)).save(tmp_path / "order.npz")
    config = TrainConfig(
        model=ModelConfig(name=str(world / "model")),
        data=DataConfig(paths=[str(world / "data.jsonl")]),
        out=tmp_path / "out",
        order=tmp_path / "order.npz",
    )
    with pytest.raises(DataError, match="row 'nobody' .* is not among the usable rows"):
        train.run(config)


def test_search_proposes_an_order_and_map_and_estimate_go_on_in_the_same_folder(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(settings(world, out, task="search", budget=300, retrain=1, estimators=["pairwise"]))
    proposed = Order.load(out / "order.npz")
    found = json.loads((out / "search.json").read_text())
    first = next(row for row in found["rows"] if row["name"] == found["proposed"])
    assert tuple(first["sequence"]) == proposed.sequence and first["true"] is not None
    assert first["estimated"] == min(row["estimated"] for row in found["rows"])
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert any("surrogates" in p.parts for p in kept) and any("reference" in p.parts for p in kept)
    run(settings(world, out, task="estimate", sequences=str(out / "order.npz"), orders=3))
    estimates = json.loads((out / "estimates.json").read_text())
    again = next(row for row in estimates["orders"] if row["name"] == "order.npz")
    assert again["pairwise"] == pytest.approx(first["estimated"])
    run(settings(world, out, task="map", map_batches=2, map_positions=9, completions=2))
    lines = (world / "data.jsonl").read_text().splitlines()
    parts = json.loads((out / "map.json").read_text())["rows"]
    assert len(parts) == 2 and all(len(p["memory"]) == 4 for p in parts), "a run of 4 steps has 4 positions"
    assert all(p["counterfactual"] > 0 for p in parts), "training on a batch lowers its loss"
    plan = Order.load(out / "reference.npz")
    for part in parts:
        assert [row["id"] for row in part["rows"]] == list(plan.batches[part["batch"]])
        assert all(row["memorised"] > 0 and row["forgotten_error"] >= 0 for row in part["rows"])
        answers = [len(json.loads(line)["messages"][1]["content"]) + 1 for row in part["rows"]
                   for line in lines if json.loads(line)["id"] == row["id"]]  # fmt: skip
        mean = sum(n * row["without"] for n, row in zip(answers, part["rows"], strict=True)) / sum(answers)
        assert mean == pytest.approx(part["without_memory"], rel=1e-5), "each row has its own loss"
    assert kept == {p: p.stat().st_mtime_ns for p in kept}, "recorded once, and pairwise made once"
    page = (out / "report.html").read_text()
    assert "Memorisation" in page and f"<td>{parts[0]['rows'][0]['id']}</td>" in page


def test_a_search_ends_early_where_there_is_nothing_to_win(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(settings(world, out, task="search", budget=50, retrain=2, worth=1e6))
    found = json.loads((out / "search.json").read_text())
    assert found["worth_it"] is False and found["proposed"] == "reference" and found["judge"] is None
    assert all(row["true"] is None for row in found["rows"]) and not (out / "true").exists()
    assert Order.load(out / "order.npz").sequence == Order.load(out / "reference.npz").sequence
    assert "There is nothing to win by ordering" in (out / "report.html").read_text()


def test_a_second_estimator_judges_what_the_first_found_and_goes_on(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings_ = {"task": "search", "budget": 300, "retrain": 1, "judged": 6}
    run(settings(world, out, estimators=["pairwise", "reduced"], **settings_))
    found = json.loads((out / "search.json").read_text())
    judged = {row["name"]: row["judged"] for row in found["rows"] if "judged" in row}
    assert found["judge"] == "reduced" and judged[found["proposed"]] == min(judged.values())
    assert {"reference", "found 1", "best of random, 1", "length, rising", "refined 1"} <= judged.keys()
    assert found["judging"]["orders"] > 6 and found["judging"]["cost_in_batch_gradients"] > 0
    kept = {p: p.stat().st_mtime_ns for p in (out / "estimates").iterdir()}
    assert len(kept) > 2, "the shortlist, and rounds"
    lost = max(kept, key=lambda p: kept[p])
    lost.unlink()  # as if it had been killed in the last round
    run(settings(world, out, estimators=["pairwise", "reduced"], **settings_))
    again = json.loads((out / "search.json").read_text())
    assert again["rows"] == found["rows"] and again["judging"] == found["judging"]
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items() if p != lost)
    assert "orders that it judged" in (out / "report.html").read_text()
    proposed = next(row for row in found["rows"] if row["name"] == found["proposed"])
    assert tuple(proposed["sequence"]) == Order.load(out / "order.npz").sequence
    assert found["trust"] == proposed["trust"] and "replay" in found["trust"]


def test_a_judge_without_a_finite_estimate_proposes_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = judging.estimate

    def lost(*args: object, **more: object) -> dict[str, object]:
        found = real(*args, **more)  # type: ignore[arg-type]
        return found | {"estimated": [float("inf")] * len(found["estimated"])}

    monkeypatch.setattr(judging, "estimate", lost)
    with pytest.raises(DataError, match="reduced: .* estimates are not finite .* choose another second estimator"):
        run(settings(world, tmp_path / "run", task="search", budget=50, retrain=0, judged=4))
    assert not (tmp_path / "run" / "order.npz").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"training": OrderTraining(batch_size=4, optimizer="lion")}, "trained with lion. Use the estimator 'moments'"),
        ({"estimators": ["groups"], "data": {"source_key": "none"}}, "from one source, so there is nothing to order"),
        ({"training": OrderTraining(batch_size=4, max_steps=2)}, "max_steps"),
    ],
)
def test_what_cannot_be_estimated_is_refused_before_anything_is_trained(
    world: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    if isinstance(data := changes.get("data"), dict):
        changes = changes | {"data": {"paths": [str(world / "data.jsonl")]} | data}
    with pytest.raises(UsageError, match=message):
        run(settings(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "reference").exists()


def test_a_plan_sorts_sources_and_ends_early_where_there_is_nothing_to_win(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    base = {"batches": 6, "task": "plan", "retrain": 2, "replicates": 2}
    run(settings(world, out, worth=1e6, **base))
    found = json.loads((out / "plan.json").read_text())
    assert found["worth_it"] is False and found["proposed"] == "sources mixed"
    assert not (out / "true").exists() and not (out / "reference").exists(), "nothing was trained"
    assert Order.load(out / "order.npz").sequence == Order.load(out / "reference.npz").sequence
    assert "nothing to win" in (out / "report.html").read_text()
    kept = {p: p.stat().st_mtime_ns for p in (out / "plans").iterdir()}
    run(settings(world, out, worth=0, **base))
    assert kept == {p: p.stat().st_mtime_ns for p in (out / "plans").iterdir()}, "the brackets were computed once"
    found = json.loads((out / "plan.json").read_text())
    proposed = Order.load(out / "order.npz")
    sources = [proposed.batches[b][0].split("-")[0] for b in proposed.sequence]
    assert sorted(found["order"]) == ["a0", "a1", "a2"] and found["steps"] == [2, 2, 2] and len(sources) == 6
    assert [row["name"] for row in found["rows"]][:3] == ["the plan", "the plan, reversed", "sources mixed"]
    assert all(row["true"] > 0 and row["estimated"] > 0 for row in found["rows"]) and len(found["rows"]) == 5
    assert all(error > 0 for error in found["errors"]) and found["clear"] is not None
    plan, _, mixed, *_ = found["rows"]
    best = min((plan, mixed), key=lambda row: row["true"])
    assert found["proposed"] == best["name"] and tuple(best["sequence"]) == proposed.sequence
    predicted, true = (found["rows"][0][key] - found["rows"][1][key] for key in ("estimated", "true"))
    assert predicted < 0 and true < 0, "the plan is better than its reverse, as predicted"
    page = (out / "report.html").read_text()
    assert "Which source first?" in page and f"{found['clear']} of 3 pairs of sources differ" in page
    run(settings(world, out, worth=0, plan_anchors=2, **base | {"retrain": 0}))
    assert len(list((out / "plans").iterdir())) == 2


@pytest.mark.parametrize("retrain, mixed", [(1, True), (1, False), (0, None)])
def test_a_plan_that_mixed_sources_beat_keeps_the_sources_mixed(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    retrain: int,
    mixed: bool | None,
) -> None:
    """By true losses where the command retrained, else by its estimates."""
    losses = [2.0, 3.0, 1.0 if mixed else 2.5, 1.5]
    monkeypatch.setattr(planning, "true_losses", lambda setting, sequences, label: losses[: len(sequences)])
    run(settings(world, tmp_path / "run", task="plan", batches=6, retrain=retrain, replicates=1))
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    plan, _, kept = found["rows"][:3]
    if mixed is None:
        mixed = kept["estimated"] < plan["estimated"]
    assert found["proposed"] == ("sources mixed" if mixed else "the plan")
    wanted = (kept if mixed else plan)["sequence"]
    assert Order.load(tmp_path / "run" / "order.npz").sequence == tuple(wanted)
    said = capsys.readouterr().err
    assert ("order.npz keeps the sources mixed" in said) is mixed
    better = "not the best of the retrained orders of sources: random 1 ends at 1.5" in said
    assert better is (retrain == 1 and not mixed)
    assert ("Mixed sources are better" in (tmp_path / "run" / "report.html").read_text()) is mixed


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sources": ["a0", "a9"]}, "--sources: no usable row has the source 'a9'; known: a0, a1, a2"),
        ({"sources": ["a1"]}, "plan: only the source 'a1' has enough rows for a batch"),
        ({"batches": 2}, "--batches 2 is below the number of sources .3: a0, a1, a2."),
        ({"grouping": "mixed"}, "plan: batches of mixed rows belong to no source"),
        ({"training": OrderTraining(batch_size=4, optimizer="lion")}, "rule lion do not change with the size"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_before_anything_is_computed(
    world: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(settings(world, tmp_path / "run", task="plan", **{"batches": 6} | changes))
    assert not (tmp_path / "run" / "plans").exists()


def test_curricula_are_estimated_retrained_and_compared_with_random_orders(world: Path, tmp_path: Path) -> None:
    rows = [
        json.loads(line) | {"quality": i % 7} for i, line in enumerate((world / "data.jsonl").read_text().splitlines())
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, out = OrderData(paths=[str(tmp_path / "data.jsonl")]), tmp_path / "run"
    names = ["length", "loss", "gradient-norm", "influence", "learnability", "similarity", "column:quality"]
    base = {"data": data, "task": "curricula", "batches": 6, "scores": names, "estimators": ["pairwise"], "retrain": 2}
    run(settings(world, out, worth=1e6, **base))
    found = json.loads((out / "curricula.json").read_text())
    assert found["proposed"] == "reference" and not (out / "true").exists(), "nothing to win, nothing retrained"
    run(settings(world, out, worth=0, **base))
    found = json.loads((out / "curricula.json").read_text())
    kinds = {row["name"].split(", ")[0] for row in found["rows"]}
    assert {"reference", "length", "column:quality", "random 1", "random 2"} <= kinds
    retrained = [row for row in found["rows"] if row.get("true") is not None]
    assert 4 <= len(retrained) <= 5, "the best two, the reference, and two random orders"
    proposed = next(row for row in found["rows"] if row["name"] == found["proposed"])
    assert tuple(proposed["sequence"]) == Order.load(out / "order.npz").sequence and found["by"] == "true"
    assert len(list((out / "scores").iterdir())) == 6 and "Orders, best first" in (out / "report.html").read_text()
    run(
        settings(
            world, out, **base | {"scores": ["length"], "shapes": ["sort", "saw"], "train_all": True, "retrain": 0}
        )
    )
    found = json.loads((out / "curricula.json").read_text())
    assert all(row["true"] > 0 for row in found["rows"]) and found["estimator"] is None
    for changes, message in (
        ({"scores": ["lenght"]}, "no score 'lenght'; did you mean 'length'"),
        ({"scores": ["column:quantity"]}, "column:quantity: the row .*data.jsonl.* has no such column"),
        ({"scores": ["column:id"]}, "column:id: the row .* has 'a-.*', which is not a finite number"),
    ):
        with pytest.raises((UsageError, DataError), match=message):
            run(settings(world, tmp_path / "other", **base | changes))
        assert not (tmp_path / "other" / "reference").exists()


def test_a_score_that_is_not_finite_is_named_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scores.SCORES, "loss", lambda setting: [1.0, math.nan])
    training, path = SimpleNamespace(learning_rate=1.0), tmp_path / "loss.json"
    made = SimpleNamespace(kept=lambda *_: path, config=SimpleNamespace(training=training),
                           run=SimpleNamespace(stage=nullcontext))  # fmt: skip
    with pytest.raises(DataError, match="the score loss of batch 1 is not finite"):
        scores.measured(cast(Setting, made), ["loss"])
    assert not path.exists()


def test_clusters_take_the_place_of_sources(world: Path, tmp_path: Path) -> None:
    run(settings(world, tmp_path / "run", task="plan", clusters=2, batches=4, worth=1e6))
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["names"] == ["cluster 0", "cluster 1"]


@pytest.mark.parametrize("task, estimators, anchors", [("record", ["pairwise"], 3), ("estimate", ["table"], 5)])
def test_a_recorded_run_that_is_too_large_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, estimators: list[str], anchors: int
) -> None:
    monkeypatch.setattr(cost, "RECORDED", 3 * 4 * 6_496 * anchors - 1)
    with pytest.raises(EnvironmentProblem, match=f"{anchors} anchors of 6,496 parameters are .* use adapters"):
        run(settings(world, tmp_path / "run", task=task, estimators=estimators))
    assert not (tmp_path / "run" / "reference").exists()
    monkeypatch.setattr(cost, "RECORDED", 3 * 4 * 6_496 * anchors)
    run(settings(world, tmp_path / "run", task=task, estimators=estimators, orders=2))


def test_a_reduced_model_of_rows_and_one_of_directions_do_not_mix(world: Path, tmp_path: Path) -> None:
    found = {}
    for rows in (4, 0, 7):
        options = {"task": "estimate", "estimators": ["reduced", "pairwise"], "orders": 3, "sample_rows": rows}
        run(settings(world, tmp_path / "run", **options))
        found[rows] = json.loads((tmp_path / "run" / "estimates.json").read_text())["estimators"]
    assert found[4]["reduced"]["estimated"] != found[0]["reduced"]["estimated"]
    assert found[4] == found[7], "a batch has four rows"
    made = sorted(p.name.split("-")[0] for p in (tmp_path / "run" / "surrogates").iterdir())
    assert made == ["pairwise", "reduced", "reduced"], "pairwise does not depend on them"


def test_a_spread_over_seeds_that_was_not_measured_is_not_said_to_be_none(world: Path, tmp_path: Path) -> None:
    run(settings(world, tmp_path / "run", warmup_steps=2, seeds=0, estimators=["pairwise"], orders=3))
    prize = json.loads((tmp_path / "run" / "validation.json").read_text())["anything_to_win"]
    assert prize["worth_it"] is None and prize["over_seeds"] is None and "not measured" in prize["sentence"]


def test_a_warm_up_on_a_handful_of_rows_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings(world, tmp_path / "few", task="record", batches=12, warmup_steps=20))
    assert "the warm-up trains 20 times on each of the 4 remaining rows" in capsys.readouterr().err
    run(settings(world, tmp_path / "none", task="record", batches=13, warmup_steps=2))
    assert "no row is left for the warm-up, which trains on the run's own rows" in capsys.readouterr().err


@pytest.mark.parametrize("orders, interval, words", [
    (5, (0.9, 1.0), "5 orders are too few"), (30, (-0.1, 0.9), "No estimator reliably ranks the 30 orders"),
    (30, (0.2, 0.9), "pairwise ranks 30 orders with Spearman 0.700 (0.200 to 0.900)"),
    (30, None, "the estimates do not vary"),
])  # fmt: skip
def test_a_rank_correlation_is_a_headline_only_where_it_shows_something(
    orders: int, interval: tuple[float, float] | None, words: str
) -> None:
    entry = {"spearman": 0.7, "spearman_interval": interval}
    assert words in order_report._headline({"pairwise": entry}, "pairwise", orders)


def test_five_orders_are_no_headline(validated: Path) -> None:
    page = (validated / "report.html").read_text()
    assert "<h1>5 orders are too few" in page and "which are unreliable for so few" in page


def test_values_of_another_type_are_told(validated: Path) -> None:
    assert damage.check(order_report.render, validated / "validation.json", 20)


def test_a_precedence_of_many_batches_is_drawn_in_few_squares() -> None:
    n = 100
    matrix = [[float(i - j) for j in range(n)] for i in range(n)]
    drawn = order_report._precedence({"estimators": {"pairwise": {"precedence": matrix}}})
    assert drawn is not None and drawn["svg"].count("<rect") == 64 * 64
    assert "batch 0 before" in drawn["svg"] and "and 1 more" in drawn["svg"]


def test_a_killed_validation_goes_on_where_it_was(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(settings(world, tmp_path / "whole"))
    calls: list[int] = []
    real = order.train

    def counted(*args: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(order, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        run(settings(world, tmp_path / "part"))
    assert len(list((tmp_path / "part" / "true").iterdir())) == 3
    run(settings(world, tmp_path / "part"))
    assert len(calls) == 4 + 3, "three of the six true runs were kept"
    one, two = (json.loads((f / "validation.json").read_text()) for f in (whole, tmp_path / "part"))
    assert one["orders"] == two["orders"]
    for name, entry in one["estimators"].items():
        assert entry["estimated"] == two["estimators"][name]["estimated"]


def test_what_cannot_be_is_refused_with_the_reason(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lora.dropout is 0.1: dropout differs in every run"):
        run(settings(world, tmp_path / "a", lora=LoraConfig(rank=2, dropout=0.1)))
    with pytest.raises(UsageError, match="use --grouping source"):
        run(settings(world, tmp_path / "b", estimators=["groups"], grouping="mixed"))
    with pytest.raises(UsageError, match=r"--batches 400: the data gives 13 batches of 4 rows besides 8 held-out rows"):
        run(settings(world, tmp_path / "c", batches=400))
    with pytest.raises(UsageError, match="cannot be replayed from gradients alone"):
        run(settings(world, tmp_path / "d", training=OrderTraining(optimizer="spam", batch_size=4)))
    config = json.loads((world / "model" / "config.json").read_text())
    dropping = tmp_path / "dropping"
    dropping.mkdir()
    for file in (world / "model").iterdir():
        (dropping / file.name).write_bytes(file.read_bytes())
    (dropping / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    with pytest.raises(UsageError, match="the model has dropout 0.1 in attention"):
        run(settings(world, tmp_path / "e", model=ModelConfig(name=str(dropping))))


def test_orders_of_another_run_are_refused(world: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        run(settings(world, tmp_path / name, task="record", seed=seed))
    path = tmp_path / "other" / "reference.npz"
    with pytest.raises(
        DataError, match=r"reference.npz: its batches differ from those of this run; estimate orders that were made"
    ):
        run(settings(world, tmp_path / "one", task="estimate", sequences=str(path)))


def test_estimates_that_are_not_finite_are_null_and_the_worst(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Pairwise._scores

    def diverging(made: Pairwise, sequences: torch.Tensor) -> torch.Tensor:
        scores = real(made, sequences)
        scores[sequences[:, 0] == 3] = torch.nan
        return scores

    monkeypatch.setattr(Pairwise, "_scores", diverging)
    config = settings(world, tmp_path / "run", orders=9, calibration=2, estimators=["pairwise", "table"])
    found = json.loads((run(config) / "validation.json").read_text())
    entry = found["estimators"]["pairwise"]
    bad = [o["sequence"][0] == 3 for o in found["orders"]]
    assert 0 < sum(bad) < 8 and [loss is None for loss in entry["estimated"]] == bad
    assert not any(ok for ok, lost in zip(entry["trusted"], bad, strict=False) if lost)
    ranked = [torch.inf if loss is None else loss for loss in entry["estimated"]]
    assert entry["spearman"] == pytest.approx(order.spearman(ranked, entry["true"]))
    assert entry["mae"] is entry["pearson"] is entry["conformal"] is None and entry["regret"] >= 0
    assert found["estimators"]["calibrated"]["weights"].keys() == {"table"}
    said = capsys.readouterr().err
    assert f"{sum(bad)} of 9 estimates are not finite and rank last" in said
    assert "calibrated: excludes pairwise, whose estimates are not all finite" in said
    assert f"{sum(bad)} not shown: the estimate is not finite" in (tmp_path / "run" / "report.html").read_text()
    run(config.model_copy(update={"task": "estimate"}))
    estimates = json.loads((tmp_path / "run" / "estimates.json").read_text())
    assert any(row["pairwise"] is None for row in estimates["orders"])
    run(config.model_copy(update={"task": "search", "budget": 50, "retrain": 0}))
    assert Order.load(tmp_path / "run" / "order.npz").sequence[0] != 3


def test_true_runs_that_diverge_are_named(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = order.train

    def exploding(*args: object, **more: object) -> object:
        params, states = real(*args, **more)  # type: ignore[arg-type]
        calls.append(1)
        return {n: p * (torch.nan if len(calls) == 3 else 1) for n, p in params.items()}, states

    monkeypatch.setattr(order, "train", exploding)
    with pytest.raises(DataError, match=r"run 2 of 5 .* diverges: the loss is not.* lower --learning-rate .now 0"):
        run(settings(world, tmp_path / "run"))
    assert len(list((tmp_path / "run" / "true").iterdir())) == 2, "the reference's and the first are kept"


def test_a_projected_table_is_doubted(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"task": "estimate", "estimators": ["table"], "orders": 2}
    for k in (0, 64):
        run(settings(world, tmp_path / "run", **options, table_projection=k))
    found = json.loads((tmp_path / "run" / "estimates.json").read_text())["estimators"]["table"]
    assert found["bytes"] == 4 * 4 * 64 * 4 and all(t["sketch"] > 1 for t in found["trust"])
    assert not any(found["trusted"])
    assert f"{size(found['bytes'])} of memory" in capsys.readouterr().err


def test_a_changed_model_is_refused_and_an_accepted_one_recorded_anew(world: Path, tmp_path: Path) -> None:
    moved = tmp_path / "model"
    save_tiny_model(moved, layers=1, hidden=16)
    config = settings(world, tmp_path / "run", task="record", model=ModelConfig(name=str(moved)))
    run(config)
    save_tiny_model(moved, layers=1, hidden=16, seed=1)
    with pytest.raises(DataError, match=r"changed since the run .* model.model.safetensors"):
        run(config)
    out = run(config.model_copy(update={"accept_change": ["model"]}))
    assert (out / "before-change-1" / "reference").is_dir() and (out / "reference").is_dir()
    run(config)  # and that is the run's model from now on


def test_source_batches_epochs_and_adapters(world: Path, tmp_path: Path) -> None:
    out = run(
        settings(
            world, tmp_path / "run", task="validate", grouping="source", orders=3, lora=LoraConfig(rank=2),
            training=OrderTraining(batch_size=4, learning_rate=1e-3, epochs=2), estimators=["groups", "pairwise"],
            batches=6, seeds=2,
        )
    )  # fmt: skip
    found = json.loads((out / "validation.json").read_text())
    assert all(sorted(o["sequence"]) == sorted([*range(6)] * 2) for o in found["orders"])
    assert found["anything_to_win"]["over_seeds"] > 0, "adapters are drawn anew by seed"
    plan = Order.load(out / "reference.npz")
    assert all(len({i.split("-")[0] for i in batch}) == 1 for batch in plan.batches)


def test_dry_run_leaves_nothing_behind(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(settings(world, tmp_path / "none", dry_run=True))
    assert not (tmp_path / "none").exists()
    said = capsys.readouterr().err
    assert "Hessian-vector products" in said and "pays off from" in said


def test_command_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.cli.app import main

    common = ["--model", str(world / "model"), "--data", str(world / "data.jsonl"), "--batches", "3",
              "--batch-size", "4", "--out", str(tmp_path / "run"), "--quiet", "--set", "held_out=8",
              "--set", "dimensions=2"]  # fmt: skip
    assert main(["order", "validate", *common, "--orders", "3", "--estimators", "pairwise,reduced", "--seed", "3"]) == 0
    found = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert found["estimators"].keys() == {"pairwise", "reduced"}
    assert main(["order", "search", "--out", str(tmp_path / "run"), "--quiet", "--set", "retrain=0"]) == 0
    assert (tmp_path / "run" / "order.npz").is_file()
    assert main(["order", str(tmp_path / "run" / "run.yaml"), "--quiet"]) == 0, "replays the validation"
    assert main(["order", "validate", *common, "--orders", "1"]) == 2
    assert "setting 'orders' is 1; should be greater than or equal to 2" in capsys.readouterr().err
    assert main(["order", "valdiate", "--out", str(tmp_path / "run")]) == 2
    assert "did you mean 'validate'" in capsys.readouterr().err
    assert main(["order", "search", "--out", str(tmp_path / "run"), "--batches", "5"]) == 2
    assert "batches was 3, is 5" in capsys.readouterr().err
