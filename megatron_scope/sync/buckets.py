"""How a stage's tensors are put together for the way to the servers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from megatron_scope.convert.blocks import dtype_name
from megatron_scope.records import WeightBucket


def bucket_size(limit_bytes: int, in_hand_bytes: int) -> int:
    """How large buckets may be so that two of them, and the `in_hand_bytes` of the parameter that is put
    together meanwhile, take no more than two of `limit_bytes`; at least half a limit, whatever is in hand.
    """
    return max(limit_bytes - in_hand_bytes // 2, limit_bytes // 2)


def plan_buckets(
    tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype, max_bytes: int
) -> tuple[WeightBucket, ...]:
    """The (name, size) pairs in their order, as many in a bucket as `max_bytes` hold; a tensor larger than
    that stands alone.
    """
    return tuple(_bucket(group, dtype) for group in _grouped(tensors, dtype.itemsize, max_bytes))


def _grouped(
    tensors: Iterable[tuple[str, tuple[int, ...]]], itemsize: int, max_bytes: int
) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    group, num_bytes = [], 0
    for name, size in tensors:
        more = math.prod(size) * itemsize
        if group and num_bytes + more > max_bytes:
            yield group
            group, num_bytes = [], 0
        group.append((name, size))
        num_bytes += more
    if group:
        yield group


def _bucket(tensors: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> WeightBucket:
    return WeightBucket(
        names=tuple(name for name, _ in tensors),
        dtypes=(dtype_name(dtype),) * len(tensors),
        shapes=tuple(size for _, size in tensors),
        num_bytes=sum(math.prod(size) for _, size in tensors) * dtype.itemsize,
    )
