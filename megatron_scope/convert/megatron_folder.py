"""Megatron checkpoints as a source of weights, read slice by slice."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_scope.config.schema import COMPANIONS
from megatron_scope.convert.families import family_of
from megatron_scope.convert.hf_folder import DTYPES, read_json
from megatron_scope.convert.layouts import Region, Size, Vocabulary
from megatron_scope.convert.mapping import Entry, checkpoint_spellings, model_entries
from megatron_scope.convert.torch_dist import METADATA, TorchDistFolder
from megatron_scope.errors import DataError

_LATEST = "latest_checkpointed_iteration.txt"
_RELEASE = "release"  # what Megatron-LM calls a checkpoint that was converted, not trained
_WEIGHTS = ("embedding.", "decoder.", "output_layer.")


class MegatronFolder:
    """A `torch_dist` checkpoint of any writer and layout. Reads its shape at once and its tensors on demand.

    `like` is a Hugging Face folder of the same architecture for a checkpoint that brings no config of its
    own. Raises DataError for what is not a checkpoint, or one without a config.
    """

    def __init__(self, path: str | Path, like: str | Path | None = None) -> None:
        self.path = _latest(Path(path).expanduser())
        self._stored = TorchDistFolder(self.path)
        self.companions = self.path / COMPANIONS if like is None else Path(like).expanduser()
        config_path = self.companions / "config.json"
        if like is None and not config_path.exists():
            raise DataError(
                f"{config_path} is missing: this checkpoint does not say what model it is of; name a Hugging "
                "Face folder of the same architecture (--like HF_DIR, or hf beside megatron in a config)"
            )
        config = read_json(config_path)
        self.family = family_of(config, str(config_path))
        self.shape = self.family.read_shape(config, str(config_path))

    @staticmethod
    def has_config(path: str | Path) -> bool:
        """Whether a checkpoint says itself what model it is of."""
        return (_latest(Path(path).expanduser()) / COMPANIONS / "config.json").exists()

    def check(self) -> None:
        """DataError when a tensor is missing, unknown or of a size that config.json contradicts, or a file is
        not there in full.
        """
        known: set[str] = set()
        for entry in model_entries(self.family, self.shape, self.shape.vocab_rows):
            key, _, stack = self._locate(entry)
            wanted, found = (*stack, *entry.whole_size(self.shape)), self._stored.size(key)
            is_table = isinstance(entry.layout, Vocabulary)  # padded to any length
            if found != wanted and not (is_table and found[1:] == wanted[1:] and found[0] >= wanted[0]):
                raise DataError(
                    f"{self.path}: {key} has size {found}, but {self.companions / 'config.json'} means "
                    f"{wanted}; use the config of the model that was saved"
                )
            if self._stored.dtype(key) not in DTYPES.values():
                raise DataError(
                    f"{self.path}: {key} is {self._stored.dtype(key)}; supported: {', '.join(DTYPES)}"
                )
            known.update(spelling for spelling, _ in checkpoint_spellings(entry))
        for key in sorted(self._stored.tensors):
            if key.startswith(_WEIGHTS) and key not in known:
                raise DataError(f"{self.path} holds {key}, which {self.family.architecture} does not have")
        self._stored.check_files()

    def close(self) -> None:
        """Nothing stays open."""

    def dtype(self, entry: Entry) -> torch.dtype:
        """The dtype that a parameter is stored in."""
        return self._stored.dtype(self._locate(entry)[0])

    def shard(self, entry: Entry, rank: int, size: int) -> Tensor:
        """A rank's part of a parameter; rows that pad a vocabulary are zeros, whatever was saved there."""
        regions = entry.layout.regions(entry.whole_size(self.shape), rank, size)
        pieces = [self._read(entry, region) for region in regions]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read(self, entry: Entry, region: Region) -> Tensor:
        key, place, _ = self._locate(entry)
        if not isinstance(entry.layout, Vocabulary):
            return self._stored.read(key, place, region)
        rows, columns = region
        real = slice(min(rows.start, self.shape.vocab_rows), min(rows.stop, self.shape.vocab_rows))
        taken = self._stored.read(key, place, (real, columns))
        padding = rows.stop - rows.start - taken.shape[0]
        return torch.cat([taken, taken.new_zeros(padding, taken.shape[1])]) if padding else taken

    def _locate(self, entry: Entry) -> tuple[str, tuple[int, ...], Size]:
        """(key, place, stack) of a parameter as this checkpoint has them."""
        for key, in_name in checkpoint_spellings(entry):
            if key in self._stored.tensors:
                return key, entry.place[in_name:], entry.stack[in_name:]
        raise DataError(
            f"{self.path} has no tensor {entry.key} (for {entry.hf[0]}), which {self.family.architecture} "
            "needs"
        )


def _latest(path: Path) -> Path:
    """The folder of Megatron-LM's newest iteration where `path` holds several, else `path`."""
    if (path / METADATA).exists() or not (path / _LATEST).exists():
        return path
    iteration = (path / _LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if iteration.isascii() and iteration.isdigit():
        return path / f"iter_{int(iteration):07d}"
    if iteration != _RELEASE:
        raise DataError(
            f"{path / _LATEST} says {iteration[:40]!r}; expected a number or {_RELEASE}: name the folder of "
            "the iteration itself"
        )
    return path / _RELEASE
