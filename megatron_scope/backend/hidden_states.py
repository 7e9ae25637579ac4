"""A teacher's final hidden states, kept from scoring to the update on the last pipeline stage: what an exact
divergence needs of it beside its output table, and far less than its logits.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_scope.backend.setup import Ranks
from megatron_scope.kernels.sequence import gather_rows
from megatron_scope.records import MicroBatch


class HiddenStates:
    """Hidden states [|y|, d] of responses by index, in the model's dtype.

    Each tensor rank keeps its share of a response's rows, in host memory (pinned beside a GPU) up to
    `limit_bytes` (None: all of them) and beyond that in a file without a name, which the system removes when
    the process ends, however it ends.
    """

    def __init__(self, ranks: Ranks, limit_bytes: int | None) -> None:
        self._ranks = ranks
        self._limit_bytes = limit_bytes
        self.clear()

    def clear(self) -> None:
        """Forgets all responses."""
        self._num_bytes = 0
        self._shares: dict[int, Tensor | _Spilled] = {}
        self._lengths: dict[int, int] = {}
        self._file: _SpillFile | None = None

    def keep(self, index: int, hidden: Tensor) -> None:
        """Takes the hidden states [|y|, d] of a response."""
        self._lengths[index] = len(hidden)
        share = hidden.detach().tensor_split(self._ranks.tensor_size)[self._ranks.tensor_rank]
        self._num_bytes += share.nbytes
        if self._limit_bytes is not None and self._num_bytes > self._limit_bytes:
            self._file = self._file or _SpillFile()
            self._shares[index] = self._file.write(share)
        elif share.is_cuda:
            pinned = torch.empty(share.shape, dtype=share.dtype, pin_memory=True)
            self._shares[index] = pinned.copy_(share, non_blocking=False)
        else:
            self._shares[index] = share.clone()

    def renumber(self, index_of: Mapping[int, int]) -> None:
        """Gives the responses other indices: `index_of` maps those they have to new ones."""
        self._shares = {index_of[index]: share for index, share in self._shares.items()}
        self._lengths = {index_of[index]: length for index, length in self._lengths.items()}

    def has(self, micro_batch: MicroBatch) -> np.ndarray:
        """Which of the micro-batch's rows are of a kept response, bool [R]."""
        return np.isin(micro_batch.response, list(self._lengths))

    def rows(self, indices: Sequence[int]) -> Tensor:
        """The hidden states of some responses, end to end, on the model's device. A collective of the tensor
        group: every rank of it must ask for the same.
        """
        size = self._ranks.tensor_size
        local = torch.cat([self._share(index) for index in indices]).to(self._ranks.device)
        if size == 1:
            return local
        # Lengths of the shares, [response][rank], as tensor_split makes them.
        lengths = [[len(part) for part in np.array_split(range(self._lengths[i]), size)] for i in indices]
        whole = gather_rows(
            local, [sum(of_rank) for of_rank in zip(*lengths, strict=True)], self._ranks.tensor_group
        )
        by_rank = whole.split([length for of_rank in zip(*lengths, strict=True) for length in of_rank])
        return torch.cat(
            [by_rank[rank * len(indices) + place] for place in range(len(indices)) for rank in range(size)]
        )

    def _share(self, index: int) -> Tensor:
        share = self._shares[index]
        return share if isinstance(share, Tensor) else share.read()


class _SpillFile:
    """A file without a name that grows."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="hidden-states-")  # noqa: SIM115 - lives with this object
        self._end = 0

    def write(self, tensor: Tensor) -> _Spilled:
        data = tensor.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
        start, self._end = self._end, self._end + len(data)
        position = start
        while data:
            written = os.pwrite(self._file.fileno(), data, position)
            position, data = position + written, data[written:]
        return _Spilled(self, start, tuple(tensor.shape), tensor.dtype)

    def read(self, start: int, out: Tensor) -> None:
        data = out.view(torch.uint8).numpy().data.cast("B")
        while data:
            count = os.preadv(self._file.fileno(), [data], start)
            start, data = start + count, data[count:]


class _Spilled:
    """Where a share lies in a spill file."""

    def __init__(self, file: _SpillFile, start: int, size: tuple[int, ...], dtype: torch.dtype) -> None:
        self._file, self._start, self._size, self._dtype = file, start, size, dtype

    def read(self) -> Tensor:
        out = torch.empty(self._size, dtype=self._dtype)
        if out.numel():
            self._file.read(self._start, out)
        return out
