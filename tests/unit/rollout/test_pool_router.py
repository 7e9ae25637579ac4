"""The pool with a router before its servers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from megatron_scope.errors import RolloutError
from megatron_scope.records import Rollout
from tests.unit.rollout.pool_server import (
    CLIENT,
    OPTIONS,
    Collected,
    PoolServer,
    Stage,
    group_requests,
    staged,
)

REQUESTS = group_requests(12, 4)


class Router:
    """Sends /generate to one server after another, the next one where a connection fails."""

    def __init__(self, servers: list[PoolServer]) -> None:
        self.num_asked = 0
        self._turns = itertools.cycle(servers)
        self._num_servers = len(servers)
        self.url = ""

    async def start(self) -> None:
        app = web.Application()
        app.router.add_routes([web.get("/health", self._health), web.post("/generate", self._generate)])
        self._session = aiohttp.ClientSession()
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*self._runner.addresses[0][:2])

    async def stop(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _generate(self, request: web.Request) -> web.Response:
        self.num_asked += 1
        body = await request.read()
        for server in itertools.islice(self._turns, self._num_servers):
            with contextlib.suppress(aiohttp.ClientError):
                headers = {"Content-Type": "application/json"}
                async with self._session.post(f"{server.url}/generate", data=body, headers=headers) as answer:
                    return web.Response(
                        body=await answer.read(), status=answer.status, content_type="application/json"
                    )
        return web.Response(status=503, text="no workers")


@contextlib.asynccontextmanager
async def routed(delay_s: float = 0.02) -> AsyncIterator[tuple[Stage, Router]]:
    servers = [PoolServer(delay_s=delay_s) for _ in range(3)]
    router = Router(servers)
    await router.start()
    try:
        async with staged(*servers, router=router.url) as stage:
            yield stage, router
    finally:
        await router.stop()


def test_requests_go_through_the_router_and_weights_pass_it_by() -> None:
    async def run() -> None:
        async with routed() as (stage, router):
            await stage.collect(REQUESTS)
            assert router.num_asked == len(REQUESTS)
            assert [server.updates for server in stage.servers] == [["1"]] * 3
            assert sum(server.most for server in stage.servers) <= 3 * OPTIONS.max_concurrent

    asyncio.run(run())


@pytest.mark.parametrize("fault", ["kill", "hang", "restart", "stale", "router"])
def test_whatever_fails_behind_the_router_or_in_it_no_sample_is_lost_doubled_or_stale(fault: str) -> None:
    async def run() -> None:
        async with routed() as (stage, router):
            collected, victim = Collected(), stage.servers[0]

            async def take(rollout: Rollout) -> None:
                await collected.take(rollout)
                if len(collected) != 8:
                    return
                match fault:
                    case "kill":
                        await victim.kill()
                    case "hang":
                        victim.hang()
                    case "restart":
                        await victim.kill()
                        await victim.start()
                    case "stale":
                        victim.version = "0"
                    case "router":
                        await router.stop()

            await stage.run(REQUESTS, take)
            collected.check(REQUESTS)
            if fault in ("restart", "stale"):
                assert victim.updates == ["1", "1"]

    asyncio.run(run())


def test_a_router_that_is_not_there_is_an_error_at_the_start() -> None:
    async def run() -> None:
        options = dataclasses.replace(OPTIONS, start_timeout_s=0.2)
        async with staged(PoolServer(), options=options, client=CLIENT, router="http://127.0.0.1:9"):
            raise AssertionError("not refused")

    with pytest.raises(RolloutError, match=r"http://127\.0\.0\.1:9: not healthy after 0\.2 s"):
        asyncio.run(run())
