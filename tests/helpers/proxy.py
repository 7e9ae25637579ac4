"""A proxy in front of a rollout server, to act before a request, or to hold its answer back or change it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp import web

Meet = Callable[[str, Any], None]
Delay = Callable[[str, Any], float]
Change = Callable[[str, bytes], bytes]


class Proxy:
    """Passes requests on to `target`, each after `meet(path, body)` and its answer `delay(path, body)`
    seconds late and as `change(path, answer)` makes it; a context manager that runs in a thread of its own.

    When the connection to the target breaks, so does that to the client.
    """

    def __init__(
        self,
        target: str,
        delay: Delay = lambda path, body: 0.0,
        change: Change = lambda path, answer: answer,
        meet: Meet = lambda path, body: None,
    ) -> None:
        self.url = ""
        self._target, self._delay, self._change, self._meet = target, delay, change, meet
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession()
        app = web.Application(client_max_size=2**28)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*self._runner.addresses[0][:2])

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        where = self._target + request.path_qs
        headers = {"Content-Type": "application/json"}
        body = json.loads(data) if data else None
        await asyncio.to_thread(self._meet, request.path, body)
        try:
            async with self._session.request(request.method, where, data=data, headers=headers) as answer:
                content = await answer.read()
        except aiohttp.ClientError:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        await asyncio.sleep(self._delay(request.path, body))
        return web.Response(
            status=answer.status, body=self._change(request.path, content), content_type=answer.content_type
        )
