"""How long idle threads of torch wait on their cores: long while a run is alone, briefly as soon as it is not.

Spinning saves 5 to 18 % of the time of one run alone, because waking a thread takes as long as a small piece of work.
Two runs that spin on the same cores take several times as long, because each waits for cores on which the other spins.
GNU's library, libgomp, spins briefly while it has more threads than there are cores. `Watch` makes use of that: it
keeps one more team of threads, which sleeps, for as long as the main thread waits for a core. The number of threads
that share a piece of work never changes, and neither do results.

Source: libgomp's `config/linux/wait.h` (`do_spin`) and `env.c` (`gomp_throttled_spin_count_var`) in GCC 13.
"""

import importlib.util
import sys
import threading
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

LONG = {"GOMP_SPINCOUNT": "300000", "OMP_WAIT_POLICY": "ACTIVE"}
"""Spin for libgomp's usual number of rounds, about 3 ms; for 1,000 while there are more threads than cores."""

_PERIOD = 0.1  # seconds between two looks
_SHARE = 0.1  # of the time in which the main thread waits for a core: then the machine is shared
_QUIET = 2.0  # seconds without that, after which the machine is this run's again
_WAITED = Path("/proc/self/schedstat")  # Linux: nanoseconds on a core, nanoseconds waiting for one, of the main thread


def can_watch() -> bool:
    """Return whether Linux says how long a thread waited for a core, and torch comes with GNU's OpenMP library."""
    spec = importlib.util.find_spec("torch")
    with suppress(OSError, ValueError):
        if spec is not None and spec.origin is not None and _waited() >= 0:
            return any((Path(spec.origin).parent / "lib").glob("libgomp*.so*"))
    return False


def _waited() -> float:
    """Return the seconds that the main thread of this process has waited for a core."""
    return int(_WAITED.read_text(encoding="ascii").split()[1]) / 1e9


class Watch:
    """A thread that looks ten times per second whether this run shares its cores, and sets how idle threads wait.

    Args:
        environ: The environment. The variables of `LONG` are taken back once libgomp has read them, so that processes
            started by this one, which nobody watches, spin briefly.
        briefly: What replaces them.
    """

    def __init__(self, environ: MutableMapping[str, str], briefly: dict[str, str]) -> None:
        self._environ, self._briefly = environ, briefly
        self._more: threading.Thread | None = None
        self._end = threading.Event()
        self._change = threading.Lock()

    def start(self) -> None:
        """Start looking."""
        threading.Thread(target=self._look, name="watch of idle threads", daemon=True).start()

    @property
    def shared(self) -> bool:
        """Whether idle threads spin briefly now."""
        return self._more is not None

    def _look(self) -> None:
        while "torch._C" not in sys.modules:  # libgomp reads its variables as torch is loaded, before this appears
            time.sleep(_PERIOD)
        for name in LONG:
            self._environ.pop(name, None)
        self._environ.update(self._briefly)
        quiet, waited, now = 0.0, _waited(), time.monotonic()
        while True:
            time.sleep(_PERIOD)
            before, then = waited, now
            try:
                waited, now = _waited(), time.monotonic()
            except OSError:
                self.brief()  # nobody can say any more whether the cores are shared
                return
            quiet = 0.0 if waited - before > _SHARE * (now - then) else quiet + (now - then)
            if quiet == 0.0:
                self.brief()
            elif quiet >= _QUIET:
                self.long()

    def brief(self) -> None:
        """Let idle threads spin briefly: start one more team, which makes more threads than there are cores."""
        with self._change:
            if self._more is None:
                self._end.clear()
                self._more = threading.Thread(target=self._team, name="team that sleeps", daemon=True)
                self._more.start()

    def long(self) -> None:
        """Let idle threads spin for long again: end that team."""
        with self._change:
            if self._more is not None:
                self._end.set()
                self._more.join()
                self._more = None

    def _team(self) -> None:
        import torch

        torch.zeros(torch.get_num_threads() << 15).add_(1)  # 32,768 numbers are the least work of a thread
        self._end.wait()
