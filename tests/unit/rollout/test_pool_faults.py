"""The pool on servers that die, hang, forget their weights or fail: no sample is lost, doubled or stale."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from megatron_scope.errors import RolloutError, SyncError
from megatron_scope.records import Rollout
from tests.unit.rollout.pool_server import (
    CLIENT,
    OPTIONS,
    PATIENT,
    Collected,
    PoolServer,
    Stage,
    group_requests,
    staged,
)

REQUESTS = group_requests(10, 4)


async def with_fault(stage: Stage, fault: Callable[[], Awaitable[None]], after: int = 8) -> Collected:
    """A run of REQUESTS in whose course, after so many samples, the fault happens."""
    collected = Collected()

    async def take(rollout: Rollout) -> None:
        await collected.take(rollout)
        if len(collected) == after:
            await fault()

    await stage.run(REQUESTS, take)
    collected.check(REQUESTS)
    return collected


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_server_that_dies_in_mid_step_loses_no_sample(capsys: pytest.CaptureFixture[str]) -> None:
    async def run() -> str:
        async with staged(PoolServer(delay_s=0.05), PoolServer(delay_s=0.05), client=PATIENT) as stage:
            dying, other = stage.servers
            await with_fault(stage, dying.kill)
            assert len(other.asked) > len(REQUESTS) / 2
            return dying.url

    url = asyncio.run(run())
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: rollout server {url} is taken out: ")


def test_a_server_that_hangs_in_mid_step_loses_no_sample(capsys: pytest.CaptureFixture[str]) -> None:
    async def run() -> None:
        async with staged(PoolServer(delay_s=0.05), PoolServer(delay_s=0.05)) as stage:

            async def hang() -> None:
                stage.servers[0].hang()

            await with_fault(stage, hang)

    asyncio.run(run())
    assert re.search(r"taken out: .*no answer .*within 0\.3 s.*; 4 unfinished", capsys.readouterr().err)


def test_a_server_that_was_only_slow_is_not_taken_for_hung(capsys: pytest.CaptureFixture[str]) -> None:
    """Health is not answered in time, but responses are."""

    async def run() -> None:
        async with staged(PoolServer(delay_s=0.05)) as stage:
            stage.servers[0].health_delay_s = 1.0
            await stage.collect(group_requests(20, 4))

    asyncio.run(run())
    assert capsys.readouterr().err == ""


def test_a_server_started_again_answers_nothing_before_it_has_the_weights() -> None:
    async def run() -> None:
        async with staged(PoolServer(delay_s=0.05), PoolServer(delay_s=0.05)) as stage:
            restarted, other = stage.servers

            async def restart() -> None:
                await restarted.kill()
                restarted.asked.clear()
                await restarted.start()
                assert restarted.version == "default"

            await with_fault(stage, restart)
            assert restarted.updates == ["1", "1"] and restarted.version == "1" and restarted.aborts
            assert restarted.asked  # it works again
            assert other.updates == ["1"]

    asyncio.run(run())


def test_a_hung_server_that_goes_on_comes_back_and_its_old_requests_are_ended() -> None:
    async def run() -> None:
        async with staged(PoolServer(delay_s=0.02), PoolServer(delay_s=0.02)) as stage:
            hung = stage.servers[0]
            requests, collected = group_requests(100, 2), Collected()

            async def take(rollout: Rollout) -> None:
                await collected.take(rollout)
                if len(collected) == 8:
                    hung.hang()

            running = asyncio.create_task(stage.run(requests, take))
            await until(lambda: stage.pool._roster.members[0].reason.startswith("no answer"))
            hung.asked.clear()
            hung.goes_on.set()
            await running
            collected.check(requests)
            assert hung.aborts == 1 and hung.asked and hung.updates == ["1"]  # its weights were still current

    asyncio.run(run())


def test_weights_changed_by_another_trainer_take_a_server_out_until_they_are_put_right() -> None:
    async def run() -> None:
        async with staged(PoolServer(), PoolServer()) as stage:

            async def overwrite() -> None:
                stage.servers[0].version = "7"

            await with_fault(stage, overwrite)
            assert stage.servers[0].updates == ["1", "1"]

    asyncio.run(run())


def test_errors_of_a_server_send_its_requests_elsewhere_and_often_enough_take_it_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def run() -> None:
        async with staged(PoolServer(), PoolServer()) as stage:
            stage.servers[0].fail = lambda: web.Response(status=500, text="no memory")
            await stage.collect(REQUESTS)

    asyncio.run(run())
    assert "taken out: 3 failures in a row, the last: " in capsys.readouterr().err


def test_a_request_that_every_server_fails_on_is_an_error_that_names_it() -> None:
    async def run() -> None:
        async with staged(PoolServer(), PoolServer()) as stage:
            for server in stage.servers:
                server.fail = lambda: web.Response(status=500, text="assertion")
            await stage.run(group_requests(1, 1), Collected().take)

    with pytest.raises(RolloutError, match=r"'p0' sample 0 failed 8 times.*HTTP 500: assertion"):
        asyncio.run(run())


def test_an_aborted_sample_is_asked_again_and_in_the_end_handed_on_as_it_is() -> None:
    async def run(num_aborts: int) -> list[str]:
        async with staged(PoolServer()) as stage:
            stage.servers[0].num_aborts_due = num_aborts
            return [rollout.finish_reason for rollout in await stage.collect(group_requests(1, 1))]

    assert asyncio.run(run(5)) == ["length"]
    assert asyncio.run(run(50)) == ["abort"]


def test_a_request_over_its_time_limit_is_asked_elsewhere() -> None:
    async def run() -> None:
        client = dataclasses.replace(CLIENT, request_timeout_s=0.2)
        async with staged(PoolServer(delay_s=30), PoolServer(), client=client) as stage:
            await stage.collect(group_requests(2, 1))

    asyncio.run(run())


def test_without_any_server_the_run_waits_and_goes_on_when_one_comes_back() -> None:
    async def run() -> None:
        async with staged(PoolServer(delay_s=0.02)) as stage:
            server = stage.servers[0]

            async def restart_later() -> None:
                await server.kill()
                asyncio.get_running_loop().call_later(
                    0.3, lambda: tasks.append(asyncio.create_task(server.start()))
                )

            tasks: list[asyncio.Task[None]] = []
            await with_fault(stage, restart_later)
            assert server.updates == ["1", "1"]

    asyncio.run(run())


def test_when_no_server_comes_back_the_error_names_each_and_why() -> None:
    async def run() -> None:
        options = dataclasses.replace(OPTIONS, start_timeout_s=0.5)
        async with staged(PoolServer(delay_s=0.05), PoolServer(delay_s=0.05), options=options) as stage:
            dead, hung = stage.servers

            async def both() -> None:
                await dead.kill()
                hung.hang()

            with pytest.raises(
                RolloutError,
                match=rf"none came back within 0.5 s \(rollout.start_timeout_s\): {dead.url}: .*onnect.*; "
                rf"{hung.url}: no answer to GET /health within 0.3 s. Start a server",
            ):
                await with_fault(stage, both)

    asyncio.run(run())


def test_a_known_end_of_the_servers_is_told_without_waiting() -> None:
    async def run() -> None:
        def explain() -> None:
            if stage.servers[0]._runner is None:
                raise RolloutError("exit code 9, the end of its log: ...")

        options = dataclasses.replace(OPTIONS, start_timeout_s=900)
        async with staged(PoolServer(delay_s=0.05), options=options, explain=explain) as stage:
            with pytest.raises(RolloutError, match="exit code 9"):
                await with_fault(stage, stage.servers[0].kill)
            with pytest.raises(RolloutError, match="exit code 9"):
                await stage.publish(2)

    asyncio.run(run())


# ---- publishing


def test_a_dead_server_misses_a_version_and_is_in_with_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    async def run() -> None:
        async with staged(PoolServer(), PoolServer(), client=PATIENT) as stage:
            dead, other = stage.servers
            await dead.kill()
            await stage.publish(2)
            await stage.collect(REQUESTS, version=2)
            assert not dead.asked
            await dead.start()
            await stage.publish(3)
            await stage.collect(REQUESTS, version=3)
            assert dead.asked and dead.updates == ["1", "3"] and other.updates == ["1", "2", "3"]

    asyncio.run(run())
    assert capsys.readouterr().err.count("is taken out") == 1


def test_a_server_that_refuses_the_weights_is_taken_out_later_but_not_at_the_start() -> None:
    async def run() -> None:
        async with staged(PoolServer(), PoolServer()) as stage:
            stage.servers[0].refuses_weights = True
            await stage.publish(2)
            await stage.collect(REQUESTS, version=2)
            assert not stage.servers[0].asked
            stage.servers[1].refuses_weights = True
            with pytest.raises(
                SyncError, match=r"no server took weight version 3: http.*full disk.*; http.*full disk"
            ):
                await stage.publish(3)
        refusing = PoolServer()
        refusing.refuses_weights = True
        async with staged(PoolServer(), refusing):
            raise AssertionError("not refused")

    with pytest.raises(SyncError, match="HTTP 400: full disk"):
        asyncio.run(run())


def test_a_server_that_says_it_took_the_weights_but_serves_others_does_not_count() -> None:
    async def run() -> None:
        async with staged(PoolServer(), PoolServer()) as stage:
            stage.servers[0].forgets_weights = True
            await stage.publish(2)
            await stage.collect(REQUESTS, version=2)
            assert not stage.servers[0].asked

    asyncio.run(run())


def test_a_server_of_another_model_does_not_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    async def run() -> None:
        async with staged(PoolServer(delay_s=0.05), PoolServer(delay_s=0.05)) as stage:
            replaced = stage.servers[0]

            async def replace() -> None:
                await replaced.kill()
                replaced.asked.clear()
                replaced.model["model_type"] = "llama"
                await replaced.start()

            await with_fault(stage, replace)
            assert replaced.updates == ["1"]
            await stage.publish(2)
            assert replaced.updates == ["1"]

    asyncio.run(run())
    assert "stays out: http" in capsys.readouterr().err


# ---- all at once, at random


@pytest.mark.parametrize("seed", range(6))
def test_every_sample_is_handed_on_exactly_once_whatever_fails(seed: int) -> None:
    rng = random.Random(seed)

    def flaky() -> web.Response | None:
        return web.Response(status=500) if rng.random() < 0.1 else None

    async def misbehave(servers: list[PoolServer]) -> None:
        """One fault after another; the last server is spared death and hanging, so that one is left."""
        while True:
            await asyncio.sleep(rng.uniform(0, 0.05))
            server = rng.choice(servers)
            match rng.choice(("kill", "start", "hang", "go on", "stale", "flaky", "sound")):
                case "kill" if server is not servers[-1]:
                    await server.kill()
                case "start" if server._runner is None:
                    await server.start()
                case "hang" if server is not servers[-1]:
                    server.hang()
                case "go on":
                    server.goes_on.set()
                case "stale":
                    server.version = "0"
                case "flaky":
                    server.fail = flaky
                case "sound":
                    server.fail = lambda: None

    async def run() -> None:
        servers = [PoolServer(delay_s=0.02) for _ in range(4)]
        options = dataclasses.replace(OPTIONS, max_tries=100, max_untaken=7)
        client = dataclasses.replace(CLIENT, probe_timeout_s=0.1)
        async with staged(*servers, options=options, client=client) as stage:
            chaos = asyncio.create_task(misbehave(servers))
            requests = group_requests(60, 8)
            await stage.collect(requests)
            chaos.cancel()

    asyncio.run(run())
