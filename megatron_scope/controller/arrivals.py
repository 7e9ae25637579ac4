"""The rollouts of one step as they arrive: collected in the background, taken in parts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from megatron_scope.records import JudgedRollout

Placed = tuple[int, JudgedRollout]  # with its place in the step's canonical order
Arrive = Callable[[int, JudgedRollout], None]
Produce = Callable[[Arrive], Coroutine[Any, Any, None]]


class Arrivals:
    """Runs `produce`, which hands on judged rollouts in whatever order they finish, as a task of the running
    event loop. An error of it is raised by `take`.
    """

    def __init__(self, produce: Produce) -> None:
        self.last_arrival_s = time.monotonic()
        self._items: dict[int, JudgedRollout] = {}
        self._fresh: list[Placed] = []
        self._fresh_tokens = 0
        self._progress = asyncio.Event()
        self._task = asyncio.create_task(produce(self._arrive))
        self._task.add_done_callback(lambda _: self._progress.set())

    async def take(self, least_tokens: int | None) -> tuple[list[Placed], bool]:
        """What has arrived since the last call, by place, and whether that was the end. Waits for
        `least_tokens` response tokens, or with None for the end.
        """
        while not self._task.done() and (least_tokens is None or self._fresh_tokens < least_tokens):
            self._progress.clear()
            await self._progress.wait()
        if self._task.done():
            self._task.result()
        fresh = sorted(self._fresh, key=lambda placed: placed[0])
        self._fresh, self._fresh_tokens = [], 0
        return fresh, self._task.done()

    def judged(self) -> list[JudgedRollout]:
        """All rollouts of a complete step in canonical order."""
        return [self._items[place] for place in sorted(self._items)]

    async def stop(self) -> None:
        """Ends it, if it still runs; what had arrived stays."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # `take` has raised it, if asked
            await self._task

    def _arrive(self, place: int, item: JudgedRollout) -> None:
        self._items[place] = item
        self._fresh.append((place, item))
        self._fresh_tokens += len(item.rollout.output_ids)
        self.last_arrival_s = time.monotonic()
        self._progress.set()
