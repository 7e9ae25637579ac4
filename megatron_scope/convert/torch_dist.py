"""Megatron's `torch_dist` checkpoint format, read block by block in one process and without a model.

A folder holds `.distcp` files, tensors that torch saved one after another; `.metadata`, a pickled Metadata of
torch.distributed.checkpoint that says which block of which tensor lies where; `common.pt` and
`metadata.json`, Megatron's own.
"""

from __future__ import annotations

import enum
import io
import itertools
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_scope.convert.layouts import Region, Size
from megatron_scope.errors import DataError

METADATA = ".metadata"
COMMON = "common.pt"
BACKEND_FILE = "metadata.json"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# All that a `.metadata` file names; unpickling anything else could run code.
_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    # Megatron keeps the plans of all ranks beside, to save time at the next checkpoint.
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}


_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}


def _member(kind: Any, name: str) -> enum.Enum:
    """A member of an enumeration by name, and nothing else that getattr could reach."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError(f"it takes {name!r} of {kind!r}, which is no enumeration")
    return kind[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("builtins", "getattr"):
            return _member  # as Python 3.11.0 to 3.11.3 pickles members of enumerations
        if global_name not in _NAMES.get(module_name, ()):
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no checkpoint needs")
        return super().find_class(module_name, global_name)


class TorchDistFolder:
    """The tensors of a checkpoint by key. DataError when it is not one or its files are damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = self._read_metadata()
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._places = metadata.storage_data
        self._by_place: dict[tuple[str, int], dict[tuple[int, ...], list[int]]] = {}
        self._data_starts: dict[tuple[str, int, Size, torch.dtype], int] = {}

    def _read_metadata(self) -> Any:
        path = self.path / METADATA
        try:
            with open(path, "rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{path} is missing; expected a Megatron checkpoint in torch_dist format, written to the end"
            ) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        except Exception as error:  # a broken pickle raises of many kinds
            raise DataError(f"{path} is not the metadata of a checkpoint ({_one_line(error)})") from None
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise DataError(f"{path} is not the metadata of a checkpoint written to the end; copy it again")
        return metadata

    def size(self, key: str) -> Size:
        """The size of a tensor, leading axes included."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""
        return self.tensors[key].properties.dtype

    def check_files(self) -> None:
        """DataError when a file is missing or shorter than the metadata says."""
        ends: dict[str, int] = {}
        for place in self._places.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
        for name, end in sorted(ends.items()):
            path = self.path / name
            found = path.stat().st_size if path.exists() else None
            if found is None or found < end:
                got = "no file" if found is None else f"{found} bytes"
                raise DataError(f"{path} should have {end} bytes, found {got}; copy it again")

    def read(self, key: str, place: tuple[int, ...], region: Region) -> Tensor:
        """The numbers of a region, one slice with start and stop a dimension, at a place of the tensor's
        leading axes; reads what it needs only.
        """
        dtype = self.dtype(key)
        out = torch.empty([axis.stop - axis.start for axis in region], dtype=dtype)
        target, missing = _bytes_of(out), out.numel()
        for number in self._blocks_at(key, len(place)).get(place, ()):
            chunk = self.tensors[key].chunks[number]
            offsets, sizes = chunk.offsets[len(place) :], chunk.sizes[len(place) :]
            common = [
                slice(max(axis.start, start), min(axis.stop, start + length))
                for axis, start, length in zip(region, offsets, sizes, strict=True)
            ]
            if any(axis.start >= axis.stop for axis in common):
                continue
            lead = tuple(at - start for at, start in zip(place, chunk.offsets, strict=False))
            taken = (*lead, *(_shifted(axis, start) for axis, start in zip(common, offsets, strict=True)))
            given = tuple(_shifted(axis, whole.start) for axis, whole in zip(common, region, strict=True))
            info = self._places.get(MetadataIndex(key, chunk.offsets, number))
            if info is None:
                raise DataError(
                    f"{self.path / METADATA} does not say where a block of {key} lies; copy it again"
                )
            target[given] = self._block(key, info, tuple(chunk.sizes), dtype)[taken]
            missing -= math.prod(axis.stop - axis.start for axis in common)
        if missing:
            raise DataError(f"{self.path / METADATA} lists no block for {missing} numbers of {key}")
        return out

    def _blocks_at(self, key: str, axes: int) -> dict[tuple[int, ...], list[int]]:
        """The numbers of a tensor's blocks by their place on its leading axes."""
        if (key, axes) not in self._by_place:
            found: dict[tuple[int, ...], list[int]] = {}
            for number, chunk in enumerate(self.tensors[key].chunks):
                starts, lengths = chunk.offsets[:axes], chunk.sizes[:axes]
                spans = (range(start, start + length) for start, length in zip(starts, lengths, strict=True))
                for place in itertools.product(*spans):
                    found.setdefault(place, []).append(number)
            self._by_place[key, axes] = found
        return self._by_place[key, axes]

    def _block(self, key: str, place: Any, sizes: Size, dtype: torch.dtype) -> np.ndarray:
        """A block as bytes [*sizes, bytes a number], mapped from its file for as long as the array lives."""
        path = self.path / place.relative_path
        start = self._data_start(key, path, place, sizes, dtype)
        try:
            return np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(*sizes, dtype.itemsize))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({_one_line(error)}); copy it again") from None

    def _data_start(self, key: str, path: Path, place: Any, sizes: Size, dtype: torch.dtype) -> int:
        """Where in its file the numbers of a block begin: torch wraps each in an archive."""
        known = (place.relative_path, place.offset, sizes, dtype)
        if known not in self._data_starts:
            try:
                with open(path, "rb") as file:
                    saved, offset = _read_header(_Section(file, place.offset, place.length))
            except Exception as error:  # zipfile and pickle raise of many kinds on a damaged file
                raise DataError(f"{path}: {key} cannot be read ({_one_line(error)}); copy it again") from None
            if saved.dtype != dtype or saved.size != sizes or saved.offset or not saved.is_contiguous:
                raise DataError(
                    f"{path}: {key} has a block of {saved.dtype}, size {saved.size} and strides "
                    f"{saved.stride}; {METADATA} says {dtype}, {sizes}, contiguous"
                )
            self._data_starts[known] = place.offset + offset
        return self._data_starts[known]


class _Section(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._length - self._position))
        data = os.pread(self._file.fileno(), length, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _SavedTensor(NamedTuple):
    """What torch.save says of a tensor beside its numbers."""

    dtype: torch.dtype
    size: Size
    stride: Size
    offset: int

    @property
    def is_contiguous(self) -> bool:
        wanted = (math.prod(self.size[axis + 1 :]) for axis in range(len(self.size)))
        return all(
            length == 1 or got == want
            for length, got, want in zip(self.size, self.stride, wanted, strict=True)
        )


class _TensorUnpickler(pickle.Unpickler):
    """Reads how a tensor was saved, and makes nothing but a _SavedTensor of it."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "torch" and global_name in _STORAGES:
            return _STORAGES[global_name]
        made = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda dtype, offset, size, stride, *_: _SavedTensor(
                dtype, tuple(size), tuple(stride), offset
            ),
            ("torch._utils", "_rebuild_parameter"): lambda saved, *_: saved,
            ("collections", "OrderedDict"): dict,
        }
        if (module_name, global_name) not in made:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no tensor needs")
        return made[module_name, global_name]

    def persistent_load(self, pid: Any) -> torch.dtype:
        _, dtype, *_ = pid  # ("storage", its type, its name, device, length)
        return dtype


def _read_header(section: _Section) -> tuple[_SavedTensor, int]:
    """A saved tensor without its numbers, and where in the section they begin.

    torch.load could tell too, at thirty times the cost, and takes an interrupt for a damaged file.
    """
    with zipfile.ZipFile(section) as archive:  # pyright: ignore[reportArgumentType]
        records = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    pickled = records["data.pkl"]
    section.seek(_record_start(section, pickled))
    saved = _TensorUnpickler(io.BytesIO(section.read(pickled.file_size) or b"")).load()
    (numbers,) = (entry for name, entry in records.items() if name.startswith("data/"))
    if numbers.file_size != math.prod(saved.size) * saved.dtype.itemsize:
        raise ValueError(f"its storage has {numbers.file_size} bytes")
    return saved, _record_start(section, numbers)


def _record_start(section: _Section, entry: zipfile.ZipInfo) -> int:
    """Where a record begins in an archive that compresses nothing."""
    # A local header: 30 bytes, the lengths of name and extra field at 26, then both of them.
    section.seek(entry.header_offset)
    header = section.read(30)
    assert header is not None
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return entry.header_offset + 30 + lengths


def _shifted(axis: slice, start: int) -> slice:
    return slice(axis.start - start, axis.stop - start)


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor's bytes [*size, bytes a number], shared."""
    return tensor.view(-1).view(torch.uint8).numpy().reshape(*tensor.shape, tensor.element_size())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
