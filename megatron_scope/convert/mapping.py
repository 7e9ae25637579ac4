"""One pipeline stage's parameters beside their Hugging Face tensors, read in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scope.convert.families.base import Family, Rule
from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.convert.layouts import Layout, Vocabulary
from megatron_scope.convert.shape import ModelShape
from megatron_scope.errors import DataError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter by its name in this stage and its Hugging Face names; a `copy` is held elsewhere too and
    not exported.
    """

    parameter: str
    hf: tuple[str, ...]
    layout: Layout
    copy: bool = False


def stage_entries(
    family: Family, shape: ModelShape, padded_vocab: int, layers: range, *, first: bool, last: bool
) -> list[Entry]:
    """Entries of the stage that holds the global `layers`, the embedding if `first`, the output table if
    `last`.
    """
    entries = []
    for rule in family.rules(shape):
        if rule.per_layer:
            entries += [_layer_entry(rule, local, layer) for local, layer in enumerate(layers)]
        elif rule.table is not None:
            entries += _table_entry(rule, shape, padded_vocab, first=first, last=last)
        elif last:
            assert rule.layout is not None
            entries.append(Entry(rule.megatron, rule.hf, rule.layout))
    return entries


def _layer_entry(rule: Rule, local: int, layer: int) -> Entry:
    assert rule.layout is not None
    names = tuple(name.format(layer=layer) for name in rule.hf)
    return Entry(rule.megatron.format(layer=local), names, rule.layout)


def _table_entry(rule: Rule, shape: ModelShape, padded_vocab: int, *, first: bool, last: bool) -> list[Entry]:
    layout = Vocabulary(padded_vocab)
    if rule.table == "embedding":
        return [Entry(rule.megatron, rule.hf, layout)] if first else []
    if not last:
        return []
    if not shape.tied_embeddings:
        return [Entry(rule.megatron, rule.hf, layout)]
    # A tied output table is the embedding itself, of which a last stage that is not the first keeps a copy.
    return [] if first else [Entry(rule.megatron, ("model.embed_tokens.weight",), layout, copy=True)]


def check_names(folder: HfFolder) -> None:
    """DataError when the folder lacks a tensor of its family or holds one that the family does not know."""
    shape = folder.shape
    entries = stage_entries(
        folder.family, shape, shape.vocab_rows, range(shape.num_layers), first=True, last=True
    )
    expected = {name for entry in entries for name in entry.hf}
    found = set(folder.file_of)
    if shape.tied_embeddings:
        found.discard("lm_head.weight")  # some exports write the tied table twice
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    for missing in sorted(expected - found)[:1]:
        raise DataError(f"{folder.path} has no tensor {missing}, which {folder.family.architecture} needs")
    for unknown in sorted(found - expected - ignored)[:1]:
        raise DataError(f"{folder.path} holds {unknown}, which {folder.family.architecture} does not have")


@torch.no_grad()
def load_stage(
    parameters: Mapping[str, Tensor],
    entries: Iterable[Entry],
    folder: HfFolder,
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Fills a stage's parameters in place, reading only this rank's slices; DataError on a shape that does
    not fit.
    """
    left = set(parameters)
    for entry in entries:
        target = parameters[entry.parameter]
        value = entry.layout.shard(
            [folder.slice(name) for name in entry.hf], folder.shape, tensor_rank, tensor_size
        )
        if value.shape != target.shape:
            raise DataError(
                f"{folder.path}: {', '.join(entry.hf)} give a shard of shape {tuple(value.shape)} but the "
                "model has "
                f"{tuple(target.shape)}; config.json and the weights disagree"
            )
        target.copy_(value)
        left.discard(entry.parameter)
    if left:
        raise DataError(f"{folder.family.architecture}: no rule for the parameters {sorted(left)}")


@torch.no_grad()
def export_stage(
    entries: Iterable[Entry],
    local: Callable[[str], Tensor],
    shape: ModelShape,
    group: dist.ProcessGroup,
    tensor_rank: int,
    tensor_size: int,
) -> Iterator[tuple[str, Tensor]]:
    """Yields this stage's (Hugging Face name, CPU tensor) on tensor rank 0, one parameter at a time.

    `local` gives a parameter's shard (or its gradient's) by name. A collective: every tensor rank must run it
    to the end; the others yield nothing.
    """
    for entry in entries:
        if entry.copy:
            continue
        shard = local(entry.parameter).detach().contiguous()
        parts = [torch.empty_like(shard) for _ in range(tensor_size)] if tensor_rank == 0 else None
        if tensor_size == 1:
            parts = [shard]
        else:
            dist.gather(shard, parts, group=group, group_dst=0)
        if tensor_rank == 0:
            assert parts is not None
            joined = entry.layout.join(parts, shape)
            # A copy, so that a caller may keep it while the optimizer goes on.
            yield from (
                (name, value.cpu().clone().contiguous()) for name, value in zip(entry.hf, joined, strict=True)
            )
