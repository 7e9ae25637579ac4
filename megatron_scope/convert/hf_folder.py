"""A Hugging Face model folder: its config and its safetensors, read slice by slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_scope.convert.families import family_of
from megatron_scope.convert.families.base import Family
from megatron_scope.convert.shape import ModelShape
from megatron_scope.errors import DataError

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
        self.path = Path(path).expanduser()
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

    def close(self) -> None:
        """Forgets the open files."""
        self._files.clear()
