"""How one Megatron parameter and its Hugging Face tensors hold the same numbers, at any tensor-parallel size.

Each layout is one class with both directions: `shard` cuts a rank's part out of the Hugging Face tensors,
reading only the rows it needs; `join` puts the parts of all ranks back together. `sources` are objects that
slice like tensors (a safetensors slice or a tensor). What `shard` gives at size 1 is the *whole* parameter,
as a Megatron checkpoint stores it; `regions` says where in it a rank's part lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_scope.convert.shape import ModelShape
from megatron_scope.errors import DataError

Size = tuple[int, ...]
Region = tuple[slice, ...]


class Layout(Protocol):
    split_dim: int | None  # the dimension that tensor parallelism cuts; None for a replicated parameter

    def shard(self, sources: Sequence[Any], shape: ModelShape, rank: int, size: int) -> Tensor: ...

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]: ...

    def regions(self, whole: Size, rank: int, size: int) -> tuple[Region, ...]:
        """Where a rank's part, cut along dimension 0 into equal pieces if there are several, lies in the
        whole.
        """
        ...

    def most_parts(self, whole: Size, shape: ModelShape) -> int:
        """A number of row parts that `shard` can make, of which every divisor will do too."""
        ...


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

    def regions(self, whole: Size, rank: int, size: int) -> tuple[Region, ...]:
        return (tuple(slice(0, length) for length in whole),)

    def most_parts(self, whole: Size, shape: ModelShape) -> int:
        return 1


class Columns:
    """A matrix [out, in] split over its input (row-parallel linear layers)."""

    split_dim: int | None = 1

    def shard(self, sources: Sequence[Any], shape: ModelShape, rank: int, size: int) -> Tensor:
        (source,) = sources
        return source[:, _part(_length(source, 1), rank, size)]

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return (torch.cat(list(parts), dim=1),)

    def regions(self, whole: Size, rank: int, size: int) -> tuple[Region, ...]:
        return ((slice(0, whole[0]), _part(whole[1], rank, size)),)

    def most_parts(self, whole: Size, shape: ModelShape) -> int:
        return 1  # columns of rows that lie apart: no part can be read in one go


class GateUp:
    """Gate and up projections, one above the other on every rank: [2 * ffn / size, hidden]."""

    split_dim: int | None = 0

    def shard(self, sources: Sequence[Any], shape: ModelShape, rank: int, size: int) -> Tensor:
        return torch.cat([source[_part(_length(source, 0), rank, size)] for source in sources])

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        halves = [part.chunk(2) for part in parts]
        return tuple(torch.cat([half[i] for half in halves]) for i in range(2))

    def regions(self, whole: Size, rank: int, size: int) -> tuple[Region, ...]:
        half = whole[0] // 2
        rows = _part(half, rank, size)
        rest = [slice(0, length) for length in whole[1:]]
        return (rows, *rest), (slice(half + rows.start, half + rows.stop), *rest)

    def most_parts(self, whole: Size, shape: ModelShape) -> int:
        return whole[0] // 2


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
        rows = (heads + 2) * shape.head_dim  # of one group
        grouped = whole.reshape(-1, rows, *whole.shape[1:])
        pieces = grouped.split([heads * shape.head_dim, shape.head_dim, shape.head_dim], dim=1)
        return tuple(piece.reshape(-1, *whole.shape[1:]) for piece in pieces)

    def regions(self, whole: Size, rank: int, size: int) -> tuple[Region, ...]:
        return (_rows(whole, rank, size),)

    def most_parts(self, whole: Size, shape: ModelShape) -> int:
        return shape.num_query_groups


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

    def regions(self, whole: Size, rank: int, size: int) -> tuple[Region, ...]:
        return (_rows(whole, rank, size),)

    def most_parts(self, whole: Size, shape: ModelShape) -> int:
        return whole[0]


def _rows(whole: Size, rank: int, size: int) -> Region:
    return (_part(whole[0], rank, size), *(slice(0, length) for length in whole[1:]))


def _length(source: Any, dim: int) -> int:
    shape = source.get_shape() if hasattr(source, "get_shape") else source.shape
    return shape[dim]
