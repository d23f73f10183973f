"""How this process's memory is taken from the system and given back.

glibc gives a step's memory back to the system when it is freed and takes it anew for the next step, so the same pages
are cleared again and again: a quarter of the processor time of sampling on two cores went there. Keeping what was freed
changes no number. A server keeps it while it has work, and gives it back when it has none.
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_ASKED_FOR = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors, where its C library is glibc.

    Nothing is changed where the environment sets these thresholds. For a program's own main function: it concerns the
    whole process.

    Returns:
        Whether it was done.
    """
    libc = _glibc()
    if libc is None or any(name in os.environ for name in _ASKED_FOR):
        return False
    # Nothing is mapped on its own (what is larger than 32 MB always would be), and the heap's end is not given back.
    return all([libc.mallopt(_M_MMAP_MAX, 0), libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)])


def give_back_freed_memory() -> bool:
    """Give the system every free page of this process's heap, where its C library is glibc; takes milliseconds.

    Returns:
        Whether there was any.
    """
    libc = _glibc()
    return libc is not None and bool(libc.malloc_trim(0))


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        _ = libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        return None
    return libc
