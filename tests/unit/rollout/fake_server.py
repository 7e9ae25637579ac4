"""A scripted server for the client's tests, and a good answer of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from megatron_scope.records import Prompt, SamplingParams
from megatron_scope.rollout.client import ClientOptions

PARAMS = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=4, stop_token_ids=(9,))
PROMPT = Prompt("p7", (1, 2, 3), "6", "math")
KEY = "s3cret-key"
FAST = ClientOptions(
    request_timeout_s=5, control_timeout_s=5, probe_timeout_s=5, num_retries=2, first_delay_s=0.01
)
GOOD: dict[str, Any] = {
    "text": "45",
    "output_ids": [4, 5, 9],
    "meta_info": {
        "id": "r",
        "finish_reason": {"type": "stop", "matched": 9},
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "weight_version": "3",
        "weight_versions": [{"version": "3", "start": 0, "end": 3}],
        "input_token_logprobs": [],
        "output_token_logprobs": [[-0.5, 4, None], [-1.5, 5, None], [-0.25, 9, None]],
    },
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Fake:
    """A server whose paths answer as scripted, and that remembers what it was sent."""

    def __init__(self, **handlers: Handler) -> None:
        self.bodies: list[Any] = []
        self.headers: list[Any] = []
        self.url = ""
        self._handlers = handlers

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(request.headers.copy())
        if request.can_read_body:
            self.bodies.append(await request.json())
        return await self._handlers[request.path.strip("/")](request)

    async def __aenter__(self) -> Fake:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


def answering(value: Any, status: int = 200) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        if isinstance(value, str | bytes):
            return web.Response(body=value, status=status)
        return web.json_response(value, status=status)

    return handler


async def dropping(request: web.Request) -> web.Response:
    """Cuts the connection without an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def hanging(request: web.Request) -> web.Response:
    await asyncio.sleep(30)
    return web.Response()
