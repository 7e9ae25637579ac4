"""Many rollout servers as one: requests go where there is room, and servers may come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from megatron_scope.errors import RolloutError, ScopeError, SyncError
from megatron_scope.records import Rollout, SamplingParams
from megatron_scope.rollout.client import ServerFailure
from megatron_scope.rollout.delivery import Delivery
from megatron_scope.rollout.dispatch import Dispatch, OnRollout
from megatron_scope.rollout.identity import check_identity
from megatron_scope.rollout.member import Member, State
from megatron_scope.rollout.roster import PoolOptions, Roster, Servers
from megatron_scope.rollout.wire import RolloutRequest, StaleWeights

__all__ = ["PoolOptions", "ServerPool", "Servers"]


class ServerPool:
    """Draws responses from servers that all serve the published weights.

    `publish` comes before the first `run`, and never during one; one `run` at a time. A server that is dead,
    hung or stale is taken out with a line on stderr and comes back with current weights.
    """

    def __init__(self, servers: Servers, options: PoolOptions) -> None:
        self._servers, self._options = servers, options
        self._roster = Roster(servers, options)

    async def publish(self, delivery: Delivery) -> None:
        """Delivers new weights to every server and reads the version back.

        The first time every server must be there, be what is expected and take the weights: RolloutError or
        SyncError for the first that is not. Later a server that fails is taken out, and one that was out
        comes in; SyncError when none is left.
        """
        if self._roster.delivery is None:
            await self._publish_first(delivery)
        else:
            await self._publish_next(delivery)

    async def run(
        self,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        version: int,
        on_rollout: OnRollout,
    ) -> None:
        """Awaits `on_rollout` with one Rollout for each request, in whatever order they arrive.

        Every response is of weight `version`. A prompt's requests go to one server, which then reads it
        once. Up to `max_untaken` calls of `on_rollout` are open at a time; meanwhile nothing more is asked.
        The first request that finally fails ends the others, and its error is raised, as are those of
        `on_rollout`; RolloutError when no server is left for `start_timeout_s`.
        """
        delivery = self._roster.delivery
        if delivery is None or delivery.version != version:
            published = None if delivery is None else delivery.version
            raise RolloutError(
                f"responses of weight version {version} are asked for, but {published} is published; publish "
                "first"
            )
        dispatch = Dispatch(
            self._roster, self._options, requests, params, version=version, on_rollout=on_rollout
        )
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._roster.watch())
                await dispatch.run()
                watch.cancel()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None

    async def probe(
        self, requests: Sequence[RolloutRequest], params: SamplingParams
    ) -> dict[str, list[Rollout]]:
        """The answers of each server in service, by URL, to the same requests, asked without a router.

        A server that does not answer with the published weights is taken out; RolloutError when none is left.
        """
        delivery, roster = self._roster.delivery, self._roster
        assert delivery is not None
        answers: dict[str, list[Rollout]] = {}

        async def ask(member: Member) -> None:
            asked = (
                member.client.generate(request, params, version=delivery.version) for request in requests
            )
            try:
                answers[member.url] = await asyncio.gather(*asked)
            except (ServerFailure, StaleWeights) as error:
                roster.take_out(member, str(error))

        await _all(*(ask(member) for member in roster.members if member.state is State.IN))
        if not answers:
            raise roster.nobody_left(RolloutError, "no rollout server answers a probe")
        return answers

    async def close(self) -> None:
        """Closes the connections; servers abort what was open on them."""
        await self._roster.close()

    # ---- weights

    async def _publish_first(self, delivery: Delivery) -> None:
        roster = self._roster
        await _all(*(one.client.wait_healthy(self._options.start_timeout_s) for one in roster.watched))
        await _all(*(check_identity(member.client, self._servers.expected) for member in roster.members))
        failures = await self._deliver(delivery, roster.members)
        if failures:
            raise next(iter(failures.values()))
        for member in roster.watched:
            roster.take_in(member)

    async def _publish_next(self, delivery: Delivery) -> None:
        roster = self._roster
        roster.refresh()
        await roster.drop_drained()
        fit = await self._fit()
        failures = await self._deliver(delivery, fit) if fit else {}
        for member in fit:
            if member.url in failures:
                roster.take_out(member, str(failures[member.url]))
            else:
                roster.take_in(member)
        if len(failures) == len(fit):
            raise roster.nobody_left(SyncError, f"no server took weight version {delivery.version}")

    async def _fit(self) -> list[Member]:
        """The servers that can take new weights; those that were in and cannot are taken out."""
        roster = self._roster

        async def look(member: Member) -> None:
            if member.state is not State.OUT:
                await roster.examine(member, version_too=False)
                if member.state is State.IN:
                    fit.append(member)
                return
            unhealthy = await member.client.health()
            try:
                if unhealthy is not None:
                    raise RolloutError(unhealthy.reason)
                await roster.check_fit(member)
                fit.append(member)
            except ScopeError as error:
                member.reason = str(error)

        fit: list[Member] = []
        await _all(*(look(member) for member in roster.members))
        return fit

    async def _deliver(self, delivery: Delivery, members: Sequence[Member]) -> dict[str, ScopeError]:
        """The servers, by URL, that did not take the weights, with the reason."""
        failures = await delivery.to_all([member.client for member in members])
        self._roster.delivery = delivery

        async def confirm(member: Member) -> None:
            try:
                version = await member.client.weight_version()
            except RolloutError as error:
                failures[member.url] = error
                return
            if version != delivery.version:
                failures[member.url] = SyncError(
                    f"{member.url}: weight version is {version} after an update to {delivery.version}; does "
                    "another trainer use this server?"
                )

        await _all(*(confirm(member) for member in members if member.url not in failures))
        return failures


async def _all(*work: Coroutine[Any, Any, None]) -> None:
    """Runs all at once; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as failures:
        raise _first(failures) from None


def _first(failures: BaseExceptionGroup) -> BaseException:
    """The earliest leaf of a task group's failures; the others only follow from it."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
