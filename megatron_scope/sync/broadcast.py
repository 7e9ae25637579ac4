"""Weights to the rollout servers without disk: what the servers are told, in SGLang's protocol.

The weights themselves go over process groups (backend/broadcast.py), one for each pipeline stage of the
trainer, bucket by bucket in the order of the requests here. SGLang loads a bucket as it comes, into the
weights in use, and has no way back: so from the first bucket on a server's version is one that no response
may have, until all are in.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from megatron_scope.errors import ScopeError, SyncError
from megatron_scope.records import ServedModel, StageTransfer, WeightBucket, WeightTransfer
from megatron_scope.task_groups import run_all

CLEAN_UP_S = 5.0  # for what is only tidy: a server that is dead or hung does not hold up the error
FLUSH_S = 10.0  # SGLang may hold a request for a moment after its answer, and then refuses to flush
FLUSH_POLL_S = 0.1


class Server(Protocol):
    """What is asked of the client of one server."""

    @property
    def url(self) -> str: ...

    async def server_info(self, failure: type[ScopeError]) -> dict[str, Any]: ...

    async def model_info(self, failure: type[ScopeError]) -> dict[str, Any]: ...

    async def flush(self) -> None: ...

    async def control(self, path: str, body: dict[str, Any], *, limit_s: float) -> dict[str, Any]: ...


class Groups:
    """The groups that servers are in now, so that they can be destroyed."""

    def __init__(self) -> None:
        self._servers: list[Server] = []
        self._names: list[str] = []

    def add(self, servers: Sequence[Server], name: str) -> None:
        """`servers` are about to join the group `name`."""
        self._servers = list(servers)
        self._names.append(name)

    async def destroy(self, *, session_too: bool = False) -> None:
        """Has the servers leave all groups, and close what is open of an update; failures do not matter."""

        async def leave(server: Server) -> None:
            calls = [("/destroy_weights_update_group", {"group_name": name}) for name in names]
            calls += [("/end_weight_update", {})] if session_too else []
            for path, body in calls:
                with contextlib.suppress(ScopeError):
                    await server.control(path, body, limit_s=CLEAN_UP_S)

        servers, names, self._servers, self._names = self._servers, self._names, [], []
        leaving = [asyncio.create_task(leave(server)) for server in servers]
        if leaving:
            # Not asyncio.timeout: a TaskGroup that failed may leave its task with a cancellation (seen in
            # Python 3.11.2), which a timeout would take for somebody else's.
            await asyncio.wait(leaving, timeout=CLEAN_UP_S)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)


class BroadcastDelivery:
    """One version on its way: the pool gives it the servers, `meet` tells the trainer of them, `send` says
    how the weights come.
    """

    def __init__(self, version: int, groups: Groups, *, timeout_s: float) -> None:
        self._version, self._groups, self._timeout_s = version, groups, timeout_s
        self._met: asyncio.Future[list[ServedModel]] = asyncio.get_running_loop().create_future()
        self._transfer: asyncio.Future[WeightTransfer] = asyncio.get_running_loop().create_future()

    @property
    def version(self) -> int:
        """The number under which the servers serve these weights."""
        return self._version

    @property
    def can_reach_later(self) -> bool:
        """The servers' group is made once for a version: who was not in it waits for the next."""
        return False

    async def meet(self, publishing: asyncio.Task[None]) -> list[ServedModel]:
        """The servers that shall take the weights; where there are none, the error of `publishing`, the
        pool's work.
        """
        await asyncio.wait({self._met, publishing}, return_when=asyncio.FIRST_COMPLETED)
        if not self._met.done():
            publishing.result()
        return self._met.result()

    def send(self, transfer: WeightTransfer) -> None:
        """Lets the delivery go on: the trainer's ranks are ready to send."""
        self._transfer.set_result(transfer)

    async def to_all(self, clients: Sequence[Server]) -> dict[str, ScopeError]:
        """Has the servers take the weights, all or none; SyncError where one fails on the way."""
        failures: dict[str, ScopeError] = {}
        found = await asyncio.gather(*(served_model(client) for client in clients), return_exceptions=True)
        for client, model in zip(clients, found, strict=True):
            if isinstance(model, ScopeError):
                failures[client.url] = model
            elif isinstance(model, BaseException):
                raise model
        models = [model for model in found if isinstance(model, ServedModel)]
        if not models:
            return failures
        self._met.set_result(models)
        transfer = await self._transfer
        servers = [client for client in clients if client.url not in failures]
        steps = _Steps(servers, transfer, self._groups, self._timeout_s)
        try:
            await steps.run()
        except BaseException:
            await self._groups.destroy(session_too=True)
            raise
        return failures

    async def to_one(self, client: Server) -> bool:
        """A server that comes back waits for the next version: the others' group is not made anew for it."""
        del client
        return False


async def served_model(server: Server) -> ServedModel:
    """What a server tells of itself; SyncError where it cannot take weights by broadcast."""
    info, model = await server.server_info(SyncError), await server.model_info(SyncError)
    sizes = {key: info.get(key) for key in ("tp_size", "pp_size", "dp_size")}
    if not isinstance(sizes["tp_size"], int) or sizes["pp_size"] != 1 or sizes["dp_size"] != 1:
        told = ", ".join(f"{key} {value}" for key, value in sizes.items())
        raise SyncError(
            f"{server.url}: runs with {told}; weights by broadcast need pp_size 1 and dp_size 1: start it "
            "so, or set sync.transport=disk"
        )
    return ServedModel(
        url=server.url,
        tensor_parallel=sizes["tp_size"],
        weight_version=str(model.get("weight_version")),
        model_path=str(model.get("model_path")),
        architectures=tuple(model.get("architectures") or ()),
    )


class _Steps:
    """The requests of one transfer, each to all servers at once."""

    def __init__(
        self, servers: Sequence[Server], transfer: WeightTransfer, groups: Groups, timeout_s: float
    ) -> None:
        self._servers, self._transfer, self._groups = servers, transfer, groups
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._timeout_s = timeout_s

    async def run(self) -> None:
        transfer = self._transfer
        if transfer.new:
            await self._groups.destroy()
            for stage in transfer.stages:
                self._groups.add(self._servers, stage.group_name)
                await run_all(*(self._join(server, stage) for server in self._servers))
        await self._name_version(f"incomplete-{transfer.version}")
        await run_all(*(self._begin(server) for server in self._servers))
        for stage in transfer.stages:
            for bucket in stage.buckets:
                body = _bucket_body(stage, bucket)
                await self._everywhere("/update_weights_from_distributed", body)
        await self._everywhere("/end_weight_update", {})
        await run_all(*(self._flush(server) for server in self._servers))
        await self._name_version(str(transfer.version))

    async def _join(self, server: Server, stage: StageTransfer) -> None:
        transfer = self._transfer
        body = {
            "master_address": transfer.master_address,
            "master_port": transfer.master_port,
            "rank_offset": transfer.rank_offsets[server.url],
            "world_size": transfer.world_size,
            "group_name": stage.group_name,
            "backend": transfer.backend,
        }
        await self._ask(server, "/init_weights_update_group", body)

    async def _begin(self, server: Server) -> None:
        """Opens the update; one that a trainer which died left open is closed first."""
        try:
            await self._ask(server, "/begin_weight_update", {})
        except SyncError:
            with contextlib.suppress(SyncError):
                await self._ask(server, "/end_weight_update", {})
            await self._ask(server, "/begin_weight_update", {})

    async def _flush(self, server: Server) -> None:
        """Drops what was computed with the old weights."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + FLUSH_S
        while True:
            try:
                return await server.flush()
            except ScopeError as error:
                if loop.time() > deadline:
                    raise SyncError(f"{error}; requests of another client?") from error
            await asyncio.sleep(FLUSH_POLL_S)

    async def _name_version(self, version: str) -> None:
        body = {"new_version": version, "abort_all_requests": False}
        await self._everywhere("/update_weight_version", body)

    async def _everywhere(self, path: str, body: dict[str, Any]) -> None:
        await run_all(*(self._ask(server, path, body) for server in self._servers))

    async def _ask(self, server: Server, path: str, body: dict[str, Any]) -> None:
        """One request within what is left of the time."""
        left_s = self._deadline - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise SyncError(
                f"{server.url}: weight version {self._transfer.version} did not arrive within "
                f"{self._timeout_s:g} s; look at servers and network, or raise sync.timeout_s"
            )
        await server.control(path, body, limit_s=left_s)


def _bucket_body(stage: StageTransfer, bucket: WeightBucket) -> dict[str, Any]:
    return {
        "names": list(bucket.names),
        "dtypes": list(bucket.dtypes),
        "shapes": [list(shape) for shape in bucket.shapes],
        "group_name": stage.group_name,
        "load_format": "flattened_bucket",
        "flush_cache": False,  # once, at the end
    }
