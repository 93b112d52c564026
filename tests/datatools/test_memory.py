"""The allocator's setting: measured by page faults, in a process of its own because it lasts."""

import subprocess
import sys

import pytest

# 40 MB: above 32 MiB glibc maps every block afresh, whatever the process did before
FAULTS = """
import resource, torch
from datatools import keep_pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        large = torch.ones(10_000_000)
        del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
without = faults()
kept = keep_pages()
faults()
print(kept, without, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's C library")
def test_large_tensors_stop_costing_page_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    kept, without, with_it = done.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert int(without) > 1000
    assert int(with_it) < int(without) / 20


def test_the_users_own_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from datatools import keep_pages

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_pages()
