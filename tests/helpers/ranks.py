"""A pool of gloo ranks that live through a test session: importing Megatron costs seconds a process."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from typing import Any


class RankPool:
    """`size` processes that form one world. `run("module:function", ...)` calls the function on every rank."""

    def __init__(self, size: int, timeout_s: float = 240.0) -> None:
        from torch.distributed import TCPStore

        self.size = size
        self._timeout_s = timeout_s
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, self._store.port), daemon=False)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: str, *args: Any, **kwargs: Any) -> list[Any]:
        """The results in rank order; an exception of the lowest rank that raised is raised here, as it was."""
        for connection in self._connections:
            connection.send((function, args, kwargs))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(self._timeout_s):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.size} gave no answer within {self._timeout_s:.0f} s")
            answers.append(connection.recv())
        for error, trace, _ in answers:
            if error is not None:
                error.add_note(trace)
                raise error
        return [result for _, _, result in answers]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()


def _serve(connection: Connection, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        OMP_NUM_THREADS="1",
    )
    from megatron_scope.backend import setup

    setup.prepare()
    while True:
        try:
            name, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            module, function = name.split(":")
            result = getattr(importlib.import_module(module), function)(*args, **kwargs)
            answer = (None, "", result)
        except Exception as error:
            answer = (error, traceback.format_exc(), None)
        connection.send(answer)
