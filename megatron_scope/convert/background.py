"""Writing in the background: while one block is prepared, the one before it is written and earlier ones reach
the disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

_FLUSH_BYTES = 128 * 2**20  # handed to the disk at a time, so that little is left for the end


class BackgroundWriter:
    """One thread that writes and one that flushes; at most one block waits, so memory stays bounded.

    A context manager; an error of either thread is raised by the next call. The caller must not change what
    an action writes.
    """

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flusher")
        self._last: Future[object] | None = None
        self._flushes: list[Future[None]] = []
        self._unflushed = 0

    def __enter__(self) -> BackgroundWriter:
        return self

    def write(self, file: BinaryIO, action: Callable[[], object], num_bytes: int) -> None:
        """Runs `action`, which writes `num_bytes` to `file`, after those before it."""
        self._wait()
        self._last = self._writer.submit(_run, file, action)
        self._unflushed += num_bytes
        if self._unflushed >= _FLUSH_BYTES:
            self._flushes.append(self._flusher.submit(_flush, file))
            self._unflushed = 0

    def finish(self, file: BinaryIO) -> None:
        """Waits until everything written is on the disk, then closes the file."""
        self._wait()
        for flush in self._flushes:
            flush.result()
        self._flushes.clear()
        with naming(file):
            file.flush()
            os.fsync(file.fileno())
        file.close()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()
        self._last = None

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(cancel_futures=True)
        self._flusher.shutdown(cancel_futures=True)


@contextlib.contextmanager
def naming(file: BinaryIO) -> Iterator[None]:
    """Makes the error of a full disk say which file did not fit."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or file.name
        raise


def _run(file: BinaryIO, action: Callable[[], object]) -> None:
    with naming(file):
        action()


def _flush(file: BinaryIO) -> None:
    """Puts what was written on the disk and lets go of its copy in memory, whose pages serve the next
    blocks.
    """
    with naming(file):
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
