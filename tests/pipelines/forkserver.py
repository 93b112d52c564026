"""A process that has imported everything once and forks a child for each command line it is sent.

A child starts in milliseconds instead of seconds, so that a test can afford to kill ten of them. Requests and answers
are lines of JSON on stdin and stdout:

    {"argv": ["select", ...], "env": {}, "cwd": "/x", "kill_after": 0.7, "kill_after_cpu": 60,
     "file_limit": 4096, "die": ["pipelines.training.trainer:mark_complete", 2, "before"],
     "fault": {"within": "/", "kind": "write", "nth": 3}}
    {"code": 0, "stdout": "...", "stderr": "...", "seconds": 0.61, "cpu": 0.5, "rows": 120, "calls": {"write": 17}}

`kill_after`: SIGKILL after this many seconds. `kill_after_cpu`: after this much processor time, and `kill_after_idle`
after this many seconds without processor time, so that a busy machine is not mistaken for a stuck command.
`file_limit`: RLIMIT_FSIZE, which acts like a full disk. `die`: SIGKILL at the n-th call of a function, before or after
it. `rows`: the number of rows whose gradients the child has computed.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def suicidal(where: str, count: int, when: str) -> None:
    """Let the `count`-th call of "module:Class.function" be the last thing that this process does."""
    module, _, path = where.partition(":")
    owner: Any = import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    inner, calls = getattr(owner, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapper)


def child(request: dict[str, Any], scratch: Path) -> int:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(scratch / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.update(request.get("env", {}))
    os.chdir(request.get("cwd", "."))
    import datatools.features.extract
    from pipelines.cli.app import main

    rows, inner = 0, datatools.features.extract.batch_rows

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        result = inner(*args, **kwargs)
        rows += len(result[1])
        return result

    datatools.features.extract.batch_rows = counted
    sys.argv = ["datatools", *request["argv"]]
    if "die" in request:
        suicidal(*request["die"])
    if "file_limit" in request:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], before[1]))
    faults = import_module("tests.attack.faults").install(request["fault"]) if "fault" in request else None
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "file_limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (scratch / "rows").write_text(str(rows))
    if faults:
        (scratch / "calls").write_text(json.dumps(faults.calls))
    return code


def _cpu_seconds(pid: int) -> float:
    """Processor time of a child that is not waited for yet, and of those that it has waited for itself."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def run(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        scratch, started = Path(name), time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = child(request, scratch)
            finally:
                os._exit(code)
        deadline = started + request.get("kill_after", 300)
        idle, most = request.get("kill_after_idle", 1e9), request.get("kill_after_cpu", 1e9)
        used, looked, busy = 0.0, started, started
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            now = time.monotonic()
            if now >= looked + 0.5:
                before, used, looked = used, _cpu_seconds(pid), now
                busy = now if used > before else busy
            if now >= deadline or used >= most or now >= busy + idle:
                os.kill(pid, signal.SIGKILL)
                _, status, usage = os.wait4(pid, 0)
                break
            time.sleep(0.002)
        read = {p.name: p.read_text(errors="replace") for p in scratch.iterdir()}
        return {
            "code": os.waitstatus_to_exitcode(status),
            "stdout": read.get("stdout", ""),
            "stderr": read.get("stderr", ""),
            "seconds": time.monotonic() - started,
            "cpu": usage.ru_utime + usage.ru_stime,
            "rows": int(read.get("rows") or 0),
            "calls": json.loads(read.get("calls") or "{}"),
        }


def serve() -> None:
    import peft  # noqa: F401
    import transformers

    transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.Trainer  # noqa: B018 (lazy names)
    for name in (
        *("select.run", "select.audit", "select.explain", "training.train", "training.evaluation"),
        *("order.run", "diagnose.run", "report.pages", "demo", "cli"),
    ):
        import_module(f"pipelines.{name}")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
