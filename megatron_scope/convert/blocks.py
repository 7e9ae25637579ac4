"""Parameters as a stream of small blocks, so that memory does not grow with the model.

Both directions cut a parameter into rows: of the whole Megatron parameter, or of its Hugging Face tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_scope.convert.layouts import Size
from megatron_scope.convert.mapping import Entry, ModelSource

BLOCK_BYTES = 16 * 2**20  # small enough for the allocator to hand the same memory out again
_SCAN_BYTES = 256 * 2**10  # looked at together, within a core's cache
# The bits of a number without its sign, and infinity's: whatever is not below them is infinite or no number.
_BITS = {
    torch.float32: (np.int32, 0x7FFF_FFFF, 0x7F80_0000),
    torch.bfloat16: (np.int16, 0x7FFF, 0x7F80),
    torch.float16: (np.int16, 0x7FFF, 0x7C00),
}


def megatron_blocks(
    entry: Entry, source: ModelSource, whole: Size, tensor_size: int
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A parameter at tensor-parallel size `tensor_size` as (place in the whole parameter, contiguous
    block).

    No block holds numbers of two tensor ranks.
    """
    is_split = entry.expert is None and entry.layout.split_dim is not None
    size = tensor_size if is_split else 1
    parts = size * _parts_per_rank(entry, source, whole, size)
    for part in range(parts):
        shard = source.shard(entry, part, parts)
        regions = entry.layout.regions(whole, part, parts)
        for region, piece in zip(regions, shard.chunk(len(regions)), strict=True):
            start = tuple(axis.start for axis in region)
            for first, rows in _row_blocks(piece):
                yield (start[0] + first, *start[1:]), rows


def hf_blocks(entry: Entry, source: ModelSource, whole: Size) -> Iterator[tuple[int, int, Tensor]]:
    """A parameter's Hugging Face tensors as (index in entry.hf, first row, contiguous rows), the rows of each
    tensor in order.
    """
    parts = _parts_per_rank(entry, source, whole, 1)
    for part in range(parts):
        values = entry.layout.join([source.shard(entry, part, parts)], source.shape)
        for index, (value, size) in enumerate(zip(values, entry.hf_sizes, strict=True)):
            start = part * value.shape[0]
            value = value[: max(0, size[0] - start)]  # the rest pads the vocabulary
            for first, rows in _row_blocks(value):
                yield index, start + first, rows


def _parts_per_rank(entry: Entry, source: ModelSource, whole: Size, size: int) -> int:
    """Into how many parts of at most BLOCK_BYTES (of four bytes a number) a rank's shard can be cut."""
    num_bytes = 4 * int(np.prod(whole)) // size
    most = entry.layout.most_parts(whole, source.shape) // size
    wanted = -(-num_bytes // BLOCK_BYTES)
    return next((count for count in range(wanted, most) if most % count == 0), max(most, 1))


def _row_blocks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of at most BLOCK_BYTES or one row, each contiguous in memory of its own."""
    row_bytes = max(1, tensor[:1].numel() * tensor.element_size())
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, tensor.shape[0], step):
        rows = tensor[first : first + step].contiguous()
        yield first, rows.clone() if rows.untyped_storage().nbytes() != rows.nbytes else rows


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as config.json names it, float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def is_finite(block: Tensor) -> bool:
    """Whether a contiguous float32, bfloat16 or float16 CPU tensor holds no infinity and no NaN."""
    kind, magnitude, infinity = _BITS[block.dtype]
    bits = block.view(torch.uint8).numpy().reshape(-1).view(kind)
    step = _SCAN_BYTES // bits.itemsize
    for start in range(0, len(bits), step):
        if np.bitwise_and(bits[start : start + step], magnitude).max() >= infinity:
            return False
    return True
