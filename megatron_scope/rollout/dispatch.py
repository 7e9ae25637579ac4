"""Requests on their way through the pool: each sample is handed on exactly once, or an error is raised."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import field
from typing import Any

from megatron_scope.errors import RolloutError
from megatron_scope.records import Rollout, SamplingParams
from megatron_scope.rollout.client import ServerFailure
from megatron_scope.rollout.member import Member
from megatron_scope.rollout.roster import PoolOptions, Roster
from megatron_scope.rollout.wire import RolloutRequest, StaleWeights

OnRollout = Callable[[Rollout], Awaitable[None]]
EXPLAIN_POLL_S = 1.0  # how often the end of all servers is looked into, while one may yet come back


@dataclasses.dataclass
class _Order:
    """A request and what became of it so far."""

    request: RolloutRequest
    num_tokens: int
    failures: list[str] = field(default_factory=list)


class Dispatch:
    """Sends requests where there is room and hands responses on, until all are handed on.

    One task a request in flight and one a response that its consumer has not taken; all decisions are made in
    `run`, between two waits, so nothing is counted twice.
    """

    def __init__(
        self,
        roster: Roster,
        options: PoolOptions,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        *,
        version: int,
        on_rollout: OnRollout,
    ) -> None:
        self._roster, self._options = roster, options
        self._params, self._version, self._on_rollout = params, version, on_rollout
        self._waiting = deque(
            _Order(request, len(request.prompt.token_ids) + params.max_new_tokens) for request in requests
        )
        self._homes: dict[str, Member] = {}  # of each prompt, where its tokens are cached
        self._sent: dict[asyncio.Task[Rollout], tuple[_Order, Member]] = {}
        self._untaken: set[asyncio.Task[None]] = set()
        self._finished: deque[asyncio.Task[Any]] = deque()
        self._consumers = asyncio.Semaphore(options.max_untaken)
        self._alone_since: float | None = None

    async def run(self) -> None:
        """Returns once the last response is taken; RolloutError for the first request that finally fails."""
        try:
            while self._waiting or self._sent or self._untaken:
                self._send()
                await self._something_changed()
                self._settle()
        finally:
            tasks = [*self._sent, *self._untaken]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task, (order, asked) in self._sent.items():
                asked.end(task, order.num_tokens)

    def _send(self) -> None:
        """Fills the room that there is; a slow consumer leaves none."""
        while self._waiting and len(self._untaken) < self._options.max_untaken:
            order = self._waiting[0]
            prompt = order.request.prompt
            home = self._homes.get(prompt.id)
            asked = self._roster.choose(home)
            if asked is None:
                return
            if asked is not self._roster.router and (home is None or not home.is_kept):
                self._homes[prompt.id] = asked
            self._waiting.popleft()
            task = asyncio.create_task(
                asked.client.generate(order.request, self._params, version=self._version)
            )
            task.add_done_callback(self._note)
            asked.begin(task, order.num_tokens)
            self._sent[task] = order, asked

    def _note(self, task: asyncio.Task[Any]) -> None:
        self._finished.append(task)
        self._roster.changed.set()

    async def _something_changed(self) -> None:
        """Waits for an answer, a taken response or a server; RolloutError when none comes back or can."""
        changed, now = self._roster.changed, asyncio.get_running_loop().time()
        if self._roster.is_serving or not (self._waiting or self._sent):
            self._alone_since = None
            await changed.wait()
        else:
            self._alone_since = now if self._alone_since is None else self._alone_since
            left_s = self._alone_since + self._options.start_timeout_s - now
            if left_s <= 0:
                raise self._roster.nobody_left(
                    RolloutError,
                    "no rollout server is left, and none came back within "
                    f"{self._options.start_timeout_s:g} s (rollout.start_timeout_s)",
                )
            self._roster.explain()
            if self._roster.is_lost:
                raise self._roster.nobody_left(RolloutError, "no rollout server is left")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, EXPLAIN_POLL_S)):
                    await changed.wait()
        changed.clear()

    def _settle(self) -> None:
        """Does what follows from each task that has ended."""
        while self._finished:
            task = self._finished.popleft()
            if task in self._untaken:
                self._untaken.discard(task)
                task.result()
            else:
                self._settle_request(task)

    def _settle_request(self, task: asyncio.Task[Rollout]) -> None:
        order, asked = self._sent.pop(task)
        asked.end(task, order.num_tokens)
        if task.cancelled():  # its server was taken out
            self._ask_again(order, f"{asked.url}: {asked.reason or 'a server behind it was taken out'}")
            return
        error = task.exception()
        if error is None:
            asked.answered()
            self._settle_answer(order, asked, task.result())
        elif isinstance(error, StaleWeights):
            self._roster.stale(asked, str(error))
            self._ask_again(order, str(error))
        elif isinstance(error, ServerFailure):
            self._roster.suspect(asked, str(error))
            self._ask_again(order, str(error))
        else:
            raise error

    def _settle_answer(self, order: _Order, asked: Member, rollout: Rollout) -> None:
        """Hands it on; one that was aborted, by whom we do not know, is asked again as long as may help."""
        if rollout.finish_reason == "abort" and len(order.failures) + 1 < self._options.max_tries:
            self._ask_again(order, f"{asked.url}: aborted")
            return
        taking = asyncio.create_task(self._hand_on(rollout))
        taking.add_done_callback(self._note)
        self._untaken.add(taking)

    def _ask_again(self, order: _Order, failure: str) -> None:
        order.failures.append(failure)
        if len(order.failures) >= self._options.max_tries:
            request = order.request
            raise RolloutError(
                f"prompt {request.prompt.id!r} sample {request.sample} failed {len(order.failures)} times, "
                f"on whatever server; the last: {failure}"
            )
        self._waiting.appendleft(order)

    async def _hand_on(self, rollout: Rollout) -> None:
        async with self._consumers:
            await self._on_rollout(rollout)
