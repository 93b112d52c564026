"""A selection does not depend on luck: other processes, other orders of rows, kills and damage."""

import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from pipelines.select import run as select
from pipelines.settings.parts import DataConfig
from tests.pipelines.conftest import make_world
from tests.pipelines.select.looking import flip, hashes, ids, outcome
from tests.tiny import write_rows

REPOSITORY = Path(__file__).resolve().parents[3]

# -------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.slow
def test_another_process_in_another_world_selects_the_same(first, world, tmp_path):
    """One seed fixes everything: hash seed, locale, temporary folder and module entry point change nothing."""
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *world.argv("select", out=tmp_path / "run")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "77",
            "TMPDIR": str(tmp_path / "tmp"),
            "LC_ALL": "C",
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run'}\n"
    assert outcome(tmp_path / "run") == outcome(first)


def test_the_order_of_rows_and_files_does_not_change_the_selection(first, world, tmp_path):
    """Ties, the warm-up's sample and the units go by content: a shuffled pool in two files is the same pool."""
    lines = world.pool.read_bytes().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[:25]))
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[25:]))
    pool = DataConfig(paths=[str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])
    run = select.run(world.select(tmp_path / "run", train=pool))
    assert ids(run) == ids(first)
    assert hashes(run / "features") == hashes(first / "features")


def test_a_run_that_is_done_computes_nothing_again(first, world, counted):
    before = outcome(first)
    stores = {p: p.stat().st_mtime_ns for p in (first / "features").rglob("*") if p.is_file()}
    select.run(world.select(first))
    assert counted == [0] and outcome(first) == before
    assert {p: p.stat().st_mtime_ns for p in stores} == stores


def test_random_numbers_of_the_caller_are_left_alone(world, tmp_path):
    """Sampling has generators of its own; a user's torch.manual_seed keeps its meaning."""
    for method in ("random", "random-length", "tfidf", "rds", "loss"):
        torch.manual_seed(5)
        random.seed(5)
        state = torch.get_rng_state(), random.getstate()
        select.run(world.select(tmp_path / method, method=method))
        assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(command, tmp_path, record_property):
    """kill -9 at moments drawn uniformly over the run, restarted with the same command until it is done."""
    big = make_world(tmp_path / "world")
    write_rows(big.pool, 200)
    argv = big.argv("select", "--epochs", 1, "--set", "warmup.max_steps=2", out=tmp_path / "whole")
    argv += ["--set", "features.token_budget=48", "--set", "features.rows_per_unit=10"]
    whole = command(*argv)
    assert whole.code == 0
    want, units = outcome(tmp_path / "whole"), 200 // 10
    rng, kills, lives, stages, seconds = random.Random(0), 0, 0, Counter(), whole.seconds
    while kills < 10:
        lives += 1
        run, started = tmp_path / f"life-{lives}", False
        argv[argv.index("--out") + 1] = str(run)
        while True:
            answer = command(*argv, kill_after=rng.random() * seconds)
            if answer.code == 0:
                # what the next life is drawn from follows the machine's load
                seconds = answer.seconds if not started else max(seconds, answer.seconds)
                break
            assert answer.code == -9, answer.stderr
            kills, started = kills + 1, True
            parts = len(list(run.glob("features/train-*/part-*.json")))
            stages["features" if 0 < parts < units else "after" if parts else "before"] += 1
        assert outcome(run) == want, f"life {lives} differs"
    record_property("kills", kills)
    print(f"{kills} kills in {lives} lives, {dict(stages)}; 0 differing files of {len(want)}")
    assert stages["features"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, count, when",
    [
        ("pipelines.training.trainer:mark_complete", 2, "before"),
        ("transformers:Trainer._save_rng_state", 1, "before"),
        ("datatools.files.atomic:_commit", 20, "before"),
        ("datatools.features.store:GradientFeatures.write_unit", 3, "after"),
        ("pipelines.select.write:_write_table", 1, "after"),
        ("pipelines.report.select_page:render", 1, "before"),
    ],
)
def test_killed_at_an_instrumented_point_twice(command, first, world, tmp_path, where, count, when):
    """Inside a save, before a commit, between two result files: the second kill finds what the first left behind."""
    argv = world.argv("select", out=tmp_path / "run")
    for _ in range(2):
        assert command(*argv, die=[where, count, when]).code == -9
        count = 1
    answer = command(*argv)
    assert answer.code == 0, answer.stderr
    assert outcome(tmp_path / "run") == outcome(first)


@pytest.mark.parametrize("step", [4, 8])
def test_a_damaged_warm_up_checkpoint_is_made_again(first, world, tmp_path, counted, step):
    """Also one in the middle: scores over fewer checkpoints than before would be another result, silently."""
    run = shutil.copytree(first, tmp_path / "run")
    path = run / "warmup" / f"checkpoint-{step}" / "optimizer.pt"
    flip(path, path.stat().st_size // 2)
    select.run(world.select(run))
    assert (run / "warmup" / f"checkpoint-{step}.broken").is_dir()
    assert outcome(run) == outcome(first) and counted == [0]


def test_a_damaged_feature_file_is_computed_again(first, world, tmp_path, counted):
    run = shutil.copytree(first, tmp_path / "run")
    flip(run / "features" / "train-4" / "part-00001.safetensors", 900)
    select.run(world.select(run))
    for path in run.rglob("*.broken"):
        path.unlink()
    assert outcome(run) == outcome(first) and counted == [16]
