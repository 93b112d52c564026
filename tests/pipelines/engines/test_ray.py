"""The engine `ray` on a cluster of several nodes on this machine; without Ray, only how that is said."""

import importlib.util
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from datatools import EnvironmentProblem, UsageError
from pipelines.engines import ray_pool
from pipelines.select import run as select
from pipelines.settings.engine import EngineConfig
from pipelines.settings.select import FeaturesConfig
from tests.conftest import REPOSITORY
from tests.pipelines.conftest import make_world
from tests.pipelines.select.looking import outcome
from tests.tiny import write_rows

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install datatools-llm[ray]")


def test_ray_that_is_not_installed_is_named(world, tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(ray_pool, "import_module", absent)
    config = world.select(tmp_path / "run", engine=EngineConfig(name="ray", workers=2))
    with pytest.raises(EnvironmentProblem, match=r"pip install 'datatools-llm\[ray\]'"):
        select.run(config)
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_does_not_answer_is_named(world, tmp_path, monkeypatch):
    def init(address, **options):
        raise ConnectionError(f"could not connect to {address}")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    fake = SimpleNamespace(init=init, is_initialized=lambda: False)
    monkeypatch.setattr(ray_pool, "import_module", lambda name: fake)
    with pytest.raises(EnvironmentProblem, match=r"RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers.*ray start --head"):
        select.run(world.select(tmp_path / "run", engine=EngineConfig(name="ray", workers=2)))


def test_the_error_of_the_leader_is_told():
    """Others only report that the leader has failed."""
    answers = {
        "a": {"kind": "DataError", "text": "the run in x failed in the process that leads it: bad"},
        "b": {"kind": "UsageError", "text": "bad"},
    }
    fake = SimpleNamespace(wait=lambda left, num_returns: (left[:1], left[1:]), get=answers.get)
    with pytest.raises(UsageError, match="^bad$"):
        ray_pool._wait(fake, {"a": 1, "b": 2})
    answers["c"] = {}
    ray_pool._wait(fake, {"c": 1})  # an empty answer: done


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_one_of_them_killed_give_the_bytes_of_one_process(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    world = make_world(tmp_path / "world")
    write_rows(world.pool, 120)
    features = FeaturesConfig(rows_per_unit=5, token_budget=256)
    one = select.run(world.select(tmp_path / "one", features=features))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: a busy machine starves its actors
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20},
    )
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        out, removed = tmp_path / "two", []

        def kill():
            while len(list(out.glob("features/train-*/part-*.json"))) < 3:
                time.sleep(0.02)
            removed.append(len(list(out.glob("features/train-*/part-*.json"))))
            cluster.remove_node(nodes[0], allow_graceful=False)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        engine = EngineConfig(name="ray", workers=2, threads=1)
        select.run(world.select(out, features=features, engine=engine))
        assert removed and outcome(out) == outcome(one)
        print(f"a node was killed after {removed[0]} of 24 units")
    finally:
        cluster.shutdown()


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_actors_write_the_bytes_of_local_workers_and_ranks(tmp_path, monkeypatch, workers):
    """The same selection with one process, with this many workers, as this many ranks, and as this many actors."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    world = make_world(tmp_path / "world")
    features = FeaturesConfig(rows_per_unit=10, token_budget=256)

    def config(folder, **engine):
        return world.select(tmp_path / folder, features=features, engine=EngineConfig(threads=1, **engine))

    want = outcome(select.run(config("one")))
    assert outcome(select.run(config("local", workers=workers))) == want
    assert outcome(select.run(config("ray", name="ray", workers=workers))) == want
    replay = f"select {tmp_path / 'one' / 'run.yaml'} --out {tmp_path / 'ranks'} --engine ranks --quiet"
    launched = [
        subprocess.Popen(
            [sys.executable, "-m", "pipelines", *replay.split()],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RANK": str(rank), "WORLD_SIZE": str(workers)},
        )
        for rank in range(workers)
    ]
    assert [process.wait() for process in launched] == [0] * workers
    assert outcome(tmp_path / "ranks") == want
