"""Writing Hugging Face folders: shards of bounded size, an index, and everything that is not a weight carried
along.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from megatron_scope.convert.hf_folder import INDEX, SINGLE

MAX_SHARD_BYTES = 2_000_000_000
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")


class ShardWriter:
    """Collects one process's tensors and writes them as safetensors files of at most `max_bytes` (one tensor
    at least).
    """

    def __init__(self, folder: Path, prefix: str, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.prefix = prefix
        self.max_bytes = max_bytes
        self.file_of: dict[str, str] = {}
        self.total_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._count = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a contiguous CPU tensor that the caller will not change."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size

    def close(self) -> None:
        """Writes what is left."""
        if self._pending:
            self._flush()

    def _flush(self) -> None:
        self._count += 1
        file = f"{self.prefix}-{self._count:05d}.safetensors"
        save_file(self._pending, self.folder / file, metadata={"format": "pt"})
        sync_to_disk(self.folder / file)
        self.file_of.update(dict.fromkeys(self._pending, file))
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


def finish_folder(folder: Path, like: Path, dtype: str, file_of: dict[str, str], total_bytes: int) -> None:
    """Adds the index, config.json with the tensors' dtype, and the tokenizer and other files of `like`."""
    if len(set(file_of.values())) == 1:
        (folder / next(iter(file_of.values()))).rename(folder / SINGLE)
    else:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
        _write_json(folder / INDEX, index)
    for source in sorted(like.iterdir()):
        is_weight = source.suffix in _WEIGHT_SUFFIXES or source.name.endswith(".index.json")
        if source.is_file() and not is_weight and source.name != "config.json":
            shutil.copyfile(source, folder / source.name)
            sync_to_disk(folder / source.name)
    config = json.loads((like / "config.json").read_text(encoding="utf-8"))
    # Both names of the key: transformers before 5, and servers built on it, read the older one.
    _write_json(folder / "config.json", {**config, "dtype": dtype, "torch_dtype": dtype})
    sync_to_disk(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync_to_disk(path)


def sync_to_disk(path: Path) -> None:
    """Flushes a file or folder, so that a rename after it never shows a half-written one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
