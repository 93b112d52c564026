"""Generated code can compute and nothing else."""

import sys
import time

import pytest

from pipelines.training.accuracy import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the filter is the Linux kernel's")

REFUSED = {
    "network": "import socket; socket.socket()",
    "process": "import subprocess; subprocess.run(['true'])",
    "fork": "import os; os.fork()",
    "signal": "import os; os.kill(os.getppid(), 9)",
    "write": "open('x', 'w')",
    "append": "open(FILE, 'a')",
    "remove": "import os; os.unlink(FILE)",
    "rename": "import os; os.rename(FILE, FILE + '2')",
    "folder": "import os; os.mkdir('y')",
    "mode": "import os; os.chmod(FILE, 0o777)",
    "shell": "import os; assert os.system('true') == 0",
    "truncate": "import os; os.truncate(FILE, 0)",
    "link": "import os; os.symlink(FILE, 'z')",
    "memory": "x = bytearray(4 << 30)",
    "execute": "import os; os.execv('/bin/true', ['true'])",
}


def run(code, tests=("assert True",), seconds=20.0):
    return sandbox.outcome(code, list(tests), seconds=seconds, megabytes=512)


@pytest.mark.parametrize("what", REFUSED)
def test_what_code_may_not_do_fails(what, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("whole")
    assert run(f"FILE = {str(kept)!r}\n{REFUSED[what]}") == "failed"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and kept.read_text() == "whole"


def test_code_is_judged_by_its_tests():
    code = "import collections, heapq, itertools, json, math, re\ndef double(x): return 2 * x"
    assert run(code, ["assert double(2) == 4", "assert double(-1) == -2"]) == "passed"
    assert run(code, ["assert double(2) == 4", "assert double(2) == 5"]) == "failed"
    assert run("def double(x: return", ["assert double(2) == 4"]) == "failed"
    assert run("if __name__ == '__main__':\n    raise SystemExit", ["assert True"]) == "passed"


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit()"])
def test_code_that_ends_the_process_has_not_passed(code):
    assert run(code) == "failed"


def test_time_is_limited():
    begin = time.monotonic()
    assert run("import time; time.sleep(600)", seconds=0.5) == "timeout"
    assert time.monotonic() - begin < 60
