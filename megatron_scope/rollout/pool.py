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
from megatron_scope.task_groups import first_failure, run_all

__all__ = ["PoolOptions", "ServerPool", "Servers"]

OUT_LOOK_S = 5.0  # for a look at a server that is out, for which the others wait; SGLang's /health takes 1 s
FIT_POLL_S = 1.0  # how often at most servers are looked at while none can take new weights


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
        comes in; SyncError when none can take them for `start_timeout_s`, or none does.
        """
        if self._roster.delivery is None:
            await self._publishfirst_failure(delivery)
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
        `on_rollout`; RolloutError when no server is left for `start_timeout_s`, or can come back.
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
        await self._watched(dispatch.run())

    async def probe(
        self, requests: Sequence[RolloutRequest], params: SamplingParams
    ) -> dict[str, list[Rollout]]:
        """The answers of each server in service, by URL, to the same requests, asked without a router.

        A server that does not answer with the published weights, or hangs, is taken out; RolloutError when
        none answers.
        """
        roster, answers = self._roster, dict[str, list[Rollout]]()

        async def ask(member: Member) -> None:
            try:
                drawn = await self._ask_all(member, requests, params)
            except (ServerFailure, StaleWeights) as error:
                if member.state is not State.OUT:
                    roster.take_out(member, str(error))
            else:
                if drawn is not None:
                    answers[member.url] = drawn

        await self._watched(run_all(*(ask(member) for member in roster.members if member.state is State.IN)))
        if not answers:
            raise roster.nobody_left(RolloutError, "no rollout server answers a probe")
        return answers

    async def _ask_all(
        self, member: Member, requests: Sequence[RolloutRequest], params: SamplingParams
    ) -> list[Rollout] | None:
        """What one server draws; None where it was taken out meanwhile. The first failure ends the others."""
        delivery = self._roster.delivery
        assert delivery is not None

        async def draw(request: RolloutRequest) -> Rollout:
            rollout = await member.client.generate(request, params, version=delivery.version)
            member.answered()
            return rollout

        tasks: dict[asyncio.Task[Rollout], int] = {}
        for request in requests:
            task = asyncio.create_task(draw(request))
            tasks[task] = len(request.prompt.token_ids) + params.max_new_tokens
            member.begin(task, tasks[task])
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if any(task.cancelled() for task in ended):
                return None
            for task in ended:
                task.result()
            return [task.result() for task in tasks]
        finally:
            for task, num_tokens in tasks.items():
                task.cancel()
                member.end(task, num_tokens)
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watched(self, work: Coroutine[Any, Any, None]) -> None:
        """Does `work` while the servers are looked after; the first error ends both."""
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._roster.watch())
                await work
                watch.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None

    async def close(self) -> None:
        """Closes the connections; servers abort what was open on them."""
        await self._roster.close()

    # ---- weights

    async def _publishfirst_failure(self, delivery: Delivery) -> None:
        roster = self._roster
        await run_all(*(one.client.wait_healthy(self._options.start_timeout_s) for one in roster.watched))
        await run_all(*(check_identity(member.client, self._servers.expected) for member in roster.members))
        failures = await self._deliver(delivery, roster.members)
        if failures:
            raise next(iter(failures.values()))
        for member in roster.watched:
            roster.take_in(member)

    async def _publish_next(self, delivery: Delivery) -> None:
        roster = self._roster
        fit = await self._some_fit()
        failures = await self._deliver(delivery, fit)
        for member in roster.members:
            if member not in fit:
                roster.lacks_weights(member)
            elif member.url in failures:
                roster.take_out(member, str(failures[member.url]))
            else:
                roster.take_in(member)
        if len(failures) == len(fit):
            raise roster.nobody_left(SyncError, f"no server took weight version {delivery.version}")

    async def _some_fit(self) -> list[Member]:
        """The servers that can take new weights; where there are none, waits `start_timeout_s` for one."""
        roster, limit_s = self._roster, self._options.start_timeout_s
        now = asyncio.get_running_loop().time
        deadline = now() + limit_s
        while True:
            roster.refresh()
            await roster.drop_drained()
            fit = await self._fit()
            if fit:
                return fit
            roster.explain()
            if now() >= deadline:
                raise roster.nobody_left(
                    SyncError,
                    "no rollout server can take new weights, and none came back within "
                    f"{limit_s:g} s (rollout.start_timeout_s)",
                )
            await asyncio.sleep(min(self._options.health_interval_s, FIT_POLL_S))

    async def _fit(self) -> list[Member]:
        """The servers that can take new weights; those that were in and cannot are taken out."""
        roster = self._roster

        async def look(member: Member) -> None:
            if member.state is not State.OUT:
                await roster.examine(member, version_too=False)
                if member.state is State.IN:
                    fit.append(member)
                return
            try:
                async with asyncio.timeout(OUT_LOOK_S):
                    unhealthy = await member.client.health()
                    if unhealthy is not None:
                        raise RolloutError(unhealthy.reason)
                    await roster.check_fit(member)
                fit.append(member)
            except TimeoutError:
                member.reason = f"no answer within {OUT_LOOK_S:g} s"
            except ScopeError as error:
                member.reason = str(error)

        fit: list[Member] = []
        await run_all(*(look(member) for member in roster.members))
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

        await run_all(*(confirm(member) for member in members if member.url not in failures))
        return failures
