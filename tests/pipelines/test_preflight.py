"""Mistakes that need no model are told without torch: tried in a process of its own."""

import subprocess
import sys

import pytest

from tests.tiny import write_rows

CASES = {
    "a pool": (["select", "--train", "none.jsonl", "--method", "random", "--model", "m"], 3, "none.jsonl"),
    "a target": (["select", "--train", "a.jsonl", "--target", "none.jsonl", "--model", "m"], 3, "none.jsonl"),
    "a budget": (["select", "--train", "a.jsonl", "--method", "random", "--budget", "5%%", "--model", "m"], 2, "'5%%'"),
    "a folder that is a file": (["train", "--data", "a.jsonl", "--model", "m", "--out", "a.jsonl/run"], 2, "a file"),
    "a model": (["train", "--data", "a.jsonl", "--model", "./nowhere"], 2, "./nowhere: no such"),
    "an adapter": (["evaluate", "--data", "a.jsonl", "--model", "m", "--adapter", "nowhere"], 2, "nowhere"),
    "checkpoints": (["select", "--train", "a.jsonl", "--target", "a.jsonl", "--model", "m", "--checkpoints", "no"],
                    2, "no"),
    "a method": (["select", "--train", "a.jsonl", "--method", "lss", "--model", "m"], 2, "lss"),
    "a setting": (["select", "--train", "a.jsonl", "--set", "budgett=3", "--model", "m"], 2, "budgett"),
    "a test file": (["audit", "--selected", "a.jsonl", "--pool", "a.jsonl", "--test", "no.jsonl", "--model", "m"],
                    3, "no.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_told_before_torch_is_imported(case, tmp_path):
    arguments, code, words = CASES[case]
    write_rows(tmp_path / "a.jsonl", 3)
    program = "import sys; from pipelines.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(code), "False"], done.stderr
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]  # nothing was made


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """As root every folder can be written to, so the question itself is answered otherwise."""
    from datatools import EnvironmentProblem
    from pipelines import preflight

    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(EnvironmentProblem, match="cannot be written to; name another folder"):
        preflight._writable(tmp_path / "a" / "b")
