"""The store on rank 0's host, over which servers and sending ranks find each other."""

from __future__ import annotations

import datetime
import socket
from typing import Any

import torch.distributed as dist

from megatron_scope.errors import SyncError

CONNECT_S = 60.0


def listen(port: int) -> Any:
    """A store that listens at `port` (0 takes a free one; `.port` says which) of every address of this host,
    and waits for nobody. SyncError where the port is taken.
    """
    try:
        return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            "127.0.0.1", port, is_master=True, wait_for_workers=False
        )
    except dist.DistError as error:
        raise SyncError(
            f"port {port} of rank 0's host cannot be taken for weights by broadcast "
            f"({_first_line(error)}); set sync.master_port to a free one, or to 0"
        ) from None


def connect(host: str, port: int) -> Any:
    """A connection to the store at `host:port`, which listens already; SyncError where it cannot be had."""
    try:
        # By itself first: torch takes twice the time, and prints its C++ stack on the way.
        socket.create_connection((host, port), timeout=CONNECT_S).close()
        return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host, port, is_master=False, timeout=datetime.timedelta(seconds=CONNECT_S)
        )
    except (OSError, dist.DistError) as error:
        raise SyncError(
            f"rank 0's store at {host}:{port}, over which weights by broadcast begin, cannot be reached "
            f"({_first_line(error)}); open that port, or set sync.master_port to one that is open"
        ) from None


def _first_line(error: Exception) -> str:
    """Without the C++ stack that torch may add."""
    return str(error).partition("\n")[0].rstrip(". ")
