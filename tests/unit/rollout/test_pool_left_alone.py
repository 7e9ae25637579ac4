"""Who is waited for: by a probe, by a publish, and by a run when no server is left."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from megatron_scope.errors import RolloutError, SyncError
from megatron_scope.records import Rollout
from megatron_scope.rollout import pool as pool_module
from megatron_scope.rollout.member import State
from tests.unit.rollout.pool_server import (
    CLIENT,
    OPTIONS,
    PARAMS,
    VERSION,
    Collected,
    OnceDelivery,
    PoolServer,
    Stage,
    group_requests,
    staged,
)

PROBE = group_requests(4, 1)
NEXT_VERSION_ONLY = "weights by broadcast reach a server only with the next version; go on with --resume auto"


async def probe(stage: Stage) -> dict[str, list[Rollout]]:
    return await asyncio.wait_for(stage.pool.probe(PROBE, PARAMS), 30)


def on_pool(
    test: Callable[[Stage], Awaitable[None]], *servers: PoolServer, start_timeout_s: float = 10
) -> None:
    async def run() -> None:
        options = dataclasses.replace(OPTIONS, start_timeout_s=start_timeout_s)
        async with staged(*servers, options=options, published=False) as stage:
            await test(stage)

    asyncio.run(run())


# ---- a probe


def test_a_probe_takes_out_a_hung_server_and_brings_the_answers_of_the_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def test(stage: Stage) -> None:
        await stage.publish(VERSION)
        hung, well = stage.servers
        hung.hang()
        answers = await probe(stage)
        assert list(answers) == [well.url]
        assert [one.prompt.id for one in answers[well.url]] == ["p0", "p1", "p2", "p3"]
        assert all(not m.tasks and m.outstanding_tokens == 0 for m in stage.pool._roster.members)
        hung.goes_on.set()
        await stage.collect(group_requests(30, 4))

    on_pool(test, PoolServer(), PoolServer())
    assert re.search(r"taken out: .*within 0\.3 s.*; 4 unfinished requests", capsys.readouterr().err)


def test_a_probe_that_no_server_answers_is_an_error_that_names_each() -> None:
    async def test(stage: Stage) -> None:
        await stage.publish(VERSION)
        for server in stage.servers:
            server.hang()
        first, second = (re.escape(server.url) for server in stage.servers)
        said = (
            rf"no rollout server answers a probe: {first}: no answer.*; {second}: no answer.*Start a server"
        )
        with pytest.raises(RolloutError, match=said):
            await probe(stage)

    on_pool(test, PoolServer(), PoolServer())


def test_the_first_failure_of_a_probe_ends_the_other_requests_to_that_server() -> None:
    async def test(stage: Stage) -> None:
        await stage.publish(VERSION)
        failing, well = stage.servers

        def fail_the_last() -> web.Response | None:
            return web.Response(status=500) if len(failing.asked) == len(PROBE) else None

        failing.fail, failing.delay_s = fail_the_last, 250
        assert list(await probe(stage)) == [well.url]
        async with asyncio.timeout(10):
            while failing.now:  # the server sees that their connections are closed
                await asyncio.sleep(0.01)
        well.fail = lambda: web.json_response({"error": {"message": "input too long"}}, status=400)
        with pytest.raises(RolloutError, match="HTTP 400: input too long"):  # the request's fault: an error
            await probe(stage)

    on_pool(test, PoolServer(), PoolServer())


def test_a_probe_of_a_server_with_other_weights_takes_it_out(capsys: pytest.CaptureFixture[str]) -> None:
    async def test(stage: Stage) -> None:
        await stage.publish(VERSION)
        stage.servers[0].version = "7"
        assert list(await probe(stage)) == [stage.servers[1].url]

    on_pool(test, PoolServer(), PoolServer())
    assert capsys.readouterr().err.count("is taken out: ") == 1


# ---- publishing


def test_publishing_waits_for_a_server_that_comes_back() -> None:
    async def test(stage: Stage) -> None:
        await stage.publish(VERSION)
        server = stage.servers[0]
        await server.kill()
        publishing = asyncio.create_task(stage.publish(2))
        async with asyncio.timeout(10):
            while stage.pool._roster.members[0].state is not State.OUT:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # several looks
        assert not publishing.done()
        await server.start()
        await asyncio.wait_for(publishing, 30)
        await stage.collect(PROBE, version=2)
        assert server.updates == ["1", "2"]

    on_pool(test, PoolServer())


def test_publishing_ends_when_no_server_comes_back_in_time() -> None:
    async def test(stage: Stage) -> None:
        await stage.publish(VERSION)
        await stage.servers[0].kill()
        said = r"none came back within 0\.3 s \(rollout\.start_timeout_s\): http.*onnect.*Start a server"
        with pytest.raises(SyncError, match=said):
            await asyncio.wait_for(stage.publish(2), 30)

    on_pool(test, PoolServer(), start_timeout_s=0.3)


def test_a_silent_server_that_is_out_does_not_hold_up_a_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "OUT_LOOK_S", 0.1)

    async def run() -> None:
        patient = dataclasses.replace(CLIENT, probe_timeout_s=300)
        async with staged(PoolServer(), PoolServer(), client=patient) as stage:
            silent = stage.pool._roster.members[0]
            stage.pool._roster.take_out(silent, "hangs")
            stage.servers[0].hang()
            await asyncio.wait_for(stage.publish(2), 30)
            assert silent.state is State.OUT and silent.reason == "no answer within 0.1 s"
            assert stage.servers[1].updates == ["1", "2"]

    asyncio.run(run())


# ---- weights that reach a server only at once


async def run_with(stage: Stage, fault: Callable[[], Awaitable[None]]) -> Collected:
    """A run, weights by `OnceDelivery`, in whose course the fault happens."""
    await stage.pool.publish(OnceDelivery(Path("/w"), VERSION))
    collected = Collected()

    async def take(rollout: Rollout) -> None:
        await collected.take(rollout)
        if len(collected) == 8:
            await fault()

    requests = group_requests(10, 4)
    await stage.run(requests, take)
    collected.check(requests)
    return collected


@pytest.mark.parametrize("starts_again", [False, True])
def test_a_run_ends_at_once_when_no_server_can_get_its_weights_any_more(starts_again: bool) -> None:
    async def test(stage: Stage) -> None:
        async def restart() -> None:
            for server in stage.servers:
                await server.kill()
                if starts_again:
                    await server.start()

        with pytest.raises(RolloutError, match=f"no rollout server is left: http.*; {NEXT_VERSION_ONLY}"):
            await run_with(stage, restart)

    on_pool(test, PoolServer(delay_s=0.05), PoolServer(delay_s=0.05), start_timeout_s=900)


def test_a_hung_server_is_waited_for_since_it_may_have_its_weights_still() -> None:
    async def test(stage: Stage) -> None:
        server = stage.servers[0]

        async def hang() -> None:
            server.hang()
            waking.append(asyncio.create_task(wake()))

        async def wake() -> None:
            while not stage.pool._roster.members[0].reason.startswith("no answer"):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)  # a silent look or more
            server.goes_on.set()

        waking: list[asyncio.Task[None]] = []
        await run_with(stage, hang)
        assert server.updates == ["1"]

    on_pool(test, PoolServer(delay_s=0.05))


def test_a_server_that_missed_its_weights_comes_in_with_the_next_version() -> None:
    async def test(stage: Stage) -> None:
        restarted, other = stage.servers

        async def restart() -> None:
            await restarted.kill()
            await restarted.start()

        await run_with(stage, restart)
        assert restarted.updates == ["1"] and other.updates == ["1"]
        await stage.pool.publish(OnceDelivery(Path("/w"), 2))
        await stage.collect(group_requests(10, 4), version=2)
        assert restarted.updates == ["1", "2"]

    on_pool(test, PoolServer(delay_s=0.05), PoolServer(delay_s=0.05))
