"""Settings of the C library's memory allocator, which decide a fifth of the speed of a model on a CPU."""

import ctypes
import os
import sys

# glibc's names and numbers (malloc.h), and their environment variables, which a user may have set
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_pages() -> bool:
    """Let this process keep up to 2 GiB of freed memory instead of returning the pages of large tensors to the system.

    By default, glibc maps each large block separately and unmaps it when it is freed, so that on a CPU every activation
    costs page faults: 78,000 for one batch of 852 tokens of SmolLM2-135M, a sixth of its time. Peak memory stays the
    same, but memory is not returned between peaks. The setting holds for the rest of the process; further calls change
    nothing. Nothing is changed if the C library is not glibc, or if the user has set its environment variables.

    Returns:
        Whether the setting is in force.

    Example:
        >>> from datatools import keep_pages
        >>> keep_pages() in (True, False)
        True

    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
