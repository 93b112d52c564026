"""`explain` reads what the run read, and its layers add up to the exact cosine."""

import json
import math
import shutil

import pytest
import torch

from datatools import UsageError
from pipelines.models import load as models
from pipelines.models.adapters import load_adapter
from pipelines.models.losses import row_losses
from pipelines.select import explain
from pipelines.select import run as select
from pipelines.settings.explain import ExplainConfig
from pipelines.settings.load import load_config
from pipelines.settings.parts import DataConfig
from pipelines.settings.select import FeaturesConfig, SelectConfig
from pipelines.training import checkpoints
from tests.pipelines.select.looking import ids, rows_in, scores


@pytest.mark.parametrize("line", [1, 6])
def test_explain_s_layers_add_up_to_the_exact_cosine(first, world, line, capsys):
    """The shares are of the unprojected cosine at the checkpoint with the largest weight; projection keeps it near."""
    found = explain.run(ExplainConfig(file=first / "selected.jsonl", line=line, nearest=1))
    assert found["id"] == ids(first)[line - 1] and len(found["targets"]) == 1
    table = scores(first)
    row = table["_id"].index(found["id"])
    assert found["targets"][0]["id"] == table["_nearest"][row]
    assert found["targets"][0]["similarity"] == pytest.approx(table["_nearest_similarity"][row], abs=1e-4)
    total = math.fsum(layer["cosine"] for layer in found["layers"])
    assert total == pytest.approx(exact_cosine(first, world, found["id"], found["targets"][0]["id"]), abs=1e-5)
    assert len({layer["layer"] for layer in found["layers"]}) == len(found["layers"]) == 2 * 4
    shown = capsys.readouterr().out
    assert found["id"] in shown and "layers that carry it" in shown


def exact_cosine(run, world, row_id, target_id):
    """Between the row's update and the target row's gradient, by one backward pass each, at the heaviest checkpoint."""
    from pipelines.rows.prepare import prepare

    config = load_config(SelectConfig, run / "run.yaml", {"out": run}, [])
    stop = max(checkpoints.find([run / "warmup"]), key=lambda c: c.weight)
    loaded = models.load(config.model)
    module = load_adapter(loaded.model, stop.folder)
    params = checkpoints.trainable(module)
    gradients = []
    for data, wanted in ((config.train, row_id), (DataConfig(paths=[str(world.target)]), target_id)):
        rows = prepare(data, config.model, loaded.tokenizer, cache=run, label="rows")
        for p in params.values():
            p.requires_grad_(True)
        loss = row_losses(module, rows.batch([rows.pool.ids.index(wanted)])).sum()
        grads = torch.autograd.grad(loss, list(params.values()))
        gradients.append(dict(zip(params, (g.detach() for g in grads), strict=True)))
        for p in params.values():
            p.requires_grad_(False)
    update = checkpoints.updates(stop, params)(gradients[0])
    flat = [torch.cat([g[name].flatten() for name in params]) for g in (update, gradients[1])]
    return float(torch.cosine_similarity(*flat, dim=0))


def test_explain_reads_what_the_run_read(world, tmp_path, first, capsys):
    """Only the checkpoints that count (the last, though a shared folder holds more), and rows in the user's columns."""
    columns = {"prompt": "frage", "completion": "antwort"}
    for name in ("pool", "target"):
        odd = [
            {"id": row["id"], "frage": row["messages"][0]["content"], "antwort": row["messages"][1]["content"]}
            for row in rows_in(getattr(world, name))
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    settings = world.select(
        tmp_path / "all",
        train=DataConfig(paths=[str(tmp_path / "pool.jsonl")], columns=columns),
        target=[str(tmp_path / "target.jsonl")],
        features=FeaturesConfig(folder=tmp_path / "features"),
    )
    select.run(settings)
    warmup = settings.warmup.model_copy(update={"checkpoints": 1})
    run = select.run(settings.model_copy(update={"out": tmp_path / "last", "warmup": warmup}))
    found = explain.run(ExplainConfig(file=run / "selected.jsonl", line=1, nearest=1))
    table = scores(run)
    near = table["_nearest_similarity"][table["_id"].index(found["id"])]
    assert found["targets"][0]["similarity"] == pytest.approx(near, abs=1e-4)


def test_explain_of_other_methods_and_places(world, tmp_path, first, capsys):
    run = select.run(world.select(tmp_path / "run", method="random"))
    assert explain.run(ExplainConfig(file=run / "selected.jsonl", line=1))["layers"] == []
    with pytest.raises(UsageError, match="has 6 lines"):
        explain.run(ExplainConfig(file=run / "selected.jsonl", line=7))
    shutil.copy(run / "selected.jsonl", tmp_path / "selected.jsonl")
    with pytest.raises(UsageError, match="no run.yaml beside it"):
        explain.run(ExplainConfig(file=tmp_path / "selected.jsonl", line=1))
