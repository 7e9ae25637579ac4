"""Hugging Face folder to Megatron checkpoint: streamed, in one process, without a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch

from megatron_scope.config.schema import COMPANIONS
from megatron_scope.convert.blocks import dtype_name, is_finite, megatron_blocks
from megatron_scope.convert.files import check_new, check_space, copy_companions, new_folder
from megatron_scope.convert.hf_folder import TIED_COPY, HfFolder
from megatron_scope.convert.mapping import TIED_SOURCE, Entry, reading_order, stage_entries
from megatron_scope.convert.progress import ByteProgress, Converted
from megatron_scope.convert.shape import FileLayout, padded_vocab_size
from megatron_scope.convert.torch_dist_writer import TorchDistWriter
from megatron_scope.errors import DataError

_LINEAR_WEIGHTS = (
    "linear_qkv.weight",
    "linear_proj.weight",
    "linear_fc1.weight",
    "linear_fc2.weight",
)  # of modules that save an extra state beside
_MIXTURE_NORM = (
    "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.pre_mlp_layernorm.weight",
)
_ROWS = 4096  # of a table, compared together


def to_megatron(
    hf: str | Path, out: str | Path, layout: FileLayout | None = None, dtype: torch.dtype | None = None
) -> Converted:
    """Writes `out`, a `torch_dist` checkpoint with the weights, config and tokenizer of the folder `hf`.

    Memory stays at a few blocks beside what the operating system maps of one source tensor. `dtype` None
    keeps each tensor's own. Raises DataError for a folder that is not a whole model of a supported family, a
    number that is not finite (after the cast), an `out` that exists or a full disk; ConfigError for an
    impossible layout. `out` appears when it is complete, or not at all.
    """
    layout, out = layout or FileLayout(), Path(out).expanduser()
    check_new(out)
    source = HfFolder(hf)
    source.check()
    shape = source.shape
    stage_sizes = layout.check(shape, str(source.path))
    padded = padded_vocab_size(shape.vocab_rows, layout.tensor)
    stages = list(_stages(source, stage_sizes, padded))
    if dtype is None:
        _check_dtypes(source, [entry for stage in stages for entry in stage])
    total = sum(_num_bytes(entry, source, dtype) for stage in stages for entry in stage)
    check_space(out, total)
    _check_tied_copy(source)
    with new_folder(out) as folder, ByteProgress(out.name, total) as progress:
        copy_companions(source.path, folder / COMPANIONS)
        with TorchDistWriter(folder) as writer:
            for entries in stages:
                for entry in entries:
                    _write(entry, source, layout.tensor, dtype, writer, progress)
                writer.new_file()
            if shape.mixture is not None:  # Transformer Engine fuses this norm in dense layers only
                writer.alias(*_MIXTURE_NORM)
            writer.finish()
    return Converted(progress.done, progress.seconds)


def _stages(source: HfFolder, stage_sizes: tuple[int, ...], padded_vocab: int) -> Iterator[list[Entry]]:
    """The entries of each pipeline stage, layer by layer as source files have them."""
    start = 0
    for number, size in enumerate(stage_sizes):
        layers = range(start, start + size)
        first, last = number == 0, number == len(stage_sizes) - 1
        entries = stage_entries(source.family, source.shape, padded_vocab, layers, first=first, last=last)
        yield sorted((entry for entry in entries if not entry.copy), key=reading_order)
        start += size


def _write(
    entry: Entry,
    source: HfFolder,
    tensor_size: int,
    dtype: torch.dtype | None,
    writer: TorchDistWriter,
    progress: ByteProgress,
) -> None:
    whole = entry.whole_size(source.shape)
    lead = (1,) * len(entry.stack)
    for place, block in megatron_blocks(entry, source, whole, tensor_size):
        cast = block if dtype is None else block.to(dtype)
        if not is_finite(cast):
            _report_not_finite(entry, source, dtype)
        full_place = (*entry.place, *place)
        writer.add(entry.key, (*entry.stack, *whole), full_place, cast.reshape(*lead, *cast.shape))
        progress.advance(cast.nbytes)
    if entry.key.endswith(_LINEAR_WEIGHTS):
        module = entry.key.removesuffix("weight")
        writer.add_empty(f"{module}_extra_state/shard_{_dotted(entry.place)}_{_dotted(entry.stack)}")
    source.close()  # lets go of the mapped pages


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _report_not_finite(entry: Entry, source: HfFolder, dtype: torch.dtype | None) -> NoReturn:
    for name in entry.hf:
        tensor = source.slice(name)[:]
        if not tensor.isfinite().all():
            raise DataError(
                f"{source.path / source.file_of[name]}: {name} holds NaN or infinity; copy the file again, "
                "or look at the run that wrote it"
            )
        if dtype is not None and not tensor.to(dtype).isfinite().all():
            raise DataError(
                f"{source.path}: {name} holds {float(tensor.abs().max()):.3g}, which {dtype_name(dtype)} "
                "cannot hold; convert to a dtype with a wider range"
            )
    raise AssertionError(f"{entry.hf} are finite")


def _check_dtypes(source: HfFolder, entries: Iterable[Entry]) -> None:
    """A checkpoint has one dtype for a parameter of all layers."""
    first: dict[str, str] = {}
    for entry in entries:
        for name in entry.hf:
            other = first.setdefault(entry.key, name)
            if source.dtype(name) != source.dtype(other):
                raise DataError(
                    f"{source.path}: {name} is {dtype_name(source.dtype(name))} but {other} "
                    f"{dtype_name(source.dtype(other))}, which share a tensor in Megatron's checkpoints; "
                    "choose one with --dtype"
                )
    source.close()


def _check_tied_copy(source: HfFolder) -> None:
    """Some exports write the tied output table too; one that differs is another model's."""
    if not source.shape.tied_embeddings or TIED_COPY not in source.file_of:
        return
    table, copy = source.slice(TIED_SOURCE), source.slice(TIED_COPY)
    same = table.get_shape() == copy.get_shape()
    for start in range(0, source.shape.vocab_rows, _ROWS) if same else ():
        same = same and torch.equal(table[start : start + _ROWS], copy[start : start + _ROWS])
    source.close()
    if not same:
        raise DataError(
            f"{source.path}: config.json ties the output table to the embedding, but {TIED_COPY} differs "
            f"from {TIED_SOURCE}; set tie_word_embeddings to false in config.json, or remove {TIED_COPY}"
        )


def _num_bytes(entry: Entry, source: HfFolder, dtype: torch.dtype | None) -> int:
    stored = dtype or source.dtype(entry.hf[0])
    return math.prod(entry.whole_size(source.shape)) * stored.itemsize
