"""A pool of gloo ranks that live through a test session: importing Megatron costs seconds a process."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed import TCPStore

AFTER_ERROR_S = 10.0  # within which an error that all ranks have reaches them all


class RankPool:
    """`size` processes that form one world. `run("module:function", ...)` calls the function on every
    rank.
    """

    def __init__(self, size: int, timeout_s: float = 240.0) -> None:
        self.size = size
        self.closed = False
        self._timeout_s = timeout_s
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size), daemon=False)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: str, *args: Any, **kwargs: Any) -> list[Any]:
        """The results in rank order; an exception of the lowest rank that raised is raised here, as it was.

        When an exception of one rank leaves another in a collective, the pool is closed.
        """
        # A store of its own for each world: the ranks leave one world and join the next.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for connection in self._connections:
            connection.send((function, args, kwargs, store.port))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + self._timeout_s
        while len(answers) < self.size and time.monotonic() < deadline:
            for connection in wait(self._connections, timeout=0.2):
                rank = self._connections.index(connection)
                answers[rank] = connection.recv()
                if answers[rank][0] is not None:
                    deadline = min(deadline, time.monotonic() + AFTER_ERROR_S)
        if len(answers) < self.size:
            self.close()
        for _, (error, trace, _) in sorted(answers.items()):
            if error is not None:
                error.add_note(trace)
                raise error
        if self.closed:
            raise TimeoutError(
                f"ranks {sorted(answers)} of {self.size} answered within {self._timeout_s:.0f} s"
            )
        return [answers[rank][2] for rank in range(self.size)]

    def close(self) -> None:
        self.closed = True
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


def _serve(connection: Connection, rank: int, size: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_USE_AGENT_STORE="True",
        OMP_NUM_THREADS="1",
    )
    from megatron_scope.backend import setup

    setup.prepare()
    while True:
        try:
            name, args, kwargs, port = connection.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        try:
            module, function = name.split(":")
            result = getattr(importlib.import_module(module), function)(*args, **kwargs)
            answer = (None, "", result)
        except Exception as error:
            answer = (error, traceback.format_exc(), None)
        connection.send(answer)
