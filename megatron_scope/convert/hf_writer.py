"""What makes a Hugging Face folder of weight files: the index, and everything that is not a weight carried
along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_scope.convert.blocks import dtype_name
from megatron_scope.convert.files import copy_companions, sync_to_disk, write_json
from megatron_scope.convert.hf_folder import INDEX, SINGLE
from megatron_scope.convert.safetensors_writer import TensorPlan

MAX_SHARD_BYTES = 5_000_000_000


def shard_names(count: int) -> list[str]:
    """The names of a folder's weight files, as transformers writes them."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def finish_folder(folder: Path, like: Path, files: Mapping[str, Sequence[TensorPlan]]) -> None:
    """Adds to weight files the index, config.json with the weights' dtype, and the tokenizer and other files
    of `like`. A single file gets the name that it is looked for by.
    """
    if len(files) == 1:
        (folder / next(iter(files))).rename(folder / SINGLE)
    else:
        total_bytes = sum(plan.num_bytes for plans in files.values() for plan in plans)
        file_of = {plan.name: file for file, plans in files.items() for plan in plans}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
        write_json(folder / INDEX, index)
    copy_companions(like, folder)
    dtype = dtype_name(next(iter(files.values()))[0].dtype)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # Both names of the key: transformers before 5, and servers built on it, read the older one.
    write_json(path, {**config, "dtype": dtype, "torch_dtype": dtype})
    sync_to_disk(folder)
