"""How one Megatron parameter and its Hugging Face tensors hold the same numbers, at any tensor-parallel size.

Each layout is one class with both directions: `shard` cuts a rank's part out of the Hugging Face tensors,
reading only the rows it needs; `join` puts the parts of all ranks back together. `sources` are objects that
slice like tensors (a safetensors slice or a tensor).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_scope.convert.shape import ModelShape
from megatron_scope.errors import DataError


class Layout(Protocol):
    split_dim: int | None  # the dimension that tensor parallelism cuts; None for a replicated parameter

    def shard(self, sources: Sequence[Any], shape: ModelShape, rank: int, size: int) -> Tensor: ...

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]: ...


def _part(length: int, rank: int, size: int) -> slice:
    width = length // size
    return slice(rank * width, (rank + 1) * width)


class Replicated:
    """The same tensor on every rank (norms)."""

    split_dim: int | None = None

    def shard(self, sources: Sequence[Any], shape: ModelShape, rank: int, size: int) -> Tensor:
        return sources[0][:]

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return (parts[0],)


class Columns:
    """A matrix [out, in] split over its input (row-parallel linear layers)."""

    split_dim: int | None = 1

    def shard(self, sources: Sequence[Any], shape: ModelShape, rank: int, size: int) -> Tensor:
        (source,) = sources
        return source[:, _part(_length(source, 1), rank, size)]

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return (torch.cat(list(parts), dim=1),)


class GateUp:
    """Gate and up projections, one above the other on every rank: [2 * ffn / size, hidden]."""

    split_dim: int | None = 0

    def shard(self, sources: Sequence[Any], shape: ModelShape, rank: int, size: int) -> Tensor:
        rows = _part(shape.ffn_hidden_size, rank, size)
        return torch.cat([source[rows] for source in sources])

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        halves = [part.chunk(2) for part in parts]
        return tuple(torch.cat([half[i] for half in halves]) for i in range(2))


class QKV:
    """Query, key and value projections (weights or biases), interleaved by query group: q..q k v, q..q k v,
    ...
    """

    split_dim: int | None = 0

    def shard(self, sources: Sequence[Any], shape: ModelShape, rank: int, size: int) -> Tensor:
        groups = _part(shape.num_query_groups, rank, size)
        query, key, value = (self._grouped(source, shape, groups) for source in sources)
        joined = torch.cat([query, key, value], dim=1)
        return joined.reshape(-1, *joined.shape[2:])

    def _grouped(self, source: Any, shape: ModelShape, groups: slice) -> Tensor:
        """Rows of some query groups, [groups, rows of a group, ...]."""
        rows = _length(source, 0) // shape.num_query_groups
        taken = source[groups.start * rows : groups.stop * rows]
        return taken.reshape(groups.stop - groups.start, rows, *taken.shape[1:])

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        whole = torch.cat(list(parts))
        heads = shape.num_attention_heads // shape.num_query_groups
        grouped = whole.reshape(shape.num_query_groups, -1, *whole.shape[1:])
        pieces = grouped.split([heads * shape.head_dim, shape.head_dim, shape.head_dim], dim=1)
        return tuple(piece.reshape(-1, *whole.shape[1:]) for piece in pieces)


class Vocabulary:
    """An embedding or output table [vocab_rows, hidden], padded with zero rows to a whole number of
    shards.
    """

    split_dim: int | None = 0

    def __init__(self, padded_rows: int) -> None:
        self.padded_rows = padded_rows

    def shard(self, sources: Sequence[Any], shape: ModelShape, rank: int, size: int) -> Tensor:
        (source,) = sources
        if _length(source, 0) != shape.vocab_rows:
            raise DataError(
                f"a vocabulary table has {_length(source, 0)} rows but config.json a vocab_size of "
                f"{shape.vocab_rows}; config.json and the weights disagree"
            )
        rows = _part(self.padded_rows, rank, size)
        taken = source[min(rows.start, shape.vocab_rows) : min(rows.stop, shape.vocab_rows)]
        padding = taken.new_zeros((rows.stop - rows.start - taken.shape[0], taken.shape[1]))
        return torch.cat([taken, padding])

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return (torch.cat(list(parts))[: shape.vocab_rows],)


def _length(source: Any, dim: int) -> int:
    shape = source.get_shape() if hasattr(source, "get_shape") else source.shape
    return shape[dim]
