"""Writing Megatron's `torch_dist` checkpoints block by block, in one process and without a model."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_scope.convert.background import BackgroundWriter
from megatron_scope.convert.files import sync_to_disk, write_json
from megatron_scope.convert.layouts import Size
from megatron_scope.convert.torch_dist import BACKEND, BACKEND_FILE, COMMON, METADATA

_MAX_FILE_BYTES = 4 * 2**30


class TorchDistWriter:
    """Fills an existing empty folder; a context manager. Blocks are written in the background, and nothing is
    readable before `finish`, which writes `.metadata`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, Any] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._aliases: dict[str, str] = {}
        self._file: BinaryIO | None = None
        self._file_bytes = 0
        self._num_files = 0
        self._background = BackgroundWriter()

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._background.__exit__(*error)
        if self._file is not None:
            self._file.close()

    def add(self, key: str, size: Size, place: tuple[int, ...], block: Tensor) -> None:
        """Takes a block of tensor `key`, which has `size` in all: contiguous, in memory of its own that the
        caller leaves alone, with as many dimensions; `place` is where it starts.
        """
        properties = TensorProperties(dtype=block.dtype)
        tensor = self._tensors.setdefault(key, TensorStorageMetadata(properties, torch.Size(size), []))
        index = MetadataIndex(key, torch.Size(place), len(tensor.chunks))
        tensor.chunks.append(ChunkStorageMetadata(torch.Size(place), block.shape))
        self._write(index, block, block.nbytes)

    def add_empty(self, key: str) -> None:
        """An object without content, as modules without extra state save it."""
        self._tensors[key] = BytesStorageMetadata()
        self._write(MetadataIndex(key), [None], 0)

    def alias(self, key: str, name: str) -> None:
        """Makes tensor `key` readable under another name too."""
        self._aliases[name] = key

    def new_file(self) -> None:
        """Blocks that follow go to a file of their own."""
        if self._file is not None:
            self._background.finish(self._file)
            self._file = None

    def _write(self, index: MetadataIndex, value: Any, num_bytes: int) -> None:
        if self._file_bytes + num_bytes > _MAX_FILE_BYTES:
            self.new_file()
        if self._file is None:
            path = self.folder / f"__{self._num_files}_0.distcp"
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by new_file or __exit__
            self._num_files += 1
            self._file_bytes = 0
        self._file_bytes += num_bytes
        file = self._file

        def action() -> None:
            start = file.tell()
            _save(value, file)
            name = Path(file.name).name
            self._places[index] = _StorageInfo(name, start, file.tell() - start)

        self._background.write(file, action, num_bytes)

    def finish(self) -> None:
        """Writes what makes a checkpoint of the blocks."""
        self.new_file()
        for name, key in self._aliases.items():
            self._tensors[name] = self._tensors[key]
            same = {index: info for index, info in self._places.items() if index.fqn == key}
            self._places |= {dataclasses.replace(index, fqn=name): info for index, info in same.items()}
        torch.save({}, self.folder / COMMON)
        sync_to_disk(self.folder / COMMON)
        write_json(self.folder / BACKEND_FILE, BACKEND)
        metadata = Metadata(self._tensors, storage_data=self._places, version=CURRENT_DCP_VERSION)
        (self.folder / METADATA).write_bytes(pickle.dumps(metadata))
        sync_to_disk(self.folder / METADATA)


def _save(value: Any, file: BinaryIO) -> None:
    """torch.save without the archive's check sums: torch never looks at them when it reads, and they cost
    more than the writing does.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # of this thread
    stream = _Stream(file)
    try:
        torch.save(value, stream)  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:  # of the unfinished archive; it hides that the disk is full
        raise stream.error or error from None
    finally:
        torch.serialization.set_crc32_options(before)


class _Stream:
    """What torch.save writes to: an unbuffered file, whose writes may stop short."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        left = memoryview(data).cast("B")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""
