"""`datatools audit`: arms, verdicts, continued audits, and what is refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from datatools import DataError, UsageError
from pipelines.models import load as models
from pipelines.rows.prepare import prepare
from pipelines.select import arms, audit
from pipelines.select import run as select
from pipelines.select.scored import Scored
from pipelines.select.verdict import verdict
from pipelines.settings.audit import AuditConfig
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import EvaluateConfig
from pipelines.training import evaluation


@pytest.fixture(scope="module")
def selection(world, tmp_path_factory):
    return select.run(world.select(tmp_path_factory.mktemp("selected") / "run", budget="8"))


def audited(world, selection, out, **changes):
    values = {
        "selected": selection / "selected.jsonl",
        "pool": DataConfig(paths=[str(world.pool)]),
        "test": DataConfig(paths=[str(world.test)]),
        "target": [str(world.target)],
        "against": ["random", "tfidf"],
        "seeds": 2,
        "model": ModelConfig(name=str(world.model)),
        "lora": LoraConfig(rank=4),
        "training": TrainingConfig(epochs=1, batch_size=4),
        "out": out,
    }
    return AuditConfig(**values | changes)


@pytest.fixture(scope="module")
def judged(world, selection, tmp_path_factory):
    return audit.run(audited(world, selection, tmp_path_factory.mktemp("audit") / "run"))


def test_an_audit_s_table_is_made_of_its_runs(world, judged, selection):
    """Mean, interval and difference of each arm by hand from the single runs; the base model stands beside them."""
    found = json.loads((judged / "audit.json").read_text())
    assert [(r["arm"], r["seed"]) for r in found["rows"]] == [
        (arm, seed) for arm in ("selected", "random", "tfidf") for seed in (0, 1)
    ]
    assert all(r["rows"] == 8 for r in found["rows"])
    by_arm = {row["arm"]: row for row in found["table"]}
    ours = [r["loss"] for r in found["rows"] if r["arm"] == "selected"]
    for arm in ("selected", "random", "tfidf"):
        losses = [r["loss"] for r in found["rows"] if r["arm"] == arm]
        half = 12.706 * abs(losses[0] - losses[1]) / 2
        assert by_arm[arm]["mean"] == pytest.approx(sum(losses) / 2) and by_arm[arm]["n"] == 2
        assert (by_arm[arm]["low"], by_arm[arm]["high"]) == pytest.approx(
            (by_arm[arm]["mean"] - half, by_arm[arm]["mean"] + half), rel=1e-3
        )
        assert by_arm[arm]["delta_vs_selected"] == pytest.approx(sum(losses) / 2 - sum(ours) / 2)
    base = evaluation.evaluate(
        EvaluateConfig(model=ModelConfig(name=str(world.model)), data=DataConfig(paths=[str(world.test)]))
    )
    assert by_arm["untrained"]["mean"] == pytest.approx(base["loss"], abs=1e-6)
    assert json.loads((selection / "summary.json").read_text())["audit"]["table"] == found["table"]


def test_an_arm_s_loss_can_be_had_by_hand(world, judged, selection, tmp_path):
    """The selection's first run is `train` on selected.jsonl and `evaluate` on the test rows, nothing else."""
    found = json.loads((judged / "audit.json").read_text())
    adapters = list((judged / "arms").glob("*/adapter/adapter_model.safetensors"))
    assert len(adapters) == 6
    losses = set()
    for adapter in adapters:
        one = evaluation.evaluate(
            EvaluateConfig(
                model=ModelConfig(name=str(world.model), adapter=adapter.parent),
                data=DataConfig(paths=[str(world.test)]),
            )
        )
        losses.add(round(one["loss"], 5))
    assert losses == {round(r["loss"], 5) for r in found["rows"]}


@pytest.mark.parametrize(
    "ours, theirs, words",
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], r"better than random by 1\.0000 \(95 % 1\.0000 to 1\.0000, 3 seeds\)"),
        ([2.0, 2.1, 1.95], [1.0, 1.2, 0.9], r"WORSE than random by 0\.9\d+ \(95 % 0\.\d+ to 1\.\d+, 3 seeds\)"),
        ([1.0, 2.0, 3.0], [1.2, 1.7, 3.2], r"not told apart from random: 0\.0333 below, 95 % -0\.\d+ to 0\.\d+"),
        ([1.0, 1.1], [2.0, 2.1], r"is 1\.0000 below random on average \(2 seeds: too few to tell them apart\)"),
        ([1.0], [1.5], r"is 0\.5000 below random \(one seed: no interval\)"),
        ([1.5], [1.0], r"is 0\.5000 above random \(one seed: no interval\)"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(ours, theirs, words):
    """Paired by seed; `better` only where the whole interval is on one side."""
    import re

    assert re.search(words, verdict({"selected": ours, "random": theirs}))


def test_a_killed_audit_keeps_its_arms(command, world, selection, judged, tmp_path):
    argv = [
        "audit",
        "--selected",
        selection / "selected.jsonl",
        "--pool",
        world.pool,
        "--test",
        world.test,
        "--against",
        "random,tfidf",
        "--seeds",
        2,
        "--lora-rank",
        4,
        "--epochs",
        1,
        "--batch-size",
        4,
        "--out",
        tmp_path / "run",
    ]
    assert (
        command(*argv, die=["pipelines.training.evaluation:losses", 4, "before"]).code == -9
    )  # base, two arms, and the third
    arms = {p: p.stat().st_mtime_ns for p in tmp_path.glob("run/arms/*/adapter/complete.json")}
    assert len(arms) == 3
    answer = command(*argv)
    assert answer.code == 0, answer.stderr
    assert {p: p.stat().st_mtime_ns for p in arms} == arms, "trained again"
    got, want = (json.loads((run / "audit.json").read_text()) for run in (tmp_path / "run", judged))
    assert (got["rows"], got["table"], got["verdict"]) == (want["rows"], want["table"], want["verdict"])
    assert "trained on" in answer.stdout


def test_all_baselines_and_the_whole_pool(world, selection, tmp_path):
    run = audit.run(
        audited(world, selection, tmp_path / "run", seeds=1, against=["random-length", "rds", "loss", "full"])
    )
    found = json.loads((run / "audit.json").read_text())
    assert [(r["arm"], r["rows"]) for r in found["rows"]] == [
        ("selected", 8),
        ("random-length", 8),
        ("rds", 8),
        ("loss", 8),
        ("full", 60),
    ]
    assert "the whole pool in one epoch (one seed: no interval)" in found["verdict"]


def test_no_arm_trains_on_a_row_without_a_score(world, selection, tmp_path, monkeypatch):
    """A row whose loss is not a number is nobody's hardest row."""
    config = audited(world, selection, tmp_path)
    tokenizer = models.load(config.model, tokenizer_only=True).tokenizer
    pool = prepare(config.pool, config.model, tokenizer, cache=tmp_path, label="pool")
    scores = torch.arange(60.0)
    scores[7] = float("nan")
    monkeypatch.setattr("pipelines.select.loss.score", lambda context: Scored(scores=scores, formula={}))
    known = arms.Scores({"loss": SimpleNamespace()})
    ((_, rows), *_) = arms.rows_by_seed(known, pool, config, "loss", list(range(59)))
    assert sorted(rows) == [i for i in range(60) if i != 7]


def test_what_cannot_be_audited_is_refused(world, selection, tmp_path):
    with pytest.raises(UsageError, match="lora is null"):
        audit.run(audited(world, selection, tmp_path / "a", lora=None))
    with pytest.raises(UsageError, match="no such file"):
        audit.run(audited(world, tmp_path, tmp_path / "b"))
    with pytest.raises(DataError, match=r"selected.jsonl:1 is not a row of the pool"):
        audit.run(audited(world, selection, tmp_path / "c", pool=DataConfig(paths=[str(world.test)])))
    with pytest.raises(UsageError, match="--against tfidf: it compares with target rows"):
        audit.run(audited(world, selection, tmp_path / "d", target=[]))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_test_rows_that_were_seen_before_are_refused_before_anything_is_trained(world, selection, tmp_path, capsys):
    """By content, whatever id or file they have; nearly the same too where the pool's duplicates are told so."""
    rows = [json.loads(line) for line in world.test.read_text().splitlines()]
    taken = next(json.loads(line) for line in (selection / "selected.jsonl").read_text().splitlines())
    asked = next(json.loads(line) for line in world.target.read_text().splitlines())
    for k, row in enumerate((taken, asked)):
        row["id"] = f"other-{k}"
    for found, words in (([taken], "in the selection"), ([taken], "in the pool"), ([asked], "in the target")):
        test = jsonl(tmp_path / "test.jsonl", [*rows, *found])
        with pytest.raises(DataError, match=rf"1 of {len(rows) + 1} .*{words}.*--allow-overlap"):
            audit.run(audited(world, selection, tmp_path / "a", test=DataConfig(paths=[str(test)]), dry_run=True))
    near = copy.deepcopy(taken)
    near["messages"][0]["content"] = near["messages"][0]["content"].upper()
    test = jsonl(tmp_path / "test.jsonl", [*rows, near])
    changes = {"test": DataConfig(paths=[str(test)]), "dry_run": True}
    audit.run(audited(world, selection, tmp_path / "b", **changes))
    with pytest.raises(DataError, match="in the selection"):
        pool = DataConfig(paths=[str(world.pool)], dedup="near", near_threshold=1.0)
        audit.run(audited(world, selection, tmp_path / "c", pool=pool, **changes))


def test_an_audit_on_seen_rows_says_so_wherever_it_is_read(world, tmp_path, capsys):
    home = select.run(world.select(tmp_path / "run", budget="8"))
    lines = (home / "selected.jsonl").read_text().splitlines()[:2]
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join([*world.test.read_text().splitlines(), *lines]) + "\n")
    changes = {"test": DataConfig(paths=[str(test)]), "against": ["random"], "seeds": 1, "allow_overlap": True}
    found = audit.run(audited(world, home, tmp_path / "audit", **changes))
    said = json.loads((found / "audit.json").read_text())
    assert [one["where"] for one in said["overlap"]] == ["selection", "pool"]
    assert all(one["rows"] == 2 for one in said["overlap"])
    assert "LEAKED: 2 of" in capsys.readouterr().out
    page = (home / "report.html").read_text()
    assert "Test rows leaked" in page and "Leaked: 2 of" in page


def test_a_dry_audit_trains_nothing(world, selection, tmp_path):
    audit.run(audited(world, selection, tmp_path / "run", dry_run=True))
    assert not (tmp_path / "run").exists()
