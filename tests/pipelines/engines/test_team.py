"""Several processes make one selection: the same bytes as one process, whoever is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from datatools import UsageError
from pipelines.engines import ranks
from pipelines.select import run as select
from pipelines.settings.engine import EngineConfig
from tests.conftest import REPOSITORY
from tests.pipelines.conftest import commands, make_world
from tests.pipelines.select.looking import outcome
from tests.tiny import write_rows

UNITS = 30


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A world with enough rows for several processes, and the outcome of one."""
    world = make_world(tmp_path_factory.mktemp("many"))
    write_rows(world.pool, 10 * UNITS)
    return world


def argv(world, out, *more):
    rest = ["--set", "warmup.max_steps=2", "--set", "features.token_budget=96", "--set", "features.rows_per_unit=10"]
    return [*world.argv("select", "--epochs", 1, out=out), *rest, *map(str, more)]


@pytest.fixture(scope="module")
def servers(command):
    with commands() as second:
        yield command, second


@pytest.fixture(scope="module")
def whole(many, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    assert command(*argv(many, out)).code == 0
    return outcome(out)


def together(servers, world, out, *, deaths=({}, {}), env=None):
    """Run two ranks, the first of which begins earlier; returns their answers."""
    answers: list = [None, None]

    def one(rank):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} if env is None else env[rank]
        answers[rank] = servers[rank](*argv(world, out), env=variables, **deaths[rank])

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    threads[0].start()
    while not (out / ".lock").exists() and threads[0].is_alive():
        time.sleep(0.01)
    threads[1].start()
    for thread in threads:
        thread.join()
    return answers


def test_two_ranks_write_the_bytes_of_one_process(servers, many, whole, tmp_path):
    first, second = together(servers, many, tmp_path / "run")
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert outcome(tmp_path / "run") == whole
    assert first.stdout == f"{tmp_path / 'run'}\n" and second.stdout == second.stderr == ""
    assert first.rows + second.rows == 10 * UNITS + 3 and second.rows


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "helper"])
def test_a_rank_that_is_killed_is_replaced(servers, many, whole, tmp_path, victim):
    death = {"die": ["datatools.features.store:GradientFeatures.write_unit", 3, "before"]}
    deaths = [death if rank == victim else {} for rank in (0, 1)]
    answers = together(servers, many, tmp_path / "run", deaths=deaths)
    assert answers[victim].code == -9 and answers[1 - victim].code == 0, answers[1 - victim].stderr
    assert outcome(tmp_path / "run") == whole


def test_a_rank_that_sees_other_rows_is_refused_and_has_no_effect(servers, many, whole, tmp_path):
    """The second rank finds another file under the same name."""
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        write_rows(tmp_path / rank / "pool.jsonl", 10 * UNITS + int(rank))
    answers: list = [None, None]

    def one(rank):
        arguments = argv(many, tmp_path / "run")
        arguments[arguments.index("--train") + 1] = "pool.jsonl"
        env = {"RANK": str(rank), "WORLD_SIZE": "2"}
        answers[rank] = servers[rank](*arguments, env=env, cwd=str(tmp_path / str(rank)))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(answer.code for answer in answers)
    assert codes == [0, 3], [answer.stderr for answer in answers]
    [refused] = [answer for answer in answers if answer.code == 3]
    assert "cannot help with the run" in refused.stderr and "data.pool.jsonl is" in refused.stderr
    if answers[0].code == 0:  # the first one led
        assert {k: v for k, v in outcome(tmp_path / "run").items() if k != "scores"}.keys() == whole.keys() - {"scores"}


def by_two(servers, arguments):
    """Run one command line as two ranks that start at the same time; returns their answers, which must be good."""
    answers: list = [None, None]

    def one(rank):
        answers[rank] = servers[rank](*arguments, env={"RANK": str(rank), "WORLD_SIZE": "2"})

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.code for answer in answers] == [0, 0], [answer.stderr for answer in answers]
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rds", "tacs", "gist", "auto"])
def test_every_method_with_a_model_gives_the_same_bytes(servers, many, tmp_path, how, command):
    more = ["--method", how, *(["--verify"] if how == "auto" else [])]
    assert command(*argv(many, tmp_path / "one"), *more).code == 0
    by_two(servers, [*argv(many, tmp_path / "two"), *more])
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")


def workers_of(run, job):
    """The members that computed units of a job."""
    lines = [json.loads(line) for path in run.glob("workers/*.jsonl") for line in path.read_text().splitlines()]
    return {line["worker"] for line in lines if line["job"] == job}


@pytest.mark.slow
def test_an_audit_of_two_ranks_has_the_table_of_one(servers, many, command, tmp_path):
    assert command(*argv(many, tmp_path / "select")).code == 0
    chosen = tmp_path / "select" / "selected.jsonl"
    audit = ["audit", "--selected", chosen, "--pool", many.pool, "--test", many.test, "--against", "random,tfidf"]
    audit += ["--seeds", 3, "--epochs", 2, "--out"]
    assert command(*audit, tmp_path / "one").code == 0
    by_two(servers, [*audit, tmp_path / "two"])
    assert (tmp_path / "two" / "audit.json").read_bytes() == (tmp_path / "one" / "audit.json").read_bytes()
    assert len(workers_of(tmp_path / "two", "arms")) == 2


@pytest.mark.slow
def test_true_retrainings_of_orders_by_two_ranks(servers, many, command, tmp_path):
    order = ["order", "validate", "--model", many.model, "--data", many.pool, "--batches", 16, "--orders", 8]
    order += ["--estimators", "pairwise", "--lora-rank", 2, "--out"]
    assert command(*order, tmp_path / "one").code == 0
    by_two(servers, [*order, tmp_path / "two"])
    one, two = (json.loads((tmp_path / name / "validation.json").read_text()) for name in ("one", "two"))
    assert one["orders"] == two["orders"] and one["reference"] == two["reference"]
    assert one["estimators"]["pairwise"]["estimated"] == two["estimators"]["pairwise"]["estimated"]
    assert len(workers_of(tmp_path / "two", "retrainings")) == 2
    refused = servers[0]("order", "search", *map(str, order[2:]), tmp_path / "three", "--workers", 2)
    assert refused.code == 2 and "search runs in one" in refused.stderr


# ------------------------------------------------------------------------------------------------------- local workers


@pytest.mark.slow
def test_workers_on_this_machine_write_the_bytes_of_one_process(many, whole, tmp_path, command):
    answer = command(*argv(many, tmp_path / "run", "--workers", 2))
    assert answer.code == 0, answer.stderr
    assert "2 workers with 1 thread each" in answer.stderr
    assert outcome(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_is_named_and_workers_end_with_a_killed_command(many, whole, tmp_path, command):
    arguments = [*argv(many, tmp_path / "run"), "--workers", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    units = lambda: len(list(tmp_path.glob("run/features/train-*/part-*.json")))  # noqa: E731

    def started():
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", *map(str, arguments)], env=env, stderr=subprocess.PIPE, text=True
        )
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None and not children.read_text().split():
            time.sleep(0.01)
        return process, int(children.read_text().split()[0])

    process, helper = started()
    while process.poll() is None and not units():
        time.sleep(0.005)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{helper}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{helper}").exists() and units() < UNITS
    process, helper = started()
    os.kill(helper, signal.SIGKILL)
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert "worker 2 has ended by SIGKILL; the other workers do its unit of work again" in told
    assert outcome(tmp_path / "run") == whole


def test_what_cannot_be_shared_is_refused(world, tmp_path, monkeypatch):
    words = world.select(tmp_path / "r", method="tfidf", engine=EngineConfig(workers=2))
    with pytest.raises(UsageError, match=r"--engine local --workers 2: --method tfidf uses no model"):
        select.run(words)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"several ranks: --method tfidf"):
        select.run(words)
    with pytest.raises(UsageError, match=r"--overwrite: several processes"):
        select.run(world.select(tmp_path / "r", overwrite=True))


# --------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    "env, engine, place",
    [
        ({}, "local", None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "local", (3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "local", None),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, "local", None),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, "ranks", (2, 8, 0)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1",
          "SLURM_ARRAY_TASK_STEP": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, "ranks", (3, 4, 0)),
        ({}, "ranks", (0, 1, 0)),
    ],
)  # fmt: skip
def test_the_place_among_ranks(monkeypatch, env, engine, place):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = ranks.place(EngineConfig(name=engine))
    assert (found and (found.rank, found.world, found.local)) == place


def test_libraries_see_one_process_and_one_gpu(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with ranks.apart(ranks.Place(1, 2, 1)):
        assert "RANK" not in os.environ and os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    assert os.environ["RANK"] == "1" and os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
