"""A Hugging Face model folder: its config and its safetensors, read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_scope.convert.families import family_of
from megatron_scope.convert.families.base import Family
from megatron_scope.convert.mapping import Entry, model_entries
from megatron_scope.convert.shape import ModelShape
from megatron_scope.errors import DataError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TIED_COPY = "lm_head.weight"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the folder; DataError when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} is missing; expected a Hugging Face model folder") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON or not UTF-8
        raise DataError(f"{path} is not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object; copy the file again")
    return value


class HfFolder:
    """Reads a folder's shape at once and its tensors on demand."""

    def __init__(self, path: str | Path) -> None:
        self.path = self.companions = Path(path).expanduser()
        config_path = self.path / "config.json"
        self.config = read_json(config_path)
        self.family: Family = family_of(self.config, str(config_path))
        self.shape: ModelShape = self.family.read_shape(self.config, str(config_path))
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] | None = None

    @property
    def file_of(self) -> dict[str, str]:
        """The file that holds each tensor, by name."""
        if self._file_of is None:
            self._file_of = self._read_index()
        return self._file_of

    def _read_index(self) -> dict[str, str]:
        if (self.path / INDEX).exists():
            index = read_json(self.path / INDEX)
            if not isinstance(index.get("weight_map"), dict):
                raise DataError(f"{self.path / INDEX} has no weight_map; copy the file again")
            for name, file in index["weight_map"].items():
                if not isinstance(file, str):
                    raise DataError(
                        f"{self.path / INDEX} says that {name} is in {file}; expected a file name: copy the "
                        "file again"
                    )
            return index["weight_map"]
        if not (self.path / SINGLE).exists():
            raise DataError(
                f"{self.path} holds neither {SINGLE} nor {INDEX}; only safetensors weights are read"
            )
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            path = self.path / name
            try:
                self._files[name] = safe_open(path, framework="pt")
            except (FileNotFoundError, OSError, SafetensorError) as error:
                raise DataError(
                    f"{path} cannot be read as safetensors ({error}); copy the file again"
                ) from None
        return self._files[name]

    def slice(self, name: str) -> Any:
        """An object that reads rows and columns of one tensor; DataError when the folder lacks it."""
        if name not in self.file_of:
            raise DataError(f"{self.path} has no tensor {name}, which {self.family.architecture} needs")
        file = self._open(self.file_of[name])
        try:
            return file.get_slice(name)
        except SafetensorError:
            raise DataError(
                f"{self.path / self.file_of[name]} has no tensor {name}, which {INDEX} promises; "
                "copy both again"
            ) from None

    def shard(self, entry: Entry, rank: int, size: int) -> Tensor:
        """A rank's part of a parameter, reading only its rows (or columns)."""
        return entry.layout.shard([self.slice(name) for name in entry.hf], self.shape, rank, size)

    def check(self) -> None:
        """DataError when a tensor is missing, unknown, listed wrongly or of a size or dtype that config.json
        or this package does not know; opens every file.
        """
        self._check_names()
        self._check_files()

    def _check_names(self) -> None:
        entries = model_entries(self.family, self.shape, self.shape.vocab_rows)
        expected = {name for entry in entries for name in entry.hf}
        found = set(self.file_of)
        listed = f" (by {INDEX})" if (self.path / INDEX).exists() else ""
        for missing in sorted(expected - found)[:1]:
            raise DataError(
                f"{self.path}{listed} has no tensor {missing}, which {self.family.architecture} needs"
            )
        for unknown in sorted(found - expected - self.redundant(found))[:1]:
            raise DataError(
                f"{self.path}{listed} holds {unknown}, which {self.family.architecture} does not have"
            )

    def _check_files(self) -> None:
        listed: dict[str, set[str]] = {}
        for name, file in self.file_of.items():
            listed.setdefault(file, set()).add(name)
        for file, names in listed.items():
            for name in sorted(set(self._open(file).keys()) - names)[:1]:
                raise DataError(
                    f"{self.path / file} holds {name}, which {INDEX} does not list; copy both again"
                )
        for entry in model_entries(self.family, self.shape, self.shape.vocab_rows):
            for name, size in zip(entry.hf, entry.hf_sizes, strict=True):
                source = self.slice(name)
                if tuple(source.get_shape()) != size:
                    raise DataError(
                        f"{self.path / self.file_of[name]}: {name} has size {tuple(source.get_shape())}, but "
                        f"config.json means {size}; config.json and the weights disagree"
                    )
                if source.get_dtype() not in DTYPES:
                    raise DataError(
                        f"{self.path / self.file_of[name]}: {name} is {source.get_dtype()}; supported: "
                        f"{', '.join(DTYPES)}"
                    )

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor."""
        return DTYPES[self.slice(name).get_dtype()]

    def redundant(self, names: Iterable[str]) -> set[str]:
        """Tensors, among `names` or not, that some exports write though the model has them otherwise."""
        found = {name for name in names if name.endswith("rotary_emb.inv_freq")}
        return found | {TIED_COPY} if self.shape.tied_embeddings else found

    def close(self) -> None:
        """Forgets the open files."""
        self._files.clear()
