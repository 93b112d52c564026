"""One extraction in a process of its own, and the memory it took; `test_memory` runs it.

    python -m tests.benchmarks.extract_once FOLDER ROWS

Prints one line of JSON. The peak is the kernel's high-water mark of resident memory, reset once the model is loaded, so
that loading does not hide what extraction takes.
"""

import json
import resource
import sys
from pathlib import Path

from tests.benchmarks.measure import Settings
from tests.benchmarks.workload import prepared


def status(field: str) -> int | None:
    """Bytes of a field of /proc/self/status; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), None)


def main(folder: Path, rows: int) -> None:
    settings = Settings.read()
    work = prepared(settings, folder, rows=rows)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        reset = True
    except OSError:
        reset = False
    before = status("VmRSS")
    work.extract(folder / "store")
    peak = status("VmHWM")
    if peak is None:  # not Linux: the peak of the whole process, in bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "rows": len(work.first),
        "tokens": work.tokens,
        "longest": max(work.lengths.values()),
        "before": before or 0,
        "peak": peak,
        "reset": reset,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
