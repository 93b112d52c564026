"""datatools.features.store: what goes in comes out, and the plan of units."""

import json
import os
import random
import shutil
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file

from datatools import DataError, GradientFeatures, UsageError, files
from datatools.features import plan as plans
from datatools.features.encodings import ENCODINGS, decode, encode, normalize
from tests.datatools.features.filled import KEYS, META, create, fill, key, rows_of


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True)


# ---------------------------------------------------------------- numbers


ERROR = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 4e-3, "int8": 8e-3, "int4": 0.16}


@pytest.mark.parametrize("dim", [1, 3, 8, 130])
@pytest.mark.parametrize("dtype", ENCODINGS)
def test_round_trip(tmp_path, dtype, dim):
    store = fill(create(tmp_path, dim=dim, dtype=dtype))
    raw = rows_of(KEYS[:20], dim)
    blocks = list(GradientFeatures.open(tmp_path).iter_blocks(rows=4))
    assert [len(block.keys) for block in blocks] == [4, 2, 4, 2, 4, 2, 2]
    assert [k for block in blocks for k in block.keys] == KEYS[:20]
    read = torch.cat([block.features for block in blocks])
    assert read.dtype == torch.float32 and read.shape == (20, dim)
    torch.testing.assert_close(read.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(torch.cat([block.norms for block in blocks]), raw.norm(dim=1))
    if dtype == "int1":
        torch.testing.assert_close(read, torch.where(raw >= 0, 1.0, -1.0) / dim**0.5)
    else:
        assert (read - unit_rows(raw)).norm(dim=1).max() < ERROR[dtype]
    shuffled = random.Random(0).sample(KEYS[:20], 20)
    assert torch.equal(store.take(shuffled), read[[KEYS.index(k) for k in shuffled]])
    assert store.rows().keys == KEYS[:20] and torch.equal(store.rows().norms, torch.cat([b.norms for b in blocks]))
    assert store.info(2) == {"unit": 2}


def test_qless_oracle(tmp_path):
    """The worked example of QLESS: absmax levels, half to even, normalised again after decoding."""
    x = torch.tensor([[0.5, -1.0, 0.25, 0.1]])
    want = {
        "int4": [0.478091, -0.836660, 0.239046, 0.119523],
        "int1": [0.5, -0.5, 0.5, 0.5],
        "float32": [0.434783, -0.869565, 0.217391, 0.086957],
    }
    for dtype, row in want.items():
        for scale in (1.0, 1e-20, 1e20):
            store = create(tmp_path / f"{dtype}-{scale}", n=1, dim=4, dtype=dtype)
            store.write_unit(0, x * scale)
            torch.testing.assert_close(store.take(KEYS[:1]), torch.tensor([row]), rtol=0, atol=2e-6)
    q4 = load_file(tmp_path / "int4-1.0" / "part-00000.safetensors")["features"][0].tolist()
    assert [(b >> s & 15) - 8 for b in q4 for s in (0, 4)] == [4, -7, 2, 1]


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-3), ("int8", 1e-2)])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_no_scale_overflows_or_vanishes(tmp_path, dtype, bound, scale):
    """N3: dot products of unit rows of correlated gradients, relative to 1; norms to float32."""
    dim = 512
    base = rows_of(KEYS[:1], dim)
    raw = base + 0.5 * rows_of(KEYS[:20], dim)
    store = create(tmp_path, dim=dim, dtype=dtype, per_unit=None)
    for unit in store.missing_units():
        store.write_unit(unit, (raw * scale)[16 * unit : 16 * unit + 16])
    read, exact = store.take(KEYS[:20]), unit_rows(raw.double())
    dots = exact @ exact.T
    assert ((read.double() @ read.double().T - dots).abs() / dots.abs()).max() < bound
    torch.testing.assert_close(store.rows().norms, raw.norm(dim=1) * scale)


def test_rows_without_a_direction_have_a_status(tmp_path):
    """N1, N4: they become zeros with a status; the bytes of the other rows do not change."""
    store = create(tmp_path / "a", n=6)
    x = rows_of(KEYS[:6])
    bad = x.clone()
    bad[1, 3], bad[2, 0], bad[4] = torch.nan, torch.inf, 0
    store.write_unit(0, bad, ["ok", "ok", "ok", "empty", "ok", "ok"])
    (block,) = store.iter_blocks()
    assert block.status == ["ok", "nonfinite", "nonfinite", "empty", "empty", "ok"] == store.rows().status
    assert torch.equal(block.features[1:5], torch.zeros(4, 8)) and torch.equal(block.norms[1:5], torch.zeros(4))
    plain = create(tmp_path / "b", n=6)
    plain.write_unit(0, x)
    assert torch.equal(plain.take([KEYS[0], KEYS[5]]), store.take([KEYS[0], KEYS[5]]))
    huge = create(tmp_path / "c", n=1)  # finite entries, but a norm beyond float32
    huge.write_unit(0, torch.full((1, 8), 3e38))
    assert huge.rows().status == ["nonfinite"]


@pytest.mark.parametrize("dtype", ENCODINGS)
def test_payload_is_plain_safetensors_with_aligned_data(tmp_path, dtype):
    fill(create(tmp_path, n=7, dim=5, dtype=dtype))
    for part in tmp_path.glob("*.safetensors"):
        assert (8 + int.from_bytes(part.read_bytes()[:8], "little")) % 64 == 0
    tensors = load_file(tmp_path / "part-00000.safetensors")
    assert set(tensors) == {"features", "norms"} | ({"scale"} if dtype.startswith("int") else set())
    if dtype == "int8":
        torch.testing.assert_close(
            tensors["features"] * tensors["scale"][:, None], unit_rows(rows_of(KEYS[:6], 5)), rtol=0, atol=0.5 / 127
        )
    bits = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4, "int1": 1}[dtype]
    assert tensors["features"].nbytes == 6 * -(-5 * bits // 8)


# ---------------------------------------------------------------- the plan


def test_bytes_are_a_function_of_the_content(tmp_path):
    for name in ("a", "b"):
        store = create(tmp_path / name, dtype="int4")
        order = store.missing_units()
        for unit in order if name == "a" else reversed(order):
            store.write_unit(unit, rows_of(store.unit_keys(unit)))
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1] and len(contents[0]) == 2 + 2 * 4


def test_stores_of_earlier_versions_are_read(tmp_path):
    """What stands in the files is compared byte for byte when they are read: another spelling would orphan them all."""
    meta = {"b": 1, "a": "ä"}
    plan = {"format": 1, "meta": meta, "dim": 3, "dtype": "int8", "units": [" ".join(KEYS[:2])]}
    (tmp_path / "plan.json").write_bytes(plans.seal(plan))
    store = create(tmp_path, n=2, dim=3, dtype="int8", meta=meta)
    store.write_unit(0, torch.tensor([[1.0, -2.0, 2.0], [0.0, 0.0, 0.0]]), info={"loss": [0.5, None]})
    header = (
        b'{"features":{"dtype":"I8","shape":[2,3],"data_offsets":[0,6]},"norms":{"dtype":"F32","shape":[2],'
        b'"data_offsets":[6,14]},"scale":{"dtype":"F32","shape":[2],"data_offsets":[14,22]}}'
    )
    payload = (tmp_path / "part-00000.safetensors").read_bytes()
    assert payload[:8] == (184).to_bytes(8, "little") and payload[8:192] == header.ljust(184)
    assert payload[192:198] == bytes([64, 256 - 127, 127, 0, 0, 0]) and payload[198:202] == np.float32(3).tobytes()
    assert files.digest(payload) == "0e2d16019f31c1a918303e9611e60569"
    assert files.digest((tmp_path / "part-00000.json").read_bytes()) == "7d0f7f75a20ecb2e04fc9a48a201e5a8"
    assert files.digest((tmp_path / "plan.json").read_bytes()) == "97b4044e9855df10530d68d15148b363"
    assert store.take(KEYS[1::-1]).tolist()[0] == [0, 0, 0] and store.rows().keys == KEYS[:2]
    grown = create(tmp_path, n=4, dim=3, dtype="int8", meta=meta, per_unit=1)  # stays in its format
    assert grown.missing_units() == [1, 2] and grown.unit_keys(2) == KEYS[3:4]
    plan["units"] += KEYS[2:4]
    assert (tmp_path / "plan.json").read_bytes() == plans.seal(plan) and not list(tmp_path.glob("keys-*"))


def test_the_files_of_this_version(tmp_path):
    """The plan names a file of keys, and a sidecar the digest of its keys: neither grows with the rows of the store."""
    store = create(tmp_path, n=7, dim=3, meta={"a": 1})
    fill(store)
    keys = bytes.fromhex("".join(KEYS[:7]))
    digests = [files.digest(keys[:96]), files.digest(keys[96:])]
    last = bytes.fromhex("".join(digests))
    assert (tmp_path / f"keys-{files.digest(last)}.bin").read_bytes() == keys + last
    part = {"rows": 7, "rows_per_unit": 6, "digest": files.digest(last)}
    plan = {"format": 2, "meta": {"a": 1}, "dim": 3, "dtype": "float32", "ranges": [part]}
    assert (tmp_path / "plan.json").read_bytes() == plans.seal(plan)
    assert [json.loads((tmp_path / f"part-0000{i}.json").read_text())["keys"] for i in (0, 1)] == digests


def test_a_store_of_a_hundred_million_rows_opens_in_no_time(tmp_path):
    """All its keys are zero, in a sparse file: what is opened is the plan and 16 bytes per unit."""
    rows, step = 100_000_000, 1024
    units = -(-rows // step)
    whole, rest = files.digest(bytes(16 * step)), files.digest(bytes(16 * (rows - (units - 1) * step)))
    digests = bytes.fromhex(whole) * (units - 1) + bytes.fromhex(rest)
    part = {"rows": rows, "rows_per_unit": step, "digest": files.digest(digests)}
    with open(tmp_path / f"keys-{part['digest']}.bin", "wb") as file:
        file.seek(16 * rows)
        file.write(digests)
    plan = {"format": 2, "meta": {}, "dim": 8, "dtype": "int1", "ranges": [part]}
    (tmp_path / "plan.json").write_bytes(plans.seal(plan))
    tracemalloc.start()
    start = time.perf_counter()
    store = GradientFeatures.open(tmp_path)
    keys = store.unit_keys(units - 1)
    assert time.perf_counter() - start < 1 and tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert (len(store), store.units, len(keys)) == (rows, units, rows - (units - 1) * step)
    store.write_unit(units - 1, torch.ones(len(keys), 8))  # and a unit at its end is written and read
    assert GradientFeatures.open(tmp_path).info(units - 1) == {}


def test_default_unit_size(tmp_path):
    assert create(tmp_path / "a", n=300, per_unit=None).units == 19  # 16 rows at least
    many = [f"{i:032x}" for i in range(64 * 20)]
    assert create(tmp_path / "b", keys=many, per_unit=None).units == 64
    more = [f"{i:032x}" for i in range(6000)]  # 94 rows a unit, if their features fit into 32 MiB
    assert create(tmp_path / "c", keys=more, per_unit=None).units == 64
    assert create(tmp_path / "d", keys=more, dim=1 << 17, per_unit=None).units == -(-6000 // 64)
    assert create(tmp_path / "e", keys=more, dim=(1 << 17) + 1, per_unit=None).units == -(-6000 // 63)
    assert create(tmp_path / "f", keys=more, dim=1 << 20, per_unit=None).units == 6000 // 16


def test_a_growing_pool_adds_units_and_keeps_the_others(tmp_path):
    fill(create(tmp_path, n=10))
    before = {p.name: p.read_bytes() for p in tmp_path.glob("part-*")}
    store = create(tmp_path, keys=[*KEYS[12:14], *KEYS[3:9], *KEYS[20:26]])  # some gone, some new, another order
    assert store.missing_units() == [2, 3] and store.unit_keys(2) == [*KEYS[12:14], *KEYS[20:24]]
    with pytest.raises(DataError, match=r"2 of 4 units are missing \(the first: 2\); run the extraction again"):
        list(store.iter_blocks())
    fill(store)
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    assert store.rows().keys == [*KEYS[:10], *KEYS[12:14], *KEYS[20:26]] and len(store) == 18


def test_nothing_to_store(tmp_path):
    store = GradientFeatures.create_or_open(tmp_path, meta={}, dim=4, keys=[])
    assert store.missing_units() == [] == list(store.iter_blocks()) and len(store) == 0
    assert store.take([]).shape == (0, 4) and store.rows().norms.shape == (0,) and store.verify() == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"meta": {**META, "projector": {"dim": 8, "seed": 1}}}, "projector.seed was 0 and is now 1"),
        ({"meta": {**META, "model": "def"}}, 'model was "abc" and is now "def"'),
        ({"meta": {**META, "layers": [1, 2.0]}}, r"layers was \[1, 2\] and is now \[1, 2.0\]"),
        ({"meta": {"model": "abc", "layers": [1, 2]}}, r"projector was \{.*\} and is now \(absent\)"),
        ({"meta": {**META, "new": None}}, r"new was \(absent\) and is now null"),
        ({"dim": 9}, "dim was 8 and is now 9"),
        ({"dtype": "int8"}, 'dtype was "float32" and is now "int8"'),
    ],
)
def test_another_origin_is_refused_by_name(tmp_path, change, text):
    fill(create(tmp_path))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(DataError, match=f"made differently: {text}; go back to the old setting, or write to another"):
        create(tmp_path, **change)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_equal_json_is_the_same_origin(tmp_path):
    create(tmp_path, meta={"a": (1, 2), "b": {"c": 1.5}})
    create(tmp_path, meta={"b": {"c": 1.5}, "a": [1, 2]})


def test_wrong_arguments(tmp_path):
    with pytest.raises(UsageError, match="unknown feature dtype 'float61'; did you mean 'float16'"):
        create(tmp_path, dtype="float61")
    for keys, text in ((["xyz"], "32 hex"), ([KEYS[0], KEYS[0]], "appears twice"), ([KEYS[0].upper()], "32 hex")):
        with pytest.raises(ValueError, match=text):
            create(tmp_path, keys=keys)
    with pytest.raises(ValueError, match="dim >= 1"):
        create(tmp_path, dim=0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="contains no gradient features"):
        GradientFeatures.open(tmp_path)
    store = create(tmp_path)
    for x in (torch.zeros(5, 8), torch.zeros(6, 7), torch.zeros(6, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"needs float features \[6, 8\]"):
            store.write_unit(0, x)
    for status in (["ok"] * 5, ["good"] * 6):
        with pytest.raises(ValueError, match="needs 6 statuses"):
            store.write_unit(0, torch.zeros(6, 8), status)
    with pytest.raises(DataError, match=f"has no row {key(299)}"):
        store.take([key(299)])


def test_a_store_of_another_format_is_refused(tmp_path):
    create(tmp_path)
    body = json.loads((tmp_path / "plan.json").read_bytes())
    del body["digest"]
    body["format"] = 3
    files.write_json(tmp_path / "plan.json", {**body, "digest": files.digest(files.json_bytes(body))})
    for call in (GradientFeatures.open, create):
        with pytest.raises(DataError, match="has format 3, written by another version"):
            call(tmp_path)


# ---------------------------------------------------------------- damage


def test_verification_can_be_left_out(tmp_path):
    fill(create(tmp_path, n=6))
    part = tmp_path / "part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    assert len(list(GradientFeatures.open(tmp_path, verify=False).iter_blocks())) == 1
    with pytest.raises(DataError, match="digest does not match"):
        list(GradientFeatures.open(tmp_path).iter_blocks())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux alone says how much of a map is in memory")
@pytest.mark.parametrize("verify", [True, False])
def test_reading_holds_a_block_in_memory(quick, verify):
    """The pages of rows that were read go back, a block at a time: a store may be larger than the memory."""
    rows, dim, per_block = 4096, 1024, 256  # 16 MiB in one unit, 1 MiB a block
    store = create(quick, keys=[f"{i:032x}" for i in range(rows)], dim=dim, per_unit=rows)
    store.write_unit(0, torch.randn(rows, dim))

    def held() -> int:
        """Bytes of the unit that are in memory."""
        part = Path("/proc/self/smaps").read_text().split("part-00000.safetensors")
        return sum(int(text.split("Rss:")[1].split()[0]) for text in part[1:]) * 1024

    seen = [held() for _ in GradientFeatures.open(quick, verify=verify).iter_blocks(per_block)]
    assert len(seen) == 16 and max(seen) <= 3 << 20, seen


# ---------------------------------------------------------------- against a model


class StoreMachine(RuleBasedStateMachine):
    """A store beside a dict: plan, write, lose, damage, repair, reopen in any order."""

    @initialize(dtype=st.sampled_from(sorted(ENCODINGS)))
    def start(self, dtype):
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        self.dtype, self.planned, self.model = dtype, [], {}
        self.store = None
        self.open(3)

    def teardown(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule(n=st.integers(0, 12))
    def open(self, n):
        """The same or a grown pool."""
        self.store = create(self.folder, dtype=self.dtype, per_unit=3, keys=KEYS[:n] or KEYS[:1])
        self.planned += [k for k in KEYS[:n] or KEYS[:1] if k not in self.planned]

    def units(self):
        return [self.store.unit_keys(unit) for unit in range(self.store.units)]

    @rule(which=st.integers(0, 20))
    def write(self, which):
        unit = which % self.store.units
        keys = self.store.unit_keys(unit)
        self.store.write_unit(unit, rows_of(keys), info={"n": len(keys)})
        self.model |= dict.fromkeys(keys, True)

    @precondition(lambda self: self.model)
    @rule(
        which=st.integers(0, 20),
        position=st.integers(0, 10**6),
        bit=st.integers(0, 7),
        payload=st.booleans(),
        by_reader=st.booleans(),
    )
    def damage(self, which, position, bit, payload, by_reader):
        present = [unit for unit, keys in enumerate(self.units()) if keys[0] in self.model]
        unit = present[which % len(present)]
        path = self.folder / f"part-{unit:05d}.{'safetensors' if payload else 'json'}"
        data = bytearray(path.read_bytes())
        data[position % len(data)] ^= 1 << bit
        path.write_bytes(data)
        if by_reader:
            with pytest.raises(DataError, match=f"unit {unit} is damaged"):
                GradientFeatures.open(self.folder).take(self.store.unit_keys(unit))
        else:
            assert [u for u, _ in self.store.verify()] == [unit]
        self.store = GradientFeatures.open(self.folder)
        for k in self.store.unit_keys(unit):
            del self.model[k]

    @invariant()
    def agrees(self):
        if self.store is None:
            return
        assert [k for keys in self.units() for k in keys] == self.planned
        missing = [unit for unit, keys in enumerate(self.units()) if keys[0] not in self.model]
        assert self.store.missing_units() == missing
        rows = self.store.take(list(self.model))
        if self.dtype.startswith("float"):
            want = unit_rows(rows_of(list(self.model))) if self.model else rows
            torch.testing.assert_close(rows, want, rtol=0, atol=1e-3)
        if not missing:
            assert self.store.rows().keys == self.planned
        assert not list(self.folder.glob(".tmp-*"))


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestStoreMachine = StoreMachine.TestCase


@given(st.integers(1, 40), st.integers(0, 2**31), st.sampled_from(sorted(ENCODINGS)))
def test_encoding_is_within_half_a_level(dim, seed, dtype):
    x = np.random.default_rng(seed).standard_normal((5, dim), dtype=np.float32)
    x[0] = 0
    unit, norms = normalize(x)
    np.testing.assert_allclose(norms, np.linalg.norm(x.astype(np.float64), axis=1), rtol=1e-5)
    stored, scale = encode(unit, dtype)
    read = decode(stored, scale, dtype, dim).numpy()
    assert not read[0].any()
    np.testing.assert_allclose(np.linalg.norm(read[1:], axis=1), 1, rtol=1e-5)
    if levels := ENCODINGS[dtype].levels:
        largest = np.abs(unit).max(1, keepdims=True)
        if dtype != "int1":  # before the second normalisation the error is half a step at most
            q = np.rint(unit[1:] / largest[1:] * levels)
            np.testing.assert_allclose(read[1:], q / np.linalg.norm(q, axis=1, keepdims=True), rtol=1e-5, atol=1e-7)
