"""glibc's malloc, told to keep what a training step frees for the next one."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
LARGEST = 2**31 - 1  # bytes, what mallopt's int can say


def keep_freed_memory() -> bool:
    """Blocks up to 2 GiB are freed to the process instead of to the system; True where malloc can be told so.

    By default glibc maps every block of over 32 MiB anew, and each of its pages costs a fault at its first use: of a GRPO step of a 40M
    model on 2 CPU cores some 200,000 (`ru_minflt`), which took a tenth of its time; with GLIBC_TUNABLES set, bench/peers/trl_grpo.py
    shows it. The process's memory stays at its peak. What the user says with MALLOC_MMAP_THRESHOLD_,
    MALLOC_TRIM_THRESHOLD_ or GLIBC_TUNABLES stands.
    """
    said = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    if not sys.platform.startswith("linux") or any(name in os.environ for name in said):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, -1))
