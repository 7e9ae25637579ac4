"""The limit on a process's open files: the two sides of the protocol hold a connection for each request in
flight, and systems begin at 1,024.
"""

from __future__ import annotations

import contextlib
import resource

ENOUGH = 65536


def raise_limit() -> None:
    """Raises this process's limit to `ENOUGH`, or as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(ENOUGH, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # a system may have a limit of its own below that
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
