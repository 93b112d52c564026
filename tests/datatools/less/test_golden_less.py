"""What LESS's official code computed for 64 rows and 12 target rows, without projection, against ours."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from datatools import PROJECTORS, aggregate, influence, token_batches
from datatools.features.extract import batch_rows
from optim import AdamWRule, SGDRule, UpdateMap
from pipelines.models import load as models
from pipelines.models.adapters import load_adapter
from pipelines.models.base import unload
from pipelines.models.lora import lora_parameters
from pipelines.models.losses import collate, row_losses
from pipelines.select import run as select
from pipelines.settings.parts import DataConfig, ModelConfig
from pipelines.settings.select import FeaturesConfig, ProjectorConfig, SelectConfig
from tests.conftest import golden_folder

pytestmark = pytest.mark.golden

EXACT = 1e-4
PROJECTED = 4 / math.sqrt(8192)  # four standard deviations of a projected cosine
STEPS = 20  # between the two checkpoints; bias correction is off, so any number would do


@pytest.fixture(autouse=True)
def counted(record_property, request):
    record_property("golden", f"less, {request.node.name}")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        found = [path.parent for path in sorted((golden_folder(metafunc.config) / "less").glob("*/manifest.json"))]
        metafunc.parametrize(
            "case", found or [None], indirect=True, scope="module", ids=lambda folder: folder.name if folder else "none"
        )


@pytest.fixture(scope="module")
def case(request, golden_dir):
    """Each folder of golden/less: one case."""
    if request.param is None:
        pytest.skip(f"no golden case in {golden_dir / 'less'}")
    return request.param


@pytest.fixture(scope="module")
def manifest(case):
    return json.loads((case / "manifest.json").read_text())


@pytest.fixture(scope="module")
def expected(case):
    with np.load(case / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model_folder(shared, case, manifest):
    """The case's base model: named in its manifest or as its folder, or the one of the published cases."""
    names = (manifest.get("model", case.name), case.name, "stories260k")
    return next(folder for name in names if (folder := shared / "data" / "models" / name).is_dir())


@pytest.fixture(scope="module")
def base(model_folder):
    return models.load(ModelConfig(name=str(model_folder))).model


@pytest.fixture(scope="module")
def code(manifest):
    """The official feature: no bias correction, epsilon inside the root."""
    return AdamWRule(betas=tuple(manifest["betas"]), eps=0.0, eps_root=manifest["eps"], bias_correction=False)


def checkpoints(manifest):
    return range(1, len(manifest["checkpoint_lr"]) + 1)


def rows_of(expected, part):
    """(input_ids, labels) of each row, as the official encoding gave them."""
    ids, labels, offsets = (expected[f"{part}_{name}"] for name in ("input_ids", "labels", "offsets"))
    return [(ids[start:end].tolist(), labels[start:end].tolist()) for start, end in itertools.pairwise(offsets)]


class Checkpoint:
    """The base model with the adapters of one checkpoint, and the optimizer there."""

    def __init__(self, base, folder, code):
        self.base, self.module = base, load_adapter(base, folder)
        self.params = {name: p.detach() for name, p in lora_parameters(self.module).items()}
        first, second = load_file(folder / "exp_avg.safetensors"), load_file(folder / "exp_avg_sq.safetensors")
        assert set(first) == set(second) == set(self.params), "names in the case and of peft disagree"
        states = {
            name: {"step": torch.tensor(float(STEPS)), "exp_avg": first[name], "exp_avg_sq": second[name]}
            for name in self.params
        }
        self.adam = UpdateMap(dict.fromkeys(self.params, code), states, self.params)
        plain = {name: SGDRule().init(p) for name, p in self.params.items()}
        self.gradient = UpdateMap(dict.fromkeys(self.params, SGDRule()), plain, self.params)
        self.identity = PROJECTORS["identity"].of({name: p.shape for name, p in self.params.items()}, 1, 0)

    def features(self, rows, updates, method="hooks"):
        out = torch.zeros(len(rows), self.identity.dim)
        for group in token_batches([len(ids) for ids, _ in rows], 1024):
            batch = collate([rows[i] for i in group])
            out[torch.tensor(group)], _, _ = batch_rows(
                self.module, row_losses, batch, updates, self.identity, method=method
            )
        return out

    def project(self, features, projector):
        offsets = dict(self.identity.offsets)
        return projector.project(
            {
                name: features[:, offsets[name] : offsets[name] + p.numel()].reshape(-1, *p.shape)
                for name, p in self.params.items()
            }
        )


@pytest.fixture(scope="module")
def computed(base, case, expected, manifest, code):
    """Our exact features at the checkpoints: [(Checkpoint, pool's updates, target's gradients)]; made once."""
    found = []
    for k in checkpoints(manifest):
        checkpoint = Checkpoint(base, case / f"checkpoint-{k}", code)
        train = checkpoint.features(rows_of(expected, "train"), checkpoint.adam)
        val = checkpoint.features(rows_of(expected, "val"), checkpoint.gradient)
        found.append((checkpoint, train, val))
        unload(checkpoint.module)
    return found


def cosines(train, val):
    return (
        torch.nn.functional.normalize(train.double(), dim=1) @ torch.nn.functional.normalize(val.double(), dim=1).T
    ).numpy()


def groups(manifest):
    return [j for j in range(len(manifest["subtasks"])) for _ in range(manifest["n_val_per_subtask"])]


def test_cosines_are_those_of_the_official_code(computed, expected, record_property):
    """One row at a time or in padded batches, by hooks or by the definition: it is the same gradient."""
    for k, (_, train, val) in enumerate(computed, start=1):
        error = np.abs(cosines(train, val) - expected[f"cosine_{k}"]).max()
        record_property(f"max_cosine_error_{k}", float(error))
        assert error < EXACT, f"checkpoint {k}"


def test_norms_are_those_of_the_official_code(computed, expected):
    """A cosine hides a wrong scale (a loss summed instead of averaged, a forgotten alpha / r); norms do not."""
    for k, (_, train, val) in enumerate(computed, start=1):
        np.testing.assert_allclose(train.norm(dim=1), expected[f"train_norm_{k}"], rtol=EXACT)
        np.testing.assert_allclose(val.norm(dim=1), expected[f"val_norm_{k}"], rtol=EXACT)


def test_scores_and_the_ten_best_rows(computed, expected, manifest, case):
    """Weighted by learning rate, mean in a subtask, best subtask: the official matching."""
    trains, vals = [train for _, train, _ in computed], [val for _, _, val in computed]
    similarity = influence(trains, vals, expected["checkpoint_lr"])
    scores = aggregate(similarity, groups(manifest), "less")
    np.testing.assert_allclose(scores, expected["influence"], atol=EXACT)
    ids = [json.loads(line)["id"] for line in (case / "train.jsonl").read_text().splitlines()]
    assert [ids[i] for i in scores.argsort(descending=True)[: len(manifest["top10"])].tolist()] == manifest["top10"]


def test_the_loop_agrees(base, case, expected, code):
    """The definition, one backward pass a row, on the shortest and longest rows: both methods are held to the code."""
    checkpoint = Checkpoint(base, case / "checkpoint-1", code)
    try:
        rows = rows_of(expected, "train")
        order = np.argsort([len(ids) for ids, _ in rows], kind="stable")
        some = [int(i) for i in (*order[:2], *order[-2:])]
        train = checkpoint.features([rows[i] for i in some], checkpoint.adam, method="loop")
        val = checkpoint.features(rows_of(expected, "val")[:3], checkpoint.gradient, method="loop")
    finally:
        unload(checkpoint.module)
    np.testing.assert_allclose(cosines(train, val), expected["cosine_1"][some, :3], atol=EXACT)
    np.testing.assert_allclose(train.norm(dim=1), expected["train_norm_1"][some], rtol=EXACT)


def test_projected_by_sjlt_every_cosine_and_score_is_near(computed, expected, manifest):
    """8192 dimensions move a cosine by 1 / sqrt(8192) in the mean; four times that is never reached by these 1536."""
    projector = PROJECTORS["sjlt"].of({}, 8192, 0)
    projected = [(c.project(train, projector), c.project(val, projector)) for c, train, val in computed]
    for k, (train, val) in enumerate(projected, start=1):
        assert np.abs(cosines(train, val) - expected[f"cosine_{k}"]).max() < PROJECTED
    similarity = influence([t for t, _ in projected], [v for _, v in projected], expected["checkpoint_lr"])
    scores = aggregate(similarity, groups(manifest), "less")
    assert np.abs(scores.numpy() - expected["influence"]).max() < PROJECTED


def test_projected_by_rademacher_every_cosine_is_near(computed, expected):
    """The published projection, at one checkpoint: making its 147 million signs is most of the time."""
    checkpoint, train, val = computed[0]
    projected = checkpoint.project(torch.cat([train, val]), PROJECTORS["rademacher"].of({}, 8192, 0))
    error = np.abs(cosines(projected[: len(train)], projected[len(train) :]) - expected["cosine_1"]).max()
    assert error < PROJECTED


def test_select_run_gives_the_official_selection(case, expected, manifest, model_folder, tmp_path):
    """From the rows' text to selected.jsonl through the pipeline, the case's adapters being the user's checkpoints."""
    stops = []
    for k, rate in enumerate(manifest["checkpoint_lr"], start=1):
        folder = tmp_path / f"checkpoint-{k * STEPS}"
        stops.append(as_trainer_would_save(case / f"checkpoint-{k}", folder, k * STEPS, rate, manifest))
    out = select.run(
        SelectConfig(
            model=ModelConfig(
                name=str(model_folder),
                chat=manifest["chat_format"],
                max_length=manifest["max_length"],
            ),
            train=DataConfig(paths=[str(case / "train.jsonl")]),
            target=[str(case / "val.jsonl")],
            budget=str(len(manifest["top10"])),
            method="less",
            checkpoints=stops,
            features=FeaturesConfig(adam_mode="code", dtype="float32"),
            projector=ProjectorConfig(name="identity"),
            out=tmp_path / "run",
        )
    )
    table = pq.read_table(out / "scores.parquet").to_pydict()
    np.testing.assert_allclose(table["_score"], expected["influence"], atol=EXACT)
    subtasks = np.stack([table[f"subtask:{name}"] for name in manifest["subtasks"]], axis=1)
    weights = expected["checkpoint_lr"] / expected["checkpoint_lr"].sum()
    whole = sum(weight * expected[f"cosine_{k}"] for k, weight in enumerate(weights, start=1))
    np.testing.assert_allclose(subtasks, whole.reshape(len(whole), len(manifest["subtasks"]), -1).mean(2), atol=EXACT)
    selected = [json.loads(line)["id"] for line in (out / "selected.jsonl").read_text().splitlines()]
    assert selected == manifest["top10"]


def as_trainer_would_save(case: Path, folder: Path, step: int, rate: float, manifest: dict) -> Path:
    """The case's checkpoint in the layout of `transformers.Trainer`: optimizer.pt with names, trainer_state.json."""
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(case / name, folder / name)
    first, second = load_file(case / "exp_avg.safetensors"), load_file(case / "exp_avg_sq.safetensors")
    state = {
        i: {"step": torch.tensor(float(step)), "exp_avg": first[name], "exp_avg_sq": second[name]}
        for i, name in enumerate(first)
    }
    group = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    group |= {"params": list(range(len(first))), "param_names": list(first)}
    group |= {"betas": tuple(manifest["betas"]), "eps": manifest["eps"]}
    torch.save({"state": state, "param_groups": [group]}, folder / "optimizer.pt")
    log = [{"step": s, "learning_rate": rate, "loss": 1.0} for s in range(step - STEPS + 1, step + 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    return folder
