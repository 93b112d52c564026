"""datatools.features.store: damage is found, named and repaired; kills, full disks and several processes."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datatools import DataError, DatatoolsError, GradientFeatures
from tests.datatools.features.filled import KEYS, META, create, fill

HARNESS = Path(__file__).with_name("store_harness.py")


@pytest.fixture(scope="module")
def harness() -> Iterator[Callable[..., dict[str, Any]]]:
    """Run an experiment of store_harness.py; one process for all of them, it takes seconds to import torch."""
    process: subprocess.Popen[str] | None = None

    def run(experiment: str, folder: Path, kills: int = 25) -> dict[str, Any]:
        nonlocal process
        process = process or subprocess.Popen(
            [sys.executable, str(HARNESS)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        print(
            json.dumps({"experiment": experiment, "folder": str(folder), "kills": kills, "seed": 0}),
            file=process.stdin,
            flush=True,
        )
        answer = process.stdout.readline()
        if not answer:
            process = None
        assert answer, f"the harness died in {experiment}; its errors are above"
        return json.loads(answer)

    yield run
    if process:
        process.communicate()


# ---------------------------------------------------------------- damage


def damaged(folder) -> list[tuple[int, str]]:
    """Damaged units as a reader meets them, one after the other; each must be named with its file."""
    store = GradientFeatures.open(folder)
    found = [(unit, "") for unit in store.missing_units()]
    for unit in range(store.units):
        if unit not in dict(found):
            try:
                store.take(store.unit_keys(unit))
            except DataError as error:
                assert f"unit {unit} is damaged (part-{unit:05d}." in str(error)
                assert "run the extraction again" in str(error)
                found.append((unit, str(error)))
    return found


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_every_flipped_byte_is_detected(quick, suffix):
    """C1: each byte position of a payload and of a sidecar, each with a bit of its own; and cutting it there."""
    fill(create(quick / "good", n=6, dtype="int8"))
    part = quick / "good" / f"part-00000.{suffix}"
    good = part.read_bytes()
    other = part.with_name("part-00000.json" if suffix == "safetensors" else "part-00000.safetensors")
    kept = other.read_bytes()
    missed = []
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        for data in (bytes(flipped), good[:position]):
            part.write_bytes(data)
            found = GradientFeatures.open(part.parent).verify()
            if [unit for unit, _ in found] != [0] or part.name not in found[0][1] or part.exists() or other.exists():
                missed.append(position)
            part.write_bytes(good)
            other.write_bytes(kept)
    assert len(good) > 250 and missed == []


def test_every_flipped_byte_of_the_plan_is_detected(quick):
    fill(create(quick, n=6))
    good = (quick / "plan.json").read_bytes()
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        (quick / "plan.json").write_bytes(flipped)
        with pytest.raises(DataError, match="plan.json (is damaged|has format)"):
            GradientFeatures.open(quick)


def test_every_flipped_byte_of_the_keys_is_detected(quick):
    fill(create(quick, n=7))
    (path,) = quick.glob("keys-*.bin")
    good = path.read_bytes()
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        for data in (bytes(flipped), good[:position]):
            path.write_bytes(data)
            with pytest.raises(DataError, match=r"keys-\w+\.bin is damaged: .*; remove the folder"):
                GradientFeatures.open(quick).take([KEYS[0]])
    path.unlink()
    with pytest.raises(DataError, match="is damaged: it is missing; remove the folder"):
        GradientFeatures.open(quick)


def test_random_damage_is_found_named_and_repaired(quick):
    """C1: 200 random flips, cuts, growths, swaps and strangers; only the units hit are computed again."""
    draw = random.Random(0)
    fill(create(quick / "good", n=24, dtype="float16"))
    fill(create(quick / "stranger", n=24, dtype="float16", meta={"model": "another"}))
    reference = {p.name: p.read_bytes() for p in (quick / "good").iterdir()}
    store = quick / "good"
    for trial in range(200):
        a, b = draw.sample(range(4), 2)
        suffix = draw.choice(["safetensors", "json"])
        part, twin = store / f"part-{a:05d}.{suffix}", store / f"part-{b:05d}.{suffix}"
        data, hit = bytearray(part.read_bytes()), {a}
        kind = trial % 6
        if kind == 0:
            for _ in range(draw.randint(1, 3)):
                data[draw.randrange(len(data))] ^= draw.randint(1, 255)
            hit = {a} if bytes(data) != reference[part.name] else set()
        elif kind == 1:
            data = data[: draw.randrange(len(data))]
        elif kind == 2:
            data += bytes(draw.randint(1, 100))
        elif kind == 3:  # swapped shards
            part.write_bytes(twin.read_bytes())
            twin.write_bytes(data)
            data, hit = None, {a, b}
        elif kind == 4:  # one file of another run
            data = bytearray((quick / "stranger" / part.name).read_bytes())
            hit = {a} if bytes(data) != reference[part.name] else set()  # its payload is the same, its sidecar is not
        else:  # both files of another unit
            for end in ("safetensors", "json"):
                shutil.copy(store / f"part-{b:05d}.{end}", store / f"part-{a:05d}.{end}")
            data = None
        if data is not None:
            part.write_bytes(data)
        assert {unit for unit, _ in damaged(store)} == hit, (trial, kind)
        assert {int(path.name[5:10]) for path in store.glob("*.json.broken")} == hit
        fill(repaired := create(store, n=24, dtype="float16"))
        for path in store.glob("*.broken"):
            path.unlink()
        assert {p.name: p.read_bytes() for p in store.iterdir()} == reference and repaired.verify() == []


def test_a_unit_of_another_run_does_not_pass(tmp_path):
    fill(create(tmp_path / "a"))
    fill(create(tmp_path / "b", meta={**META, "model": "def"}))
    for suffix in ("json", "safetensors"):
        shutil.copy(tmp_path / "b" / f"part-00001.{suffix}", tmp_path / "a")
    store = GradientFeatures.open(tmp_path / "a")
    reason = "part-00001.json belongs to another store or unit: its 'store' differs from plan.json"
    assert store.verify() == [(1, reason)]
    assert store.missing_units() == [1] and (tmp_path / "a" / "part-00001.safetensors.broken").exists()


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_a_unit_of_another_pool_does_not_pass(tmp_path, dtype):
    """Equal metadata, equal shapes, right digests, but other rows: the keys tell, and nothing of it is ever read."""
    mine = fill(create(tmp_path / "a", dtype=dtype))
    fill(create(tmp_path / "b", dtype=dtype, keys=KEYS[100:120]))
    fill(create(tmp_path / "c", dtype=dtype, keys=[*KEYS[:6], *reversed(KEYS[6:12]), *KEYS[12:20]]))
    assert {(tmp_path / name / "part-00001.json").stat().st_size for name in "abc"} == {
        (tmp_path / "a" / "part-00001.json").stat().st_size
    }
    kept = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    reason = "part-00001.json belongs to another store or unit: its 'keys' differs from plan.json"
    for stranger in "bc":  # other rows; the same rows in another order
        for read in (
            lambda s: list(s.iter_blocks()),
            lambda s: s.take([KEYS[6]]),
            lambda s: s.rows(),
            lambda s: s.info(1),
        ):
            for suffix in ("json", "safetensors"):
                shutil.copy(tmp_path / stranger / f"part-00001.{suffix}", tmp_path / "a")
            with pytest.raises(DataError, match=rf"unit 1 is damaged \({reason}\); it was set aside"):
                read(GradientFeatures.open(tmp_path / "a"))
            assert GradientFeatures.open(tmp_path / "a").missing_units() == [1]
            for path in (tmp_path / "a").glob("*.broken"):
                path.unlink()
            for name, data in kept.items():
                (tmp_path / "a" / name).write_bytes(data)
        for suffix in ("json", "safetensors"):
            shutil.copy(tmp_path / stranger / f"part-00001.{suffix}", tmp_path / "a")
        store = GradientFeatures.open(tmp_path / "a")
        assert store.verify() == [(1, reason)] and store.missing_units() == [1]
        fill(store)
        assert all((tmp_path / "a" / name).read_bytes() == data for name, data in kept.items())
    shutil.copy(tmp_path / "b" / "part-00001.safetensors", tmp_path / "a")  # the rows alone, under the right sidecar
    assert [unit for unit, _ in mine.verify()] == [1]


def test_a_lost_payload_or_sidecar(tmp_path):
    store = fill(create(tmp_path))
    (tmp_path / "part-00000.json").unlink()
    (tmp_path / "part-00001.safetensors").unlink()
    assert GradientFeatures.open(tmp_path).missing_units() == [0]
    assert store.verify() == [(1, "part-00001.safetensors is missing")]
    assert store.missing_units() == [0, 1]


def test_what_cannot_be_read_is_no_damage(tmp_path):
    """A file that the system refuses (here: a folder in its place) is named, and nothing is set aside."""
    fill(create(tmp_path, n=12))
    for name in ("part-00000.json", "part-00001.safetensors"):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    for read in (lambda s: s.info(0), lambda s: s.missing_units(), lambda s: s.take(KEYS[:1]), lambda s: s.verify()):
        with pytest.raises(DatatoolsError, match=r"part-00000\.json"):
            read(GradientFeatures.open(tmp_path))
    with pytest.raises(DatatoolsError, match=r"part-00001\.safetensors"):
        GradientFeatures.open(tmp_path, verify=False).take(KEYS[6:7])
    assert not list(tmp_path.glob("*.broken"))


# ---------------------------------------------------------------- processes and disks


def test_killed_at_any_moment_it_ends_with_the_same_bytes(quick, harness):
    """R1, R2: 25 kill -9 at random moments and one before each call that changes the disk."""
    found = harness("crash", quick)
    print(found)
    assert found["random_kills"] == 25 and found["point_kills"] >= 50
    assert found["wrong_rows"] == 0 and found["differing_files"] == [] and found["committed_units_lost"] == 0


def test_several_processes_fill_one_store(quick, harness):
    """C5: four processes, killed now and then, created the store at the same moment."""
    found = harness("share", quick, kills=12)
    assert found["codes"] == [0] and found["rows"] == found["distinct"] == 240
    assert found["differing_files"] == []


def test_each_failing_call_is_explained_and_leaves_nothing_false(quick, harness):
    """C3: the n-th write, fsync, rename, ... gives ENOSPC or EIO, for every n."""
    found = harness("faults", quick)
    assert found["without_context"] == [] and found["wrong_rows"] == 0 and found["differing_files"] == []
    # silent: only the unlink of a temporary name that the rename has taken away already, one a file written
    assert found["raised"] + found["silent"] == 2 * found["calls"] and found["silent"] == 2 * 6


def test_a_size_limit_stops_cleanly_and_goes_on(quick, harness):
    """C2 with RLIMIT_FSIZE: exit code 4 wherever the limit falls."""
    found = harness("full", quick)
    assert list(found["codes"].values()) == [4] * 6
    assert not any(found["cut_files"].values())


def test_a_full_disk_stops_cleanly_and_goes_on(tmp_path, harness):
    """C2 on a real file system of 64 KiB."""
    found = harness("tmpfs", tmp_path)
    if "skipped" in found:
        pytest.skip(f"needs the right to mount: {found['skipped']}")
    assert set(found["codes"]) == {0, 4} and found["differing_files"] == []


def test_reading_keeps_memory_flat(quick, harness):
    """C7: a store of 128 MiB read in blocks of 4 MiB."""
    found = harness("memory", quick)
    assert found["rows"] == 65536 and found["growth_mib"] < 48, found
