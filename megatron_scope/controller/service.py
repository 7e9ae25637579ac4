"""Sampling and judging as one service: rollout servers, their weights, and the verifier pool."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from megatron_scope.config.schema import Config, Engine
from megatron_scope.controller.arrivals import Placed
from megatron_scope.errors import ConfigError, RolloutError
from megatron_scope.records import JudgedRollout, Rollout, SamplingParams
from megatron_scope.rollout.client import ClientOptions, RolloutRequest, ServerClient, collect
from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.process import EmbeddedServer
from megatron_scope.verify.pool import VerifierPool


class RolloutService:
    """Draws responses with the published weights and judges each as soon as it is finished."""

    def __init__(self, config: Config, vocab_size: int, log_path: Path) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._log_path = log_path
        self._embedded: EmbeddedServer | None = None
        self._clients: list[ServerClient] = []
        self._verifier = VerifierPool(config.verify.workers, config.verify.timeout_s)

    async def publish(self, folder: Path, version: int) -> None:
        """Has every server load the weights in `folder` as `version`, and reads the version back."""
        if not self._clients:
            await self._connect(folder)
        path = str(folder.absolute())
        await asyncio.gather(*(client.update_weights_from_disk(path, version) for client in self._clients))

    async def _connect(self, folder: Path) -> None:
        rollout = self._config.rollout
        urls: Sequence[str] = rollout.servers
        if rollout.engine is Engine.EMBEDDED:
            self._embedded = EmbeddedServer(
                ServeOptions(model=str(folder.absolute())),
                log_path=self._log_path,
                start_timeout_s=rollout.start_timeout_s,
            )
            await asyncio.to_thread(self._embedded.start)
            urls = (self._embedded.url,)
        options = ClientOptions(
            request_timeout_s=rollout.request_timeout_s, control_timeout_s=self._config.sync.timeout_s
        )
        key = _api_key(rollout.api_key_env)
        self._clients = [
            ServerClient(url, vocab_size=self._vocab_size, api_key=key, options=options) for url in urls
        ]
        await asyncio.gather(*(client.wait_healthy(rollout.start_timeout_s) for client in self._clients))

    async def stream(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, version: int
    ) -> AsyncIterator[Placed]:
        """Judged rollouts as they finish, each with its request's place, drawn by weights `version`."""
        place_of = {(request.prompt.id, request.sample): place for place, request in enumerate(requests)}
        judged: asyncio.Queue[Placed | None] = asyncio.Queue()
        judging: set[asyncio.Task[None]] = set()

        def judge(rollout: Rollout) -> None:
            if rollout.weight_version != version:
                raise RolloutError(
                    f"{rollout.prompt.id}, sample {rollout.sample} comes from weight version "
                    f"{rollout.weight_version}, "
                    f"expected {version}; does another trainer use this server?"
                )
            task = asyncio.create_task(finish(rollout))
            judging.add(task)
            task.add_done_callback(judging.discard)

        async def finish(rollout: Rollout) -> None:
            prompt = rollout.prompt
            verdict = self._verifier.submit(prompt.task, prompt.answer, rollout.text)
            item = JudgedRollout(rollout, await asyncio.wrap_future(verdict))
            await judged.put((place_of[prompt.id, rollout.sample], item))

        async def draw() -> None:
            try:
                await collect(
                    self._clients,
                    requests,
                    params,
                    max_concurrent=self._config.rollout.max_concurrent_requests,
                    on_rollout=judge,
                )
                await asyncio.gather(*judging)
            finally:
                await judged.put(None)

        drawing = asyncio.create_task(draw())
        try:
            while (placed := await judged.get()) is not None:
                yield placed
            await drawing
        finally:
            drawing.cancel()

    async def sample(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, version: int
    ) -> list[JudgedRollout]:
        """One judged rollout for each request, in the requests' order whatever the order of arrival."""
        arrived = {place: item async for place, item in self.stream(requests, params, version)}
        return [arrived[place] for place in range(len(requests))]

    async def close(self) -> None:
        """Closes connections, ends the embedded server and the verifiers."""
        for client in self._clients:
            await client.close()
        if self._embedded is not None:
            await asyncio.to_thread(self._embedded.stop)
        await asyncio.to_thread(self._verifier.close, drop=True)


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ConfigError(
            f"rollout.api_key_env names {variable}, which is not set; export it or unset the key"
        )
    return os.environ[variable]
