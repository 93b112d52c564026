"""What decides last bits is a fact of a run and of a store: other backends are refused, thread counts are kept."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from datatools import DataError, EnvironmentProblem, GradientFeatures, files
from pipelines.runs import numerics, threads
from pipelines.runs.folder import Run
from pipelines.select import stores
from pipelines.settings.select import SelectConfig
from pipelines.settings.train import TrainConfig

OWN = SimpleNamespace(config=SelectConfig(model="m", train="a.jsonl", target="d.jsonl"), run=None)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["datatools", "train"])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(**more):
    return Run("r", TrainConfig(model="m", data="a.jsonl", **more), "train")


def recorded():
    return files.read_json("r/provenance.json")["facts"]["numerics"]


def test_a_run_records_what_decides_its_bits():
    with run():
        pass
    found = recorded()
    assert found["threads"] == 1 and found["torch"] == torch.__version__ and found["transformers"]
    assert {"device", "steps", "instructions", "peft"} <= found.keys()


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda patch: patch.setenv("OPTIM_BACKEND", "torch"), "steps"),
        (lambda patch: patch.setenv("MKL_CBWR", "COMPATIBLE"), "MKL_CBWR"),
        (lambda patch: patch.setattr(torch, "__version__", "99.0"), "torch"),
        (lambda patch: torch.set_num_threads(2), "threads"),
        (lambda patch: patch.setenv("WORLD_SIZE", "2"), "processes"),
        (lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"), "instructions"),
    ],
)
def test_another_backend_is_refused_by_name_and_can_be_accepted(monkeypatch, change, name):
    with run():
        pass
    change(monkeypatch)
    with pytest.raises(DataError, match=rf"numerics\.{name} was .*, is .* --accept-change numerics"), run():
        pass
    with run(accept_change=["numerics"]) as again:
        assert again.changed == [f"numerics.{name}"]
    with run():
        pass  # what was accepted is what the run now has


def test_a_command_goes_on_with_the_threads_that_its_run_began_with(monkeypatch, capsys):
    with run():
        pass
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "_commands", True)
    for name in threads.COUNTS:
        monkeypatch.delenv(name, raising=False)
    with run(accept_change=["numerics"]) as again:  # the machine's own number
        assert torch.get_num_threads() == 2 and again.changed == ["numerics.threads"]
    torch.set_num_threads(1)
    with run():
        assert torch.get_num_threads() == 2 == recorded()["threads"]
    assert "threads: 2, as when this run began (1 is the default here)" in capsys.readouterr().err
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the user's: never overridden
    said = r"numerics\.threads was 2, is 1\. Restore it \(set OMP_NUM_THREADS=2 for threads; torchrun sets it to 1"
    with pytest.raises(DataError, match=said), run():
        pass
    assert torch.get_num_threads() == 1


def test_a_run_of_several_processes_is_not_continued_by_one(monkeypatch):
    """It was: by other sums, without a word. The number is known of runs that recorded it elsewhere."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with run():
        pass
    for earlier in (False, True):
        if earlier:
            found = files.read_json("r/provenance.json")
            del found["facts"]["numerics"]["processes"]
            files.write_json("r/provenance.json", found)
        for size, said in (("1", "use torchrun --nproc-per-node 2 for processes"), ("4", "processes was 2, is 4")):
            monkeypatch.setenv("WORLD_SIZE", size)
            with pytest.raises(DataError, match=said), run():
                pass
        monkeypatch.setenv("WORLD_SIZE", "2")
        with run():
            pass
    monkeypatch.delenv("WORLD_SIZE")
    with run(accept_change=["numerics"]) as again:
        assert again.changed == ["numerics.processes"]


def test_every_worker_keeps_the_threads(monkeypatch):
    with run():
        pass
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "_commands", True)
    for name in threads.COUNTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with run():
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("odd", [0, -1, 10**9, True, "2", 1.5, None, [2], {}])
def test_an_odd_number_of_threads_in_a_folder_is_not_taken(monkeypatch, odd):
    monkeypatch.setattr(threads, "_commands", True)
    monkeypatch.setattr(threads, "count_is_users", lambda: False)
    for facts in ({"threads": odd}, odd):
        numerics.keep_threads(facts)
        assert torch.get_num_threads() == 1


def test_a_run_of_an_earlier_version_goes_on():
    with run():
        pass
    found = files.read_json("r/provenance.json")
    del found["facts"]["numerics"]
    files.write_json("r/provenance.json", found)
    with run(accept_change=["seals"]) as again:
        assert again.resumed and recorded()["threads"] == 1


@pytest.mark.parametrize("value", ["fast", "triton"])
def test_a_backend_that_is_not_there(monkeypatch, value):
    monkeypatch.setenv("OPTIM_BACKEND", value)
    monkeypatch.setattr(numerics.backend, "triton", None)
    with pytest.raises(EnvironmentProblem, match=f"OPTIM_BACKEND.*{value}"), run():
        pass


def test_a_store_holds_what_decides_its_bits_and_mixing_is_said(capsys):
    keys = {f"{i:032x}": i for i in range(20)}
    options = {"meta": {"of": "test"}, "dim": 4, "rows_per_unit": 16}
    store = stores.open_store(OWN, files.make_folder("s"), keys, **options)
    assert store.meta["numerics"] == numerics.facts()
    store.write_unit(0, torch.ones(16, 4))
    assert stores.open_store(OWN, store.folder, keys, **options).missing_units() == [1]
    assert not capsys.readouterr().err
    torch.set_num_threads(2)
    again = stores.open_store(OWN, store.folder, keys, **options)  # another run with the same features.folder
    assert "begun with other numerics (threads 1 and 2)" in capsys.readouterr().err
    again.write_unit(1, torch.ones(4, 4))
    stores.open_store(OWN, store.folder, keys, **options)  # nothing is computed: nothing is mixed
    assert not capsys.readouterr().err


def test_a_store_of_an_earlier_version_is_opened(capsys):
    keys = {f"{i:032x}": i for i in range(4)}
    GradientFeatures.create_or_open("s", meta={"of": "test"}, dim=4, keys=list(keys))
    store = stores.open_store(OWN, files.make_folder("s"), keys, meta={"of": "test"}, dim=4)
    assert "numerics" not in store.meta and not capsys.readouterr().err
    assert json.loads((store.folder / "plan.json").read_text())["meta"] == {"of": "test"}
