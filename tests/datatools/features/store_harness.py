"""Processes that fill a feature store and are killed, starved of disk or set against each other; the supervisor judges.

Run as `python store_harness.py EXPERIMENT FOLDER [--kills N] [--seed S]`; prints one JSON object. Children are forked
from one process that has imported torch already, so that a kill costs milliseconds; the tests keep that process.
Features are a function of the key.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from datatools import EnvironmentProblem, GradientFeatures, files
from datatools.files import atomic, atomic_folders, disk, folders, locks, reading

DIM, ROWS, META = 24, 6, {"model": "fake", "projector": {"seed": 0, "dim": 24}}


def key(i: int) -> str:
    return hashlib.md5(str(i).encode(), usedforsecurity=False).hexdigest()


def feature(name: str) -> torch.Tensor:
    """Row of this key: sometimes zero, sometimes not finite."""
    number = int(name[:8], 16)
    row = torch.randn(DIM, generator=torch.Generator().manual_seed(number))
    return row * 0 if number % 11 == 0 else row / 0 if number % 13 == 0 else row


def features(keys: list[str]) -> torch.Tensor:
    return torch.stack([feature(name) for name in keys])


def open_store(folder: Path, units: int, dtype: str = "int8") -> GradientFeatures:
    keys = [key(i) for i in range(units * ROWS)]
    return GradientFeatures.create_or_open(folder, meta=META, dim=DIM, dtype=dtype, keys=keys, rows_per_unit=ROWS)


def fill(folder: Path, units: int, delay: float = 0.0, rank: int = 0, world: int = 1) -> None:
    store = open_store(folder, units)
    for unit in store.missing_units(rank, world):
        time.sleep(delay / 2)
        store.write_unit(unit, features(store.unit_keys(unit)), info={"unit": unit})
        time.sleep(delay / 2)


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.digest_file(path) for path in folder.rglob("*") if path.is_file()}


def differing(folder: Path, reference: Path) -> list[str]:
    a, b = hashes(folder), hashes(reference)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def wrong_rows(folder: Path, units: int, expected: dict[str, torch.Tensor]) -> int:
    """Rows that a reader sees and that are not what an undisturbed run stores."""
    if not (folder / "plan.json").exists():
        return 0
    store = GradientFeatures.open(folder)
    missing = set(store.missing_units())
    seen = [name for unit in range(store.units) if unit not in missing for name in store.unit_keys(unit)]
    rows = store.take(seen)
    return sum(not torch.equal(row, expected[name]) for name, row in zip(seen, rows, strict=True))


def child(work: Callable[[], None]) -> int:
    """Fork a process that does `work`; exit 0 when done, 4 after an EnvironmentProblem, 99 after anything else."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        work()
        code = 0
    except EnvironmentProblem as error:
        code = error.exit_code
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Interposed:
    """`os` for datatools.files, calling `at(n)` before the n-th call that changes the disk."""

    CALLS = {"open", "write", "fsync", "fchmod", "replace", "rename", "link", "unlink", "makedirs"}

    def __init__(self, at: Callable[[int], None]) -> None:
        self.count = 0
        self._at = at

    def __getattr__(self, name: str):
        function = getattr(os, name)
        if name not in self.CALLS:
            return function

        def call(*args, **kwargs):
            self.count += 1
            self._at(self.count)
            return function(*args, **kwargs)

        return call


def interpose(replacement: object) -> None:
    """Make every module that writes files call `replacement` for `os`."""
    for module in (atomic, atomic_folders, disk, folders, locks, reading):
        module.os = replacement


def expected_rows(reference: Path) -> dict[str, torch.Tensor]:
    store = GradientFeatures.open(reference)
    return {name: row for block in store.iter_blocks() for name, row in zip(block.keys, block.features, strict=True)}


def crash(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """kill -9 at random moments until `kills` hit; then before each single call that changes the disk."""
    draw = random.Random(seed)
    units, reference = 10, folder / "reference"
    fill(reference, units)
    start = time.monotonic()
    assert wait(child(lambda: fill(folder / "timed", units, delay=0.004))) == 0
    full_run = time.monotonic() - start
    expected = expected_rows(reference)
    done = runs = wrong = 0
    bad_files: list[str] = []
    lost_units: list[int] = []
    while done < kills:
        store = folder / f"run-{runs}"
        runs += 1
        while True:
            present = len(list(store.glob("part-*.json")))
            pid = child(lambda store=store: fill(store, units, delay=0.004))
            # a killed run makes little progress before the next kill: several kills hit each store
            time.sleep(draw.uniform(0, full_run * 0.6))
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            lost_units.append(present - min(present, len(list(store.glob("part-*.json")))))
            wrong += wrong_rows(store, units, expected)
            if code == -signal.SIGKILL:
                done += 1
            else:
                assert code == 0, code
                break
            if done >= kills:
                fill(store, units)
                break
        bad_files += differing(store, reference)

    units, reference = 2, folder / "reference-points"
    fill(reference, units)
    expected = expected_rows(reference)
    counting = Interposed(lambda n: None)
    interpose(counting)
    fill(folder / "counted", units)
    interpose(os)
    points = 0
    for n in range(1, counting.count + 1):
        store = folder / f"point-{n}"

        def work(n: int = n, store: Path = store) -> None:
            interpose(Interposed(lambda m: os.kill(os.getpid(), signal.SIGKILL) if m == n else None))
            fill(store, units)

        code = wait(child(work))
        assert code == -signal.SIGKILL, code
        points += 1
        wrong += wrong_rows(store, units, expected)
        fill(store, units)
        bad_files += differing(store, reference)
    return {
        "random_kills": done,
        "stores": runs,
        "point_kills": points,
        "wrong_rows": wrong,
        "differing_files": bad_files,
        "committed_units_lost": sum(lost_units),
    }


def share(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Four processes fill one store, created by all of them at once; each is killed now and then and started again."""
    draw = random.Random(seed)
    units, world = 40, 4
    fill(folder / "reference", units)
    store, killed, codes = folder / "store", 0, set()
    running = {child(lambda r=r: fill(store, units, 0.02, r, world)): r for r in range(world)}
    while running:
        if killed < kills:
            time.sleep(draw.uniform(0, 0.04))
            os.kill(draw.choice(list(running)), signal.SIGKILL)
        pid, status = os.wait()
        code, rank = os.waitstatus_to_exitcode(status), running.pop(pid)
        if code == -signal.SIGKILL:
            killed += 1
            running[child(lambda r=rank: fill(store, units, 0.02, r, world))] = rank
        else:
            codes.add(code)
    rows = GradientFeatures.open(store).rows()
    return {
        "killed": killed,
        "codes": sorted(codes),
        "rows": len(rows.keys),
        "distinct": len(set(rows.keys)),
        "differing_files": differing(store, folder / "reference"),
    }


def faults(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """The n-th call fails, for every n and both errors; judged by what is raised and by what lies on disk."""
    units = 2
    fill(folder / "reference", units)
    expected = expected_rows(folder / "reference")
    counting = Interposed(lambda n: None)
    interpose(counting)
    fill(folder / "counted", units)
    raised, silent, bare, bad_files, wrong = 0, 0, [], [], 0
    for code in (errno.ENOSPC, errno.EIO):
        for n in range(1, counting.count + 1):
            store = folder / f"fault-{code}-{n}"

            def fail(m: int, n: int = n, code: int = code) -> None:
                if m == n:
                    raise OSError(code, os.strerror(code))

            interpose(Interposed(fail))
            try:
                fill(store, units)
                silent += 1
            except EnvironmentProblem as error:
                raised += 1
                if str(folder) not in str(error) or os.strerror(code) not in str(error):
                    bare.append(f"call {n}: {error}")
            except Exception as error:
                bare.append(f"call {n}: {error!r}")
            interpose(os)
            wrong += wrong_rows(store, units, expected)
            fill(store, units)
            bad_files += differing(store, folder / "reference")
    return {
        "calls": counting.count,
        "raised": raised,
        "silent": silent,
        "without_context": bare,
        "wrong_rows": wrong,
        "differing_files": bad_files,
    }


def full(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """No file may grow beyond a limit that the payload passes; then the limit goes."""
    units = 2
    fill(folder / "reference", units)
    codes, left = {}, {}
    for limit in sorted({0, *(path.stat().st_size - 1 for path in (folder / "reference").iterdir())}):
        store = folder / f"limit-{limit}"
        if limit:
            open_store(store, units)  # plan and keys, so that the other files are reached

        def work(limit: int = limit, store: Path = store) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            fill(store, units)

        codes[limit] = wait(child(work))
        left[limit] = sorted(path.name for path in store.iterdir() if path.stat().st_size in (limit, 0))
        fill(store, units)
        assert not differing(store, folder / "reference"), differing(store, folder / "reference")
    return {"codes": codes, "cut_files": left}


def tmpfs(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """A real full disk of 64 KiB."""
    units, disk = 2, folder / "disk"
    disk.mkdir()
    fill(folder / "reference", units)
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mount = subprocess.run(command, capture_output=True, text=True)
    if mount.returncode:
        return {"skipped": mount.stderr.strip()}
    try:
        codes = []
        for pages in range(16, 0, -1):  # of 4 KiB; less and less room: each write in turn meets the full disk
            ballast = disk / "ballast"
            ballast.write_bytes(b"x" * 4096 * pages)
            codes.append(wait(child(lambda: fill(disk / "store", units))))
            wrong = wrong_rows(disk / "store", units, expected_rows(folder / "reference"))
            assert not wrong, wrong
            ballast.unlink()
        fill(disk / "store", units)
        return {"codes": codes, "differing_files": differing(disk / "store", folder / "reference")}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def memory(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Peak memory while a store of 128 MiB is read, above what the process had before."""
    n, dim = 65536, 1024
    keys = [key(i) for i in range(n)]
    store = GradientFeatures.create_or_open(folder / "big", meta={}, dim=dim, keys=keys, rows_per_unit=8192)
    rows = torch.randn(8192, dim, generator=torch.Generator().manual_seed(0))
    for unit in store.missing_units():
        store.write_unit(unit, rows)
    del rows
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = _resident("VmRSS")
    count = sum(len(block.keys) for block in GradientFeatures.open(folder / "big").iter_blocks(1024))
    return {"rows": count, "store_mib": n * dim * 2 / 2**20, "growth_mib": (_resident("VmHWM") - before) / 1024}


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


EXPERIMENTS = {f.__name__: f for f in (crash, share, faults, full, tmpfs, memory)}


def main() -> None:
    """One experiment of the command line, or, without one, each that a line of the input asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("experiment", choices=EXPERIMENTS, nargs="?")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # children are forked
    asked = [vars(args)] if args.experiment else map(json.loads, iter(sys.stdin.readline, ""))
    for job in asked:
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(EXPERIMENTS[job["experiment"]](folder, job["kills"], job["seed"])), flush=True)


if __name__ == "__main__":
    main()
