"""`weights.yaml`: sampling weights of sources, and several targets that share a selection."""

import json
import math

import datasets
import pytest
import yaml
from transformers import AutoTokenizer

from datatools import UsageError
from pipelines import select
from pipelines.select import mixture, targets
from pipelines.settings.load import load_config
from pipelines.settings.select import MixtureConfig, SelectConfig

SOURCES = ["a", "a", "a", "b", "b", "c"]


def test_the_share_of_the_selection_with_a_floor():
    found = mixture.weights(SOURCES, [0, 3, 4, 1], None, MixtureConfig(floor=0.5))
    assert list(found) == ["a", "b", "c"]
    assert {name: one["weight"] for name, one in found.items()} == {
        "a": 0.5 * 0.5 + 0.5 * 0.5,
        "b": pytest.approx(0.5 * 0.5 + 0.5 / 3, abs=1e-6),
        "c": pytest.approx(0.5 / 6, abs=1e-6),
    }
    assert found["c"]["selected_rows"] == 0 and found["a"]["mean_score"] is None


def test_the_exponential_of_mean_scores():
    scores = [1.0, 2.0, math.nan, 5.0, 5.0, -1.0]
    found = mixture.weights(SOURCES, [3], scores, MixtureConfig(weights="scores", floor=0, temperature=2))
    known = [1.0, 2.0, 5.0, 5.0, -1.0]
    mean = sum(known) / 5
    spread = math.sqrt(sum((x - mean) ** 2 for x in known) / 5)
    raw = {s: n * math.exp((m - mean) / spread / 2) for s, n, m in (("a", 3, 1.5), ("b", 2, 5.0), ("c", 1, -1.0))}
    for name, value in raw.items():
        assert found[name]["weight"] == pytest.approx(value / sum(raw.values()), abs=2e-6)
    flat = mixture.weights(SOURCES, [3], scores, MixtureConfig(weights="scores", floor=0, temperature=1e6))
    assert [flat[s]["weight"] for s in "abc"] == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=1e-4)


@pytest.mark.parametrize("seven", [1, 7, 13])
def test_probabilities_are_taken_by_interleave_datasets(seven):
    sources = [f"s{i % seven}" for i in range(97)]
    found = mixture.weights(sources, list(range(0, 97, 3)), None, MixtureConfig(floor=0.05))
    made = mixture.forms(found, {})["interleave_datasets"]
    assert sum(round(p * 1_000_000) for p in made["probabilities"]) == 1_000_000
    parts = [datasets.Dataset.from_dict({"of": [name] * 50}) for name in made["datasets"]]
    drawn = datasets.interleave_datasets(
        parts, probabilities=made["probabilities"], seed=0, stopping_strategy=made["stopping_strategy"]
    )
    assert len(drawn) >= 50


def test_what_axolotl_keeps_has_the_mixture():
    found = mixture.weights(SOURCES * 100, list(range(0, 600, 4)), None, MixtureConfig(floor=0.2))
    made = mixture.forms(found, {"b": "b.jsonl"})
    kept = {entry["path"]: entry["weight"] for entry in made["axolotl"]["datasets"]}
    assert set(kept) == {"a", "b.jsonl", "c"} and max(kept.values()) == 1 and min(kept.values()) > 0
    rows = {"a": 300 * kept["a"], "b": 200 * kept["b.jsonl"], "c": 100 * kept["c"]}
    for name, count in rows.items():
        assert count / sum(rows.values()) == pytest.approx(found[name]["weight"], abs=1e-5)
    assert made["llama_factory"]["interleave_probs"].count(",") == made["llama_factory"]["dataset"].count(",") == 2
    assert "llama_factory" not in mixture.forms(mixture.weights(["a,b", "c"], [0], None, MixtureConfig()), {})


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world.model)


def pairs(word, count, source, start=100):
    return [
        {"prompt": f"{word} {word}y {word}s {i}", "completion": f"{word}ing {word}ed", "source": source}
        for i in range(start, start + count)
    ]


def test_several_targets_share_a_selection(tokenizer, tmp_path):
    pool = pairs("apple", 20, "fruit") + pairs("hammer", 20, "tools") + pairs("river", 20, "water")
    wanted = {"fruit": pairs("apple", 3, "x", 200), "tools": pairs("hammer", 1, "x", 300)}
    how = {"method": "tfidf", "budget": 8, "seed": 0}
    found = select(None, tokenizer, pool, wanted, **how, settings={"targets.share": "union"}, out=tmp_path / "run")
    taken = [why.split(",")[0] for why in found.why]
    assert taken == ["taken for target fruit", "taken for target tools"] * 4
    assert [row["source"] for row in found.dataset] == ["fruit", "tools"] * 4
    assert found.summary["targets"] == {"share": "union", "rows": {"fruit": 4, "tools": 4}}

    text = (tmp_path / "run" / "weights.yaml").read_text()
    assert "nobody has trained on it yet" in text
    held = yaml.safe_load(text)
    assert held["sources"] == found.summary["mixture"] and held["sources"]["water"]["weight"] == pytest.approx(
        0.1 / 3, abs=1e-5
    )
    assert held["interleave_datasets"]["datasets"][:2] == ["fruit", "tools"]

    budgets = {"targets.share": "union", "targets.budgets": {"fruit": "10%", "tools": 2}}
    own = select(None, tokenizer, pool, wanted, **how, settings=budgets)
    assert own.summary["targets"]["rows"] == {"fruit": 6, "tools": 2} and len(own) == 8
    least = select(None, tokenizer, pool, wanted, **how, settings={"targets.share": "maxmin"})
    assert len(least) == 8 and {row["source"] for row in least.dataset} == {"fruit", "tools"}


def test_what_several_targets_need(tokenizer, world):
    pool = [json.loads(line) for line in world.pool.read_text().splitlines()]
    share = {"targets.share": "union"}
    with pytest.raises(UsageError, match="there is one"):
        select(None, tokenizer, pool, pool[:2], budget=3, method="tfidf", settings=share)
    with pytest.raises(UsageError, match="keeps no similarity"):
        select(None, tokenizer, pool, {"a": pool[:2], "b": pool[2:4]}, budget=3, method="random", settings=share)
    with pytest.raises(UsageError, match="--targets union|targets.share"):
        select(None, tokenizer, pool, pool[:2], method="tfidf", settings={"targets.budgets": {"a": 1}})
    assert targets._stem("memory:maths") == "maths" and targets._stem("a/b.c/dev.jsonl.gz") == "dev"


def test_the_command_has_the_flag(world, tmp_path):
    flags = {"model.name": "m", "train.paths": ["p"], "target": ["a", "b"], "targets.share": "maxmin", "out": tmp_path}
    assert load_config(SelectConfig, None, flags).targets.share == "maxmin"
