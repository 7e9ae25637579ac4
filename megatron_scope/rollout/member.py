"""One server in the pool: whether it may be asked, and what it has been asked."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
from dataclasses import field

from megatron_scope.records import Rollout
from megatron_scope.rollout.client import ServerClient

MAX_FAILURES = 3  # in a row, of requests to a server that calls itself healthy


class State(enum.Enum):
    IN = "in"
    SUSPECT = "suspect"  # a request failed there: nothing more is sent until its health is known
    OUT = "out"


@dataclasses.dataclass(eq=False)
class Member:
    """A server and its state in the pool; it starts outside. `reason` is why it is not in.

    One that is not listed any more finishes what it was asked and gets no more.
    """

    client: ServerClient
    state: State = State.OUT
    reason: str = "not checked yet"
    is_listed: bool = True
    outstanding_tokens: int = 0  # prompt and most new tokens of what it was asked and has not answered
    tasks: set[asyncio.Task[Rollout]] = field(default_factory=set)
    look: asyncio.Event = field(default_factory=asyncio.Event)  # set: its health is to be looked at now
    num_answers: int = 0
    num_failures: int = 0  # since its last answer, each followed by a look that found it healthy

    @property
    def url(self) -> str:
        """The server's address."""
        return self.client.url

    @property
    def is_kept(self) -> bool:
        """Whether it may be asked again, at once or soon."""
        return self.is_listed and self.state is not State.OUT

    def begin(self, task: asyncio.Task[Rollout], num_tokens: int) -> None:
        """A request of `num_tokens` at most is on its way."""
        self.tasks.add(task)
        self.outstanding_tokens += num_tokens

    def end(self, task: asyncio.Task[Rollout], num_tokens: int) -> None:
        """It is over, one way or another."""
        self.tasks.discard(task)
        self.outstanding_tokens -= num_tokens

    def answered(self) -> None:
        """A response came from it."""
        self.num_answers += 1
        self.num_failures = 0

    def suspect(self, reason: str) -> None:
        """A request failed there; requests in flight go on, new ones wait for a look at its health."""
        if self.state is State.IN:
            self.state, self.reason = State.SUSPECT, reason
        self.look.set()
