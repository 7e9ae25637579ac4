"""The servers of one teacher: responses batched into requests, placed where there is room, and placed again
where a server fails.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np

from megatron_scope.errors import ConfigError, ScopeError, ScoringError
from megatron_scope.teacher.server import ServerFacts, TeacherOptions, TeacherServer
from megatron_scope.teacher.wire import NoAnswer, ScoringRequest

CANARY_TOKENS = 64
MAX_FAILURES = 5  # of one response's requests: more, and it may be the response that ends the servers
MAX_TIMEOUTS = 2  # of them: a third wait of teacher.request_timeout_s would not end better
FIRST_DELAY_S, LAST_DELAY_S = 0.25, 30.0  # between looks at a server that is out, doubling


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A response on its way to its scores."""

    request: ScoringRequest
    scores: asyncio.Future[np.ndarray]
    failures: int = 0
    timeouts: int = 0


@dataclasses.dataclass(eq=False)
class _Member:
    """A server, what is outstanding there, and why it is out (None while it is in)."""

    server: TeacherServer
    outstanding_tokens: int = 0
    outstanding_requests: int = 0
    out: str | None = None


class TeacherPool:
    """Scores responses on servers that all hold one model.

    Responses that wait at the same time share requests of at most `request_tokens`, of which each server has
    `max_concurrent_requests`; the next goes to the one with the fewest outstanding tokens. A server that does
    not answer is taken out, and comes back once it scores the canary as at the start. Its responses go to the
    others, or wait `start_timeout_s` for one to come back.
    """

    def __init__(self, urls: Sequence[str], options: TeacherOptions, *, api_key: str | None = None) -> None:
        self.servers = [TeacherServer(url, api_key=api_key, options=options) for url in urls]
        self._members = [_Member(server) for server in self.servers]
        self._options = options
        self._waiting: deque[_Waiting] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._canary: ScoringRequest | None = None
        self._canary_scores = np.zeros(0, dtype=np.float32)
        self._deadline: asyncio.TimerHandle | None = None  # for one server to come back when all are out

    async def connect(self) -> list[ServerFacts]:
        """What each server tells of itself, once all are healthy.

        ScoringError where one is not within `start_timeout_s`, ConfigError where one serves no generation
        model.
        """
        limit_s = self._options.start_timeout_s
        try:
            await asyncio.gather(*(server.wait_healthy(limit_s) for server in self.servers))
            facts = await asyncio.gather(*(server.facts() for server in self.servers))
        except NoAnswer as error:
            raise _failed_at_start(error) from None
        for server, told in zip(self.servers, facts, strict=True):
            server.weight_version = told.weight_version
        return facts

    async def compare(self, facts: Sequence[ServerFacts], vocab_size: int) -> None:
        """Scores a fixed sequence, the canary, on every server; ConfigError where two do not agree on it.

        `facts` are those of `connect`; no id that is sent is `vocab_size` or more.
        """
        longest = min([CANARY_TOKENS, *(told.max_input_tokens or CANARY_TOKENS for told in facts)])
        self._canary = canary(vocab_size, longest)
        for server in self.servers:
            server.last_id = vocab_size - 1
        try:
            scores = await asyncio.gather(*(self._score_canary(server) for server in self.servers))
        except NoAnswer as error:
            raise _failed_at_start(error) from None
        self._canary_scores = scores[0]
        for server, told, values in zip(self.servers[1:], facts[1:], scores[1:], strict=True):
            apart = self._distance(values)
            if apart > self._options.canary_tolerance:
                raise ConfigError(
                    f"{server.url} ({told.model_path}) and {self.servers[0].url} ({facts[0].model_path}) "
                    f"give the same tokens log-probs that are {apart:.3g} nats apart on average "
                    f"(teacher.canary_tolerance={self._options.canary_tolerance:g}); serve the same teacher "
                    "on all of teacher.server"
                )

    async def score(self, request: ScoringRequest) -> np.ndarray:
        """The log-probs of one response, float32 [R] in nats at temperature 1; ScoringError where no server
        gives them.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(request, loop.create_future())
        self._waiting.append(waiting)
        loop.call_soon(self._dispatch)  # not at once: those that come together share a request
        return await waiting.scores

    async def close(self) -> None:
        """Gives up what is under way and closes the connections."""
        for waiting in self._waiting:
            waiting.scores.cancel()
        self._waiting.clear()
        self._disarm()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self.servers:
            await server.close()

    # ---- placing

    def _dispatch(self) -> None:
        while self._waiting:
            members = [member for member in self._members if member.out is None]
            if not members:
                self._arm()
                return
            limit = self._options.max_concurrent_requests
            free = [member for member in members if member.outstanding_requests < limit]
            batch = self._next_batch() if free else []
            if not batch:
                return
            member = min(free, key=lambda member: member.outstanding_tokens)
            member.outstanding_tokens += _size(batch)
            member.outstanding_requests += 1
            self._start(self._send(member, batch))

    def _next_batch(self) -> list[_Waiting]:
        """The next responses in the order of their coming, as many as share a request; one that failed goes
        alone, so that one that no server bears takes no other with it.
        """
        batch: list[_Waiting] = []
        room = self._options.request_tokens
        while self._waiting:
            waiting = self._waiting[0]
            if waiting.scores.done():  # whoever asked has gone
                self._waiting.popleft()
                continue
            if batch and (batch[0].failures or waiting.failures or waiting.request.num_tokens > room):
                break
            batch.append(self._waiting.popleft())
            room -= waiting.request.num_tokens
        return batch

    async def _send(self, member: _Member, batch: list[_Waiting]) -> None:
        try:
            scores = await member.server.score([waiting.request for waiting in batch])
        except NoAnswer as error:
            self._again(batch, error)
            self._take_out(member, str(error))
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.scores.cancel()
            raise
        except Exception as error:  # of whatever kind, it is for those who wait
            for waiting in batch:
                _fail(waiting, error)
        else:
            for waiting, values in zip(batch, scores, strict=True):
                if not waiting.scores.done():
                    waiting.scores.set_result(values)
        finally:
            member.outstanding_tokens -= _size(batch)
            member.outstanding_requests -= 1
            self._dispatch()

    def _again(self, batch: list[_Waiting], error: NoAnswer) -> None:
        """Puts a failed request's responses in front of those that wait, or fails them for good."""
        for waiting in reversed(batch):
            waiting.failures += 1
            waiting.timeouts += error.timed_out
            if waiting.failures < MAX_FAILURES and waiting.timeouts < MAX_TIMEOUTS:
                self._waiting.appendleft(waiting)
                continue
            mend = "raise teacher.request_timeout_s, or " if error.timed_out else ""
            what = f"{waiting.request.name} ({waiting.request.num_tokens} tokens)"
            _fail(
                waiting,
                ScoringError(
                    f"{error}: the teacher did not score {what} in {waiting.failures} tries; {mend}look at "
                    "the server's log"
                ),
            )

    # ---- out, and in again

    def _take_out(self, member: _Member, reason: str) -> None:
        if member.out is None:
            member.out = reason
            _warn(f"a teacher server is taken out: {reason}")
            self._start(self._bring_back(member))

    async def _bring_back(self, member: _Member) -> None:
        """Looks at a server until it is as it was at the start."""
        delay_s = FIRST_DELAY_S
        while member.out is not None:
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LAST_DELAY_S)
            try:
                await self._check_again(member.server)
                member.out = None
            except NoAnswer as error:
                member.out = str(error)
            except ScopeError as error:  # it answers, but not as the teacher did: a person should know
                if member.out != str(error):
                    _warn(f"a teacher server stays out: {error}")
                member.out = str(error)
        _warn(f"a teacher server is back: {member.server.url}")
        self._disarm()
        self._dispatch()

    async def _check_again(self, server: TeacherServer) -> None:
        told = await server.facts()
        server.weight_version = told.weight_version  # a new start may count anew
        apart = self._distance(await self._score_canary(server))
        if apart > self._options.canary_tolerance:
            raise ScoringError(
                f"{server.url} ({told.model_path}) gives log-probs that are {apart:.3g} nats apart on "
                "average from those at the start; serve the same teacher there"
            )

    def _arm(self) -> None:
        if self._deadline is None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self._options.start_timeout_s, self._give_up)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        """Fails all that wait: no server came back in time."""
        self._deadline = None
        reasons = "; ".join(str(member.out) for member in self._members)
        while self._waiting:
            waiting = self._waiting.popleft()
            _fail(
                waiting,
                ScoringError(
                    f"the teacher did not score {waiting.request.name}: none of its servers answers or came "
                    f"back within teacher.start_timeout_s={self._options.start_timeout_s:g} ({reasons}); "
                    "start them again, and go on with --resume auto"
                ),
            )

    # ---- helpers

    async def _score_canary(self, server: TeacherServer) -> np.ndarray:
        assert self._canary is not None
        (scores,) = await server.score([self._canary])
        return scores

    def _distance(self, scores: np.ndarray) -> float:
        """The mean difference from the canary's scores at the start, in nats per token."""
        return float(np.abs(scores.astype(np.float64) - self._canary_scores).mean())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # a loop keeps only weak references
        task.add_done_callback(self._tasks.discard)


def canary(vocab_size: int, num_tokens: int) -> ScoringRequest:
    """The same ids in every run, spread over the whole vocabulary."""
    ids = np.random.default_rng(0).integers(0, vocab_size, num_tokens).tolist()
    return ScoringRequest("the canary sequence", (ids[0],), tuple(ids[1:]))


def _size(batch: Sequence[_Waiting]) -> int:
    return sum(waiting.request.num_tokens for waiting in batch)


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.scores.done():
        waiting.scores.set_exception(error)


def _failed_at_start(error: NoAnswer) -> ScoringError:
    return ScoringError(f"{error}: the teacher's servers must answer before the run starts; look at its log")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
