"""Sampling and judging as one service: rollout servers, their weights, and the verifier pool."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from megatron_scope.config.keys import api_key
from megatron_scope.config.schema import Config, Engine, RolloutConfig
from megatron_scope.controller.arrivals import Arrive
from megatron_scope.errors import RolloutError
from megatron_scope.records import JudgedRollout, Rollout, SamplingParams, ServedModel, WeightTransfer
from megatron_scope.rollout.addresses import AddressBook
from megatron_scope.rollout.client import ClientOptions, RolloutRequest, ServerClient
from megatron_scope.rollout.delivery import DiskDelivery
from megatron_scope.rollout.embedded.options import LoadFormat, ServeOptions
from megatron_scope.rollout.identity import Expectation
from megatron_scope.rollout.open_files import raise_limit
from megatron_scope.rollout.pool import PoolOptions, ServerPool, Servers
from megatron_scope.rollout.process import EmbeddedServer
from megatron_scope.sync.broadcast import BroadcastDelivery, Groups
from megatron_scope.verify.pool import VerifierPool


class RolloutService:
    """Draws responses with the published weights and judges each as soon as it is finished."""

    def __init__(self, config: Config, vocab_size: int, log_path: Path) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._log_path = log_path
        self._api_key = api_key("rollout.api_key_env", config.rollout.api_key_env)
        self._addresses = _addresses(config.rollout)
        self._embedded: EmbeddedServer | None = None
        self._pool: ServerPool | None = None
        self._groups = Groups()
        self._delivery: BroadcastDelivery | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._verifier = VerifierPool(config.verify.workers, config.verify.timeout_s)

    async def publish(self, folder: Path, version: int) -> None:
        """Has every server load the weights in `folder` as `version`, and reads the version back."""
        if self._pool is None:
            self._pool = await self._connect(folder, "auto")
        await self._pool.publish(DiskDelivery(folder, version))

    async def meet_servers(self, version: int) -> list[ServedModel]:
        """Begins to publish `version` without disk: the servers that shall take it. `broadcast` goes on."""
        if self._pool is None:
            folder = Path(self._config.student.companions).expanduser()
            self._pool = await self._connect(folder, "dummy")
        self._delivery = BroadcastDelivery(version, self._groups, timeout_s=self._config.sync.timeout_s)
        self._publishing = asyncio.create_task(self._pool.publish(self._delivery))
        return await self._delivery.meet(self._publishing)

    async def broadcast(self, transfer: WeightTransfer) -> None:
        """Has the servers that were met take the weights, as the trainer's ranks send them."""
        if self._delivery is None or self._publishing is None:
            raise RuntimeError("weights come before the servers were met")
        self._delivery.send(transfer)
        await self._publishing

    async def _connect(self, folder: Path, load_format: LoadFormat) -> ServerPool:
        """The pool of the servers; the embedded one is started with the model in `folder`."""
        raise_limit()
        rollout = self._config.rollout
        expected = Expectation.of_model(folder, any_sglang_version=rollout.any_sglang_version)
        if rollout.engine is Engine.EMBEDDED:
            embedded = self._embedded = EmbeddedServer(
                ServeOptions(model=str(folder.absolute()), load_format=load_format),
                log_path=self._log_path,
                start_timeout_s=rollout.start_timeout_s,
            )
            await asyncio.to_thread(embedded.start)
            servers = Servers(AddressBook((embedded.url,)), self._client, expected, explain=embedded.check)
        else:
            servers = Servers(self._addresses, self._client, expected, router=rollout.router)
        options = PoolOptions(
            max_concurrent=rollout.max_concurrent_requests,
            health_interval_s=rollout.health_interval_s,
            start_timeout_s=rollout.start_timeout_s,
        )
        return ServerPool(servers, options)

    def _client(self, url: str) -> ServerClient:
        rollout = self._config.rollout
        options = ClientOptions(
            request_timeout_s=rollout.request_timeout_s,
            control_timeout_s=self._config.sync.timeout_s,
            probe_timeout_s=rollout.health_timeout_s,
        )
        return ServerClient(url, vocab_size=self._vocab_size, api_key=self._api_key, options=options)

    async def produce(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, version: int, arrive: Arrive
    ) -> None:
        """Draws a response for each request by weights `version`, and judges each as soon as it is finished:
        `arrive` takes it with its request's place, in whatever order they come.
        """
        if self._pool is None:
            raise RolloutError("responses are asked for before any weights are published; publish first")
        place_of = {(request.prompt.id, request.sample): place for place, request in enumerate(requests)}

        async def judge(rollout: Rollout) -> None:
            prompt = rollout.prompt
            verdict = self._verifier.submit(prompt.task, prompt.answer, rollout.text)
            arrive(
                place_of[prompt.id, rollout.sample],
                JudgedRollout(rollout, await asyncio.wrap_future(verdict)),
            )

        await self._pool.run(requests, params, version, judge)

    async def probe(
        self, requests: Sequence[RolloutRequest], params: SamplingParams
    ) -> dict[str, list[Rollout]]:
        """What each server in service draws for the same requests with the published weights, by its URL."""
        if self._pool is None:
            raise RolloutError("a probe is asked for before any weights are published; publish first")
        return await self._pool.probe(requests, params)

    async def sample(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, version: int
    ) -> list[JudgedRollout]:
        """One judged rollout for each request, in the requests' order whatever the order of arrival."""
        arrived: dict[int, JudgedRollout] = {}
        await self.produce(requests, params, version, arrived.__setitem__)
        return [arrived[place] for place in range(len(requests))]

    async def close(self) -> None:
        """Closes connections, ends the embedded server and the verifiers."""
        if self._publishing is not None:
            self._publishing.cancel()  # where the trainer stopped in the middle
            await asyncio.wait({self._publishing})
        if self._embedded is None:
            await self._groups.destroy()
        if self._pool is not None:
            await self._pool.close()
        if self._embedded is not None:
            await asyncio.to_thread(self._embedded.stop)
        await asyncio.to_thread(self._verifier.close, drop=True)


def _addresses(rollout: RolloutConfig) -> AddressBook:
    """Those of the config or of its file, which is read now, before there is other work."""
    file = None if rollout.servers_file is None else Path(rollout.servers_file).expanduser()
    return AddressBook(rollout.servers, file=file)
