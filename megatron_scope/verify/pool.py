"""Verification in worker processes that may hang, crash or run out of memory without harm to the caller."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import multiprocessing
import resource
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from megatron_scope.errors import ConfigError, ScopeError
from megatron_scope.records import Verdict
from megatron_scope.verify.math_answer import judge_at_once, judge_with_library

KNOWN_TASKS = ("math",)
# What a worker may allocate beyond its start; sympy can ask for all memory long before the time limit.
WORKER_MEMORY_BYTES = 2 << 30
# Process pools that may break one after the other, none having judged anything, before answers are given up.
MAX_FAILED_POOLS = 3
WATCH_INTERVAL_S = 0.5
# Beyond one answer's limit: time for workers to start on a busy machine. Silence for longer means a lost job.
STALL_S = 120.0


@dataclasses.dataclass(frozen=True)
class _Job:
    """An answer under way in a worker, or waiting for one."""

    extracted: str
    answer: str


class VerifierPool:
    """Judges answers, easy ones at once, others in `workers` processes for at most `timeout_s` seconds each.

    A context manager: leaving it waits for the answers under way, or drops them if an exception passes.
    Processes are spawned at the first answer that needs one, so the main module must be importable (an `if
    __name__ == "__main__"` guard), and the caller must not be a daemonic process. `judge` is what a worker
    runs on (extracted answer, ground truth answer), a module-level function. Raises ConfigError for workers <
    1 or timeout_s <= 0.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        *,
        judge: Callable[[str, str], Verdict] = judge_with_library,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"verify.workers is {workers}, expected 1 or more")
        if not timeout_s > 0:
            raise ConfigError(f"verify.timeout_s is {timeout_s}, expected more than 0 seconds")
        self._workers = workers
        self._timeout_s = timeout_s
        self._judge = judge
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._pending: dict[Future[Verdict], _Job] = {}
        self._watcher: threading.Thread | None = None
        self._closed = threading.Event()
        self._has_finished = False  # whether the present process pool has done any job
        self._progress_s = 0.0  # when a job was last done, on the monotonic clock

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drop=kind is not None)

    def close(self, *, drop: bool) -> None:
        """Ends the pool, after the answers under way or, with `drop`, without them."""
        if not drop:
            wait(self._snapshot())
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
        for future in self._snapshot():
            self._resolve(future, _failed("the verifier pool was stopped"))

    def submit(self, task: str, answer: str, response: str) -> Future[Verdict]:
        """The verdict on a response, as a future that never holds an exception and cannot be cancelled.

        Done already where text and plain numbers decide. Whatever keeps an answer from being judged (an
        unknown task, wrong types, a time-out, a dead process) is told by `Verdict.error`. Raises ScopeError
        only if the pool is closed or no process can be started from here.
        """
        future: Future[Verdict] = Future()
        future.set_running_or_notify_cancel()
        if problem := _problem(task, answer, response):
            future.set_result(_failed(problem))
            return future
        judged = judge_at_once(response, answer)
        if isinstance(judged, Verdict):
            future.set_result(judged)
            return future
        # Only the extracted answer travels: nothing long waits in the queue.
        job = _Job(judged, answer)
        with self._lock:
            if self._closed.is_set():
                raise ScopeError("the verifier pool is closed")
            pool = self._running_pool()
            if not self._pending:
                self._progress_s = time.monotonic()
            self._pending[future] = job
        self._schedule(pool, future, job)
        return future

    def _running_pool(self) -> ProcessPool:
        """The process pool, made at its first use; the caller holds the lock."""
        if self._pool is None:
            if multiprocessing.current_process().daemon:
                raise ScopeError(
                    "a daemonic process cannot start verifier processes; start it with daemon=False"
                )
            self._pool = ProcessPool(
                max_workers=self._workers,
                initializer=_start_worker,
                context=multiprocessing.get_context("spawn"),
            )
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="verifier-watcher", daemon=True)
            self._watcher.start()
        return self._pool

    def _schedule(self, pool: ProcessPool, future: Future[Verdict], job: _Job) -> None:
        try:
            process_job = pool.schedule(
                _judge_guarded,
                args=(self._judge, job.extracted, job.answer, self._timeout_s),
                timeout=self._timeout_s,
            )
        except RuntimeError:
            # The pool is broken: the watcher moves everything that is pending to a new one.
            return
        process_job.add_done_callback(functools.partial(self._finish, future, job))

    def _finish(self, future: Future[Verdict], job: _Job, process_job: Future[Any]) -> None:
        """Turn what came of a worker's job into a verdict; runs in a thread of the process pool."""
        try:
            verdict = process_job.result()
        except BrokenProcessPool:
            return  # The watcher moves it.
        except TimeoutError:
            verdict = _failed(f"timed out after {self._timeout_s:g} s", job.extracted)
        except ProcessExpired as error:
            verdict = _failed(f"verifier process died (exit code {error.exitcode})", job.extracted)
        except CancelledError:
            verdict = _failed("the verifier pool was stopped", job.extracted)
        except Exception as error:
            verdict = _failed(
                f"verifier failed: {type(error).__name__}: {error}"[:300].rstrip(": "), job.extracted
            )
        self._has_finished = True
        self._resolve(future, verdict)

    def _watch(self) -> None:
        """Replace the process pool when it breaks or stalls, and send it again what was under way.

        A worker that dies while none is at work breaks all of pebble's pool, which may forget queued jobs.
        """
        failed_pools = 0
        while not self._closed.wait(WATCH_INTERVAL_S):
            with self._lock:
                pool = self._pool
                silence_s = time.monotonic() - self._progress_s if self._pending else 0.0
                if pool is None or (_is_active(pool) and silence_s <= self._timeout_s + STALL_S):
                    continue
                self._pool = None
                failed_pools = 0 if self._has_finished else failed_pools + 1
                self._has_finished = False
                self._progress_s = time.monotonic()
            pool.stop()
            pool.join()
            if failed_pools >= MAX_FAILED_POOLS:
                failed_pools = 0
                for future in self._snapshot():
                    self._resolve(future, _failed("no verifier process stays alive; see the log of this run"))
                continue
            with self._lock:
                jobs = list(self._pending.items())
                pool = self._running_pool()
            # One sent to the new pool meanwhile goes twice; the first verdict counts.
            for future, job in jobs:
                self._schedule(pool, future, job)

    def _snapshot(self) -> list[Future[Verdict]]:
        with self._lock:
            return list(self._pending)

    def _resolve(self, future: Future[Verdict], verdict: Verdict) -> None:
        with self._lock:
            first = self._pending.pop(future, None) is not None
            self._progress_s = time.monotonic()
        if first:
            future.set_result(verdict)


def _is_active(pool: ProcessPool) -> bool:
    try:
        return pool.active
    except RuntimeError:  # It could not even start.
        return False


def _problem(task: object, answer: object, response: object) -> str | None:
    """Why these cannot be judged at all."""
    if task == "code":
        return "task 'code' is not built yet; known: " + ", ".join(KNOWN_TASKS)
    if task not in KNOWN_TASKS:
        return f"unknown task {str(task)[:80]!r}; known: " + ", ".join(KNOWN_TASKS)
    for name, value in (("answer", answer), ("response", response)):
        if not isinstance(value, str):
            return f"{name} is {type(value).__name__}, expected text"
    return None


def _failed(error: str, extracted: str | None = None) -> Verdict:
    return Verdict(False, extracted, error)


def _start_worker() -> None:
    """Pay for the import before the first answer's clock starts, then bound what the worker may allocate."""
    importlib.import_module("math_verify")
    # Its warning that limits are off is meant for callers without any.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    judge_with_library("x+1", "1+x")
    in_use = _virtual_bytes()
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    if in_use is not None and not 0 <= hard_limit <= in_use + WORKER_MEMORY_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (in_use + WORKER_MEMORY_BYTES, hard_limit))


def _virtual_bytes() -> int | None:
    """The size of this process's address space; None where the system does not tell (other than Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def _judge_guarded(
    judge: Callable[[str, str], Verdict], extracted: str, answer: str, timeout_s: float
) -> Verdict:
    # The pool enforces the limit; the alarm ends a worker whose pool was killed and can enforce nothing.
    signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 60)
    try:
        verdict = judge(extracted, answer)
    except Exception:
        raise
    except BaseException as error:
        # Passed on, a SystemExit would end the thread of the pool that hands results over.
        return _failed(f"verifier failed: {type(error).__name__}: {error}"[:300].rstrip(": "), extracted)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if not isinstance(verdict, Verdict):
        return _failed(f"verifier returned {type(verdict).__name__}, expected a Verdict", extracted)
    return verdict
