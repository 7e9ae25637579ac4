"""Resident memory of this process, from Linux's /proc."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_bytes(field: str = "VmRSS") -> int:
    """VmRSS (now) or VmHWM (the highest since `begin`)."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{STATUS} has no {field}; the benchmark needs Linux")
    return 1024 * int(found[1])


def begin() -> int:
    """Starts a new peak; returns what is resident now.

    What lies free in the heap goes back to the system first: it would hide what comes next.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return before
