"""The process group that carries weights from a rank of the trainer to the rollout servers, made in the same
way on both sides.

A server that joins by torch's steps for a group apart from the default one (SGLang does) looks for the others
under the same keys of the store.
"""

from __future__ import annotations

import contextlib
import datetime
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

SENDER = 0  # the trainer's rank in every group


def join(
    store: Any, *, rank: int, world_size: int, name: str, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """Joins the group `name` of `world_size` ranks over a TCPStore; blocks (over gloo) until all have.

    `backend` is "nccl" or "gloo". RuntimeError after `timeout_s`, which also limits every later broadcast.
    """
    # Neither new_group, which takes ranks of the default group alone, nor a backend's own constructor would
    # meet the other side's keys.
    group, _ = distributed_c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        dist.Backend(backend),
        dist.PrefixStore(name, store),  # pyright: ignore[reportPrivateImportUsage]
        group_name=distributed_c10d.GroupName(name),
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    assert isinstance(group, dist.ProcessGroup)
    distributed_c10d._world.pg_group_ranks[group] = {place: place for place in range(world_size)}
    return group


def broadcast(group: dist.ProcessGroup, flat: Tensor) -> dist.Work:
    """Begins the broadcast of `flat` (contiguous) from the trainer's rank."""
    options = dist.BroadcastOptions()  # pyright: ignore[reportPrivateImportUsage]
    options.rootRank = SENDER
    return group.broadcast([flat], options)


def leave(group: dist.ProcessGroup) -> None:
    """Leaves the group at once, whatever is under way; the other ranks' broadcasts fail then."""
    for end in (group.abort, lambda: dist.destroy_process_group(group)):
        with contextlib.suppress(RuntimeError, ValueError):  # a broken group may refuse to end in order
            end()
