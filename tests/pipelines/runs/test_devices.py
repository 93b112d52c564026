"""`--device` and `--dtype`: what does not exist or work here is refused by name, and what is chosen is used."""

import os
import sys
from typing import Any

import pytest
import torch

from datatools import DataError, EnvironmentProblem, UsageError, files
from pipelines.cli.commands import COMMANDS
from pipelines.engines import ray_pool
from pipelines.models import load as models
from pipelines.rows import preflight
from pipelines.runs import devices, numerics
from pipelines.runs.folder import Run
from pipelines.select import run as select
from pipelines.settings.audit import AuditConfig
from pipelines.settings.diagnose import DiagnoseConfig
from pipelines.settings.engine import EngineConfig
from pipelines.settings.flags import flags_of
from pipelines.settings.load import load_config
from pipelines.settings.order import OrderConfig
from pipelines.settings.parts import ModelConfig
from pipelines.settings.train import EvaluateConfig, TokensConfig, TrainConfig
from pipelines.training import evaluation, token_selection, train
from tests.pipelines.conftest import make_world

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """A process in which nobody has asked for a device; what a test hides is shown again."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(devices, "_asked", "auto")
    monkeypatch.setattr(devices, "_only", None)


@pytest.fixture
def machine(monkeypatch):
    """A machine with four GPUs, as far as torch says which there are; returns what was tried on them."""

    def seen() -> int:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        return 4 if named is None else len([one for one in named.split(",") if one not in ("", "-1")])

    tried: list[tuple[str, torch.dtype]] = []
    multiply = devices._multiply
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen() > 0)
    monkeypatch.setattr(torch.cuda, "device_count", seen)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number=0: "a GPU")
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", seen, raising=False)
    monkeypatch.setattr(
        devices, "_multiply", lambda *where: tried.append(where) if where[0] == "cuda" else multiply(*where)
    )
    return tried


def using(device: str, *, processes: bool = False, elsewhere: bool = False) -> Any:
    devices.use(ModelConfig(name="m", device=device), processes=processes, elsewhere=elsewhere)


LOADS = ["select", "train", "order", "evaluate", "audit", "diagnose", "demo"]


def test_every_command_that_loads_a_model_has_the_flags():
    flags = {name: {one.flag.name for one in flags_of(command.settings)} for name, command in COMMANDS.items()}
    assert [name for name, found in flags.items() if {"--device", "--dtype"} <= found] == LOADS
    assert "--device" in flags["explain"]  # in the dtype of its run


def test_the_default_changes_nothing(machine):
    using("auto", processes=True)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ and not machine
    assert devices.kind() == "cuda" and devices.name() == "a GPU"
    assert devices.dtype_of(ModelConfig(name="m")) == torch.bfloat16


@pytest.mark.parametrize("named, asked, left", [(None, 1, "1"), ("2,3", 1, "3"), ("GPU-a,GPU-b", 0, "GPU-a")])
def test_one_gpu_is_the_only_one_of_its_process(machine, monkeypatch, named, asked, left):
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    for _ in range(2):  # settings are checked more than once, and the number still counts from the user's GPUs
        using(f"cuda:{asked}")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == left and devices.gpus() == [left]
    assert machine[0] == ("cuda", torch.bfloat16)


def test_a_gpu_that_the_user_has_hidden_is_refused(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(EnvironmentProblem, match=r"--device cuda:2: CUDA_VISIBLE_DEVICES=2,3 lets .* use 2 of the"):
        using("cuda:2")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_one_gpu_of_several_processes_is_refused(machine, world):
    with pytest.raises(UsageError, match="--device cuda:0 is one GPU, and several processes .* --device cuda, and set"):
        using("cuda:0", processes=True)
    one = ModelConfig(name=str(world.model), device="cuda:0")
    for engine in (EngineConfig(workers=2), EngineConfig(name="ranks"), EngineConfig(name="ray")):
        with pytest.raises(UsageError, match="cuda:0 is one GPU"):
            preflight.contradictions(world.select(world.folder / "run", model=one, engine=engine))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    using("cuda", processes=True)
    assert [devices.gpu_of(place)["CUDA_VISIBLE_DEVICES"] for place in range(5)] == ["0", "1", "2", "3", "0"]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_gpus_that_torch_has_already_found_cannot_be_hidden(machine, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 4, raising=False)
    with pytest.raises(EnvironmentProblem, match=rf"--device {device}: .* already looked for GPUs.* before Python"):
        using(device)


@no_gpu
def test_cpu_on_a_machine_with_gpus_stays_on_the_cpu(machine, world, tmp_path):
    with pytest.raises(DataError, match="libcudart|CUDA"):  # the GPUs here are made up, so that any use of one shows
        models.load(ModelConfig(name=str(world.model)))
    one = ModelConfig(name=str(world.model), device="cpu")
    run = select.run(world.select(tmp_path / "run", model=one))
    made = files.read_json(run / "provenance.json")
    assert made["facts"]["numerics"]["device"] == "cpu" and made["facts"]["numerics"]["threads"]
    assert made["models"] == {str(world.model): {"device": "cpu", "dtype": "float32"}}
    assert devices.gpu_of(0) == {} and os.environ["CUDA_VISIBLE_DEVICES"] == "-1"  # what other processes get
    assert "device:" not in (run / "run.yaml").read_text()  # it may continue and be repeated elsewhere


@no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_here_is_refused_before_rows_are_read(world, tmp_path, device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one")
    model = ModelConfig(name=str(world.model), device=device)
    rows = {"paths": [str(world.test)]}
    for run, config in [
        (select.run, world.select(tmp_path / "run", model=model)),
        (train.run, TrainConfig(model=model, data=rows, out=tmp_path / "run")),
        (evaluation.evaluate, EvaluateConfig(model=model, data=rows)),
        (preflight.check, DiagnoseConfig(model=model, data=rows, out=tmp_path / "run")),
    ]:
        with pytest.raises(EnvironmentProblem, match=rf"^--device {device}: .*--device auto"):
            run(config)
    assert not (tmp_path / "run").exists()


def test_other_machines_may_have_what_this_one_has_not(world):
    using("cuda", elsewhere=True)
    cluster = type("Cluster", (), {"cluster_resources": staticmethod(lambda: {"CPU": 2})})
    found = world.select(world.folder / "run", model=ModelConfig(name="m", device="cuda"))
    with pytest.raises(EnvironmentProblem, match="--device cuda: no node of the Ray cluster has a GPU"):
        ray_pool._gpus(cluster, found)
    cluster.cluster_resources = staticmethod(lambda: {"CPU": 2, "GPU": 1})
    assert [
        ray_pool._gpus(cluster, world.select(world.folder / "run", model=ModelConfig(name="m", device=device)))
        for device in ("auto", "cuda", "cpu")
    ] == [1, 1, 0]


def test_a_word_that_is_no_device_is_refused():
    for word in ("gpu", "cuda:", "cuda:-1", "CUDA", "cpu:0", ""):
        with pytest.raises(UsageError, match=r"is no device; expected auto, cpu, cuda, cuda:N .* or mps"):
            load_config(EvaluateConfig, None, {"model.name": "m", "data.paths": ["a"], "model.device": word})


def test_a_dtype_in_which_the_device_cannot_compute_is_refused(monkeypatch):
    def multiply(device, dtype):
        raise RuntimeError("\"addmm_impl\" not implemented for 'Half'\nmore")

    monkeypatch.setattr(devices, "_multiply", multiply)
    with pytest.raises(EnvironmentProblem, match=r"--dtype float16: .*addmm_impl.* not .*; use --dtype float32"):
        devices.use(ModelConfig(name="m", dtype="float16"), processes=False)


def test_a_run_that_goes_on_elsewhere_is_refused_by_name_and_can_be_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["datatools", "train"])

    def run(device="auto", **more):
        model = ModelConfig(name="m", device=device)
        return Run(tmp_path / "run", TrainConfig(model=model, data="a.jsonl", **more), "train")

    with run():
        pass
    with run(device="cpu"):
        pass  # the flag itself is no setting of the result
    monkeypatch.setattr(devices, "name", lambda: "a GPU")
    with pytest.raises(DataError, match=r'numerics.device was "cpu", is "a GPU".* --accept-change numerics'), run():
        pass
    with run(accept_change=["numerics"]) as again:
        assert again.changed == ["numerics.device"]
    with run():
        assert numerics.facts()["device"] == "a GPU"


# -------------------------------------------------------------------------------------------------------------- float16


def float16(world):
    return ModelConfig(name=str(world.model), dtype="float16")


def test_forward_passes_in_float16_give_nearly_what_float32_gives(world, tmp_path):
    def losses(dtype):
        model = ModelConfig(name=str(world.model), dtype=dtype)
        return evaluation.evaluate(EvaluateConfig(model=model, data={"paths": [str(world.test)]}))["loss"]

    half, single = losses("float16"), losses("float32")
    assert half != single and half == pytest.approx(single, rel=1e-3)
    run = select.run(world.select(tmp_path / "run", model=float16(world), method="rds"))
    assert files.read_json(run / "provenance.json")["models"][str(world.model)]["dtype"] == "float16"


def test_gradients_in_float16_are_refused(world, tmp_path):
    rows, model = {"paths": [str(world.test)]}, float16(world)
    for config in [
        *(world.select(tmp_path / "run", model=model, method=method) for method in ("less", "auto", "gist", "tov")),
        world.select(tmp_path / "run", model=model, method="auto", verify=True),
        TrainConfig(model=model, data=rows),
        AuditConfig(selected="a", pool=rows, test=rows, model=model),
        DiagnoseConfig(model=model, data=rows),
    ]:
        with pytest.raises(UsageError, match="--dtype float16: .* gradients, .* below 6e-8 .* use bfloat16 or float32"):
            preflight.contradictions(config)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_orders_are_computed_in_float32(world, dtype):
    model = ModelConfig(name=str(world.model), dtype=dtype)
    with pytest.raises(UsageError, match=f"--dtype {dtype}: `datatools order` computes in float32"):
        preflight.contradictions(OrderConfig(model=model, data={"paths": [str(world.test)]}))


# ----------------------------------------------------------------------------------------------------- other models


def test_the_reference_model_is_on_the_device_of_the_model_that_trains():
    found = token_selection.reference_of(TokensConfig(reference="r"), ModelConfig(name="m", device="mps"))
    assert found.name == "r" and found.device == "mps"


def test_a_dry_run_says_where_it_would_compute(world, tmp_path, capsys):
    select.run(world.select(tmp_path / "run", dry_run=True))
    assert "on cpu in float32" in capsys.readouterr().err
    train.run(TrainConfig(model=str(world.model), data=str(world.test), out=tmp_path / "run", dry_run=True))
    assert "on cpu in float32" in capsys.readouterr().err
