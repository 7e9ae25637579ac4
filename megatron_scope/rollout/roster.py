"""Who is in the pool: servers are watched, taken out, and brought back with current weights."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import Callable

from megatron_scope.errors import RolloutError, ScopeError, SyncError
from megatron_scope.rollout.addresses import AddressBook
from megatron_scope.rollout.client import ServerClient, ServerFailure, TimedOut, Unhealthy
from megatron_scope.rollout.delivery import Delivery
from megatron_scope.rollout.identity import Expectation, check_identity
from megatron_scope.rollout.member import MAX_FAILURES, Member, State


@dataclasses.dataclass(frozen=True)
class PoolOptions:
    """Bounds of the pool; times in seconds."""

    max_concurrent: int  # requests at once on one server
    health_interval_s: float
    start_timeout_s: float  # for a server to become healthy; for one to come back when none is left
    max_untaken: int = 1024  # responses that wait for their consumer before no more requests are sent
    max_tries: int = 8  # of one request, before what fails is taken to be the request


def _no_excuse() -> None:
    """Nothing is known that would explain the end of a server."""


@dataclasses.dataclass(frozen=True)
class Servers:
    """Where the servers are and what they must be.

    `router`: the URL of a router before all of them. `explain` raises the reason where the servers' end is
    known and final.
    """

    addresses: AddressBook
    connect: Callable[[str], ServerClient]
    expected: Expectation
    router: str | None = None
    explain: Callable[[], None] = _no_excuse


class Roster:
    """The servers and their states. `changed` is set whenever one of them may have become able to do more."""

    def __init__(self, servers: Servers, options: PoolOptions) -> None:
        self._servers, self._options = servers, options
        self.members = [Member(servers.connect(url)) for url in servers.addresses.urls]
        self.router = None if servers.router is None else Member(servers.connect(servers.router))
        self.delivery: Delivery | None = None
        self.changed = asyncio.Event()
        self._without_weights: set[Member] = set()  # out, and seen not to have the current weights any more

    @property
    def watched(self) -> list[Member]:
        """The servers, and the router before them if there is one."""
        return [*self.members] if self.router is None else [*self.members, self.router]

    # ---- who may be asked

    @property
    def is_serving(self) -> bool:
        """Whether any server may still answer."""
        return any(
            member.state is not State.OUT and (member.is_listed or member.tasks) for member in self.members
        )

    @property
    def is_lost(self) -> bool:
        """Whether no server can come in with the current weights: none has them, and none can get them.

        A server that is only silent may have them still.
        """
        listed = {member for member in self.members if member.is_listed}
        delivery = self.delivery
        return delivery is not None and not delivery.can_reach_later and listed <= self._without_weights

    def choose(self, home: Member | None) -> Member | None:
        """Where one more request goes: to `home` if it has room, else to the server with room and the fewest
        outstanding tokens; None when there is none.

        A router is asked only while it and every server are in: it may know less of them than we do.
        """
        router = self.router
        listed = [member for member in self.members if member.is_listed]
        if (
            router is not None
            and router.state is State.IN
            and all(member.state is State.IN for member in listed)
        ):
            return router if len(router.tasks) < len(listed) * self._options.max_concurrent else None
        able = [member for member in listed if self._has_room(member)]
        if home in able:
            return home
        return min(able, key=lambda member: member.outstanding_tokens, default=None)

    def _has_room(self, member: Member) -> bool:
        return member.state is State.IN and len(member.tasks) < self._options.max_concurrent

    def suspect(self, asked: Member, reason: str) -> None:
        """A request to `asked` failed; behind a router it may have been any server's fault."""
        if asked.state is State.IN:
            asked.num_failures += 1
        asked.suspect(reason)
        if asked is self.router:
            for member in self.members:
                member.suspect(reason)

    def stale(self, asked: Member, reason: str) -> None:
        """`asked` answered with other weights than the published ones."""
        if asked is self.router:
            self.suspect(asked, reason)  # the looks at the servers' versions tell whose they were
        elif asked.state is not State.OUT:
            self.take_out(asked, reason)
            asked.look.set()

    def nobody_left(self, failure: type[ScopeError], what: str) -> ScopeError:
        """The error that names every server and why it is out; raises a better explanation where known."""
        self._servers.explain()
        seen = "; ".join(f"{member.url}: {member.reason or 'is in again'}" for member in self.members)
        advice = ". Start a server, or mend rollout.servers"
        if self.delivery is not None and not self.delivery.can_reach_later:
            advice += (
                "; weights by broadcast reach a server only with the next version; go on with --resume auto"
            )
        return failure(f"{what}: {seen}{advice}")

    def explain(self) -> None:
        """Raises where the servers' end is known and final."""
        self._servers.explain()

    # ---- out and in

    def take_out(self, member: Member, reason: str, *, is_silent: bool = False) -> None:
        """Asks `member` no more; its unfinished requests are given up, to go elsewhere."""
        given_up = set(member.tasks)
        if is_silent and self.router is not None:
            # The router would wait for it as long as for any other answer, and cannot say whose that is.
            given_up |= self.router.tasks
        member.state, member.reason = State.OUT, reason
        moved = f"; {len(given_up)} unfinished requests go elsewhere" if given_up else ""
        warn(f"rollout server {member.url} is taken out: {reason}{moved}")
        for task in given_up:
            task.cancel()
        self.changed.set()

    def take_in(self, member: Member) -> None:
        """`member` may be asked."""
        member.state, member.reason, member.num_failures = State.IN, "", 0
        self._without_weights.discard(member)
        self.changed.set()

    async def watch(self) -> None:
        """Looks after the servers, and their list, until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for member in self.watched:
                group.create_task(self._watch(member))
            while True:
                await asyncio.sleep(self._options.health_interval_s)
                for member in self.refresh():
                    member.look.set()
                    group.create_task(self._watch(member))

    def refresh(self) -> list[Member]:
        """Follows the list of addresses: returns the new servers; those not listed any more are drained."""
        book = self._servers.addresses
        trouble = book.look()
        if trouble is not None:
            warn(trouble)
        for member in self.members:
            if member.url not in book.urls and member.is_listed:
                note(f"rollout server {member.url} is not listed any more and gets no new requests")
                member.is_listed = False
        listed = {member.url for member in self.members if member.is_listed}
        new = [Member(self._servers.connect(url)) for url in book.urls if url not in listed]
        self.members += new
        self.changed.set()
        return new

    async def drop_drained(self) -> None:
        """Closes the connections of servers that are not listed any more and have answered everything."""
        for member in [one for one in self.members if not one.is_listed and not one.tasks]:
            self.members.remove(member)
            await member.client.close()

    async def _watch(self, member: Member) -> None:
        while member.is_listed or member.tasks:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.health_interval_s):
                    await member.look.wait()
            member.look.clear()
            if member.state is State.OUT:
                await self._bring_back(member)
            else:
                await self.examine(member)

    async def examine(self, member: Member, *, version_too: bool = True) -> None:
        """Looks at a server that is in, and takes it out where it is not well or has other weights."""
        num_answers = member.num_answers
        trouble = await member.client.health()
        if trouble is None and version_too and member is not self.router:
            trouble = await self._version_trouble(member)
        if trouble is not None and trouble.silent and member.num_answers > num_answers:
            trouble = None  # busy, not hung: it has answered requests meanwhile
        if trouble is None and member.num_failures >= MAX_FAILURES:
            reason = f"{member.num_failures} failures in a row, the last: {member.reason}"
            trouble = Unhealthy(reason, silent=False)
        if member.state is State.OUT:  # by an answer that came meanwhile
            return
        if trouble is not None:
            self.take_out(member, trouble.reason, is_silent=trouble.silent)
        elif member.state is State.SUSPECT:
            member.state = State.IN
            self.changed.set()

    async def _version_trouble(self, member: Member) -> Unhealthy | None:
        assert self.delivery is not None
        try:
            version = await member.client.weight_version()
        except RolloutError as error:
            return Unhealthy(str(error), silent=isinstance(error, TimedOut))
        if version == self.delivery.version:
            return None
        return Unhealthy(f"its weight version is {version}, not {self.delivery.version}", silent=False)

    async def _bring_back(self, member: Member) -> None:
        unhealthy = await member.client.health()
        if unhealthy is not None:
            member.reason = unhealthy.reason  # no news to anybody
            if not unhealthy.silent:
                self.lacks_weights(member)
            return
        try:
            if member is not self.router:
                await self.check_fit(member)
                await self._make_current(member)
        except ScopeError as error:
            if not isinstance(error, ServerFailure):
                self.lacks_weights(member)
            if str(error) != member.reason:
                member.reason = str(error)
                warn(f"rollout server {member.url} stays out: {error}")
            return
        if member.is_listed:
            self.take_in(member)
            note(f"rollout server {member.url} is in")

    def lacks_weights(self, member: Member) -> None:
        """`member`, which is out, was seen not to have the current weights."""
        self._without_weights.add(member)
        self.changed.set()

    async def check_fit(self, member: Member) -> None:
        """ScopeError where a server that was out, and is healthy, could not take new weights.

        What it still does ends: it does that for requests which were asked elsewhere since.
        """
        await check_identity(member.client, self._servers.expected)
        await member.client.abort_all()

    async def _make_current(self, member: Member) -> None:
        """Gives the server the current weights where it has others; ScopeError where it does not get them."""
        trouble = await self._version_trouble(member)
        if trouble is None:
            return
        if trouble.silent:
            raise TimedOut(trouble.reason)
        assert self.delivery is not None
        if not await self.delivery.to_one(member.client):
            raise SyncError(f"{trouble.reason}: it waits for the next version")
        trouble = await self._version_trouble(member)
        if trouble is not None:
            raise SyncError(trouble.reason)

    async def close(self) -> None:
        """Closes all connections."""
        for member in self.watched:
            await member.client.close()


def warn(text: str) -> None:
    """One line for the person who watches the run."""
    note(f"warning: {text}")


def note(text: str) -> None:
    """The same, of good news."""
    print(text, file=sys.stderr, flush=True)
