"""What rank 0 knows, told to the others: outcomes of its work, and each replica's share of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_scope.backend.setup import Ranks
from megatron_scope.errors import ScopeError

Result = TypeVar("Result")


class FailedOnRankZero(ScopeError):
    """Rank 0 has failed and reports why; this rank only stops with it."""

    on_every_rank = True


def on_rank_zero(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Runs `work` on rank 0 alone and returns its (picklable, small) result on every rank.

    When it raises, rank 0 raises that error and every other rank FailedOnRankZero, so that no rank waits for
    ever.
    """
    result: list[Any] = [None, None]
    failure: BaseException | None = None
    if ranks.rank == 0:
        try:
            result[0] = work()
        except BaseException as error:
            failure = error
            result[1] = getattr(error, "exit_code", 1)
    dist.broadcast_object_list(result, src=0, group=ranks.world_group)
    if failure is not None:
        raise failure
    if result[1] is not None:
        error = FailedOnRankZero("rank 0 stopped; see its message")
        error.exit_code = result[1]
        raise error
    return result[0]


def scatter_to_replicas(ranks: Ranks, parts: list[Any] | None) -> Any:
    """Gives every rank its replica's part; `parts`, one a replica, are rank 0's to supply."""
    mine: list[Any] = [None]
    if ranks.leader_group is not None:
        dist.scatter_object_list(mine, parts, group=ranks.leader_group, group_src=0)
    dist.broadcast_object_list(mine, group=ranks.replica_group, group_src=0)
    return mine[0]


def largest(ranks: Ranks, value: int) -> int:
    """The largest `value` over all ranks."""
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value, group=ranks.world_group)
    return max(values)
