"""One process at a time for `benchmarks/convert.py`: its seconds, its memory, the page cache before it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import resource
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_S = 0.02


@dataclasses.dataclass(frozen=True)
class Run:
    """One process: peaks of the largest of its resident, anonymous and file-backed memory, and what went
    wrong, if anything.
    """

    seconds: float
    peak_bytes: int
    anonymous_bytes: int
    file_backed_bytes: int
    written_bytes: int = 0
    failure: str | None = None


def environment() -> dict[str, str]:
    """What every process gets: this one's, with the package on the path and nothing fetched."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def sync_tree(path: Path) -> int:
    """fsync of every file and folder at and below `path`; returns the files' bytes."""
    size = 0
    for found in (*path.rglob("*"), path):
        descriptor = os.open(found, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            size += os.fstat(descriptor).st_size if found.is_file() else 0
        finally:
            os.close(descriptor)
    return size


def set_cache(folder: Path, cache: str) -> None:
    """Drops a folder's files from the page cache (`cold`), or reads them into it (`warm`)."""
    os.sync()  # what earlier runs left to write must not slow this one; dirty pages cannot be dropped
    buffer = bytearray(1 << 23)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb", buffering=0) as opened:
            if cache == "cold":
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.readinto(buffer):
                    pass


def memory(status: str) -> dict[str, int]:
    """VmHWM, RssAnon and RssFile in bytes from the text of /proc/PID/status; without them, a process that
    ended.
    """
    lines = re.findall(r"^(VmHWM|RssAnon|RssFile):\s+(\d+) kB$", status, flags=re.MULTILINE)
    return {key: 1024 * int(kilobytes) for key, kilobytes in lines}


class Sampler(threading.Thread):
    """Reads a process's memory every 20 ms; `peaks` has the highest of each number."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
        self._status = Path(f"/proc/{pid}/status")
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            try:
                now = memory(self._status.read_text())
            except (FileNotFoundError, ProcessLookupError):  # it ended
                return
            for key, value in now.items():
                self.peaks[key] = max(self.peaks[key], value)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def run_process(
    argv: list[str], *, out: Path | None = None, stdin: str = "", timeout_s: float = 3600.0
) -> tuple[Run, str]:
    """Runs a command to its end, fsyncs `out`, and returns the measurements and what it printed.

    The peak is the kernel's own of that process (wait4) or of the largest of its children. It counts from
    the fork, which shares this process's memory: where it is no higher than this process's own peak, the
    sampled one is taken.
    """
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as given:
        given.write(stdin)
        given.seek(0)
        started = time.perf_counter()
        process = subprocess.Popen(
            argv, stdin=given, stdout=log, stderr=log, env=environment(), start_new_session=True
        )
        # Should memory run out, it goes first.
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        sampler, timer = Sampler(process.pid), threading.Timer(timeout_s, _kill, [process.pid])
        sampler.start()
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            _kill(process.pid)
            process.wait()
            raise
        finally:
            timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        written = sync_tree(out) if out and out.exists() else 0
        seconds = time.perf_counter() - started
        sampler.stop()
        log.seek(0)
        printed = log.read()
    peaks, kernel_peak = sampler.peaks, 1024 * usage.ru_maxrss
    failure = describe_failure(process.returncode, printed, timed_out=seconds > timeout_s)
    run = Run(
        seconds=seconds,
        peak_bytes=kernel_peak if kernel_peak > own else peaks["VmHWM"],
        anonymous_bytes=peaks["RssAnon"],
        file_backed_bytes=peaks["RssFile"],
        written_bytes=written,
        failure=failure,
    )
    return run, printed


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
        os.killpg(pid, signal.SIGKILL)


def describe_failure(returncode: int, printed: str, *, timed_out: bool) -> str | None:
    """None for a good run, or one line."""
    if returncode == 0:
        return None
    if timed_out:
        return "stopped at the time limit"
    if returncode == -signal.SIGKILL:
        return "killed, as the kernel does when memory runs out"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return f"exit code {returncode}: {lines[-1] if lines else 'no message'}"


def imported_modules(printed: str) -> list[str]:
    """The modules that a process run with -X importtime imported, in the order in which they were done."""
    return list(dict.fromkeys(re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", printed, re.MULTILINE)))
