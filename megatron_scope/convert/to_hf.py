"""Megatron checkpoint to Hugging Face folder: streamed, in one process, without a model."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_scope.convert.blocks import dtype_name, hf_blocks, is_finite
from megatron_scope.convert.files import check_new, check_space, new_folder
from megatron_scope.convert.hf_writer import MAX_SHARD_BYTES, finish_folder, shard_names
from megatron_scope.convert.mapping import Entry, model_entries, reading_order
from megatron_scope.convert.megatron_folder import MegatronFolder
from megatron_scope.convert.progress import ByteProgress, Converted
from megatron_scope.convert.safetensors_writer import SafetensorsWriter, TensorPlan, plan_shards
from megatron_scope.errors import DataError


def to_hf(
    megatron: str | Path,
    out: str | Path,
    like: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Converted:
    """Writes `out`, a Hugging Face folder with the weights of the checkpoint `megatron`, of training or of
    `to_megatron` and of any layout.

    Config, generation config and tokenizer come from the checkpoint, or from the folder `like`. No row that
    pads a vocabulary is written. `dtype` None keeps the stored one. Raises DataError for a checkpoint that is
    damaged or not of the config's model, a number that is not finite, an `out` that exists or a full disk.
    `out` appears when it is complete, or not at all.
    """
    out = Path(out).expanduser()
    check_new(out)
    source = MegatronFolder(megatron, like)
    source.check()
    entries = sorted(model_entries(source.family, source.shape, source.shape.vocab_rows), key=reading_order)
    plans = [
        TensorPlan(name, size, dtype or source.dtype(entry))
        for entry in entries
        for name, size in zip(entry.hf, entry.hf_sizes, strict=True)
    ]
    total = sum(plan.num_bytes for plan in plans)
    check_space(out, total)
    shards = plan_shards(plans, max_shard_bytes)
    files = dict(zip(shard_names(len(shards)), shards, strict=True))
    with new_folder(out) as folder, ByteProgress(out.name, total) as progress:
        with SafetensorsWriter(folder, files) as writer:
            for entry in entries:
                _write(entry, source, dtype, writer, progress)
        finish_folder(folder, source.companions, files)
    return Converted(progress.done, progress.seconds)


def _write(
    entry: Entry,
    source: MegatronFolder,
    dtype: torch.dtype | None,
    writer: SafetensorsWriter,
    progress: ByteProgress,
) -> None:
    for index, first_row, rows in hf_blocks(entry, source, entry.whole_size(source.shape)):
        name, cast = entry.hf[index], rows if dtype is None else rows.to(dtype)
        if not is_finite(cast):
            problem = (
                f"numbers that {dtype_name(cast.dtype)} cannot hold; convert to a dtype with a wider range"
                if is_finite(rows)
                else "NaN or infinity; look at the run that wrote it, or take an earlier checkpoint"
            )
            raise DataError(f"{source.path}: {entry.key} (for {name}) holds {problem}")
        writer.write(name, first_row, cast)
        progress.advance(cast.nbytes)
