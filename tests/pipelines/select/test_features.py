"""Settings of features and of the warm-up, and runs that share a folder of features."""

import json
import time

import pytest
import torch

import optim
from datatools import DataError, files
from pipelines.select import explain, parameters
from pipelines.select import run as select
from pipelines.settings.dump import dump
from pipelines.settings.explain import ExplainConfig
from pipelines.settings.parts import DataConfig, ModelConfig
from pipelines.settings.select import FeaturesConfig, ProjectorConfig, WarmupConfig
from tests.pipelines.select.looking import hashes, ids, outcome, scores
from tests.processes import spawn
from tests.tiny import write_rows

# --------------------------------------------------------------------------------------------- checkpoints of the user


@pytest.mark.parametrize("mode", ["code", "precond_only"])
def test_forms_of_adam_s_update(first, world, tmp_path, mode):
    run = select.run(world.select(tmp_path / "run", features=FeaturesConfig(adam_mode=mode)))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["formula"]["name"] == {"code": "less-official", "precond_only": "less-preconditioner"}[mode]
    assert scores(run)["_score"] != scores(first)["_score"]
    warned = [text for text in summary["warnings"] if "adam_mode=code" in text]
    assert bool(warned) == (mode == "code"), "the epsilon of the published code drowns this small second moment"
    assert hashes(run / "warmup")["checkpoint-8/optimizer.pt"] == hashes(first / "warmup")["checkpoint-8/optimizer.pt"]


NAMES = [
    "embed.weight",
    *(f"layers.{i}.{p}.weight" for i in range(5) for p in ("attn.q_proj", "attn.v_proj", "mlp.up")),
]


@pytest.mark.parametrize(
    "layers, modules, kept",
    [
        ("last-2", None, NAMES[10:]),
        ("middle-1", None, NAMES[7:10]),
        ("middle-2", None, NAMES[4:10]),
        ("first-1", ["mlp"], [NAMES[3]]),
        ([0, -1], ["v_proj", "up"], [NAMES[2], NAMES[3], NAMES[14], NAMES[15]]),
        (None, ["attn.q_proj", "embed"], [NAMES[0], *NAMES[1::3]]),
        (None, None, NAMES),
    ],
)
def test_layers_and_modules_of_features(layers, modules, kept):
    assert parameters.chosen(NAMES, FeaturesConfig(layers=layers, modules=modules)) == kept


@pytest.mark.parametrize(
    "names, asked, said",
    [
        (NAMES, {"layers": "last-6"}, "features.layers=last-6: features cover 5 layers"),
        (NAMES, {"layers": [1, 7]}, r"layer 7 has no parameter that features cover; the layers are 0, 1, 2, 3, 4"),
        (NAMES, {"layers": [-6]}, r"layer -1 has no parameter"),
        (NAMES, {"modules": ["v_proj", "proj"]}, "in a module 'proj'; the parts .* are attn, embed"),
        (NAMES[:1], {"layers": "last-1"}, r"no parameter .* has the number of a layer in its name"),
    ],
)  # fmt: skip
def test_layers_and_modules_that_are_not_there(names, asked, said):
    with pytest.raises(DataError, match=said):
        parameters.chosen(names, FeaturesConfig(**asked))


def test_a_selection_by_some_layers_says_so_and_explains_with_them(world, tmp_path):
    features = FeaturesConfig(layers="last-1", modules=["v_proj"])
    run = select.run(small(world, tmp_path / "run").model_copy(update={"features": features}))
    assert "layers: last-1" in (run / "run.yaml").read_text()
    shown = explain.run(ExplainConfig(file=run / "selected.jsonl", line=1, nearest=1))["layers"]
    assert shown and all("v_proj" in one["layer"] for one in shown)


def small(world, out, **warmup):
    """A selection from twelve rows, at one checkpoint after two steps."""
    few = world.folder / "twelve.jsonl"
    if not few.exists():
        write_rows(few, 12)
    warm = WarmupConfig(minimum_rows=8, epochs=1, batch_size=4, learning_rate=1e-3, **warmup)
    return world.select(
        out, train=DataConfig(paths=[str(few)]), budget="3", warmup=warm, projector=ProjectorConfig(dim=64)
    )


@pytest.fixture(scope="module")
def by_adamw(world, tmp_path_factory):
    return scores(select.run(small(world, tmp_path_factory.mktemp("small") / "run")))["_score"]


@pytest.mark.parametrize("name", sorted(set(optim.RULES) - {"adamw"}))
def test_any_optimizer_drives_a_selection(by_adamw, world, tmp_path, name):
    """Every rule: the warm-up trains with it, and rows are scored by the updates that it would make."""
    run = select.run(small(world, tmp_path / "run", optimizer=name))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["formula"]["name"] == f"less-{name}"
    assert summary["formula"]["notes"][0].startswith(f"update: {name}(")
    assert None not in scores(run)["_score"]
    # this model's tensors are too small for codes; without decay Adam is AdamW, and so are Shampoo's first steps
    same = name in ("adamw_8bit", "adam", "shampoo")
    assert (scores(run)["_score"] == by_adamw) == same
    if name == "lion":
        config = small(world, tmp_path / "code", optimizer=name)
        with pytest.raises(DataError, match="adam_mode='code' needs AdamW"):
            select.run(config.model_copy(update={"features": FeaturesConfig(adam_mode="code")}))


@pytest.mark.parametrize("method", ["loop", "vmap", "hooks"])
def test_the_method_of_gradients_does_not_change_the_selection(first, world, tmp_path, method):
    """Hooks and the definition agree on every score; so do all stored precisions to their rounding."""
    features = FeaturesConfig(method=method, dtype="float32", token_budget=100)
    # torch.func has no rule for the fused attention and says so
    model = ModelConfig(name=str(world.model), attention="eager" if method == "vmap" else "sdpa")
    run = select.run(world.select(tmp_path / "run", features=features, model=model))
    difference = torch.tensor(scores(run)["_score"]) - torch.tensor(scores(first)["_score"])
    assert float(difference.abs().max()) < 1e-3  # of float16 features
    assert ids(run) == ids(first)


@pytest.mark.parametrize("dtype, error", [("bfloat16", 0.005), ("int8", 0.01), ("int4", 0.1), ("int1", 0.5)])
def test_features_may_be_stored_roughly(first, world, tmp_path, dtype, error):
    """Rounding of the store moves scores by no more than this, and the files are as small as they should be."""
    run = select.run(world.select(tmp_path / "run", features=FeaturesConfig(dtype=dtype)))
    difference = torch.tensor(scores(run)["_score"]) - torch.tensor(scores(first)["_score"])
    assert float(difference.abs().max()) < error
    bits = {"bfloat16": 16, "int8": 8, "int4": 4, "int1": 1}[dtype]
    size = (run / "features" / "train-4" / "part-00000.safetensors").stat().st_size
    assert 16 * 256 * bits / 8 < size < 16 * 256 * bits / 8 + 700


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"dtype": "bfloat16"}},
        {"lora": {"targets": "auto"}},
        {"features": {"rows_per_unit": 1, "token_budget": 1}},
        {"model": {"max_length": 40}},
        {"projector": {"name": "rademacher", "dim": 64}},
        {"warmup": {"max_steps": 3, "checkpoints": 1, "schedule": "cosine", "batch_size": 4}},
        {"train": {"dedup": "near"}},
    ],
    ids=str,
)
def test_other_settings_select_too(world, tmp_path, changes):
    settings = world.select(tmp_path / "run")
    changed = {name: getattr(settings, name).model_copy(update=inner) for name, inner in changes.items()}
    run = select.run(settings.model_copy(update=changed))
    table = scores(run)
    assert len(ids(run)) == 6
    assert [value is not None for value in table["_score"]] == [state == "ok" for state in table["_status"]]


# ------------------------------------------------------------------------------------------------ shared features


def test_runs_that_share_a_folder_share_the_pool_s_features(first, world, tmp_path, counted):
    """A second target on the same pool and warm-up costs its target rows; results are those of a run of its own."""
    shared = FeaturesConfig(folder=tmp_path / "features")
    a = select.run(world.select(tmp_path / "a", features=shared))
    assert outcome(first)["scores"] == files.digest_file(a / "scores.parquet") and counted == [2 * (60 + 3)]
    counted[0] = 0
    b = select.run(world.select(tmp_path / "b", features=shared, target=[str(world.test)]))
    assert counted == [2 * 4]
    alone = select.run(world.select(tmp_path / "alone", target=[str(world.test)]))
    assert scores(b)["_score"] == scores(alone)["_score"] and ids(b) == ids(alone)
    both = select.run(world.select(tmp_path / "both", features=shared, target=[str(world.target), str(world.test)]))
    assert counted == [2 * 4 + 2 * 64] and len(ids(both)) == 6


def test_a_shared_folder_with_another_run_s_unfinished_rows(world, tmp_path):
    """Rows that another run has planned and not computed are nobody else's to compute, and it can still finish them."""
    shared = FeaturesConfig(folder=tmp_path / "features")
    select.run(world.select(tmp_path / "a", features=shared))
    for path in (tmp_path / "features").glob("target-*/part-00000.*"):
        path.unlink()
    b = world.select(tmp_path / "b", features=shared, target=[str(world.test)])
    with pytest.raises(DataError, match="another run planned there are not computed yet; finish that run first"):
        select.run(b)
    assert len(ids(select.run(world.select(tmp_path / "a", features=shared)))) == 6
    assert len(ids(select.run(b))) == 6


def test_a_run_waits_for_the_one_that_fills_the_shared_features(first, world, tmp_path, counted, monkeypatch):
    """Both end with what each would have made alone, and nothing is computed twice."""
    shared = FeaturesConfig(folder=tmp_path / "features")
    (tmp_path / "a.yaml").write_text(dump(world.select(tmp_path / "a", features=shared)))
    code = """
        import sys, time
        from pathlib import Path
        import pipelines.select.gradients
        from pipelines.select import run as select
        from pipelines.settings.select import SelectConfig
        from pipelines.settings.load import load_config
        here, inner = Path(sys.argv[1]), pipelines.select.gradients.extract

        def extract(*arguments, **options):
            (here / "filling").touch()
            while not (here / "go").exists():
                time.sleep(0.05)
            return inner(*arguments, **options)

        pipelines.select.gradients.extract = extract
        select.run(load_config(SelectConfig, here / "a.yaml"))
    """
    other = spawn(code, str(tmp_path))
    said = []

    def say(text):
        said.append(text)
        if "waiting for" in text:
            (tmp_path / "go").touch()

    monkeypatch.setattr("pipelines.select.stores.say", say)
    while not (tmp_path / "filling").exists():
        assert other.poll() is None, other.communicate()
        time.sleep(0.05)
    run = select.run(world.select(tmp_path / "b", features=shared))
    _, error = other.communicate(timeout=300)
    assert other.returncode == 0, error
    assert counted == [0] and f"waiting for process {other.pid} on" in said[0]
    for folder in (run, tmp_path / "a"):
        assert {k: v for k, v in outcome(first).items() if "/" not in k} == {
            k: v for k, v in outcome(folder).items() if "/" not in k
        }
