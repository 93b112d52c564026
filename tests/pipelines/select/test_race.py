"""`select --verify`: candidates are trained on and judged on held-back target rows, and the winner selects."""

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from datatools import UsageError, files
from pipelines.cli.app import main
from pipelines.report import terminal
from pipelines.runs.folder import Run
from pipelines.select import race, winner
from pipelines.select import run as select
from pipelines.select.race import Race
from pipelines.select.scorer import scorer
from pipelines.settings.methods import SCORERS, known
from pipelines.settings.metrics import MetricsConfig
from pipelines.settings.parts import DataConfig, TrainingConfig
from tests.tiny import write_rows

GOOD = "!!!! ???? !!!! ????"
QUICK = TrainingConfig(epochs=4, batch_size=4, learning_rate=0.01)
LOSS = MetricsConfig(names=["loss"])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(name, prompt, answer):
    return {"id": name, "prompt": prompt, "completion": answer, "dataset": name[0]}


@pytest.fixture(scope="module")
def planted(world, tmp_path_factory):
    """A target whose words lead to rows W with the wrong answers; the right ones are in rows G, of other words."""
    folder = tmp_path_factory.mktemp("planted")
    pool = [row(f"G{i}", f"n{i} m{i}", GOOD[i % 3 :]) for i in range(20)]
    pool += [row(f"W{i}", f"alpha beta gamma {i}", 2 * "abcdefgh"[i % 4 :]) for i in range(20)]
    pool += [row(f"X{i}", f"p{i} q{i}", 2 * "zyx wvu "[i % 4 :]) for i in range(20)]
    target = [row(f"T{i}", f"alpha beta gamma {i + 40}", GOOD[i % 3 :]) for i in range(12)]
    paths = write(folder / "pool.jsonl", pool), write(folder / "target.jsonl", target)

    def settings(out, **changes):
        values = {"train": DataConfig(paths=[paths[0]]), "target": [paths[1]], "method": "auto", "budget": "8",
                  "verify": True, "training": QUICK}  # fmt: skip
        return world.select(out, **values | changes)

    return settings


@pytest.fixture(scope="module")
def won(planted, tmp_path_factory):
    return select.run(planted(tmp_path_factory.mktemp("won") / "run"))


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def ids(folder):
    return [json.loads(line)["id"] for line in (folder / "selected.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------------- a race


def test_the_planted_candidate_wins_and_selects(won, planted, tmp_path):
    summary = summary_of(won)
    found = summary["race"]
    assert (found["kept"], found["state"], found["rows"]) == ("gradients alone", "won", 12)
    assert "Gradients alone wins: on 12 held-back target rows, held-back loss is" in found["verdict"]
    loss = {line["candidate"]: line for line in found["metrics"][0]["table"]}
    assert loss["gradients alone"]["mean"] < loss["fusion"]["mean"] - 0.1
    assert loss["gradients alone"]["high"] < 0 and loss["gradients alone"]["reading"] == "better"
    assert found["metrics"][1]["name"] == "options" and found["metrics"][1]["rows"] == 12  # three answers that repeat
    assert all(name.startswith("G") for name in ids(won))
    assert found["runs"] <= 8 and len(list((won / "race").iterdir())) == found["runs"]
    # the scores, their meaning and their formula are those of what was kept
    assert "gradients alone" in summary["formula"]["title"] and "not on the shortlist" in summary["formula"]["meaning"]
    assert summary["formula"]["text"].startswith("on 60 of 60 rows, the cosine of the optimizer's update")
    # all target rows chose: what the candidate selects by itself
    config = planted(tmp_path / "run", verify=False)
    with Run(config.out, config, "select") as run:
        functions = scorer(config.method)
        scores = functions.candidates()["gradients alone"].score(functions.shared(select._context(config, run))).scores
    assert set(ids(won)) == {f"G{i}" for i in scores.argsort(descending=True)[:8].tolist()}


def test_the_race_is_in_the_report_and_in_the_terminal(won):
    page = (won / "report.html").read_text()
    assert 'id="race"' in page and "Which candidate selects?" in page and "another seed" in page
    assert "auto, gradients alone (LESS on a shortlist)" in page
    console = Console(width=80, record=True, file=io.StringIO())
    terminal.show(summary_of(won), console)
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text.partition("source ")[0]
    assert any(line.split()[:2] == ["gradients", "alone"] and "clearly better" in line for line in lines)
    assert "Gradients alone wins" in text


def test_a_row_is_explained_as_the_candidate_compares_it(won, planted, tmp_path, capsys):
    capsys.readouterr()
    assert main(["explain", f"{won / 'selected.jsonl'}:1"]) == 0
    text = capsys.readouterr().out
    assert "chosen by --method auto (gradients alone)" in text and "target rows it helps most" in text
    copied = tmp_path / "run"
    shutil.copytree(won, copied)
    with Run(copied, planted(copied), "select") as run:  # as if words alone had won
        files.write_json(run.path("summary.json"), summary_of(won) | {"race": {"kept": "words alone"}})
    assert main(["explain", str(copied), "W3"]) == 0
    text = capsys.readouterr().out
    assert "by --method auto (words alone)" in text and "Text similarity (TF-IDF)" in text
    assert "target rows it helps most" not in text


def test_no_clear_difference_keeps_the_fusion(world, tmp_path):
    target = str(write_rows(tmp_path / "target.jsonl", 8, source="t", start=500))
    config = world.select(tmp_path / "raced", method="auto", budget="6", target=[target], verify=True, metrics=LOSS)
    select.run(config)
    found = summary_of(config.out)["race"]
    assert (found["kept"], found["state"]) == ("fusion", "unclear")
    assert found["verdict"].startswith("Cannot tell: on 8 held-back target rows, ")
    assert found["verdict"].endswith("Fusion is kept.") and "another seed changes it by up to" in found["verdict"]
    assert [one["name"] for one in found["metrics"]] == ["loss"]
    plain = select.run(world.select(tmp_path / "plain", method="auto", budget="6", target=[target]))
    assert (plain / "selected.jsonl").read_bytes() == (config.out / "selected.jsonl").read_bytes()


def test_killed_in_the_middle_it_ends_with_the_same_bytes(won, planted, command, tmp_path):
    """kill -9 after the second measurement, and again inside a training; what is finished is not trained again."""
    config = planted(tmp_path / "run")
    argv = ["select", str(won / "run.yaml"), "--out", str(config.out)]
    kill = ["pipelines.select.bench:Bench._measured", 2, "after"]
    assert command(*argv, die=kill).code == -9
    done = {path.name for path in (config.out / "race").iterdir()}
    assert command(*argv, die=["pipelines.select.bench:load_adapter", 1, "before"]).code == -9
    answer = command(*argv)
    assert answer.code == 0, answer.stderr
    assert answer.stderr.count("held-back") and done < {path.name for path in (config.out / "race").iterdir()}
    for name in ("selected.jsonl", "selected.parquet", "scores.parquet"):
        assert (config.out / name).read_bytes() == (won / name).read_bytes()
    assert summary_of(config.out)["race"] == summary_of(won)["race"]


def test_the_same_rows_are_trained_on_once(planted, tmp_path, monkeypatch):
    trained = []
    inner = race.Bench.run

    def run(self, rows, recipe, seed, label, pool=None):
        fresh = not self.is_measured(self.folder(rows, recipe, seed, pool))
        result = inner(self, rows, recipe, seed, label, pool)
        trained.append((label, fresh))
        return result

    monkeypatch.setattr(race.Bench, "run", run)
    config = planted(tmp_path / "run", budget="100%", metrics=LOSS)  # every candidate takes the whole pool
    select.run(config)
    assert [label for label, fresh in trained if fresh] == [
        f"verify: {name}, half {half}" for name in ("fusion", "another seed") for half in (1, 2)
    ]
    found = summary_of(config.out)["race"]
    assert found["verdict"] == "Cannot tell: every candidate chose the same rows. Fusion is kept."
    assert {line.get("reading") for line in found["metrics"][0]["table"][1:]} == {"same"}
    assert found["runs"] == len(list((config.out / "race").iterdir())) == 2  # both halves chose the same, too


# ------------------------------------------------------------------------------------------------ before and without it


def test_a_dry_run_counts_the_race(planted, tmp_path, capsys):
    counts = []
    for verify in (False, True):
        select.run(planted(tmp_path / "run", verify=verify, dry_run=True))
        line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("cost:"))
        counts.append(int(line.partition(" tokens")[0].rpartition(" ")[2].replace(",", "")))
    assert counts[1] > counts[0] + 8 * 8 * 4 * 10 and not (tmp_path / "run").exists()


def test_few_target_rows_are_not_raced(world, tmp_path, capsys):
    config = world.select(tmp_path / "run", method="auto", budget="6", verify=True)
    select.run(config)
    text = "the target has 3 different rows, and a race needs 4: fusion is kept without one"
    assert text in capsys.readouterr().err
    found = summary_of(config.out)
    assert (
        found["race"]["state"] == "refused" and found["race"]["kept"] == "fusion" and not (config.out / "race").exists()
    )
    assert text in found["race"]["verdict"] and text in (config.out / "report.html").read_text()


def test_what_cannot_be_raced_is_refused(world, tmp_path, capsys):
    argv = world.argv("select", "--method", "tfidf", "--verify", out=tmp_path / "run")
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "compares the candidates of a method, and method 'tfidf' has none" in error and "--method auto" in error
    config = world.select(tmp_path / "run", method="auto", metrics=MetricsConfig(names=["lm-eval:piqa"]), verify=True)
    with Run(config.out, config, "select") as run, pytest.raises(UsageError, match="has rows of its own"):
        Race(select._context(config, run))


def test_the_names_of_candidates_are_those_of_the_record():
    for name in SCORERS:
        assert tuple(scorer(name).candidates()) == known(name).candidates


# --------------------------------------------------------------------------------------------------------------- halves


def target_of(keys):
    return SimpleNamespace(keys=keys, usable=np.ones(len(keys), dtype=bool))


def test_halves_hold_whole_contents_and_a_part_of_each_group():
    keys = [f"{i % 10}" for i in range(20)]  # every content twice
    groups = [int(key) % 3 for key in keys]
    first = race.halves(target_of(keys), groups, 0)
    sides = {key: {bool(first[i]) for i in range(20) if keys[i] == key} for key in keys}
    assert all(len(side) == 1 for side in sides.values()) and first.sum() == 10
    for group in range(3):
        assert {bool(first[i]) for i in range(20) if groups[i] == group} == {True, False}
    order = np.random.default_rng(0).permutation(20)  # the order of the rows changes nothing
    moved = race.halves(target_of([keys[i] for i in order]), [groups[i] for i in order], 0)
    assert (moved == first[order]).all()
    assert any((race.halves(target_of(keys), groups, seed) != first).any() for seed in (1, 2, 3))


# --------------------------------------------------------------------------------------------------------------- winner

ROWS = {"own": [[0], [0]], "b": [[1], [1]], "c": [[2], [2]]}


def measured(name, own, others, again=None, *, lower=True):
    values = {"own": np.asarray(own, dtype=float), **{key: np.asarray(v, dtype=float) for key, v in others.items()}}
    n = len(own)
    repeat = values["own"] if again is None else np.asarray(again, dtype=float)
    return winner.Measurements(name, name, lower, values, repeat, np.ones(n), np.arange(n) % 2)


NOISE = np.random.default_rng(0).normal(0, 0.01, 16)


def test_a_clearly_lower_loss_wins():
    loss = measured("loss", np.ones(16), {"b": 0.9 + NOISE, "c": 0.8 + NOISE})
    found = winner.decide([loss], ROWS, QUICK)
    assert (found["kept"], found["state"]) == ("c", "won") and found["runs"] == 4
    assert found["recipe"] == {"optimizer": "adamw", "learning_rate": 0.01, "epochs": 4, "batch_size": 4}


def test_accuracy_comes_before_the_loss():
    loss = measured("loss", np.ones(16), {"b": 0.5 + NOISE, "c": 1.1 + NOISE})
    right = measured("options", np.zeros(16), {"b": np.zeros(16), "c": np.ones(16)}, lower=False)
    found = winner.decide([loss, right], ROWS, QUICK)
    assert found["kept"] == "c" and "options is 100.0 points higher" in found["verdict"]
    # one that is clearly less often right does not win by its loss
    right = measured("options", np.ones(16), {"b": np.zeros(16), "c": np.ones(16)}, lower=False)
    found = winner.decide([loss, right], ROWS, QUICK)
    assert (found["kept"], found["state"]) == ("own", "held")


def test_a_difference_that_another_seed_makes_is_not_clear():
    other = {"b": 0.9 + NOISE, "c": np.ones(16)}
    assert winner.decide([measured("loss", np.ones(16), other)], ROWS, QUICK)["kept"] == "b"
    found = winner.decide([measured("loss", np.ones(16), other, again=np.full(16, 0.85))], ROWS, QUICK)
    assert (found["kept"], found["state"]) == ("own", "unclear")
    assert "another seed changes it by up to 0.1500" in found["verdict"]
    one_half = {"b": np.where(np.arange(16) % 2, 0.5, 1.001) + NOISE / 100, "c": np.ones(16)}
    assert winner.decide([measured("loss", np.ones(16), one_half)], ROWS, QUICK)["kept"] == "own"


def test_under_chance_alone_a_candidate_rarely_wins():
    """Candidates that differ by seeds only: each passes in one direction in at most about one race of twenty."""
    rng, wins = np.random.default_rng(1), 0
    for _ in range(300):
        rows = rng.normal(1, 0.3, 16)
        own, again, b, c = (rows + np.repeat(rng.normal(0, 0.02, 2), 8) + rng.normal(0, 0.004, 16) for _ in range(4))
        one = winner.Measurements("loss", "loss", True, {"own": own, "b": b, "c": c}, again, np.ones(16),
                                  np.repeat([0, 1], 8))  # fmt: skip
        wins += winner.decide([one], ROWS, QUICK)["state"] == "won"
    assert wins <= 0.12 * 300


def test_losers_are_named():
    loss = measured("loss", np.ones(16), {"b": 1.2 + NOISE, "c": 1.1 + NOISE})
    found = winner.decide([loss], ROWS, QUICK)
    assert (found["kept"], found["state"]) == ("own", "held")
    assert found["verdict"].startswith("Own wins: on 16 held-back target rows, with b, loss is 0.1973 higher")
    mixed = measured("loss", np.ones(16), {"b": 1.2 + NOISE, "c": 1 + NOISE})
    found = winner.decide([mixed], ROWS, QUICK)
    assert found["state"] == "unclear" and "Clearly worse: with b" in found["verdict"]


def test_intervals_of_few_rows_are_wider():
    assert winner.interval(0.0, -1.0, 1.0, 1) == (-np.inf, np.inf)
    widths = [winner.interval(0.0, -1.0, 1.0, n)[1] for n in (2, 4, 10, 100)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 9 and widths[-1] < 1.02


def test_scores_elsewhere_are_below_the_shortlist(world, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.select.auto.FEWEST", 8)
    monkeypatch.setattr("pipelines.select.scored.COMMON_ROWS", (6, 6))
    config = world.select(tmp_path / "run", method="auto", budget="5")
    with Run(config.out, config, "select") as run:
        functions = scorer("auto")
        stages = functions.shared(select._context(config, run))
        scores = functions.candidates()["gradients alone"].score(stages).scores
        words = functions.candidates()["words alone"].score(stages)
        torch.testing.assert_close(words.similarity, scorer("tfidf").columns(stages.context, None))
    assert ((scores >= -1.001).sum(), len(scores)) == (len(stages.shortlist), 60)
