"""`datatools neighbours` on finished runs."""

import math

import numpy as np
import pytest
import torch

from datatools import DataError, GradientFeatures, UsageError
from pipelines.cli import app
from pipelines.select import neighbours, run
from pipelines.settings.explain import NeighboursConfig
from pipelines.training import checkpoints


@pytest.fixture(scope="module")
def less(world, tmp_path_factory):
    return run.run(world.select(tmp_path_factory.mktemp("runs") / "less"))


def test_a_row_of_less_is_near_what_brute_force_says(world, less):
    found = neighbours.run(NeighboursConfig(folder=less, row=f"{world.pool}:18", nearest=4))
    stops = checkpoints.find([less / "warmup"])
    total = sum(stop.mean_lr for stop in stops)
    keys = sorted(GradientFeatures.open(less / "features" / f"train-{stops[0].step}").rows().keys)
    vectors = torch.cat(
        [
            math.sqrt(stop.mean_lr / total) * GradientFeatures.open(less / "features" / f"train-{stop.step}").take(keys)
            for stop in stops
        ],
        1,
    )
    similarity = vectors @ vectors.T
    assert found["row"]["where"] == f"{world.pool}:18" and len(found["pool"]) == 4 == len(found["target"]) + 1
    mine = max(range(len(keys)), key=lambda i: float(similarity[i].topk(5).values[1:].sum() == 0))
    values = [row["similarity"] for row in found["pool"]]
    assert values == sorted(values, reverse=True)
    rows = [tuple(np.round(np.sort(row.numpy())[::-1][1:5], 4)) for row in similarity]
    assert any(np.allclose(values, row, atol=2e-3) for row in rows), mine
    assert found["row"]["id"] not in {row["id"] for row in found["pool"]}


def test_similarities_to_the_target_are_those_of_the_scores(world, less):
    import pyarrow.parquet as pq

    table = pq.read_table(less / "scores.parquet").to_pylist()
    for row in (table[3], table[40]):
        found = neighbours.run(NeighboursConfig(folder=less, row=row["_id"], nearest=3))
        assert found["target"][0]["id"] == row["_nearest"]
        assert found["target"][0]["similarity"] == pytest.approx(row["_nearest_similarity"], abs=2e-3)


def test_coverage_of_a_selection(less, capsys):
    pytest.importorskip("faiss")
    found = neighbours.run(NeighboursConfig(folder=less, nearest=2, clusters=5))
    held = found["clusters"]
    assert held["count"] == 5 and 1 <= held["selected"] <= held["with_rows"] <= 5 and held["chosen_rows"] == 6
    assert 1 <= held["random"] <= 5 and found["search"] == {"method": "exact", "recall": 1.0}
    assert len(found["targets"]) == 3 and all(len(target["nearest"]) == 2 for target in found["targets"])
    assert "clusters of the pool" in capsys.readouterr().out


def test_the_expected_number_of_clusters_by_enumeration():
    from itertools import combinations

    sizes = [4, 2, 1]
    of = [cluster for cluster, size in enumerate(sizes) for _ in range(size)]
    for k in (1, 3, 7):
        sets = [len({of[i] for i in rows}) for rows in combinations(range(7), k)]
        assert neighbours._expected(sizes, 7, k) == pytest.approx(sum(sets) / len(sets))


def test_the_command_and_what_it_refuses(world, less, tmp_path, capsys):
    assert app.main(["neighbours", str(less), f"{world.pool}:3", "--nearest", "2"]) in (0, None)
    assert "nearest rows of the target" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no run"):
        neighbours.run(NeighboursConfig(folder=tmp_path))
    words = run.run(world.select(tmp_path / "words", method="tfidf"))
    with pytest.raises(UsageError, match="keeps no features"):
        neighbours.run(NeighboursConfig(folder=words, row="a-0"))
    with pytest.raises(UsageError, match="neither the id"):
        neighbours.run(NeighboursConfig(folder=less, row="nobody"))
    (tmp_path / "rds").mkdir()
    hidden = run.run(world.select(tmp_path / "rds" / "run", method="rds"))
    assert neighbours.run(NeighboursConfig(folder=hidden, row="a-0"))["pool"]
    (hidden / "features").rename(tmp_path / "gone")
    with pytest.raises(DataError, match="features are gone"):
        neighbours.run(NeighboursConfig(folder=hidden, row="a-0"))


def test_auto_is_searched_where_it_has_features(world, tmp_path, monkeypatch, capsys):
    import pyarrow.parquet as pq

    monkeypatch.setattr("pipelines.select.auto.FEWEST", 8)
    monkeypatch.setattr("pipelines.select.scored.COMMON_ROWS", (6, 6))
    folder = run.run(world.select(tmp_path / "run", method="auto", budget="5"))
    rows = pq.read_table(folder / "scores.parquet").to_pylist()
    found = neighbours.run(NeighboursConfig(folder=folder, row=max(rows, key=lambda r: r["_score"])["_id"], nearest=3))
    assert len(found["pool"]) == 3 and found["rows"] < found["of"]
    assert f"searched: the {found['rows']} of {found['of']} rows that have features (auto)" in capsys.readouterr().out
    missing = min(rows, key=lambda row: row["_score"])
    with pytest.raises(DataError, match=r"has no features \(auto computed none for it\)"):
        neighbours.run(NeighboursConfig(folder=folder, row=missing["_id"]))
