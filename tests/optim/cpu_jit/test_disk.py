"""Compiled steps in files: the next process loads them, and never one that is damaged or foreign."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from optim import Optimizer, StableAdamWRule, backend
from optim.cpu_jit import cache, disk, machine
from tests.conftest import REPOSITORY
from tests.optim.harness import assert_same, parameters, train

pytestmark = pytest.mark.skipif(not backend.use_cpu_jit(), reason="llvmlite is not installed, or OPTIM_BACKEND=torch")

TEXT = "define i64 @answer() {\n  ret i64 42\n}\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    folder = tmp_path / "steps"
    monkeypatch.setenv("OPTIM_CACHE", str(folder))
    return folder


@pytest.fixture
def compilations(monkeypatch):
    """The keys of what was compiled and stored."""
    found = []
    original = disk.save
    monkeypatch.setattr(disk, "save", lambda key, code: (found.append(key), original(key, code)))
    return found


def test_a_second_call_loads_the_file(place, compilations):
    for _ in range(2):
        address, _engine = machine.compiled(TEXT)
        assert address("answer")
    assert len(compilations) == 1 and [path.stem for path in place.iterdir()] == compilations
    assert place.stat().st_mode & 0o777 == 0o700 and next(place.iterdir()).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "foreign"])
def test_a_damaged_file_is_compiled_again(place, compilations, damage):
    machine.compiled(TEXT)
    (path,) = place.iterdir()
    whole = path.read_bytes()
    broken = {
        "flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "foreign": whole.replace(path.stem.encode(), b"0" * 64),  # of another step, processor or version
    }[damage]
    path.write_bytes(broken)
    address, _engine = machine.compiled(TEXT)
    assert address("answer") and len(compilations) == 2 and path.read_bytes() == whole


def test_what_others_can_write_is_not_run(place, compilations):
    machine.compiled(TEXT)
    place.chmod(0o777)
    machine.compiled(TEXT)
    assert len(compilations) == 2


def test_everything_works_without_a_folder(tmp_path, monkeypatch, compilations):
    (tmp_path / "file").write_text("")
    for value in ("0", str(tmp_path / "file" / "below"), str(tmp_path / "file")):
        monkeypatch.setenv("OPTIM_CACHE", value)
        address, _engine = machine.compiled(TEXT)
        assert address("answer")
    assert len(compilations) == 3
    monkeypatch.delenv("OPTIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert disk.folder() == Path("/somewhere/optim-steps")


def test_old_files_are_deleted(place, monkeypatch):
    monkeypatch.setattr(disk, "KEPT", 8)
    for i in range(9):
        disk.save(f"{i:064x}", b"code")
        os.utime(place / f"{i:064x}.o", (i, i))
    assert sorted(int(path.stem, 16) for path in place.iterdir()) == [3, 4, 5, 6, 7, 8]
    assert disk.load(f"{8:064x}") == b"code"


def test_the_first_step_of_a_second_process_is_fast_and_has_the_same_bits(place):
    """What another process would find: no compiled step in memory. Compilation is most of the time of a first step."""
    ends, times = [], []
    for _ in range(2):
        cache.kernel_of.cache_clear()
        cache._known.clear()
        params = parameters([(4, 3), (5,)], torch.float32)
        optimizer = Optimizer(params, StableAdamWRule(betas=(0.7, 0.9)), lr=0.1, weight_decay=0.1)
        start = time.process_time()
        train(optimizer, params, range(3))
        times.append(time.process_time() - start)
        ends.append(params)
        del optimizer
        gc.collect()
    assert_same(*ends)
    assert list(place.iterdir()) and times[1] < 0.7 * times[0], times


NAMES_OF_FILES = """
import hashlib, warnings
from contextlib import suppress
import torch
from optim import OPTIMIZERS, create
from optim.cpu_jit import kernel

def refuse(text):
    print(hashlib.sha256(text.encode()).hexdigest())
    raise RuntimeError

kernel.compiled = refuse
warnings.simplefilter("ignore")
for name in OPTIMIZERS:
    print(name)
    shapes = [(8, 6), (6,)]
    parameters = [(f"layer.{i}.weight", torch.nn.Parameter(torch.ones(s))) for i, s in enumerate(shapes)]
    for _, p in parameters:
        p.grad = torch.ones_like(p)
    with suppress(RuntimeError):  # of a rule that needs more than gradients
        create(name, parameters, lr=1e-3).step()
"""


def test_the_assembly_of_every_rule_is_the_same_in_every_process():
    """Otherwise the next process would compile it again."""
    runs = [
        subprocess.Popen([sys.executable, "-c", NAMES_OF_FILES], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
                         env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]  # fmt: skip
    first, second = (run.communicate()[0].splitlines() for run in runs)
    assert first == second and len(first) > 2 * 30 and all(run.returncode == 0 for run in runs)
