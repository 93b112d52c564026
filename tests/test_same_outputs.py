"""The comparison of two folders of outputs: what it lets pass, and what it must see."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import same_outputs, structure

SAME = [
    ("a/x.json", '{"x": 1, "seconds": 2.5}', '{"x": 1, "seconds": 3}', "same"),
    ("a/x.json", '{"x": 1}', '{"x": 1.0}', "different"),
    ("a/x.json", '{"x": 1}', '{"x": 1, "y": 2}', "different"),
    ("a/x.json", '{"method": "a row"}', '{"method": "per row"}', "different"),
    ("a/x.json", '{"notes": ["2 a row"]}', '{"notes": ["2 per row"]}', "words"),
    ("a/x.json", '{"notes": ["2 a row"]}', '{"notes": ["3 per row"]}', "different"),
    ("a/x.json", '{"x": {"detail": "a"}, "y": 1}', '{"x": {"detail": "b"}, "y": 2}', "different"),
    ("a/x.jsonl", '{"time": "2026"}\n{"y": 1}', '{"time": "2027"}\n{"y": 1}', "same"),
    ("a/x.jsonl", '{"y": 1}', '{"y": 1}\n{"y": 1}', "different"),
    ("a/provenance.json", '{"code": {"digest": "a"}, "seed": 0}', '{"code": {"digest": "b"}, "seed": 0}', "same"),
    ("a/other.json", '{"code": "a"}', '{"code": "b"}', "different"),
    ("a/seals.jsonl", '{"name": "b", "sum": "1"}\n{"name": "c"}', '{"name": "c"}\n{"name": "b"}', "same"),
    ("a/run.yaml", "# one\nx: 1\n", "# two\nx: 1\n", "same"),
    ("a/run.yaml", "x: 1\n", "x: 2\n", "different"),
    ("a/run.yaml", "x: 1\n", "x: 1\ny: null\n", "same"),
    ("a/run.yaml", "x: 1\n", "x: 1\ny: 2\n", "different"),
    ("a/run.yaml", "x: 1\ny: null\n", "x: 1\n", "different"),
    ("shown/a.err", "7 rows in 1.2 s, 6 rows/s\n", "7 rows in  12.0 s, 0.6 rows/s\n", "same"),
    ("shown/a.err", "read 7 rows\n", "7 rows were read\n", "words"),
    ("shown/a.err", "loss 5.25\n", "loss 5.24\n", "different"),
    ("a/report.html", "<p>30 November 2026, 09:41 UTC</p>", "<p>1 December 2026, 10:00 UTC</p>", "same"),
    ("a/scores.parquet", "PAR1", "PAR2", "different"),
]


@pytest.mark.parametrize(("name", "before", "after", "kind"), SAME)
def test_what_may_differ_and_what_may_not(tmp_path, capsys, name, before, after, kind):
    for side, text in (("a", before), ("b", after)):
        (tmp_path / side / name).parent.mkdir(parents=True)
        (tmp_path / side / name).write_text(text)
    assert same_outputs.compare_files(name, tmp_path / "a" / name, tmp_path / "b" / name)[0] == kind
    assert same_outputs.compare(tmp_path / "a", tmp_path / "b") == (kind == "different")
    assert (name in capsys.readouterr().out) == (kind in ("different", "words"))


def test_arrays_and_missing_files_are_named(tmp_path, capsys):
    for side, last in (("a", 3.0), ("b", 3.5)):
        (tmp_path / side).mkdir()
        save_file({"x": np.array([1.0, 2.0]), "y": np.array([1.0, last])}, tmp_path / side / "x.safetensors")
        np.savez(tmp_path / side / "x.npz", z=np.array([1, int(2 * last)]))
    (tmp_path / "b" / "more").write_text("")
    assert same_outputs.compare(tmp_path / "a", tmp_path / "b") == 1
    said = capsys.readouterr().out
    assert "array 'y' of 2: 1 of 2 entries, by up to 0.5" in said and "array 'z' of 1: 1 of 2 entries" in said
    assert f"more: only in {tmp_path / 'b'}" in said
    assert same_outputs.compare(tmp_path / "a", tmp_path / "a") == 0
    (tmp_path / "c" / "run" / "inputs").mkdir(parents=True)
    (tmp_path / "c" / "run" / "inputs" / "tokens-pool-0a.bin").write_bytes(b"x")
    (tmp_path / "d").mkdir()
    for side in ("c", "d"):  # what saves work is no result, on either side
        (tmp_path / side / "x.json").write_text("{}")
    assert same_outputs.compare(tmp_path / "c", tmp_path / "d") == 0
    assert same_outputs.compare(tmp_path / "d", tmp_path / "c") == 0


def test_twelve_commands_that_compute():
    names = [command.name for command in same_outputs.COMMANDS]
    assert names.index("diagnose") == 11 and len(set(names)) == len(names)
    assert [c.name for c in same_outputs.chosen("train-order")] == ["order-validate", "order-search", "train-order"]


def test_structure_sees_rooms_floors_cycles_and_lazy_imports(tmp_path):
    files = {
        "__init__.py": "from p.top import x\n",
        "top.py": "from p import a\n",
        "a/__init__.py": "",
        "a/one.py": "from p.b import two\nfrom .short import y\n",
        "a/short.py": "def f():\n    from ..b.two import z\n",
        "b/two.py": "def f():\n    import p.a.one\n",
        "leaf.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.types import x\n" + "\n" * 400,
        "types.py": "import p.leaf\n",
    }
    for name, text in files.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text(text)
    found = structure.facts(structure.read(tmp_path, "p"))
    assert (found["folders"], found["root files"], found["floors"]) == (2, 3, 2)
    assert found["room cycles"] == ["a/ -> b/ -> a/"]
    assert found["file cycles"] == ["a/one.py -> b/two.py -lazy-> a/one.py", "leaf.py -types-> types.py -> leaf.py"]
    assert found["over 400 lines"] == ["leaf.py"] and found["lazy arrows"] == 2
    assert found["rooms"]["top.py"] == {"floor": 2, "imports": ["a/"]}
    assert json.dumps(found)
