"""The pool on servers that are well: routing, bounds, back-pressure, what is refused at once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import pytest
from aiohttp import web

from megatron_scope.errors import RolloutError
from megatron_scope.records import Rollout
from tests.unit.rollout.pool_server import (
    CLIENT,
    OPTIONS,
    PARAMS,
    VERSION,
    Collected,
    PoolServer,
    group_requests,
    prompts_of,
    staged,
)

KEY = "s3cret-key"


def test_every_sample_arrives_once_and_no_server_is_asked_more_than_it_may() -> None:
    async def run() -> None:
        async with staged(PoolServer(), PoolServer()) as stage:
            await stage.collect(group_requests(12, 4))
            assert [server.most for server in stage.servers] == [4, 4]
            assert all(m.outstanding_tokens == 0 and not m.tasks for m in stage.pool._roster.members)

    asyncio.run(run())


def test_a_group_stays_on_one_server() -> None:
    async def run() -> None:
        options = dataclasses.replace(OPTIONS, max_concurrent=100)
        async with staged(PoolServer(), PoolServer(), options=options) as stage:
            await stage.collect(group_requests(8, 4))
            first, second = map(prompts_of, stage.servers)
            assert not first & second and len(first | second) == 8

    asyncio.run(run())


def test_a_new_group_goes_to_the_server_with_the_fewest_outstanding_tokens() -> None:
    """Prompt k has k + 1 tokens, and 4 new ones: 5, 6, 7, 8."""

    async def run() -> None:
        async with staged(PoolServer(), PoolServer()) as stage:
            await stage.collect(group_requests(4, 1))
            assert list(map(prompts_of, stage.servers)) == [{"p0", "p2"}, {"p1", "p3"}]
        requests = [request for request in group_requests(9, 1) if request.prompt.id in ("p8", "p0", "p1")]
        async with staged(PoolServer(), PoolServer()) as stage:
            await stage.collect(requests[::-1])  # 13, then 6 and 5
            assert list(map(prompts_of, stage.servers)) == [{"p8"}, {"p0", "p1"}]

    asyncio.run(run())


def test_a_group_without_room_at_home_goes_on_elsewhere() -> None:
    async def run() -> None:
        async with staged(PoolServer(), PoolServer()) as stage:
            await stage.collect(group_requests(1, 12))
            assert [len(server.asked) > 3 for server in stage.servers] == [True, True]

    asyncio.run(run())


def test_a_slow_consumer_stops_the_asking() -> None:
    async def run() -> None:
        async with staged(PoolServer(), options=dataclasses.replace(OPTIONS, max_untaken=3)) as stage:
            open_now = most = 0
            release, collected = asyncio.Event(), Collected()

            async def take(rollout: Rollout) -> None:
                nonlocal open_now, most
                open_now += 1
                most = max(most, open_now)
                await release.wait()
                open_now -= 1
                await collected.take(rollout)

            requests = group_requests(30, 1)
            running = asyncio.create_task(stage.run(requests, take))
            await asyncio.sleep(0.5)
            # Three responses wait for their consumer; no more is asked than was on its way before that.
            assert most == 3 and len(stage.servers[0].asked) <= 3 + OPTIONS.max_concurrent
            release.set()
            await running
            collected.check(requests)
            assert most == 3

    asyncio.run(run())


def test_an_error_of_the_consumer_is_raised_and_ends_the_requests() -> None:
    async def run() -> None:
        async with staged(PoolServer(delay_s=0.05)) as stage:

            async def refuse(rollout: Rollout) -> None:
                raise ValueError("full")

            with pytest.raises(ValueError, match="full"):
                await stage.run(group_requests(40, 1), refuse)
            assert len(stage.servers[0].asked) <= 8
            assert all(m.outstanding_tokens == 0 and not m.tasks for m in stage.pool._roster.members)
            await stage.collect(group_requests(4, 2))  # the pool is as good as before

    asyncio.run(run())


def test_cancelling_a_run_leaves_the_pool_as_it_was() -> None:
    async def run() -> None:
        async with staged(PoolServer(delay_s=0.2)) as stage:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await stage.pool.run(group_requests(8, 1), PARAMS, VERSION, Collected().take)
            stage.servers[0].delay_s = 0
            await stage.collect(group_requests(4, 2))

    asyncio.run(run())


def test_a_refused_request_is_an_error_at_once_and_ends_the_others() -> None:
    async def run() -> None:
        async with staged(PoolServer(), PoolServer()) as stage:
            for server in stage.servers:
                server.fail = lambda: web.json_response({"error": {"message": "input too long"}}, status=400)
            with pytest.raises(RolloutError, match="HTTP 400: input too long"):
                await stage.run(group_requests(40, 1), Collected().take)
            assert sum(len(server.asked) for server in stage.servers) <= 2 * OPTIONS.max_concurrent

    asyncio.run(run())


def test_a_nonsense_answer_is_an_error_at_once() -> None:
    async def run() -> None:
        async with staged(PoolServer(), PoolServer()) as stage:
            for server in stage.servers:
                server.fail = lambda: web.json_response({"meta_info": {}})
            with pytest.raises(RolloutError, match="output_ids that are not token ids"):
                await stage.run(group_requests(40, 1), Collected().take)

    asyncio.run(run())


@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_wrong_key_is_an_error_that_does_not_tell_it(key: str | None) -> None:
    async def run() -> None:
        async with staged(PoolServer(key=KEY), key=key):
            raise AssertionError("not refused")

    with pytest.raises(RolloutError, match=r"HTTP 401.*rollout\.api_key_env") as caught:
        asyncio.run(run())
    assert KEY not in str(caught.value) and "wrong" not in str(caught.value).replace("missing or wrong", "")


def test_the_key_goes_to_every_server() -> None:
    async def run() -> None:
        async with staged(PoolServer(key=KEY), PoolServer(key=KEY), key=KEY) as stage:
            await stage.collect(group_requests(8, 2))
            assert all(server.asked for server in stage.servers)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda server: server.model.update(model_type="llama"), r"another model, '/m' \(model_type llama"),
        (lambda server: server.model.update(architectures=["Qwen3ForCausalLM"]), "another model"),
        (lambda server: server.model.update(is_generation=False), "generates nothing"),
        (
            lambda server: setattr(server, "sglang", "0.4.9.post6"),
            r"version is '0.4.9.post6'; expected SGLang from 0.5.23 to below 0.6 \(0.5.23 is tested\): serve",
        ),
        (lambda server: setattr(server, "sglang", "0.6.1"), "version is '0.6.1'; expected SGLang"),
        (lambda server: setattr(server, "sglang", None), "version is 'None'"),
    ],
)
def test_another_model_or_software_is_one_clear_error(
    break_it: Callable[[PoolServer], None], said: str
) -> None:
    async def run() -> None:
        good, bad = PoolServer(), PoolServer()
        break_it(bad)
        try:
            async with staged(good, bad):
                raise AssertionError("not refused")
        finally:
            assert not good.updates and not bad.updates  # nothing was loaded before that

    with pytest.raises(RolloutError, match=said):
        asyncio.run(run())


def test_a_server_that_is_not_there_at_the_start_is_named() -> None:
    async def run() -> None:
        dead = PoolServer()
        options = dataclasses.replace(OPTIONS, start_timeout_s=0.3)
        async with staged(dead, options=options, published=False) as stage:
            await dead.kill()
            with pytest.raises(RolloutError, match=rf"{dead.url}: not healthy after 0.3 s"):
                await stage.publish(VERSION)

    asyncio.run(run())


def test_only_published_weights_can_be_asked_for() -> None:
    async def run() -> None:
        async with staged(PoolServer(), published=False) as stage:
            with pytest.raises(RolloutError, match="version 1 are asked for, but None is published"):
                await stage.run([], Collected().take)
            await stage.publish(VERSION)
            await stage.collect([])
            with pytest.raises(RolloutError, match="version 2 are asked for, but 1 is published"):
                await stage.run([], Collected().take, version=2)

    asyncio.run(run())


def test_two_thousand_requests_in_flight() -> None:
    async def run() -> None:
        options = dataclasses.replace(OPTIONS, max_concurrent=2000)
        patient = dataclasses.replace(CLIENT, probe_timeout_s=10)  # all of it runs in one thread here
        async with staged(PoolServer(), options=options, client=patient) as stage:
            stage.servers[0].crowd = 2000
            requests, collected = group_requests(20, 100), Collected()
            await asyncio.wait_for(stage.pool.run(requests, PARAMS, VERSION, collected.take), 300)
            collected.check(requests)
            assert stage.servers[0].most == 2000

    asyncio.run(run())
