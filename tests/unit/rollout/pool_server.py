"""A rollout server in this process that can be killed, hung, made stale or broken, for the pool's tests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from megatron_scope.records import Prompt, Rollout, SamplingParams
from megatron_scope.rollout.addresses import AddressBook
from megatron_scope.rollout.client import ClientOptions, ServerClient
from megatron_scope.rollout.delivery import DiskDelivery
from megatron_scope.rollout.identity import Expectation
from megatron_scope.rollout.pool import PoolOptions, ServerPool, Servers
from megatron_scope.rollout.wire import RolloutRequest

VOCAB_SIZE = 100
PARAMS = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=4, stop_token_ids=())
VERSION = 1
MODEL = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
CLIENT = ClientOptions(
    request_timeout_s=300, control_timeout_s=5, probe_timeout_s=0.3, num_retries=1, first_delay_s=0.01
)
# Where nothing hangs, and a busy machine must not be taken for a server that does.
PATIENT = dataclasses.replace(CLIENT, probe_timeout_s=60)
OPTIONS = PoolOptions(max_concurrent=4, health_interval_s=0.05, start_timeout_s=10)


class PoolServer:
    """Answers each request with the sample's seed after `delay_s`, as weight `version`.

    `asked` holds the rids in order of arrival, `most` how many were inside at once; `fail` may answer a
    request instead.
    """

    def __init__(self, *, delay_s: float = 0.005, key: str | None = None) -> None:
        self.delay_s, self.key = delay_s, key
        self.version, self.model, self.sglang = "default", dict(MODEL), "0.5.23"
        self.asked: list[str] = []
        self.now = self.most = 0
        self.updates: list[str] = []
        self.aborts = 0
        self.fail: Callable[[], web.Response | None] = lambda: None
        self.goes_on = asyncio.Event()  # cleared: it hangs
        self.goes_on.set()
        self.health_delay_s = 0.0
        self.num_aborts_due = 0
        self.refuses_weights = self.forgets_weights = False
        self.crowd = 0  # requests that have to be inside at once before any is answered
        self._is_crowded = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Starts it, the second time on the same port and with the weights that it was started with."""
        self.version = "default"
        app = web.Application()
        gets = {
            "/health": self._health,
            "/model_info": self._model_info,
            "/server_info": self._server_info,
        }
        posts = {
            "/generate": self._generate,
            "/update_weights_from_disk": self._update,
            "/abort_request": self._abort,
        }
        app.router.add_routes([web.get(path, self._guarded(handler)) for path, handler in gets.items()])
        app.router.add_routes([web.post(path, self._guarded(handler)) for path, handler in posts.items()])
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def kill(self) -> None:
        """Cuts every connection and listens no more."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        assert runner.server is not None
        for connection in list(runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        self.goes_on.set()
        await runner.cleanup()

    def hang(self) -> None:
        """Goes on accepting connections, and answers nothing."""
        self.goes_on.clear()

    def _guarded(self, handler: Callable[[web.Request], Any]) -> Callable[[web.Request], Any]:
        async def guarded(request: web.Request) -> web.StreamResponse:
            await self.goes_on.wait()
            has_key = request.headers.get("Authorization") == f"Bearer {self.key}"
            if self.key is not None and request.path != "/health" and not has_key:
                return web.json_response({"error": "Unauthorized"}, status=401)
            return await handler(request)

        return guarded

    async def _health(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.health_delay_s)
        return web.Response()

    async def _model_info(self, request: web.Request) -> web.Response:
        info = {"is_generation": True, "weight_version": self.version, "model_path": "/m", **self.model}
        return web.json_response(info)

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.sglang, "weight_version": "default"})

    async def _update(self, request: web.Request) -> web.Response:
        if self.refuses_weights:
            return web.json_response({"success": False, "message": "full disk"}, status=400)
        body = await request.json()
        self.updates.append(body["weight_version"])
        if not self.forgets_weights:
            self.version = body["weight_version"]
        return web.json_response({"success": True, "message": "ok"})

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborts += 1
        return web.Response()

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body["rid"])
        failed = self.fail()
        if failed is not None:
            return failed
        version = self.version
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if self.now >= self.crowd:
                self._is_crowded.set()
            await self._is_crowded.wait()
            await asyncio.sleep(self.delay_s)
            await self.goes_on.wait()
        finally:
            self.now -= 1
        token = body["sampling_params"]["sampling_seed"] % VOCAB_SIZE
        reason = {"type": "length", "length": 1}
        if self.num_aborts_due > 0:
            self.num_aborts_due -= 1
            reason = {"type": "abort", "message": "Abort in waiting queue"}
        meta = {
            "finish_reason": reason,
            "weight_version": version,
            "output_token_logprobs": [[-1.0, token, None]],
        }
        return web.json_response({"text": str(token), "output_ids": [token], "meta_info": meta})


def group_requests(num_prompts: int, num_samples: int) -> list[RolloutRequest]:
    """Requests of which no two have the same seed below VOCAB_SIZE; prompt k has k + 1 tokens."""
    prompts = [Prompt(f"p{place}", (1,) * (place + 1), "", "math") for place in range(num_prompts)]
    return [
        RolloutRequest(prompt, sample, place * num_samples + sample, f"{prompt.id}/{sample}")
        for place, prompt in enumerate(prompts)
        for sample in range(num_samples)
    ]


class Collected(list[Rollout]):
    """A consumer that keeps what it is given."""

    async def take(self, rollout: Rollout) -> None:
        self.append(rollout)

    def check(self, requests: Sequence[RolloutRequest], version: int = VERSION) -> None:
        """Each request has its own sample, once, of the right weights."""
        got = sorted((rollout.prompt.id, rollout.sample) for rollout in self)
        assert got == sorted((request.prompt.id, request.sample) for request in requests)
        seeds = {(request.prompt.id, request.sample): request.seed for request in requests}
        for rollout in self:
            assert rollout.output_ids == (seeds[rollout.prompt.id, rollout.sample] % VOCAB_SIZE,)
            assert rollout.weight_version == version


class OnceDelivery(DiskDelivery):
    """Reaches servers only at once, as a broadcast does."""

    @property
    def can_reach_later(self) -> bool:
        return False

    async def to_one(self, client: ServerClient) -> bool:
        return False


class Stage:
    """Running servers, and a pool on them that has published VERSION."""

    def __init__(self, servers: list[PoolServer], pool: ServerPool) -> None:
        self.servers, self.pool = servers, pool

    async def run(self, requests: Sequence[RolloutRequest], on_rollout: Any, version: int = VERSION) -> None:
        await asyncio.wait_for(self.pool.run(requests, PARAMS, version, on_rollout), 30)

    async def collect(self, requests: Sequence[RolloutRequest], version: int = VERSION) -> Collected:
        collected = Collected()
        await self.run(requests, collected.take, version)
        collected.check(requests, version)
        return collected

    async def publish(self, version: int) -> None:
        await self.pool.publish(DiskDelivery(Path("/w"), version))


@contextlib.asynccontextmanager
async def staged(
    *servers: PoolServer,
    options: PoolOptions = OPTIONS,
    client: ClientOptions = CLIENT,
    key: str | None = None,
    file: Path | None = None,
    router: str | None = None,
    explain: Callable[[], None] | None = None,
    published: bool = True,
) -> AsyncIterator[Stage]:
    """Starts the servers and publishes to them; with `file`, the pool takes their addresses from it."""
    for server in servers:
        await server.start()
    if file is not None:
        file.write_text("".join(f"{server.url}\n" for server in servers))
    more = {} if explain is None else {"explain": explain}
    pool = ServerPool(
        Servers(
            AddressBook([server.url for server in servers], file=file),
            lambda url: ServerClient(url, vocab_size=VOCAB_SIZE, api_key=key, options=client),
            Expectation(MODEL),
            router=router,
            **more,
        ),
        options,
    )
    stage = Stage(list(servers), pool)
    try:
        if published:
            await stage.publish(VERSION)
        yield stage
    finally:
        await pool.close()
        for server in servers:
            await server.kill()


def prompts_of(server: PoolServer) -> set[str]:
    """The prompts that the server was asked about."""
    return {rid.partition("/")[0] for rid in server.asked}


def write_model(folder: Path, **settings: Any) -> Path:
    """A model folder with nothing but a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MODEL, **settings}))
    return folder
