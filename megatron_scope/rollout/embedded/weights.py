"""Weights that a trainer broadcasts: SGLang's session of begin, updates and end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_scope import weight_group
from megatron_scope.rollout.embedded.model import WeightsError

GROUP_TIMEOUT_S = 1800.0  # as in SGLang: the trainer's own limits are shorter

T = TypeVar("T")


class WeightReceiver:
    """Receives named tensors over process groups and keeps them until the session ends.

    Unlike SGLang, which loads every bucket in place, it leaves the weights in use alone, so that a session
    that breaks changes nothing. Every refusal is a WeightsError.
    """

    def __init__(self) -> None:
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._received: dict[str, torch.Tensor] | None = None  # None: no session

    async def join(
        self, *, master_address: str, master_port: int, rank: int, world_size: int, name: str, backend: str
    ) -> None:
        """Joins a group as its rank `rank`; returns when all ranks have."""
        if name in self._groups:
            raise WeightsError(f"the group {name} exists already; destroy it first")
        if backend != "gloo":
            raise WeightsError(f"backend is {backend!r}; a server on a CPU takes gloo")

        def work() -> dist.ProcessGroup:
            store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                master_address, master_port, is_master=False
            )
            return weight_group.join(
                store,
                rank=rank,
                world_size=world_size,
                name=name,
                backend=backend,
                timeout_s=GROUP_TIMEOUT_S,
            )

        self._groups[name] = await _in_thread(work, f"cannot join the group {name}")

    def leave(self, name: str) -> None:
        """Destroys a group."""
        group = self._groups.pop(name, None)
        if group is None:
            raise WeightsError("The group to be destroyed does not exist.")
        weight_group.leave(group)

    def begin(self) -> None:
        """Opens a session."""
        if self._received is not None:
            raise WeightsError("a weight-update session is already open; call end_weight_update() first")
        self._received = {}

    async def receive(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group_name: str
    ) -> None:
        """Takes one flattened bucket."""
        received, group = self._received, self._groups.get(group_name)
        if received is None:
            raise WeightsError(
                "update_weights_from_distributed must run between begin_weight_update() and "
                "end_weight_update()"
            )
        if group is None:
            raise WeightsError(f"there is no group {group_name}; call init_weights_update_group first")
        types = [_dtype(name) for name in dtypes]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, types, strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        broken = f"the broadcast in the group {group_name} broke"
        await _in_thread(lambda: weight_group.broadcast(group, flat).wait(), broken)
        for name, dtype, shape, part in zip(names, types, shapes, flat.split(sizes), strict=True):
            received[name] = part.view(dtype).view(shape)

    def end(self) -> dict[str, torch.Tensor]:
        """Closes the session and gives what it brought."""
        if self._received is None:
            raise WeightsError("no weight-update session is open; call begin_weight_update() first")
        received, self._received = self._received, None
        return received


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightsError(f"there is no dtype {name!r}")
    return dtype


async def _in_thread(work: Callable[[], T], failed: str) -> T:
    """The result of blocking work in a thread that does not keep a process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not done.done():  # the client may have gone away meanwhile
            setter(value)

    def run() -> None:
        try:
            setter, value = done.set_result, work()
        except Exception as error:  # of torch.distributed, of no one kind
            setter, value = done.set_exception, WeightsError(f"{failed}: {' '.join(str(error).split())}")
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, setter, value)

    threading.Thread(target=run, name="weight-receiver", daemon=True).start()
    return await done
