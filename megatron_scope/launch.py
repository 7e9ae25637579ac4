"""Local ranks for `--nproc N`: one child process each, one store, and an end together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

GRACE_S = 20.0  # between asking ranks to stop and killing them, and for ranks that end by themselves
LAUNCHER_PID = "MEGATRON_SCOPE_LAUNCHER_PID"
POLL_S = 0.1


def run_local_ranks(arguments: Sequence[str], num_ranks: int) -> int:
    """Runs `python -m megatron_scope ARGUMENTS` as `num_ranks` ranks and returns the exit code of the first
    that failed, or 0.

    When one rank fails, the others are stopped: a rank alone in a collective would wait for ever.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    # The store lives here, on a port that it chose itself, so that no port can be taken between choosing and
    # binding.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        LAUNCHER_PID: str(os.getpid()),
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    ranks: list[subprocess.Popen[bytes]] = []
    with _stopping(ranks):
        for rank in range(num_ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "megatron_scope", *arguments]
            ranks.append(subprocess.Popen(command, env={**environment, **place}))
        return _wait(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code]
        if failed:
            _let_finish(ranks)
            # A signal's negative code becomes what a shell reports.
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if None not in codes:
            return 0
        time.sleep(POLL_S)


def _let_finish(ranks: list[subprocess.Popen[bytes]]) -> None:
    """A failure that all ranks know of ends them by themselves within moments; rank 0 may still be cleaning
    up.
    """
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(POLL_S)


@contextlib.contextmanager
def _stopping(ranks: list[subprocess.Popen[bytes]]):
    """Ends what still runs, whatever happens; SIGTERM to the launcher counts as Ctrl-C."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        for process in ranks:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + GRACE_S
        for process in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
        signal.signal(signal.SIGTERM, before)


def end_with_launcher() -> None:
    """In a rank of `run_local_ranks`: ends this process soon after its launcher, however that ended."""
    launcher = int(os.environ.get(LAUNCHER_PID, "0"))
    if launcher:
        threading.Thread(target=_watch, args=(launcher,), name="launcher-watcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    os._exit(1)
