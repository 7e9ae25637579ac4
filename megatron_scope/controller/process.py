"""The controller as a child process of rank 0: calls over a pipe, one at a time, and no orphan whatever ends
the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_scope.config.schema import Config
from megatron_scope.controller.core import Controller
from megatron_scope.errors import ScopeError
from megatron_scope.records import SequenceLimits

CLOSE = "close"


class ControllerProcess:
    """Starts the child at once; `close` ends it.

    Errors of the child arrive as the same ScopeError; anything else as a RuntimeError with the child's
    traceback.
    """

    def __init__(self, config: Config, limits: SequenceLimits, run_folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not daemonic: a daemon may not have children, and the verifiers are its children.
        self._process = context.Process(
            target=_serve, args=(theirs, config, limits, run_folder), name="controller", daemon=False
        )
        self._process.start()
        theirs.close()
        self._receive()

    def call(self, method: str, *args: Any) -> Any:
        """Runs a method of Controller in the child and returns its result."""
        return self.begin(method, *args)()

    def begin(self, method: str, *args: Any) -> Callable[[], Any]:
        """Begins such a call; the returned function waits for its result, and comes before the next call."""
        try:
            self._connection.send((method, args))
        except (BrokenPipeError, OSError):
            raise self._died() from None
        return self._receive

    def _receive(self) -> Any:
        try:
            failed, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if not failed:
            return value
        raise value if isinstance(value, ScopeError) else RuntimeError(f"the controller failed:\n{value}")

    def _died(self) -> ScopeError:
        self._process.join(timeout=5)
        return ScopeError(
            f"the controller process ended with exit code {self._process.exitcode}; look at the log above "
            "and start again "
            "with --resume auto"
        )

    def close(self) -> None:
        """Ends the child and what it started."""
        with contextlib.suppress(BrokenPipeError, OSError):  # it may have ended already
            self._connection.send((CLOSE, ()))
        self._process.join(timeout=10)  # it may be in the middle of a call
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()


def _serve(connection: Connection, config: Config, limits: SequenceLimits, run_folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is rank 0's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, name="parent-watcher", daemon=True).start()
    asyncio.run(_run(connection, config, limits, run_folder))


async def _run(connection: Connection, config: Config, limits: SequenceLimits, run_folder: str) -> None:
    """Answers calls one after another; what a call has begun goes on between them."""

    async def make() -> Controller:
        return Controller(config, limits, run_folder)

    controller = await _answer(connection, make, announce=True)
    if controller is None:
        return
    try:
        while True:
            try:
                method, args = await asyncio.to_thread(connection.recv)
            except EOFError:  # the parent is gone
                return
            if method == CLOSE:
                return
            await _answer(connection, functools.partial(getattr(controller, method), *args))
    finally:
        await controller.close()


async def _answer(
    connection: Connection, work: Callable[[], Coroutine[Any, Any, Any]], *, announce: bool = False
) -> Any:
    """Runs `work` and sends (failed, result); with `announce` the result itself stays here."""
    try:
        result = await work()
        answer = (False, None if announce else result)
    except ScopeError as error:
        result, answer = None, (True, error)
    except Exception:
        result, answer = None, (True, traceback.format_exc())
    with contextlib.suppress(BrokenPipeError, OSError):  # the parent may be gone; the loop sees that next
        await asyncio.to_thread(connection.send, answer)
    return result


def _end_with_parent() -> None:
    """Also in the middle of a call; servers and verifiers follow, each by a watch of its own."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
