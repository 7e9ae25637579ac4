"""How the pool has new weights delivered, whatever carries them; and their delivery by a shared disk."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_scope.errors import ScopeError
from megatron_scope.rollout.client import ServerClient


class Delivery(Protocol):
    """One version of the weights, on its way to the servers.

    A server has taken it when it reports `version` as its weight version; the pool reads that back.
    """

    @property
    def version(self) -> int:
        """The number under which the servers serve these weights."""
        ...

    @property
    def can_reach_later(self) -> bool:
        """Whether `to_one` can still deliver; where not, a server without this version waits for the next."""
        ...

    async def to_all(self, clients: Sequence[ServerClient]) -> dict[str, ScopeError]:
        """Delivers to all at once; the URL of each server that did not take them, with the reason."""
        ...

    async def to_one(self, client: ServerClient) -> bool:
        """Delivers, later than `to_all`, to a server that comes back; ScopeError where it does not take them.

        False: cannot be done any more, the server waits for the next version.
        """
        ...


@dataclasses.dataclass(frozen=True)
class DiskDelivery:
    """Weights as a Hugging Face folder on a disk that trainer and servers share."""

    folder: Path
    version: int

    @property
    def can_reach_later(self) -> bool:
        """The folder stays where it is until the next version."""
        return True

    async def to_all(self, clients: Sequence[ServerClient]) -> dict[str, ScopeError]:
        """Has every server load the folder."""
        failures: dict[str, ScopeError] = {}

        async def deliver(client: ServerClient) -> None:
            try:
                await client.update_weights_from_disk(str(self.folder.absolute()), self.version)
            except ScopeError as error:
                failures[client.url] = error

        await asyncio.gather(*(deliver(client) for client in clients))
        return failures

    async def to_one(self, client: ServerClient) -> bool:
        """Has a server load the folder; what it still generates for requests long asked elsewhere ends."""
        await client.update_weights_from_disk(str(self.folder.absolute()), self.version, abort_running=True)
        return True
