"""Resident memory of a process, this one unless told otherwise, from Linux's /proc."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path


def resident_bytes(field: str = "VmRSS", pid: int | str = "self") -> int:
    """VmRSS (now), VmHWM (the highest since the peak was last reset) or RssAnon (now, without files)."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{status} has no {field}; the benchmark needs Linux")
    return 1024 * int(found[1])


def reset_peak(pid: int | str = "self") -> None:
    """Starts a new peak of a process at what is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")


def begin() -> int:
    """Starts a new peak of this process; returns what is resident now.

    What lies free in the heap goes back to the system first: it would hide what comes next.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes()
    reset_peak()
    return before
