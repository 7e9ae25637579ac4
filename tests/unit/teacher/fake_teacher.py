"""A scripted teacher, and a pool over some: a server that scores as SGLang does, with log-probs that tests
can know, until it is told to misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from aiohttp import web

from megatron_scope.errors import ScopeError
from megatron_scope.teacher.pool import TeacherPool
from megatron_scope.teacher.server import TeacherOptions
from megatron_scope.teacher.wire import ScoringRequest

OPTIONS = TeacherOptions(
    start_timeout_s=0.5,
    request_timeout_s=5.0,
    request_tokens=100,
    max_concurrent_requests=2,
    canary_tolerance=0.05,
)
VOCAB_SIZE = 50


def request(number: int = 0, *, prompt: Sequence[int] = (1, 2, 3), targets: Sequence[int] = (4, 5, 9)) -> Any:
    return ScoringRequest(f"prompt p{number}, sample 0", tuple(prompt), tuple(targets))


def logprob(before: int, token: int, shift: float = 0.0) -> float:
    """The fake model: a token's log-prob depends on it and on the one before it."""
    return shift - 1.0 - ((7 * before + 3 * token) % 64) / 32


def expected(scored: ScoringRequest, shift: float = 0.0) -> list[float]:
    ids = [scored.prompt_ids[-1], *scored.target_ids]
    return [logprob(before, token, shift) for before, token in itertools.pairwise(ids)]


def told(token: int) -> int:
    """SGLang takes the last id of its table for one that stands for an image."""
    return token if token < VOCAB_SIZE - 1 else 0


def answer(ids: list[int], start: int, *, shift: float = 0.0, version: str = "default") -> dict[str, Any]:
    """What SGLang 0.5.23 answers to a prompt of which no new token is asked."""
    entries = [[None, told(ids[start]), None]] + [
        [logprob(ids[place - 1], ids[place], shift), told(ids[place]), None]
        for place in range(start + 1, len(ids))
    ]
    meta = {
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": len(ids),
        "completion_tokens": 0,
        "weight_version": version,
        "input_token_logprobs": entries,
        "output_token_logprobs": [],
    }
    return {"text": "", "output_ids": [], "meta_info": meta}


class FakeTeacher:
    """Tests change its attributes while it runs: `instead` answers in its place where it answers at all, and
    `meddle` takes each scoring answer before it is sent.
    """

    def __init__(self, *, port: int = 0, **model_info: Any) -> None:
        self.url, self._port = "", port
        self.model_info = {
            "model_path": "/models/teacher",
            "tokenizer_path": "/models/teacher",
            "is_generation": True,
            "weight_version": "default",
            **model_info,
        }
        self.server_info: dict[str, Any] = {"version": "0.5.23", "max_req_input_len": 1001}
        self.texts: Callable[[int], str] | None = None
        self.shift = 0.0  # of every log-prob: another model
        self.delay_s = 0.0
        self.instead: Callable[[web.Request], Awaitable[web.StreamResponse | None]] | None = None
        self.meddle: Callable[[list[dict[str, Any]]], None] = lambda answers: None
        self.batches: list[list[list[int]]] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = self._at_once = 0

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers.get("Authorization"))
        if self.instead is not None and (response := await self.instead(request)) is not None:
            return response
        match request.path:
            case "/health":
                return web.Response()
            case "/model_info":
                return web.json_response(self.model_info)
            case "/server_info":
                return web.json_response(self.server_info)
            case "/detokenize" if self.texts is not None:
                tokens = (await request.json())["tokens"]
                return web.json_response({"text": [self.texts(token) for (token,) in tokens]})
            case "/generate":
                return await self._generate(await request.json())
        return web.json_response({"detail": "Not Found"}, status=404)

    async def _generate(self, body: dict[str, Any]) -> web.Response:
        self.bodies.append(body)
        self.batches.append(body["input_ids"])
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(self.delay_s)
        self._at_once -= 1
        answers = [
            answer(ids, start, shift=self.shift, version=self.model_info["weight_version"])
            for ids, start in zip(body["input_ids"], body["logprob_start_len"], strict=True)
        ]
        self.meddle(answers)
        return web.Response(text=json.dumps(answers), content_type="application/json")

    async def __aenter__(self) -> FakeTeacher:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


def answering(status: int, body: Any) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    return handler


@contextlib.asynccontextmanager
async def pool_over(
    *urls: str, started: bool = True, key: str | None = None, **options: Any
) -> AsyncIterator[TeacherPool]:
    pool = TeacherPool(urls, dataclasses.replace(OPTIONS, **options), api_key=key)
    try:
        if started:
            await pool.compare(await pool.connect(), VOCAB_SIZE)
        yield pool
    finally:
        await pool.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):  # a response that is lost would wait for ever
            await test()

    asyncio.run(limited())


async def error_of(work: Awaitable[Any]) -> ScopeError:
    with pytest.raises(ScopeError) as raised:
        await work
    assert "\n" not in str(raised.value)
    return raised.value
