"""Keeps what is freed for the next operation: a training allocates the same sizes in every meta-iteration."""

import ctypes
import os
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the two settings (malloc.h)."""

LARGEST = 32 * 2**20
"""Bytes; glibc takes no greater limit for what it asks the system for, and gives back to it, by itself."""

THEIRS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed() -> None:
    """Let this process keep the memory that it frees, up to its peak.

    glibc gives tensors of some megabytes back to the system when they are freed, and every page of the next has to be
    fetched and cleared: a sixth of the time of MAML's curvature products. Does nothing where the user has chosen
    (mallopt(3)), or the C library is another.
    """
    if any(name in os.environ for name in THEIRS):
        return
    with suppress(AttributeError, OSError, TypeError):  # no such function, or no such library, as on other systems
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
