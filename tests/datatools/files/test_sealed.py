"""Sealed files and order files under every flip and truncation, and under what somebody might send."""

import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datatools import DataError, EnvironmentProblem, Order, files
from datatools.files import sealed

GOOD = Order((("a", "b"), ("c",)), (1, 0, 1), {"learning_rate": 0.5, "warm_up": [["d"]]})


def damaged(raw: bytes) -> list[bytes]:
    """The bytes with one bit flipped at many places, and cut at as many."""
    places = sorted({*range(min(len(raw), 64)), *range(0, len(raw), max(1, len(raw) // 400)), len(raw) - 1})
    flipped = [raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :] for at in places]
    return [*flipped, *(raw[:at] for at in places)]


def test_an_order_is_read_as_it_was_written_or_refused(tmp_path: Path) -> None:
    GOOD.save(tmp_path / "o.npz")
    assert (found := Order.load(tmp_path / "o.npz")) == GOOD and found.recipe == GOOD.recipe
    raw, refused = (tmp_path / "o.npz").read_bytes(), 0
    for bad in damaged(raw):
        (tmp_path / "o.npz").write_bytes(bad)
        try:
            again = Order.load(tmp_path / "o.npz")
            assert again == GOOD and again.recipe == GOOD.recipe
        except DataError as error:
            refused += 1
            assert "o.npz" in str(error) and "\n" not in str(error)
    assert refused > 0.6 * len(damaged(raw)), "the rest are times and names that nobody reads"


def test_sealed_values_are_read_as_they_were_written_or_damaged(tmp_path: Path) -> None:
    value = {"loss": 0.1 + 0.2, "names": ["ä", "b"], "count": 3, "none": None, "inner": {"7": [1e-300, -0.0]}}
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(2, dtype=torch.int64), "c": torch.zeros(0, 4),
               "d": torch.ones(5, dtype=torch.bfloat16), "e": torch.tensor([True, False]),
               "f": torch.arange(6.0).reshape(2, 3).T}  # fmt: skip
    sealed.write_json(tmp_path / "v.json", value)
    sealed.write_tensors(tmp_path / "t.safetensors", tensors)
    assert sealed.read_json(tmp_path / "v.json") == value
    read = sealed.read_tensors(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())
    readers: dict[str, Callable[[Path], object]] = {"v.json": sealed.read_json, "t.safetensors": sealed.read_tensors}
    for name, reader in readers.items():
        raw, whole = (tmp_path / name).read_bytes(), str(reader(tmp_path / name))
        for bad in damaged(raw):
            (tmp_path / name).write_bytes(bad)
            try:
                assert str(reader(tmp_path / name)) == whole, "a space, or the padding"
            except sealed.Damaged as error:
                assert name in str(error) and "\n" not in str(error)
    with pytest.raises(DataError, match="No such file"):
        sealed.read_json(tmp_path / "none.json")


def test_what_has_no_seal_or_was_edited_is_named(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    files.write_json(path, {"loss": 1.0})
    with pytest.raises(sealed.Damaged, match="v.json has no seal: it was edited, or an older version"):
        sealed.read_json(path)
    sealed.write_json(path, {"loss": 1.0})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loss": 0.5}))
    with pytest.raises(sealed.Damaged, match="v.json is damaged or was edited"):
        sealed.read_json(path)
    for text in ("[1]", '"x"', "3", "NaN", '{"a": NaN, "seal": "0"}', '{"a": 1e999, "seal": "0"}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(sealed.Damaged):
            sealed.read_json(path)


def members(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def first_format(**changes: object) -> bytes:
    """An order as version 1 wrote it, which has neither digest nor recipe."""
    kept = {"format": np.int64(1), "ids": np.array(["a", "b", "c"]), "sizes": np.array([2, 1]),
            "sequence": np.array([1, 0])}  # fmt: skip
    return members(**kept | changes)


def test_orders_of_the_first_format_are_read(tmp_path: Path) -> None:
    (tmp_path / "o.npz").write_bytes(first_format())
    found = Order.load(tmp_path / "o.npz")
    assert found == Order((("a", "b"), ("c",)), (1, 0)) and found.recipe is None


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"sequence": np.array([1.0, 0.0])}, "lists of whole numbers"),
        ({"sequence": np.array([0.0, np.nan])}, "lists of whole numbers"),
        ({"sequence": np.array([[1, 0]])}, "lists of whole numbers"),
        ({"sequence": np.int64(0)}, "lists of whole numbers"),
        ({"sequence": np.array([], dtype=np.int64)}, "its sequence is empty"),
        ({"sequence": np.array([0, 2])}, "step 1 refers to batch 2"),
        ({"sequence": np.array([-1])}, "step 0 refers to batch -1"),
        ({"sequence": np.array(["1"])}, "lists of whole numbers"),
        ({"sizes": np.array([3, 0])}, "batch 1 has no rows"),
        ({"sizes": np.array([4, -1])}, "3 ids do not match the sizes"),
        ({"sizes": np.array([2**62, 2**62, 2**62, 2**62 + 3])}, "3 ids do not match the sizes"),
        ({"sizes": np.array([2.0, 1.0])}, "lists of whole numbers"),
        ({"ids": np.array([1, 2, 3])}, "ids must be a list of strings"),
        ({"ids": np.array([["a"], ["b"], ["c"]])}, "ids must be a list of strings"),
        ({"ids": np.array([b"a", b"b", b"c"])}, "expected numbers or text"),
        (
            {"ids": np.array([], dtype=str), "sizes": np.array([], dtype=int)},
            "expected numbers or text|refers to batch",
        ),
        ({"format": np.int64(99)}, "format 99, this version reads 2"),
        ({"format": np.array([1, 2])}, "not an order"),
        ({"format": np.int64(2)}, "lacks 'digest'"),
    ],
)
def test_an_order_that_cannot_be_is_refused_in_a_line(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    (tmp_path / "o.npz").write_bytes(first_format(**changes))
    with pytest.raises(DataError, match=said) as caught:
        Order.load(tmp_path / "o.npz")
    assert "o.npz" in str(caught.value) and "\n" not in str(caught.value)


def header(shape: str, descr: str = "<i8") -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def npz(compression: int, **raw: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in raw.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


STORED = zipfile.ZIP_STORED


@pytest.mark.parametrize(
    "raw, said",
    [
        (npz(zipfile.ZIP_DEFLATED, format=header("()") + bytes(8), ids=bytes(1 << 24)), "'ids.npy'|is compressed"),
        (
            npz(STORED, format=header("(1000000000000,)") + bytes(8)),
            r"declares shape \(1000000000000,\) of int64, but holds 8",
        ),
        (npz(STORED, format=header("(10**9,)") + bytes(8)), "not an order"),
        (npz(STORED, ids=header("(1000000000,)", "<U0")), "expected numbers or text"),
        (npz(STORED, ids=header("(-1,)") + bytes(8)), "not an order"),
        (npz(STORED, ids=header("(2,)", "|O") + b"cos\nsystem\n(S'true'\ntR."), "expected numbers or text"),
        (npz(STORED, **{f"m{i}": header("()") + bytes(8) for i in range(65)}), "65 members"),
        (b"", "not an order"),
        (b"PK\x05\x06" + bytes(18), "lacks 'format'"),
        (b"\x93NUMPY\x01\x00", "not an order"),
        (b'{"sequence": [0, 1]}', "not an order"),
    ],
)
def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path, raw: bytes, said: str) -> None:
    (tmp_path / "o.npz").write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(DataError, match=said) as caught:
        Order.load(tmp_path / "o.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(raw) + 4_000_000
    assert "\n" not in str(caught.value)


def test_a_long_id_does_not_multiply(tmp_path: Path) -> None:
    Order((("x" * 100_000, *map(str, range(1000))),), (0,)).save(tmp_path / "o.npz")
    assert (tmp_path / "o.npz").stat().st_size < 200_000, "an array of texts takes 400 MB"


def test_a_full_disk_while_tensors_are_written_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*t.safetensors: No space left on device; free some"):
        sealed.write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(4)})
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
