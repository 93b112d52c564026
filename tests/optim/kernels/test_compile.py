"""Every kernel compiled ahead of time for sm_80 and sm_90, without a GPU, as its own function launches it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optim import backend

REPOSITORY = Path(__file__).resolve().parents[3]
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes that one program may take, of CUDA's table of compute capabilities."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if backend.triton is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.kernels", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def each(compiled):
    return [(row, target, made) for row in compiled for target, made in row["targets"].items()]


@pytest.mark.slow
def test_every_kernel_is_compiled_for_both_targets(compiled):
    """None is forgotten: the names are read from the sources."""
    sources = [*(REPOSITORY / "optim" / "kernels").glob("*.py"), *(REPOSITORY / "datatools" / "kernels").glob("*.py")]
    written = {name for path in sources for name in re.findall(r"def (_\w+_kernel)\(", path.read_text())}
    assert {row["kernel"] for row in compiled} == written
    assert all(set(row["targets"]) == {"sm_80", "sm_90"} for row in compiled)


@pytest.mark.slow
def test_nothing_spills_and_all_fits(compiled):
    for row, target, made in each(compiled):
        assert made["stack"] == 0, f"{row['name']} spills {made['stack']} bytes a thread on {target}"
        assert made["registers"] * made["warps"] * 32 <= 65536 and made["registers"] < 255, (row["name"], target)
        assert made["shared"] <= SHARED_LIMIT[target], (row["name"], target)


@pytest.mark.slow
def test_memory_is_read_many_bytes_at_a_time(compiled):
    """A mask of unknown length would make each load one element wide, and the kernel several times slower."""
    for row, target, made in each(compiled):
        assert made["vector_loads"] is None or made["vector_loads"] > 0, (row["name"], target)


@pytest.mark.slow
def test_products_are_on_the_tensor_cores(compiled):
    counts = [made["tensor_cores"] for _, _, made in each(compiled) if made["tensor_cores"] is not None]
    assert counts and min(counts) > 0


@pytest.mark.slow
def test_the_readme_has_the_table_that_the_command_makes(compiled):
    """With the Triton of constraints.txt; another version may well use other registers."""
    text = (REPOSITORY / "optim" / "kernels" / "README.md").read_text(encoding="utf-8")
    for row in compiled:
        lines = [
            line
            for line in text.splitlines()
            if f"`{row['kernel']}`" in line and row["name"] in line and f"| {row['size']} |" in line
        ]
        assert len(lines) == 1, f"{row['name']}: python -m tests.benchmarks.kernels --readme"
        if f"Triton {backend.triton.__version__};" in text:
            made = [f"{t['registers']}, {t['shared']}, {t['stack']}" for t in row["targets"].values()]
            assert [cell.strip() for cell in lines[0].split("|")[-3:-1]] == made, row["name"]
            assert f" {row['microseconds']:g} us " in lines[0], row["name"]
