"""`datatools audit` by loss and accuracy: tables from single runs, resume, the quarter learning rate, the oracle."""

import json

import numpy as np
import pytest

from datatools import UsageError, compare
from pipelines.models import load as models
from pipelines.report import pages
from pipelines.select import audit, bench, swapped
from pipelines.select import run as select
from pipelines.select.compare import agreement, held
from pipelines.settings.audit import AuditConfig
from pipelines.settings.metrics import MetricsConfig
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig

SPEED = {"lora": LoraConfig(rank=4), "training": TrainingConfig(epochs=1, batch_size=4)}


def row(number, *, kind="t", **more):
    word = ("red", "blue")[number % 2]
    messages = [{"role": "user", "content": f"colour of {kind}{number}?"}, {"role": "assistant", "content": word}]
    return {"dataset": kind, "id": f"{kind}-{number}", "messages": messages, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture(scope="module")
def coloured(world, tmp_path_factory):
    """12 test rows with two answers that repeat, 4 target rows, and a pool where a third is of their kind."""
    folder = tmp_path_factory.mktemp("coloured")
    test = write(folder / "test.jsonl", [row(i, kind="u", answer=("red", "blue")[i % 2]) for i in range(12)])
    target = write(folder / "target.jsonl", [row(i) for i in range(4)])
    pool = write(folder / "pool.jsonl", [row(i, kind="p") for i in range(20)] +
                 [json.loads(line) for line in world.pool.read_text().splitlines()[:30]])  # fmt: skip
    chosen = select.run(
        world.select(
            folder / "run", train=DataConfig(paths=[str(pool)]), target=[str(target)], method="tfidf", budget="8"
        )
    )
    return folder, chosen, test


def settings(world, coloured, out, **changes):
    folder, chosen, test = coloured
    values = {
        "selected": chosen / "selected.jsonl", "pool": DataConfig(paths=[str(folder / "pool.jsonl")]),
        "test": DataConfig(paths=[str(test)]), "target": [str(folder / "target.jsonl")], "against": ["random"],
        "seeds": 2, "model": ModelConfig(name=str(world.model)), "out": out, **SPEED,
    }  # fmt: skip
    return AuditConfig(**values | changes)


@pytest.fixture(scope="module")
def judged(world, coloured, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "run"
    metrics = MetricsConfig(names=["options", "exact"], max_new_tokens=6)
    return audit.run(settings(world, coloured, out, metrics=metrics, lr_check=True))


def test_loss_and_accuracy_side_by_side(judged, coloured):
    found = json.loads((judged / "audit.json").read_text())
    assert [metric["name"] for metric in found["metrics"]] == ["loss", "options", "exact"]
    loss, options, _ = found["metrics"]
    assert options["rows"] == 12 and loss["lower_is_better"] and not options["lower_is_better"]
    for arm in ("selected", "random"):
        ours = [one for one in found["rows"] if one["arm"] == arm]
        by_arm = [{entry["arm"]: entry for entry in metric["table"]}[arm] for metric in (loss, options)]
        assert by_arm[0]["mean"] == pytest.approx(np.mean([one["loss"] for one in ours]))
        assert by_arm[1]["mean"] == pytest.approx(np.mean([one["metrics"]["options"]["accuracy"] for one in ours]))
        assert by_arm[1]["low"] <= by_arm[1]["mean"] <= by_arm[1]["high"] and 0 < by_arm[1]["probability"] < 1
    assert "By held-out loss, the selection is" in found["verdict"]
    assert "By option accuracy, the selection is" in found["verdict"] and "2 seeds" in found["verdict"]
    assert found["agreement"]["sentence"] and "quarter of the learning rate" in found["lr_check"]["sentence"]
    page = (coloured[1] / "report.html").read_text()
    for words in ("option accuracy, 12 rows", "exact match, 12 rows", "Probability of the right option", "quarter of"):
        assert words.lower() in page.lower(), words


def test_predictions_say_what_each_model_answered(judged):
    found = [json.loads(line) for line in (judged / "predictions.jsonl").read_text().splitlines()]
    runs = {(row["arm"], row.get("seed"), row["metric"]) for row in found}
    models = [("untrained", None), *((arm, seed) for arm in ("selected", "random") for seed in (0, 1))]
    assert runs == {(*model, metric) for model in models for metric in ("options", "exact")}
    assert len(found) == 12 * len(runs)
    audited = json.loads((judged / "audit.json").read_text())
    for run in audited["rows"]:
        own = [row["right"] for row in found if (row["arm"], row.get("seed")) == (run["arm"], run["seed"])]
        assert np.mean(own) == pytest.approx(np.mean([one["accuracy"] for one in run["metrics"].values()]))
    assert audited["models"]["trained"] == audited["models"]["selected"] and "sentence" not in audited["models"]


def test_another_model_may_be_trained_than_the_one_that_selected(world, command, tmp_path):
    """With features of its own, and a sentence that says which model did what."""
    other = tmp_path / "other"
    loaded = models.load(ModelConfig(name=str(world.model)))
    loaded.model.model.layers = loaded.model.model.layers[:1]
    loaded.model.config.num_hidden_layers = 1
    loaded.model.save_pretrained(other)
    loaded.tokenizer.save_pretrained(other)
    chosen = select.run(world.select(tmp_path / "run", method="rds", model=ModelConfig(name=str(other))))
    states = {path: path.read_bytes() for path in (chosen / "features").rglob("*") if path.is_file()}
    argv = ["audit", "--selected", chosen / "selected.jsonl", "--test", world.test, "--against", "rds", "--seeds", 1,
            "--lora-rank", 2, "--epochs", 1, "--metric", "loss", "--model", world.model]  # fmt: skip
    answer = command(*argv)
    assert answer.code == 0, answer.stderr
    found = json.loads((chosen / "audit" / "audit.json").read_text())
    assert found["models"]["trained"] == str(world.model) and found["models"]["selected"] == str(other)
    assert states and {path: path.read_bytes() for path in states} == states
    said = f"The rows were selected with {other} (rds); the audit trained {world.model}."
    assert found["models"]["sentence"] == said and "the audit trained" in " ".join(answer.stdout.split())
    for page in (chosen / "report.html", pages.draw(chosen / "audit")):
        assert "the audit trained" in page.read_text()
    again = command(*argv[:-2])
    assert again.code == 2 and "model.name was" in again.stderr, "another audit needs a folder of its own"


def test_another_metric_of_a_finished_audit_trains_nothing(world, coloured, judged, monkeypatch):
    before = {path: path.read_bytes() for path in judged.glob("arms/*/losses-*.json")}
    monkeypatch.setattr(bench, "train_adapter", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(bench.evaluation, "losses", lambda *_, **__: pytest.fail("measured again"))
    audit.run(settings(world, coloured, judged, metrics=MetricsConfig(names=["options"]), lr_check=True))
    assert before and {path: path.read_bytes() for path in before} == before
    assert len(json.loads((judged / "audit.json").read_text())["metrics"]) == 2


def test_an_audit_killed_while_it_measures_goes_on_to_the_same_bytes(world, coloured, command, tmp_path):
    _, chosen, test = coloured
    argv = ["audit", "--selected", chosen / "selected.jsonl", "--test", test, "--against", "random", "--seeds", 1,
            "--lora-rank", 4, "--epochs", 1, "--batch-size", 4, "--metric", "options,exact",
            "--max-new-tokens", 4]  # fmt: skip
    assert command(*argv, "--out", tmp_path / "a").code == 0
    died = command(*argv, "--out", tmp_path / "b", die=["pipelines.training.accuracy.measure:_write", 2, "before"])
    assert died.code == -9 and not (tmp_path / "b" / "audit.json").exists()
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "b" / "arms").rglob("*.json")}
    assert len([path for path in there if path.name.startswith("answers-")]) == 1  # of the model before any training
    answer = command(*argv, "--out", tmp_path / "b")
    assert answer.code == 0, answer.stderr
    assert {path: path.stat().st_mtime_ns for path in there} == there  # what was measured stays
    assert (tmp_path / "a" / "audit.json").read_bytes() == (tmp_path / "b" / "audit.json").read_bytes()
    assert "option accuracy" in answer.stdout and "exact match" in answer.stdout


def test_the_oracle(world, coloured, tmp_path, capsys):
    checks = {"rows": 20, "exact_rows": 8, "subsets": 6, "noise": 0.3}
    audit.run(settings(world, coloured, tmp_path / "dry", oracle=True, oracle_checks=checks, dry_run=True))
    assert not (tmp_path / "dry").exists() and "training runs" in capsys.readouterr().err
    out = audit.run(settings(world, coloured, tmp_path / "run", seeds=1, oracle=True, oracle_checks=checks))
    found = json.loads((out / "audit.json").read_text())["oracle"]
    assert [entry["rows"] for entry in found["drop"]["table"]] == [20, 16, 16, 16]
    assert found["noise"]["swapped"] >= 2 and found["noise"]["table"][0]["method"] == found["methods"][0]
    assert found["exact"]["runs"] == 6 and -1 <= found["exact"]["table"][0]["spearman"] <= 1
    assert "Do the scores say what training says" in (coloured[1] / "report.html").read_text()
    text = (out / "audit.json").read_bytes()
    audit.run(settings(world, coloured, tmp_path / "run", seeds=1, oracle=True, oracle_checks=checks))
    assert (out / "audit.json").read_bytes() == text
    capsys.readouterr()
    audit.run(settings(world, coloured, out, seeds=1, oracle=True, oracle_checks=checks, dry_run=True))
    assert "10 of 12 training runs are done" in capsys.readouterr().err  # which rows are best, a dry run does not ask


def test_the_oracle_of_a_selection_by_turns(world, coloured, tmp_path):
    """Method auto: target rows take turns, so that no selector looks at its scores; they are checked all the same."""
    folder = coloured[0]
    chosen = select.run(
        world.select(
            tmp_path / "auto",
            train=DataConfig(paths=[str(folder / "pool.jsonl")]),
            target=[str(folder / "target.jsonl")],
            method="auto",
            budget="20",
        )
    )
    checks = {"rows": 12, "exact_rows": 6, "subsets": 6, "noise": 0.3}
    changes = {"selected": chosen / "selected.jsonl", "seeds": 1, "oracle": True, "oracle_checks": checks}
    out = audit.run(settings(world, coloured, tmp_path / "run", **changes))
    found = json.loads((out / "audit.json").read_text())["oracle"]
    assert found["methods"] == ["auto"] and found["drop"]["method"] == "auto"
    assert found["noise"]["table"][0]["method"] == "auto" and found["noise"]["rows"] == 12


def test_leaving_out_one_row_at_a_time(world, coloured, tmp_path):
    checks = {"rows": 10, "exact_rows": 6, "exact": "leave-one-out"}
    out = audit.run(settings(world, coloured, tmp_path / "run", seeds=1, oracle=True, oracle_checks=checks))
    assert json.loads((out / "audit.json").read_text())["oracle"]["exact"]["runs"] == 7


def test_the_arms_that_nobody_names(world, coloured, tmp_path, capsys):
    """Random rows, and what is chosen by words alone, which needs target rows."""
    audit.run(settings(world, coloured, tmp_path / "a", against=None, dry_run=True))
    assert "no target rows" not in capsys.readouterr().err
    audit.run(settings(world, coloured, tmp_path / "b", against=None, target=[], dry_run=True))
    assert "goes without tfidf, bm25" in capsys.readouterr().err


def test_refusals(world, coloured, tmp_path):
    with pytest.raises(UsageError, match="--allow-code-execution"):
        audit.run(settings(world, coloured, tmp_path / "a", metrics=MetricsConfig(names=["code"])))


# ------------------------------------------------------------------------------------------------ numbers without runs


def metric(name, lower, **means):
    table = [{"arm": arm, "mean": mean, "low": mean, "high": mean, "n": 3} for arm, mean in means.items()]
    return {"name": name, "label": name, "lower_is_better": lower, "rows": 9, "table": table, "against": []}


def test_loss_and_accuracy_that_disagree_are_named():
    loss = metric("held-out loss", True, untrained=9.0, selected=1.0, random=1.5, tfidf=1.2)
    same = agreement([loss, metric("accuracy", False, untrained=0.9, selected=0.8, random=0.2, tfidf=0.8)])
    assert same["agree"] and "agree: selected is the best arm by both" in same["sentence"]
    other = agreement([loss, metric("accuracy", False, untrained=0.1, selected=0.2, random=0.3, tfidf=0.25)])
    assert not other["agree"]
    assert (
        "by loss it is selected, by accuracy random (30.0 % against 20.0 % for selected; rank correlation"
        in other["sentence"]
    )
    assert "-1.00" in other["sentence"]


def test_a_ranking_that_changes_with_the_learning_rate_is_named():
    before = [metric("held-out loss", True, selected=1.0, random=1.5, tfidf=1.2)]
    assert held(1e-3, before, before)["held"]
    found = held(1e-3, before, [metric("held-out loss", True, selected=1.3, random=1.5, tfidf=1.2)])
    assert not found["held"] and "the best arm is tfidf instead of selected" in found["sentence"]
    assert found["learning_rate"] == 2.5e-4 and "0.00025 instead of 0.001" in found["sentence"]


def test_paired_comparison_against_brute_force():
    """Few rows: all resamples are enumerated; the sign test against the binomial sum; seeds are stretched."""
    import itertools
    from math import comb

    generator = np.random.default_rng(0)
    ours, theirs = generator.random((1, 5)), generator.random((1, 5)) + 0.2
    found = compare(ours, theirs, draws=20_000)
    every = [np.mean((theirs - ours)[0, list(places)]) for places in itertools.product(range(5), repeat=5)]
    assert (found.low, found.high) == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.02)
    many = compare(np.zeros((1, 9)), np.array([[1.0] * 7 + [-1.0, 0.0]]))
    assert many.sign_p == pytest.approx(2 * sum(comb(8, k) for k in (0, 1)) / 2**8)
    assert (many.better, many.worse) == (7, 1)
    seeds = generator.normal(size=(3, 400)) * 1e-9 + np.array([[0.0], [1.0], [2.0]])
    spread = compare(np.zeros((3, 400)), seeds, draws=20_000)
    assert spread.difference == pytest.approx(1.0)
    assert spread.high - 1 == pytest.approx(1.5**0.5, abs=0.05)  # the largest resample of (0, 1, 2), stretched


def test_swapped_answers_are_found_by_scores_that_know_them():
    scores = np.array([0.1, 0.9, 0.2, 0.8, 0.5])
    assert swapped.detected(scores, np.array([True, False, True, False, False])) == {"auc": 1.0, "precision": 1.0}
    assert swapped.detected(scores, np.array([False, True, False, True, False])) == {"auc": 0.0, "precision": 0.0}
    assert swapped.detected(np.zeros(4), np.array([True, False, False, False]))["auc"] == 0.5
