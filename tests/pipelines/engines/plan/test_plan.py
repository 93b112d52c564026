"""`datatools plan`: from a job to hours, against real runs, with the bottleneck named."""

import json
from pathlib import Path

import pytest

from datatools import DataError, UsageError
from pipelines.cli.app import main
from pipelines.engines.plan import pilot as pilots
from pipelines.engines.plan.run import plan
from pipelines.models.count import parameters
from pipelines.settings.load import load_config
from pipelines.settings.plan import PlanConfig
from tests.tiny import save_tiny_model

SMALL = {"rows": "1e8", "tokens_per_row": 350, "model": "8B", "method": "less", "gpus": 64, "engine": "ray"}


def planned(**more):
    return plan(load_config(PlanConfig, None, {**SMALL, "trouble.trials": 2, "rows": "1e7", **more}))


def stage(found, name):
    return next(row for row in found["stages"] if row["stage"] == name)


def test_hours_follow_from_operations_and_bytes():
    found = planned(**{"trouble.stragglers": 0, "trouble.failures": 1e12, "trouble.spread": 0})
    peak = 989e12 * 0.35
    tokens = 1e7 * 350
    assert stage(found, "features")["seconds"] == pytest.approx(4 * tokens * 4 * 8e9 / peak / 64, rel=0.02)
    assert stage(found, "warm-up")["seconds"] == pytest.approx(0.05 * 4 * tokens * 4 * 8e9 / peak, rel=1e-6)
    assert found["disk_bytes"]["features"] == 1e7 * 4 * (2 * 8192 + 8)
    assert found["gpu_hours"] == pytest.approx(found["seconds"]["median"] * 64 / 3600)
    assert found["seconds"]["median"] == pytest.approx(sum(row["even_seconds"] for row in found["stages"]), rel=0.02)


@pytest.mark.parametrize(
    ("more", "where", "by"),
    [
        ({}, "warm-up", "one worker, 63 wait"),
        ({"warmup": 0}, "features", "compute"),
        ({"warmup": 0, "hardware.disk_write": 0.01}, "features", "the shared folder"),
        ({"method": "loss", "model": "1M"}, "index", "one core of each worker"),
        ({"warmup": 0, "hardware.disk_read": 0.001, "model": "1M"}, "scores", "the shared folder"),
    ],
)
def test_the_bottleneck_is_named(more, where, by):
    found = planned(**more)
    assert (found["bottleneck"]["stage"], found["bottleneck"]["by"]) == (where, by)
    assert found["advice"]


def test_trouble_costs_time():
    calm, slow = planned(warmup=0), planned(warmup=0, **{"trouble.stragglers": 0.5, "trouble.slowdown": 3})
    lost = planned(warmup=0, **{"trouble.failures": 20})
    assert slow["seconds"]["median"] > 1.3 * calm["seconds"]["median"]
    assert lost["lost_workers"] > 8 and lost["seconds"]["added_by_failures"] > 0
    assert lost == planned(warmup=0, **{"trouble.failures": 20})  # by its seed


def test_a_model_that_does_not_fit():
    found = planned(model="70B")
    assert not found["fits"] and "does not fit" in found["advice"][0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--rows 1e8 --model 8B --gpus 0", "gpus"),
        ("--rows many --model 8B", "'many' is no number; expected one such as 1e8"),
        ("--rows 1e8 --model 8X", "no size of a model; did you mean '8B'?"),
        ("--rows 1e8 --model ./nowhere", "no such file or folder"),
        ("--rows 1e8", "name the model with --model"),
        ("--rows 1e8 --model 8B --run x", "exclude each other"),
        ("--rows 1e8 --run nowhere", "no such folder"),
        ("--rows 1e8 --model 8B --gpus 64", "--engine ranks or ray"),
        ("--rows 1e8 --model 8B --gpus 4 --method random", "uses no model"),
        ("--rows 1e8 --model 8B --method lesss", "less"),
        ("--rows 1e8 --model 8B --hardware h10", "h100"),
        ("--model 8B", "rows"),
    ],
)
def test_bad_input_is_refused(arguments, told, capsys):
    assert main(["plan", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert told in error and error.startswith("error: ") and error.count("\n") == 1


def test_json_and_tables(capsys):
    arguments = ["plan", "--rows", "10M", "--model", "135M", "--gpus", "8", "--set", "trouble.trials=2"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["job"]["rows"] == 1e7 and found["job"]["parameters"] == 135e6
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"bottleneck: {found['bottleneck']['stage']}" in shown and max(map(len, shown.splitlines())) <= 80


def test_parameters_are_those_of_the_configuration(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path / "model")
    assert parameters(str(folder)) == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert parameters("1.5e9") == 1.5e9 and parameters("135m") == 135e6
    (folder / "config.json").write_text("{}")
    with pytest.raises(DataError, match="its size cannot be read"):
        parameters(str(folder))


def test_a_measured_run_is_extrapolated(tmp_path):
    """The records of a run, of two workers; the seconds are made up."""
    folder = tmp_path / "pilot"
    record(folder, read=10.0, warm=8.0, features=20.0, receipts=[0.4] * 100)
    pilot = pilots.read(folder)
    assert (pilot.read, pilot.features) == pytest.approx((0.01, 40.0 / 50_000))
    assert pilot.warmup == pytest.approx(8.0 / (64 * 50 * 4))
    config = load_config(PlanConfig, None, {"run": str(folder), "rows": 1e6, "gpus": 4, "trouble.trials": 2})
    found = plan(config)
    assert found["job"]["tokens_per_row"] == 50 and found["job"]["method"] == "less"
    assert stage(found, "features")["seconds"] == pytest.approx(1e6 * 50 * pilot.features / 4, rel=0.05)
    with pytest.raises(UsageError, match="measured the method less"):
        plan(config.model_copy(update={"method": "rds"}))


def test_a_run_that_measured_nothing_is_refused(tmp_path):
    record(tmp_path, read=10.0, warm=8.0, features=0.0, receipts=[])
    with pytest.raises(DataError, match="features were there before"):
        pilots.read(tmp_path)
    (tmp_path / "summary.json").write_text('{"pool": 3}')
    with pytest.raises(DataError, match="damaged"):
        pilots.read(tmp_path)


def record(folder: Path, *, read, warm, features, receipts):
    (folder / "workers").mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text("model: m\ntrain: pool.jsonl\ntarget: dev.jsonl\nmethod: less\n")
    pool = {"rows": 1000, "tokens": 50_000, "files": [{"bytes": 200_000}]}
    (folder / "summary.json").write_text(json.dumps({"method": "less", "model": {"parameters": 27_000}, "pool": pool}))
    stages = {"read": read, "cost": 1.0, "warm-up": warm, "features at step 5": features, "scores": 1.0}
    lines = [json.dumps({"event": "stage_end", "name": name, "seconds": s}) for name, s in stages.items()]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"job": "train-5", "unit": n, "seconds": s}) for n, s in enumerate(receipts)]
    (folder / "workers" / "worker-1.jsonl").write_text("".join(line + "\n" for line in lines))
