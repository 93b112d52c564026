"""With what a run was made: code, commit, versions, memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from datatools import DataError
from pipelines.runs import provenance
from pipelines.runs.folder import Run
from tests.pipelines.runs.common import config

REPOSITORY = Path(__file__).resolve().parents[3]


def test_changed_code_is_refused_and_a_changed_library_is_said(monkeypatch, capsys):
    with Run("r", config(), "select"):
        pass
    monkeypatch.setattr(provenance, "code_digest", lambda: "0" * 32)
    with pytest.raises(DataError, match=r"code.digest was .* --accept-change code"), Run("r", config(), "select"):
        pass
    with Run("r", config(accept_change=["code"]), "select") as run:
        assert run.changed == ["code.digest"]
    monkeypatch.setattr(provenance, "versions", lambda: {"torch": "99"})
    with Run("r", config(), "select") as run:
        assert run.changed == ["versions.torch"]
    assert "warning: torch is 99 and was" in capsys.readouterr().err


def test_the_code_digest_sees_every_byte_of_what_makes_results(tmp_path, monkeypatch):
    """A file of any kind counts, unless it is listed as displaying only."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    for name in ("optim/x.py", "datatools/order/table.json", "pipelines/rows/words.txt", "pipelines/cli/flags.py"):
        write(name, "a = 1\n")
    seen = [provenance.code_digest()]
    for name in ("optim/x.py", "datatools/order/table.json", "pipelines/rows/words.txt", "pipelines/new/kernel.cu"):
        write(name, "a = 2\n")
        seen.append(provenance.code_digest())
    (tmp_path / "optim/x.py").rename(tmp_path / "optim/y.py")
    seen.append(provenance.code_digest())
    assert len(set(seen)) == 6
    for name in (
        "pipelines/cli/flags.py", "pipelines/report/page.py", "pipelines/report/templates/page.html",
        "pipelines/demo_data/pool.jsonl", "pipelines/README.md", "optim/__pycache__/x.cpython-312.pyc",
        "optim/.x.py.swp", "tests/x.py",
    ):  # fmt: skip
        write(name, "otherwise\n")
        assert provenance.code_digest() == seen[-1], name


def test_every_listed_exception_is_there():
    """A file that was moved would be listed in vain."""
    assert [place for place in provenance.SHOWING if not (provenance.ROOT / place).exists()] == []


def test_git_commit(tmp_path):
    commit = "0123456789" * 4
    git = tmp_path / ".git"
    assert provenance.git_commit(tmp_path) is None
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text(f"{commit}\n")
    assert provenance.git_commit(tmp_path) == commit
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert provenance.git_commit(tmp_path) is None
    (git / "packed-refs").write_text(f"# pack-refs\n{commit[::-1]} refs/heads/main\n")
    assert provenance.git_commit(tmp_path) == commit[::-1]
    (git / "refs/heads/main").write_text(f"{commit}\n")
    assert provenance.git_commit(tmp_path) == commit
    worktree = tmp_path / "tree"
    (git / "worktrees/tree").mkdir(parents=True)
    worktree.mkdir()
    (worktree / ".git").write_text("gitdir: ../.git/worktrees/tree\n")
    (git / "worktrees/tree/HEAD").write_text("ref: refs/heads/main\n")
    (git / "worktrees/tree/commondir").write_text("../..\n")
    assert provenance.git_commit(worktree) == commit


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the peak is what getrusage says")
def test_the_peak_of_memory_is_the_process_s_own():
    """getrusage's begins with that of the process which started this one."""
    child = "from pipelines.runs.provenance import peak_rss_bytes; print(peak_rss_bytes())"
    parent = "import subprocess, sys; held = bytearray(400 << 20); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    found = subprocess.run([sys.executable, "-c", parent, child], cwd=REPOSITORY, capture_output=True, check=True)
    assert 1 << 22 < int(found.stdout) < 400 << 20
