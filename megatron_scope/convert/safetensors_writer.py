"""Safetensors files written row by row: the header comes first, since every name and size is known."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_scope.convert.background import BackgroundWriter, naming
from megatron_scope.convert.layouts import Size

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written."""

    name: str
    size: Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // self.size[0]


def plan_shards(tensors: Sequence[TensorPlan], max_bytes: int) -> list[list[TensorPlan]]:
    """Tensors in order, in files of at most `max_bytes` (one tensor at least)."""
    shards: list[list[TensorPlan]] = []
    num_bytes = 0
    for tensor in tensors:
        if not shards or num_bytes + tensor.num_bytes > max_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(tensor)
        num_bytes += tensor.num_bytes
    return shards


class SafetensorsWriter:
    """Writes rows of the planned tensors, in any order, into files of an existing folder; a context manager.

    `files` are the file names and what each holds. Rows are written in the background; a file is flushed and
    closed when it is full.
    """

    def __init__(self, folder: Path, files: dict[str, list[TensorPlan]]) -> None:
        self.folder = folder
        self._files = files
        self._file_of = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
        self._starts: dict[str, int] = {}
        self._row_bytes: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._open: dict[str, BinaryIO] = {}
        self._background = BackgroundWriter()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._background.__exit__(*error)
        for file in self._open.values():
            file.close()

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Takes some rows (contiguous CPU memory that the caller leaves alone) of a tensor."""
        file_name = self._file_of[name]
        if file_name not in self._open:
            self._begin(file_name)
        file = self._open[file_name]
        position = self._starts[name] + first_row * self._row_bytes[name]
        data = rows.view(-1).view(torch.uint8).numpy().data
        self._background.write(file, lambda: _write_at(file, position, data), rows.nbytes)
        self._left[file_name] -= rows.nbytes
        if not self._left[file_name]:
            self._background.finish(self._open.pop(file_name))

    def _begin(self, name: str) -> None:
        tensors, header, end = self._files[name], {}, 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.size),
                "data_offsets": [end, end + tensor.num_bytes],
            }
            end += tensor.num_bytes
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the numbers are aligned
        file = open(self.folder / name, "wb", buffering=0)  # noqa: SIM115 - closed when full or by __exit__
        self._open[name], self._left[name] = file, end
        with naming(file):
            file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            self._starts[tensor.name] = 8 + len(text) + header[tensor.name]["data_offsets"][0]
            self._row_bytes[tensor.name] = tensor.row_bytes


def _write_at(file: BinaryIO, position: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(file.fileno(), data, position)
        position, data = position + written, data[written:]
