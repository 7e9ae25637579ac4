"""Folders that appear whole or not at all, and what goes along with a model's weights."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_scope.errors import DataError

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name at the end, or is removed on any error.

    Raises DataError when `out` exists: nothing is overwritten. What a killed run left under the hidden name
    is removed first.
    """
    check_new(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for folder, _, _ in os.walk(partial):
            sync_to_disk(Path(folder))
        partial.rename(out)
        sync_to_disk(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(out: Path) -> None:
    """DataError when something of this name exists."""
    if out.exists() or out.is_symlink():
        raise DataError(f"{out} exists already; remove it or name another folder")


def check_space(out: Path, num_bytes: int) -> None:
    """DataError when the disk that `out` will lie on has less room than `num_bytes`."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise DataError(
            f"{out} needs {num_bytes / 1e9:.2f} GB but {parent} has {free / 1e9:.2f} GB free; make room or "
            "name a folder on another disk"
        )


def copy_companions(source: Path, out: Path) -> None:
    """Copies a model folder's files that are no weights (config.json, tokenizer, generation config, ...)."""
    out.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        is_weight = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not is_weight:
            shutil.copyfile(file, out / file.name)
            sync_to_disk(out / file.name)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object to disk, flushed."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync_to_disk(path)


def sync_to_disk(path: Path) -> None:
    """Flushes a file or folder, so that a rename after it never shows a half-written one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
