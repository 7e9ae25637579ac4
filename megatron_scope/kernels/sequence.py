"""Rows of a sequence that is spread over a group, each rank holding the next few: gathered, and summed back.

Ranks may hold different numbers of rows, none included. Every rank of the group must make each call.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def row_counts(group: dist.ProcessGroup, *tensors: Tensor | None) -> list[list[int]]:
    """How many rows each rank's tensors have (0 for None), [rank][tensor]."""
    device = next(tensor.device for tensor in tensors if tensor is not None)
    mine = torch.tensor([0 if tensor is None else tensor.shape[0] for tensor in tensors], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return [counts.tolist() for counts in everyone]


def gather_rows(local: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows in rank order, [sum of counts, d]."""
    blocks = local.new_empty((len(counts), max(counts), local.shape[1]))
    dist.all_gather(list(blocks.unbind()), _padded(local, max(counts)), group=group)
    if len(set(counts)) == 1:
        return blocks.flatten(0, 1)
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def sum_to_owners(whole: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of `whole` [sum of counts, d], each rank getting its own rows."""
    blocks = [_padded(rows, max(counts)) for rows in whole.split(counts)]
    mine = torch.empty_like(blocks[0])
    dist.reduce_scatter(mine, blocks, group=group)
    return mine[: counts[dist.get_rank(group)]]


def _padded(rows: Tensor, num_rows: int) -> Tensor:
    if rows.shape[0] == num_rows:
        return rows.contiguous()
    padded = rows.new_zeros((num_rows, rows.shape[1]))
    padded[: rows.shape[0]] = rows
    return padded
