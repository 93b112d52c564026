"""The examination of a machine: what each finding is made of, and that nothing is left behind."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from pipelines import doctor
from pipelines.cli.app import main
from pipelines.doctor import Check, examine, show

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "_gflops", lambda dtype, seconds, n=512: {"float32": 50.0, "bfloat16": 10.0}[dtype])


def find(checks, name):
    return next(check for check in checks if check.name == name)


def test_a_healthy_machine(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checks = examine(tmp_path / "runs" / "deep")
    assert list(tmp_path.iterdir()) == []
    assert {check.state for check in checks} <= {"ok", "warn", "fail"}
    assert all(check.advice for check in checks if check.state != "ok")
    assert find(checks, "torch").state == "ok" and find(checks, "safe writing").state in ("ok", "warn")
    assert "50 GFLOP/s" in find(checks, "float32 speed").found
    assert (
        find(checks, "bfloat16 speed").state == "warn" and "5.0 times slower" in find(checks, "bfloat16 speed").advice
    )
    assert "HF_HUB_OFFLINE is set" in find(checks, "model hub").found


def test_speed_is_measured():
    assert doctor._gflops("float32", 0.01, n=64) > 0.01


def test_versions_against_what_is_declared():
    """The table is what pyproject.toml asks for and constraints.txt pins."""
    asked = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in asked)
    pinned = dict(
        line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for name, (old, new) in doctor.TESTED.items():
        assert oldest[name] == old and pinned[name] == new, name


@pytest.mark.parametrize(
    "version, state",
    [
        ("2.9.1", "fail"),
        ("2.10.0", "ok"),
        ("2.13.0+cpu", "ok"),
        ("2.13.5", "ok"),
        ("2.14.0.dev1", "warn"),
        ("3.0", "warn"),
    ],
)
def test_old_and_new_versions(monkeypatch, version, state):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: version)
    assert doctor._package("torch").state == state


def test_a_missing_package(monkeypatch):
    def missing(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    check = doctor._package("torch")
    assert check.state == "fail" and check.advice == "pip install 'torch>=2.10'"


def test_a_broken_installation_is_a_finding():
    def broken():
        raise ImportError("libfoo.so: cannot open shared object file")

    assert doctor._guarded("speed", broken) == [
        Check(
            "speed",
            "fail",
            "ImportError: libfoo.so: cannot open shared object file",
            "fix this first; see the versions above",
        )
    ]


def test_places_where_runs_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert doctor._disk(tmp_path / "file" / "runs")[0].state == "fail"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 5 * 2**30})())
    assert doctor._disk(tmp_path)[0].state == "warn"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 2**20})())
    assert doctor._disk(tmp_path)[0].state == "fail"

    def refuse(path, data):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(doctor.files, "write_bytes", refuse)
    check = find(doctor._disk(tmp_path), "safe writing")
    assert check.state == "fail" and "Read-only" in check.found and "--out" in check.advice
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_names_of_people_stay_out(quick, tmp_path, monkeypatch, capsys):
    home = tmp_path / "alice"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alice")
    show(examine(home / "runs"), as_json=True)
    assert "alice" not in capsys.readouterr().out


def test_table_and_json_and_exit_code(monkeypatch, capsys, tmp_path):
    checks = [Check("a", "ok", "fine"), Check("b", "warn", "odd", "do this"), Check("c\x1b", "fail", "bad", "fix it")]
    monkeypatch.setattr(doctor, "examine", lambda out: checks)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["doctor", "--out", str(tmp_path)]) == 4
    text = capsys.readouterr().out
    assert "do this" in text and "1 to fix, 1 warning" in text
    assert main(["doctor", "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and found["checks"][1] == {
        "name": "b",
        "state": "warn",
        "found": "odd",
        "advice": "do this",
    }
    checks.pop()
    assert main(["doctor"]) == 0 and "ready, 1 warning" in capsys.readouterr().out
